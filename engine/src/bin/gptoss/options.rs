//! Flags that several verbs share, each defined once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueHint};
use engine::backend::{Backend, Device, Float};
use engine::command::{Size, backends, floats};
use engine::gpt_oss::{LoadOptions, Model, Request, Residency};
use engine::sampling;
use formats::command::{CheckpointOptions, Console};
use formats::model_bin::{Depth, Stored, StoredOptions};
use formats::tokenizer::Tokenizer;

/// Which model runs.
#[derive(Args, Clone, Debug, Default)]
pub struct ModelOptions {
    /// A model.bin, a SafeTensors folder or a GGUF file; without it, the built-in demo model.
    #[arg(long, short, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub model: Option<PathBuf>,
    #[command(flatten)]
    pub stored: StoredFlags,
}

impl ModelOptions {
    /// Opens and verifies the model.
    pub fn open(&self, console: &Console) -> Result<Stored> {
        match &self.model {
            Some(path) => self.stored.open(path, console),
            None => {
                let stored = engine::demo::open_cached(console).context(
                    "the demo model's cache (XDG_CACHE_HOME moves it; `gptoss demo --dst DIR` and --model \
                     DIR/model.bin do without)",
                )?;
                console.done();
                Ok(stored)
            }
        }
    }
}

/// How a container is read.
#[derive(Args, Clone, Debug, Default)]
pub struct StoredFlags {
    #[command(flatten)]
    pub checkpoint: CheckpointOptions,
    /// Check every weight of a model.bin before loading it, not the structure alone.
    #[arg(long)]
    pub full: bool,
}

impl StoredFlags {
    /// Opens and verifies a model in any container.
    pub fn open(&self, path: &Path, console: &Console) -> Result<Stored> {
        let options = StoredOptions {
            depth: if self.full { Depth::Full } else { Depth::Structure },
            vocabulary: self.checkpoint.vocab.clone(),
            quantize: self.checkpoint.quantize,
        };
        let stored = Stored::open(path, &options, console)?;
        console.done();
        Ok(stored)
    }
}

/// Where it runs, and how it resides and computes there.
#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// Who computes.
    #[arg(long, value_parser = backends(), default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// Compute with plain tensor operations, the reference, in place of the faster runtime; so do --activations, --weights,
    /// --dequantize and, on a GPU, --cache of another type than f16.
    #[arg(long)]
    pub plain_tensors: bool,
    /// Decode the experts while loading instead of computing with packed MXFP4: the baseline of comparisons.
    #[arg(long)]
    pub dequantize: bool,
    /// Type of the factors of products of plain tensors [default: bf16 with cuda, otherwise f32].
    #[arg(long, value_parser = floats(), value_name = "TYPE")]
    pub activations: Option<Float>,
    /// Type of the matrices that are not MXFP4 [default: that of the activations].
    #[arg(long, value_parser = floats(), value_name = "TYPE")]
    pub weights: Option<Float>,
    /// Type of cached keys and values [default: f16, which the runtime of GPUs needs; f32 with cpu and --plain-tensors].
    #[arg(long, value_parser = floats(), value_name = "TYPE")]
    pub cache: Option<Float>,
    /// Longest sequence in tokens [default: the model's].
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Memory that may be used, such as 12GiB [default: what the device has].
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
}

impl DeviceOptions {
    /// These flags as the library takes them.
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            plain_tensors: self.plain_tensors,
            activations: self.activations,
            weights: self.weights,
            cache: self.cache,
            dequantize: self.dequantize,
            context: self.context,
            memory: self.memory.map(|size| size.0),
        }
    }

    /// Says what will reside where, refuses what does not fit, and loads.
    pub fn load(&self, stored: &Stored, console: &Console) -> Result<Model> {
        let device = self.backend.open()?;
        self.load_on(stored, &device, console)
    }

    /// [`DeviceOptions::load`] on a device that is open already.
    pub fn load_on(&self, stored: &Stored, device: &Device, console: &Console) -> Result<Model> {
        let options = self.load_options();
        let residency = Residency::plan(stored, &options, device)?;
        if !console.quiet {
            eprint!("{residency}");
        }
        residency.check()?;
        let model = Model::load(stored, &options, device, console)?;
        console.done();
        Ok(model)
    }
}

/// How the next token is chosen.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Take the most probable token each time.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    greedy: bool,
    /// Divides the scores; 0 is --greedy.
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_hyphen_values = true)]
    temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Keep the most probable tokens that reach this probability together.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_hyphen_values = true)]
    top_p: f32,
    /// Keep tokens that are at least this part as probable as the most probable one.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_hyphen_values = true)]
    min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_hyphen_values = true)]
    repetition_penalty: f32,
    /// Subtracted for each time that a token was generated.
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_hyphen_values = true)]
    frequency_penalty: f32,
    /// Subtracted from tokens that were generated.
    #[arg(long, value_name = "F", default_value_t = 0.0, allow_hyphen_values = true)]
    presence_penalty: f32,
    /// Added to a token's logit; -inf bans it. May be given several times.
    #[arg(long, value_name = "ID=VALUE", value_parser = bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
    /// Chooses the random numbers; the same seed gives the same text on one backend.
    #[arg(long, value_name = "N", default_value_t = 0, allow_hyphen_values = true)]
    seed: u64,
    /// Report this many of the most probable tokens with each token (needs --json).
    #[arg(long, value_name = "N", default_value_t = 0, requires = "json")]
    pub logprobs: usize,
    /// End when the text contains this, or at this special token. May be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// End after this many tokens [default: the end of the turn or of the context; 256 with --plain].
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
}

/// What ends a text, apart from the model.
#[derive(Clone, Debug, Default)]
pub struct Stops {
    pub tokens: Vec<u32>,
    pub texts: Vec<String>,
}

impl SamplingOptions {
    /// The most probable token each time, and nothing else.
    pub fn greedy() -> SamplingOptions {
        SamplingOptions {
            greedy: true,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: 0,
            stop: Vec::new(),
            max_tokens: None,
        }
    }

    /// The options of the `turn`-th generation of this process: each draws other numbers.
    pub fn options(&self, turn: u64) -> Result<sampling::Options> {
        let options = sampling::Options {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: BTreeMap::from_iter(self.logit_bias.iter().copied()),
            // Far apart, so that the next seed does not begin with the next turn's numbers.
            seed: self.seed.wrapping_add(turn.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            top_logprobs: self.logprobs,
        };
        options.validate().context("the sampling flags (--help lists them)")?;
        Ok(options)
    }

    /// A request for the `turn`-th generation.
    pub fn request(&self, turn: u64, max_tokens: usize, stop: Vec<u32>) -> Result<Request> {
        Ok(Request { sampling: self.options(turn)?, max_tokens: self.max_tokens.unwrap_or(max_tokens), stop })
    }

    /// The values of `--stop`, names of special tokens apart from texts.
    pub fn stops(&self, tokenizer: &Tokenizer) -> Result<Stops> {
        let mut stops = Stops::default();
        for text in &self.stop {
            ensure!(!text.is_empty(), "--stop: found nothing, needed a text");
            match tokenizer.special_id(text) {
                Some(id) => stops.tokens.push(id),
                None => stops.texts.push(text.clone()),
            }
        }
        Ok(stops)
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let error = || format!("found {text}, needed ID=VALUE, such as 17=-5 or 200007=-inf");
    let (id, value) = text.split_once('=').ok_or_else(error)?;
    Ok((id.trim().parse().map_err(|_| error())?, value.trim().parse().map_err(|_| error())?))
}

/// Token ids from a file: a JSON list of numbers, or an object with such a list as `tokens` or `ids`.
pub fn read_tokens(path: &Path) -> Result<Vec<u32>> {
    let text = read_text(path)?;
    let value: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    let list = value.get("tokens").or_else(|| value.get("ids")).unwrap_or(&value);
    serde_json::from_value(list.clone())
        .with_context(|| format!("{}: needed a list of token ids, such as [1, 2, 3]", path.display()))
}

/// The text of a file, or standard input for `-`.
pub fn read_text(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return std::io::read_to_string(std::io::stdin().lock()).context("standard input");
    }
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_are_pairs() {
        assert_eq!(bias("17=-5.5"), Ok((17, -5.5)));
        assert_eq!(bias("3=-inf"), Ok((3, f32::NEG_INFINITY)));
        for wrong in ["17", "x=1", "17=", "-1=2"] {
            assert!(bias(wrong).is_err(), "{wrong}");
        }
    }
}
