//! AVX-512: 16 lanes.

use std::arch::x86_64::*;

use super::{Kernel, Simd, first, totals};
use crate::native::dense::PREFETCH;
use crate::native::fixed::FixedGroup;
use crate::native::mxfp4::{BIASED, PackedRow, bf16_codes, padded_scales};

/// See [`Level::Avx512`](super::Level::Avx512). Made by [`run`] only.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Runs a kernel with these instructions.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

impl Simd for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    const TILE_TOKENS: usize = 5;

    expressions! {
        f32 => __m512 {
            splat(value) = _mm512_set1_ps(value);
        }
        &[f32] => __m512 {
            load(from) = _mm512_loadu_ps(first::<16, _, _>(from));
        }
        __m512 => __m512 {
            add(a, b) = _mm512_add_ps(a, b);
            mul(a, b) = _mm512_mul_ps(a, b);
            div(a, b) = _mm512_div_ps(a, b);
            mul_add(a, b, c) = _mm512_fmadd_ps(a, b, c);
            max(a, b) = _mm512_max_ps(a, b);
            min(a, b) = _mm512_min_ps(a, b);
            round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            power_of_two(n) = _mm512_scalef_ps(_mm512_set1_ps(1.0), n);
        }
        __m512 => f32 {
            sum(a) = _mm512_reduce_add_ps(a);
            largest(a) = _mm512_reduce_max_ps(a);
        }
        &[u8] => __m512 {
            bf16_even(from) = {
                let pairs = _mm512_loadu_si512(first::<64, _, _>(from));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))
            };
            bf16_odd(from) = {
                let pairs = _mm512_loadu_si512(first::<64, _, _>(from));
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(!0xFFFF)))
            };
            bf16(from) = {
                let values = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first::<32, _, _>(from)));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(values))
            };
            f16(from) = _mm512_cvtph_ps(_mm256_loadu_si256(first::<32, _, _>(from)));
        }
    }

    #[inline(always)]
    fn store(self, vector: __m512, to: &mut [f32]) {
        let to = to[..16].as_mut_ptr();
        instructions!(_mm512_storeu_ps(to, vector))
    }

    #[inline(always)]
    fn prefetch(self, from: &[u8], offset: usize) {
        // SAFETY: prefetching never faults, wherever it points to.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(offset).cast()) }
    }

    #[inline(always)]
    fn decode_group(self, codes: &[u8; 64], scales: [u8; 4], out: &mut [[u8; 64]; 4]) {
        const TABLE: [u16; 32] = bf16_codes();
        instructions!({
            let table = _mm512_loadu_si512(TABLE.as_ptr().cast());
            let magnitude = _mm512_set1_epi16(7);
            let words = _mm512_loadu_si512(codes.as_ptr().cast());
            // The block of a word is that of its 128-bit lane.
            let bytes = _mm512_set1_epi32(i32::from_ne_bytes(scales));
            let spread = _mm512_set_epi64(
                0x8003_8003_8003_8003_u64 as i64,
                0x8003_8003_8003_8003_u64 as i64,
                0x8002_8002_8002_8002_u64 as i64,
                0x8002_8002_8002_8002_u64 as i64,
                0x8001_8001_8001_8001_u64 as i64,
                0x8001_8001_8001_8001_u64 as i64,
                0x8000_8000_8000_8000_u64 as i64,
                0x8000_8000_8000_8000_u64 as i64,
            );
            let exponents = _mm512_slli_epi16::<7>(_mm512_shuffle_epi8(bytes, spread));
            let mut nibbles = words;
            for out in out {
                let values = _mm512_permutexvar_epi16(nibbles, table);
                let nonzero = _mm512_test_epi16_mask(nibbles, magnitude);
                let values = _mm512_mask_add_epi16(values, nonzero, values, exponents);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), values);
                nibbles = _mm512_srli_epi16::<4>(nibbles);
            }
        })
    }

    #[inline(always)]
    fn fixed_products<const R: usize, const T: usize>(
        self,
        rows: [PackedRow<'_>; R],
        x: [&[FixedGroup]; T],
    ) -> [[f32; T]; R] {
        let length = rows[0].codes.len();
        let groups = length / 64;
        // Cut to one length, so that indices need not be checked.
        let (mut codes, mut scales, mut whole) = ([&[][..]; R], [&[][..]; R], [&[][..]; T]);
        for ((codes, scales), row) in codes.iter_mut().zip(&mut scales).zip(rows) {
            *codes = &row.codes.as_chunks::<64>().0[..groups];
            *scales = &row.scales.as_chunks::<4>().0[..groups];
        }
        for (whole, x) in whole.iter_mut().zip(x) {
            *whole = &x[..groups];
        }
        let mut sums = [[self.splat(0.0); T]; R];
        for group in 0..groups {
            let mut values = [&FixedGroup::ZERO; T];
            for (value, x) in values.iter_mut().zip(whole) {
                *value = &x[group];
            }
            for (((row, codes), scales), sums) in rows.iter().zip(codes).zip(scales).zip(&mut sums) {
                self.prefetch(row.codes, 64 * group + PREFETCH);
                let words = instructions!(_mm512_loadu_si512(codes[group].as_ptr().cast()));
                self.fixed_group(words, scales[group], values, sums);
            }
        }
        let rest = length % 64;
        if rest > 0 {
            let mut values = [&FixedGroup::ZERO; T];
            for (value, x) in values.iter_mut().zip(x) {
                *value = &x[groups];
            }
            for (row, sums) in rows.iter().zip(&mut sums) {
                let codes = &row.codes[64 * groups..][..rest];
                let scales = padded_scales(&row.scales[4 * groups..]);
                let words = instructions!(_mm512_maskz_loadu_epi8((1 << rest) - 1, codes.as_ptr().cast()));
                self.fixed_group(words, scales, values, sums);
            }
        }
        totals(self, sums)
    }
}

impl Avx512 {
    /// Adds the products of four blocks.
    #[inline(always)]
    fn fixed_group<const T: usize>(
        self,
        words: __m512i,
        scales: [u8; 4],
        x: [&FixedGroup; T],
        sums: &mut [__m512; T],
    ) {
        instructions!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(BIASED.as_ptr().cast()));
            let nibble = _mm512_set1_epi8(15);
            let even = _mm512_shuffle_epi8(table, _mm512_and_si512(words, nibble));
            let odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16::<4>(words), nibble));
            // Each scale to the top byte of the lanes of its block, from where it moves to the exponent.
            let bytes = _mm512_set1_epi32(i32::from_ne_bytes(scales));
            let spread = _mm512_set_epi32(
                0x0380_8080,
                0x0380_8080,
                0x0380_8080,
                0x0380_8080,
                0x0280_8080,
                0x0280_8080,
                0x0280_8080,
                0x0280_8080,
                0x0180_8080,
                0x0180_8080,
                0x0180_8080,
                0x0180_8080,
                0x0080_8080,
                0x0080_8080,
                0x0080_8080,
                0x0080_8080,
            );
            let units = _mm512_castsi512_ps(_mm512_srli_epi32::<1>(_mm512_shuffle_epi8(bytes, spread)));
            for (x, sum) in x.iter().zip(sums) {
                let high = _mm512_load_si512(x.high[0].as_ptr().cast());
                let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, high);
                let high = _mm512_dpbusd_epi32(high, odd, _mm512_load_si512(x.high[1].as_ptr().cast()));
                let low = _mm512_load_si512(x.correction.as_ptr().cast());
                let low = _mm512_dpbusd_epi32(low, even, _mm512_load_si512(x.low[0].as_ptr().cast()));
                let low = _mm512_dpbusd_epi32(low, odd, _mm512_load_si512(x.low[1].as_ptr().cast()));
                let integers = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(integers), _mm512_load_ps(x.scale.as_ptr()));
                *sum = _mm512_fmadd_ps(scaled, units, *sum);
            }
        })
    }
}
