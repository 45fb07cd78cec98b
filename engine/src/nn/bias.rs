//! What is added to attention scores before the softmax.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use super::rows::indices;

/// Added to the score of a key that is not to be seen: far below any score, and finite, so that no device has to handle
/// infinities. A bias may be −∞ all the same; both hide.
pub const HIDDEN: f32 = -1e30;

/// Which scores a bias is wanted for.
#[derive(Clone, Debug)]
pub struct BiasRequest<'a> {
    /// The layer that asks.
    pub layer: usize,
    /// Number of samples.
    pub batch: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Positions of the queries.
    pub queries: Range<usize>,
    /// Positions of the keys, in the order of the scores.
    pub keys: &'a [usize],
}

impl BiasRequest<'_> {
    /// A number for each query and key, by their positions: `[1, 1, queries, keys]`.
    fn each(&self, device: &Device, number: impl Fn(usize, usize) -> f32) -> Tensor<4> {
        let rows = self.queries.clone().flat_map(|query| self.keys.iter().map(move |&key| (query, key)));
        let numbers: Vec<f32> = rows.map(|(query, key)| number(query, key)).collect();
        let shape = [1, 1, self.queries.len(), self.keys.len()];
        Tensor::from_data(TensorData::new(numbers, shape), device)
    }
}

/// Supplies an additive attention bias. What it gives for a part of queries and keys must equal that part of what it
/// gives for all of them.
pub trait BiasProvider: Send + Sync {
    /// f32 `[batch, heads, queries, keys]`, 1 in place of what all share; `None` where nothing is added. A query that sees
    /// no key at all attends to nothing: its result is zero.
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>>;
}

/// Nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoBias;

impl BiasProvider for NoBias {
    fn bias(&self, _: &BiasRequest<'_>, _: &Device) -> Option<Tensor<4>> {
        None
    }
}

/// Hides keys that are padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPadding {
    /// For each sample, whether the key at a position is to be seen. Beyond it, none is.
    pub mask: Vec<Vec<bool>>,
}

impl BiasProvider for KeyPadding {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>> {
        if self.mask.len() >= request.batch && self.mask.iter().flatten().all(|&is_seen| is_seen) {
            let all_there = |mask: &Vec<bool>| request.keys.iter().all(|&key| key < mask.len());
            if self.mask.iter().all(all_there) {
                return None;
            }
        }
        let is_seen = |sample: usize, key: usize| {
            self.mask.get(sample).and_then(|mask| mask.get(key)).copied().unwrap_or(false)
        };
        let samples = 0..request.batch;
        let biases = samples.flat_map(|sample| {
            request.keys.iter().map(move |&key| if is_seen(sample, key) { 0.0 } else { HIDDEN })
        });
        let shape = [request.batch, 1, 1, request.keys.len()];
        Some(Tensor::from_data(TensorData::new(biases.collect::<Vec<f32>>(), shape), device))
    }
}

/// ALiBi (Press et al. 2021, arXiv:2108.12409): `−slope · distance`, a slope for each head.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    /// One for each query head.
    pub slopes: Vec<f32>,
    /// Whether keys ahead of a query are as far as those behind it. Otherwise the distance is `query − key`, as in
    /// attention that is causal.
    pub symmetric: bool,
}

impl Alibi {
    /// The slopes of the paper: `2^(−8i/n)` for a power of two, otherwise those of the next lower power of two
    /// followed by every other one of the next higher. For causal attention.
    pub fn new(heads: usize) -> Alibi {
        fn geometric(n: usize) -> impl Iterator<Item = f32> {
            (1..=n).map(move |i| (-8.0 * i as f64 / n as f64).exp2() as f32)
        }
        let lower = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let slopes = geometric(lower).chain(geometric(2 * lower).step_by(2)).take(heads);
        Alibi { slopes: slopes.collect(), symmetric: false }
    }

    /// The same slopes for attention in both directions.
    pub fn symmetric(heads: usize) -> Alibi {
        Alibi { symmetric: true, ..Alibi::new(heads) }
    }
}

impl BiasProvider for Alibi {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>> {
        let distances = request.each(device, |query, key| {
            let distance = query as f32 - key as f32;
            if self.symmetric { distance.abs() } else { distance }
        });
        let slopes = TensorData::new(self.slopes.clone(), [1, self.slopes.len(), 1, 1]);
        Some(distances.neg() * Tensor::<4>::from_data(slopes, device))
    }
}

/// T5's relative bias (Raffel et al. 2019, arXiv:1910.10683): a learned number for each head and bucket of distances. Near
/// distances have buckets of their own, far ones share them logarithmically.
#[derive(Clone, Debug)]
pub struct T5Buckets {
    /// f32 `[buckets, heads]` for each layer; the last one serves all further layers, so a single one is T5's and many are
    /// UMT5's.
    pub tables: Vec<Tensor<2>>,
    /// Buckets of both directions together.
    pub num_buckets: usize,
    /// The distance from which on all share the last bucket.
    pub max_distance: usize,
    /// Whether keys ahead of a query have buckets of their own; otherwise they share that of distance 0.
    pub bidirectional: bool,
}

impl T5Buckets {
    /// The bucket of `key − query`, in the f32 steps of `transformers`, whose logarithm is truncated.
    pub fn bucket(&self, relative_position: i64) -> usize {
        let (buckets, offset, distance) = if self.bidirectional {
            let buckets = self.num_buckets / 2;
            let offset = if relative_position > 0 { buckets } else { 0 };
            (buckets, offset, relative_position.unsigned_abs())
        } else {
            (self.num_buckets, 0, relative_position.min(0).unsigned_abs())
        };
        let exact = buckets / 2;
        if distance < exact as u64 {
            return offset + distance as usize;
        }
        let scale = (self.max_distance as f64 / exact as f64).ln() as f32;
        let part = (distance as f32 / exact as f32).ln() / scale * (buckets - exact) as f32;
        offset + (exact + part as usize).min(buckets - 1)
    }
}

impl BiasProvider for T5Buckets {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>> {
        let table = self.tables.get(request.layer).or(self.tables.last())?;
        let (queries, keys) = (request.queries.len(), request.keys.len());
        let buckets = request
            .queries
            .clone()
            .flat_map(|query| request.keys.iter().map(move |&key| self.bucket(key as i64 - query as i64)));
        let rows = table.clone().select(0, indices(buckets, device));
        Some(rows.reshape([1, queries, keys, table.dims()[1]]).permute([0, 3, 1, 2]))
    }
}

/// Several biases together.
#[derive(Clone)]
pub struct Sum<'a>(pub Vec<&'a dyn BiasProvider>);

impl BiasProvider for Sum<'_> {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>> {
        self.0.iter().filter_map(|provider| provider.bias(request, device)).reduce(|a, b| a + b)
    }
}
