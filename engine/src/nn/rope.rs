//! Rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

use burn::tensor::{Device, Tensor, TensorData};

pub use super::frequencies::{Frequencies, Yarn};

/// Which components of a head form a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(2i, 2i + 1)`: the order of `model.bin`.
    Interleaved,
    /// `(i, i + head_dim / 2)`: the order of the checkpoints.
    HalfSplit,
}

impl Frequencies {
    /// Cosines and sines of some positions, computed on the host in f64 so that every device rotates by the
    /// same angles.
    pub fn table(&self, positions: impl IntoIterator<Item = usize>, device: &Device) -> RotationTable {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        let mut count = 0;
        for position in positions {
            count += 1;
            for &inverse in &self.inverse {
                let (s, c) = (position as f64 * inverse).sin_cos();
                cos.push((c * self.concentration) as f32);
                sin.push((s * self.concentration) as f32);
            }
        }
        let tensor =
            |values| Tensor::from_data(TensorData::new(values, [count, 1, self.inverse.len()]), device);
        RotationTable { cos: tensor(cos), sin: tensor(sin) }
    }
}

/// Cosines and sines, times the concentration, of some positions.
#[derive(Clone, Debug)]
pub struct RotationTable {
    /// f32 `[tokens, 1, head_dim / 2]`.
    pub cos: Tensor<3>,
    /// f32 `[tokens, 1, head_dim / 2]`.
    pub sin: Tensor<3>,
}

impl RotationTable {
    /// Rotates each head of each token: f32 `[tokens, heads, head_dim]`.
    pub fn rotate(&self, x: Tensor<3>, pairing: Pairing) -> Tensor<3> {
        let [tokens, heads, head_dim] = x.dims();
        let half = head_dim / 2;
        let (a, b) = match pairing {
            Pairing::HalfSplit => (x.clone().narrow(2, 0, half), x.narrow(2, half, half)),
            Pairing::Interleaved => {
                let pairs = x.reshape([tokens, heads, half, 2]);
                let part = |i| pairs.clone().narrow(3, i, 1).squeeze_dim::<3>(3);
                (part(0), part(1))
            }
        };
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        match pairing {
            Pairing::HalfSplit => Tensor::cat(vec![first, second], 2),
            Pairing::Interleaved => {
                Tensor::stack::<4>(vec![first, second], 3).reshape([tokens, heads, head_dim])
            }
        }
    }
}
