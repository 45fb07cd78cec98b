//! Vector instructions, chosen at run time.
//!
//! A kernel is written once against [`Simd`] and compiled for each level. Values of the types that implement it exist
//! only inside [`Dispatch::run`], where the processor is known to have the instructions, so their methods are safe to
//! call.
//!
//! ```text
//! Level ── Dispatch::new, checks the processor ──► Dispatch ── run(kernel) ──► kernel.run(Avx512)
//! ```

/// Uses the instructions of a level.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! instructions {
    ($($body:tt)*) => {{
        // SAFETY: a value of a level's type exists in its `run` only, so the processor has the instructions. Pointers
        // are made of slices whose length was checked just before; masked loads touch nothing beyond it.
        unsafe { $($body)* }
    }};
}

/// Those methods of a level that are an expression of its instructions each, by the types of arguments and result.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! expressions {
    ($($from:ty => $to:ty { $($name:ident($($argument:ident),+) = $body:expr;)+ })+) => {$($(
        #[inline(always)]
        fn $name(self, $($argument: $from),+) -> $to {
            instructions!($body)
        }
    )+)+};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

use std::fmt;

use super::fixed::FixedGroup;
use super::mxfp4::PackedRow;

/// Sets of instructions that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// AVX-512 F, BW, DQ, VL and VNNI: Cascade Lake, Zen 4 and later.
    Avx512,
    /// AVX2, FMA and F16C: Haswell, Zen and later.
    Avx2,
    /// NEON: every 64-bit ARM.
    Neon,
    /// What the compiler makes of plain Rust.
    Scalar,
}

impl Level {
    /// Every level, the best first.
    pub const ALL: [Level; 4] = [Level::Avx512, Level::Avx2, Level::Neon, Level::Scalar];

    /// Whether this processor has it.
    pub fn is_supported(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Level::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Level::Scalar => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The best level of this processor.
    pub fn best() -> Level {
        Level::ALL.into_iter().find(|level| level.is_supported()).unwrap_or(Level::Scalar)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Level::Avx512 => "AVX-512",
            Level::Avx2 => "AVX2",
            Level::Neon => "NEON",
            Level::Scalar => "scalar",
        })
    }
}

/// A level that this processor has.
#[derive(Clone, Copy, Debug)]
pub struct Dispatch(Level);

impl Dispatch {
    /// `None` where this processor lacks the level.
    pub fn new(level: Level) -> Option<Dispatch> {
        level.is_supported().then_some(Dispatch(level))
    }

    /// The level.
    pub fn level(self) -> Level {
        self.0
    }

    /// Runs a kernel, compiled for the level.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` has seen that the processor has the level.
            Level::Avx512 => unsafe { avx512::run(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `new` has seen that the processor has the level.
            Level::Avx2 => unsafe { avx2::run(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: `new` has seen that the processor has the level.
            Level::Neon => unsafe { neon::run(kernel) },
            _ => kernel.run(scalar::Scalar),
        }
    }
}

/// Work that is compiled for every level. Implementations of `run` are `#[inline(always)]`: only what is inlined into
/// the level's own function may use its instructions.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The instructions of a level. Slices that are loaded from or stored to may be longer than what is used; shorter ones
/// panic, which constant sizes compile away.
pub trait Simd: Copy {
    /// [`Simd::LANES`] f32.
    type Vector: Copy;
    /// 16, 8 or 4.
    const LANES: usize;
    /// Tokens of a register tile of four rows.
    const TILE_TOKENS: usize;

    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::Vector;
    /// The first values.
    fn load(self, from: &[f32]) -> Self::Vector;
    /// Writes the first values.
    fn store(self, vector: Self::Vector, to: &mut [f32]);
    /// `a + b`
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b`
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a / b`
    fn div(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b + c`, rounded once where the level can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger of each two.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The smaller of each two.
    fn min(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// The nearest integers.
    fn round(self, a: Self::Vector) -> Self::Vector;
    /// `2^n` for integers −126 to 127.
    fn power_of_two(self, n: Self::Vector) -> Self::Vector;
    /// The sum of the lanes.
    fn sum(self, a: Self::Vector) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::Vector) -> f32;

    /// The 1st, 3rd, … of `2 · LANES` bf16.
    fn bf16_even(self, from: &[u8]) -> Self::Vector;
    /// The 2nd, 4th, … of `2 · LANES` bf16.
    fn bf16_odd(self, from: &[u8]) -> Self::Vector;
    /// `LANES` bf16.
    fn bf16(self, from: &[u8]) -> Self::Vector;
    /// `LANES` f16.
    fn f16(self, from: &[u8]) -> Self::Vector;
    /// Asks for the cache line at some bytes from the start of a slice, which may lie beyond its end.
    fn prefetch(self, from: &[u8], offset: usize);

    /// Four blocks of MXFP4 as bf16, `2^7` times as large, in the order of
    /// [`packed_index`](super::order::packed_index).
    fn decode_group(self, codes: &[u8; 64], scales: [u8; 4], out: &mut [[u8; 64]; 4]);
    /// Products of neighbouring rows of MXFP4 (of each 16 bytes of codes and a scale for each block) with fixed-point
    /// vectors of as many blocks.
    fn fixed_products<const R: usize, const T: usize>(
        self,
        rows: [PackedRow<'_>; R],
        x: [&[FixedGroup]; T],
    ) -> [[f32; T]; R];
}

/// The first `N` elements, as a pointer to what instructions want.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
fn first<const N: usize, T, P>(from: &[T]) -> *const P {
    from[..N].as_ptr().cast()
}

/// The sums of the lanes of some vectors.
#[inline(always)]
pub fn totals<S: Simd, const R: usize, const T: usize>(simd: S, sums: [[S::Vector; T]; R]) -> [[f32; T]; R] {
    let mut totals = [[0.0; T]; R];
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = simd.sum(sum);
        }
    }
    totals
}

/// `e^x`, to about 2 units in the last place; arguments are clamped to −87 … 88.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::Vector) -> S::Vector {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = simd.min(simd.max(x, simd.splat(-87.0)), simd.splat(88.0));
    let n = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.mul_add(n, simd.splat(-LN2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN2_LOW), r);
    let coefficients = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0f32];
    let mut sum = simd.splat(coefficients[0]);
    for coefficient in &coefficients[1..] {
        sum = simd.mul_add(sum, r, simd.splat(*coefficient));
    }
    simd.mul(sum, simd.power_of_two(n))
}

#[cfg(test)]
mod tests;
