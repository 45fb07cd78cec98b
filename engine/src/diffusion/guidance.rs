//! Guidance: away from what a model predicts without conditions, towards what it predicts with them
//! (`acestep/apg_guidance.py`).
//!
//! Predictions are f32 `[batch, channels, height, frames]`.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which guidance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cfg {
    /// [`apg`].
    Apg,
    /// [`cfg()`].
    Cfg,
    /// [`cfg_zero_star`].
    CfgStar,
}

impl Cfg {
    /// Every guidance.
    pub const ALL: [Cfg; 3] = [Cfg::Apg, Cfg::Cfg, Cfg::CfgStar];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Cfg::Apg => "apg",
            Cfg::Cfg => "cfg",
            Cfg::CfgStar => "cfg_star",
        }
    }
}

/// Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): `u + scale · (c − u)`.
pub fn cfg(conditioned: Tensor<4>, unconditioned: Tensor<4>, scale: f32) -> Tensor<4> {
    unconditioned.clone() + (conditioned - unconditioned).mul_scalar(scale)
}

/// Guidance by two conditions, of which `text` is the prediction with the first alone:
/// `(1 − of_text) · u + (of_text − of_lyrics) · t + of_lyrics · c`.
pub fn cfg_double(
    conditioned: Tensor<4>,
    unconditioned: Tensor<4>,
    text: Tensor<4>,
    of_text: f32,
    of_lyrics: f32,
) -> Tensor<4> {
    unconditioned.mul_scalar(1.0 - of_text)
        + text.mul_scalar(of_text - of_lyrics)
        + conditioned.mul_scalar(of_lyrics)
}

/// The direction of the steps before, of which a part is kept.
#[derive(Clone, Debug)]
pub struct Momentum {
    factor: f32,
    average: Option<Tensor<4>>,
}

impl Momentum {
    /// Without a past. A negative factor takes the past away.
    pub fn new(factor: f32) -> Momentum {
        Momentum { factor, average: None }
    }

    /// `direction + factor · average so far`, which is the new average.
    fn add(&mut self, direction: Tensor<4>) -> Tensor<4> {
        let average = match self.average.take() {
            Some(average) => direction + average.mul_scalar(self.factor),
            None => direction,
        };
        self.average.insert(average).clone()
    }

    /// The average, once there is one.
    pub fn average(&self) -> Option<&Tensor<4>> {
        self.average.as_ref()
    }
}

/// Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416): the guided direction without what lies along the
/// conditioned prediction, of which `eta` is kept, and no longer than `norm_threshold` where that is above 0. Lengths are
/// those of each channel of each sample.
pub fn apg(
    conditioned: Tensor<4>,
    unconditioned: Tensor<4>,
    scale: f32,
    momentum: Option<&mut Momentum>,
    eta: f32,
    norm_threshold: f32,
) -> Tensor<4> {
    let mut direction = conditioned.clone() - unconditioned;
    if let Some(momentum) = momentum {
        direction = momentum.add(direction);
    }
    if norm_threshold > 0.0 {
        // No direction needs no bound; the quotient would be infinite.
        let length = length(direction.clone()).clamp_min(1e-12);
        direction = direction * length.recip().mul_scalar(norm_threshold).clamp_max(1.0);
    }
    let (parallel, orthogonal) = project(direction, conditioned.clone());
    let mut guided = orthogonal;
    if eta != 0.0 {
        guided = guided + parallel.mul_scalar(eta);
    }
    conditioned + guided.mul_scalar(scale - 1.0)
}

/// What of a direction lies along another one and what is orthogonal to it, in each channel of each sample.
pub fn project(direction: Tensor<4>, along: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let unit = along.clone() / length(along).clamp_min(1e-12);
    let parallel = sum_of_channel(direction.clone() * unit.clone()) * unit;
    (parallel.clone(), direction - parallel)
}

/// Guidance with an optimised scale (CFG-Zero*, Fan et al. 2025, arXiv:2503.18886): the unconditioned prediction is first
/// brought near the conditioned one. The steps up to `zero_steps` stand still where `zero_init` says so.
pub fn cfg_zero_star(
    conditioned: Tensor<4>,
    unconditioned: Tensor<4>,
    scale: f32,
    step: usize,
    zero_steps: usize,
    zero_init: bool,
) -> Tensor<4> {
    if zero_init && step <= zero_steps {
        return conditioned.zeros_like();
    }
    let alpha = optimized_scale(conditioned.clone(), unconditioned.clone());
    cfg(conditioned, unconditioned * alpha, scale)
}

/// `⟨c, u⟩ / (⟨u, u⟩ + 1e-8)` of each sample: f32 `[batch, 1, 1, 1]`.
pub fn optimized_scale(conditioned: Tensor<4>, unconditioned: Tensor<4>) -> Tensor<4> {
    let of_sample = |x: Tensor<4>| sum_of_channel(x).sum_dim(1);
    let square = of_sample(unconditioned.clone().square());
    of_sample(conditioned * unconditioned) / square.add_scalar(1e-8)
}

/// f32 `[batch, channels, 1, 1]`.
fn length(x: Tensor<4>) -> Tensor<4> {
    sum_of_channel(x.square()).sqrt()
}

fn sum_of_channel(x: Tensor<4>) -> Tensor<4> {
    x.sum_dim(3).sum_dim(2)
}

/// The steps that are guided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuidanceInterval {
    /// The first of them.
    pub start: usize,
    /// The one behind the last.
    pub end: usize,
}

impl GuidanceInterval {
    /// A part of so many steps, in their middle.
    ///
    /// # Errors
    /// [`Error::Model`] for a part that is not from 0 to 1.
    pub fn new(steps: usize, part: f64) -> Result<GuidanceInterval> {
        if !(0.0..=1.0).contains(&part) {
            let (field, needed) = ("guidance_interval", "0 to 1".into());
            return Err(Error::Model { field, found: part.to_string(), needed });
        }
        let place = |part: f64| (steps as f64 * part) as usize;
        Ok(GuidanceInterval { start: place((1.0 - part) / 2.0), end: place(part / 2.0 + 0.5) })
    }

    /// Whether a step is guided.
    pub fn contains(&self, step: usize) -> bool {
        (self.start..self.end).contains(&step)
    }

    /// The scale of a guided step: with a decay above 0, it falls from `scale` towards `min_scale` over the interval. An
    /// interval of one step has no way to fall.
    pub fn scale(&self, step: usize, scale: f32, min_scale: f32, decay: f64) -> f32 {
        let last = self.end.saturating_sub(self.start + 1);
        if decay <= 0.0 || last == 0 {
            return scale;
        }
        let progress = step.saturating_sub(self.start) as f64 / last as f64;
        (f64::from(scale) - f64::from(scale - min_scale) * progress * decay) as f32
    }
}
