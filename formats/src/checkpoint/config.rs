//! `config.json`: what the model header is computed from.
//!
//! Keys are those of the original checkpoint or Hugging Face's; where a config has both, they must agree. Values are
//! computed in binary64 in the genuine exporter's order of operations and rounded once to binary32 (`WR-HEADER`).

mod recover;

use std::f64::consts::PI;

use serde_json::{Map, Number, Value};

pub use recover::{Recovered, recover};

use crate::model_bin::header::{HEAD_DIM, ModelHeader, NUM_ACTIVE_EXPERTS};
use crate::rules::Rule;
use crate::violation::Violation;

/// The name of the file, and the section that its violations name.
pub const FILE: &str = "config.json";

/// ε of RMSNorm: the genuine exporter writes this constant and reads no key for it.
const RMSNORM_EPSILON: f64 = 1e-5;

/// A checkpoint's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    num_hidden_layers: u32,
    num_experts: u32,
    hidden_size: u32,
    intermediate_size: u32,
    head_dim: u32,
    num_attention_heads: u32,
    num_key_value_heads: u32,
    sliding_window: u32,
    swiglu_limit: Entry,
    initial_context_length: Entry,
    rope_theta: Entry,
    rope_scaling_factor: Entry,
    rope_ntk_alpha: Entry,
    rope_ntk_beta: Entry,
}

/// A number and the key that it was found under. Kept as JSON has it, since integers multiply exactly in Python.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    key: &'static str,
    number: Number,
}

impl Entry {
    fn value(&self) -> f64 {
        self.number.as_f64().unwrap_or(f64::NAN)
    }
}

impl Config {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Every key that is missing, of the wrong type, out of range, or that describes a model which the format cannot
    /// hold: `SRC-CONFIG`, `SRC-MULTIPLE-32`, `SRC-EXPERTS`, `SRC-ACTIVE-EXPERTS`.
    pub fn parse(json: &[u8]) -> Result<Config, Vec<Violation>> {
        match Config::read(json) {
            (Some(config), violations) if violations.is_empty() => Ok(config),
            (_, violations) => Err(violations),
        }
    }

    /// As [`Config::parse`], but yields a config wherever its sizes can be trusted, released values standing in for
    /// other numbers that cannot, so that tensors can be checked as well.
    pub(super) fn read(json: &[u8]) -> (Option<Config>, Vec<Violation>) {
        let root: Map<String, Value> = match serde_json::from_slice(json) {
            Ok(root) => root,
            Err(error) => return (None, vec![unreadable(json, &error)]),
        };
        let mut reader = Reader { hugging_face: is_hugging_face(&root), root: &root, violations: Vec::new() };
        let config = reader.config();
        (config, reader.violations)
    }

    /// The model header of this config.
    ///
    /// # Errors
    /// `SRC-CONFIG`, naming the key, for each value with which a header would break a `HDR-*` rule.
    pub fn header(&self) -> Result<ModelHeader, Vec<Violation>> {
        let header = self.unchecked_header();
        let mut violations = Vec::new();
        let mut check = |holds: bool, entry: &Entry, needed: &str| {
            if !holds {
                violations.push(broken(
                    Rule::SourceConfig,
                    entry.key,
                    entry.number.to_string(),
                    needed.into(),
                ));
            }
        };
        let (context, factor) = (&self.initial_context_length, &self.rope_scaling_factor);
        let positive = |value: f32| value.is_finite() && value > 0.0;
        check(positive(header.swiglu_limit), &self.swiglu_limit, "a positive number within f32");
        let theta = header.rope_theta;
        check(theta.is_finite() && theta > 1.0, &self.rope_theta, "a number above 1 within f32");
        check(
            positive(header.interpolation_scale),
            factor,
            "a factor whose reciprocal is positive within f32",
        );
        check(positive(header.yarn_multiplier), factor, "a factor for which 0.1·ln(factor) + 1 is positive");
        let (alpha, beta) = (&self.rope_ntk_alpha, &self.rope_ntk_beta);
        if positive(header.rope_theta - 1.0) {
            let needed = format!("a number below {} = {}", beta.key, beta.number);
            check(positive(header.yarn_scale), alpha, &needed);
            if positive(header.yarn_scale) {
                check(
                    header.yarn_offset.is_finite(),
                    alpha,
                    "a number for which yarn_offset is finite within f32",
                );
            }
        }
        if !(1.0..4_294_967_296.0).contains(&self.context_product()) {
            let found = format!("{} × {} {}", context.number, factor.key, factor.number);
            let needed = "a product from 1 to 4294967295".into();
            violations.push(broken(Rule::SourceConfig, context.key, found, needed));
        }
        if violations.is_empty() { Ok(header) } else { Err(violations) }
    }

    /// `initial_context_length × rope_scaling_factor`, as Python multiplies: integers exactly, otherwise in binary64.
    fn context_product(&self) -> f64 {
        let (context, factor) = (&self.initial_context_length, &self.rope_scaling_factor);
        match (context.number.as_u64(), factor.number.as_u64()) {
            // What rounds here is far above 2^32.
            (Some(context), Some(factor)) => (u128::from(context) * u128::from(factor)) as f64,
            _ => context.value() * factor.value(),
        }
    }

    /// The header, whatever rules it breaks.
    pub(super) fn unchecked_header(&self) -> ModelHeader {
        let yarn = Yarn::new(
            self.initial_context_length.value(),
            self.rope_theta.value(),
            self.rope_ntk_alpha.value(),
            self.rope_ntk_beta.value(),
        );
        let factor = self.rope_scaling_factor.value();
        ModelHeader {
            context_length: self.context_product() as u32,
            num_blocks: self.num_hidden_layers,
            num_experts: self.num_experts,
            num_active_experts: NUM_ACTIVE_EXPERTS,
            embedding_dim: self.hidden_size,
            mlp_dim: self.intermediate_size,
            swiglu_limit: self.swiglu_limit.value() as f32,
            head_dim: self.head_dim,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            attention_window: self.sliding_window,
            rope_theta: self.rope_theta.value() as f32,
            interpolation_scale: interpolation_scale(factor),
            yarn_offset: yarn.offset,
            yarn_scale: yarn.scale,
            yarn_multiplier: yarn_multiplier(factor),
            rmsnorm_epsilon: RMSNORM_EPSILON as f32,
        }
    }
}

/// The two words of YaRN's ramp.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Yarn {
    offset: f32,
    scale: f32,
}

impl Yarn {
    /// low and high are the indices of the frequencies that turn β and α times within the initial context.
    fn new(context: f64, theta: f64, alpha: f64, beta: f64) -> Yarn {
        let index = |turns: f64| f64::from(HEAD_DIM) / 2.0 * (context / (turns * 2.0 * PI)).ln() / theta.ln();
        let (low, high) = (index(beta), index(alpha));
        Yarn { offset: (-low / (high - low)) as f32, scale: (1.0 / (high - low)) as f32 }
    }
}

fn interpolation_scale(factor: f64) -> f32 {
    (1.0 / factor) as f32
}

fn yarn_multiplier(factor: f64) -> f32 {
    (0.1 * factor.ln() + 1.0) as f32
}

fn broken(rule: Rule, key: &str, found: String, needed: String) -> Violation {
    Violation { rule, section: FILE.into(), field: key.into(), range: 0..0, found, needed }
}

/// The first characters of a text from an input, for a message.
pub(super) fn excerpt(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

/// Text that is no JSON object, such as one with Python's `NaN`. Names the last key before the error where it can.
fn unreadable(json: &[u8], error: &serde_json::Error) -> Violation {
    let before: Vec<&[u8]> = json.split(|&byte| byte == b'\n').take(error.line()).collect();
    let (last, lines) = before.split_last().map_or((&[][..], &[][..]), |(last, lines)| (*last, lines));
    let end = lines.iter().map(|line| line.len() + 1).sum::<usize>() + error.column().min(last.len());
    let before = String::from_utf8_lossy(json.get(..end).unwrap_or_default());
    let key =
        before.rsplit_once(':').and_then(|(head, _)| head.trim_end().strip_suffix('"')?.rsplit('"').next());
    let field = key.map_or_else(|| FILE.into(), excerpt);
    broken(
        Rule::SourceConfig,
        &field,
        format!("a JSON error: {error}"),
        "a JSON object of finite numbers".into(),
    )
}

fn is_hugging_face(root: &Map<String, Value>) -> bool {
    ["num_local_experts", "rope_scaling", "rope_parameters", "model_type"]
        .iter()
        .any(|key| root.contains_key(*key))
}

/// Takes keys from a config and collects what is wrong with them.
struct Reader<'a> {
    root: &'a Map<String, Value>,
    hugging_face: bool,
    violations: Vec<Violation>,
}

/// The places of a value: the original key first, then Hugging Face's.
type Keys = &'static [&'static str];

impl<'a> Reader<'a> {
    fn config(&mut self) -> Option<Config> {
        // Python's `range` takes no blocks at all; so does the format.
        let num_hidden_layers = self.size(&["num_hidden_layers"]);
        let num_experts = self.size(&["num_experts", "num_local_experts"]);
        let hidden_size = self.size(&["hidden_size"]);
        let intermediate_size = self.size(&["intermediate_size"]);
        let head_dim = self.size(&["head_dim"]);
        let num_attention_heads = self.size(&["num_attention_heads"]);
        let num_key_value_heads = self.size(&["num_key_value_heads"]);
        let sliding_window = self.size(&["sliding_window"]);

        // Multiples first: without them no tensor has a shape.
        let mut sound = true;
        for (key, size) in [hidden_size, intermediate_size].into_iter().flatten() {
            sound &= self.check(
                Rule::SourceMultiple,
                key,
                size,
                size > 0 && size.is_multiple_of(32),
                "a positive multiple of 32",
            );
        }
        if let Some((key, size)) = num_experts {
            self.check(Rule::SourceExperts, key, size, size >= NUM_ACTIVE_EXPERTS, "at least 4");
        }
        if let Some((key, size)) = head_dim {
            self.check(Rule::SourceConfig, key, size, size == HEAD_DIM, "64");
        }
        for (key, size) in [num_attention_heads, sliding_window].into_iter().flatten() {
            self.check(Rule::SourceConfig, key, size, size > 0, "at least 1");
        }
        if let Some((key, size)) = num_key_value_heads {
            let heads = num_attention_heads.map_or(0, |(_, heads)| heads);
            let divides = size > 0 && heads.is_multiple_of(size);
            self.check(
                Rule::SourceConfig,
                key,
                size,
                divides,
                &format!("a divisor of num_attention_heads = {heads}"),
            );
        }
        const ACTIVE: [Keys; 2] = [&["experts_per_token"], &["num_experts_per_tok"]];
        for keys in ACTIVE {
            // The exporter needs neither.
            if keys.iter().any(|key| self.root.contains_key(*key))
                && let Some((key, size)) = self.size(keys)
            {
                self.check(Rule::SourceActiveExperts, key, size, size == NUM_ACTIVE_EXPERTS, "4");
            }
        }

        let swiglu_limit = self.number(&["swiglu_limit"], Some(7.0), 7.0);
        let rope_theta = self.number(
            &["rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta"],
            None,
            150_000.0,
        );
        let initial_context_length = self.number(
            &[
                "initial_context_length",
                "rope_scaling.original_max_position_embeddings",
                "rope_parameters.original_max_position_embeddings",
            ],
            self.hugging_face.then_some(4096.0),
            4096.0,
        );
        let rope_scaling_factor = self.number(
            &["rope_scaling_factor", "rope_scaling.factor", "rope_parameters.factor"],
            None,
            32.0,
        );
        // transformers has these defaults for YaRN; the original config must have the keys.
        let rope_ntk_alpha = self.number(
            &["rope_ntk_alpha", "rope_scaling.beta_slow", "rope_parameters.beta_slow"],
            self.hugging_face.then_some(1.0),
            1.0,
        );
        let rope_ntk_beta = self.number(
            &["rope_ntk_beta", "rope_scaling.beta_fast", "rope_parameters.beta_fast"],
            self.hugging_face.then_some(32.0),
            32.0,
        );
        self.constants(num_hidden_layers.map(|(_, layers)| layers));

        if !sound {
            return None;
        }
        Some(Config {
            num_hidden_layers: num_hidden_layers?.1,
            num_experts: num_experts?.1,
            hidden_size: hidden_size?.1,
            intermediate_size: intermediate_size?.1,
            head_dim: head_dim?.1,
            num_attention_heads: num_attention_heads?.1,
            num_key_value_heads: num_key_value_heads?.1,
            sliding_window: sliding_window?.1,
            swiglu_limit,
            initial_context_length,
            rope_theta,
            rope_scaling_factor,
            rope_ntk_alpha,
            rope_ntk_beta,
        })
    }

    /// Keys that the header has no field for: their values must be those that the format implies.
    fn constants(&mut self, layers: Option<u32>) {
        let constants = [
            ("attention_bias", Value::Bool(true), "true: the format has a bias behind each projection"),
            ("tie_word_embeddings", Value::Bool(false), "false: the format has both embeddings"),
            ("hidden_act", "silu".into(), "\"silu\", the activation that the runtime has"),
            ("rms_norm_eps", RMSNORM_EPSILON.into(), "1e-5, the constant that the exporter writes"),
            ("rope_type", "yarn".into(), "\"yarn\", the scaling that the header describes"),
            ("truncate", Value::Bool(false), "false: the runtime does not round YaRN's ramp"),
            ("attention_factor", Value::Null, "no value: the header's multiplier is 0.1·ln(factor) + 1"),
            ("mscale", Value::Null, "no value: the header's multiplier is 0.1·ln(factor) + 1"),
        ];
        let scaling = |key| self.root.get(key).and_then(Value::as_object).map(|object| (Some(key), object));
        let objects = [Some((None, self.root)), scaling("rope_scaling"), scaling("rope_parameters")];
        for (prefix, object) in objects.into_iter().flatten() {
            for (key, allowed, needed) in &constants {
                if let Some(value) = object.get(*key)
                    && value != allowed
                {
                    let key = prefix.map_or_else(|| (*key).into(), |prefix| format!("{prefix}.{key}"));
                    self.violations.push(broken(Rule::SourceConfig, &key, shown(value), (*needed).into()));
                }
            }
        }
        if let Some(value) = self.root.get("layer_types") {
            let expected = |index: usize| {
                if index.is_multiple_of(2) { "sliding_attention" } else { "full_attention" }
            };
            let alternates = value.as_array().is_some_and(|types| {
                layers.is_none_or(|layers| types.len() as u64 == u64::from(layers))
                    && types.iter().enumerate().all(|(index, kind)| kind.as_str() == Some(expected(index)))
            });
            if !alternates {
                let needed = "sliding_attention and full_attention in turn, one for each hidden layer".into();
                self.violations.push(broken(Rule::SourceConfig, "layer_types", shown(value), needed));
            }
        }
    }

    fn at(&self, key: &str) -> Option<&'a Value> {
        match key.split_once('.') {
            Some((object, key)) => self.root.get(object)?.as_object()?.get(key),
            None => self.root.get(key),
        }
    }

    /// The first place that has a value, and its value; a violation where another place disagrees.
    fn find(&mut self, keys: Keys) -> Option<(&'static str, &'a Value)> {
        let mut present = keys.iter().filter_map(|key| self.at(key).map(|value| (*key, value)));
        let first @ (first_key, value) = present.next()?;
        let other = present
            .find(|(_, other)| *other != value && (other.as_f64() != value.as_f64() || !value.is_number()));
        if let Some((key, other)) = other {
            let needed = format!("{}, which {first_key} has", shown(value));
            self.violations.push(broken(Rule::SourceConfig, key, shown(other), needed));
        }
        Some(first)
    }

    /// What a missing value's key would be called in this config.
    fn missing(&mut self, keys: Keys, needed: &str) {
        let nested =
            |key: &&&str| key.split_once('.').is_some_and(|(object, _)| self.root.contains_key(object));
        let flat = keys.iter().rfind(|key| self.hugging_face && !key.contains('.'));
        let key = keys.iter().find(nested).or(flat).or(keys.first()).copied().unwrap_or_default();
        self.violations.push(broken(Rule::SourceConfig, key, "no such key".into(), needed.into()));
    }

    fn size(&mut self, keys: Keys) -> Option<(&'static str, u32)> {
        const NEEDED: &str = "an integer from 0 to 4294967295";
        let Some((key, value)) = self.find(keys) else {
            self.missing(keys, NEEDED);
            return None;
        };
        let size = value.as_u64().and_then(|size| u32::try_from(size).ok());
        if size.is_none() {
            self.violations.push(broken(Rule::SourceConfig, key, shown(value), NEEDED.into()));
        }
        size.map(|size| (key, size))
    }

    /// A finite positive number; `stand_in` after a violation.
    fn number(&mut self, keys: Keys, default: Option<f64>, stand_in: f64) -> Entry {
        const NEEDED: &str = "a positive number";
        let entry = |key, value| Entry { key, number: Number::from_f64(value).unwrap_or_else(|| 0.into()) };
        let name = keys.first().copied().unwrap_or_default();
        match (self.find(keys), default) {
            (Some((key, Value::Number(number))), _) if number.as_f64().is_some_and(|value| value > 0.0) => {
                Entry { key, number: number.clone() }
            }
            (Some((key, value)), _) => {
                self.violations.push(broken(Rule::SourceConfig, key, shown(value), NEEDED.into()));
                entry(key, stand_in)
            }
            (None, Some(default)) => entry(name, default),
            (None, None) => {
                self.missing(keys, NEEDED);
                entry(name, stand_in)
            }
        }
    }

    fn check(&mut self, rule: Rule, key: &str, size: u32, holds: bool, needed: &str) -> bool {
        if !holds {
            self.violations.push(broken(rule, key, size.to_string(), needed.into()));
        }
        holds
    }
}

fn shown(value: &Value) -> String {
    excerpt(&value.to_string())
}

#[cfg(test)]
mod tests;
