//! `generate`: a song from a checkpoint.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::Tensor;
use clap::{ArgGroup, ValueHint};
use engine::Error;
use engine::ace_step::lyrics::{Language, Lyrics};
use engine::ace_step::pipeline::Pipeline;
use engine::ace_step::plan::{Plan, Request};
use engine::ace_step::sampling::{self, Edit, Task};
use engine::ace_step::{HOP, MEL_FRAMES, SAMPLE_RATE, SONG_RATE, frames_of_seconds};
use engine::audio::wav::{Format, Sound};
use engine::command::interrupt;
use engine::diffusion::noise::{Noise, NoiseFile, RecordedNoise, SeededNoise};
use formats::command::{Console, Outcome};
use serde_json::json;

use crate::device::{DeviceOptions, lyric_vocab};
use crate::options::SamplingOptions;
use crate::picture;
use crate::steps::Steps;

#[derive(clap::Args)]
#[command(group = ArgGroup::new("words").args(["lyrics", "lyrics_file"]))]
#[command(group = ArgGroup::new("task").args(["reference", "retake", "repaint", "edit_prompt"]))]
pub struct Arguments {
    /// Folder of a released checkpoint.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    checkpoint: PathBuf,
    /// What the music shall be like: genres, instruments, moods, tempo.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// What is sung, with tags of the structure, such as verse and chorus, in square brackets on lines of their own; nothing is
    /// instrumental.
    #[arg(long, value_name = "TEXT")]
    lyrics: Option<String>,
    /// A file of lyrics.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    lyrics_file: Option<PathBuf>,
    /// Language of lines that name none; a code in square brackets before a line names one.
    #[arg(long, value_name = "CODE", default_value = "en")]
    language: Language,
    /// Vocabulary of the lyric tokenizer, `vocab.json` of the original repository [default: in the checkpoint's folder].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    lyric_vocab: Option<PathBuf>,
    /// Length of the song [default: 60, or that of --source or --reference].
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// The WAV file.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    out: PathBuf,
    /// Samples a second.
    #[arg(long, value_name = "HZ", default_value_t = SONG_RATE, value_parser = clap::builder::RangedU64ValueParser::<u32>::new().range(8000..=192_000))]
    rate: u32,
    /// 16-bit integers in place of 32-bit floats.
    #[arg(long)]
    pcm16: bool,
    /// Also draw the mel spectrogram, a PNG file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    picture: Option<PathBuf>,
    /// Chooses the noise; the same seed gives the same song [default: by the clock].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Noise from a SafeTensors file (init_noise, retake_noise, step_noise.K, noise.K) in place of a seed.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "seed")]
    noise: Option<PathBuf>,
    /// Write the noise of this run to such a file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    save_noise: Option<PathBuf>,
    /// From a recording (WAV): the more of it is kept the larger --strength.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "From a recording")]
    reference: Option<PathBuf>,
    /// How much of --reference is kept, 0 to 1.
    #[arg(long, value_name = "PART", default_value_t = 0.5, help_heading = "From a recording")]
    strength: f64,
    /// The same song otherwise, with the same --seed: 0 is the same, 1 another.
    #[arg(long, value_name = "PART", help_heading = "From a recording")]
    retake: Option<f64>,
    /// The song that --repaint and --edit-prompt change (WAV).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "From a recording")]
    source: Option<PathBuf>,
    /// Make these seconds of --source anew, such as 10..20.
    #[arg(long, value_name = "FROM..TO", value_parser = seconds, requires = "source", help_heading = "From a recording")]
    repaint: Option<Range<f64>>,
    /// How much is new there, 0 to 1.
    #[arg(long, value_name = "PART", default_value_t = 0.5, help_heading = "From a recording")]
    repaint_variance: f64,
    /// Make --source, which --prompt and --lyrics describe, a song of this description.
    #[arg(long, value_name = "TEXT", requires = "source", help_heading = "From a recording")]
    edit_prompt: Option<String>,
    /// With these lyrics [default: the same].
    #[arg(long, value_name = "TEXT", requires = "edit_prompt", help_heading = "From a recording")]
    edit_lyrics: Option<String>,
    /// Part of the steps that are left out at the start: the larger, the more of the song stays.
    #[arg(long, value_name = "PART", default_value_t = 0.0, help_heading = "From a recording")]
    edit_min: f64,
    /// Part of the steps after which the old song has no say.
    #[arg(long, value_name = "PART", default_value_t = 1.0, help_heading = "From a recording")]
    edit_max: f64,
    /// Draws of noise for each step of an edit.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "From a recording")]
    edit_average: usize,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    device: DeviceOptions,
}

/// Parses `10..20`.
fn seconds(text: &str) -> Result<Range<f64>, String> {
    let error = || format!("found {text}, needed seconds from and to, such as 10..20");
    let (from, to) = text.split_once("..").ok_or_else(error)?;
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| error());
    let (from, to) = (number(from)?, number(to)?);
    if from >= 0.0 && to > from { Ok(from..to) } else { Err(error()) }
}

/// `ace-step generate`.
pub fn generate(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let options = arguments.sampling.options()?;
    let lyrics = match (&arguments.lyrics, &arguments.lyrics_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => std::fs::read_to_string(file).with_context(|| file.display().to_string())?,
        (None, None) => String::new(),
    };
    let lyrics = Lyrics::parse(&lyrics, arguments.language);
    let (device, types) = arguments.device.open()?;
    let vocab = lyric_vocab(arguments.lyric_vocab.as_ref(), &arguments.checkpoint);
    let pipeline = Pipeline::open(&arguments.checkpoint, vocab.as_deref(), &device, types)?;
    let recording = arguments.reference.as_ref().or(arguments.source.as_ref());
    let recording = recording.map(|file| read(file)).transpose()?;
    let frames = match (&recording, arguments.seconds) {
        (Some(_), Some(_)) => bail!("--seconds: a recording has its own length"),
        (Some(sound), None) => sound.len().div_ceil(HOP * MEL_FRAMES),
        (None, seconds) => frames_of_seconds(seconds.unwrap_or(60.0)),
    };
    ensure!(frames > 0, "a song without a frame; needed 0.1 s at least");

    let [text_tokens, lyric_tokens] = pipeline.count(&arguments.prompt, &lyrics)?;
    let request = Request { frames, batch: 1, text_tokens, lyric_tokens, types };
    let plan = Plan::new(&pipeline.configs(), &options, &request)?;
    if !console.quiet {
        eprint!("{plan}");
    }
    plan.check(&device)?;

    let latent = recording.map(|sound| pipeline.encoder(console)?.encode(&sound)).transpose()?;
    let encoded = pipeline.prompt(&arguments.prompt, &lyrics, console)?;
    let target = arguments.edit_prompt.as_ref().map(|prompt| {
        let lyrics = match &arguments.edit_lyrics {
            Some(text) => Lyrics::parse(text, arguments.language),
            None => lyrics.clone(),
        };
        pipeline.prompt(prompt, &lyrics, console)
    });
    let target = target.transpose()?;
    for note in encoded.notes.iter().chain(target.iter().flat_map(|target| &target.notes)) {
        eprintln!("lyrics, {note}");
    }

    let seed = arguments.seed.unwrap_or_else(by_the_clock);
    let source: Box<dyn Noise> = match &arguments.noise {
        Some(file) => Box::new(NoiseFile::open(file)?),
        None => Box::new(SeededNoise::new(&[seed])),
    };
    let mut noise = RecordedNoise::new(source);
    let transformer = pipeline.transformer(console)?;
    let steps = Steps::begin(console);
    let on_step = &mut |step: &sampling::Step| steps.step(step);
    let sampled = match (&target, &latent) {
        (Some(target), Some(latent)) => {
            let edit = Edit {
                source: encoded.song.prompt.clone(),
                target: target.song.prompt.clone(),
                latent: latent.clone(),
                n_min: arguments.edit_min,
                n_max: arguments.edit_max,
                n_avg: arguments.edit_average,
            };
            sampling::edit(&transformer, &edit, &options, &mut noise, on_step)
        }
        _ => {
            let frames = latent.as_ref().map_or(frames, |latent| latent.dims()[3]);
            let task = arguments.task(latent)?;
            sampling::sample(&transformer, &encoded.song, frames, &task, &options, &mut noise, on_step)
        }
    };
    let sampled = match sampled {
        Err(Error::Cancelled { .. }) => interrupt::exit(),
        sampled => sampled?,
    };
    let sampling_seconds = steps.seconds();
    drop((transformer, encoded, target, steps));
    if let Some(file) = &arguments.save_noise {
        noise.write(file)?;
    }
    let decoder = pipeline.decoder(console)?;
    console.done();
    let sounds = decoder.decode(sampled)?;
    let sound = sounds[0].resampled(arguments.rate)?;
    sound.write(&arguments.out, if arguments.pcm16 { Format::I16 } else { Format::F32 })?;
    if let Some(file) = &arguments.picture {
        let mel = pipeline.configs().vocoder.mel;
        let bands = sounds[0].channels.iter().map(|channel| mel.compute(channel));
        picture::write(file, &bands.collect::<engine::Result<Vec<_>>>()?)?;
    }
    let mut out = std::io::stdout().lock();
    if console.json {
        let document = json!({
            "out": arguments.out, "seconds": sound.seconds(), "samples": sound.len(), "rate": sound.rate,
            "seed": arguments.noise.is_none().then_some(seed), "frames": frames, "options": options,
            "sampling_seconds": sampling_seconds, "elapsed_seconds": console.seconds(), "plan": plan,
        });
        console.document(&mut out, &document)?;
        return Ok(Outcome::Fine);
    }
    let of_noise = match &arguments.noise {
        Some(file) => file.display().to_string(),
        None => format!("seed {seed}"),
    };
    writeln!(
        out,
        "wrote {}: {:.2} s at {} Hz, {of_noise}; {sampling_seconds:.1} s of sampling, {:.1} s in all",
        arguments.out.display(),
        sound.seconds(),
        sound.rate,
        console.seconds()
    )?;
    Ok(Outcome::Fine)
}

impl Arguments {
    /// What is made of the recording's latent.
    fn task(&self, latent: Option<Tensor<4>>) -> Result<Task> {
        Ok(match (latent, &self.repaint, self.retake) {
            (Some(source), Some(range), _) => {
                let frames = source.dims()[3];
                let range = frames_of_seconds(range.start)..frames_of_seconds(range.end);
                ensure!(
                    range.end <= frames,
                    "--repaint: found an end beyond {:.2} s, that of the recording",
                    engine::ace_step::seconds_of_frames(frames)
                );
                Task::Repaint { source, frames: range, variance: self.repaint_variance }
            }
            (Some(reference), None, _) if self.reference.is_some() => {
                Task::Audio2Audio { reference, strength: self.strength }
            }
            (Some(_), None, _) => bail!("--source: needed --repaint or --edit-prompt beside it"),
            (None, _, Some(variance)) => Task::Retake { variance },
            (None, _, None) => Task::Text2Music,
        })
    }
}

fn read(file: &Path) -> Result<Sound> {
    Ok(Sound::read(file)?.stereo()?.resampled(SAMPLE_RATE)?)
}

/// Some number.
fn by_the_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64 % 1_000_000_000)
}
