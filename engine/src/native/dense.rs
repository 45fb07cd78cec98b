//! Products with bf16 matrices as a file stores them.
//!
//! A register tile of four rows and a few tokens runs along the whole of the rows, so that each value that is loaded
//! serves several products. One tile does for one token, where memory is the limit, and for hundreds, where arithmetic
//! is. The order in which a sum is taken does not depend on the tile: a token gives the same bits alone and in a batch.

use std::ops::Range;

use super::order::{DENSE, Group};
use super::simd::{Kernel, Simd, totals};
use super::split::Tile;

/// Rows of a register tile.
pub const TILE_ROWS: usize = 4;

/// Tokens whose inputs fit in a core's cache beside the rows that they meet.
const TOKENS: usize = 96;

/// A bf16 matrix in place: `[rows, columns]`.
#[derive(Clone, Copy)]
pub struct Bf16Matrix<'a> {
    /// Row-major, little-endian, of any alignment.
    pub bytes: &'a [u8],
    /// Inputs.
    pub columns: usize,
}

impl<'a> Bf16Matrix<'a> {
    /// Outputs.
    pub fn rows(&self) -> usize {
        self.bytes.len() / (2 * self.columns).max(1)
    }

    /// One row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * 2 * self.columns..][..2 * self.columns]
    }
}

/// Rows of a matrix times some vectors, written to the columns of a tile of the output: `out[t][r] = W[r] · x[t] + bias[r]`.
pub struct Product<'a, 't> {
    /// The matrix.
    pub weight: Bf16Matrix<'a>,
    /// One for each row of the matrix; none where empty.
    pub bias: &'a [f32],
    /// The vectors, one after the other, [in order](super::order::to_dense).
    pub x: &'a [Group],
    /// Where the sums go, its columns being rows of the matrix.
    pub out: &'a mut Tile<'t>,
    /// Whether the sums are added to what is there.
    pub accumulate: bool,
}

impl Kernel for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Product { weight, bias, x, out, accumulate } = self;
        let groups = super::order::dense_groups(weight.columns);
        let (columns, tokens) = (out.columns(), out.rows());
        let mut put = |token: usize, row: usize, sum: f32| {
            let value = sum + bias.get(row).copied().unwrap_or(0.0);
            let place = out.at(token, row);
            *place = if accumulate { *place + value } else { value };
        };
        for start in (0..tokens).step_by(TOKENS) {
            let tokens = start..tokens.min(start + TOKENS);
            let x = |token: usize| &x[token * groups..][..groups];
            let mut row = columns.start;
            while row < columns.end {
                let count = if row + TILE_ROWS <= columns.end { TILE_ROWS } else { 1 };
                if count == TILE_ROWS {
                    let rows = std::array::from_fn::<_, TILE_ROWS, _>(|r| weight.row(row + r));
                    tiles(simd, rows, tokens.clone(), x, |token, r, sum| put(token, row + r, sum));
                } else {
                    tiles(simd, [weight.row(row)], tokens.clone(), x, |token, _, sum| put(token, row, sum));
                }
                row += count;
            }
        }
    }
}

/// Products of some rows of bf16 with the vectors of some tokens, tile by tile: `put(token, row, sum)`.
#[inline(always)]
pub fn tiles<'x, S: Simd, const R: usize>(
    simd: S,
    rows: [&[u8]; R],
    tokens: Range<usize>,
    x: impl Fn(usize) -> &'x [Group],
    mut put: impl FnMut(usize, usize, f32),
) {
    let mut token = tokens.start;
    macro_rules! tile {
        ($count:literal) => {{
            let mut inputs: [&[Group]; $count] = [&[]; $count];
            inputs.iter_mut().zip(token..).for_each(|(input, token)| *input = x(token));
            let sums = tile(simd, rows, inputs);
            for (r, sums) in sums.iter().enumerate() {
                for (t, sum) in sums.iter().enumerate() {
                    put(token + t, r, *sum);
                }
            }
            token += $count;
        }};
    }
    while token < tokens.end {
        match (tokens.end - token).min(S::TILE_TOKENS) {
            1 => tile!(1),
            2 => tile!(2),
            3 => tile!(3),
            4 => tile!(4),
            _ => tile!(5),
        }
    }
}

/// `R × T` sums.
#[inline(always)]
fn tile<S: Simd, const R: usize, const T: usize>(
    simd: S,
    rows: [&[u8]; R],
    x: [&[Group]; T],
) -> [[f32; T]; R] {
    // Loops, here and in `add_group`, because closures given to methods of arrays are not always inlined.
    let groups = rows[0].len() / 64;
    let (mut whole, mut inputs) = ([&[][..]; R], [&[][..]; T]);
    for (whole, row) in whole.iter_mut().zip(rows) {
        *whole = &row.as_chunks::<64>().0[..groups];
    }
    for (inputs, x) in inputs.iter_mut().zip(x) {
        *inputs = &x[..groups];
    }
    let mut sums = [[simd.splat(0.0); T]; R];
    for group in 0..groups {
        let (mut weights, mut values) = ([&[0; 64]; R], [&Group::ZERO; T]);
        let ahead = prefetch_offset(64 * group, rows[0].len(), R);
        for ((weights, row), bytes) in weights.iter_mut().zip(whole).zip(rows) {
            *weights = &row[group];
            if T == 1 {
                simd.prefetch(bytes, ahead);
            }
        }
        for (values, x) in values.iter_mut().zip(inputs) {
            *values = &x[group];
        }
        add_group(simd, weights, values, &mut sums);
    }
    if rows[0].len() > 64 * groups {
        let (mut padded, mut values) = ([[0; 64]; R], [&Group::ZERO; T]);
        for (padded, row) in padded.iter_mut().zip(rows) {
            let rest = &row[64 * groups..];
            padded[..rest.len()].copy_from_slice(rest);
        }
        for (values, x) in values.iter_mut().zip(x) {
            *values = &x[groups];
        }
        add_group(simd, padded.each_ref(), values, &mut sums);
    }
    totals(simd, sums)
}

/// Bytes by which memory is read ahead of the sum of a single token.
pub const PREFETCH: usize = 1024;

/// The byte to read ahead while `count` neighbouring rows are at byte `at`: behind a row's end, that row of the next
/// tile.
#[inline(always)]
pub fn prefetch_offset(at: usize, row_bytes: usize, count: usize) -> usize {
    let ahead = at + PREFETCH;
    if ahead < row_bytes { ahead } else { ahead + (count - 1) * row_bytes }
}

#[inline(always)]
fn add_group<S: Simd, const R: usize, const T: usize>(
    simd: S,
    rows: [&[u8; 64]; R],
    x: [&Group; T],
    sums: &mut [[S::Vector; T]; R],
) {
    for at in (0..DENSE / 2).step_by(S::LANES) {
        for half in 0..2 {
            // The weights of all rows in registers, and one input at a time: more would not fit.
            let mut weights = [simd.splat(0.0); R];
            for (weight, row) in weights.iter_mut().zip(rows) {
                let pairs = &row[4 * at..];
                *weight = if half == 0 { simd.bf16_even(pairs) } else { simd.bf16_odd(pairs) };
            }
            for (t, x) in x.iter().enumerate() {
                let value = simd.load(&x.0[half * (DENSE / 2) + at..]);
                for (sums, weight) in sums.iter_mut().zip(weights) {
                    sums[t] = simd.mul_add(weight, value, sums[t]);
                }
            }
        }
    }
}

/// A row of bf16 as f32.
pub struct Widen<'a> {
    /// bf16.
    pub from: &'a [u8],
    /// As many values.
    pub to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (to, from) in self.to.iter_mut().zip(self.from.as_chunks::<2>().0) {
            *to = f32::from_bits(u32::from(u16::from_le_bytes(*from)) << 16);
        }
    }
}
