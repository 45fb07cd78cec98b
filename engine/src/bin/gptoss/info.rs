//! `info`: a model, where it would reside, and the devices that there are.

use std::io::Write;

use anyhow::Result;
use engine::backend::{Backend, Device, Float};
use engine::error::Bytes;
use engine::gpt_oss::{Config, Residency};
use engine::harmony::Encoding;
use formats::command::{Console, Outcome};
use formats::model_bin::Stored;
use serde_json::{Value, json};

use crate::options::{DeviceOptions, ModelOptions};

#[derive(clap::Args)]
pub struct Arguments {
    /// Say nothing of a model: devices only.
    #[arg(long)]
    devices: bool,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
}

/// `gptoss info`.
pub fn info(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let model = if arguments.devices {
        None
    } else {
        let stored = arguments.model.open(console)?;
        let config = Config::new(stored.header(), stored.dims())?;
        let device = arguments.device.backend.open()?;
        let residency = Residency::plan(&stored, &arguments.device.load_options(), &device)?;
        Some((stored, config, residency))
    };
    let devices = Backend::ALL.map(|backend| (backend, backend.open()));
    let mut out = std::io::stdout().lock();
    if console.json {
        let devices: Vec<Value> =
            devices.iter().map(|(backend, device)| describe(*backend, device)).collect();
        let mut document = json!({ "version": env!("CARGO_PKG_VERSION"), "devices": devices });
        if let Some((stored, config, residency)) = &model {
            document["model"] = json!({
                "path": stored.path(),
                "container": stored.container().to_string(),
                "config": config,
                "parameters": Parameters::of(config),
                "chat": Encoding::new(stored.vocabulary()).is_ok(),
                "text_tokens": stored.vocabulary().num_text_tokens,
            });
            document["residency"] = json!(residency);
        }
        console.document(&mut out, &document)?;
        return Ok(Outcome::Fine);
    }
    if let Some((stored, config, residency)) = &model {
        print_model(&mut out, stored, config)?;
        write!(out, "\n{residency}")?;
        match residency.check() {
            Ok(()) => writeln!(out)?,
            Err(error) => writeln!(out, "  {error}\n")?,
        }
    }
    for (backend, device) in &devices {
        match device {
            Ok(device) => {
                write!(out, "{backend}: {}", device.name())?;
                if let Some(memory) = device.memory() {
                    write!(out, ", {} of memory", Bytes(memory))?;
                }
                if let Some(buffer) = device.max_buffer() {
                    write!(out, ", buffers up to {}", Bytes(buffer))?;
                }
                let floats: Vec<String> = Float::ALL
                    .into_iter()
                    .filter(|&float| device.supports(float))
                    .map(|it| it.to_string())
                    .collect();
                writeln!(out, ", {}", floats.join(" "))?;
            }
            Err(error) => writeln!(out, "{error}")?,
        }
    }
    Ok(Outcome::Fine)
}

fn print_model(out: &mut dyn Write, stored: &Stored, config: &Config) -> Result<()> {
    let Parameters { total, active } = Parameters::of(config);
    writeln!(out, "{}: {}", stored.path().display(), stored.container())?;
    writeln!(out, "  {} parameters, {} of them for each token", count(total), count(active))?;
    let Config { num_blocks, num_experts, num_active_experts, embedding_dim, mlp_dim, .. } = config;
    writeln!(
        out,
        "  {num_blocks} blocks, hidden {embedding_dim}; {num_experts} experts of {mlp_dim}, {num_active_experts} active, \
         clamp {}",
        config.swiglu_limit
    )?;
    let Config { num_heads, num_kv_heads, head_dim, attention_window, context_length, .. } = config;
    writeln!(
        out,
        "  {num_heads} heads of {head_dim} on {num_kv_heads} of keys and values, window {attention_window} in even blocks; \
         context {context_length}"
    )?;
    writeln!(
        out,
        "  RoPE: base {}, interpolation {}, ramp {} + {} i, concentration {}",
        config.rope_theta,
        config.interpolation_scale,
        config.yarn_offset,
        config.yarn_scale,
        config.yarn_multiplier
    )?;
    let chat = match Encoding::new(stored.vocabulary()) {
        Ok(_) => "o200k_harmony: it can chat".to_string(),
        Err(error) => format!("generate --plain only: {error}"),
    };
    writeln!(out, "  {} tokens; {chat}", config.vocabulary)?;
    Ok(())
}

/// How many numbers were learned.
#[derive(serde::Serialize)]
struct Parameters {
    total: u64,
    /// Those that a token meets: its experts, one row of the embedding, and everything else.
    active: u64,
}

impl Parameters {
    fn of(config: &Config) -> Parameters {
        let of = |size: usize| size as u64;
        let (hidden, vocabulary) = (of(config.embedding_dim), of(config.vocabulary));
        let (experts, active) = (of(config.num_experts), of(config.num_active_experts));
        let mlp = of(config.mlp_dim);
        let expert = 2 * mlp * hidden + 2 * mlp + hidden * mlp + hidden;
        let (qkv, heads) = (of(config.qkv_rows()), of(config.num_heads));
        let joined = heads * of(config.head_dim);
        let attention = qkv * (hidden + 1) + hidden * (joined + 1) + heads;
        let rest = attention + experts * (hidden + 1) + 2 * hidden;
        let blocks = |each: u64| of(config.num_blocks) * (rest + each * expert);
        let table = vocabulary * hidden;
        Parameters {
            total: blocks(experts) + 2 * table + hidden,
            active: blocks(active) + table + 2 * hidden,
        }
    }
}

/// 20.9 B, 2.3 M.
fn count(number: u64) -> String {
    let units = [(1e9, " B"), (1e6, " M"), (1e3, " k")];
    match units.iter().find(|(size, _)| number as f64 >= *size) {
        Some((size, unit)) => format!("{:.2}{unit}", number as f64 / size),
        None => number.to_string(),
    }
}

fn describe(backend: Backend, device: &engine::Result<Device>) -> Value {
    match device {
        Ok(device) => json!({
            "backend": backend,
            "compiled": true,
            "name": device.name(),
            "memory": device.memory(),
            "max_buffer": device.max_buffer(),
            "types": Float::ALL.into_iter().filter(|&float| device.supports(float)).collect::<Vec<_>>(),
        }),
        Err(error) => {
            json!({ "backend": backend, "compiled": backend.is_compiled(), "error": error.to_string() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_the_released_20b() {
        let config = Config {
            context_length: 131_072,
            num_blocks: 24,
            num_experts: 32,
            num_active_experts: 4,
            embedding_dim: 2880,
            mlp_dim: 2880,
            swiglu_limit: 7.0,
            head_dim: 64,
            num_heads: 64,
            num_kv_heads: 8,
            attention_window: 128,
            rope_theta: 150_000.0,
            interpolation_scale: 1.0 / 32.0,
            yarn_offset: 0.0,
            yarn_scale: 1.0,
            yarn_multiplier: 1.0,
            rmsnorm_epsilon: 1e-5,
            vocabulary: 201_088,
        };
        // Table 1 of the model card, which counts the unembedding as active and the embedding not.
        let Parameters { total, active } = Parameters::of(&config);
        assert_eq!(count(total), "20.91 B");
        assert_eq!(count(active), "3.61 B");
    }
}
