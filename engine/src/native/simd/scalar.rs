//! Plain Rust in lanes of four, which compilers turn into what every processor has.

use super::Simd;
use crate::native::fixed::FixedGroup;
use crate::native::mxfp4::{DOUBLED, PackedRow, decode_word};

/// See [`Level::Scalar`](super::Level::Scalar).
#[derive(Clone, Copy)]
pub struct Scalar;

type Lanes = [f32; 4];

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> Lanes {
    [f(0), f(1), f(2), f(3)]
}

#[inline(always)]
fn word(from: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([from[2 * index], from[2 * index + 1]])
}

impl Simd for Scalar {
    type Vector = Lanes;
    const LANES: usize = 4;
    const TILE_TOKENS: usize = 2;

    #[inline(always)]
    fn splat(self, value: f32) -> Lanes {
        [value; 4]
    }

    #[inline(always)]
    fn load(self, from: &[f32]) -> Lanes {
        each(|lane| from[lane])
    }

    #[inline(always)]
    fn store(self, vector: Lanes, to: &mut [f32]) {
        to[..4].copy_from_slice(&vector);
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        each(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        each(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        each(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        each(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        each(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        each(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn power_of_two(self, n: Lanes) -> Lanes {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn sum(self, a: Lanes) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }

    #[inline(always)]
    fn largest(self, a: Lanes) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }

    #[inline(always)]
    fn bf16_even(self, from: &[u8]) -> Lanes {
        each(|lane| f32::from_bits(u32::from(word(from, 2 * lane)) << 16))
    }

    #[inline(always)]
    fn bf16_odd(self, from: &[u8]) -> Lanes {
        each(|lane| f32::from_bits(u32::from(word(from, 2 * lane + 1)) << 16))
    }

    #[inline(always)]
    fn bf16(self, from: &[u8]) -> Lanes {
        each(|lane| f32::from_bits(u32::from(word(from, lane)) << 16))
    }

    #[inline(always)]
    fn f16(self, from: &[u8]) -> Lanes {
        each(|lane| half::f16::from_bits(word(from, lane)).to_f32())
    }

    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {}

    #[inline(always)]
    fn decode_group(self, codes: &[u8; 64], scales: [u8; 4], out: &mut [[u8; 64]; 4]) {
        for index in 0..32 {
            let values = decode_word(word(codes, index), scales[index / 8]);
            for (out, value) in out.iter_mut().zip(values) {
                out[2 * index..][..2].copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    #[inline(always)]
    fn fixed_products<const R: usize, const T: usize>(
        self,
        rows: [PackedRow<'_>; R],
        x: [&[FixedGroup]; T],
    ) -> [[f32; T]; R] {
        let mut totals = [[0.0; T]; R];
        for (row, totals) in rows.iter().zip(&mut totals) {
            for (block, (codes, scale)) in row.codes.as_chunks::<16>().0.iter().zip(row.scales).enumerate() {
                let unit = f32::from_bits(u32::from(*scale) << 23);
                for (x, total) in x.iter().zip(totals.iter_mut()) {
                    let group = &x[block / 4];
                    let sum = fixed_sum(codes, group, block % 4 * 16);
                    *total += sum as f32 * group.scale[block % 4 * 4] * unit;
                }
            }
        }
        totals
    }
}

/// The product of a block of doubled codes with the integers that begin at a byte of each plane.
#[inline(always)]
fn fixed_sum(codes: &[u8; 16], group: &FixedGroup, first: usize) -> i32 {
    let mut sum = 0;
    for (byte, place) in codes.iter().zip(first..) {
        for (half, code) in [byte & 15, byte >> 4].into_iter().enumerate() {
            let integer = 256 * i32::from(group.high[half][place]) + i32::from(group.low[half][place]);
            sum += i32::from(DOUBLED[usize::from(code)]) * integer;
        }
    }
    sum
}
