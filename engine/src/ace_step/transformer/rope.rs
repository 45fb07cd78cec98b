//! The rotary embedding of ACE-Step, which is none.
//!
//! Its table has the layout of half-split pairs, its application takes neighbours for a pair. So the two channels of a pair
//! turn by different angles, and no length is kept. The released weights were trained with it.

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of positions 0 to `length − 1`, f32 `[length, head_dim]` each.
#[derive(Clone, Debug)]
pub struct Table {
    /// Cosines.
    pub cos: Tensor<2>,
    /// Sines.
    pub sin: Tensor<2>,
    /// Sines, negative where a channel is the first of its pair.
    signed: Tensor<2>,
}

impl Table {
    /// Angles are f32 products, as those of the original (`Qwen2RotaryEmbedding` of `acestep/models/attention.py`).
    pub fn new(rope_theta: f64, head_dim: usize, length: usize, device: &Device) -> Table {
        let half = head_dim / 2;
        let inverse: Vec<f32> =
            (0..half).map(|k| 1.0 / (rope_theta as f32).powf(2.0 * k as f32 / head_dim as f32)).collect();
        let angles = (0..length).flat_map(|position| {
            let of_half = inverse.iter().map(move |inverse| f64::from(position as f32 * inverse));
            of_half.clone().chain(of_half)
        });
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(f64::sin_cos).map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        let signed = sin.iter().enumerate();
        let signed = signed.map(|(index, &sin)| if index % 2 == 0 { -sin } else { sin }).collect();
        let tensor =
            |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [length, head_dim]), device);
        Table { cos: tensor(cos), sin: tensor(sin), signed: tensor(signed) }
    }

    /// `y[2m] = x[2m]·cos[2m] − x[2m+1]·sin[2m]`, `y[2m+1] = x[2m+1]·cos[2m+1] + x[2m]·sin[2m+1]`.
    ///
    /// f32 `[batch, positions, heads, head_dim]` → the same; the positions are the first ones of the table.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, length, heads, head_dim] = x.dims();
        let pairs = x.clone().reshape([batch, length, heads * head_dim / 2, 2]);
        let swapped = pairs.flip([3]).reshape([batch, length, heads, head_dim]);
        let row = |table: &Tensor<2>| table.clone().narrow(0, 0, length).reshape([1, length, 1, head_dim]);
        x * row(&self.cos) + swapped * row(&self.signed)
    }
}
