//! `audio_frontend/`: the spectrograms of the released vocoder, and other sample rates.

use super::Context;
use crate::audio::mel::LogMel;
use crate::audio::resample::resample;
use crate::error::Result;
use crate::reference::{Comparison, Reference, Tolerance};

const LOG_MEL: Tolerance = Tolerance::of(1e-4);
const FILTERS: Tolerance = Tolerance::of(1e-7);
const SAMPLES: Tolerance = Tolerance::of(2e-5);

/// Samples that the original resampled.
const RESAMPLED: usize = 1500;

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let io = Reference::open(&context.path("audio_frontend/io.safetensors"))?;
    let mel = LogMel::released();
    let filters = mel.filterbank();
    let rows = [3, 100, 700].map(|bin: usize| filters.get(bin).cloned().unwrap_or_default()).concat();
    let sums: Vec<f32> = (0..mel.n_mels)
        .map(|band| filters.iter().map(|filters| f64::from(filters[band])).sum::<f64>() as f32)
        .collect();
    let wav = io.values("wav")?;
    let length = io.shape("wav")?.last().copied().unwrap_or(1).max(1);
    let channels: Vec<&[f32]> = wav.chunks(length).collect();
    let bands = channels.iter().map(|channel| Ok(mel.compute(channel)?.concat()));
    let bands = bands.collect::<Result<Vec<_>>>()?.concat();
    let mut found = vec![
        Comparison::of("mel_fb_rows_3_100_700", &rows, &io.values("mel_fb_rows_3_100_700")?, FILTERS),
        Comparison::of("mel_fb_colsum", &sums, &io.values("mel_fb_colsum")?, FILTERS),
        Comparison::of("log_mel", &bands, &io.values("log_mel")?, LOG_MEL),
    ];
    for (from, to) in [(44100, 48000), (48000, 44100)] {
        let name = format!("resample_{from}_to_{to}");
        let samples = channels.iter().map(|channel| resample(&channel[..length.min(RESAMPLED)], from, to));
        let samples = samples.collect::<Result<Vec<_>>>()?.concat();
        found.push(Comparison::of(&name, &samples, &io.values(&name)?, SAMPLES));
    }
    Ok(found)
}
