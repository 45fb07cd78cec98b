//! From a model header back to a config in the original layout.

use std::f64::consts::PI;

use serde_json::{Map, Number, Value};

use super::{Config, Yarn, interpolation_scale, yarn_multiplier};
use crate::model_bin::header::{HEAD_DIM, ModelHeader};

/// The initial context length of the released models.
const RELEASED_CONTEXT: f64 = 4096.0;

/// A config that was computed from a header.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovered {
    /// The config in the original layout. It lacks `vocab_size`, which the header does not hold and nobody reads.
    pub json: Map<String, Value>,
    /// The header fields that the config does not give again; empty for whatever the exporter may have written, unless
    /// α and β agree in eight digits, so that binary64 holds too little of their difference.
    pub lost: Vec<&'static str>,
}

/// The config whose header is `header`, with the fewest digits that give the header's words again.
///
/// Several configs have the same header: rounding to f32 loses digits, and of the initial context length, α and β only
/// two quotients and a truncated product remain. Where the released models' values fit, they are preferred.
pub fn recover(header: &ModelHeader) -> Recovered {
    let theta = f64_of(header.rope_theta).filter(|&theta| theta > 1.0).unwrap_or(150_000.0);
    let factor = factor(header);
    let yarn = Yarn { offset: header.yarn_offset, scale: header.yarn_scale };
    let contexts = contexts(header.context_length, factor);
    let ramps = contexts.iter().filter_map(|&context| Some((context, ramp(context, theta, yarn)?)));
    let (context, ramp) = ramps.min_by_key(|(context, ramp)| digits(*context) + ramp.digits).unwrap_or((
        contexts.first().copied().unwrap_or(RELEASED_CONTEXT),
        Ramp { alpha: 1.0, beta: 32.0, digits: 0 },
    ));

    let mut json = Map::new();
    let mut put = |key: &str, value: Number| json.insert(key.into(), Value::Number(value));
    put("num_hidden_layers", header.num_blocks.into());
    put("num_experts", header.num_experts.into());
    put("experts_per_token", header.num_active_experts.into());
    put("hidden_size", header.embedding_dim.into());
    put("intermediate_size", header.mlp_dim.into());
    put("swiglu_limit", real(f64_of(header.swiglu_limit).unwrap_or(7.0)));
    put("head_dim", header.head_dim.into());
    put("num_attention_heads", header.num_heads.into());
    put("num_key_value_heads", header.num_kv_heads.into());
    put("sliding_window", header.attention_window.into());
    put("initial_context_length", integer_or_real(context));
    put("rope_theta", integer_or_real(theta));
    put("rope_scaling_factor", real(factor));
    put("rope_ntk_alpha", integer_or_real(ramp.alpha));
    put("rope_ntk_beta", integer_or_real(ramp.beta));

    let lost = lost(&json, header);
    Recovered { json, lost }
}

/// The fields in which the config's header is another.
fn lost(json: &Map<String, Value>, header: &ModelHeader) -> Vec<&'static str> {
    let text = serde_json::to_vec(json).unwrap_or_default();
    let Some(again) = Config::read(&text).0.map(|config| config.unchecked_header()) else {
        // Only widths that are no positive multiples of 32 leave no config at all.
        let widths = [("embedding_dim", header.embedding_dim), ("mlp_dim", header.mlp_dim)];
        return widths
            .into_iter()
            .filter(|(_, width)| !width.is_multiple_of(32) || *width == 0)
            .map(|(name, _)| name)
            .collect();
    };
    let float = |name, a: f32, b: f32| (name, a.to_bits() == b.to_bits());
    [
        ("context_length", header.context_length == again.context_length),
        ("num_active_experts", header.num_active_experts == again.num_active_experts),
        float("swiglu_limit", header.swiglu_limit, again.swiglu_limit),
        float("rope_theta", header.rope_theta, again.rope_theta),
        float("interpolation_scale", header.interpolation_scale, again.interpolation_scale),
        float("yarn_offset", header.yarn_offset, again.yarn_offset),
        float("yarn_scale", header.yarn_scale, again.yarn_scale),
        float("yarn_multiplier", header.yarn_multiplier, again.yarn_multiplier),
        float("rmsnorm_epsilon", header.rmsnorm_epsilon, again.rmsnorm_epsilon),
    ]
    .into_iter()
    .filter_map(|(name, same)| (!same).then_some(name))
    .collect()
}

/// The factor of fewest digits that gives both words made of it.
fn factor(header: &ModelHeader) -> f64 {
    let (scale, multiplier) = (header.interpolation_scale, header.yarn_multiplier);
    let fits = |factor: f64| {
        interpolation_scale(factor).to_bits() == scale.to_bits()
            && yarn_multiplier(factor).to_bits() == multiplier.to_bits()
    };
    // Each word admits an interval; a d-digit number within their intersection is the one nearest to its middle.
    let [least, most] = [1.0, -1.0].map(|side| 1.0 / beside(scale, side));
    let [low, high] = [-1.0, 1.0].map(|side| (10.0 * (beside(multiplier, side) - 1.0)).exp());
    let middle = least.max(low).midpoint(most.min(high));
    roundings(middle)
        .chain(roundings(1.0 / f64::from(scale)))
        .find(|&factor| fits(factor))
        .or(Some(1.0 / f64::from(scale)).filter(|factor| factor.is_finite() && *factor > 0.0))
        .unwrap_or(32.0)
}

/// Half way from `value` to its neighbour above (`side` 1) or below (−1).
fn beside(value: f32, side: f64) -> f64 {
    let neighbour = if side > 0.0 { value.next_up() } else { value.next_down() };
    f64::from(value).midpoint(f64::from(neighbour))
}

/// Initial context lengths that give this context length, roundest first after the released one.
fn contexts(context_length: u32, factor: f64) -> Vec<f64> {
    let target = f64::from(context_length);
    let fits = |context: f64| context > 0.0 && (context * factor) as u32 == context_length;
    let (least, middle) = (target / factor, (target + 0.5) / factor);
    let mut contexts: Vec<f64> = std::iter::once(RELEASED_CONTEXT)
        .chain(roundings(least).zip(roundings(middle)).flat_map(|(a, b)| [a, b, a.ceil()]))
        .filter(|&context| fits(context))
        .collect();
    contexts.sort_by_key(|&context| (context != RELEASED_CONTEXT, context.fract() != 0.0, digits(context)));
    contexts.dedup();
    contexts.truncate(6);
    // A header that no exporter writes; the other fields can still be recovered.
    if contexts.is_empty() { vec![RELEASED_CONTEXT] } else { contexts }
}

struct Ramp {
    alpha: f64,
    beta: f64,
    digits: usize,
}

/// α and β of fewest digits that give these words with this initial context length.
fn ramp(context: f64, theta: f64, yarn: Yarn) -> Option<Ramp> {
    let (offset, scale) = (f64::from(yarn.offset), f64::from(yarn.scale));
    let turns = |index: f64| context / (2.0 * PI) * (-index * theta.ln() / (f64::from(HEAD_DIM) / 2.0)).exp();
    let low = -offset / scale;
    let (alpha, beta) = (turns(low + 1.0 / scale), turns(low));
    let fits = |alpha: f64, beta: f64| {
        let again = Yarn::new(context, theta, alpha, beta);
        again.offset.to_bits() == yarn.offset.to_bits() && again.scale.to_bits() == yarn.scale.to_bits()
    };
    let alphas: Vec<f64> = roundings(alpha).collect();
    let betas: Vec<f64> = roundings(beta).collect();
    let pairs = alphas.iter().flat_map(|&alpha| betas.iter().map(move |&beta| (alpha, beta)));
    let (alpha, beta) = pairs
        .filter(|&(alpha, beta)| alpha > 0.0 && beta > 0.0 && fits(alpha, beta))
        .min_by_key(|&(alpha, beta)| digits(alpha) + digits(beta))?;
    Some(Ramp { alpha, beta, digits: digits(alpha) + digits(beta) })
}

/// A finite positive number rounded to 1, 2, … 17 significant decimal digits; nothing for any other.
fn roundings(value: f64) -> impl Iterator<Item = f64> {
    let usable = value.is_finite() && value > 0.0;
    (0..17).filter(move |_| usable).filter_map(move |digits| format!("{value:.digits$e}").parse().ok())
}

/// Significant decimal digits.
fn digits(value: f64) -> usize {
    let text = format!("{value:e}");
    text.split('e').next().map_or(0, |mantissa| mantissa.chars().filter(char::is_ascii_digit).count())
}

/// A number of an f32 with its shortest decimal digits; `None` where it is not finite.
fn f64_of(value: f32) -> Option<f64> {
    value.to_string().parse().ok().filter(|value: &f64| value.is_finite())
}

fn real(value: f64) -> Number {
    Number::from_f64(value).unwrap_or_else(|| 0.into())
}

fn integer_or_real(value: f64) -> Number {
    let integer = value as u64;
    if value < 9e15 && integer as f64 == value { integer.into() } else { real(value) }
}
