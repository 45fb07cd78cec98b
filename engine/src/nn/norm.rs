//! Normalisation over the last axis.

use burn::tensor::Tensor;

/// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): `x / sqrt(mean(x²) + ε) · scale`, in f32.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[width]`, f32.
    pub scale: Tensor<1>,
    /// ε.
    pub epsilon: f32,
}

impl RmsNorm {
    /// Normalises each row of `x`, f32 `[…, width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms(x, self.epsilon) * self.scale.clone().unsqueeze()
    }
}

/// `x / sqrt(mean(x²) + ε)` of each row of `x`, f32 `[…, width]`: an RMSNorm without scale.
pub fn rms<const D: usize>(x: Tensor<D>, epsilon: f32) -> Tensor<D> {
    let mean = x.clone().square().mean_dim(D - 1);
    let inverse = mean.add_scalar(epsilon).sqrt().recip();
    x * inverse
}

/// LayerNorm (Ba et al. 2016, arXiv:1607.06450): `(x − mean) / sqrt(variance + ε) · weight + bias`, in f32.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[width]`, f32.
    pub weight: Tensor<1>,
    /// `[width]`, f32.
    pub bias: Tensor<1>,
    /// ε.
    pub epsilon: f32,
}

impl LayerNorm {
    /// Normalises each row of `x`, f32 `[…, width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        standardised(x, self.epsilon) * self.weight.clone().unsqueeze() + self.bias.clone().unsqueeze()
    }
}

/// `(x − mean) / sqrt(variance + ε)` of each row of `x`, f32 `[…, width]`.
pub fn standardised<const D: usize>(x: Tensor<D>, epsilon: f32) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = centred.clone().square().mean_dim(D - 1);
    centred * variance.add_scalar(epsilon).sqrt().recip()
}
