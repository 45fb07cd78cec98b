//! `pipeline/`: whole runs on a tiny transformer, from the same noise.

use std::ops::ControlFlow;

use super::Context;
use super::transformer::{ids, mask};
use crate::ace_step::frames_of_seconds;
use crate::ace_step::sampling::{self, Edit, Song, Task};
use crate::ace_step::transformer::{Config, Prompt, Transformer};
use crate::diffusion::noise::NoiseFile;
use crate::diffusion::scheduler::Kind;
use crate::error::Result;
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types, read_json};

/// Rounding grows with the steps: a relative change of the noise by 1e-6 moves results by 3e-4.
const TOLERANCE: Tolerance = Tolerance::of(2e-3);
/// Heun's small sigmas divide by little.
const HEUN: Tolerance = Tolerance::of(5e-3);

#[derive(serde::Deserialize)]
struct Cases {
    cases: Vec<Case>,
}

/// The arguments of a run, by the original's names.
#[derive(serde::Deserialize)]
struct Case {
    name: String,
    #[serde(flatten)]
    options: sampling::Options,
    #[serde(default)]
    uses_text_null: bool,
    #[serde(default)]
    audio2audio_enable: bool,
    #[serde(default)]
    ref_audio_strength: f64,
    #[serde(default)]
    add_retake_noise: bool,
    #[serde(default)]
    retake_variance: f64,
    #[serde(default)]
    repaint_start: f64,
    #[serde(default)]
    repaint_end: f64,
    n_min: Option<f64>,
    n_max: Option<f64>,
    n_avg: Option<usize>,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("pipeline");
    let component = Component::<Config>::open(&folder.join("ace_step_transformer"))?;
    let model = component
        .load(context.device, Types::F32, &(), |weights| Transformer::new(&component.config, weights))?;
    let Cases { cases } = read_json(&folder.join("cases.json"))?;
    let file = folder.join("io.safetensors");
    let io = Reference::open(&file)?;
    let device = context.device.burn();
    let prompt = Prompt {
        text: io.tensor("text", device)?,
        text_mask: mask(&io, "text_mask")?,
        speaker: io.tensor("speaker", device)?,
        lyrics: ids(&io, "lyric_token_idx")?,
        lyric_mask: mask(&io, "lyric_mask")?,
    };
    let latent = io.tensor::<4>("src_latents", device)?;
    let frames = latent.dims()[3];
    let on_step = &mut |_: &sampling::Step| ControlFlow::Continue(());
    let mut found = Vec::new();
    for case in cases {
        let noise = &mut NoiseFile::with_prefix(&file, &format!("{}.", case.name))?;
        let result = match (case.n_min, case.n_max, case.n_avg) {
            (Some(n_min), Some(n_max), Some(n_avg)) => {
                let tokens = ids(&io, "edit.target_lyric_token_idx")?;
                let all = |rows: &[usize]| vec![vec![true; rows[1]]; rows[0]];
                let target = Prompt {
                    text: io.tensor("edit.target_text", device)?,
                    text_mask: all(io.shape("edit.target_text")?),
                    speaker: prompt.speaker.zeros_like(),
                    lyric_mask: all(io.shape("edit.target_lyric_token_idx")?),
                    lyrics: tokens,
                };
                let (source, latent) = (prompt.clone(), latent.clone());
                let edit = Edit { source, target, latent, n_min, n_max, n_avg };
                sampling::edit(&model, &edit, &case.options, noise, on_step)?
            }
            _ => {
                let range = frames_of_seconds(case.repaint_start)..frames_of_seconds(case.repaint_end);
                let task = match () {
                    () if case.audio2audio_enable => {
                        Task::Audio2Audio { reference: latent.clone(), strength: case.ref_audio_strength }
                    }
                    () if case.add_retake_noise && range.len() == frames => {
                        Task::Retake { variance: case.retake_variance }
                    }
                    () if case.add_retake_noise => Task::Repaint {
                        source: latent.clone(),
                        frames: range,
                        variance: case.retake_variance,
                    },
                    () => Task::Text2Music,
                };
                let text_null = match case.uses_text_null {
                    true => Some(io.tensor("text_null", device)?),
                    false => None,
                };
                let song = Song { prompt: prompt.clone(), text_null };
                sampling::sample(&model, &song, frames, &task, &case.options, noise, on_step)?
            }
        };
        let tolerance = if case.options.scheduler_type == Kind::Heun { HEUN } else { TOLERANCE };
        found.push(io.compare(&format!("{}.latents", case.name), result, tolerance)?);
    }
    Ok(found)
}
