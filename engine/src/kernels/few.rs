//! Products of a matrix with few rows of activations on tensor cores, as in a step of decoding for several sequences: what
//! counts is how fast the weights are read.
//!
//! The planes of a cube have the same rows of the matrix, and each every n-th part of their columns. Nothing is staged and nothing
//! waits until all are done: a plane reads weights and activations straight into the registers of the instruction, a round
//! ahead, and the sums of the planes meet in shared memory at the end. Weights are the left factor, whose rows
//! come in sixteens, activations the right one, whose rows come in eights.
//!
//! ```text
//! W, x of a plane's columns ── registers ── mma ── sums of a plane ── shared ── sums
//! ```
//!
//! `tile` says which columns a lane takes.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;
use half::bf16;

use super::group::U4;
use super::tile::{Format, NOWHERE, Tile, UNDER, decoded_pair, factor_of_block, in_order_of_codes};

/// Rows of activations, at most.
pub(super) const MOST_TOKENS: usize = 32;
/// Rows of a matrix from which on there are cubes enough for any device.
const MANY: usize = 65_536;

/// Two bf16, a register of a factor.
type B2 = Vector<bf16, Const<2>>;
/// Two sums.
type F2 = Vector<f32, Const<2>>;

impl Format {
    /// Pieces of eight columns in 16 bytes, and so steps of 32 columns in what the four lanes of a row read at a time.
    fn pieces(self) -> usize {
        self.values() / 8
    }
}

/// Planes of a cube, its rows in eights, and the parts that a plane reads at a time, as measured on an H100 with the matrices of
/// gpt-oss-20b.
pub(super) fn shape(format: Format, matrix_rows: usize) -> [usize; 3] {
    match format {
        Format::Mxfp4 => [4, 4, 1],
        Format::Bf16 if matrix_rows > MANY => [8, 4, 1],
        Format::Bf16 => [8, 2, 2],
    }
}

/// See [`super::tile::place`].
#[cube]
pub(super) fn place_of_few(pair: usize, #[comptime] tile: Tile) -> (usize, usize) {
    let quad = pair / 2 * comptime!(tile.units()) + UNIT_POS as usize;
    let quads = comptime!(tile.rows() / 4);
    let token = select(quad < comptime!(tile.tokens * tile.rows() / 4), quad / quads, NOWHERE);
    (token, quad % quads * 4 + pair % 2 * 2)
}

/// See [`super::tile::product`].
#[cube]
pub(super) fn product_of_few(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    sources: &[u32],
    sums: &mut Array<f32>,
    matrix: usize,
    first: usize,
    rounds: usize,
    #[comptime] tile: Tile,
) {
    let lane = UNIT_POS_X as usize;
    let (of_eight, quarter) = (lane / 4, lane % 4);
    let definition = MmaDefinition::<bf16, bf16, f32>::new(16usize, 8usize, 16usize);
    let tokens = comptime!(tile.tokens / 8);
    let of_words = comptime!(tile.steps * tile.eights);
    let pieces = comptime!(tile.format.pieces());
    let of_x = comptime!(tile.steps * tile.format.pieces() * tile.tokens / 8);

    let mut accumulators = Sequence::<Array<F2>>::new();
    #[unroll]
    for _ in 0..comptime!(tile.eights / 2 * tile.tokens / 8) {
        let mut accumulator = Array::<F2>::new(2usize);
        accumulator[0] = F2::new(0.0f32);
        accumulator[1] = F2::new(0.0f32);
        accumulators.push(accumulator);
    }
    // Where this lane's rows begin, in 16 bytes.
    let mut rows = Array::<usize>::new(comptime!(tile.eights));
    #[unroll]
    for n in 0..comptime!(tile.eights) {
        let row = first + n * 8 + of_eight;
        let row = select(row < comptime!(tile.matrix_rows), row, comptime!(tile.matrix_rows - 1));
        rows[n] = (matrix + row) * comptime!(tile.columns / tile.format.values());
    }
    let mut x_rows = Array::<usize>::new(tokens);
    #[unroll]
    for n in 0..tokens {
        x_rows[n] = sources[n * 8 + of_eight] as usize * comptime!(tile.columns / 8);
    }

    // Now and next.
    let mut words = Array::<U4>::new(comptime!(2 * tile.steps * tile.eights));
    let mut factors = Array::<u32>::new(comptime!(2 * tile.steps * tile.eights));
    let mut columns = Array::<U4>::new(comptime!(2 * tile.steps * tile.format.pieces() * tile.tokens / 8));
    read(weights, scales, x, &rows, &x_rows, &mut words, &mut factors, &mut columns, 0usize, 0usize, tile);
    for round in 0..rounds {
        read(
            weights,
            scales,
            x,
            &rows,
            &x_rows,
            &mut words,
            &mut factors,
            &mut columns,
            round + 1,
            1usize,
            tile,
        );
        #[unroll]
        for step in 0..comptime!(tile.steps) {
            #[unroll]
            for piece in 0..pieces {
                // Two registers of each row for each of two instructions.
                let mut left = Array::<u32>::new(comptime!(4 * tile.eights));
                #[unroll]
                for n in 0..comptime!(tile.eights) {
                    let word = words[comptime!(step * tile.eights + n)];
                    #[unroll]
                    for i in 0..4usize {
                        left[n * 4 + i] = if comptime!(tile.format == Format::Bf16) {
                            word.extract(i)
                        } else {
                            decoded_pair(
                                word.extract(piece),
                                factors[comptime!(step * tile.eights + n)],
                                comptime!(3 - i as u32),
                            )
                        };
                    }
                }
                #[unroll]
                for t in 0..tokens {
                    let mut values =
                        columns[comptime!((step * tile.format.pieces() + piece) * tile.tokens / 8 + t)];
                    if comptime!(tile.format == Format::Mxfp4) {
                        values = in_order_of_codes(values);
                    }
                    #[unroll]
                    for half in 0..2usize {
                        let mut right = Array::<B2>::new(2usize);
                        right[0] = B2::reinterpret(values.extract(comptime!(2 * half)));
                        right[1] = B2::reinterpret(values.extract(comptime!(2 * half + 1)));
                        #[unroll]
                        for m in 0..comptime!(tile.eights / 2) {
                            let mut both = Array::<B2>::new(4usize);
                            #[unroll]
                            for i in 0..4usize {
                                let at = comptime!((2 * m + i % 2) * 4 + 2 * half + i / 2);
                                both[i] = B2::reinterpret(left[at]);
                            }
                            let at = comptime!(m * tile.tokens / 8 + t);
                            definition.execute_inplace(&both, &right, accumulators.index_mut(at));
                        }
                    }
                }
            }
        }
        #[unroll]
        for at in 0..of_words {
            words[at] = words[comptime!(of_words + at)];
            factors[at] = factors[comptime!(of_words + at)];
        }
        #[unroll]
        for at in 0..of_x {
            columns[at] = columns[comptime!(of_x + at)];
        }
    }

    // The sums of all planes, `[planes, tokens, rows]`; between tokens four more, so that a plane writes to different banks.
    let stride = comptime!(tile.rows() + 4);
    let mut all = Shared::<[f32]>::new_slice(comptime!(tile.planes * tile.tokens * (tile.rows() + 4)));
    let own = UNIT_POS_Y as usize * comptime!(tile.tokens * (tile.rows() + 4));
    #[unroll]
    for m in 0..comptime!(tile.eights / 2) {
        #[unroll]
        for t in 0..tokens {
            let accumulator = accumulators.index(comptime!(m * tile.tokens / 8 + t));
            #[unroll]
            for i in 0..4usize {
                let token = comptime!(t * 8 + i % 2) + quarter * 2;
                let row = comptime!(m * 16 + i / 2 * 8) + of_eight;
                all[own + token * stride + row] = accumulator[comptime!(i / 2)].extract(comptime!(i % 2));
            }
        }
    }
    sync_cube();
    let unit = if comptime!(tile.format == Format::Bf16) {
        1.0f32.runtime()
    } else {
        comptime!((1u64 << UNDER) as f32).runtime()
    };
    #[unroll]
    for two in 0..comptime!(tile.pairs() / 2) {
        let quad = comptime!(two * tile.units()) + UNIT_POS as usize;
        let quads = comptime!(tile.rows() / 4);
        // Units without a quad repeat one.
        let quad = quad % comptime!(tile.tokens * tile.rows() / 4);
        let start = quad / quads * stride + quad % quads * 4;
        #[unroll]
        for i in 0..4usize {
            let mut sum = 0.0f32;
            #[unroll]
            for plane in 0..comptime!(tile.planes) {
                sum += all[start + comptime!(plane * tile.tokens * (tile.rows() + 4) + i)];
            }
            sums[comptime!(4 * two + i)] = sum * unit;
        }
    }
}

/// Reads this lane's share of a round into the first or second half of the arrays.
#[cube]
fn read(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    rows: &Array<usize>,
    x_rows: &Array<usize>,
    words: &mut Array<U4>,
    factors: &mut Array<u32>,
    columns: &mut Array<U4>,
    round: usize,
    #[comptime] half: usize,
    #[comptime] tile: Tile,
) {
    let last = comptime!(tile.columns / tile.format.values() - 1);
    let pieces = comptime!(tile.format.pieces());
    #[unroll]
    for step in 0..comptime!(tile.steps) {
        let part = (round * comptime!(tile.steps) + step) * comptime!(tile.planes) + UNIT_POS_Y as usize;
        let own = part * 4 + UNIT_POS_X as usize % 4;
        // Past the end the activations are zero.
        let valid = own <= last;
        let at = select(valid, own, last);
        #[unroll]
        for n in 0..comptime!(tile.eights) {
            let slot = comptime!((half * tile.steps + step) * tile.eights + n);
            words[slot] = weights[rows[n] + at];
            if comptime!(tile.format == Format::Mxfp4) {
                factors[slot] = factor_of_block(scales, rows[n] + at);
            }
        }
        #[unroll]
        for piece in 0..pieces {
            #[unroll]
            for t in 0..comptime!(tile.tokens / 8) {
                let values = x[x_rows[t] + at * pieces + piece];
                let mut kept = U4::empty();
                #[unroll]
                for w in 0..4usize {
                    kept.insert(w, select(valid, values.extract(w), 0u32));
                }
                let slot = comptime!(
                    ((half * tile.steps + step) * tile.format.pieces() + piece) * tile.tokens / 8 + t
                );
                columns[slot] = kept;
            }
        }
    }
}
