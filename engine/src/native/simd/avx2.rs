//! AVX2 with FMA and F16C: 8 lanes.

use std::arch::x86_64::*;

use super::{Kernel, Simd, first, totals};
use crate::native::dense::PREFETCH;
use crate::native::fixed::FixedGroup;
use crate::native::mxfp4::{BIASED, PackedRow, bf16_bytes};

/// See [`Level::Avx2`](super::Level::Avx2). Made by [`run`] only.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs a kernel with these instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const TILE_TOKENS: usize = 2;

    expressions! {
        f32 => __m256 {
            splat(value) = _mm256_set1_ps(value);
        }
        &[f32] => __m256 {
            load(from) = _mm256_loadu_ps(first::<8, _, _>(from));
        }
        __m256 => __m256 {
            add(a, b) = _mm256_add_ps(a, b);
            mul(a, b) = _mm256_mul_ps(a, b);
            div(a, b) = _mm256_div_ps(a, b);
            mul_add(a, b, c) = _mm256_fmadd_ps(a, b, c);
            max(a, b) = _mm256_max_ps(a, b);
            min(a, b) = _mm256_min_ps(a, b);
            round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            power_of_two(n) = {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
        }
        __m256 => f32 {
            sum(a) = {
                let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            };
            largest(a) = {
                let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            };
        }
        &[u8] => __m256 {
            bf16_even(from) = {
                let pairs = _mm256_loadu_si256(first::<32, _, _>(from));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs))
            };
            bf16_odd(from) = {
                let pairs = _mm256_loadu_si256(first::<32, _, _>(from));
                _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(!0xFFFF)))
            };
            bf16(from) = {
                let values = _mm256_cvtepu16_epi32(_mm_loadu_si128(first::<16, _, _>(from)));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(values))
            };
            f16(from) = _mm256_cvtph_ps(_mm_loadu_si128(first::<16, _, _>(from)));
        }
    }

    #[inline(always)]
    fn store(self, vector: __m256, to: &mut [f32]) {
        let to = to[..8].as_mut_ptr();
        instructions!(_mm256_storeu_ps(to, vector))
    }

    #[inline(always)]
    fn prefetch(self, from: &[u8], offset: usize) {
        // SAFETY: prefetching never faults, wherever it points to.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(offset).cast()) }
    }

    #[inline(always)]
    fn decode_group(self, codes: &[u8; 64], scales: [u8; 4], out: &mut [[u8; 64]; 4]) {
        const TABLE: [u8; 16] = bf16_bytes();
        for half in 0..2 {
            let exponents = [i16::from(scales[2 * half]) << 7, i16::from(scales[2 * half + 1]) << 7];
            let codes = first::<32, _, _>(&codes[32 * half..]);
            instructions!({
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(TABLE.as_ptr().cast()));
                let exponents = _mm256_set_m128i(_mm_set1_epi16(exponents[1]), _mm_set1_epi16(exponents[0]));
                let words = _mm256_loadu_si256(codes);
                let mut nibbles = words;
                for out in out.iter_mut() {
                    let magnitude = _mm256_and_si256(nibbles, _mm256_set1_epi16(7));
                    let sign = _mm256_slli_epi16::<12>(_mm256_and_si256(nibbles, _mm256_set1_epi16(8)));
                    // The low byte of a value from the first half of the table, the high one from the second.
                    let index = _mm256_or_si256(magnitude, _mm256_slli_epi16::<8>(magnitude));
                    let index = _mm256_or_si256(index, _mm256_set1_epi16(0x0800));
                    let zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
                    let values = _mm256_shuffle_epi8(table, index);
                    let values = _mm256_add_epi16(values, _mm256_andnot_si256(zero, exponents));
                    let values = _mm256_or_si256(values, sign);
                    _mm256_storeu_si256(out[32 * half..][..32].as_mut_ptr().cast(), values);
                    nibbles = _mm256_srli_epi16::<4>(nibbles);
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
        let length = rows[0].codes.len();
        let mut sums = [[self.splat(0.0); T]; R];
        for pair in 0..length / 32 {
            for (row, sums) in rows.iter().zip(sums.iter_mut()) {
                self.prefetch(row.codes, 32 * pair + PREFETCH);
                let codes = &row.codes.as_chunks().0[pair];
                self.fixed_pair(codes, row.scales.as_chunks().0[pair], x, pair, sums);
            }
        }
        if !length.is_multiple_of(32) {
            for (row, sums) in rows.iter().zip(sums.iter_mut()) {
                let (mut codes, mut scales) = ([0; 32], [0; 2]);
                let (codes_left, scales_left) =
                    (row.codes.as_chunks::<32>().1, row.scales.as_chunks::<2>().1);
                codes[..codes_left.len()].copy_from_slice(codes_left);
                scales[..scales_left.len()].copy_from_slice(scales_left);
                self.fixed_pair(&codes, scales, x, length / 32, sums);
            }
        }
        totals(self, sums)
    }
}

impl Avx2 {
    /// Adds the products of two blocks, those of one half of each group.
    #[inline(always)]
    fn fixed_pair<const T: usize>(
        self,
        codes: &[u8; 32],
        scales: [u8; 2],
        x: [&[FixedGroup]; T],
        pair: usize,
        sums: &mut [__m256; T],
    ) {
        let half = pair % 2;
        let units = [f32::from_bits(u32::from(scales[0]) << 23), f32::from_bits(u32::from(scales[1]) << 23)];
        instructions!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(BIASED.as_ptr().cast()));
            let nibble = _mm256_set1_epi8(15);
            let ones = _mm256_set1_epi16(1);
            let bytes = _mm256_loadu_si256(codes.as_ptr().cast());
            let even = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, nibble));
            let odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble));
            let units = _mm256_set_m128(_mm_set1_ps(units[1]), _mm_set1_ps(units[0]));
            for (x, sum) in x.iter().zip(sums) {
                let x = &x[pair / 2];
                let mut integers = _mm256_setzero_si256();
                for plane in [&x.high, &x.low] {
                    let a = _mm256_load_si256(plane[0][32 * half..][..32].as_ptr().cast());
                    let b = _mm256_load_si256(plane[1][32 * half..][..32].as_ptr().cast());
                    // Sums of four products of at most 24 · 128 fit 16 bits.
                    let fours = _mm256_add_epi16(_mm256_maddubs_epi16(even, a), _mm256_maddubs_epi16(odd, b));
                    let eights = _mm256_madd_epi16(fours, ones);
                    integers = _mm256_add_epi32(_mm256_slli_epi32::<8>(integers), eights);
                }
                let correction = _mm256_load_si256(x.correction[8 * half..][..8].as_ptr().cast());
                let integers = _mm256_add_epi32(integers, correction);
                let scale = _mm256_load_ps(x.scale[8 * half..][..8].as_ptr());
                let scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(integers), scale);
                *sum = _mm256_fmadd_ps(scaled, units, *sum);
            }
        })
    }
}
