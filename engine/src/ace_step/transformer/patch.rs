//! From a latent to frames of the transformer's width, and back.

use burn::tensor::Tensor;

use super::block::{EPSILON, modulated};
use super::config::{Config, GROUPS};
use crate::error::Result;
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::nn::norm::{rms, standardised};
use crate::weights::Weights;

/// Two convolutions over single frames with a group normalisation between them, which couples all frames: a latent in parts
/// would come out otherwise.
pub(super) struct PatchEmbedding {
    column: Linear,
    norm_weight: Tensor<1>,
    norm_bias: Tensor<1>,
    out: Linear,
}

impl PatchEmbedding {
    pub(super) fn new(config: &Config, weights: &Weights<'_>) -> Result<PatchEmbedding> {
        let layers = weights.at("early_conv_layers");
        let channels = config.patch_channels();
        Ok(PatchEmbedding {
            column: layers.pointwise("0", [channels, config.in_channels, config.max_height, 1], true)?,
            norm_weight: layers.tensor("1.weight", [channels])?,
            norm_bias: layers.tensor("1.bias", [channels])?,
            out: layers.pointwise("2", [config.inner_dim(), channels, 1, 1], true)?,
        })
    }

    /// f32 `[batch, channels, height, frames]` → f32 `[batch, frames, width]`.
    pub(super) fn forward(&self, latent: Tensor<4>, hooks: &Hooks<'_>) -> Tensor<3> {
        let [batch, channels, height, frames] = latent.dims();
        let columns = latent.permute([0, 3, 1, 2]).reshape([batch, frames, channels * height]);
        let x = self.column.forward(columns);
        let as_image = |x: Tensor<3>| x.swap_dims(1, 2).unsqueeze_dim::<4>(2);
        hooks.see_as("early_conv_layers.0", &x, as_image);
        let x = self.normalised(x);
        hooks.see_as("early_conv_layers.1", &x, as_image);
        let x = self.out.forward(x);
        hooks.see("", &x);
        x
    }

    /// Group normalisation (Wu and He 2018, arXiv:1803.08494) over the frames and a group's channels.
    fn normalised(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, frames, channels] = x.dims();
        let of_group = channels / GROUPS;
        let x = x.reshape([batch, frames, GROUPS, of_group]).swap_dims(1, 2);
        let x = standardised(x.reshape([batch, GROUPS, frames * of_group]), EPSILON);
        let x = x.reshape([batch, GROUPS, frames, of_group]).swap_dims(1, 2);
        let x = x.reshape([batch, frames, channels]);
        x * self.norm_weight.clone().unsqueeze() + self.norm_bias.clone().unsqueeze()
    }
}

/// Norm, modulation by the time, and a linear layer whose outputs are the rows of a frame, all channels of a row together.
pub(super) struct FinalLayer {
    /// f32 `[2, width]`.
    scale_shift_table: Tensor<2>,
    linear: Linear,
    height: usize,
}

impl FinalLayer {
    pub(super) fn new(config: &Config, weights: &Weights<'_>) -> Result<FinalLayer> {
        let width = config.inner_dim();
        let outputs = config.max_height * config.out_channels;
        Ok(FinalLayer {
            scale_shift_table: weights.tensor("scale_shift_table", [2, width])?,
            linear: weights.linear("linear", [outputs, width], true)?,
            height: config.max_height,
        })
    }

    /// f32 `[batch, frames, width]` and the embedded time `[batch, width]` → f32 `[batch, channels, height, frames]`.
    pub(super) fn forward(&self, x: Tensor<3>, time: Tensor<2>, hooks: &Hooks<'_>) -> Tensor<4> {
        let modulations = time.unsqueeze_dim::<3>(1) + self.scale_shift_table.clone().unsqueeze();
        let row = |index| modulations.clone().narrow(1, index, 1);
        let x = rms(x, EPSILON);
        hooks.see("norm_final", &x);
        let x = self.linear.forward(modulated(x, row(0), row(1)));
        hooks.see("linear", &x);
        let [batch, frames, outputs] = x.dims();
        x.reshape([batch, frames, self.height, outputs / self.height]).permute([0, 3, 2, 1])
    }
}
