//! `bench`: how long a song takes here, with random weights in the released shapes.

use std::io::Write;
use std::time::Instant;

use anyhow::{Result, ensure};
use burn::tensor::Tensor;
use engine::ace_step::frames_of_seconds;
use engine::ace_step::sampling::{self, Song, Task};
use engine::ace_step::transformer::{Config, Prompt, Transformer};
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

#[derive(Serialize)]
struct Row {
    steps: usize,
    decodes: usize,
    /// Of each run.
    seconds: Vec<f64>,
    median: f64,
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
    let song = song(&config, arguments, &device);
    let frames = frames_of_seconds(arguments.seconds);
    let mut rows = Vec::new();
    for &infer_steps in &arguments.steps {
        let options = sampling::Options { infer_steps, ..sampling::Options::default() };
        let decodes = options.run()?.decodes();
        let mut seconds = Vec::new();
        for run in 0..=arguments.runs {
            let steps = Steps::begin(console);
            let noise = &mut SeededNoise::new(&[run as u64]);
            let start = Instant::now();
            sampling::sample(&transformer, &song, frames, &Task::Text2Music, &options, noise, &mut |step| {
                steps.step(step)
            })?;
            device.sync()?;
            if run > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        let median = median(&seconds);
        rows.push(Row {
            steps: infer_steps,
            decodes,
            seconds,
            median,
            seconds_per_step: median / infer_steps as f64,
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
    for Row { steps, decodes, median, seconds_per_step, .. } in &rows {
        let of_decode = 1e3 * median / *decodes as f64;
        writeln!(
            out,
            "{steps:4} steps  {decodes:4} runs of the transformer  {median:8.2} s  {seconds_per_step:.4} s a step  \
             {of_decode:.1} ms a run"
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
