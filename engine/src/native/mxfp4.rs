//! Products with MXFP4 matrices as a `model.bin` stores them: codes and scales apart, scales 14 too large.
//!
//! There are two ways. Many tokens are worth decoding a few rows to bf16, exactly, which then are multiplied like
//! [dense](super::dense) ones. For a single token that would take longer than reading the row, so its vector is brought
//! into [fixed point](super::fixed) and multiplied with the codes as they are.

use super::dense::{TILE_ROWS, tiles};
use super::fixed::{FixedGroup, OFFSET, fixed_groups};
use super::order::{DENSE, Group, packed_groups};
use super::simd::{Kernel, Simd};

/// Values of a block.
pub const BLOCK: usize = 32;

/// Twice the value of each code.
pub const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// [`DOUBLED`] plus [`OFFSET`].
pub const BIASED: [u8; 16] = {
    let mut biased = [0; 16];
    let mut code = 0;
    while code < 16 {
        biased[code] = (DOUBLED[code] as i32 + OFFSET) as u8;
        code += 1;
    }
    biased
};

/// Decoded values are `2^7` times as large as the true ones: then all that a file can hold are normal numbers.
const UNIT: f32 = 1.0 / 128.0;

/// What the stored exponents are too large by, less 7, beside the bias that codes have as bf16.
const EXCESS: u16 = 127 + 7;

/// The codes as bf16, their exponents lowered by [`EXCESS`] with wrapping, so that adding a stored scale gives the value;
/// zeros, to which nothing may be added, as they are. Twice, as some shuffles have 32 entries.
pub const fn bf16_codes() -> [u16; 32] {
    const MAGNITUDES: [u16; 8] = [0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0];
    let mut codes = [0; 32];
    let mut code = 0;
    while code < 32 {
        let magnitude = MAGNITUDES[code & 7];
        let lowered = if magnitude == 0 { 0 } else { magnitude.wrapping_sub(EXCESS << 7) };
        codes[code] = lowered.wrapping_add((code as u16 & 8) << 12);
        code += 1;
    }
    codes
}

/// The low bytes of the first eight of [`bf16_codes`], then their high bytes.
pub const fn bf16_bytes() -> [u8; 16] {
    let codes = bf16_codes();
    let mut bytes = [0; 16];
    let mut code = 0;
    while code < 8 {
        [bytes[code], bytes[8 + code]] = codes[code].to_le_bytes();
        code += 1;
    }
    bytes
}

/// Four codes, the first in the lowest bits, with a stored scale: bf16, `2^7` times the value.
#[inline(always)]
pub fn decode_word(word: u16, scale: u8) -> [u16; 4] {
    const CODES: [u16; 32] = bf16_codes();
    std::array::from_fn(|nibble| {
        let code = word >> (4 * nibble) & 15;
        let exponent = if code & 7 == 0 { 0 } else { u16::from(scale) << 7 };
        CODES[usize::from(code)].wrapping_add(exponent)
    })
}

/// An MXFP4 matrix in place: `[rows, columns]`.
#[derive(Clone, Copy)]
pub struct PackedMatrix<'a> {
    /// 16 bytes a block, row-major.
    pub codes: &'a [u8],
    /// A byte a block, as stored.
    pub scales: &'a [u8],
    /// Inputs, in multiples of 32.
    pub columns: usize,
}

/// A row of a [`PackedMatrix`].
#[derive(Clone, Copy)]
pub struct PackedRow<'a> {
    /// 16 bytes a block.
    pub codes: &'a [u8],
    /// A byte a block.
    pub scales: &'a [u8],
}

impl<'a> PackedMatrix<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> PackedRow<'a> {
        let blocks = self.columns / BLOCK;
        PackedRow {
            codes: &self.codes[row * blocks * 16..][..blocks * 16],
            scales: &self.scales[row * blocks..][..blocks],
        }
    }
}

/// The inputs of a product, of which each token takes one.
#[derive(Clone, Copy)]
pub enum Inputs<'a> {
    /// In [fixed point](super::fixed): for few tokens.
    Fixed(&'a [FixedGroup]),
    /// [In order](super::order::to_packed): for many.
    Ordered(&'a [Group]),
}

/// Products of some rows with the vectors of some tokens: `put(token, row, sum)`, tokens counted from 0.
pub struct Product<'a, P> {
    /// The matrix.
    pub weight: PackedMatrix<'a>,
    /// Rows of it.
    pub rows: std::ops::Range<usize>,
    /// The vectors of all tokens.
    pub x: Inputs<'a>,
    /// Which of these vectors meet the matrix.
    pub tokens: &'a [u32],
    /// Takes a sum.
    pub put: P,
}

impl<P: FnMut(usize, usize, f32)> Kernel for Product<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.x {
            Inputs::Fixed(x) => self.fixed(simd, x),
            Inputs::Ordered(x) => self.ordered(simd, x),
        }
    }
}

impl<P: FnMut(usize, usize, f32)> Product<'_, P> {
    #[inline(always)]
    fn fixed<S: Simd>(mut self, simd: S, x: &[FixedGroup]) {
        let groups = fixed_groups(self.weight.columns);
        let x = |token: u32| &x[token as usize * groups..][..groups];
        // Rows of a tile lie a quarter of the task apart: memory is read ahead best in a few streams of which no two are
        // in one page.
        let quarter = self.rows.len() / TILE_ROWS;
        for first in self.rows.start..self.rows.start + quarter {
            let rows = [0, 1, 2, 3].map(|r| first + r * quarter);
            let packed = rows.map(|row| self.weight.row(row));
            for (index, token) in self.tokens.iter().enumerate() {
                let sums = simd.fixed_products(packed, [x(*token)]);
                sums.into_iter().zip(rows).for_each(|([sum], row)| (self.put)(index, row, sum));
            }
        }
        for row in self.rows.start + TILE_ROWS * quarter..self.rows.end {
            for (index, token) in self.tokens.iter().enumerate() {
                let [[sum]] = simd.fixed_products([self.weight.row(row)], [x(*token)]);
                (self.put)(index, row, sum);
            }
        }
    }

    #[inline(always)]
    fn ordered<S: Simd>(mut self, simd: S, x: &[Group]) {
        let groups = packed_groups(self.weight.columns);
        let x = |token: usize| &x[self.tokens[token] as usize * groups..][..groups];
        let mut decoded = vec![[0u8; 2 * DENSE]; TILE_ROWS * groups];
        let mut row = self.rows.start;
        while row < self.rows.end {
            let count = TILE_ROWS.min(self.rows.end - row);
            // Rows that are missing at the end are what was there before, and not put anywhere.
            for (r, decoded) in decoded.chunks_exact_mut(groups).take(count).enumerate() {
                decode_row(simd, self.weight.row(row + r), decoded);
            }
            let rows =
                std::array::from_fn::<_, TILE_ROWS, _>(|r| decoded[r * groups..][..groups].as_flattened());
            tiles(simd, rows, 0..self.tokens.len(), x, |token, r, sum| {
                if r < count {
                    (self.put)(token, row + r, sum * UNIT);
                }
            });
            row += count;
        }
    }
}

/// Up to four scales and zeros, made in a register: four stores and a load of all of them would wait for each other.
#[inline(always)]
pub fn padded_scales(scales: &[u8]) -> [u8; 4] {
    let word = scales.iter().take(4).rev().fold(0, |word, &scale| word << 8 | u32::from(scale));
    word.to_le_bytes()
}

/// Decodes a row in groups of four blocks; what is beyond its end is zero.
#[inline(always)]
fn decode_row<S: Simd>(simd: S, PackedRow { codes, scales }: PackedRow<'_>, out: &mut [[u8; 2 * DENSE]]) {
    let (whole, rest) = codes.as_chunks::<64>();
    let (scales, scales_of_rest) = scales.as_chunks::<4>();
    let out = out.as_chunks_mut::<4>().0;
    for ((group, scales), out) in whole.iter().zip(scales).zip(out.iter_mut()) {
        // The same row of the next tile.
        simd.prefetch(group, TILE_ROWS * codes.len());
        simd.decode_group(group, *scales, out);
    }
    if let (false, Some(out)) = (rest.is_empty(), out.get_mut(whole.len())) {
        let mut codes = [0; 64];
        codes[..rest.len()].copy_from_slice(rest);
        simd.decode_group(&codes, padded_scales(scales_of_rest), out);
    }
}
