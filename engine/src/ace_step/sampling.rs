//! From noise to the latent of a song (`text2music_diffusion_process` of `acestep/pipeline_ace_step.py`).
//!
//! ```text
//! Song ─ Contexts (once) ──────────────┐
//! Noise ─► Start ─► for each time: Guided::velocity ─► Scheduler::step, or the plain step of a repaint ─► latent
//! ```

use std::ops::{ControlFlow, Range};

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::erg::Weaken;
use super::transformer::{Conditions, Context, DecodeOptions, Prompt, Table, Transformer};
use crate::backend::{self, values_of_tensor};
use crate::diffusion::guidance::{Cfg, GuidanceInterval, Momentum, apg, cfg, cfg_double, cfg_zero_star};
use crate::diffusion::noise::Noise;
use crate::diffusion::scheduler::{self, Scheduler};
use crate::error::{Error, Result};
use crate::nn::hooks::Hooks;

/// The shift of the schedulers.
const SHIFT: f32 = 3.0;
/// Momentum of adaptive projected guidance; negative, so that it pushes away from the last direction.
const MOMENTUM: f32 = -0.75;
/// The length that a guided direction may have for each channel of a latent.
const NORM_THRESHOLD: f32 = 2.5;
/// The last step in which zero-star guidance stands still.
const ZERO_STEPS: usize = 1;

/// Options of a run. The defaults are those of the original pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Steps.
    pub infer_steps: usize,
    /// Steps of a longer schedule that are taken in place of all, counted from 1.
    pub oss_steps: Vec<usize>,
    /// Who steps.
    pub scheduler_type: scheduler::Kind,
    /// How conditions are amplified.
    pub cfg_type: Cfg,
    /// By how much; 0 and 1 are not at all.
    pub guidance_scale: f32,
    /// Above 1 together with `guidance_scale_lyric`: by how much the description is, in place of `cfg_type`.
    pub guidance_scale_text: f32,
    /// By how much the lyrics are.
    pub guidance_scale_lyric: f32,
    /// The part of the steps that are guided, in their middle.
    pub guidance_interval: f64,
    /// How far the scale falls to `min_guidance_scale` over them, 0 to 1.
    pub guidance_interval_decay: f64,
    /// Where it falls to.
    pub min_guidance_scale: f32,
    /// How much the mean of a step counts beside its details.
    pub omega_scale: f32,
    /// Whether what is steered away from has the description, encoded less sharply.
    pub use_erg_tag: bool,
    /// Whether it has the lyrics, encoded less sharply.
    pub use_erg_lyric: bool,
    /// Whether it is computed less sharply.
    pub use_erg_diffusion: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            infer_steps: 60,
            oss_steps: Vec::new(),
            scheduler_type: scheduler::Kind::Euler,
            cfg_type: Cfg::Apg,
            guidance_scale: 15.0,
            guidance_scale_text: 0.0,
            guidance_scale_lyric: 0.0,
            guidance_interval: 0.5,
            guidance_interval_decay: 0.0,
            min_guidance_scale: 3.0,
            omega_scale: 10.0,
            use_erg_tag: true,
            use_erg_lyric: true,
            use_erg_diffusion: true,
        }
    }
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Song {
    /// What the music shall be like.
    pub prompt: Prompt,
    /// The description encoded with [`Weaken::TEXT`], for [`Options::use_erg_tag`]; zeros in its place where there is none.
    pub text_null: Option<Tensor<3>>,
}

/// What is made it from, beside noise.
#[derive(Clone, Debug)]
pub enum Task {
    /// Nothing.
    Text2Music,
    /// A recording's latent, the more of which is kept the larger `strength`, 0 to 1.
    Audio2Audio {
        /// f32 `[batch, channels, height, frames]`.
        reference: Tensor<4>,
        /// How much of it is kept.
        strength: f64,
    },
    /// The noise of another run, and new noise: the larger `variance`, 0 to 1, the more of it.
    Retake {
        /// How much is new.
        variance: f64,
    },
    /// A latent whose frames in a range are made anew.
    Repaint {
        /// f32 `[batch, channels, height, frames]`.
        source: Tensor<4>,
        /// The frames.
        frames: Range<usize>,
        /// How much is new there.
        variance: f64,
    },
}

/// A song that becomes another one (FlowEdit, Kulikov et al. 2024, arXiv:2412.08629).
#[derive(Clone, Debug)]
pub struct Edit {
    /// What the song is.
    pub source: Prompt,
    /// What it shall be.
    pub target: Prompt,
    /// Its latent, f32 `[batch, channels, height, frames]`.
    pub latent: Tensor<4>,
    /// The part of the steps that are left out at the start: the larger, the more of the song stays. The original has 0.
    pub n_min: f64,
    /// The part after which the new song is sampled without regard for the old one. The original has 1.
    pub n_max: f64,
    /// Draws of noise for each step. The original has 1.
    pub n_avg: usize,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Steps that are done.
    pub done: usize,
    /// Steps of the run.
    pub total: usize,
}

/// What a run's options come to.
#[derive(Clone, Debug)]
pub struct Run {
    /// Times from 1000 to 0, of each step.
    pub timesteps: Vec<f32>,
    /// Steps that are guided.
    pub guided: Range<usize>,
    is_guided: bool,
    is_double: bool,
}

impl Run {
    /// Steps.
    pub fn steps(&self) -> usize {
        self.timesteps.len()
    }

    /// Runs of the transformer.
    pub fn decodes(&self) -> usize {
        let guided = self.guided.end.min(self.steps()).saturating_sub(self.guided.start);
        self.steps() + guided * (self.contexts() - 1)
    }

    /// Contexts that are prepared.
    pub fn contexts(&self) -> usize {
        1 + usize::from(self.is_guided) + usize::from(self.is_double)
    }
}

impl Options {
    /// The schedule and the guided steps of a run from pure noise.
    ///
    /// # Errors
    /// [`Error::Model`] for options outside their range.
    pub fn run(&self) -> Result<Run> {
        let (scheduler, steps) = self.scheduler(None)?;
        self.run_of(scheduler.as_ref(), steps)
    }

    fn run_of(&self, scheduler: &dyn Scheduler, steps: usize) -> Result<Run> {
        let is_guided = self.guidance_scale != 0.0 && self.guidance_scale != 1.0;
        let is_double = is_guided && self.guidance_scale_text > 1.0 && self.guidance_scale_lyric > 1.0;
        let interval = GuidanceInterval::new(steps, self.guidance_interval)?;
        let guided = if is_guided { interval.start..interval.end } else { 0..0 };
        Ok(Run { timesteps: scheduler.timesteps().to_vec(), guided, is_guided, is_double })
    }

    /// A scheduler with its times set, and the count of steps by which guidance is timed. `strength` is that of a
    /// reference.
    fn scheduler(&self, strength: Option<f64>) -> Result<(Box<dyn Scheduler>, usize)> {
        self.validate()?;
        let sigma_max = strength.map_or(1.0, |strength| 1.0 - strength);
        let mut scheduler = self.scheduler_type.scheduler(SHIFT, sigma_max as f32)?;
        let Some(&longest) = self.oss_steps.iter().max() else {
            let steps = (sigma_max * self.infer_steps as f64) as usize;
            if steps == 0 {
                let found = format!("{} steps of strength {}", self.infer_steps, 1.0 - sigma_max);
                return Err(wrong("strength", found, "a step at least: (1 − strength) · steps ≥ 1"));
            }
            scheduler.set_timesteps(steps)?;
            return Ok((scheduler, steps));
        };
        scheduler.set_timesteps(longest)?;
        let times = scheduler.timesteps();
        let sigmas: Vec<f32> = self.oss_steps.iter().map(|&step| times[step - 1] / 1000.0).collect();
        // They are shifted once more.
        scheduler.set_sigmas(&sigmas)?;
        Ok((scheduler, self.oss_steps.len()))
    }

    /// Says what cannot run.
    ///
    /// # Errors
    /// [`Error::Model`] with the option.
    pub fn validate(&self) -> Result<()> {
        let is_part = |value: f64| (0.0..=1.0).contains(&value);
        let checks = [
            (
                "infer_steps",
                (1..=1000).contains(&self.infer_steps),
                self.infer_steps.to_string(),
                "1 to 1000",
            ),
            (
                "oss_steps",
                self.oss_steps.iter().all(|step| (1..=1000).contains(step)),
                format!("{:?}", self.oss_steps),
                "steps from 1 to 1000",
            ),
            (
                "oss_steps",
                self.oss_steps.is_empty() || self.scheduler_type != scheduler::Kind::Heun,
                "the scheduler heun".into(),
                "euler or pingpong",
            ),
            (
                "guidance_interval",
                is_part(self.guidance_interval),
                self.guidance_interval.to_string(),
                "0 to 1",
            ),
            (
                "guidance_interval_decay",
                is_part(self.guidance_interval_decay),
                self.guidance_interval_decay.to_string(),
                "0 to 1",
            ),
        ];
        for (option, holds, found, needed) in checks {
            if !holds {
                return Err(wrong(option, found, needed));
            }
        }
        let numbers = [
            ("guidance_scale", self.guidance_scale),
            ("guidance_scale_text", self.guidance_scale_text),
            ("guidance_scale_lyric", self.guidance_scale_lyric),
            ("min_guidance_scale", self.min_guidance_scale),
            ("omega_scale", self.omega_scale),
        ];
        match numbers.into_iter().find(|(_, value)| !value.is_finite()) {
            Some((option, value)) => Err(wrong(option, value.to_string(), "a number")),
            None => Ok(()),
        }
    }
}

/// Samples the latent of a song: f32 `[batch, channels, height, frames]`. `on_step` is told of each step and may end the
/// run, which is [`Error::Cancelled`].
///
/// # Errors
/// [`Error::Model`] and [`Error::Argument`] for what cannot run or holds what is no number, those of the noise, and
/// [`Error::Device`].
pub fn sample(
    transformer: &Transformer,
    song: &Song,
    frames: usize,
    task: &Task,
    options: &Options,
    noise: &mut dyn Noise,
    on_step: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> Result<Tensor<4>> {
    let config = transformer.config();
    let shape = [song.prompt.text.dims()[0], config.in_channels, config.max_height, frames];
    let device = transformer.device();
    let strength = match task {
        Task::Audio2Audio { strength, .. } => Some(part("strength", *strength)?),
        _ => None,
    };
    let (mut scheduler, steps) = options.scheduler(strength)?;
    let run = options.run_of(scheduler.as_ref(), steps)?;
    let mut guided = Guided::new(transformer, song, frames, options, &run)?;

    let init = noise.draw("init_noise", shape, device)?;
    let mut x = init.clone();
    let mut repaint = None;
    match task {
        Task::Text2Music => {}
        Task::Audio2Audio { reference, .. } => {
            given("reference", reference, shape)?;
            // The original mixes by the constructor's sigma, which is not that of the first step.
            let sigma = scheduler.sigma_max();
            x = reference.clone().mul_scalar(1.0 - sigma) + init.mul_scalar(sigma);
        }
        Task::Retake { variance } => {
            let other = noise.draw("retake_noise", shape, device)?;
            x = retaken(init, other, part("variance", *variance)?);
        }
        Task::Repaint { source, frames: range, variance } => {
            given("source", source, shape)?;
            let other = noise.draw("retake_noise", shape, device)?;
            let variance = part("variance", *variance)?;
            let mixed = retaken(init.clone(), other, variance);
            let repainted = Repaint::new(source.clone(), init, mixed, range.clone(), options, variance)?;
            repaint = Some(repainted);
        }
    }

    let times = run.timesteps.clone();
    let total = times.len();
    for (index, &time) in times.iter().enumerate() {
        if let Some(repaint) = &repaint {
            if index < repaint.first {
                continue;
            }
            if index == repaint.first {
                x = repaint.at(time / 1000.0);
            }
        }
        let velocity = guided.velocity(x.clone(), time, index)?;
        x = match &repaint {
            Some(repaint) => {
                let next = times.get(index + 1).map_or(0.0, |next| next / 1000.0);
                repaint.keep_outside(x + velocity.mul_scalar(next - time / 1000.0), next)
            }
            None => {
                let fresh = match scheduler.needs_noise() {
                    true => Some(noise.draw(&format!("step_noise.{index}"), shape, device)?),
                    false => None,
                };
                scheduler.step(velocity, time, x, options.omega_scale, fresh)?
            }
        };
        told(device, Step { done: index + 1, total }, on_step)?;
    }
    finite("latent", x)
}

/// Makes a song another one: its latent, f32 `[batch, channels, height, frames]`.
///
/// # Errors
/// As [`sample`]'s.
pub fn edit(
    transformer: &Transformer,
    edit: &Edit,
    options: &Options,
    noise: &mut dyn Noise,
    on_step: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> Result<Tensor<4>> {
    let latent = &edit.latent;
    let shape = latent.dims();
    given("latent", latent, shape)?;
    let (n_min, n_max) = (part("n_min", edit.n_min)?, part("n_max", edit.n_max)?);
    if edit.n_avg == 0 || n_max < n_min {
        let found = format!("n_min {n_min}, n_max {n_max}, n_avg {}", edit.n_avg);
        return Err(wrong("edit", found, "n_min ≤ n_max and a draw at least"));
    }
    let device = transformer.device();
    let options =
        &Options { scheduler_type: scheduler::Kind::Euler, oss_steps: Vec::new(), ..options.clone() };
    let (scheduler, steps) = options.scheduler(None)?;
    let times: Vec<f32> = scheduler.timesteps().iter().map(|time| time / 1000.0).collect();
    let [n_min, n_max] = [n_min, n_max].map(|part| (steps as f64 * part) as usize);
    let rope = transformer.rope(shape[3]);
    let mut old = EditSide::new(transformer, &edit.source, &rope, options)?;
    let mut new = EditSide::new(transformer, &edit.target, &rope, options)?;
    let mut draws = 0;
    let mut draw = || {
        draws += 1;
        noise.draw(&format!("noise.{}", draws - 1), shape, device)
    };

    let mut edited = latent.clone();
    let mut sampled: Option<Tensor<4>> = None;
    for (index, &time) in times.iter().enumerate().skip(n_min) {
        let next = times.get(index + 1).copied().unwrap_or(0.0);
        let noisy = |noise: Tensor<4>| latent.clone().mul_scalar(1.0 - time) + noise.mul_scalar(time);
        if index < n_max {
            let mut change = latent.zeros_like();
            for _ in 0..edit.n_avg {
                let of_source = noisy(draw()?);
                let of_target = edited.clone() + of_source.clone() - latent.clone();
                // The original gives the target no momentum here.
                let difference =
                    new.velocity(of_target, time, false)? - old.velocity(of_source, time, true)?;
                change = change + difference.div_scalar(edit.n_avg as f32);
            }
            edited = edited + change.mul_scalar(next - time);
        } else {
            let x = match sampled.take() {
                Some(x) => x,
                None => edited.clone() + noisy(draw()?) - latent.clone(),
            };
            let velocity = new.velocity(x.clone(), time, true)?;
            sampled = Some(x + velocity.mul_scalar(next - time));
        }
        told(device, Step { done: index + 1, total: times.len() }, on_step)?;
    }
    finite("latent", sampled.unwrap_or(edited))
}

/// The transformer with its contexts and guidance.
struct Guided<'a> {
    transformer: &'a Transformer,
    options: &'a Options,
    run: &'a Run,
    rope: Table,
    conditioned: Context,
    /// What is steered away from.
    unconditioned: Option<Context>,
    /// With the description alone.
    text_only: Option<Context>,
    momentum: Momentum,
}

impl<'a> Guided<'a> {
    fn new(
        transformer: &'a Transformer,
        song: &Song,
        frames: usize,
        options: &'a Options,
        run: &'a Run,
    ) -> Result<Guided<'a>> {
        let prompt = &song.prompt;
        finite("text", prompt.text.clone())?;
        finite("speaker", prompt.speaker.clone())?;
        let encode = |prompt: &Prompt, weaken| transformer.encode(prompt, weaken, &Hooks::none());
        let conditions = encode(prompt, None)?;
        // All meet the mask of the conditions.
        let prepare = |hidden: Conditions| {
            transformer.prepare(&Conditions { hidden: hidden.hidden, mask: conditions.mask.clone() })
        };
        let silent = Prompt { speaker: prompt.speaker.zeros_like(), ..prompt.clone() };
        let zeros = prompt.text.zeros_like();
        let no_lyrics = prompt.lyrics.iter().map(|lyrics| vec![0; lyrics.len()]).collect::<Vec<_>>();
        let lyric_weaken = options.use_erg_lyric.then_some(&Weaken::LYRICS);
        let lyrics = if options.use_erg_lyric { prompt.lyrics.clone() } else { no_lyrics };
        let unconditioned = run.is_guided.then(|| {
            let text_null = song.text_null.clone().filter(|_| options.use_erg_tag && options.use_erg_lyric);
            let text = text_null.unwrap_or(zeros);
            prepare(encode(&Prompt { text, lyrics: lyrics.clone(), ..silent.clone() }, lyric_weaken)?)
        });
        let text_only = run
            .is_double
            .then(|| prepare(encode(&Prompt { lyrics: lyrics.clone(), ..silent.clone() }, lyric_weaken)?));
        Ok(Guided {
            transformer,
            options,
            run,
            rope: transformer.rope(frames),
            conditioned: transformer.prepare(&conditions)?,
            unconditioned: unconditioned.transpose()?,
            text_only: text_only.transpose()?,
            momentum: Momentum::new(MOMENTUM),
        })
    }

    /// The velocity at a time from 0 to 1000, amplified where the step is guided.
    fn velocity(&mut self, x: Tensor<4>, time: f32, index: usize) -> Result<Tensor<4>> {
        let conditioned = self.decode(x.clone(), time, &self.conditioned, None)?;
        let Some(context) = self.unconditioned.as_ref().filter(|_| self.run.guided.contains(&index)) else {
            return Ok(conditioned);
        };
        let options = self.options;
        let weaken = options.use_erg_diffusion.then_some(&Weaken::DIFFUSION);
        let unconditioned = self.decode(x.clone(), time, context, weaken)?;
        if let Some(context) = &self.text_only {
            let text = self.decode(x, time, context, None)?;
            let (of_text, of_lyrics) = (options.guidance_scale_text, options.guidance_scale_lyric);
            return Ok(cfg_double(conditioned, unconditioned, text, of_text, of_lyrics));
        }
        let scale = self.scale(index);
        Ok(match options.cfg_type {
            Cfg::Apg => {
                let momentum = Some(&mut self.momentum);
                apg(conditioned, unconditioned, scale, momentum, 0.0, NORM_THRESHOLD)
            }
            Cfg::Cfg => cfg(conditioned, unconditioned, scale),
            Cfg::CfgStar => cfg_zero_star(conditioned, unconditioned, scale, index, ZERO_STEPS, true),
        })
    }

    /// The scale of a guided step.
    fn scale(&self, index: usize) -> f32 {
        let Options { guidance_scale, min_guidance_scale, guidance_interval_decay, .. } = *self.options;
        GuidanceInterval { start: self.run.guided.start, end: self.run.guided.end }.scale(
            index,
            guidance_scale,
            min_guidance_scale,
            guidance_interval_decay,
        )
    }

    fn decode(
        &self,
        x: Tensor<4>,
        time: f32,
        context: &Context,
        weaken: Option<&Weaken>,
    ) -> Result<Tensor<4>> {
        let times = vec![time; x.dims()[0]];
        let options = DecodeOptions { weaken, ..DecodeOptions::default() };
        self.transformer.decode(x, &times, context, &self.rope, &options, &Hooks::none())
    }
}

/// One of the two songs of an edit.
struct EditSide<'a> {
    transformer: &'a Transformer,
    rope: &'a Table,
    conditioned: Context,
    unconditioned: Option<Context>,
    scale: f32,
    cfg_type: Cfg,
    momentum: Momentum,
}

impl<'a> EditSide<'a> {
    fn new(
        transformer: &'a Transformer,
        prompt: &Prompt,
        rope: &'a Table,
        options: &Options,
    ) -> Result<EditSide<'a>> {
        finite("text", prompt.text.clone())?;
        let prepare =
            |prompt: &Prompt| transformer.prepare(&transformer.encode(prompt, None, &Hooks::none())?);
        // Here nothing of the lyrics is attended to, while the description's mask stays.
        let nothing = Prompt {
            text: prompt.text.zeros_like(),
            speaker: prompt.speaker.zeros_like(),
            lyrics: prompt.lyrics.iter().map(|lyrics| vec![0; lyrics.len()]).collect(),
            lyric_mask: prompt.lyric_mask.iter().map(|mask| vec![false; mask.len()]).collect(),
            text_mask: prompt.text_mask.clone(),
        };
        let scale = options.guidance_scale;
        let is_guided = scale != 0.0 && scale != 1.0;
        Ok(EditSide {
            transformer,
            rope,
            conditioned: prepare(prompt)?,
            unconditioned: is_guided.then(|| prepare(&nothing)).transpose()?,
            scale,
            cfg_type: options.cfg_type,
            momentum: Momentum::new(MOMENTUM),
        })
    }

    /// The guided velocity at a time from 0 to 1.
    fn velocity(&mut self, x: Tensor<4>, time: f32, with_momentum: bool) -> Result<Tensor<4>> {
        let times = vec![time * 1000.0; x.dims()[0]];
        let decode = |context| {
            let options = DecodeOptions::default();
            self.transformer.decode(x.clone(), &times, context, self.rope, &options, &Hooks::none())
        };
        let conditioned = decode(&self.conditioned)?;
        let Some(context) = &self.unconditioned else { return Ok(conditioned) };
        let unconditioned = decode(context)?;
        Ok(match self.cfg_type {
            Cfg::Apg => {
                let momentum = with_momentum.then_some(&mut self.momentum);
                apg(conditioned, unconditioned, self.scale, momentum, 0.0, NORM_THRESHOLD)
            }
            Cfg::Cfg | Cfg::CfgStar => cfg(conditioned, unconditioned, self.scale),
        })
    }
}

/// A latent of which a part is made anew, on straight lines between the latent and noise.
struct Repaint {
    source: Tensor<4>,
    noise: Tensor<4>,
    /// 1 in the frames that are made anew.
    inside: Tensor<4>,
    /// The step in which it begins.
    first: usize,
}

impl Repaint {
    fn new(
        source: Tensor<4>,
        init: Tensor<4>,
        mixed: Tensor<4>,
        range: Range<usize>,
        options: &Options,
        variance: f64,
    ) -> Result<Repaint> {
        let frames = source.dims()[3];
        if range.is_empty() || range.end > frames || range.len() == frames {
            let needed =
                "a part of the frames; to make all anew is a retake, to go beyond them is not possible";
            return Err(wrong("repaint", format!("frames {range:?} of {frames}"), needed));
        }
        let inside = (0..frames).map(|frame| f32::from(u8::from(range.contains(&frame))));
        let inside: Vec<f32> = inside.collect();
        let inside = Tensor::<1>::from_data(inside.as_slice(), &source.device()).reshape([1, 1, 1, frames]);
        let outside = inside.clone().neg().add_scalar(1.0);
        let noise = mixed * inside.clone() + init * outside;
        let first = (options.infer_steps as f64 * (1.0 - variance)) as usize;
        Ok(Repaint { source, noise, inside, first })
    }

    /// The line at a time from 0 to 1.
    fn at(&self, time: f32) -> Tensor<4> {
        self.source.clone().mul_scalar(1.0 - time) + self.noise.clone().mul_scalar(time)
    }

    /// What was made inside, the line outside.
    fn keep_outside(&self, x: Tensor<4>, time: f32) -> Tensor<4> {
        let outside = self.inside.clone().neg().add_scalar(1.0);
        x * self.inside.clone() + self.at(time) * outside
    }
}

/// Two draws on the circle between them, so that the variance stays.
fn retaken(first: Tensor<4>, second: Tensor<4>, variance: f64) -> Tensor<4> {
    let angle = (variance * std::f64::consts::FRAC_PI_2) as f32;
    first.mul_scalar(angle.cos()) + second.mul_scalar(angle.sin())
}

/// Waits for a step, so that what is said of it is true, and says it.
fn told(
    device: &burn::tensor::Device,
    step: Step,
    on_step: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> Result<()> {
    backend::waiting(|| device.sync()).map_err(backend::failed)?;
    match on_step(&step) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled { done: step.done, total: step.total }),
    }
}

/// A tensor without what is no number.
fn finite<const D: usize>(argument: &'static str, tensor: Tensor<D>) -> Result<Tensor<D>> {
    let values = values_of_tensor(tensor.clone())?;
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(tensor),
        Some(index) => Err(Error::Argument {
            operation: "ACE-Step sampling",
            argument,
            found: format!("{} at element {index}", values[index]),
            needed: "finite numbers".into(),
        }),
    }
}

/// A latent that somebody gave.
fn given(argument: &'static str, latent: &Tensor<4>, shape: [usize; 4]) -> Result<()> {
    if latent.dims() != shape {
        return Err(Error::Argument {
            operation: "ACE-Step sampling",
            argument,
            found: format!("of shape {:?}", latent.dims()),
            needed: format!("{shape:?}"),
        });
    }
    finite(argument, latent.clone()).map(|_| ())
}

/// A number from 0 to 1.
fn part(option: &'static str, value: f64) -> Result<f64> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(value),
        false => Err(wrong(option, value.to_string(), "0 to 1")),
    }
}

fn wrong(field: &'static str, found: String, needed: &str) -> Error {
    Error::Model { field, found, needed: needed.into() }
}
