//! `music_dcae_f8c8/`: decoder and encoder, stage by stage.

use super::Context;
use crate::ace_step::dcae::{Autoencoder, Config};
use crate::error::Result;
use crate::nn::hooks::{Hooks, Recording};
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types};

const TOLERANCE: Tolerance = Tolerance::of(5e-5);

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("music_dcae_f8c8");
    let component = Component::<Config>::open(&folder)?;
    let model = component
        .load(context.device, Types::F32, &(), |weights| Autoencoder::new(&component.config, weights))?;
    let io = Reference::open(&folder.join("io.safetensors"))?;
    let device = context.device.burn();
    let recording = Recording::default();
    let mel = model.decoder.forward(io.tensor("dec.latent", device)?, &recording.hooks())?;
    let latent = model.encoder.forward(io.tensor("enc.mel", device)?, &recording.hooks())?;
    let mut found = io.compare_seen("hook.", &recording.finish()?, TOLERANCE)?;
    found.push(io.compare("dec.mel", mel, TOLERANCE)?);
    found.push(io.compare("enc.latent", latent, TOLERANCE)?);
    // So few positions that the original multiplies in another order.
    let few = model.decoder.forward(io.tensor("quad.latent", device)?, &Hooks::none())?;
    found.push(io.compare("quad.mel", few, TOLERANCE)?);
    Ok(found)
}
