//! Attention over pages of a cache, with sinks and a window; scores are never more than a page of them at a time.
//!
//! The queries of a few tokens, times the heads that share a key head, are the rows of small products: with the keys of a
//! page to scores, with its values to the output. The softmax goes along (Milakov and Gimelshein 2018, arXiv:1805.02867):
//! a row keeps its largest score and the sum of exponentials so far, and is rescaled when a larger score comes. The sink
//! is the score that each row starts with.

use std::ops::Range;

use super::cache::{Cache, PAGE, first_page};
use super::simd::{Kernel, Simd, exp};
use super::split::Tile;
use crate::backend::Float;

/// Rows of a register tile.
const ROWS: usize = 4;

/// Added to no score but put in place of those that are not seen; finite, so that differences are.
const HIDDEN: f32 = -1e30;

/// Attention of some tokens' heads that share a key head.
pub struct Attention<'a, 't> {
    /// The keys and values, those of the tokens included.
    pub cache: &'a Cache,
    /// Which of them.
    pub layer: usize,
    /// The key head.
    pub kv_head: usize,
    /// Positions of the tokens.
    pub positions: Range<usize>,
    /// Rows of queries, keys and values of the tokens, `stride` apart.
    pub qkv: &'a [f32],
    /// Values of such a row.
    pub stride: usize,
    /// Sink logits of all query heads.
    pub sinks: &'a [f32],
    /// The window of the layer.
    pub window: Option<usize>,
    /// Outputs, one row a token; its columns are those of the query heads.
    pub out: &'a mut Tile<'t>,
}

impl Kernel for Attention<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let layout = self.cache.layout();
        let (head_dim, value_dim) = (layout.head_dim, layout.value_dim());
        let group = self.out.columns().len() / head_dim;
        let first_head = self.kv_head * group;
        let tokens = self.positions.len();
        // Padded to whole register tiles; what padding rows compute is not read.
        let rows = (tokens * group).next_multiple_of(ROWS);
        let mut queries = vec![0.0; rows * head_dim];
        for (row, query) in queries.chunks_exact_mut(head_dim).take(tokens * group).enumerate() {
            let start = row / group * self.stride + (first_head + row % group) * head_dim;
            query.copy_from_slice(&self.qkv[start..][..head_dim]);
        }
        let sink = |row: usize| self.sinks.get(first_head + row % group).copied().unwrap_or(0.0);
        let mut largest: Vec<f32> = (0..rows).map(sink).collect();
        let mut total = vec![1.0; rows];
        let mut output = vec![0.0; rows * value_dim];
        let mut scores = vec![0.0; rows * PAGE];
        let mut keys = vec![0.0; head_dim * PAGE];
        let mut values = vec![0.0; PAGE * value_dim];
        let last = self.positions.end - 1;
        for page in first_page(self.window, self.positions.start)..=last / PAGE {
            let stored = self.cache.page(self.layer, page, self.kv_head);
            widen(simd, layout.element, stored.keys, &mut keys);
            widen(simd, layout.element, stored.values, &mut values);
            let start = page * PAGE;
            let used = PAGE.min(last + 1 - start);
            multiply_keys(simd, &queries, &keys, head_dim, &mut scores);
            for (row, scores) in scores.chunks_exact_mut(PAGE).take(tokens * group).enumerate() {
                let position = self.positions.start + row / group;
                let seen_from = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                scores[..seen_from.clamp(start, start + PAGE) - start].fill(HIDDEN);
                scores[(position + 1).clamp(start, start + PAGE) - start..].fill(HIDDEN);
                let rescale = soften(simd, scores, &mut largest[row], &mut total[row]);
                if rescale < 1.0 {
                    for part in output[row * value_dim..][..value_dim].chunks_exact_mut(S::LANES) {
                        simd.store(simd.mul(simd.load(part), simd.splat(rescale)), part);
                    }
                }
            }
            multiply_values(simd, &scores, &values, used, value_dim, &mut output);
        }
        for row in 0..tokens * group {
            let values = &output[row * value_dim..][..head_dim];
            let out = &mut self.out.row(row / group)[row % group * head_dim..][..head_dim];
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value / total[row]);
        }
    }
}

/// Stored values as f32, in multiples of 16.
#[inline(always)]
fn widen<S: Simd>(simd: S, element: Float, from: &[u8], to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(S::LANES).zip(from.chunks_exact(S::LANES * element.size() as usize))
    {
        match element {
            Float::F16 => simd.store(simd.f16(from), to),
            Float::Bf16 => simd.store(simd.bf16(from), to),
            Float::F32 => {
                for (to, from) in to.iter_mut().zip(from.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*from);
                }
            }
        }
    }
}

/// `scores[row][position] = queries[row] · keys[..][position]`.
#[inline(always)]
fn multiply_keys<S: Simd>(simd: S, queries: &[f32], keys: &[f32], head_dim: usize, scores: &mut [f32]) {
    let tiles = queries.chunks_exact(ROWS * head_dim).zip(scores.chunks_exact_mut(ROWS * PAGE));
    for (queries, scores) in tiles {
        for position in (0..PAGE).step_by(2 * S::LANES) {
            let mut sums = [[simd.splat(0.0); 2]; ROWS];
            for (dim, keys) in keys.chunks_exact(PAGE).enumerate() {
                let first = simd.load(&keys[position..]);
                let second = simd.load(&keys[position + S::LANES..]);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let query = simd.splat(queries[row * head_dim + dim]);
                    *sums = [simd.mul_add(query, first, sums[0]), simd.mul_add(query, second, sums[1])];
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                let place = row * PAGE + position;
                simd.store(sums[0], &mut scores[place..]);
                simd.store(sums[1], &mut scores[place + S::LANES..]);
            }
        }
    }
}

/// Turns a row's scores into exponentials and returns what earlier ones are to be multiplied with.
#[inline(always)]
fn soften<S: Simd>(simd: S, scores: &mut [f32], largest: &mut f32, total: &mut f32) -> f32 {
    let mut most = simd.splat(*largest);
    for part in scores.chunks_exact(S::LANES) {
        most = simd.max(most, simd.load(part));
    }
    let most = simd.largest(most);
    let mut sum = simd.splat(0.0);
    for part in scores.chunks_exact_mut(S::LANES) {
        let exponential = exp(simd, simd.add(simd.load(part), simd.splat(-most)));
        sum = simd.add(sum, exponential);
        simd.store(exponential, part);
    }
    let rescale = (*largest - most).exp();
    *total = *total * rescale + simd.sum(sum);
    *largest = most;
    rescale
}

/// `output[row] += Σ weights[row][position] · values[position]` over the first `used` positions.
#[inline(always)]
fn multiply_values<S: Simd>(
    simd: S,
    weights: &[f32],
    values: &[f32],
    used: usize,
    value_dim: usize,
    output: &mut [f32],
) {
    let tiles = weights.chunks_exact(ROWS * PAGE).zip(output.chunks_exact_mut(ROWS * value_dim));
    for (weights, output) in tiles {
        for dim in (0..value_dim).step_by(S::LANES) {
            let mut sums = [simd.splat(0.0); ROWS];
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = simd.load(&output[row * value_dim + dim..]);
            }
            for (position, values) in values.chunks_exact(value_dim).take(used).enumerate() {
                let values = simd.load(&values[dim..]);
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add(simd.splat(weights[row * PAGE + position]), values, *sum);
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                simd.store(sum, &mut output[row * value_dim + dim..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::native::cache::CacheLayout;
    use crate::native::simd::{Dispatch, Level};
    use crate::native::split::grid;

    /// Heads, key heads, width of a head, window, tokens before, new tokens.
    type Case = (usize, usize, usize, Option<usize>, usize, usize);

    const CASES: [Case; 6] = [
        (1, 1, 2, None, 0, 1),
        (8, 2, 64, None, 100, 5),
        (3, 1, 20, Some(8), 30, 70),
        (4, 4, 16, Some(64), 127, 1),
        (8, 1, 64, Some(128), 300, 16),
        (6, 2, 34, Some(1), 63, 3),
    ];

    /// Rows of queries, keys and values of each token.
    fn rows(tokens: usize, width: usize) -> Vec<f32> {
        (0..tokens * width).map(|i| ((i * 7919 + i / 13) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    fn truth((heads, kv_heads, dim, window, past, new): Case, qkv: &[f32], sinks: &[f32]) -> Vec<f64> {
        let stride = (heads + 2 * kv_heads) * dim;
        let head = |token: usize, head: usize| {
            qkv[token * stride + head * dim..][..dim].iter().map(|&v| f64::from(v))
        };
        let mut out = Vec::new();
        for token in past..past + new {
            for (query, &sink) in sinks.iter().enumerate() {
                let kv = query / (heads / kv_heads);
                let seen = window.map_or(0, |window| (token + 1).saturating_sub(window))..token + 1;
                let score = |key: usize| {
                    head(token, query).zip(head(key, heads + kv)).map(|(q, k)| q * k).sum::<f64>()
                };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let most = scores.iter().fold(f64::from(sink), |most, &score| most.max(score));
                let total =
                    (f64::from(sink) - most).exp() + scores.iter().map(|s| (s - most).exp()).sum::<f64>();
                let mut sums = vec![0.0; dim];
                for (key, score) in seen.zip(&scores) {
                    let weight = (score - most).exp() / total;
                    sums.iter_mut()
                        .zip(head(key, heads + kv_heads + kv))
                        .for_each(|(sum, v)| *sum += weight * v);
                }
                out.extend(sums);
            }
        }
        out
    }

    #[test]
    fn outputs_are_those_of_float64() {
        for dispatch in Level::ALL.into_iter().filter_map(Dispatch::new) {
            for case in CASES {
                for (element, tolerance) in [(Float::F32, 1e-5), (Float::F16, 1e-2), (Float::Bf16, 1e-1)] {
                    let (heads, kv_heads, dim, window, past, new) = case;
                    let stride = (heads + 2 * kv_heads) * dim;
                    let qkv = rows(past + new, stride);
                    let sinks: Vec<f32> = (0..heads).map(|head| head as f32 - 1.0).collect();
                    let layout = CacheLayout {
                        kv_heads,
                        head_dim: dim,
                        element,
                        context: 1000,
                        windows: vec![window],
                    };
                    let mut cache = Cache::new(Arc::new(layout));
                    for (token, row) in qkv.chunks_exact(stride).enumerate() {
                        let (keys, values) = row[heads * dim..].split_at(kv_heads * dim);
                        cache.write(0, token, keys, values);
                        if token + 1 == past {
                            cache.advance(past);
                        }
                    }
                    let mut out = vec![0.0; new * heads * dim];
                    let width = heads / kv_heads * dim;
                    for (_, mut tile) in grid(&mut out, heads * dim, &[0, new], width) {
                        dispatch.run(Attention {
                            cache: &cache,
                            layer: 0,
                            kv_head: tile.columns().start / width,
                            positions: past..past + new,
                            qkv: &qkv[past * stride..],
                            stride,
                            sinks: &sinks,
                            window,
                            out: &mut tile,
                        });
                    }
                    for (found, truth) in out.iter().zip(truth(case, &qkv, &sinks)) {
                        let error = (f64::from(*found) - truth).abs();
                        assert!(
                            error <= tolerance,
                            "{} {case:?} {element:?}: {found} {truth}",
                            dispatch.level()
                        );
                    }
                }
            }
        }
    }
}
