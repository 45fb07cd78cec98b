//! Vectors in fixed point, for products with MXFP4 that stays packed.
//!
//! A block of 32 values becomes integers of 16 bits times one scale, an error of at most 2^−16 of the block's largest
//! value. Each integer is `256 · high + low` in two signed bytes, as the processor multiplies bytes. MXFP4 codes are
//! half-integers from −6 to 6: doubled and raised by [`OFFSET`] they are bytes without sign, which is what the other
//! factor must be; the sums are corrected by the offset times the sum of the integers.

use super::order::PACKED;
use super::simd::{Kernel, Simd};

/// Makes doubled codes non-negative.
pub const OFFSET: i32 = 12;

/// The largest integer: its bytes are 127 and 127.
const LARGEST: f32 = 32639.0;

/// Four blocks of a vector. Byte `i` of the first half of `high` and `low` belongs to value `2i`, of the second to value
/// `2i + 1`: the order of the low and the high nibbles of MXFP4.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedGroup {
    /// The integers, divided by 256 and rounded.
    pub high: [[i8; 64]; 2],
    /// What they leave.
    pub low: [[i8; 64]; 2],
    /// `−OFFSET` times the sum of the eight integers that meet a 32-bit lane of codes.
    pub correction: [i32; 16],
    /// The scale of the block of each such lane, times `2^−15`, as stored scales of doubled codes are `2^15` too large.
    pub scale: [f32; 16],
}

impl FixedGroup {
    /// All zero.
    pub const ZERO: FixedGroup =
        FixedGroup { high: [[0; 64]; 2], low: [[0; 64]; 2], correction: [0; 16], scale: [0.0; 16] };
}

/// Groups that a vector takes.
pub const fn fixed_groups(columns: usize) -> usize {
    columns.div_ceil(PACKED)
}

/// Converts a vector, in multiples of 32; what is beyond its end is zero.
pub struct ToFixed<'a> {
    /// The values.
    pub x: &'a [f32],
    /// [`fixed_groups`] of them.
    pub out: &'a mut [FixedGroup],
}

impl Kernel for ToFixed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (values, group) in self.x.chunks(PACKED).zip(self.out) {
            if values.len() < PACKED {
                *group = FixedGroup::ZERO;
            }
            for (block, values) in values.as_chunks::<32>().0.iter().enumerate() {
                convert_block(simd, values, block, group);
            }
        }
    }
}

#[inline(always)]
fn convert_block<S: Simd>(simd: S, values: &[f32; 32], block: usize, group: &mut FixedGroup) {
    let mut largest = simd.splat(0.0);
    for part in values.chunks_exact(S::LANES) {
        let part = simd.load(part);
        largest = simd.max(largest, simd.max(part, simd.mul(part, simd.splat(-1.0))));
    }
    let largest = simd.largest(largest);
    // A largest value so small that its inverse is infinite is 2^-100 of anything that it is added to.
    let inverse = if largest > f32::MIN_POSITIVE { LARGEST / largest } else { 0.0 };
    let mut integers = [0i32; 32];
    for (integer, value) in integers.iter_mut().zip(values) {
        *integer = (value * inverse).round_ties_even() as i32;
    }
    for i in 0..16 {
        for half in 0..2 {
            let integer = integers[2 * i + half];
            let low = integer as i8;
            group.low[half][block * 16 + i] = low;
            group.high[half][block * 16 + i] = ((integer - i32::from(low)) >> 8) as i8;
        }
    }
    for (lane, integers) in integers.as_chunks::<8>().0.iter().enumerate() {
        group.correction[block * 4 + lane] = -OFFSET * integers.iter().sum::<i32>();
        group.scale[block * 4 + lane] = largest / LARGEST / 32768.0;
    }
}
