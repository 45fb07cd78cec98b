//! The transformer: from a noisy latent and a context to the velocity that leads from noise to music
//! (`acestep/models/ace_step_transformer.py`).
//!
//! ```text
//! speaker, prompt, lyrics ─ encode ─► Conditions ─ prepare ─► Context     once: keys and values of every block
//!                                                               │
//! latent [batch, 8, 16, frames], time ─────────────────── decode ┴─► velocity     every step
//! ```

mod attention;
mod block;
mod config;
mod feed_forward;
mod lyric_encoder;
mod patch;
mod rope;
mod time;

use burn::tensor::{Tensor, TensorData};

pub use attention::{CrossAttention, LinearAttention, linear_attention};
use block::Block;
pub use config::Config;
pub use feed_forward::GluMbConv;
use lyric_encoder::LyricEncoder;
pub(super) use lyric_encoder::positions;
use patch::{FinalLayer, PatchEmbedding};
pub use rope::Table;
use time::TimeEmbedding;

use super::erg::Weaken;
use crate::backend::Float;
use crate::error::{Error, Result};
use crate::nn::bias::KeyPadding;
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::nn::rows::indices;
use crate::weights::Weights;
use attention::ContextStates;
pub(super) use attention::Surroundings;

/// The transformer of ACE-Step v1.
pub struct Transformer {
    config: Config,
    time: TimeEmbedding,
    speaker_embedder: Linear,
    genre_embedder: Linear,
    lyric_embs: Tensor<2>,
    lyric_encoder: LyricEncoder,
    lyric_proj: Linear,
    proj_in: PatchEmbedding,
    pub(super) blocks: Vec<Block>,
    final_layer: FinalLayer,
    device: burn::tensor::Device,
}

/// What the music shall be like.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The encoded description: f32 `[batch, tokens, text_embedding_dim]`.
    pub text: Tensor<3>,
    /// Which of its tokens are no padding, for each sample.
    pub text_mask: Vec<Vec<bool>>,
    /// f32 `[batch, speaker_embedding_dim]`; the released pipeline has zeros there.
    pub speaker: Tensor<2>,
    /// Tokens of the lyrics, equally many for each sample, at least one.
    pub lyrics: Vec<Vec<u32>>,
    /// Which of them are no padding.
    pub lyric_mask: Vec<Vec<bool>>,
}

/// A [`Prompt`] as tokens of the transformer: the speaker, the description, the lyrics.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// f32 `[batch, tokens, width]`.
    pub hidden: Tensor<3>,
    /// Which tokens are attended to, for each sample.
    pub mask: Vec<Vec<bool>>,
}

/// [`Conditions`] as the blocks meet them: the same in every step.
pub struct Context {
    pub(super) states: Vec<ContextStates>,
    pub(super) padding: KeyPadding,
    batch: usize,
}

/// What a step may do otherwise.
#[derive(Clone, Default)]
pub struct DecodeOptions<'a> {
    /// Frames of each sample that are no padding: f32 `[batch, frames]`, 1 or 0. `None` where all are.
    pub frame_mask: Option<Tensor<2>>,
    /// Blocks that attend less sharply.
    pub weaken: Option<&'a Weaken>,
    /// f32 `[batch, frames, width]` that is added to the embedded frames in their mean and deviation, and its factor.
    pub control: Option<(Tensor<3>, f32)>,
    /// Frames of the result: cut, or zeros at the end. `None`: as many as there are.
    pub output_length: Option<usize>,
}

impl Transformer {
    /// Asks for every tensor of the released file; those that only training needs are accepted and left where they are.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that this code cannot run, and those of the weights.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Transformer> {
        config.validate()?;
        let width = config.inner_dim();
        let lyric_width = config.lyric_hidden_size;
        for (index, &dim) in config.ssl_latent_dims.iter().enumerate() {
            let projector = weights.at("projectors").at(index);
            projector.unused_linear(0, [2 * width, width]);
            projector.unused_linear(2, [2 * width, 2 * width]);
            projector.unused_linear(4, [dim, 2 * width]);
        }
        let blocks = (0..config.num_layers)
            .map(|index| Block::new(config, &weights.at("transformer_blocks").at(index)));
        Ok(Transformer {
            time: TimeEmbedding::new(width, weights)?,
            speaker_embedder: weights.linear(
                "speaker_embedder",
                [width, config.speaker_embedding_dim],
                true,
            )?,
            genre_embedder: weights.linear("genre_embedder", [width, config.text_embedding_dim], true)?,
            lyric_embs: weights
                .tensor("lyric_embs.weight", [config.lyric_encoder_vocab_size, lyric_width])?,
            lyric_encoder: LyricEncoder::new(config, &weights.at("lyric_encoder"))?,
            lyric_proj: weights.linear("lyric_proj", [width, lyric_width], true)?,
            proj_in: PatchEmbedding::new(config, &weights.at("proj_in"))?,
            blocks: blocks.collect::<Result<_>>()?,
            final_layer: FinalLayer::new(config, &weights.at("final_layer"))?,
            device: weights.device().burn().clone(),
            config: config.clone(),
        })
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it resides.
    pub fn device(&self) -> &burn::tensor::Device {
        &self.device
    }

    /// The type of the factors of its products.
    pub fn compute(&self) -> Float {
        self.lyric_proj.compute
    }

    /// A prompt as tokens of the transformer.
    ///
    /// # Errors
    /// [`Error::Argument`] where shapes do not fit together or an id is outside the vocabulary.
    pub fn encode(&self, prompt: &Prompt, weaken: Option<&Weaken>, hooks: &Hooks<'_>) -> Result<Conditions> {
        let [batch, text_tokens, text_width] = prompt.text.dims();
        let config = &self.config;
        shape("text", &[text_width], &[config.text_embedding_dim])?;
        shape("text_mask", &sizes(&prompt.text_mask)?, &[batch, text_tokens])?;
        shape("speaker", &prompt.speaker.dims(), &[batch, config.speaker_embedding_dim])?;
        let [_, lyric_tokens] = sizes(&prompt.lyrics)?;
        shape("lyrics", &[prompt.lyrics.len(), lyric_tokens.max(1)], &[batch, lyric_tokens])?;
        shape("lyric_mask", &sizes(&prompt.lyric_mask)?, &[batch, lyric_tokens])?;
        let vocabulary = config.lyric_encoder_vocab_size;
        if let Some(id) = prompt.lyrics.iter().flatten().find(|&&id| id as usize >= vocabulary) {
            return Err(refused("lyrics", format!("token {id}"), format!("ids below {vocabulary}")));
        }

        let speaker = self.speaker_embedder.forward(prompt.speaker.clone());
        hooks.see("speaker_embedder", &speaker);
        let text = self.genre_embedder.forward(prompt.text.clone());
        hooks.see("genre_embedder", &text);
        let ids = indices(prompt.lyrics.iter().flatten().map(|&id| id as usize), &self.device);
        let width = config.lyric_hidden_size;
        let embedded = self.lyric_embs.clone().select(0, ids).reshape([batch, lyric_tokens, width]);
        hooks.see("lyric_embs", &embedded);
        let mask = self.mask(&prompt.lyric_mask, [batch, lyric_tokens]);
        let encoded = self.lyric_encoder.forward(embedded, mask, weaken, &hooks.at("lyric_encoder"));
        let lyrics = self.lyric_proj.forward(encoded);
        hooks.see("lyric_proj", &lyrics);

        let hidden = Tensor::cat(vec![speaker.unsqueeze_dim(1), text, lyrics], 1);
        let rows = prompt.text_mask.iter().zip(&prompt.lyric_mask);
        let mask = rows.map(|(text, lyrics)| [&[true], text.as_slice(), lyrics.as_slice()].concat());
        Ok(Conditions { hidden, mask: mask.collect() })
    }

    /// The keys and values of a context in every block.
    ///
    /// # Errors
    /// [`Error::Argument`] where shapes do not fit together.
    pub fn prepare(&self, conditions: &Conditions) -> Result<Context> {
        let [batch, tokens, width] = conditions.hidden.dims();
        shape("hidden", &[width], &[self.config.inner_dim()])?;
        shape("mask", &sizes(&conditions.mask)?, &[batch, tokens])?;
        let rope = self.rope(tokens);
        let states =
            self.blocks.iter().map(|block| block.cross_attn.prepare(conditions.hidden.clone(), &rope));
        let padding = KeyPadding { mask: conditions.mask.clone() };
        Ok(Context { states: states.collect(), padding, batch })
    }

    /// Turning factors of so many positions; where they are asked for once, every step can use them.
    pub fn rope(&self, length: usize) -> Table {
        Table::new(self.config.rope_theta, self.config.attention_head_dim, length, &self.device)
    }

    /// The velocity at a noisy latent: f32 `[batch, in_channels, max_height, frames]` →
    /// `[batch, out_channels, max_height, frames]`. `timestep` is from 0 to 1000, one for each sample; `rope` has at least
    /// as many positions as there are frames.
    ///
    /// # Errors
    /// [`Error::Argument`] where shapes do not fit together.
    pub fn decode(
        &self,
        latent: Tensor<4>,
        timestep: &[f32],
        context: &Context,
        rope: &Table,
        options: &DecodeOptions<'_>,
        hooks: &Hooks<'_>,
    ) -> Result<Tensor<4>> {
        let config = &self.config;
        let [batch, channels, height, frames] = latent.dims();
        shape("latent", &[channels, height], &[config.in_channels, config.max_height])?;
        shape("timestep", &[timestep.len()], &[batch])?;
        shape("context", &[context.batch], &[batch])?;
        let width = config.inner_dim();
        if let Some(mask) = &options.frame_mask {
            shape("frame_mask", &mask.dims(), &[batch, frames])?;
        }
        if let Some((control, _)) = &options.control {
            shape("control", &control.dims(), &[batch, frames, width])?;
        }
        if frames == 0 || frames > config.max_width.min(rope.cos.dims()[0]) {
            let needed = format!("1 to {}", config.max_width.min(rope.cos.dims()[0]));
            return Err(refused("latent", format!("{frames} frames"), needed));
        }
        if let Some(time) = timestep.iter().find(|time| !time.is_finite()) {
            return Err(refused("timestep", time.to_string(), "a number".into()));
        }

        let (time, modulations) = self.time.forward(timestep, &self.device, hooks);
        let mut x = self.proj_in.forward(latent, &hooks.at("proj_in"));
        if let Some((control, factor)) = &options.control {
            x = x.clone() + matched(control.clone(), x).mul_scalar(*factor);
        }
        for (index, block) in self.blocks.iter().enumerate() {
            let surroundings = Surroundings {
                context: &context.states[index],
                bias: (&context.padding, index),
                rope,
                frame_mask: options.frame_mask.as_ref(),
                tau: Weaken::factor(options.weaken, index),
            };
            let hooks = hooks.at("transformer_blocks");
            x = block.forward(x, &modulations, &surroundings, &hooks.at(index));
        }
        let out = self.final_layer.forward(x, time, &hooks.at("final_layer"));
        Ok(match options.output_length {
            Some(length) => of_length(out, length),
            None => out,
        })
    }

    fn mask(&self, mask: &[Vec<bool>], shape: [usize; 2]) -> Tensor<2> {
        let values: Vec<f32> = mask.iter().flatten().map(|&is_token| f32::from(u8::from(is_token))).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }
}

/// A control input in the mean and deviation of what it is added to, for each sample.
fn matched(control: Tensor<3>, x: Tensor<3>) -> Tensor<3> {
    let [batch, frames, width] = x.dims();
    let moments = |x: &Tensor<3>| {
        let x = x.clone().reshape([batch, frames * width]);
        let mean = x.clone().mean_dim(1);
        let count = (frames * width) as f32;
        let deviation = (x - mean.clone()).square().sum_dim(1).div_scalar((count - 1.0).max(1.0)).sqrt();
        (mean.unsqueeze_dim::<3>(2), deviation.unsqueeze_dim::<3>(2))
    };
    let ((own_mean, own_deviation), (mean, deviation)) = (moments(&control), moments(&x));
    (control - own_mean) * (deviation / own_deviation.add_scalar(1e-12)) + mean
}

/// Cut, or with zeros at the end.
fn of_length(x: Tensor<4>, length: usize) -> Tensor<4> {
    let [batch, channels, height, frames] = x.dims();
    if length <= frames {
        return x.narrow(3, 0, length);
    }
    let zeros = Tensor::zeros([batch, channels, height, length - frames], &x.device());
    Tensor::cat(vec![x, zeros], 3)
}

/// Rows and their length, which must be the same for all.
fn sizes<T>(rows: &[Vec<T>]) -> Result<[usize; 2]> {
    let length = rows.first().map_or(0, Vec::len);
    match rows.iter().find(|row| row.len() != length) {
        None => Ok([rows.len(), length]),
        Some(row) => {
            Err(refused("tokens", format!("rows of {length} and {}", row.len()), "one length".into()))
        }
    }
}

fn shape(argument: &'static str, found: &[usize], needed: &[usize]) -> Result<()> {
    match found == needed {
        true => Ok(()),
        false => Err(refused(argument, format!("of sizes {found:?}"), format!("{needed:?}"))),
    }
}

fn refused(argument: &'static str, found: String, needed: String) -> Error {
    Error::Argument { operation: "ACE-Step transformer", argument, found, needed }
}
