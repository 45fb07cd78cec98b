//! Unfit configurations are refused before anything is loaded, with the field, what was found and what was needed.

use std::fs;
use std::path::Path;

use engine::backend::{Backend, Float};
use engine::gpt_oss::{Config, LoadOptions, Model, Residency};
use formats::model_bin::{Stored, StoredOptions};
use serde_json::{Value, json};

fn source() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gpt-oss/checkpoints/two-blocks")
}

/// The checkpoint with its configuration changed.
fn open(
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> Result<(tempfile::TempDir, Stored), String> {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(source()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(&path, config.to_string()).unwrap();
    let stored = Stored::open(folder.path(), &StoredOptions::default(), &());
    stored.map(|stored| (folder, stored)).map_err(|error| error.to_string())
}

#[test]
fn missing_and_contradicting_fields_are_named() {
    let refusal = |field: &str, value: Option<Value>| {
        let changed = open(|config| match value {
            Some(value) => drop(config.insert(field.into(), value)),
            None => drop(config.remove(field)),
        });
        changed.err().unwrap_or_else(|| panic!("{field} was accepted"))
    };
    for field in ["num_hidden_layers", "num_experts", "head_dim", "num_attention_heads", "rope_theta"] {
        let error = refusal(field, None);
        assert!(error.contains(field), "{field}: {error}");
    }
    for (field, value, named) in [
        // Contradicts the tensors.
        ("hidden_size", json!(96), "64"),
        ("intermediate_size", json!(64), "mlp1"),
        ("num_experts", json!(9), "needed [9, 64]"),
        ("num_hidden_layers", json!(3), "block.2"),
        ("num_attention_heads", json!(6), "qkv"),
        ("num_key_value_heads", json!(3), "num_key_value_heads"),
        // Breaks a rule of the header.
        ("head_dim", json!(128), "head_dim: found 128, needed 64"),
        ("sliding_window", json!(0), "sliding_window: found 0"),
        ("rope_theta", json!(1), "rope_theta"),
        ("rope_scaling_factor", json!(0), "rope_scaling_factor"),
        ("swiglu_limit", json!(-7), "swiglu_limit: found -7"),
        ("experts_per_token", json!(2), "experts_per_token"),
        ("hidden_size", json!("wide"), "hidden_size"),
    ] {
        let error = refusal(field, Some(value.clone()));
        assert!(error.contains(named), "{field} = {value}: {error}");
    }
}

#[test]
fn the_default_of_the_limit_is_the_exporters() {
    let (_folder, stored) = open(|config| drop(config.remove("swiglu_limit"))).unwrap();
    assert_eq!(Config::new(stored.header(), stored.dims()).unwrap().swiglu_limit, 7.0);
}

#[test]
fn a_context_of_two_to_the_31_is_refused_by_the_engine_only() {
    let (_folder, stored) =
        open(|config| drop(config.insert("initial_context_length".into(), json!(1u32 << 26)))).unwrap();
    let error = Config::new(stored.header(), stored.dims()).unwrap_err().to_string();
    assert_eq!(error, "context_length: found 2147483648, needed less than 2^31");
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers_and_nothing_is_loaded() {
    let stored = Stored::open(&source(), &StoredOptions::default(), &()).unwrap();
    let cpu = Backend::Cpu.open().unwrap();
    let options = LoadOptions { memory: Some(100_000), ..LoadOptions::default() };
    let error = Model::load(&stored, &options, &cpu, &()).err().unwrap();
    assert!(matches!(error, engine::Error::Memory { available: 100_000, .. }), "{error}");
    let plan = Residency::plan(&stored, &options, &cpu).unwrap();
    // By hand: 300 x 64 embedding and unembedding as they are stored, or in f32; 8 x (64 x 64 + 64 x 32) experts in 17/32
    // bytes, twice.
    assert_eq!(plan.parts[0].bytes, 2 * 300 * 64 * 2);
    let plain =
        Residency::plan(&stored, &LoadOptions { plain_tensors: true, ..options.clone() }, &cpu).unwrap();
    assert_eq!(plain.parts[0].bytes, 2 * 300 * 64 * 4);
    for plan in [plan, plain] {
        assert_eq!(plan.parts[3].bytes, 2 * 8 * (64 * 64 + 64 * 32) * 17 / 32);
    }
    let dequantized = LoadOptions { dequantize: true, weights: Some(Float::Bf16), ..options };
    let plan = Residency::plan(&stored, &dequantized, &cpu).unwrap();
    assert_eq!(plan.parts[3].bytes, 2 * 8 * (64 * 64 + 64 * 32) * 2);
    assert!(plan.to_string().contains("available"));
}

#[test]
fn a_context_longer_than_the_models_is_refused() {
    let stored = Stored::open(&source(), &StoredOptions::default(), &()).unwrap();
    let cpu = Backend::Cpu.open().unwrap();
    for context in [0, 131_073] {
        let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
        let error = Residency::plan(&stored, &options, &cpu).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("--context: found {context}, needed 1 to 131072, the model's context length")
        );
    }
}
