//! Products of a bf16 matrix with the rows of few tokens: a step of decoding reads every weight once, so what counts is
//! how fast it is read.
//!
//! A group of lanes sums [`ROWS`] rows at a time. Nothing is staged: weights stream past 16 bytes a lane, and the input, which
//! all groups share, stays in the first cache. RMSNorm is fused: `Σ w·(x·inv·scale)` is `inv · Σ w·(x·scale)`, so that the
//! squares are summed beside the products.

use cubecl::prelude::*;

use super::group::{F4, Group, U4};

/// Rows that a group sums at a time.
pub(crate) const ROWS: usize = 2;

/// The low and the high bf16 of a word as f32.
#[cube]
pub(crate) fn low(word: u32) -> f32 {
    f32::reinterpret(word << 16u32)
}

/// See [`low`].
#[cube]
pub(crate) fn high(word: u32) -> f32 {
    f32::reinterpret(word & 0xffff_0000u32)
}

/// What [`dot_rows`] is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Chunks of eight weights in a row.
    pub chunks: usize,
    /// Rows of the input.
    pub tokens: usize,
    /// Whether the input is normalised.
    pub normed: bool,
    /// Chunks that a lane has in flight at a time.
    pub unroll: usize,
    /// Who sums a row.
    pub group: Group,
}

impl Shape {
    /// The same with no more chunks in flight than a lane has: of a narrow row, that would be nothing but repetitions of the last.
    pub fn fitted(self) -> Shape {
        Shape { unroll: self.unroll.min(self.chunks.div_ceil(self.group.lanes as usize)), ..self }
    }
}

/// Adds a lane's share of [`ROWS`] rows times every token to `sums` (`[ROWS · tokens]`), and of the squares of the input to
/// `squares` (`[tokens]`).
///
/// `weights` is `[rows, chunks]` of eight bf16; `x` is `[tokens, 2 · chunks]` of four f32, `norm` `[2 · chunks]`.
#[cube]
pub(crate) fn dot_rows(
    weights: &[U4],
    x: &[F4],
    norm: &[F4],
    sums: &mut Array<f32>,
    squares: &mut Array<f32>,
    first_row: usize,
    #[comptime] shape: Shape,
) {
    let lane = UNIT_POS_X as usize;
    let chunks = comptime!(shape.chunks);
    let unroll = comptime!(shape.unroll);
    let lanes = comptime!(shape.group.lanes as usize);
    #[unroll]
    for i in 0..comptime!(ROWS * shape.tokens) {
        sums[i] = 0.0f32;
    }
    #[unroll]
    for i in 0..comptime!(shape.tokens) {
        squares[i] = 0.0f32;
    }
    for step in 0..comptime!(shape.chunks.div_ceil(shape.unroll * shape.group.lanes as usize)) {
        let start = step * comptime!(unroll * lanes) + lane;
        let mut words = Array::<U4>::new(comptime!(unroll * ROWS));
        #[unroll]
        for u in 0..unroll {
            let at = start + u * lanes;
            // Lanes past the end read the last chunk again and multiply it by nothing.
            let at = select(at < chunks, at, chunks - 1);
            #[unroll]
            for r in 0..ROWS {
                words[u * ROWS + r] = weights[(first_row + r) * chunks + at];
            }
        }
        #[unroll]
        for u in 0..unroll {
            let at = start + u * lanes;
            let valid = at < chunks;
            let at = select(valid, at, chunks - 1);
            let scale = select(valid, 1.0f32, 0.0f32);
            #[unroll]
            for t in 0..comptime!(shape.tokens) {
                let mut first = x[(t * chunks + at) * 2] * F4::new(scale);
                let mut second = x[(t * chunks + at) * 2 + 1] * F4::new(scale);
                if comptime!(shape.normed) {
                    let mut square = squares[t];
                    #[unroll]
                    for i in 0..4usize {
                        square += first.extract(i) * first.extract(i) + second.extract(i) * second.extract(i);
                    }
                    squares[t] = square;
                    first *= norm[at * 2];
                    second *= norm[at * 2 + 1];
                }
                #[unroll]
                for r in 0..ROWS {
                    let mut sum = sums[t * ROWS + r];
                    let word = words[u * ROWS + r];
                    #[unroll]
                    for i in 0..2usize {
                        sum += low(word.extract(i)) * first.extract(comptime!(2 * i));
                        sum += high(word.extract(i)) * first.extract(comptime!(2 * i + 1));
                        sum += low(word.extract(comptime!(i + 2))) * second.extract(comptime!(2 * i));
                        sum += high(word.extract(comptime!(i + 2))) * second.extract(comptime!(2 * i + 1));
                    }
                    sums[t * ROWS + r] = sum;
                }
            }
        }
    }
}
