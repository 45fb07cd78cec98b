//! What is added to attention scores before the softmax.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

/// Which scores a bias is wanted for.
#[derive(Clone, Debug)]
pub struct BiasRequest<'a> {
    /// The layer that asks.
    pub layer: usize,
    /// Positions of the queries.
    pub queries: Range<usize>,
    /// Positions of the keys, in the order of the scores.
    pub keys: &'a [usize],
    /// Number of query heads.
    pub heads: usize,
}

/// Supplies an additive attention bias. What it gives for a part of queries and keys must equal that part of what it
/// gives for all of them.
pub trait BiasProvider: Send + Sync {
    /// f32 `[heads, queries, keys]`, or `[1, queries, keys]` where all heads share it.
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Tensor<3>;
}

/// ALiBi (Press et al. 2021, arXiv:2108.12409): `−slope · (query − key)`, a slope for each head.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    /// One for each query head.
    pub slopes: Vec<f32>,
}

impl Alibi {
    /// The slopes of the paper: `2^(−8i/n)` for a power of two, otherwise those of the next lower power of two
    /// followed by every other one of the next higher.
    pub fn new(heads: usize) -> Alibi {
        fn geometric(n: usize) -> impl Iterator<Item = f32> {
            (1..=n).map(move |i| (-8.0 * i as f64 / n as f64).exp2() as f32)
        }
        let lower = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let slopes = geometric(lower).chain(geometric(2 * lower).step_by(2)).take(heads);
        Alibi { slopes: slopes.collect() }
    }
}

impl BiasProvider for Alibi {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Tensor<3> {
        let distances = request
            .queries
            .clone()
            .flat_map(|query| request.keys.iter().map(move |&key| query as f32 - key as f32));
        let shape = [1, request.queries.len(), request.keys.len()];
        let distances = Tensor::<3>::from_data(TensorData::new(distances.collect(), shape), device);
        let slopes = TensorData::new(self.slopes.clone(), [self.slopes.len(), 1, 1]);
        distances.neg() * Tensor::<3>::from_data(slopes, device)
    }
}
