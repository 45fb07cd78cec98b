//! The command `ace-step` as a person or a program meets it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use engine::ace_step::checkpoint::{DCAE, TRANSFORMER, UMT5, VOCODER};
use engine::ace_step::preset::Configs;
use engine::ace_step::umt5;
use engine::audio::wav::Sound;
use engine::weights::{self, ExpectedTensors};
use serde_json::{Value, json};

use crate::fixture::folder;

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ace-step"));
    command.args(arguments).env("RUST_BACKTRACE", "0").output().unwrap()
}

/// Expects an exit status; standard output and standard error.
#[track_caller]
fn expect(status: i32, arguments: &[&str]) -> (String, String) {
    let output = run(arguments);
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(output.status.code(), Some(status), "{out}{err}");
    (out, err)
}

#[track_caller]
fn json_of(status: i32, arguments: &[&str]) -> Value {
    serde_json::from_str(&expect(status, arguments).0).unwrap()
}

#[test]
fn every_verb_has_help() {
    let (out, _) = expect(0, &["--help"]);
    for verb in ["demo", "generate", "shapes", "verify", "plan", "bench", "completions", "man"] {
        assert!(out.contains(verb), "{verb}");
        expect(0, &[verb, "--help"]);
    }
    expect(2, &["sing"]);
}

#[test]
fn the_demo_writes_sound_of_the_exact_length_and_its_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (wav, png) = (folder.path().join("song.wav"), folder.path().join("song.png"));
    let arguments = ["demo", "--seconds", "2", "--steps", "3", "--out", wav.to_str().unwrap()];
    let (out, _) = expect(0, &arguments);
    assert!(out.contains("random weights") && out.contains("noise, not music"), "{out}");
    assert!(out.contains("t = 1000.000"), "{out}");
    let sound = Sound::read(&wav).unwrap();
    // 2 s are 21 frames of a latent, of 4096 samples at 44.1 kHz.
    let samples = (21 * 4096 * 160_usize).div_ceil(147);
    assert_eq!((sound.channels.len(), sound.len(), sound.rate), (2, samples, 48000));
    assert!(sound.channels.iter().flatten().any(|sample| sample.abs() > 0.01));
    let picture = fs::read(&png).unwrap();
    assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n"));

    // The same seed is the same sound, another is another.
    let again = folder.path().join("again.wav");
    let told =
        json_of(0, &["--json", "demo", "--seconds", "2", "--steps", "3", "--out", again.to_str().unwrap()]);
    assert_eq!(told["samples"], samples);
    assert_eq!(told["random_weights"], true);
    assert_eq!(Sound::read(&again).unwrap(), sound);
    let mut other = arguments.to_vec();
    other.extend(["--seed", "1"]);
    expect(0, &other);
    assert_ne!(Sound::read(&wav).unwrap(), sound);
    expect(2, &["demo", "--seconds", "0", "--out", wav.to_str().unwrap()]);
    expect(2, &["demo", "--steps", "0", "--out", wav.to_str().unwrap()]);
}

#[test]
fn verify_names_what_is_absent_and_fails_where_nothing_is_or_something_is_off() {
    let fixtures = folder();
    let parts = ["--part", "schedulers", "--part", "guidance"];
    let mut arguments = vec!["--json", "verify", fixtures.to_str().unwrap()];
    arguments.extend(parts);
    let told = json_of(0, &arguments);
    assert_eq!(told["passed"], true);
    assert_eq!(told["parts"].as_array().unwrap().len(), 2);

    // A folder with one part, one number of which is another.
    let copy = tempfile::tempdir().unwrap();
    assert_eq!(json_of(1, &["--json", "verify", copy.path().to_str().unwrap()])["passed"], false);
    fs::create_dir(copy.path().join("guidance")).unwrap();
    for name in ["guidance.json", "guidance.safetensors"] {
        fs::copy(fixtures.join("guidance").join(name), copy.path().join("guidance").join(name)).unwrap();
    }
    let (out, _) = expect(0, &["verify", copy.path().to_str().unwrap()]);
    assert!(out.contains("absent  schedulers") && out.contains("1 of 1 parts pass"), "{out}");
    let file = copy.path().join("guidance/guidance.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x40;
    fs::write(&file, &bytes).unwrap();
    let (out, _) = expect(1, &["verify", copy.path().to_str().unwrap()]);
    assert!(out.contains("FAILED  guidance") && out.contains("first to fail"), "{out}");
    expect(2, &["verify", "/no/such/folder"]);
}

/// A SafeTensors file of a header and a hole: no disk is needed for gigabytes of weights.
fn write_header(path: &Path, shapes: &BTreeMap<String, Vec<usize>>, dtype: &str, size: usize) {
    let mut end = 0;
    let entries = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += shape.iter().product::<usize>() * size;
        (name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }))
    });
    let header = serde_json::to_vec(&entries.collect::<serde_json::Map<_, _>>()).unwrap();
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

fn of_expected(expected: &ExpectedTensors) -> BTreeMap<String, Vec<usize>> {
    expected.iter().map(|(name, wanted)| (name.clone(), wanted.shape.clone())).collect()
}

/// The headers of a released checkpoint, and its configurations as they were published.
fn released(folder: &Path) -> BTreeMap<String, BTreeMap<String, Vec<usize>>> {
    let fixtures = crate::fixture::folder();
    let shapes: BTreeMap<String, BTreeMap<String, Vec<usize>>> =
        serde_json::from_slice(&fs::read(fixtures.join("real_checkpoint_shapes.json")).unwrap()).unwrap();
    let mut umt5 = of_expected(
        &weights::expected(|weights| umt5::Encoder::new(&umt5::Config::released(), weights)).unwrap(),
    );
    // It is tied, and files leave it out.
    umt5.remove("encoder.embed_tokens.weight");
    let configs = [
        (TRANSFORMER, shapes["transformer"].clone(), "BF16", 2),
        (DCAE, shapes["dcae"].clone(), "BF16", 2),
        (VOCODER, shapes["vocoder"].clone(), "BF16", 2),
        (UMT5, umt5, "F32", 4),
    ];
    let mut all = BTreeMap::new();
    for (name, shapes, dtype, size) in configs {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("config.json"), config(name).to_string()).unwrap();
        let file = if name == UMT5 { "model.safetensors" } else { "diffusion_pytorch_model.safetensors" };
        write_header(&folder.join(name).join(file), &shapes, dtype, size);
        all.insert(name.to_owned(), shapes);
    }
    all
}

/// The published configurations: the keys of the fixtures', with the released values.
fn config(name: &str) -> Value {
    match name {
        TRANSFORMER => json!({
            "_class_name": "ACEStepTransformer2DModel", "in_channels": 8, "out_channels": 8, "num_layers": 24,
            "inner_dim": 2560, "attention_head_dim": 128, "num_attention_heads": 20, "mlp_ratio": 2.5,
            "max_height": 16, "max_width": 32768, "max_position": 32768, "patch_size": [16, 1],
            "rope_theta": 1000000.0, "speaker_embedding_dim": 512, "text_embedding_dim": 768,
            "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [1024, 768], "ssl_names": ["mert", "m-hubert"],
            "lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024,
        }),
        DCAE => json!({
            "_class_name": "AutoencoderDC", "in_channels": 2, "latent_channels": 8, "attention_head_dim": 32,
            "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [128, 256, 512, 1024], "decoder_block_out_channels": [128, 256, 512, 1024],
            "encoder_layers_per_block": [2, 2, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3],
            "encoder_qkv_multiscales": [[], [], [5], [5]], "decoder_qkv_multiscales": [[], [], [5], [5]],
            "upsample_block_type": "interpolate", "downsample_block_type": "Conv", "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu", "scaling_factor": 0.41407,
        }),
        VOCODER => json!({
            "_class_name": "ADaMoSHiFiGANV1", "input_channels": 128, "depths": [3, 3, 9, 3],
            "dims": [128, 256, 384, 512], "drop_path_rate": 0.0, "kernel_sizes": [7],
            "upsample_rates": [4, 4, 2, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11, 13],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5], [1, 3, 5]], "num_mels": 512,
            "upsample_initial_channel": 1024, "use_template": false, "pre_conv_kernel_size": 13,
            "post_conv_kernel_size": 13, "sampling_rate": 44100, "n_fft": 2048, "win_length": 2048,
            "hop_length": 512, "f_min": 40, "f_max": 16000, "n_mels": 128,
        }),
        _ => json!({
            "model_type": "umt5", "vocab_size": 256384, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
            "num_heads": 12, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
        }),
    }
}

#[test]
fn shapes_accepts_exactly_the_released_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let all = released(folder.path());
    let told = json_of(0, &["--json", "shapes", path]);
    assert_eq!(told["right"], true);
    let of = |told: &Value, index: usize, key: &str| told["components"][index][key].clone();
    assert_eq!([0, 1, 2].map(|index| of(&told, index, "tensors")), [874, 192, 713].map(Value::from));
    assert_eq!(of(&told, 0, "parameters"), 3_305_659_264u64);
    let (out, _) = expect(0, &["shapes", path]);
    assert_eq!(out.matches("right").count(), 4, "{out}");

    // Of one tensor the name, of another the shape, of a third neither.
    let mut shapes = all[TRANSFORMER].clone();
    let moved = shapes.remove("t_block.1.weight").unwrap();
    shapes.insert("t_block.2.weight".into(), moved);
    shapes.insert("lyric_embs.weight".into(), vec![6692, 1024]);
    let file = folder.path().join(TRANSFORMER).join("diffusion_pytorch_model.safetensors");
    write_header(&file, &shapes, "BF16", 2);
    let told = json_of(1, &["--json", "shapes", path]);
    let names: Vec<&str> = told["components"][0]["mismatches"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["tensor"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["lyric_embs.weight", "t_block.1.weight", "t_block.2.weight"]);
    let (out, _) = expect(1, &["shapes", path]);
    assert!(out.contains("lyric_embs.weight: found shape [6692, 1024], needed shape [6693, 1024]"), "{out}");

    // Weights are floats.
    write_header(&file, &all[TRANSFORMER], "I16", 2);
    assert!(expect(1, &["shapes", path]).0.contains("I16, which is no type of weights"));
    // A folder that is none.
    fs::remove_dir_all(folder.path().join(UMT5)).unwrap();
    assert!(expect(1, &["shapes", path]).0.contains("umt5-base"));
}

#[test]
fn generate_says_what_it_needs_before_it_loads_anything() {
    let folder = tempfile::tempdir().unwrap();
    released(folder.path());
    let path = folder.path().to_str().unwrap();
    let out = folder.path().join("song.wav");
    let song = ["generate", "--checkpoint", path, "--prompt", "piano", "--out", out.to_str().unwrap()];
    let refused = |more: &[&str]| {
        let arguments: Vec<&str> = song.iter().chain(more).copied().collect();
        expect(2, &arguments).1
    };
    // The headers are right, and there is no tokenizer.
    assert!(refused(&[]).contains("tokenizer.json"), "{}", refused(&[]));
    assert!(refused(&["--steps", "0"]).contains("infer_steps: found 0, needed 1 to 1000"));
    assert!(refused(&["--guidance-interval", "2"]).contains("guidance_interval"));
    assert!(refused(&["--repaint", "1..2"]).contains("--source"));
    assert!(refused(&["--reference", "a.wav", "--retake", "0.5"]).contains("cannot be used with"));
    let missing = ["generate", "--checkpoint", "/no/such", "--prompt", "piano", "--out", "song.wav"];
    assert!(expect(2, &missing).1.contains("/no/such"));
    assert!(!out.exists());
}

#[test]
fn plans_grow_with_length_and_steps() {
    let plan =
        |seconds: &str, steps: &str| json_of(0, &["--json", "plan", "--seconds", seconds, "--steps", steps]);
    let operations = |plan: &Value| plan["plan"]["stages"][1]["operations"].as_u64().unwrap();
    let minute = plan("60", "27");
    assert_eq!(minute["plan"]["frames"], 645);
    // 27 steps, of which 14 are guided, as the specification counts them: 40 to 41 runs.
    assert_eq!(minute["plan"]["decodes"], 27 + 14);
    assert!(operations(&plan("60", "60")) > 2 * operations(&minute));
    assert!(operations(&plan("120", "27")) > 2 * operations(&minute) - operations(&minute) / 10);
    // 2.59 billion parameters of two bytes each.
    let weights = minute["plan"]["stages"][1]["weights"].as_u64().unwrap();
    assert!((5_170_000_000..5_190_000_000).contains(&weights), "{weights}");
    let Configs { transformer, .. } = Configs::released();
    assert_eq!(transformer.inner_dim(), 2560);
    expect(2, &["plan", "--seconds", "0"]);
}
