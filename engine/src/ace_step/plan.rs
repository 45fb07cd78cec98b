//! Memory and operations of a song, before anything is loaded.

use std::fmt;

use serde::Serialize;

use super::checkpoint::used_elements;
use super::preset::Configs;
use super::{dcae, sampling, transformer, umt5, vocoder};
use crate::backend::{Device, Float};
use crate::error::{Bytes, Error, Result};
use crate::weights::{self, Types};

/// What is planned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Frames of the latent.
    pub frames: usize,
    /// Samples at once.
    pub batch: usize,
    /// Tokens of the prompt.
    pub text_tokens: usize,
    /// Tokens of the lyrics.
    pub lyric_tokens: usize,
    /// How weights reside and take part in products.
    pub types: Types,
}

/// A stage: what resides on the device at its height, and what it computes. Stages follow each other and leave nothing
/// behind but the latent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// What it does.
    pub name: &'static str,
    /// Bytes of its weights.
    pub weights: u64,
    /// Bytes of the largest results that reside at once; an estimate.
    pub activations: u64,
    /// Multiplications with an addition each, of the products and convolutions.
    pub operations: u64,
}

/// The stages of a song.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Frames of the latent.
    pub frames: usize,
    /// Seconds of the result.
    pub seconds: f64,
    /// Steps of the sampler; Heun's count twice but for the last.
    pub steps: usize,
    /// How often the transformer runs.
    pub decodes: usize,
    /// In their order.
    pub stages: Vec<Stage>,
}

impl Plan {
    /// Plans a song.
    ///
    /// # Errors
    /// [`Error::Model`] for configurations or options that cannot run.
    pub fn new(configs: &Configs, options: &sampling::Options, request: &Request) -> Result<Plan> {
        let Request { frames, batch, types, .. } = *request;
        let run = options.run()?;
        let parameters = |expected| used_elements(&expected);
        let of_type = |float: Float, elements: u64| elements * float.size();
        let transformer =
            weights::expected(|weights| transformer::Transformer::new(&configs.transformer, weights))?;
        let decoder = weights::expected(|weights| dcae::Decoder::new(&configs.dcae, weights))?;
        let vocoder = weights::expected(|weights| vocoder::Vocoder::new(&configs.vocoder, weights))?;
        let encoder = weights::expected(|weights| umt5::Encoder::new(&configs.umt5, weights))?;
        // Of its table, the rows of the prompt come to the device.
        let table = (configs.umt5.vocab_size * configs.umt5.d_model) as u64;
        let contexts = run.contexts();
        let steps = run.decodes() as u64 * Decode::of(&configs.transformer, request).operations();
        let context = contexts as u64 * Decode::of(&configs.transformer, request).context_operations();
        let batch = batch as u64;
        let stages = vec![
            Stage {
                name: "prompt (UMT5)",
                weights: of_type(types.weights, parameters(encoder).saturating_sub(table)),
                activations: umt5_activations(&configs.umt5, request),
                operations: umt5_operations(&configs.umt5, request.text_tokens as u64) * batch,
            },
            Stage {
                name: "sampling (transformer)",
                weights: of_type(types.weights, parameters(transformer)),
                activations: Decode::of(&configs.transformer, request).activations(contexts as u64) * batch,
                operations: (steps + context) * batch,
            },
            Stage {
                name: "mel (DCAE)",
                weights: of_type(types.weights, parameters(decoder)),
                activations: configs.dcae.decoder_activations(frames) * batch,
                operations: configs.dcae.decoder_operations(frames) * batch,
            },
            Stage {
                name: "sound (vocoder)",
                weights: of_type(types.weights, parameters(vocoder)),
                activations: configs.vocoder.activations(8 * frames),
                operations: configs.vocoder.operations(8 * frames) * 2 * batch,
            },
        ];
        Ok(Plan {
            frames,
            seconds: super::seconds_of_frames(frames),
            steps: run.steps(),
            decodes: run.decodes(),
            stages,
        })
    }

    /// Bytes of the stage that needs most.
    pub fn peak(&self) -> u64 {
        self.stages.iter().map(|stage| stage.weights + stage.activations).max().unwrap_or(0)
    }

    /// Refuses what cannot fit.
    ///
    /// # Errors
    /// [`Error::Memory`] with the numbers.
    pub fn check(&self, device: &Device) -> Result<()> {
        match device.memory() {
            Some(available) if available < self.peak() => Err(Error::Memory {
                what: format!("a song of {:.0} s on {}", self.seconds, device.name()),
                needed: self.peak(),
                available,
                advice: "a shorter song, or --float bf16, needs less",
            }),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { frames, seconds, steps, decodes, .. } = self;
        writeln!(f, "{seconds:.2} s, {frames} frames; {steps} steps, {decodes} runs of the transformer")?;
        for Stage { name, weights, activations, operations } in &self.stages {
            writeln!(
                f,
                "  {name:24} weights {:>11}, at most {:>11} beside them, {:>9.3} T multiply-adds",
                Bytes(*weights).to_string(),
                Bytes(*activations).to_string(),
                *operations as f64 / 1e12
            )?;
        }
        writeln!(f, "  at the height             {:>19}", Bytes(self.peak()).to_string())
    }
}

/// Sizes of a run of the transformer.
struct Decode {
    blocks: u64,
    width: u64,
    mlp: u64,
    head_dim: u64,
    heads: u64,
    frames: u64,
    context: u64,
    outside: u64,
    float: u64,
}

impl Decode {
    fn of(config: &transformer::Config, request: &Request) -> Decode {
        let width = config.inner_dim() as u64;
        let patch = (config.in_channels * config.max_height) as u64;
        let channels = config.patch_channels() as u64;
        Decode {
            blocks: config.num_layers as u64,
            width,
            mlp: config.mlp_dim() as u64,
            head_dim: config.attention_head_dim as u64,
            heads: config.num_attention_heads as u64,
            frames: request.frames as u64,
            context: (1 + request.text_tokens + request.lyric_tokens) as u64,
            outside: patch * channels + channels * width + width * patch,
            float: request.types.compute.size(),
        }
    }

    /// Multiply-adds of a run for one sample, the context prepared.
    fn operations(&self) -> u64 {
        let Decode { width, mlp, head_dim, frames, context, .. } = *self;
        let linear_attention = 4 * width * width + 2 * width * head_dim;
        let cross_attention = 2 * width * width + 2 * width * context;
        let feed_forward = 3 * width * mlp + 6 * mlp;
        frames * (self.blocks * (linear_attention + cross_attention + feed_forward) + self.outside)
    }

    /// Of preparing a context: keys and values in every block.
    fn context_operations(&self) -> u64 {
        self.blocks * self.context * 2 * self.width * self.width
    }

    /// Prepared contexts, the widest results of a block, scores.
    fn activations(&self, contexts: u64) -> u64 {
        let prepared = contexts * self.blocks * self.context * 2 * self.width * self.float;
        let widest = 4 * self.frames * 2 * self.mlp * 4;
        let scores = 3 * self.heads * self.frames * self.context * 4;
        prepared + widest.max(scores) + 6 * self.frames * self.width * 4
    }
}

fn umt5_operations(config: &umt5::Config, tokens: u64) -> u64 {
    let (width, inner) = (config.d_model as u64, (config.num_heads * config.d_kv) as u64);
    let layer = 4 * width * inner + 2 * inner * tokens + 3 * width * config.d_ff as u64;
    tokens * config.num_layers as u64 * layer
}

fn umt5_activations(config: &umt5::Config, request: &Request) -> u64 {
    let tokens = request.text_tokens as u64;
    let scores = 3 * config.num_heads as u64 * tokens * tokens;
    4 * request.batch as u64 * (scores + 4 * tokens * config.d_ff as u64)
}
