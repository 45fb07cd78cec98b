//! Every kernel at every level that the machine has, against float64.

use super::*;
use crate::native::dense::{self, Bf16Matrix};
use crate::native::fixed::{ToFixed, fixed_groups};
use crate::native::mxfp4::{self, Inputs, PackedMatrix};
use crate::native::order::{Group, dense_groups, packed_groups, to_dense, to_packed};
use crate::native::rows::{AddScaled, RmsNorm, SwiGlu};
use crate::native::split::grid;

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// −1 to 1.
    fn value(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 31) as f32 - 1.0
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }
}

fn levels() -> impl Iterator<Item = Dispatch> {
    Level::ALL.into_iter().filter_map(Dispatch::new)
}

/// What a kernel computed, with the truth and the sum of the magnitudes that it was made of.
fn assert_near(found: f32, truth: f64, magnitude: f64, tolerance: f64, what: &str) {
    let error = (f64::from(found) - truth).abs();
    assert!(error <= tolerance * magnitude + 1e-44, "{what}: {found:e}, not {truth:e}");
}

#[test]
fn this_machine_runs_its_best_level() {
    assert!(Level::best().is_supported());
    assert!(Dispatch::new(Level::Scalar).is_some());
    assert_eq!(levels().next().map(Dispatch::level), Some(Level::best()));
}

#[test]
fn products_with_bf16_are_those_of_float64() {
    let mut random = Random(1);
    for dispatch in levels() {
        for (rows, columns, tokens) in
            [(1, 2, 1), (4, 32, 1), (7, 66, 5), (9, 320, 6), (12, 96, 13), (5, 64, 200)]
        {
            let weights: Vec<half::bf16> =
                (0..rows * columns).map(|_| half::bf16::from_f32(random.value())).collect();
            let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let (x, bias) = (random.values(tokens * columns), random.values(rows));
            let mut ordered = vec![Group::ZERO; tokens * dense_groups(columns)];
            for (x, out) in x.chunks_exact(columns).zip(ordered.chunks_exact_mut(dense_groups(columns))) {
                to_dense(x, out);
            }
            let weight = Bf16Matrix { bytes: &bytes, columns };
            assert_eq!(weight.rows(), rows);
            for accumulate in [false, true] {
                let mut out = vec![10.0; tokens * rows];
                for (_, mut tile) in grid(&mut out, rows, &[0, tokens], 5) {
                    dispatch.run(dense::Product {
                        weight,
                        bias: &bias,
                        x: &ordered,
                        out: &mut tile,
                        accumulate,
                    });
                }
                for (index, found) in out.into_iter().enumerate() {
                    let (token, row) = (index / rows, index % rows);
                    let products = weights[row * columns..][..columns].iter().zip(&x[token * columns..]);
                    let products = products.map(|(w, x)| w.to_f64() * f64::from(*x));
                    let start = f64::from(bias[row]) + if accumulate { 10.0 } else { 0.0 };
                    let (sum, magnitude) = products.fold((start, start.abs()), |(sum, all), product| {
                        (sum + product, all + product.abs())
                    });
                    assert_near(found, sum, magnitude, 1e-6, &format!("{} {index}", dispatch.level()));
                }
            }
        }
    }
}

#[test]
fn products_with_mxfp4_are_those_of_float64_at_every_scale() {
    let mut random = Random(2);
    // Stored scales, and the largest input.
    let ranges = [(120..136u8, 1.0f32), (14..20, 1.0), (250..255, 1e-3), (130..150, 1e-30)];
    for dispatch in levels() {
        for (case, (scales, size)) in ranges.iter().enumerate() {
            for (rows, columns, tokens) in [(1, 32, 1), (5, 64, 2), (8, 96, 5), (6, 160, 6), (9, 288, 11)] {
                let codes: Vec<u8> = (0..rows * columns / 2).map(|_| random.bits() as u8).collect();
                let stored: Vec<u8> = (0..rows * columns / 32)
                    .map(|_| scales.start + (random.bits() % u32::from(scales.end - scales.start)) as u8)
                    .collect();
                let x: Vec<f32> = (0..tokens * columns).map(|_| random.value() * size).collect();
                let weight = PackedMatrix { codes: &codes, scales: &stored, columns };
                let mut fixed = vec![FixedGroup::ZERO; tokens * fixed_groups(columns)];
                let mut ordered = vec![Group::ZERO; tokens * packed_groups(columns)];
                for (token, x) in x.chunks_exact(columns).enumerate() {
                    let groups = fixed_groups(columns);
                    dispatch.run(ToFixed { x, out: &mut fixed[token * groups..][..groups] });
                    let groups = packed_groups(columns);
                    to_packed(x, &mut ordered[token * groups..][..groups]);
                }
                // Not all of them, and not in order.
                let chosen: Vec<u32> = (0..tokens as u32).rev().filter(|token| token % 4 != 1).collect();
                for (inputs, tolerance) in
                    [(Inputs::Fixed(&fixed), 1.0 / 32000.0), (Inputs::Ordered(&ordered), 1e-6)]
                {
                    let mut out = vec![f32::NAN; chosen.len() * rows];
                    dispatch.run(mxfp4::Product {
                        weight,
                        rows: 0..rows,
                        x: inputs,
                        tokens: &chosen,
                        put: |token: usize, row: usize, sum: f32| out[token * rows + row] = sum,
                    });
                    for (index, found) in out.into_iter().enumerate() {
                        let (token, row) = (chosen[index / rows] as usize, index % rows);
                        let x = &x[token * columns..][..columns];
                        let (mut sum, mut magnitude) = (0.0, 0.0);
                        for (column, value) in x.iter().enumerate() {
                            let code = codes[(row * columns + column) / 2] >> (column % 2 * 4) & 15;
                            let scale = stored[(row * columns + column) / 32];
                            let unit = (f64::from(scale) - 141.0).exp2();
                            let weight = f64::from(formats::mxfp4::CODES[usize::from(code)]) * unit;
                            let block = &x[column / 32 * 32..][..32];
                            let largest = block.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                            sum += weight * f64::from(*value);
                            magnitude += weight.abs() * f64::from(largest);
                        }
                        assert_near(
                            found,
                            sum,
                            magnitude,
                            tolerance,
                            &format!("{} {case} {index}", dispatch.level()),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rows_are_those_of_float64() {
    let mut random = Random(3);
    for dispatch in levels() {
        for width in [32, 96, 2880] {
            let what = format!("{} {width}", dispatch.level());
            let (x, scale) = (random.values(width), random.values(width));
            let mut out = vec![0.0; width];
            dispatch.run(RmsNorm { x: &x, scale: &scale, epsilon: 1e-5, out: &mut out });
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            for i in 0..width {
                let truth = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(scale[i]);
                assert_near(out[i], truth, truth.abs(), 1e-6, &what);
            }

            let before = out.clone();
            dispatch.run(AddScaled { x: &x, bias: &scale, weight: 0.3, out: &mut out });
            for i in 0..width {
                let truth =
                    f64::from(before[i]) + f64::from(0.3f32) * (f64::from(x[i]) + f64::from(scale[i]));
                assert_near(out[i], truth, 1.0 + truth.abs(), 1e-6, &what);
            }

            let size = [1.0, 8.0, 1e4][width % 5 % 3];
            let gate: Vec<f32> = x.iter().map(|x| x * size).collect();
            let up: Vec<f32> = scale.iter().map(|x| x * 20.0).collect();
            let mut out = gate.clone();
            dispatch.run(SwiGlu { gate: &mut out, up: &up, limit: 7.0 });
            for i in 0..width {
                let (g, u) = (f64::from(gate[i]).min(7.0), f64::from(up[i]).clamp(-7.0, 7.0));
                let truth = g / (1.0 + (-1.702 * g).exp()) * (u + 1.0);
                assert_near(out[i], truth, truth.abs() + 1e-24, 2e-6, &what);
            }
        }
    }
}

#[test]
fn exponentials_are_those_of_float64() {
    struct Exponentials<'a>(&'a mut [f32]);
    impl Kernel for Exponentials<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for part in self.0.chunks_exact_mut(S::LANES) {
                simd.store(exp(simd, simd.load(part)), part);
            }
        }
    }
    for dispatch in levels() {
        let x: Vec<f32> = (0..16 * 1000).map(|i| -87.0 + i as f32 * 175.0 / 16_000.0).collect();
        let mut found = x.clone();
        dispatch.run(Exponentials(&mut found));
        for (found, x) in found.into_iter().zip(x) {
            let truth = f64::from(x).exp();
            assert_near(found, truth, truth, 4e-7, &format!("{} e^{x}", dispatch.level()));
        }
    }
}
