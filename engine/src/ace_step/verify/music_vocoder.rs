//! `music_vocoder/`: the vocoder, stage by stage, its fused weights, and its own spectrograms.

use super::Context;
use crate::ace_step::vocoder::{Config, Vocoder};
use crate::error::Result;
use crate::nn::hooks::Recording;
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types};

const SOUND: Tolerance = Tolerance::of(1e-6);
const WEIGHTS: Tolerance = Tolerance::of(1e-6);
const HOOKS: Tolerance = Tolerance::of(1e-5);
const MEL: Tolerance = Tolerance::of(1e-4);

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("music_vocoder");
    let component = Component::<Config>::open(&folder)?;
    let model = component
        .load(context.device, Types::F32, &(), |weights| Vocoder::new(&component.config, weights))?;
    let io = Reference::open(&folder.join("io.safetensors"))?;
    let mut found = Vec::new();
    for name in io.names("effective_weight.") {
        let layer = name.strip_prefix("effective_weight.").unwrap_or(name);
        found.push(match model.effective_weight(layer) {
            Some(weight) => io.compare(name, weight, WEIGHTS)?,
            None => Comparison::of(name, &[], &[], WEIGHTS),
        });
    }
    let recording = Recording::default();
    let sound = model.forward(io.tensor("mel", context.device.burn())?, &recording.hooks())?;
    found.extend(io.compare_seen("hook.", &recording.finish()?, HOOKS)?);
    found.push(io.compare("wav", sound, SOUND)?);
    let bands = component.config.mel.compute(&io.values("tiny_mel_transform.in")?)?;
    let name = "tiny_mel_transform.out";
    found.push(Comparison::of(name, &bands.concat(), &io.values(name)?, MEL));
    Ok(found)
}
