//! A song from a prompt and lyrics: `cargo run --release -p engine --example ace_step -- "calm piano, 80 bpm" song.wav`.
//! ACE_STEP_DIR names a released checkpoint (with the lyric tokenizer's vocab.json in it where there are lyrics); without it, a
//! tiny model of random weights makes noise of the same length.
use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;

use burn::tensor::Tensor;
use engine::ace_step::decode::MusicDecoder;
use engine::ace_step::lyrics::{Language, Lyrics};
use engine::ace_step::pipeline::Pipeline;
use engine::ace_step::preset::Configs;
use engine::ace_step::sampling::{Options, Song, Task, sample};
use engine::ace_step::transformer::{Prompt, Transformer};
use engine::ace_step::{SONG_RATE, dcae, frames_of_seconds, vocoder};
use engine::audio::wav::Format;
use engine::backend::{Backend, Device};
use engine::diffusion::noise::SeededNoise;
use engine::weights::{Types, random};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let prompt = arguments.next().unwrap_or_else(|| "a calm piano piece, 80 bpm".into());
    let out = PathBuf::from(arguments.next().unwrap_or_else(|| "song.wav".into()));
    let device = Backend::Cpu.open()?;
    let frames = frames_of_seconds(5.0);
    let options = Options { infer_steps: 8, ..Options::default() };

    // The prompt, the transformer and what makes sound of its latents.
    let (song, transformer, decoder) = match std::env::var_os("ACE_STEP_DIR").map(PathBuf::from) {
        Some(folder) => {
            let vocab = Some(folder.join("vocab.json")).filter(|file| file.is_file());
            let pipeline = Pipeline::open(&folder, vocab.as_deref(), &device, Types::F32)?;
            let lyrics = match vocab {
                Some(_) => Lyrics::parse("[verse]\nNeon lights they flicker bright", Language::En),
                None => Lyrics::default(),
            };
            let song = pipeline.prompt(&prompt, &lyrics, &())?.song;
            (song, pipeline.transformer(&())?, pipeline.decoder(&())?)
        }
        None => tiny(&device)?,
    };

    let noise = &mut SeededNoise::new(&[0]);
    let latent = sample(&transformer, &song, frames, &Task::Text2Music, &options, noise, &mut |step| {
        println!("step {} of {}", step.done, step.total);
        ControlFlow::Continue(())
    })?;
    let sound = decoder.decode(latent)?.remove(0).resampled(SONG_RATE)?;
    sound.write(&out, Format::F32)?;
    println!("{}: {:.2} s", out.display(), sound.seconds());
    Ok(())
}

/// A model that has learned nothing, and a prompt of nothing.
fn tiny(device: &Device) -> engine::Result<(Song, Transformer, MusicDecoder)> {
    let Configs { transformer, dcae, vocoder, .. } = Configs::tiny();
    let types = Types::F32;
    let prompt = Prompt {
        text: Tensor::zeros([1, 1, transformer.text_embedding_dim], device.burn()),
        text_mask: vec![vec![true]],
        speaker: Tensor::zeros([1, transformer.speaker_embedding_dim], device.burn()),
        lyrics: vec![vec![0]],
        lyric_mask: vec![vec![false]],
    };
    let decoder = MusicDecoder {
        decoder: random(0, device, types, |weights| dcae::Decoder::new(&dcae, weights))?,
        vocoder: random(0, device, types, |weights| vocoder::Vocoder::new(&vocoder, weights))?,
    };
    let transformer = random(0, device, types, |weights| Transformer::new(&transformer, weights))?;
    Ok((Song { prompt, text_null: None }, transformer, decoder))
}
