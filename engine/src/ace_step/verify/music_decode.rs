//! `music_decode/`: latents to a file's samples, with the models of `music_dcae_f8c8/` and `music_vocoder/`.

use super::Context;
use crate::ace_step::SONG_RATE;
use crate::ace_step::decode::MusicDecoder;
use crate::error::Result;
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types};

const MEL: Tolerance = Tolerance::of(1e-4);
const SOUND: Tolerance = Tolerance::of(2e-6);

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let dcae = Component::open(&context.path("music_dcae_f8c8"))?;
    let vocoder = Component::open(&context.path("music_vocoder"))?;
    let model = MusicDecoder::load(&dcae, &vocoder, context.device, Types::F32, &())?;
    let io = Reference::open(&context.path("music_decode/io.safetensors"))?;
    let mel = model.log_mel(io.tensor("latents", context.device.burn())?)?;
    let mut found = vec![io.compare("mel_denormalised", mel.clone(), MEL)?];
    for sound in model.sound(mel)? {
        found.push(Comparison::of("wav_44100", &sound.channels.concat(), &io.values("wav_44100")?, SOUND));
        let song = sound.resampled(SONG_RATE)?;
        found.push(Comparison::of("wav_48000", &song.channels.concat(), &io.values("wav_48000")?, SOUND));
    }
    Ok(found)
}
