//! `bench`: how long a song takes here, with random weights in the released shapes.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::Tensor;
use engine::ace_step::decode::MusicDecoder;
use engine::ace_step::sampling::{self, Song, Task};
use engine::ace_step::transformer::{Config, Prompt, Transformer};
use engine::ace_step::{SONG_RATE, dcae, frames_of_seconds, vocoder};
use engine::backend::Device;
use engine::diffusion::noise::SeededNoise;
use engine::weights::{self, Types};
use formats::command::{Console, Outcome};
use serde::Serialize;
use serde_json::json;

use crate::device::DeviceOptions;
use crate::steps::Steps;

#[derive(clap::Args)]
pub struct Arguments {
    /// Length of the song.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    seconds: f64,
    /// Numbers of steps.
    #[arg(long, value_name = "STEPS", value_delimiter = ',', default_value = "27,60")]
    steps: Vec<usize>,
    /// Tokens of the prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 40)]
    text_tokens: usize,
    /// Tokens of the lyrics.
    #[arg(long, value_name = "TOKENS", default_value_t = 400)]
    lyric_tokens: usize,
    /// Blocks of the transformer, of which the released one has 24.
    #[arg(long, value_name = "N", default_value_t = 24)]
    blocks: usize,
    /// Measurements of each, after one that does not count; their median is reported.
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The medians of a number of steps.
#[derive(Serialize)]
struct Row {
    steps: usize,
    /// Runs of the transformer.
    decodes: usize,
    /// From the encoded prompt to the latent.
    sampling: f64,
    /// To the spectrogram.
    mel: f64,
    /// To the samples of both channels at 48 kHz, on the host.
    sound: f64,
    total: f64,
    seconds_per_step: f64,
}

/// `ace-step bench`.
pub fn bench(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    ensure!(arguments.runs > 0, "--runs: found 0, needed 1 at least");
    let (device, types) = arguments.device.open()?;
    let config = Config { num_layers: arguments.blocks, ..Config::released() };
    let start = Instant::now();
    let transformer = weights::random(0, &device, types, |weights| Transformer::new(&config, weights))?;
    device.sync()?;
    let made = start.elapsed().as_secs_f64();
    let decoder = MusicDecoder {
        decoder: weights::random(0, &device, types, |weights| {
            dcae::Decoder::new(&dcae::Config::released(), weights)
        })?,
        vocoder: weights::random(0, &device, types, |weights| {
            vocoder::Vocoder::new(&vocoder::Config::released(), weights)
        })?,
    };
    let song = song(&config, arguments, &device);
    let frames = frames_of_seconds(arguments.seconds);
    let mut rows = Vec::new();
    for &infer_steps in &arguments.steps {
        let options = sampling::Options { infer_steps, ..sampling::Options::default() };
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        for run in 0..=arguments.runs {
            let steps = Steps::begin(console);
            let noise = &mut SeededNoise::new(&[run as u64]);
            let mut clock = Instant::now();
            let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();
            let task = Task::Text2Music;
            let latent =
                sampling::sample(&transformer, &song, frames, &task, &options, noise, &mut |step| {
                    steps.step(step)
                })?;
            let sampling = lap();
            let mel = decoder.log_mel(latent)?;
            device.sync()?;
            let to_mel = lap();
            for sound in decoder.sound(mel)? {
                sound.resampled(SONG_RATE)?;
            }
            let sound = lap();
            // The first compiles, tunes and allocates.
            if run > 0 {
                times.iter_mut().zip([sampling, to_mel, sound]).for_each(|(times, time)| times.push(time));
            }
        }
        let [sampling, mel, sound] = times.map(|times| median(&times));
        rows.push(Row {
            steps: infer_steps,
            decodes: options.run()?.decodes(),
            sampling,
            mel,
            sound,
            total: sampling + mel + sound,
            seconds_per_step: sampling / infer_steps as f64,
        });
    }
    let mut out = std::io::stdout().lock();
    if console.json {
        let document = json!({
            "backend": device.backend(), "device": device.name(), "types": types, "frames": frames,
            "seconds_to_make_weights": made, "rows": rows,
        });
        console.document(&mut out, &document)?;
        return Ok(Outcome::Fine);
    }
    let Types { compute, .. } = types;
    writeln!(out, "{}, {compute}; {frames} frames, weights made in {made:.1} s", device.name())?;
    for Row { steps, decodes, sampling, mel, sound, total, seconds_per_step } in &rows {
        let of_decode = 1e3 * sampling / *decodes as f64;
        writeln!(
            out,
            "{steps:4} steps  {total:8.2} s: sampling {sampling:.2} s ({seconds_per_step:.4} s a step, {decodes} runs \
             of the transformer of {of_decode:.1} ms), mel {mel:.2} s, sound {sound:.2} s"
        )?;
    }
    Ok(Outcome::Fine)
}

/// A prompt of random numbers.
fn song(config: &Config, arguments: &Arguments, device: &Device) -> Song {
    let (text, lyrics) = (arguments.text_tokens, arguments.lyric_tokens);
    let wave = |i: usize| (i as f32 * 0.7).sin() * 0.3;
    let values: Vec<f32> = (0..text * config.text_embedding_dim).map(wave).collect();
    let tensor = Tensor::<1>::from_data(values.as_slice(), device.burn());
    let tensor = tensor.reshape([1, text, config.text_embedding_dim]);
    let ids = (0..lyrics).map(|i| (i * 37 % config.lyric_encoder_vocab_size) as u32).collect();
    let prompt = Prompt {
        text: tensor.clone(),
        text_mask: vec![vec![true; text]],
        speaker: Tensor::zeros([1, config.speaker_embedding_dim], device.burn()),
        lyrics: vec![ids],
        lyric_mask: vec![vec![true; lyrics]],
    };
    Song { prompt, text_null: Some(tensor.mul_scalar(0.5)) }
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
