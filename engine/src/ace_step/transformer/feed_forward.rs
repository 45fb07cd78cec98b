//! The gated feed-forward layers of the blocks.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

use crate::error::Result;
use crate::kernels::depthwise_glu::depthwise_glu;
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::weights::Weights;

/// GLUMBConv (`diffusers`, of Sana, arXiv:2410.10629) along the frames: wider by a convolution over single frames, SiLU, a
/// convolution of each channel over three frames, the second half as the gate of the first, narrower again.
pub struct GluMbConv {
    inverted: Linear,
    /// f32 `[3, channels]`: of the frame before, the frame, the one behind.
    depth: Tensor<2>,
    /// f32 `[channels]`.
    depth_bias: Tensor<1>,
    point: Linear,
}

impl GluMbConv {
    /// For a width and the width of the gated layer.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn new(width: usize, mlp_dim: usize, weights: &Weights<'_>) -> Result<GluMbConv> {
        let channels = 2 * mlp_dim;
        let depth = weights.tensor("depth_conv.conv.weight", [channels, 1, 3])?;
        Ok(GluMbConv {
            inverted: weights.pointwise("inverted_conv.conv", [channels, width, 1], true)?,
            depth: depth.reshape([channels, 3]).transpose(),
            depth_bias: weights.tensor("depth_conv.conv.bias", [channels])?,
            point: weights.pointwise("point_conv.conv", [width, mlp_dim, 1], false)?,
        })
    }

    /// f32 `[batch, frames, width]` → the same.
    pub fn forward(&self, x: Tensor<3>, hooks: &Hooks<'_>) -> Tensor<3> {
        let u = self.inverted.forward(x);
        if hooks.is_recording() {
            let u = silu(u.clone());
            hooks.see_as("inverted_conv", &u, |u| u.swap_dims(1, 2));
            hooks.see_as("depth_conv", &self.over_frames(u), |u| u.swap_dims(1, 2));
        }
        let out = self.point.forward(depthwise_glu(u, self.depth.clone(), self.depth_bias.clone()));
        hooks.see("", &out);
        out
    }

    /// The reference of [`GluMbConv::forward`] in plain tensor operations.
    pub fn forward_plain(&self, x: Tensor<3>) -> Tensor<3> {
        let u = self.over_frames(silu(self.inverted.forward(x)));
        let mlp_dim = u.dims()[2] / 2;
        let (value, gate) = (u.clone().narrow(2, 0, mlp_dim), u.narrow(2, mlp_dim, mlp_dim));
        self.point.forward(value * silu(gate))
    }

    /// Each channel's convolution over its own three frames; beyond both ends are zeros.
    fn over_frames(&self, u: Tensor<3>) -> Tensor<3> {
        let [batch, frames, channels] = u.dims();
        let tap = |index| self.depth.clone().narrow(0, index, 1).reshape([1, 1, channels]);
        let bias = self.depth_bias.clone().reshape([1, 1, channels]);
        let own = u.clone() * tap(1) + bias;
        if frames == 1 {
            return own;
        }
        let edge = Tensor::zeros([batch, 1, channels], &u.device());
        let before = Tensor::cat(vec![edge.clone(), u.clone().narrow(1, 0, frames - 1)], 1);
        let behind = Tensor::cat(vec![u.narrow(1, 1, frames - 1), edge], 1);
        own + before * tap(0) + behind * tap(2)
    }
}
