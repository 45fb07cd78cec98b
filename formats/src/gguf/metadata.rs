//! The hyper-parameters as GGUF metadata.
//!
//! The header's YaRN words are computed, so GGUF's keys hold a config that gives them again, with the fewest digits.
//! GGUF's numbers are f32 and its initial context length an integer, so that is not always possible; therefore the
//! header itself is stored as well ([`HEADER`]), and used where the other keys say the same.

use std::io::Cursor;

use binrw::{BinRead, BinWrite};
use serde_json::{Map, Number};

use super::container::{Array, Container, Entry, Value};
use crate::checkpoint::config::{Config, recover};
use crate::model_bin::header::ModelHeader;
use crate::model_bin::verify::check_model_header;
use crate::rules::Rule;
use crate::violation::Violation;

/// The section that violations name.
const SECTION: &str = "GGUF metadata";

/// The 68 bytes of the model header: our own key.
const HEADER: &str = "burn_extended.model_header";
const ARCHITECTURE: &str = "general.architecture";
const CONTEXT_LENGTH: &str = "gpt-oss.context_length";
const EPSILON: &str = "gpt-oss.attention.layer_norm_rms_epsilon";
const SCALING_TYPE: &str = "gpt-oss.rope.scaling.type";
const VALUE_LENGTH: &str = "gpt-oss.attention.value_length";

/// How GGUF stores a number.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    U32,
    F32,
    /// F32; not every file has it.
    OptionalF32(f32),
}

/// GGUF's keys and the original config's.
const KEYS: &[(&str, &str, Form)] = &[
    ("gpt-oss.block_count", "num_hidden_layers", Form::U32),
    ("gpt-oss.embedding_length", "hidden_size", Form::U32),
    ("gpt-oss.expert_feed_forward_length", "intermediate_size", Form::U32),
    ("gpt-oss.attention.head_count", "num_attention_heads", Form::U32),
    ("gpt-oss.attention.head_count_kv", "num_key_value_heads", Form::U32),
    ("gpt-oss.attention.key_length", "head_dim", Form::U32),
    ("gpt-oss.attention.sliding_window", "sliding_window", Form::U32),
    ("gpt-oss.expert_count", "num_experts", Form::U32),
    ("gpt-oss.expert_used_count", "experts_per_token", Form::U32),
    ("gpt-oss.rope.freq_base", "rope_theta", Form::F32),
    ("gpt-oss.rope.scaling.factor", "rope_scaling_factor", Form::F32),
    ("gpt-oss.rope.scaling.original_context_length", "initial_context_length", Form::U32),
    ("gpt-oss.rope.scaling.yarn_beta_slow", "rope_ntk_alpha", Form::OptionalF32(1.0)),
    ("gpt-oss.rope.scaling.yarn_beta_fast", "rope_ntk_beta", Form::OptionalF32(32.0)),
];

/// The metadata of a model, without its vocabulary.
pub(super) fn entries(header: &ModelHeader, name: Option<&str>) -> Vec<Entry> {
    let mut entries = vec![entry(ARCHITECTURE, Value::String("gpt-oss".into()))];
    entries.extend(name.map(|name| entry("general.name", Value::String(name.into()))));
    entries.push(entry("general.quantization_version", Value::U32(2)));
    entries.push(entry("general.file_type", Value::U32(38))); // ggml's "mostly MXFP4, MoE"
    entries.extend(model_entries(header));
    let mut bytes = Cursor::new(Vec::new());
    // Writing to memory does not fail.
    if header.write(&mut bytes).is_ok() {
        entries.push(entry(HEADER, Value::Array(Array::U8(bytes.into_inner()))));
    }
    entries
}

/// The `gpt-oss.` keys.
fn model_entries(header: &ModelHeader) -> Vec<Entry> {
    let config = recover(header).json;
    let number = |key| config.get(key).and_then(serde_json::Value::as_f64).unwrap_or_default();
    let mut entries = vec![
        entry(CONTEXT_LENGTH, Value::U32(header.context_length)),
        entry(VALUE_LENGTH, Value::U32(header.head_dim)),
        entry("gpt-oss.feed_forward_length", Value::U32(header.mlp_dim)),
        entry(EPSILON, Value::F32(header.rmsnorm_epsilon)),
        entry(SCALING_TYPE, Value::String("yarn".into())),
    ];
    entries.extend(KEYS.iter().map(|&(key, original, form)| {
        let value = number(original);
        entry(
            key,
            if form == Form::U32 { Value::U32(value.round() as u32) } else { Value::F32(value as f32) },
        )
    }));
    entries
}

/// The header that a file's metadata describes.
pub(super) fn header(container: &Container) -> Result<ModelHeader, Vec<Violation>> {
    let mut violations = Vec::new();
    for (key, needed) in [(ARCHITECTURE, "gpt-oss"), (SCALING_TYPE, "yarn")] {
        match string(container, key) {
            Ok(found) if found == needed => {}
            Ok(found) => violations.push(violation(Rule::SourceConfig, key, found.into(), needed)),
            Err(missing) => violations.extend(missing),
        }
    }
    if !violations.is_empty() {
        return Err(violations);
    }
    let header = match container.value(HEADER) {
        Some(stored) => stored_header(container, stored)?,
        None => computed_header(container)?,
    };
    // Keys that agree with each other can still say what no header may say.
    let broken = check_model_header(&header);
    if broken.is_empty() {
        return Ok(header);
    }
    let refusal = |broken: Violation| {
        violation(Rule::SourceConfig, HEADER, format!("{} {}", broken.field, broken.found), &broken.needed)
    };
    Err(broken.into_iter().map(refusal).collect())
}

/// The header that the file holds, if it is sound and the other keys are those that we write with it.
fn stored_header(container: &Container, stored: &Value) -> Result<ModelHeader, Vec<Violation>> {
    let header = match stored {
        Value::Array(Array::U8(bytes)) if bytes.len() == 68 => {
            ModelHeader::read(&mut Cursor::new(bytes)).ok()
        }
        _ => None,
    };
    let Some(header) = header else {
        return Err(vec![violation(
            Rule::SourceConfig,
            HEADER,
            "another value".into(),
            "68 bytes in an array of u8",
        )]);
    };
    parse(&recover(&header).json)?;
    let mut violations = Vec::new();
    for expected in model_entries(&header) {
        let found = container.value(&expected.key.0);
        let same = match (found, &expected.value) {
            // They are computed with logarithms, whose last digit may differ from machine to machine.
            (Some(Value::F32(found)), Value::F32(needed)) => {
                found.to_bits() == needed.to_bits() || (found - needed).abs() <= needed.abs() * 1e-6
            }
            (found, needed) => found == Some(needed),
        };
        if !same {
            let found = found.map_or("no such key".into(), |value| format!("{value:?}"));
            let needed = format!("{:?}, which {HEADER} says", expected.value);
            violations.push(violation(Rule::SourceConfig, &expected.key.0, found, &needed));
        }
    }
    if violations.is_empty() { Ok(header) } else { Err(violations) }
}

/// The header of a file that somebody else wrote, by the exporter's formulas.
fn computed_header(container: &Container) -> Result<ModelHeader, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut number = |key: &str, form: Form| match (container.value(key), form) {
        (Some(Value::U32(value)), Form::U32) => Number::from(*value),
        // A config's number has the fewest digits that give the f32.
        (Some(Value::F32(value)), Form::F32 | Form::OptionalF32(_)) if value.is_finite() => decimal(*value),
        (None, Form::OptionalF32(default)) => decimal(default),
        (found, form) => {
            let found = found.map_or("no such key".into(), |value| format!("{value:?}"));
            let needed = if form == Form::U32 { "a u32" } else { "a finite f32" };
            violations.push(violation(Rule::SourceConfig, key, found, needed));
            Number::from(0)
        }
    };
    let mut json = Map::new();
    for &(key, original, form) in KEYS {
        json.insert(original.into(), number(key, form).into());
    }
    let context_length = number(CONTEXT_LENGTH, Form::U32);
    let epsilon = number(EPSILON, Form::F32);
    let value_length = number(VALUE_LENGTH, Form::U32);
    if json.get("head_dim").and_then(serde_json::Value::as_u64) != value_length.as_u64() {
        let found = value_length.to_string();
        violations.push(violation(
            Rule::SourceConfig,
            VALUE_LENGTH,
            found,
            "as many as gpt-oss.attention.key_length",
        ));
    }
    if context_length.as_u64() == Some(0) {
        violations.push(violation(Rule::SourceConfig, CONTEXT_LENGTH, "0".into(), "at least 1"));
    }
    if !violations.is_empty() {
        return Err(violations);
    }
    let mut header = parse(&json)?.header().map_err(with_gguf_keys)?;
    header.context_length = context_length.as_u64().unwrap_or_default() as u32;
    header.rmsnorm_epsilon = epsilon.as_f64().unwrap_or_default() as f32;
    if header.rmsnorm_epsilon > 0.0 {
        Ok(header)
    } else {
        Err(vec![violation(Rule::SourceConfig, EPSILON, epsilon.to_string(), "a positive number")])
    }
}

/// Reads a config, which checks its sizes.
fn parse(json: &Map<String, serde_json::Value>) -> Result<Config, Vec<Violation>> {
    Config::parse(&serde_json::to_vec(json).unwrap_or_default()).map_err(with_gguf_keys)
}

/// Violations of a config as those of the GGUF keys that it was made from.
fn with_gguf_keys(mut violations: Vec<Violation>) -> Vec<Violation> {
    for violation in &mut violations {
        if let Some((key, ..)) = KEYS.iter().find(|(_, original, _)| *original == violation.field) {
            violation.field = (*key).into();
        }
        violation.section = SECTION.into();
    }
    violations
}

/// The shortest decimal number that is this f32.
fn decimal(value: f32) -> Number {
    value.to_string().parse().ok().and_then(Number::from_f64).unwrap_or_else(|| 0.into())
}

/// The string under a key.
pub(super) fn string<'a>(container: &'a Container, key: &str) -> Result<&'a str, Vec<Violation>> {
    match container.value(key) {
        Some(Value::String(text)) => Ok(&text.0),
        other => {
            let found = if other.is_some() { "another type" } else { "no such key" };
            Err(vec![violation(Rule::SourceConfig, key, found.into(), "a string")])
        }
    }
}

pub(super) fn entry(key: &str, value: Value) -> Entry {
    Entry { key: key.into(), value }
}

pub(super) fn violation(rule: Rule, field: &str, found: String, needed: &str) -> Violation {
    Violation {
        rule,
        section: SECTION.into(),
        field: field.into(),
        range: 0..0,
        found,
        needed: needed.into(),
    }
}
