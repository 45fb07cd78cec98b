//! `demo`: the whole pipeline with random weights, which proves that everything runs and is noise.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use burn::tensor::Tensor;
use clap::ValueHint;
use engine::ace_step::decode::MusicDecoder;
use engine::ace_step::erg::Weaken;
use engine::ace_step::preset::Configs;
use engine::ace_step::prompt::Tokens;
use engine::ace_step::sampling::{self, Song, Task};
use engine::ace_step::transformer::{Prompt, Transformer};
use engine::ace_step::{SONG_RATE, dcae, frames_of_seconds, umt5, vocoder};
use engine::audio::wav::{Format, Sound};
use engine::diffusion::noise::SeededNoise;
use engine::nn::hooks::Hooks;
use engine::weights;
use formats::command::{Console, Outcome};
use serde_json::json;

use crate::device::DeviceOptions;
use crate::picture;
use crate::steps::Steps;

/// What is asked of a model that has learned nothing.
const DESCRIPTION: &str = "a calm piano piece, 80 bpm";
const LYRICS: &str = "[verse]\nNeon lights they flicker bright";

#[derive(clap::Args)]
pub struct Arguments {
    /// The WAV file.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath, default_value = "ace-step-demo.wav")]
    out: PathBuf,
    /// The picture of its mel spectrogram [default: beside the WAV file].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    picture: Option<PathBuf>,
    /// Length.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    seconds: f64,
    /// Steps from noise to music.
    #[arg(long, value_name = "N", default_value_t = 8)]
    steps: usize,
    /// Chooses weights and noise; the same seed gives the same sound.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceOptions,
}

/// `ace-step demo`.
pub fn demo(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let frames = frames_of_seconds(arguments.seconds);
    ensure!(frames > 0, "--seconds: found {}, needed 0.1 at least", arguments.seconds);
    let options = sampling::Options { infer_steps: arguments.steps, ..sampling::Options::default() };
    let run = options.run()?;
    let (device, types) = arguments.device.open()?;
    let Configs { transformer, dcae, vocoder, umt5 } = Configs::tiny();
    let mut out: Box<dyn Write> = match console.json {
        true => Box::new(std::io::sink()),
        false => Box::new(std::io::stdout().lock()),
    };
    writeln!(
        out,
        "ACE-Step's pipeline with a tiny model of random weights: what follows is noise, not music."
    )?;
    writeln!(out, "Music needs the released weights: ace-step generate --checkpoint DIR …\n")?;

    // Letters stand for tokens: the released tokenizers belong to the released weights.
    let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
    let tokens = Tokens::padded(vec![ids(DESCRIPTION)]);
    let seed = arguments.seed;
    let encoder = weights::random(seed, &device, types, |weights| umt5::Encoder::new(&umt5, weights))?;
    let text = encoder.forward(&tokens, None, &Hooks::none())?;
    let text_null = Some(encoder.forward(&tokens, Some(&Weaken::TEXT), &Hooks::none())?);
    drop(encoder);
    writeln!(out, "prompt        {DESCRIPTION:?} → {:?}", text.dims())?;
    let lyrics = ids(LYRICS);
    let prompt = Prompt {
        text_mask: tokens.mask,
        speaker: Tensor::zeros([1, transformer.speaker_embedding_dim], device.burn()),
        lyric_mask: vec![vec![true; lyrics.len()]],
        lyrics: vec![lyrics],
        text,
    };
    let model = weights::random(seed, &device, types, |weights| Transformer::new(&transformer, weights))?;
    let shape = [1, transformer.in_channels, transformer.max_height, frames];
    writeln!(out, "noise         {shape:?}, seed {seed}")?;
    writeln!(out, "schedule      {} steps, {} runs of the transformer", run.steps(), run.decodes())?;
    for (step, time) in run.timesteps.iter().enumerate() {
        let guided = if run.guided.contains(&step) { "guided" } else { "" };
        writeln!(out, "  step {:3}    t = {time:8.3}  {guided}", step + 1)?;
    }
    out.flush()?;
    let steps = Steps::begin(console);
    let song = Song { prompt, text_null };
    let noise = &mut SeededNoise::new(&[seed]);
    let latents = sampling::sample(&model, &song, frames, &Task::Text2Music, &options, noise, &mut |step| {
        steps.step(step)
    })?;
    drop(model);
    writeln!(out, "latent        {:?}", latents.dims())?;
    let decoder = MusicDecoder {
        decoder: weights::random(seed, &device, types, |weights| dcae::Decoder::new(&dcae, weights))?,
        vocoder: weights::random(seed, &device, types, |weights| vocoder::Vocoder::new(&vocoder, weights))?,
    };
    let log_mel = decoder.log_mel(latents)?;
    writeln!(out, "log-mel       {:?}", log_mel.dims())?;
    let sounds = decoder.sound(log_mel)?;
    let song = normalised(&sounds[0].resampled(SONG_RATE)?);
    song.write(&arguments.out, Format::F32)?;
    let picture = arguments.picture.clone().unwrap_or_else(|| arguments.out.with_extension("png"));
    let bands = song.channels.iter().map(|channel| vocoder.mel.compute(channel));
    picture::write(&picture, &bands.collect::<engine::Result<Vec<_>>>()?)?;
    let (samples, seconds) = (song.len(), song.seconds());
    writeln!(
        out,
        "sound         {} channels of {samples} samples at {} Hz, {seconds:.3} s\n\nwrote {} and {} ({:.1} s)",
        song.channels.len(),
        song.rate,
        arguments.out.display(),
        picture.display(),
        console.seconds()
    )?;
    drop(out);
    if console.json {
        let document = json!({
            "random_weights": true, "frames": frames, "timesteps": run.timesteps, "decodes": run.decodes(),
            "channels": song.channels.len(), "samples": samples, "rate": song.rate, "seconds": seconds,
            "out": arguments.out, "picture": picture, "elapsed_seconds": console.seconds(),
        });
        console.document(&mut std::io::stdout().lock(), &document)?;
    }
    Ok(Outcome::Fine)
}

/// As loud as a song: random weights are nearly silent.
fn normalised(sound: &Sound) -> Sound {
    let largest = sound.channels.iter().flatten().fold(0.0f32, |largest, sample| largest.max(sample.abs()));
    let factor = if largest > 0.0 { 0.5 / largest } else { 1.0 };
    let channels =
        sound.channels.iter().map(|channel| channel.iter().map(|sample| sample * factor).collect());
    Sound { channels: channels.collect(), rate: sound.rate }
}
