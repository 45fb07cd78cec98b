//! Schedulers of flow matching: which times are visited, and how a sample moves from one to the next
//! (`acestep/schedulers/`).
//!
//! A sample at a noise level σ is `(1 − σ) · data + σ · noise`, and what a model predicts is the velocity `noise − data`. Times
//! are `1000 · σ`. Schedules are computed on the host, in f32 and f64 where the original does.

use burn::tensor::{DType, FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Times of training, the unit of a time.
const TRAIN_TIMESTEPS: usize = 1000;

/// Which scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// [`FlowMatchEuler`].
    Euler,
    /// [`FlowMatchHeun`].
    Heun,
    /// [`PingPong`].
    PingPong,
}

impl Kind {
    /// Every scheduler.
    pub const ALL: [Kind; 3] = [Kind::Euler, Kind::Heun, Kind::PingPong];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Euler => "euler",
            Kind::Heun => "heun",
            Kind::PingPong => "pingpong",
        }
    }

    /// A scheduler of this kind.
    ///
    /// # Errors
    /// As [`Schedule::new`]'s.
    pub fn scheduler(self, shift: f32, sigma_max: f32) -> Result<Box<dyn Scheduler>> {
        let schedule = Schedule::new(shift, sigma_max, Shifting::Static)?;
        Ok(match self {
            Kind::Euler => Box::new(FlowMatchEuler::new(schedule)),
            Kind::Heun => Box::new(FlowMatchHeun::new(schedule)),
            Kind::PingPong => Box::new(PingPong::new(schedule)),
        })
    }
}

/// Whether noise levels are shifted by a factor, or each time by an exponent of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shifting {
    /// `s · σ / (1 + (s − 1) · σ)`, once for the levels of training and again for those of a run.
    Static,
    /// `e^μ / (e^μ + 1/σ − 1)`, for the levels of a run alone.
    Dynamic {
        /// μ.
        mu: f64,
    },
}

/// The noise levels of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    shift: f32,
    shifting: Shifting,
    training: Vec<f32>,
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
    /// The step that comes next, once one was made.
    index: Option<usize>,
}

impl Schedule {
    /// The levels of training: 1000 from `sigma_max` down, shifted.
    ///
    /// # Errors
    /// [`Error::Model`] for a shift or a level that is no positive number, or a level above 1.
    pub fn new(shift: f32, sigma_max: f32, shifting: Shifting) -> Result<Schedule> {
        if !(shift.is_finite() && shift > 0.0) {
            return Err(wrong("shift", shift, "a positive number"));
        }
        if !(sigma_max > 0.0 && sigma_max <= 1.0) {
            return Err(wrong("sigma_max", sigma_max, "above 0 and at most 1"));
        }
        let last = f64::from(sigma_max) * TRAIN_TIMESTEPS as f64;
        let levels = linspace(1.0, last, TRAIN_TIMESTEPS).into_iter().rev();
        let levels = levels.map(|time| time as f32 / TRAIN_TIMESTEPS as f32).map(|sigma| match shifting {
            Shifting::Static => shift * sigma / (1.0 + (shift - 1.0) * sigma),
            Shifting::Dynamic { .. } => sigma,
        });
        let training: Vec<f32> = levels.collect();
        let timesteps = training.iter().map(|sigma| sigma * TRAIN_TIMESTEPS as f32).collect();
        Ok(Schedule { shift, shifting, sigmas: training.clone(), training, timesteps, index: None })
    }

    /// The levels of training, from the highest down.
    pub fn training(&self) -> &[f32] {
        &self.training
    }

    /// The step that comes next, once one was made.
    pub fn index(&self) -> Option<usize> {
        self.index
    }

    /// Levels for a number of steps.
    fn levels(&self, steps: usize) -> Result<Vec<f32>> {
        if steps == 0 {
            return Err(wrong("steps", 0, "1 at least"));
        }
        let in_time = |sigma: f32| f64::from(sigma) * TRAIN_TIMESTEPS as f64;
        let times = linspace(in_time(self.training[0]), in_time(self.lowest()), steps);
        Ok(times.into_iter().map(|time| self.shifted(time / TRAIN_TIMESTEPS as f64)).collect())
    }

    /// Levels of one's own, shifted.
    fn custom(&self, sigmas: &[f32]) -> Result<Vec<f32>> {
        if sigmas.is_empty() {
            return Err(wrong("sigmas", "none", "1 at least"));
        }
        match sigmas.iter().find(|&&sigma| !(sigma > 0.0 && sigma <= 1.0)) {
            Some(sigma) => Err(wrong("sigmas", sigma, "above 0 and at most 1")),
            None => Ok(sigmas.iter().map(|&sigma| self.shifted(sigma.into())).collect()),
        }
    }

    fn shifted(&self, sigma: f64) -> f32 {
        let shift = f64::from(self.shift);
        let shifted = match self.shifting {
            Shifting::Static => shift * sigma / (1.0 + (shift - 1.0) * sigma),
            Shifting::Dynamic { mu } => mu.exp() / (mu.exp() + (1.0 / sigma - 1.0)),
        };
        shifted as f32
    }

    fn lowest(&self) -> f32 {
        self.training.last().copied().unwrap_or_default()
    }

    /// Takes levels for a run, each of which is visited once.
    fn visit(&mut self, levels: Vec<f32>) {
        self.timesteps = levels.iter().map(|sigma| sigma * TRAIN_TIMESTEPS as f32).collect();
        self.sigmas = levels;
        self.sigmas.push(0.0);
        self.index = None;
    }

    /// Takes levels for a run, each but the first of which is visited twice.
    fn visit_twice(&mut self, levels: Vec<f32>) {
        let (first, rest) = levels.split_at(1.min(levels.len()));
        let twice = first.iter().chain(rest.iter().flat_map(|sigma| [sigma, sigma]));
        self.visit(twice.copied().collect());
    }

    /// The step of a time: where the run is, or in its first step the place of the time, the second one where it has two.
    fn place(&mut self, timestep: f32) -> Result<usize> {
        let index = match self.index {
            Some(index) => index,
            None => {
                let mut places = (0..self.timesteps.len()).filter(|&index| self.timesteps[index] == timestep);
                match (places.next(), places.next()) {
                    (Some(_), Some(second)) => second,
                    (Some(first), None) => first,
                    (None, _) => return Err(wrong("timestep", timestep, "one of the schedule's")),
                }
            }
        };
        if index + 1 >= self.sigmas.len() {
            return Err(wrong("step", index + 1, &format!("{} at most", self.timesteps.len())));
        }
        self.index = Some(index + 1);
        Ok(index)
    }
}

/// Moves samples from noise to data. A step may know more than its arguments: steps of one run follow each other.
///
/// Samples are f32 of four axes, whatever these mean; the mean shift is over all of them.
pub trait Scheduler {
    /// The noise levels.
    fn schedule(&self) -> &Schedule;

    /// Takes the noise levels of a run as they are, at least one; a step that was begun is forgotten.
    fn set_levels(&mut self, levels: Vec<f32>);

    /// Sets the times of a run of so many steps.
    ///
    /// # Errors
    /// [`Error::Model`] where there is none.
    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let levels = self.schedule().levels(steps)?;
        self.set_levels(levels);
        Ok(())
    }

    /// Sets noise levels of one's own, which are shifted.
    ///
    /// # Errors
    /// [`Error::Model`] for a level that is none.
    fn set_sigmas(&mut self, sigmas: &[f32]) -> Result<()> {
        let levels = self.schedule().custom(sigmas)?;
        self.set_levels(levels);
        Ok(())
    }

    /// The sample of the next time. The velocity may be bf16; then so is the result, and what is added is rounded to it. Noise
    /// is what [`Scheduler::needs_noise`] asks for.
    ///
    /// # Errors
    /// [`Error::Model`] for a time that is not in the schedule, behind its end, or without the noise that is needed.
    fn step(
        &mut self,
        velocity: Tensor<4>,
        timestep: f32,
        sample: Tensor<4>,
        omega: f32,
        noise: Option<Tensor<4>>,
    ) -> Result<Tensor<4>>;

    /// Whether every step takes fresh noise.
    fn needs_noise(&self) -> bool {
        false
    }

    /// The times of the run.
    fn timesteps(&self) -> &[f32] {
        &self.schedule().timesteps
    }

    /// The noise levels of the run, 0 at its end.
    fn sigmas(&self) -> &[f32] {
        &self.schedule().sigmas
    }

    /// The highest level of training.
    fn sigma_max(&self) -> f32 {
        self.schedule().training[0]
    }

    /// The lowest level of training.
    fn sigma_min(&self) -> f32 {
        self.schedule().lowest()
    }

    /// Data with as much noise as some times have, one for each sample.
    ///
    /// # Errors
    /// [`Error::Model`] for a time that is not in the schedule.
    fn scale_noise(&self, data: Tensor<4>, noise: Tensor<4>, timesteps: &[f32]) -> Result<Tensor<4>> {
        let levels = timesteps.iter().map(|time| {
            let place = self.timesteps().iter().position(|of_run| of_run == time);
            place
                .map(|place| self.sigmas()[place])
                .ok_or_else(|| wrong("timestep", time, "one of the schedule's"))
        });
        let levels: Vec<f32> = levels.collect::<Result<_>>()?;
        let sigma =
            Tensor::<1>::from_data(levels.as_slice(), &data.device()).reshape([levels.len(), 1, 1, 1]);
        Ok(noise * sigma.clone() + data * sigma.neg().add_scalar(1.0))
    }
}

/// Euler's method.
#[derive(Clone, Debug)]
pub struct FlowMatchEuler(Schedule);

impl FlowMatchEuler {
    /// Over a schedule.
    pub fn new(schedule: Schedule) -> FlowMatchEuler {
        FlowMatchEuler(schedule)
    }
}

impl Scheduler for FlowMatchEuler {
    fn schedule(&self) -> &Schedule {
        &self.0
    }

    fn set_levels(&mut self, levels: Vec<f32>) {
        self.0.visit(levels);
    }

    fn step(
        &mut self,
        velocity: Tensor<4>,
        timestep: f32,
        sample: Tensor<4>,
        omega: f32,
        _: Option<Tensor<4>>,
    ) -> Result<Tensor<4>> {
        let index = self.0.place(timestep)?;
        let dtype = velocity.dtype();
        let change = velocity.mul_scalar(self.0.sigmas[index + 1] - self.0.sigmas[index]);
        Ok(moved(sample, mean_shifted(change, omega), dtype))
    }
}

/// Heun's method: a step of Euler's, then the same step again with the mean of the velocities at both ends. The last level
/// is left by Euler's.
#[derive(Clone, Debug)]
pub struct FlowMatchHeun {
    schedule: Schedule,
    first: Option<FirstOrder>,
}

/// What the second half of a step needs of the first.
#[derive(Clone, Debug)]
struct FirstOrder {
    velocity: Tensor<4>,
    change: f32,
    sample: Tensor<4>,
}

impl FlowMatchHeun {
    /// Over a schedule.
    pub fn new(schedule: Schedule) -> FlowMatchHeun {
        FlowMatchHeun { schedule, first: None }
    }
}

impl Scheduler for FlowMatchHeun {
    fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    fn set_levels(&mut self, levels: Vec<f32>) {
        self.schedule.visit_twice(levels);
        self.first = None;
    }

    fn step(
        &mut self,
        velocity: Tensor<4>,
        timestep: f32,
        sample: Tensor<4>,
        omega: f32,
        _: Option<Tensor<4>>,
    ) -> Result<Tensor<4>> {
        let index = self.schedule.place(timestep)?;
        let dtype = velocity.dtype();
        let velocity = velocity.cast(FloatDType::F32);
        let sigmas = &self.schedule.sigmas;
        // By way of the data, as the original does: at small levels it rounds.
        let by_data = |sigma: f32, sample: &Tensor<4>| {
            let data = sample.clone() - velocity.clone().mul_scalar(sigma);
            (sample.clone() - data).div_scalar(sigma)
        };
        match self.first.take() {
            None => {
                let velocity = by_data(sigmas[index], &sample);
                let change = sigmas[index + 1] - sigmas[index];
                let shifted = mean_shifted(velocity.clone().mul_scalar(change), omega);
                self.first = Some(FirstOrder { velocity, change, sample: sample.clone() });
                Ok(moved(sample, shifted, dtype))
            }
            Some(first) => {
                let second = by_data(sigmas[index], &sample);
                let mean = (first.velocity + second).mul_scalar(0.5);
                Ok(moved(first.sample, mean_shifted(mean.mul_scalar(first.change), omega), dtype))
            }
        }
    }
}

/// To the data and back with fresh noise, at each level.
#[derive(Clone, Debug)]
pub struct PingPong(Schedule);

impl PingPong {
    /// Over a schedule.
    pub fn new(schedule: Schedule) -> PingPong {
        PingPong(schedule)
    }
}

impl Scheduler for PingPong {
    fn schedule(&self) -> &Schedule {
        &self.0
    }

    fn set_levels(&mut self, levels: Vec<f32>) {
        self.0.visit(levels);
    }

    fn needs_noise(&self) -> bool {
        true
    }

    fn step(
        &mut self,
        velocity: Tensor<4>,
        timestep: f32,
        sample: Tensor<4>,
        _: f32,
        noise: Option<Tensor<4>>,
    ) -> Result<Tensor<4>> {
        let noise = noise.ok_or_else(|| wrong("noise", "none", "fresh noise for each step of pingpong"))?;
        let index = self.0.place(timestep)?;
        let (sigma, next) = (self.0.sigmas[index], self.0.sigmas[index + 1]);
        let dtype = velocity.dtype();
        let data = sample - velocity.cast(FloatDType::F32).mul_scalar(sigma);
        Ok(moved(data.mul_scalar(1.0 - next), noise.mul_scalar(next), dtype))
    }
}

/// How much the details of a step count: a logistic curve from 0.9 to 1.1, 1 at 0.
pub fn omega_factor(omega: f32) -> f64 {
    0.9 + 0.2 / (1.0 + (-0.1 * f64::from(omega)).exp())
}

/// A change whose details are multiplied by [`omega_factor`] while its mean over everything stays.
fn mean_shifted(change: Tensor<4>, omega: f32) -> Tensor<4> {
    // As one axis: the mean of a permuted tensor is wrong on GPUs (Burn 0.22.1, see docs/upstream.md).
    let elements = change.dims().iter().product::<usize>();
    let mean = change.clone().reshape([elements]).mean_dim(0).reshape([1, 1, 1, 1]);
    (change - mean.clone()).mul_scalar(omega_factor(omega) as f32) + mean
}

/// `sample + change`, summed in f32, in the type of the velocity.
fn moved(sample: Tensor<4>, change: Tensor<4>, dtype: DType) -> Tensor<4> {
    let moved = sample.cast(FloatDType::F32) + change.cast(FloatDType::F32);
    moved.cast(dtype)
}

/// As numpy's: both ends, and the first alone where there is room for one.
fn linspace(first: f64, last: f64, count: usize) -> Vec<f64> {
    let step = (last - first) / (count.max(2) - 1) as f64;
    (0..count)
        .map(|index| if index > 0 && index + 1 == count { last } else { first + index as f64 * step })
        .collect()
}

fn wrong(field: &'static str, found: impl ToString, needed: &str) -> Error {
    Error::Model { field, found: found.to_string(), needed: needed.into() }
}
