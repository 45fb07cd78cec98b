//! `parity`: position by position, how far the logits of two computations are apart.

use std::cmp::Ordering;
use std::env;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{ArgGroup, ValueHint};
use engine::backend::{Backend, Float};
use engine::command::{backends, floats};
use formats::command::{Console, Outcome};
use formats::output::{Output, TemporaryFolder};
use formats::progress::Progress;
use formats::tokenizer::Tokenizer;
use serde::Serialize;

use crate::logits::{self, Reference};
use crate::options::{DeviceOptions, ModelOptions, read_tokens};

#[derive(clap::Args)]
#[command(group = ArgGroup::new("second").multiple(true).required(true).args(
    ["reference", "other", "other_backend", "other_activations", "other_weights", "other_cache", "other_dequantize"],
))]
pub struct Arguments {
    /// Logits in a SafeTensors file, as `logits` writes them or as the reference's traces have them.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    reference: Option<PathBuf>,
    /// Another checkpoint to compare with, in the place of a stored reference.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath, conflicts_with = "reference")]
    other: Option<PathBuf>,
    /// Another backend.
    #[arg(long, value_name = "BACKEND", value_parser = backends(), conflicts_with = "reference")]
    other_backend: Option<Backend>,
    /// Another type of activations.
    #[arg(long, value_name = "TYPE", value_parser = floats(), conflicts_with = "reference")]
    other_activations: Option<Float>,
    /// Another type of weights.
    #[arg(long, value_name = "TYPE", value_parser = floats(), conflicts_with = "reference")]
    other_weights: Option<Float>,
    /// Another type of the caches.
    #[arg(long, value_name = "TYPE", value_parser = floats(), conflicts_with = "reference")]
    other_cache: Option<Float>,
    /// Decoded experts.
    #[arg(long, conflicts_with = "reference")]
    other_dequantize: bool,
    /// Token ids as JSON [default: those of the reference].
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    tokens: Option<PathBuf>,
    /// Text in the place of token ids, encoded with the model's vocabulary.
    #[arg(long, value_name = "TEXT", conflicts_with = "tokens")]
    text: Option<String>,
    /// Exit with 1 if a difference, relative to the reference's largest value, is larger.
    #[arg(long, value_name = "X")]
    max_rel: Option<f64>,
    /// Exit with 1 if the most probable token is the same at a smaller part of the positions; 1 is all of them.
    #[arg(long, value_name = "SHARE")]
    min_top1: Option<f64>,
    /// Exit with 1 if the divergence from the reference's distribution is larger at a position, in nats.
    #[arg(long, value_name = "NATS")]
    max_kl: Option<f64>,
    /// Show every position, not the worst alone.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
}

/// Positions that are shown without --all.
const SHOWN: usize = 16;

/// Two rows of logits, compared.
#[derive(Clone, Debug, Serialize)]
struct Position {
    position: usize,
    /// The token after which they stand.
    token: u32,
    /// Largest difference; infinite if a logit is not a number.
    max_abs: f64,
    mean_abs: f64,
    /// `max_abs` by the largest value of the reference's row.
    max_rel: f64,
    /// `mean_abs` by the same.
    mean_rel: f64,
    /// Most probable tokens, the reference's first.
    top1: [u32; 2],
    /// How far the reference's most probable token is ahead of its second.
    margin: f64,
    /// Kullback-Leibler divergence of the model's distribution from the reference's, in nats.
    kl: f64,
}

/// Everything together.
#[derive(Clone, Debug, Serialize)]
struct Summary {
    positions: usize,
    max_abs: f64,
    mean_abs: f64,
    /// Largest difference by the largest value of the whole reference.
    max_rel: f64,
    /// Part of the positions at which the most probable token is the same.
    top1: f64,
    mean_kl: f64,
    max_kl: f64,
}

/// `gptoss parity`.
pub fn parity(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let Arguments { model, device, .. } = arguments;
    let given = arguments.tokens.as_deref().map(read_tokens).transpose()?;
    let stored = model.open(console)?;
    let given = match &arguments.text {
        Some(text) => Some(Tokenizer::new(stored.vocabulary())?.encode(text)?),
        None => given,
    };
    // The other side first, and into a file: two models need not be in memory at once.
    let folder = TemporaryFolder::create_in(&env::temp_dir())?;
    let reference = match &arguments.reference {
        Some(path) => Reference::open(path)?,
        None => {
            let tokens = given.as_deref().context("--tokens or --text: needed one of them")?;
            let other = match &arguments.other {
                Some(path) => Some(model.stored.open(path, console)?),
                None => None,
            };
            let loaded = arguments.other_device().load(other.as_ref().unwrap_or(&stored), console)?;
            let path = folder.path().join("logits.safetensors");
            logits::write(&loaded, tokens, Output::create(&path)?, console)?;
            Reference::open(&path)?
        }
    };
    let tokens = given
        .or_else(|| reference.tokens.clone())
        .context("the reference does not say which tokens it belongs to; needed --tokens or --text")?;
    ensure!(
        tokens.len() == reference.positions,
        "found {} tokens and a reference of {} positions, needed as many",
        tokens.len(),
        reference.positions
    );
    let loaded = device.load(&stored, console)?;
    let vocabulary = loaded.config().vocabulary;
    // Embedding rows beyond the vocabulary are not in a model.bin; a checkpoint's reference has them.
    ensure!(
        reference.vocabulary >= vocabulary,
        "found a reference of {} logits, needed the model's {vocabulary}",
        reference.vocabulary
    );
    console.begin("comparing logits", (tokens.len() * vocabulary * 4) as u64);
    let mut positions = Vec::with_capacity(tokens.len());
    let mut largest: f64 = 0.0;
    loaded.logits(&tokens, |range, rows| -> Result<()> {
        for (position, row) in range.zip(rows.chunks(vocabulary)) {
            let mut truth = reference.row(position);
            truth.truncate(vocabulary);
            largest = truth.iter().fold(largest, |max, value| max.max(f64::from(value.abs())));
            positions.push(compare(position, tokens[position], &truth, row));
        }
        console.advance(rows.len() as u64 * 4);
        Ok(())
    })?;
    console.done();
    let summary = summarise(&positions, largest);
    let failures = arguments.failures(&summary);
    if console.json {
        let document = serde_json::json!({
            "summary": summary, "failures": failures, "positions": positions,
        });
        console.document(&mut std::io::stdout(), &document)?;
    } else {
        print(&summary, &positions, &failures, arguments.all)?;
    }
    Ok(if failures.is_empty() { Outcome::Fine } else { Outcome::Differs })
}

impl Arguments {
    /// The device flags with those of the other side in their place.
    fn other_device(&self) -> DeviceOptions {
        let mut device = self.device.clone();
        device.backend = self.other_backend.unwrap_or(device.backend);
        device.activations = self.other_activations.or(device.activations);
        device.weights = self.other_weights.or(device.weights);
        device.cache = self.other_cache.or(device.cache);
        device.dequantize |= self.other_dequantize;
        device
    }

    /// Which thresholds are passed. Numbers that are none pass any.
    fn failures(&self, summary: &Summary) -> Vec<String> {
        let mut failures = Vec::new();
        if !summary.max_rel.is_finite() {
            failures.push("a logit is infinite or not a number".to_string());
        }
        if let Some(bound) = self.max_rel.filter(|&bound| exceeds(summary.max_rel, bound)) {
            failures.push(format!(
                "largest relative difference {:.3e}, needed {bound:e} at most",
                summary.max_rel
            ));
        }
        if let Some(bound) = self.min_top1.filter(|&bound| exceeds(bound, summary.top1)) {
            failures.push(format!(
                "the same most probable token at {:.4} of the positions, needed {bound}",
                summary.top1
            ));
        }
        if let Some(bound) = self.max_kl.filter(|&bound| exceeds(summary.max_kl, bound)) {
            failures
                .push(format!("largest divergence {:.3e} nats, needed {bound:e} at most", summary.max_kl));
        }
        failures
    }
}

/// Whether a value is above a bound, or cannot be compared with it.
fn exceeds(value: f64, bound: f64) -> bool {
    value.partial_cmp(&bound).is_none_or(Ordering::is_gt)
}

/// Compares two rows; `truth` is the reference's.
fn compare(position: usize, token: u32, truth: &[f32], found: &[f32]) -> Position {
    let pairs = || truth.iter().zip(found).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    // The largest of numbers that include one that is none would be silent about it.
    let difference = |(a, b): (f64, f64)| if a == b { 0.0 } else { (a - b).abs() };
    let max_abs = pairs().map(difference).map(nan_is_infinite).fold(0.0, f64::max);
    let mean_abs = nan_is_infinite(pairs().map(difference).sum::<f64>() / truth.len().max(1) as f64);
    let largest = truth.iter().fold(0.0, |max: f64, value| max.max(f64::from(value.abs())));
    let (first, second) = top2(truth);
    Position {
        position,
        token,
        max_abs,
        mean_abs,
        max_rel: relative(max_abs, largest),
        mean_rel: relative(mean_abs, largest),
        top1: [first, top2(found).0].map(|index| index as u32),
        margin: truth.get(second).map_or(f64::INFINITY, |value| f64::from(truth[first]) - f64::from(*value)),
        kl: nan_is_infinite(divergence(truth, found)),
    }
}

/// Whatever is no number is as wrong as can be.
fn nan_is_infinite(value: f64) -> f64 {
    if value.is_nan() { f64::INFINITY } else { value }
}

/// A difference by the largest value; no difference is none, whatever it is divided by.
fn relative(difference: f64, largest: f64) -> f64 {
    if difference == 0.0 { 0.0 } else { nan_is_infinite(difference / largest) }
}

/// The indices of the two largest values, the first among equals; the second is past the end of a single value.
fn top2(row: &[f32]) -> (usize, usize) {
    let (mut first, mut second) = (0, row.len());
    for (index, value) in row.iter().enumerate().skip(1) {
        if *value > row[first] {
            (first, second) = (index, first);
        } else if row.get(second).is_none_or(|largest| value > largest) {
            second = index;
        }
    }
    (first, second)
}

/// Σ p ln(p / q) of the softmaxes, in nats.
fn divergence(truth: &[f32], found: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let max = row.iter().fold(f64::NEG_INFINITY, |max, &value| max.max(value.into()));
        max + row.iter().map(|&value| (f64::from(value) - max).exp()).sum::<f64>().ln()
    };
    let (truth_sum, found_sum) = (log_sum(truth), log_sum(found));
    let terms = truth.iter().zip(found).map(|(&p, &q)| {
        let (p, q) = (f64::from(p) - truth_sum, f64::from(q) - found_sum);
        if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
    });
    let sum: f64 = terms.sum();
    // Rounding may leave it a little below zero.
    if sum < 0.0 { 0.0 } else { sum }
}

fn summarise(positions: &[Position], largest: f64) -> Summary {
    let count = positions.len().max(1) as f64;
    let max = |value: fn(&Position) -> f64| positions.iter().map(value).fold(0.0, f64::max);
    let mean = |value: fn(&Position) -> f64| positions.iter().map(value).sum::<f64>() / count;
    let max_abs = max(|it| it.max_abs);
    Summary {
        positions: positions.len(),
        max_abs,
        mean_abs: mean(|it| it.mean_abs),
        max_rel: relative(max_abs, largest),
        top1: positions.iter().filter(|it| it.top1[0] == it.top1[1]).count() as f64 / count,
        mean_kl: mean(|it| it.kl),
        max_kl: max(|it| it.kl),
    }
}

fn print(summary: &Summary, positions: &[Position], failures: &[String], all: bool) -> Result<()> {
    let mut shown: Vec<&Position> = positions.iter().collect();
    if !all && shown.len() > SHOWN {
        shown.sort_by(|a, b| b.max_abs.total_cmp(&a.max_abs));
        shown.truncate(SHOWN);
        shown.sort_by_key(|position| position.position);
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:>8} {:>7}  {:>9} {:>9}  {:>9} {:>9}  {:>9}  most probable",
        "position", "token", "max abs", "mean abs", "max rel", "mean rel", "KL nats"
    )?;
    for it in &shown {
        let Position { position, token, max_abs, mean_abs, max_rel, mean_rel, kl, top1: [a, b], margin } = it;
        write!(
            out,
            "{position:>8} {token:>7}  {max_abs:>9.2e} {mean_abs:>9.2e}  {max_rel:>9.2e} {mean_rel:>9.2e}  {kl:>9.2e}  {a}"
        )?;
        if a == b { writeln!(out)? } else { writeln!(out, " ≠ {b} (ahead by {margin:.2e})")? }
    }
    if shown.len() < positions.len() {
        writeln!(out, "the {} worst of {} positions; --all shows every one", shown.len(), positions.len())?;
    }
    let Summary { positions, max_abs, mean_abs, max_rel, top1, mean_kl, max_kl } = summary;
    writeln!(
        out,
        "{positions} positions: differences up to {max_abs:.3e}, {mean_abs:.3e} on average, {max_rel:.3e} relative to the \
         largest value; the same most probable token at {:.2} %; KL {mean_kl:.3e} on average, {max_kl:.3e} at most",
        top1 * 100.0
    )?;
    for failure in failures {
        writeln!(out, "  {failure}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_do_not_differ() {
        let row = [1.0, -3.5, 2.0, f32::NEG_INFINITY];
        let found = compare(3, 9, &row, &row);
        assert_eq!((found.max_abs, found.mean_abs, found.max_rel, found.kl), (0.0, 0.0, 0.0, 0.0));
        assert_eq!((found.top1, found.margin), ([2, 2], 1.0));
    }

    #[test]
    fn differences_and_divergence_are_those_of_the_definition() {
        // p = (1/4, 3/4), q = (1/2, 1/2).
        let truth = [0.0, 3.0_f32.ln()];
        let found = compare(0, 0, &truth, &[5.0, 5.0]);
        let needed = 0.25 * (0.25f64 / 0.5).ln() + 0.75 * (0.75f64 / 0.5).ln();
        assert!((found.kl - needed).abs() < 1e-7, "{} {needed}", found.kl);
        assert_eq!(found.max_abs, 5.0);
        assert!((found.mean_abs - (10.0 - 3f64.ln()) / 2.0).abs() < 1e-6);
        assert!((found.max_rel - 5.0 / 3f64.ln()).abs() < 1e-6);
        assert_eq!(found.top1, [1, 0]);
    }

    #[test]
    fn what_is_no_number_is_infinitely_wrong() {
        let found = compare(0, 0, &[1.0, 2.0], &[1.0, f32::NAN]);
        assert_eq!((found.max_abs, found.mean_abs, found.kl), (f64::INFINITY, f64::INFINITY, f64::INFINITY));
        assert_eq!(summarise(&[found], 2.0).max_rel, f64::INFINITY);
    }

    #[test]
    fn the_two_largest_are_found_wherever_they_are() {
        assert_eq!(top2(&[1.0]), (0, 1));
        assert_eq!(top2(&[3.0, 1.0, 2.0]), (0, 2));
        assert_eq!(top2(&[1.0, 2.0, 3.0]), (2, 1));
        assert_eq!(top2(&[2.0, 2.0, 1.0]), (0, 1));
    }
}
