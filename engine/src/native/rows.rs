//! Operations on the rows of activations: norm, rotation, gated activation, weighted sums.

use super::simd::{Kernel, Simd, exp};

/// `swiglu` of `gpt_oss/torch/model.py`: α of the sigmoid.
const ALPHA: f32 = 1.702;

/// RMSNorm of a row: `out = x / sqrt(mean(x²) + ε) · scale`.
pub struct RmsNorm<'a> {
    /// The row.
    pub x: &'a [f32],
    /// One for each value.
    pub scale: &'a [f32],
    /// ε.
    pub epsilon: f32,
    /// As many values.
    pub out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // The width is a multiple of 32.
        let mut squares = [simd.splat(0.0); 2];
        for pair in self.x.chunks_exact(2 * S::LANES) {
            for (square, part) in squares.iter_mut().zip(pair.chunks_exact(S::LANES)) {
                let part = simd.load(part);
                *square = simd.mul_add(part, part, *square);
            }
        }
        let mean = simd.sum(simd.add(squares[0], squares[1])) / self.x.len() as f32;
        let inverse = simd.splat(1.0 / (mean + self.epsilon).sqrt());
        let rows = self.x.chunks_exact(S::LANES).zip(self.scale.chunks_exact(S::LANES));
        for ((x, scale), out) in rows.zip(self.out.chunks_exact_mut(S::LANES)) {
            simd.store(simd.mul(simd.mul(simd.load(x), inverse), simd.load(scale)), out);
        }
    }
}

/// Clamped SwiGLU: `g · σ(α·g) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`; 16 values
/// of each, the result in place of the gate.
pub struct SwiGlu<'a> {
    /// Gates, then results.
    pub gate: &'a mut [f32],
    /// As many.
    pub up: &'a [f32],
    /// The clamp.
    pub limit: f32,
}

impl Kernel for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (limit, one) = (simd.splat(self.limit), simd.splat(1.0));
        for (gate, up) in self.gate.chunks_exact_mut(S::LANES).zip(self.up.chunks_exact(S::LANES)) {
            let g = simd.min(simd.load(gate), limit);
            let u = simd.max(simd.min(simd.load(up), limit), simd.splat(-self.limit));
            let power = exp(simd, simd.mul(g, simd.splat(-ALPHA)));
            let activated = simd.div(g, simd.add(one, power));
            simd.store(simd.mul(activated, simd.add(u, one)), gate);
        }
    }
}

/// `out += weight · (x + bias)`, in multiples of 16.
pub struct AddScaled<'a> {
    /// A row.
    pub x: &'a [f32],
    /// Added to it first.
    pub bias: &'a [f32],
    /// Its factor.
    pub weight: f32,
    /// What it is added to.
    pub out: &'a mut [f32],
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let weight = simd.splat(self.weight);
        let rows = self.x.chunks_exact(S::LANES).zip(self.bias.chunks_exact(S::LANES));
        for ((x, bias), out) in rows.zip(self.out.chunks_exact_mut(S::LANES)) {
            let biased = simd.add(simd.load(x), simd.load(bias));
            simd.store(simd.mul_add(biased, weight, simd.load(out)), out);
        }
    }
}

/// Rotates the interleaved pairs of each head by angles of one position, given as cosines and sines for each pair.
pub fn rotate(heads: &mut [f32], cosines: &[f32], sines: &[f32]) {
    for head in heads.chunks_exact_mut(2 * cosines.len()) {
        for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
            let [a, b] = *pair;
            *pair = [a * cos - b * sin, b * cos + a * sin];
        }
    }
}
