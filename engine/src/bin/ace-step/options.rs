//! Flags of sampling.

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use engine::ace_step::sampling::Options;
use engine::diffusion::guidance::Cfg;
use engine::diffusion::scheduler::Kind;

fn schedulers() -> impl TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.map(Kind::name))
        .map(|name| Kind::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(Kind::Euler))
}

fn guidances() -> impl TypedValueParser<Value = Cfg> {
    PossibleValuesParser::new(Cfg::ALL.map(Cfg::name))
        .map(|name| Cfg::ALL.into_iter().find(|cfg| cfg.name() == name).unwrap_or(Cfg::Apg))
}

/// How noise becomes music. The defaults are those of the original pipeline.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Steps from noise to music; more is better and slower.
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub steps: usize,
    /// Take these steps of a longer schedule only, counted from 1: fewer steps that were found to do.
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    oss_steps: Vec<usize>,
    /// Who steps.
    #[arg(long, value_parser = schedulers(), default_value = "euler")]
    scheduler: Kind,
    /// How the prompt is amplified.
    #[arg(long, value_parser = guidances(), default_value = "apg")]
    cfg: Cfg,
    /// By how much; 0 and 1 are not at all.
    #[arg(long, value_name = "SCALE", default_value_t = 15.0)]
    guidance_scale: f32,
    /// With --guidance-lyric, both above 1: amplify the description by this, and the lyrics by their own.
    #[arg(long, value_name = "SCALE", default_value_t = 0.0)]
    guidance_text: f32,
    /// See --guidance-text.
    #[arg(long, value_name = "SCALE", default_value_t = 0.0)]
    guidance_lyric: f32,
    /// Part of the steps that is guided, in their middle.
    #[arg(long, value_name = "PART", default_value_t = 0.5)]
    guidance_interval: f64,
    /// How far the scale falls to --min-guidance-scale over them.
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    guidance_decay: f64,
    /// Where it falls to.
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    min_guidance_scale: f32,
    /// More than 0 sharpens details against the mean, less softens them.
    #[arg(long, value_name = "OMEGA", default_value_t = 10.0, allow_hyphen_values = true)]
    omega: f32,
    /// Steer away from no description, in place of one encoded less sharply.
    #[arg(long)]
    no_erg_tag: bool,
    /// Steer away from no lyrics, in place of lyrics encoded less sharply.
    #[arg(long)]
    no_erg_lyric: bool,
    /// Steer away from what the model itself says, in place of what it says less sharply.
    #[arg(long)]
    no_erg_diffusion: bool,
}

impl SamplingOptions {
    /// These flags as the library takes them.
    pub fn options(&self) -> Result<Options> {
        let options = Options {
            infer_steps: self.steps,
            oss_steps: self.oss_steps.clone(),
            scheduler_type: self.scheduler,
            cfg_type: self.cfg,
            guidance_scale: self.guidance_scale,
            guidance_scale_text: self.guidance_text,
            guidance_scale_lyric: self.guidance_lyric,
            guidance_interval: self.guidance_interval,
            guidance_interval_decay: self.guidance_decay,
            min_guidance_scale: self.min_guidance_scale,
            omega_scale: self.omega,
            use_erg_tag: !self.no_erg_tag,
            use_erg_lyric: !self.no_erg_lyric,
            use_erg_diffusion: !self.no_erg_diffusion,
        };
        options.validate().context("the sampling flags (--help lists them)")?;
        Ok(options)
    }
}
