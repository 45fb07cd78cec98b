//! Normalisation.

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
    /// Normalises each row of `x`, f32 `[tokens, width]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let mean = x.clone().square().mean_dim(1);
        let inverse = mean.add_scalar(self.epsilon).sqrt().recip();
        x * inverse * self.scale.clone().unsqueeze()
    }
}
