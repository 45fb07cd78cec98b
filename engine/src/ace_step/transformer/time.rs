//! The time of a step as modulations of norms (adaLN-single of PixArt-α, arXiv:2310.00426).

use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};

use crate::error::Result;
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::weights::Weights;

/// Cosines and sines of a time.
const FREQUENCIES: usize = 128;

pub(super) struct TimeEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    modulations: Linear,
}

impl TimeEmbedding {
    pub(super) fn new(width: usize, weights: &Weights<'_>) -> Result<TimeEmbedding> {
        let embedder = weights.at("timestep_embedder");
        Ok(TimeEmbedding {
            linear_1: embedder.linear("linear_1", [width, 2 * FREQUENCIES], true)?,
            linear_2: embedder.linear("linear_2", [width, width], true)?,
            modulations: weights.linear("t_block.1", [6 * width, width], true)?,
        })
    }

    /// The embedded time, f32 `[batch, width]`, which the final layer needs, and the modulations of the blocks,
    /// `[batch, 6, width]`.
    pub(super) fn forward(
        &self,
        timestep: &[f32],
        device: &Device,
        hooks: &Hooks<'_>,
    ) -> (Tensor<2>, Tensor<3>) {
        let waves = waves(timestep, device);
        hooks.see("time_proj", &waves);
        let time = self.linear_2.forward(silu(self.linear_1.forward(waves)));
        hooks.see("timestep_embedder", &time);
        let modulations = self.modulations.forward(silu(time.clone()));
        hooks.see("t_block", &modulations);
        let [batch, width] = time.dims();
        (time, modulations.reshape([batch, 6, width]))
    }
}

/// `[cos(t · f), sin(t · f)]` with `f = 10000^(−m / 128)`, on the host, in the f32 steps of the original: f32
/// `[batch, 256]`.
fn waves(timestep: &[f32], device: &Device) -> Tensor<2> {
    let exponent = -(1e4f64.ln()) as f32;
    let frequencies: Vec<f32> =
        (0..FREQUENCIES).map(|m| (exponent * m as f32 / FREQUENCIES as f32).exp()).collect();
    let values = timestep.iter().flat_map(|time| {
        let angles = frequencies.iter().map(move |frequency| f64::from(time * frequency));
        angles.clone().map(|angle| angle.cos() as f32).chain(angles.map(|angle| angle.sin() as f32))
    });
    let values: Vec<f32> = values.collect();
    Tensor::from_data(TensorData::new(values, [timestep.len(), 2 * FREQUENCIES]), device)
}
