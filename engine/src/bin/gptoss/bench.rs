//! `bench`: how fast a model loads, reads and writes here.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::ValueHint;
use engine::error::Bytes;
use engine::gpt_oss::model::read;
use engine::gpt_oss::{Cache, Model, Residency, Stream};
use engine::gpu::{MOST_SEQUENCES, Share};
use engine::sampling::{self, Sampler};
use engine::synthetic;
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
    /// Sequences that are decoded together, each with a prompt of its own.
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Tokens to generate after each prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    generate: usize,
    /// Measurements of each length and batch, after one that does not count; their median is reported.
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Measure each kind of kernel of a step as well (GPUs).
    #[arg(long)]
    profile: bool,
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

/// The medians for one length and batch.
#[derive(Debug, Serialize)]
struct Row {
    prompt: usize,
    batch: usize,
    generated: usize,
    /// Of each run, in the order in which they ran; prefills until the first token is drawn.
    prefill_tokens_per_second: Vec<f64>,
    decode_tokens_per_second: Vec<f64>,
    median_prefill: f64,
    median_decode: f64,
    /// What each kind of kernel takes of a step after the prompt.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Share>,
}

/// `gptoss bench`.
pub fn bench(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    ensure!(arguments.runs > 0, "--runs: found 0, needed 1 at least");
    for &batch in &arguments.batch {
        ensure!(
            (1..=MOST_SEQUENCES).contains(&batch),
            "--batch: found {batch}, needed 1 to {MOST_SEQUENCES}"
        );
    }
    ensure!(arguments.generate > 2, "--generate: found {}, needed 3 at least", arguments.generate);
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
        for &batch in &arguments.batch {
            rows.push(measure(&model, prompt, batch, arguments, console)?);
        }
    }
    let copied = device.copy_rate()?;
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
            "copied_bytes_per_second": copied,
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
        "{:>8} {:>6} {:>10}  {:>16} {:>16}",
        "prompt", "batch", "generated", "prefill tokens/s", "decode tokens/s"
    )?;
    for Row { prompt, batch, generated, median_prefill, median_decode, profile, .. } in &rows {
        writeln!(
            out,
            "{prompt:>8} {batch:>6} {generated:>10}  {median_prefill:>16.1} {median_decode:>16.1}"
        )?;
        for share in profile {
            let Share { stage, seconds, bytes_for_one } = share;
            write!(out, "{:>26}  {:>10.1} µs", format!("{stage:?}"), seconds * 1e6)?;
            match bytes_for_one {
                // Several sequences read some weights once and others for each of them.
                1.. if *batch == 1 => {
                    writeln!(out, "  {:>8.3} TB/s of weights", *bytes_for_one as f64 / seconds / 1e12)?;
                }
                _ => writeln!(out)?,
            }
        }
    }
    writeln!(out, "medians of {}", arguments.runs)?;
    if let Some(rate) = copied {
        writeln!(out, "the device copies {:.3} TB/s, read and written", rate / 1e12)?;
    }
    Ok(Outcome::Fine)
}

fn measure(
    model: &Model,
    prompt: usize,
    batch: usize,
    arguments: &Arguments,
    console: &Console,
) -> Result<Row> {
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let mut profile = Vec::new();
    for run in 0..=arguments.runs {
        if !console.quiet {
            let what = if run == 0 { "warming up".into() } else { format!("run {run}") };
            eprintln!("{batch} × prompt of {prompt}: {what}");
        }
        let mut caches: Vec<Cache> = (0..batch).map(|_| model.new_cache()).collect();
        let mut samplers = vec![Sampler::new(sampling::Options::greedy())?; batch];
        let start = Instant::now();
        let mut streams = Vec::with_capacity(batch);
        for (index, (cache, sampler)) in caches.iter_mut().zip(&mut samplers).enumerate() {
            let logits = read(model.prefill(cache, &tokens(model, prompt, index))?)?;
            let token = sampler.sample(&logits)?.token;
            streams.push(Stream { cache, token, sampler });
        }
        let prefilled = start.elapsed();
        // The first step may have to record its graph.
        let mut times = Vec::with_capacity(arguments.generate);
        model.decode(&mut streams, arguments.generate - 1, &mut |_| {
            times.push(Instant::now());
            ControlFlow::Continue(())
        })?;
        if let ([first, .., last], 1..) = (times.as_slice(), run) {
            prefill.push(rate(prompt * batch, prefilled.as_secs_f64()));
            decode.push(rate((times.len() - 1) * batch, (*last - *first).as_secs_f64()));
        }
        if run == arguments.runs && arguments.profile {
            profile = model.profile(&mut streams)?;
        }
    }
    Ok(Row {
        prompt,
        batch,
        generated: arguments.generate,
        median_prefill: median(&prefill),
        median_decode: median(&decode),
        prefill_tokens_per_second: prefill,
        decode_tokens_per_second: decode,
        profile,
    })
}

/// A prompt: tokens like any other, and the same each time, so that experts are chosen as widely as in a text.
fn tokens(model: &Model, count: usize, prompt: usize) -> Vec<u32> {
    let vocabulary = model.config().vocabulary as u64;
    let first = prompt as u64 * 1_000_003;
    (1..=count as u64).map(|n| ((first + n) * 0x9e37_79b9 % vocabulary) as u32).collect()
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
