//! The kernels of the processor's own runtime, on all threads. They are private to the engine, and compiled here from its files,
//! whose tests expect them at this path.

#[path = "../../src/native/attention.rs"]
mod attention;
#[path = "../../src/native/cache.rs"]
mod cache;
#[path = "../../src/native/dense.rs"]
mod dense;
#[path = "../../src/native/fixed.rs"]
mod fixed;
#[path = "../../src/native/mxfp4.rs"]
mod mxfp4;
#[path = "../../src/native/order.rs"]
mod order;
#[path = "../../src/native/rows.rs"]
mod rows;
#[path = "../../src/native/simd/mod.rs"]
mod simd;
#[path = "../../src/native/split.rs"]
mod split;

use std::cell::LazyCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::Float;
use half::bf16;
use rayon::iter::{IndexedParallelIterator, ParallelBridge, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use self::attention::Attention;
use self::cache::{Cache, CacheLayout};
use self::dense::Bf16Matrix;
use self::fixed::{FixedGroup, ToFixed, fixed_groups};
use self::mxfp4::{Inputs, PackedMatrix};
use self::order::{Group, dense_groups, packed_groups, to_dense, to_packed};
use self::simd::{Dispatch, Level};
use self::split::{Tile, grid};
use crate::suite::{Stored, Suite};
use crate::weights::{Dense, Matrix, Weights, floats};

/// Bytes of weights of one task, as the runtime has them.
const TASK_BYTES: usize = 96 << 10;
/// Bytes that a thread copies at a time.
const COPIED: usize = 1 << 20;
/// Tokens of a prefill, at most, as the runtime has them, and of one task of its attention.
const PREFILL: usize = 256;
const ATTENTION_TOKENS: usize = 16;

/// Measures all groups.
pub fn measure(suite: &mut Suite, weights: &Weights) {
    let dispatch = Dispatch::new(Level::best()).expect("the best level of this processor");
    let processor = Processor { dispatch, weights };
    processor.copy(suite);
    processor.dense(suite);
    processor.experts(suite);
    processor.attention(suite);
}

struct Processor<'a> {
    dispatch: Dispatch,
    weights: &'a Weights,
}

/// A matrix of an expert.
enum Expert {
    Packed([Vec<u8>; 2]),
    Decoded(Vec<bf16>),
}

impl Processor<'_> {
    fn copy(&self, suite: &mut Suite) {
        let bytes = self.weights.copied / 4;
        suite.measure(Weights::copy(bytes), || {
            let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
            timed(move |_| {
                each(&mut to, COPIED, &|part, to| {
                    to.copy_from_slice(&from[part * COPIED..][..COPIED]);
                });
            })
        });
    }

    fn dense(&self, suite: &mut Suite) {
        for (case, Dense { kind, rows, columns, count }) in self.weights.dense_layers() {
            suite.measure(case, || {
                let matrices: Vec<_> = (0..count).map(|block| self.weights.dense(kind, block)).collect();
                let (x, mut out) = (floats(columns), vec![0.0; rows]);
                timed(move |iteration| {
                    let weight = Bf16Matrix { bytes: &matrices[iteration % count], columns };
                    self.products(&[weight], &[0, 1], &x, &mut out);
                })
            });
        }
    }

    fn experts(&self, suite: &mut Suite) {
        let config = self.weights.config();
        let experts = 0..config.num_experts;
        let packed = LazyCell::new(|| {
            let of = |matrix| {
                experts.clone().map(move |expert| Expert::Packed(self.weights.packed(matrix, expert)))
            };
            Matrix::ALL.map(|matrix| of(matrix).collect::<Vec<_>>())
        });
        let decoded = LazyCell::new(|| {
            let of = |matrix| {
                experts.clone().map(move |expert| Expert::Decoded(self.weights.decoded(matrix, expert)))
            };
            Matrix::ALL.map(|matrix| of(matrix).collect::<Vec<_>>())
        });
        let of = |stored| if stored == Stored::Mxfp4 { &*packed } else { &*decoded };
        for matrix in Matrix::ALL {
            for stored in [Stored::Mxfp4, Stored::Bf16] {
                suite.measure(self.weights.experts_of_a_token(matrix, stored), || {
                    let mut product = self.selected(matrix, &of(stored)[matrix as usize], 1);
                    timed(move |iteration| {
                        let chosen = self.weights.set(iteration % self.weights.sets());
                        product(&chosen.map(|expert| (expert, 1)).collect::<Vec<_>>());
                    })
                });
            }
        }
        for &tokens in self.weights.prompts.iter().filter(|tokens| **tokens <= 2 * PREFILL) {
            for stored in [Stored::Mxfp4, Stored::Bf16] {
                suite.measure(self.weights.experts(tokens, stored), || {
                    let logits = floats(tokens * config.num_experts);
                    let of_expert = self.weights.tokens_of_experts(&logits);
                    let counts: Vec<_> = of_expert.iter().map(Vec::len).enumerate().collect();
                    let mut products =
                        Matrix::ALL.map(|matrix| self.selected(matrix, &of(stored)[matrix as usize], tokens));
                    timed(move |_| products.iter_mut().for_each(|product| product(&counts)))
                });
            }
        }
    }

    /// Products of experts with a number of rows each, a row for each pair of a token and an expert.
    fn selected<'a>(
        &'a self,
        matrix: Matrix,
        experts: &'a [Expert],
        tokens: usize,
    ) -> impl FnMut(&[(usize, usize)]) + use<'a> {
        let [rows, columns] = matrix.shape(self.weights.config());
        let pairs = tokens * self.weights.config().num_active_experts;
        let (x, mut out) = (floats(pairs * columns), vec![0.0; pairs * rows]);
        move |counts| {
            let mut bounds = vec![0];
            bounds.extend(counts.iter().scan(0, |sum, (_, count)| {
                *sum += count;
                Some(*sum)
            }));
            let (mut packed, mut decoded) = (Vec::new(), Vec::new());
            for (expert, _) in counts {
                match &experts[*expert] {
                    Expert::Packed([codes, scales]) => packed.push(PackedMatrix { codes, scales, columns }),
                    Expert::Decoded(values) => {
                        decoded.push(Bf16Matrix { bytes: bytemuck::cast_slice(values), columns });
                    }
                }
            }
            if decoded.is_empty() {
                self.packed_products(&packed, &bounds, &x, tokens == 1, &mut out);
            } else {
                self.products(&decoded, &bounds, &x, &mut out);
            }
        }
    }

    /// Rows `bounds[i]..bounds[i + 1]` of `x` times matrix `i`.
    fn products(&self, weights: &[Bf16Matrix<'_>], bounds: &[usize], x: &[f32], out: &mut [f32]) {
        let (columns, rows) = (weights[0].columns, weights[0].rows());
        let groups = dense_groups(columns);
        let mut ordered = vec![Group::ZERO; x.len() / columns * groups];
        each(&mut ordered, groups, &|row, out| to_dense(&x[row * columns..][..columns], out));
        let width = (TASK_BYTES / (2 * columns)).max(1).next_multiple_of(dense::TILE_ROWS);
        tiles(out, rows, bounds, width, &|matrix, mut tile| {
            self.dispatch.run(dense::Product {
                weight: weights[matrix],
                bias: &[],
                x: &ordered[bounds[matrix] * groups..],
                out: &mut tile,
                accumulate: false,
            });
        });
    }

    /// As [`Processor::products`], with packed matrices; one token takes fixed point.
    fn packed_products(
        &self,
        weights: &[PackedMatrix<'_>],
        bounds: &[usize],
        x: &[f32],
        is_fixed: bool,
        out: &mut [f32],
    ) {
        let columns = weights[0].columns;
        let rows = weights[0].scales.len() * 32 / columns;
        let row = |index: usize| &x[index * columns..][..columns];
        let (mut fixed, mut ordered) = (Vec::new(), Vec::new());
        let inputs = if is_fixed {
            let groups = fixed_groups(columns);
            fixed.resize(x.len() / columns * groups, FixedGroup::ZERO);
            each(&mut fixed, groups, &|index, out| {
                self.dispatch.run(ToFixed { x: row(index), out });
            });
            Inputs::Fixed(&fixed)
        } else {
            let groups = packed_groups(columns);
            ordered.resize(x.len() / columns * groups, Group::ZERO);
            each(&mut ordered, groups, &|index, out| to_packed(row(index), out));
            Inputs::Ordered(&ordered)
        };
        let every_row: Vec<u32> = (0..(x.len() / columns) as u32).collect();
        let width = (2 * TASK_BYTES / columns).max(16);
        tiles(out, rows, bounds, width, &|matrix, mut tile| {
            self.dispatch.run(mxfp4::Product {
                weight: weights[matrix],
                rows: tile.columns(),
                x: inputs,
                tokens: &every_row[bounds[matrix]..bounds[matrix + 1]],
                put: |pair: usize, row: usize, sum: f32| *tile.at(pair, row) = sum,
            });
        });
    }

    fn attention(&self, suite: &mut Suite) {
        for &depth in &self.weights.depths {
            suite.measure(self.weights.attention_of_a_token(depth), || {
                let layers = (self.weights.caches / self.weights.bytes_of_cache(depth)).clamp(1, 64);
                let cache = self.cache(layers, depth);
                let mut attend = self.attending(1);
                timed(move |iteration| attend(&cache, iteration % layers, depth - 1))
            });
        }
        let tokens = PREFILL.min(self.weights.prompts.last().copied().unwrap_or(PREFILL));
        suite.measure(self.weights.attention(tokens), || {
            let cache = self.cache(1, tokens);
            let mut attend = self.attending(tokens);
            timed(move |_| attend(&cache, 0, 0))
        });
    }

    /// Attention of tokens from a position on over a layer.
    fn attending(&self, tokens: usize) -> impl FnMut(&Cache, usize, usize) {
        let config = self.weights.config();
        let (stride, width) = (config.qkv_rows(), config.num_heads * config.head_dim);
        let head_group = config.num_heads / config.num_kv_heads * config.head_dim;
        let (qkv, sinks) = (floats(tokens * stride), floats(config.num_heads));
        let mut bounds: Vec<usize> = (0..tokens).step_by(ATTENTION_TOKENS).collect();
        bounds.push(tokens);
        let mut out = vec![0.0; tokens * width];
        move |cache, layer, first| {
            tiles(&mut out, width, &bounds, head_group, &|span, mut tile| {
                self.dispatch.run(Attention {
                    cache,
                    layer,
                    kv_head: tile.columns().start / head_group,
                    positions: first + bounds[span]..first + bounds[span + 1],
                    qkv: &qkv[bounds[span] * stride..],
                    stride,
                    sinks: &sinks,
                    window: None,
                    out: &mut tile,
                });
            });
        }
    }

    fn cache(&self, layers: usize, tokens: usize) -> Cache {
        let config = self.weights.config();
        let mut cache = Cache::new(Arc::new(CacheLayout {
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            element: Float::F16,
            context: tokens,
            windows: vec![None; layers],
        }));
        let values = floats(config.num_kv_heads * config.head_dim);
        for layer in 0..layers {
            for position in 0..tokens {
                cache.write(layer, position, &values, &values);
            }
        }
        cache.advance(tokens);
        cache
    }
}

/// Writes parts of `out`, `width` long, on all threads.
fn each<T: Send>(out: &mut [T], width: usize, write: &(dyn Fn(usize, &mut [T]) + Sync)) {
    out.par_chunks_mut(width).enumerate().for_each(|(part, out)| write(part, out));
}

/// Writes tiles of `out` ([`grid`]) on all threads.
fn tiles(
    out: &mut [f32],
    stride: usize,
    bounds: &[usize],
    width: usize,
    write: &(dyn Fn(usize, Tile<'_>) + Sync),
) {
    grid(out, stride, bounds, width).par_bridge().for_each(|(group, tile)| write(group, tile));
}

/// Runs of iterations, which are told their number.
fn timed(mut iterate: impl FnMut(usize)) -> impl FnMut(u64) -> Duration {
    let mut next = 0;
    move |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            iterate(next);
            next += 1;
        }
        start.elapsed()
    }
}
