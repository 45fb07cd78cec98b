//! UMT5, which encodes the prompt (Chung et al. 2023, arXiv:2304.09151; `transformers`, `modeling_umt5.py`): the encoder
//! of T5 1.1 with a table of relative positions for each layer.
//!
//! ```text
//! ids ─ row of the table ─► x ─┬─ x += o · attention(norm x)       12 times
//!                              └─ x += wo · (gelu(wi_0 n) · wi_1 n), n = norm x
//!                           ─ norm ─► hidden states
//! ```

use burn::tensor::activation::sigmoid;
use burn::tensor::{Tensor, TensorData};
use serde::Deserialize;

use super::erg::Weaken;
use super::prompt::Tokens;
use crate::error::{Error, Result};
use crate::nn::attention::attend;
use crate::nn::bias::{BiasProvider, KeyPadding, Sum, T5Buckets};
use crate::nn::hooks::Hooks;
use crate::nn::linear::{Linear, as_type};
use crate::nn::norm::RmsNorm;
use crate::weights::{Table, Weights};

/// `config.json` of `umt5-base`; the fields of the decoder, which the released file does not have, are not read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Size of an attention head.
    pub d_kv: usize,
    /// Width of the feed-forward layers.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Buckets of relative positions, of both directions together.
    pub relative_attention_num_buckets: usize,
    /// The distance from which on all positions share a bucket.
    pub relative_attention_max_distance: usize,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// The feed-forward layers: `gated-gelu` is the only one that can be run.
    pub feed_forward_proj: String,
}

impl Config {
    /// That of `google/umt5-base`.
    pub fn released() -> Config {
        Config {
            vocab_size: 256384,
            d_model: 768,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 12,
            num_heads: 12,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "gated-gelu".into(),
        }
    }

    /// Says what this code could not run.
    ///
    /// # Errors
    /// [`Error::Model`] with the field.
    pub fn validate(&self) -> Result<()> {
        let buckets = self.relative_attention_num_buckets;
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("d_kv", self.d_kv),
            ("d_ff", self.d_ff),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("relative_attention_num_buckets", buckets),
            ("relative_attention_max_distance", self.relative_attention_max_distance),
        ];
        // Larger ones would overflow where sizes are multiplied.
        let limit = 1 << 20;
        for (field, size) in sizes {
            require(field, (1..=limit).contains(&size), size, "1 to 1048576")?;
        }
        // Half of them for each direction, and half of those for single distances.
        let quarters = buckets.is_multiple_of(4);
        require("relative_attention_num_buckets", quarters, buckets, "a multiple of 4")?;
        let distance = self.relative_attention_max_distance;
        let needed = "more than a quarter of relative_attention_num_buckets";
        require("relative_attention_max_distance", distance > buckets / 4, distance, needed)?;
        let epsilon = self.layer_norm_epsilon;
        let is_small = epsilon.is_finite() && epsilon > 0.0 && epsilon < 1.0;
        require("layer_norm_epsilon", is_small, epsilon, "a number between 0 and 1")?;
        let feed_forward = &self.feed_forward_proj;
        require("feed_forward_proj", feed_forward == "gated-gelu", feed_forward, "gated-gelu")
    }
}

fn require(field: &'static str, holds: bool, found: impl ToString, needed: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::Model { field, found: found.to_string(), needed: needed.into() }),
    }
}

/// The encoder of UMT5. Its token table stays in the file: of its 787 MB a prompt needs 3 KiB for each token.
#[derive(Debug)]
pub struct Encoder {
    config: Config,
    embedding: Table,
    positions: T5Buckets,
    blocks: Vec<Block>,
    final_layer_norm: RmsNorm,
    device: burn::tensor::Device,
}

/// Attention and a gated feed-forward layer, each behind a norm and beside a residual.
#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    feed_forward_norm: RmsNorm,
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
}

impl Encoder {
    /// Asks for every tensor of the encoder.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that this code cannot run, and those of the weights.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Encoder> {
        config.validate()?;
        let table = [config.vocab_size, config.d_model];
        let encoder = weights.at("encoder");
        // The same tensor as `shared.weight`, which most files therefore leave out.
        encoder.optional("embed_tokens.weight", &table);
        let layers = (0..config.num_layers).map(|index| encoder.at("block").at(index).at("layer"));
        let buckets = [config.relative_attention_num_buckets, config.num_heads];
        let tables = layers
            .clone()
            .map(|layer| layer.at("0.SelfAttention").tensor("relative_attention_bias.weight", buckets));
        Ok(Encoder {
            embedding: weights.table("shared.weight", table)?,
            positions: T5Buckets {
                tables: tables.collect::<Result<_>>()?,
                num_buckets: config.relative_attention_num_buckets,
                max_distance: config.relative_attention_max_distance,
                bidirectional: true,
            },
            blocks: layers.map(|layer| Block::new(config, &layer)).collect::<Result<_>>()?,
            final_layer_norm: norm(config, &encoder, "final_layer_norm")?,
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

    /// What it adds to the scores of its layers: a number for each head and distance.
    pub fn positions(&self) -> &T5Buckets {
        &self.positions
    }

    /// Encodes prompts: f32 `[batch, tokens, d_model]`. Padding is not attended to; what stands in its place in the result
    /// means nothing.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::Argument`] for prompts of different lengths, without
    /// tokens, or with a mask of another length, and those of reading the token table.
    pub fn forward(&self, tokens: &Tokens, weaken: Option<&Weaken>, hooks: &Hooks<'_>) -> Result<Tensor<3>> {
        let [batch, length] = tokens.shape()?;
        let rows = tokens.ids.iter().map(|ids| self.embedding.rows(ids));
        let rows = rows.collect::<Result<Vec<_>>>()?.concat();
        let shape = [batch, length, self.config.d_model];
        let mut x = Tensor::<3>::from_data(TensorData::new(rows, shape), &self.device);
        let padding = KeyPadding { mask: tokens.mask.clone() };
        let bias = Sum(vec![&self.positions, &padding]);
        let hooks = hooks.at("encoder");
        for (index, block) in self.blocks.iter().enumerate() {
            let factor = Weaken::factor(weaken, index);
            let heads = [self.config.num_heads, self.config.d_kv];
            x = block.forward(x, heads, (&bias, index), factor, &hooks.at("block").at(index));
        }
        let x = self.final_layer_norm.forward(x);
        hooks.see("final_layer_norm", &x);
        Ok(x)
    }
}

impl Block {
    fn new(config: &Config, layer: &Weights<'_>) -> Result<Block> {
        let (width, inner) = (config.d_model, config.num_heads * config.d_kv);
        let attention = layer.at("0.SelfAttention");
        let feed_forward = layer.at("1.DenseReluDense");
        Ok(Block {
            attention_norm: norm(config, layer, "0.layer_norm")?,
            q: attention.linear("q", [inner, width], false)?,
            k: attention.linear("k", [inner, width], false)?,
            v: attention.linear("v", [inner, width], false)?,
            o: attention.linear("o", [width, inner], false)?,
            feed_forward_norm: norm(config, layer, "1.layer_norm")?,
            wi_0: feed_forward.linear("wi_0", [config.d_ff, width], false)?,
            wi_1: feed_forward.linear("wi_1", [config.d_ff, width], false)?,
            wo: feed_forward.linear("wo", [width, config.d_ff], false)?,
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        [heads, head_dim]: [usize; 2],
        bias: (&dyn BiasProvider, usize),
        query_factor: Option<f32>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let split = |x: Tensor<3>| x.reshape([batch, tokens, heads, head_dim]).swap_dims(1, 2);
        let n = self.attention_norm.forward(x.clone());
        let mut q = self.q.forward(n.clone());
        if let Some(factor) = query_factor {
            q = q.mul_scalar(factor);
        }
        let k = as_type(split(self.k.forward(n.clone())), self.k.compute);
        let v = as_type(split(self.v.forward(n)), self.v.compute);
        // T5 has the scale of the scores in its weights.
        let attended = attend(split(q), k, v, 1.0, Some(bias));
        let attended = attended.swap_dims(1, 2).reshape([batch, tokens, heads * head_dim]);
        let x = x + self.o.forward(attended);
        hooks.see("layer.0", &x);

        let n = self.feed_forward_norm.forward(x.clone());
        let gated = gelu_tanh(self.wi_0.forward(n.clone())) * self.wi_1.forward(n);
        let x = x + self.wo.forward(gated);
        hooks.see("layer.1", &x);
        hooks.see("", &x);
        x
    }
}

fn norm(config: &Config, weights: &Weights<'_>, name: &str) -> Result<RmsNorm> {
    let scale = weights.tensor(&format!("{name}.weight"), [config.d_model])?;
    Ok(RmsNorm { scale, epsilon: config.layer_norm_epsilon as f32 })
}

/// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) by tanh, `½ x (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`, as
/// the equal `x · sigmoid(2u)`, whose exponential may overflow without harm.
fn gelu_tanh(x: Tensor<3>) -> Tensor<3> {
    let twice = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let cubed = x.clone() * x.clone().square().mul_scalar(0.044715).add_scalar(1.0);
    x * sigmoid(cubed.mul_scalar(twice))
}
