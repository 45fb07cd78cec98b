//! Songs from a whole checkpoint folder: a tiny one of random weights, with the files that a released one has.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::ace_step::checkpoint::{DCAE, TRANSFORMER, UMT5, VOCODER};
use engine::ace_step::preset::Configs;
use engine::ace_step::{dcae, transformer, umt5, vocoder};
use engine::audio::wav::{Format, Sound};
use engine::weights::{self, ExpectedTensors, Role};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The preset's configurations as files have them.
fn configs() -> [(&'static str, Value); 4] {
    let scales = json!([[], [], [5], [5]]);
    let blocks = json!(["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"]);
    let configs = [
        (
            TRANSFORMER,
            json!({
                "in_channels": 8, "out_channels": 8, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 4,
                "mlp_ratio": 2.5, "patch_size": [16, 1], "max_height": 16, "max_width": 32768, "rope_theta": 1e6,
                "text_embedding_dim": 24, "speaker_embedding_dim": 16, "lyric_encoder_vocab_size": 256,
                "lyric_hidden_size": 32, "ssl_latent_dims": [], "lyric_encoder_attention_heads": 4,
                "lyric_encoder_linear_units": 64, "patch_embed_hidden_channels": 64,
            }),
        ),
        (
            DCAE,
            json!({
                "in_channels": 2, "latent_channels": 8, "attention_head_dim": 8,
                "encoder_block_types": blocks, "decoder_block_types": blocks,
                "encoder_block_out_channels": [8, 16, 32, 32], "decoder_block_out_channels": [8, 16, 32, 32],
                "encoder_layers_per_block": [1, 1, 1, 1], "decoder_layers_per_block": [1, 1, 1, 1],
                "encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales,
                "upsample_block_type": "interpolate", "downsample_block_type": "Conv",
            }),
        ),
        (
            VOCODER,
            json!({
                "input_channels": 128, "depths": [1, 1], "dims": [16, 32], "kernel_sizes": [7],
                "upsample_rates": [4, 4, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4, 4],
                "resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3], [1, 3]], "num_mels": 32,
                "upsample_initial_channel": 128, "pre_conv_kernel_size": 13, "post_conv_kernel_size": 13,
                "sampling_rate": 44100, "n_fft": 2048, "win_length": 2048, "hop_length": 512, "f_min": 40,
                "f_max": 16000, "n_mels": 128,
            }),
        ),
        (
            UMT5,
            json!({
                "vocab_size": 256, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 10, "num_heads": 3,
                "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
                "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
            }),
        ),
    ];
    let read = |index: usize| configs[index].1.to_string();
    let tiny = Configs::tiny();
    assert_eq!(serde_json::from_str::<transformer::Config>(&read(0)).unwrap(), tiny.transformer);
    assert_eq!(serde_json::from_str::<dcae::Config>(&read(1)).unwrap(), tiny.dcae);
    assert_eq!(serde_json::from_str::<vocoder::Config>(&read(2)).unwrap(), tiny.vocoder);
    assert_eq!(serde_json::from_str::<umt5::Config>(&read(3)).unwrap(), tiny.umt5);
    configs
}

/// Values of ordinary size: kernels by their inputs, scales of norms around 1.
fn values(name: &str, shape: &[usize], random: &mut ChaCha8Rng) -> Vec<f32> {
    let inputs: usize = shape.iter().skip(1).product();
    let (centre, width) = match inputs {
        0 | 1 if name.ends_with("weight") || name.ends_with("weight_g") => (1.0, 0.1),
        0 | 1 => (0.0, 0.02),
        inputs => (0.0, (3.0 / inputs as f32).sqrt()),
    };
    (0..shape.iter().product()).map(|_| centre + width * random.random_range(-1.0f32..1.0)).collect()
}

fn write_weights(path: &Path, expected: &ExpectedTensors, change: impl Fn(&str, &mut Vec<f32>)) {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let wanted = expected.iter().filter(|(_, wanted)| wanted.role != Role::Optional);
    let tensors: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = wanted
        .map(|(name, wanted)| {
            let mut values = values(name, &wanted.shape, &mut random);
            change(name, &mut values);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, (wanted.shape.clone(), bytes))
        })
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A checkpoint whose values may be changed while they are written.
fn checkpoint(change: impl Fn(&str, &mut Vec<f32>)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let Configs { transformer, dcae, vocoder, umt5 } = Configs::tiny();
    let expected = [
        weights::expected(|weights| transformer::Transformer::new(&transformer, weights)).unwrap(),
        weights::expected(|weights| dcae::Autoencoder::new(&dcae, weights)).unwrap(),
        weights::expected(|weights| vocoder::Vocoder::new(&vocoder, weights)).unwrap(),
        weights::expected(|weights| umt5::Encoder::new(&umt5, weights)).unwrap(),
    ];
    for ((name, config), expected) in configs().into_iter().zip(&expected) {
        let component = folder.path().join(name);
        fs::create_dir(&component).unwrap();
        fs::write(component.join("config.json"), config.to_string()).unwrap();
        let file = if name == UMT5 { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        write_weights(&component.join(file), expected, &change);
    }
    let tokenizer = crate::fixture::folder().join("umt5-tokenizer/tokenizer.json");
    fs::copy(tokenizer, folder.path().join(UMT5).join("tokenizer.json")).unwrap();
    folder
}

/// Runs `generate` for two steps.
struct Studio {
    checkpoint: TempDir,
    out: TempDir,
}

impl Studio {
    fn new() -> Studio {
        Studio { checkpoint: checkpoint(|_, _| {}), out: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.out.path().join(name)
    }

    #[track_caller]
    fn generate(&self, name: &str, more: &[&str]) -> Sound {
        let file = self.file(name);
        let (status, told) = run(self.checkpoint.path(), &file, more);
        assert_eq!(status, Some(0), "{told}");
        Sound::read(&file).unwrap()
    }
}

fn run(checkpoint: &Path, out: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ace-step"));
    command.args(["generate", "--prompt", "a b", "--steps", "4", "--checkpoint"]).arg(checkpoint);
    let output = command.arg("--out").arg(out).args(more).env("RUST_BACKTRACE", "0").output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Samples at 48 kHz of so many frames of a latent.
fn samples(frames: usize) -> usize {
    (frames * 4096 * 160).div_ceil(147)
}

#[test]
fn a_seed_or_a_file_of_noise_is_a_song() {
    let studio = Studio::new();
    let noise = studio.file("noise.safetensors");
    let noise = noise.to_str().unwrap();
    fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["--seconds", "1"], more].concat()
    }
    let song = studio.generate("song.wav", &with(&["--seed", "7", "--save-noise", noise]));
    assert_eq!((song.channels.len(), song.len(), song.rate), (2, samples(10), 48000));
    assert_eq!(studio.generate("again.wav", &with(&["--seed", "7"])), song);
    assert_eq!(studio.generate("replayed.wav", &with(&["--noise", noise])), song);
    assert_ne!(studio.generate("other.wav", &with(&["--seed", "8"])), song);
    // No new noise at all is the same song, some is another one.
    assert_eq!(studio.generate("retake.wav", &with(&["--seed", "7", "--retake", "0"])), song);
    assert_ne!(studio.generate("retake.wav", &with(&["--seed", "7", "--retake", "0.4"])), song);
    // Every scheduler and guidance makes its own.
    let ways: [&[&str]; 5] = [
        &["--scheduler", "heun"],
        &["--scheduler", "pingpong"],
        &["--cfg", "cfg", "--guidance-interval", "1", "--guidance-decay", "1"],
        &["--cfg", "cfg_star", "--guidance-interval", "1"],
        &["--guidance-text", "5", "--guidance-lyric", "2"],
    ];
    for way in ways {
        let sound = studio.generate("way.wav", &with(&[&["--seed", "7"], way].concat()));
        assert_eq!(sound.len(), samples(10));
        assert_ne!(sound, song, "{way:?}");
    }
    let other_rate = studio.generate("rate.wav", &with(&["--seed", "7", "--rate", "44100", "--pcm16"]));
    assert_eq!((other_rate.len(), other_rate.rate), (10 * 4096, 44100));
}

#[test]
fn recordings_are_kept_near_painted_over_and_edited() {
    let studio = Studio::new();
    let tone = |i: i32| (i as f32 / 44100.0 * 440.0 * std::f32::consts::TAU).sin() * 0.3;
    let recording = Sound { channels: vec![(0..66150).map(tone).collect()], rate: 44100 };
    let file = studio.file("tone.wav");
    recording.write(&file, Format::F32).unwrap();
    let file = file.to_str().unwrap();
    // 1.5 s are 16.1 frames of a latent, and silence makes them whole.
    let ways: [&[&str]; 3] = [
        &["--reference", file, "--strength", "0.5"],
        &["--source", file, "--repaint", "0.4..0.9"],
        &["--source", file, "--edit-prompt", "b a", "--edit-max", "0.5"],
    ];
    let mut songs = Vec::new();
    for way in ways {
        let song = studio.generate("song.wav", &[&["--seed", "3"], way].concat());
        assert_eq!(song.len(), samples(17), "{way:?}");
        assert!(songs.iter().all(|other| *other != song), "{way:?}");
        songs.push(song);
    }
    let refused = |more: &[&str]| {
        let out = studio.file("never.wav");
        let (status, told) = run(studio.checkpoint.path(), &out, more);
        assert!(status == Some(2) && !out.exists(), "{told}");
        told
    };
    assert!(refused(&["--source", file]).contains("--repaint or --edit-prompt"));
    assert!(refused(&["--source", file, "--repaint", "1..9"]).contains("--repaint"));
    assert!(refused(&["--reference", file, "--strength", "0.9"]).contains("strength"));
    assert!(refused(&["--reference", "/no/such.wav"]).contains("/no/such.wav"));
}

#[test]
fn weights_that_are_no_numbers_are_named_and_nothing_is_written() {
    let spoiled = checkpoint(|name, values| {
        if name == "transformer_blocks.1.attn.to_q.weight" {
            values[17] = f32::NAN;
        }
    });
    let out = spoiled.path().join("song.wav");
    let (status, told) = run(spoiled.path(), &out, &["--seconds", "1"]);
    assert_eq!(status, Some(2), "{told}");
    assert!(told.contains("transformer_blocks.1.attn.to_q.weight: found NaN at element 17"), "{told}");
    assert!(!out.exists());
}
