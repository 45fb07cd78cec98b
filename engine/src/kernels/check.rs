//! What every kernel computes on random inputs, against float64.
//!
//! A kernel's file ends with its `reference`, the plain definition in float64, and its `check`, which runs the kernel on small but
//! awkward shapes in every variant that a device can run, not only in the one that it prefers. Inputs are the same every time.
//! Outputs are not numbers beforehand, so that what a kernel leaves out is noticed, and what it may not touch too.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Serialize;

use super::{depthwise_glu, mxfp4, product};
pub(crate) use crate::backend::read;
use crate::error::{Error, Result};

mod device;
mod random;

pub(crate) use device::{
    Angles, Cached, F16, Input, Inputs, Packed, Pool, halves, poisoned, read_cache, side_by_side, values_of,
};
pub(crate) use random::Random;

/// f32 sums of up to some thousand terms of either sign: one rounding of 2^−24 for each, of which most cancel, 1e-6 or so of
/// the result.
pub(crate) const F32: f64 = 1e-5;

/// What a kernel computed on random inputs, against float64.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The file of the kernel.
    pub kernel: &'static str,
    /// Which of its kernels and variants on what.
    pub case: String,
    /// Of numbers the largest ‖found − truth‖ / ‖truth‖ of a row; of what must be exact how many differ. Infinite where anything is
    /// left out, written though it may not be, or not a number.
    pub error: f64,
    /// What the error may be.
    pub bound: f64,
}

impl Comparison {
    /// Compares numbers row by row. Where the truth is not a number, neither may be what was found.
    pub(crate) fn near(
        kernel: &'static str,
        case: String,
        width: usize,
        found: &[f32],
        truth: &[f64],
        bound: f64,
    ) -> Comparison {
        let rows = found.chunks(width).zip(truth.chunks(width));
        let error = rows.map(|(found, truth)| error_of_row(found, truth)).fold(0.0, f64::max);
        let error = if found.len() == truth.len() { error } else { f64::INFINITY };
        Comparison { kernel, case, error, bound }
    }

    /// Compares what must be the same.
    pub(crate) fn exact<T: PartialEq>(
        kernel: &'static str,
        case: String,
        found: &[T],
        truth: &[T],
    ) -> Comparison {
        let wrong = found.iter().zip(truth).filter(|(found, truth)| found != truth).count();
        let error = if found.len() == truth.len() { wrong as f64 } else { f64::INFINITY };
        Comparison { kernel, case, error, bound: 0.0 }
    }

    /// Whether the error is within its bound.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// ‖found − truth‖ / ‖truth‖.
fn error_of_row(found: &[f32], truth: &[f64]) -> f64 {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&found, &truth) in found.iter().zip(truth) {
        if truth.is_nan() != found.is_nan() || found.is_infinite() {
            return f64::INFINITY;
        }
        if !truth.is_nan() {
            difference += (f64::from(found) - truth).powi(2);
            norm += truth * truth;
        }
    }
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// What the check of a kernel says: its file's name, and what it compared unless the device failed.
pub type Checked = (&'static str, Result<Vec<Comparison>>);

/// The check of a kernel, on what it runs on.
type Check<T> = (&'static str, fn(&T) -> Result<Vec<Comparison>>);

/// The kernels on Burn's tensors.
const OF_TENSORS: [Check<burn::tensor::Device>; 3] =
    [("mxfp4", mxfp4::check), ("product", product::check), ("depthwise_glu", depthwise_glu::check)];

/// The kernels on buffers, as they follow each other in a model.
const OF_BUFFERS: [Check<cubecl::client::Client>; 19] = {
    use super::*;
    [
        ("embedding", embedding::check),
        ("qkv", qkv::check),
        ("attention", attention::check),
        ("linear", linear::check),
        ("router", router::check),
        ("gate_up", gate_up::check),
        ("down", down::check),
        ("sample", sample::check),
        ("normalise", normalise::check),
        ("matmul", matmul::check),
        ("rotate", rotate::check),
        ("prefill_attention", prefill_attention::check),
        ("expert_logits", expert_logits::check),
        ("dispatch", dispatch::check),
        ("grouped", grouped::check),
        ("mxfp4_linear", mxfp4_linear::check),
        ("rows", rows::check),
        ("pages", pages::check),
        ("copy", copy::check),
    ]
};

/// The files of the kernels that are checked.
pub fn names() -> impl Iterator<Item = &'static str> {
    let names = OF_TENSORS.into_iter().map(|(name, _)| name);
    names.chain(OF_BUFFERS.into_iter().map(|(name, _)| name))
}

/// Checks the kernels on buffers, one after the other as the iterator is advanced.
pub fn all(client: &cubecl::client::Client) -> impl Iterator<Item = Checked> {
    OF_BUFFERS.into_iter().map(|check| guarded(check, client))
}

/// Checks the kernels on Burn's tensors.
pub fn of_tensors(device: &burn::tensor::Device) -> impl Iterator<Item = Checked> {
    OF_TENSORS.into_iter().map(|check| guarded(check, device))
}

/// A kernel that panics, as compilers of drivers may, has failed, and the next one may not.
fn guarded<T>((name, check): Check<T>, device: &T) -> Checked {
    let checked = catch_unwind(AssertUnwindSafe(|| check(device)));
    (name, checked.unwrap_or_else(|_| Err(Error::Device(format!("the kernel {name} panicked")))))
}

#[cfg(test)]
mod tests {
    use super::Comparison;

    fn error(found: &[f32], truth: &[f64]) -> f64 {
        Comparison::near("none", String::new(), 2, found, truth, 1e-3).error
    }

    #[test]
    fn what_is_missing_wrong_or_too_much_is_noticed() {
        let nan = f32::NAN;
        assert_eq!(error(&[3.0, 4.0, 1.0, 0.0], &[3.0, 4.0, 1.0, 0.0]), 0.0);
        assert_eq!(error(&[3.0, 4.0, 1.0, 0.5], &[3.0, 4.0, 1.0, 0.0]), 0.5);
        assert_eq!(error(&[3.0, nan], &[3.0, 4.0]), f64::INFINITY);
        assert_eq!(error(&[3.0, f32::INFINITY], &[3.0, f64::INFINITY]), f64::INFINITY);
        assert_eq!(error(&[3.0], &[3.0, 4.0]), f64::INFINITY);
        assert_eq!(error(&[3.0, nan], &[3.0, f64::NAN]), 0.0);
        assert_eq!(error(&[3.0, 4.0], &[3.0, f64::NAN]), f64::INFINITY);
        assert_eq!(error(&[1e-3, 0.0], &[0.0, 0.0]), f64::INFINITY);
        let exact = |found: &[u32]| Comparison::exact("none", String::new(), found, &[1, 2]);
        assert!(exact(&[1, 2]).passed());
        assert!(exact(&[1, 3]).error == 1.0 && !exact(&[1, 3]).passed() && exact(&[1]).error.is_infinite());
    }
}
