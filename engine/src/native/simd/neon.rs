//! NEON: 4 lanes.

use std::arch::aarch64::*;

use super::{Kernel, Simd, first, totals};
use crate::native::fixed::FixedGroup;
use crate::native::mxfp4::{DOUBLED, PackedRow, bf16_bytes};

/// See [`Level::Neon`](super::Level::Neon). Made by [`run`] only.
#[derive(Clone, Copy)]
pub struct Neon(());

/// Runs a kernel with these instructions.
#[target_feature(enable = "neon")]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

impl Simd for Neon {
    type Vector = float32x4_t;
    const LANES: usize = 4;
    const TILE_TOKENS: usize = 5;

    expressions! {
        f32 => float32x4_t {
            splat(value) = vdupq_n_f32(value);
        }
        &[f32] => float32x4_t {
            load(from) = vld1q_f32(first::<4, _, _>(from));
        }
        float32x4_t => float32x4_t {
            add(a, b) = vaddq_f32(a, b);
            mul(a, b) = vmulq_f32(a, b);
            div(a, b) = vdivq_f32(a, b);
            mul_add(a, b, c) = vfmaq_f32(c, a, b);
            max(a, b) = vmaxq_f32(a, b);
            min(a, b) = vminq_f32(a, b);
            round(a) = vrndnq_f32(a);
            power_of_two(n) = {
                let biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
            };
        }
        float32x4_t => f32 {
            sum(a) = vaddvq_f32(a);
            largest(a) = vmaxvq_f32(a);
        }
        &[u8] => float32x4_t {
            bf16_even(from) = {
                let pairs = vreinterpretq_u32_u8(vld1q_u8(first::<16, _, _>(from)));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs))
            };
            bf16_odd(from) = {
                let pairs = vreinterpretq_u32_u8(vld1q_u8(first::<16, _, _>(from)));
                vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xFFFF_0000)))
            };
            bf16(from) = {
                let values = vmovl_u16(vreinterpret_u16_u8(vld1_u8(first::<8, _, _>(from))));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(values))
            };
        }
    }

    #[inline(always)]
    fn store(self, vector: float32x4_t, to: &mut [f32]) {
        let to = to[..4].as_mut_ptr();
        instructions!(vst1q_f32(to, vector))
    }

    #[inline(always)]
    fn f16(self, from: &[u8]) -> float32x4_t {
        let mut values = [0.0; 4];
        for (value, pair) in values.iter_mut().zip(from[..8].as_chunks::<2>().0) {
            *value = half::f16::from_le_bytes(*pair).to_f32();
        }
        self.load(&values)
    }

    #[inline(always)]
    fn prefetch(self, _: &[u8], _: usize) {
        // Stable Rust has no such instruction for this processor.
    }

    #[inline(always)]
    fn decode_group(self, codes: &[u8; 64], scales: [u8; 4], out: &mut [[u8; 64]; 4]) {
        const TABLE: [u8; 16] = bf16_bytes();
        for (block, (codes, scale)) in codes.as_chunks::<16>().0.iter().zip(scales).enumerate() {
            instructions!({
                let table = vld1q_u8(TABLE.as_ptr());
                let exponents = vdupq_n_u16(u16::from(scale) << 7);
                let mut nibbles = vreinterpretq_u16_u8(vld1q_u8(codes.as_ptr()));
                for out in out.iter_mut() {
                    let magnitude = vandq_u16(nibbles, vdupq_n_u16(7));
                    let sign = vshlq_n_u16::<12>(vandq_u16(nibbles, vdupq_n_u16(8)));
                    // The low byte of a value from the first half of the table, the high one from the second.
                    let index = vorrq_u16(magnitude, vshlq_n_u16::<8>(magnitude));
                    let index = vorrq_u16(index, vdupq_n_u16(0x0800));
                    let zero = vceqq_u16(magnitude, vdupq_n_u16(0));
                    let values = vreinterpretq_u16_u8(vqtbl1q_u8(table, vreinterpretq_u8_u16(index)));
                    let values = vaddq_u16(values, vbicq_u16(exponents, zero));
                    let bytes = vreinterpretq_u8_u16(vorrq_u16(values, sign));
                    vst1q_u8(out[16 * block..][..16].as_mut_ptr(), bytes);
                    nibbles = vshrq_n_u16::<4>(nibbles);
                }
            })
        }
    }

    #[inline(always)]
    fn fixed_products<const R: usize, const T: usize>(
        self,
        rows: [PackedRow<'_>; R],
        x: [&[FixedGroup]; T],
    ) -> [[f32; T]; R] {
        let mut sums = [[self.splat(0.0); T]; R];
        for (row, sums) in rows.iter().zip(sums.iter_mut()) {
            for (block, (codes, scale)) in row.codes.as_chunks::<16>().0.iter().zip(row.scales).enumerate() {
                self.fixed_block(codes, *scale, x, block, sums);
            }
        }
        totals(self, sums)
    }
}

impl Neon {
    /// Adds the products of a block. Bytes are multiplied with sign here, so nothing is to be corrected.
    #[inline(always)]
    fn fixed_block<const T: usize>(
        self,
        codes: &[u8; 16],
        scale: u8,
        x: [&[FixedGroup]; T],
        block: usize,
        sums: &mut [float32x4_t; T],
    ) {
        let (group, start) = (block / 4, block % 4 * 16);
        let unit = f32::from_bits(u32::from(scale) << 23);
        instructions!({
            let table = vld1q_s8(DOUBLED.as_ptr());
            let bytes = vld1q_u8(codes.as_ptr());
            let even = vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15)));
            let odd = vqtbl1q_s8(table, vshrq_n_u8::<4>(bytes));
            for (x, sum) in x.iter().zip(sums) {
                let x = &x[group];
                let mut integers = vdupq_n_s32(0);
                for plane in [&x.high, &x.low] {
                    let a = vld1q_s8(plane[0][start..][..16].as_ptr());
                    let b = vld1q_s8(plane[1][start..][..16].as_ptr());
                    // Sums of four products of at most 12 · 128 fit 16 bits.
                    let fours = vmull_s8(vget_low_s8(even), vget_low_s8(a));
                    let fours = vmlal_s8(fours, vget_high_s8(even), vget_high_s8(a));
                    let fours = vmlal_s8(fours, vget_low_s8(odd), vget_low_s8(b));
                    let fours = vmlal_s8(fours, vget_high_s8(odd), vget_high_s8(b));
                    integers = vpadalq_s16(vshlq_n_s32::<8>(integers), fours);
                }
                let scaled = vmulq_f32(vcvtq_f32_s32(integers), vdupq_n_f32(x.scale[start / 4]));
                *sum = vfmaq_f32(*sum, scaled, vdupq_n_f32(unit));
            }
        })
    }
}
