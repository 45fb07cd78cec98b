//! One block: linear attention, cross-attention, gated feed-forward.

use burn::tensor::Tensor;

use super::attention::{CrossAttention, LinearAttention, Surroundings};
use super::config::Config;
use super::feed_forward::GluMbConv;
use crate::error::Result;
use crate::nn::hooks::Hooks;
use crate::nn::norm::rms;
use crate::weights::Weights;

/// ε of the norms, none of which has weights.
pub(super) const EPSILON: f32 = 1e-6;

pub(in crate::ace_step) struct Block {
    /// f32 `[6, width]`.
    scale_shift_table: Tensor<2>,
    pub(in crate::ace_step) attn: LinearAttention,
    pub(in crate::ace_step) cross_attn: CrossAttention,
    ff: GluMbConv,
}

impl Block {
    pub(super) fn new(config: &Config, weights: &Weights<'_>) -> Result<Block> {
        let (width, head_dim) = (config.inner_dim(), config.attention_head_dim);
        Ok(Block {
            scale_shift_table: weights.tensor("scale_shift_table", [6, width])?,
            attn: LinearAttention::new(width, head_dim, &weights.at("attn"))?,
            cross_attn: CrossAttention::new(width, head_dim, &weights.at("cross_attn"))?,
            ff: GluMbConv::new(width, config.mlp_dim(), &weights.at("ff"))?,
        })
    }

    /// f32 `[batch, frames, width]` → the same. `modulations` are f32 `[batch, 6, width]`.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        modulations: &Tensor<3>,
        around: &Surroundings<'_>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let modulations = modulations.clone() + self.scale_shift_table.clone().unsqueeze();
        let row = |index| modulations.clone().narrow(1, index, 1);

        let y = rms(x.clone(), EPSILON);
        hooks.see("norm1", &y);
        let y = modulated(y, row(0), row(1));
        let y = self.attn.forward(y, around.rope, around.frame_mask, around.tau, &hooks.at("attn"));
        let x = x + row(2) * y;

        let y = self.cross_attn.forward(x.clone(), around, &hooks.at("cross_attn"));
        let x = x + y;

        let y = rms(x.clone(), EPSILON);
        hooks.see("norm2", &y);
        let y = self.ff.forward(modulated(y, row(3), row(4)), &hooks.at("ff"));
        let x = x + row(5) * y;
        hooks.see("", &x);
        x
    }
}

/// `x · (1 + scale) + shift`.
pub(super) fn modulated(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>) -> Tensor<3> {
    x * scale.add_scalar(1.0) + shift
}
