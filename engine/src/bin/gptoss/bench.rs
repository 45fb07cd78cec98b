//! `bench`: how fast a model loads, reads and writes here.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::ValueHint;
use engine::error::Bytes;
use engine::gpt_oss::{Model, Request, Residency, Session, generate};
use engine::{sampling, synthetic};
use formats::command::{Console, Outcome};
use formats::model_bin::header::ModelHeader;
use serde::Serialize;

use crate::options::{DeviceOptions, StoredFlags};
use crate::view::rate;

#[derive(clap::Args)]
pub struct Arguments {
    /// Lengths of the prompts in tokens.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "128,512")]
    prompt: Vec<usize>,
    /// Tokens to generate after each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    generate: usize,
    /// Measurements of each length, after one that does not count; their median is reported.
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// A model.bin, a SafeTensors folder or a GGUF file; without it, random weights in the shapes of gpt-oss-20b.
    #[arg(long, short, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    model: Option<PathBuf>,
    /// Blocks of the random model, of which gpt-oss-20b has 24.
    #[arg(long, value_name = "N", default_value_t = ModelHeader::GPT_OSS_20B.num_blocks, conflicts_with = "model")]
    blocks: u32,
    #[command(flatten)]
    stored: StoredFlags,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The medians for one length.
#[derive(Debug, Serialize)]
struct Row {
    prompt: usize,
    generated: usize,
    /// Of each run, in the order in which they ran.
    prefill_tokens_per_second: Vec<f64>,
    decode_tokens_per_second: Vec<f64>,
    median_prefill: f64,
    median_decode: f64,
}

/// `gptoss bench`.
pub fn bench(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    ensure!(arguments.runs > 0, "--runs: found 0, needed 1 at least");
    ensure!(arguments.generate > 1, "--generate: found {}, needed 2 at least", arguments.generate);
    let stored = match &arguments.model {
        Some(path) => arguments.stored.open(path, console)?,
        None => synthetic::stored(ModelHeader { num_blocks: arguments.blocks, ..ModelHeader::GPT_OSS_20B })?,
    };
    let device = arguments.device.backend.open()?;
    let residency = Residency::plan(&stored, &arguments.device.load_options(), &device)?;
    for prompt in &arguments.prompt {
        let needed = prompt.checked_add(arguments.generate);
        ensure!(
            *prompt > 0 && needed.is_some_and(|needed| needed <= residency.context),
            "--prompt {prompt} and --generate {}: needed 1 to {} tokens together (--context)",
            arguments.generate,
            residency.context
        );
    }
    let start = Instant::now();
    let model = arguments.device.load_on(&stored, &device, console)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let mut rows = Vec::new();
    for &prompt in &arguments.prompt {
        rows.push(measure(&model, prompt, arguments, console)?);
    }
    let peak = peak_host_memory();
    let mut out = std::io::stdout().lock();
    if console.json {
        let document = serde_json::json!({
            "model": stored.path(),
            "backend": device.backend(),
            "device": device.name(),
            "load_seconds": load_seconds,
            "weight_bytes": residency.weights(),
            "peak_host_bytes": peak,
            "runs": arguments.runs,
            "rows": rows,
        });
        console.document(&mut out, &document)?;
        return Ok(Outcome::Fine);
    }
    write!(
        out,
        "{} on {} ({}): loaded in {load_seconds:.2} s, ",
        stored.path().display(),
        device.name(),
        device.backend()
    )?;
    write!(out, "weights of {}", Bytes(residency.weights()))?;
    match peak {
        Some(bytes) => writeln!(out, ", host memory up to {}", Bytes(bytes))?,
        None => writeln!(out)?,
    }
    writeln!(
        out,
        "{:>8} {:>10}  {:>16} {:>16}",
        "prompt", "generated", "prefill tokens/s", "decode tokens/s"
    )?;
    for row in &rows {
        let Row { prompt, generated, median_prefill, median_decode, .. } = row;
        writeln!(out, "{prompt:>8} {generated:>10}  {median_prefill:>16.1} {median_decode:>16.1}")?;
    }
    writeln!(out, "medians of {}", arguments.runs)?;
    Ok(Outcome::Fine)
}

fn measure(model: &Model, prompt: usize, arguments: &Arguments, console: &Console) -> Result<Row> {
    let vocabulary = model.config().vocabulary as u64;
    // Tokens like any other, and the same each time: experts are chosen as widely as in a text.
    let tokens: Vec<u32> = (1..=prompt as u64).map(|n| (n * 0x9e37_79b9 % vocabulary) as u32).collect();
    let request =
        Request { sampling: sampling::Options::greedy(), max_tokens: arguments.generate, stop: Vec::new() };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for run in 0..=arguments.runs {
        if !console.quiet {
            eprintln!(
                "prompt of {prompt}: {}",
                if run == 0 { "warming up".into() } else { format!("run {run}") }
            );
        }
        let mut session = Session::new(model);
        let start = Instant::now();
        let logits = session.advance(&tokens)?;
        let mut times = Vec::with_capacity(arguments.generate);
        generate(&mut session, logits, &request, &mut |_| {
            times.push(Instant::now());
            std::ops::ControlFlow::Continue(())
        })?;
        if let ([first, .., last], 1..) = (times.as_slice(), run) {
            prefill.push(rate(prompt, (*first - start).as_secs_f64()));
            decode.push(rate(times.len() - 1, (*last - *first).as_secs_f64()));
        }
    }
    Ok(Row {
        prompt,
        generated: arguments.generate,
        median_prefill: median(&prefill),
        median_decode: median(&decode),
        prefill_tokens_per_second: prefill,
        decode_tokens_per_second: decode,
    })
}

/// The middle value, or the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.as_slice() {
        [] => 0.0,
        sorted if sorted.len().is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
        sorted => sorted[middle],
    }
}

/// The most memory that this process had resident, where the system says so (Linux).
fn peak_host_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
