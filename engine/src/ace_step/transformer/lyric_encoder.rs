//! The lyric encoder: a Conformer (Gulati et al. 2020, arXiv:2005.08100) without its convolutions, with relative positions
//! (Dai et al. 2019, arXiv:1901.02860). `acestep/models/lyrics_utils/lyric_encoder.py`.

use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor, TensorData};

use super::config::Config;
use crate::ace_step::erg::Weaken;
use crate::error::Result;
use crate::kernels::product::product;
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::nn::norm::LayerNorm;
use crate::weights::Weights;

const EPSILON: f32 = 1e-5;
/// Added to the score of a key that is padding.
const HIDDEN: f32 = -1e30;

pub(super) struct LyricEncoder {
    embed: Linear,
    embed_norm: LayerNorm,
    encoders: Vec<Encoder>,
    after_norm: LayerNorm,
    width: usize,
}

struct Encoder {
    self_attn: RelativeAttention,
    norm_mha: LayerNorm,
    w_1: Linear,
    w_2: Linear,
    norm_ff: LayerNorm,
}

struct RelativeAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    pos: Linear,
    out: Linear,
    /// f32 `[heads, 1, head_dim]`, added to queries where they meet keys.
    pos_bias_u: Tensor<3>,
    /// The same, where they meet positions.
    pos_bias_v: Tensor<3>,
}

impl LyricEncoder {
    pub(super) fn new(config: &Config, weights: &Weights<'_>) -> Result<LyricEncoder> {
        let width = config.lyric_hidden_size;
        let embed = weights.at("embed").at("out");
        let encoders = (0..config.lyric_encoder_num_blocks)
            .map(|index| Encoder::new(config, &weights.at("encoders").at(index)));
        Ok(LyricEncoder {
            embed: embed.linear("0", [width, width], true)?,
            embed_norm: layer_norm(&embed, "1", width)?,
            encoders: encoders.collect::<Result<_>>()?,
            after_norm: layer_norm(weights, "after_norm", width)?,
            width,
        })
    }

    /// f32 `[batch, tokens, width]` → the same. Tokens whose `mask`, f32 `[batch, tokens]`, is 0 are not attended to.
    pub(super) fn forward(
        &self,
        x: Tensor<3>,
        mask: Tensor<2>,
        weaken: Option<&Weaken>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let tokens = x.dims()[1];
        let positions = positions(tokens, self.width, &x.device());
        let embedded = self.embed_norm.forward(self.embed.forward(x));
        hooks.see("embed.out", &embedded);
        let mut x = embedded.mul_scalar((self.width as f32).sqrt());
        hooks.see("embed", &x);
        for (index, encoder) in self.encoders.iter().enumerate() {
            let hooks = hooks.at(format_args!("encoders.{index}"));
            x = encoder.forward(x, &mask, &positions, Weaken::factor(weaken, index), &hooks);
        }
        let x = self.after_norm.forward(x);
        hooks.see("", &x);
        x
    }
}

/// Sines and cosines of the distances `tokens − 1` down to `1 − tokens`: f32 `[2 · tokens − 1, width]`.
pub(in crate::ace_step) fn positions(tokens: usize, width: usize, device: &Device) -> Tensor<2> {
    let frequencies: Vec<f32> =
        (0..width / 2).map(|m| (2.0 * m as f32 * -((1e4f64).ln() / width as f64) as f32).exp()).collect();
    let distances = (0..2 * tokens - 1).map(|row| (tokens - 1) as f32 - row as f32);
    let values = distances.flat_map(|distance| {
        let angles = frequencies.iter().map(move |frequency| f64::from(distance * frequency));
        angles.flat_map(|angle| [angle.sin() as f32, angle.cos() as f32])
    });
    Tensor::from_data(TensorData::new(values.collect::<Vec<_>>(), [2 * tokens - 1, width]), device)
}

impl Encoder {
    fn new(config: &Config, weights: &Weights<'_>) -> Result<Encoder> {
        let (width, units) = (config.lyric_hidden_size, config.lyric_encoder_linear_units);
        Ok(Encoder {
            self_attn: RelativeAttention::new(config, &weights.at("self_attn"))?,
            norm_mha: layer_norm(weights, "norm_mha", width)?,
            w_1: weights.linear("feed_forward.w_1", [units, width], true)?,
            w_2: weights.linear("feed_forward.w_2", [width, units], true)?,
            norm_ff: layer_norm(weights, "norm_ff", width)?,
        })
    }

    fn forward(
        &self,
        x: Tensor<3>,
        mask: &Tensor<2>,
        positions: &Tensor<2>,
        tau: Option<f32>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let attended = self.self_attn.forward(self.norm_mha.forward(x.clone()), mask, positions, tau);
        hooks.see("self_attn", &attended);
        let x = x + attended;
        let fed = self.w_2.forward(silu(self.w_1.forward(self.norm_ff.forward(x.clone()))));
        hooks.see("feed_forward", &fed);
        let x = x + fed;
        hooks.see("", &x);
        x
    }
}

impl RelativeAttention {
    fn new(config: &Config, weights: &Weights<'_>) -> Result<RelativeAttention> {
        let width = config.lyric_hidden_size;
        let heads = config.lyric_encoder_attention_heads;
        let head_dim = width / heads;
        let linear = |name| weights.linear(name, [width, width], true);
        let bias = |name| weights.tensor(name, [heads, head_dim]).map(|bias| bias.unsqueeze_dim(1));
        Ok(RelativeAttention {
            q: linear("linear_q")?,
            k: linear("linear_k")?,
            v: linear("linear_v")?,
            pos: weights.linear("linear_pos", [width, width], false)?,
            out: linear("linear_out")?,
            pos_bias_u: bias("pos_bias_u")?,
            pos_bias_v: bias("pos_bias_v")?,
        })
    }

    fn forward(&self, x: Tensor<3>, mask: &Tensor<2>, positions: &Tensor<2>, tau: Option<f32>) -> Tensor<3> {
        let [batch, tokens, width] = x.dims();
        let [heads, _, head_dim] = self.pos_bias_u.dims();
        let split = |x: Tensor<3>| x.reshape([batch, tokens, heads, head_dim]).swap_dims(1, 2);
        let mut q = self.q.forward(x.clone());
        if let Some(tau) = tau {
            q = q.mul_scalar(tau);
        }
        let (q, k, v) = (split(q), split(self.k.forward(x.clone())), split(self.v.forward(x)));
        let of_keys = product(q.clone() + self.pos_bias_u.clone().unsqueeze(), k.swap_dims(2, 3));
        let rows = positions.dims()[0];
        let p = self.pos.forward(positions.clone()).reshape([1, rows, heads, head_dim]);
        let p = p.permute([0, 2, 3, 1]).expand([batch, heads, head_dim, rows]);
        let of_positions = of_distances(product(q + self.pos_bias_v.clone().unsqueeze(), p));
        let scores = (of_keys + of_positions).div_scalar((head_dim as f32).sqrt());
        let mask = mask.clone().reshape([batch, 1, 1, tokens]);
        let scores = scores + (mask.clone().neg().add_scalar(1.0)).mul_scalar(HIDDEN);
        let largest = scores.clone().max_dim(3);
        let weights = (scores - largest).exp();
        let sum = weights.clone().sum_dim(3);
        // Where all is hidden, all weights are zero.
        let weights = weights / sum * mask;
        let out = product(weights, v).swap_dims(1, 2).reshape([batch, tokens, width]);
        self.out.forward(out)
    }
}

/// From a row for each query and a column for each distance, `tokens − 1` first, the distance of each query and key:
/// `[…, tokens, 2 · tokens − 1]` → `[…, tokens, tokens]`, whose `[i, j]` is column `tokens − 1 − i + j`.
///
/// A column of zeros before each row moves row `i` by `i` where rows are read as rows one shorter.
fn of_distances(scores: Tensor<4>) -> Tensor<4> {
    let [batch, heads, tokens, columns] = scores.dims();
    if tokens == 1 {
        return scores;
    }
    let zeros = Tensor::zeros([batch, heads, tokens, 1], &scores.device());
    let padded = Tensor::cat(vec![zeros, scores], 3).reshape([batch, heads, columns + 1, tokens]);
    let moved = padded.narrow(2, 1, columns).reshape([batch, heads, tokens, columns]);
    moved.narrow(3, 0, tokens)
}

fn layer_norm(weights: &Weights<'_>, name: &str, width: usize) -> Result<LayerNorm> {
    Ok(LayerNorm {
        weight: weights.tensor(&format!("{name}.weight"), [width])?,
        bias: weights.tensor(&format!("{name}.bias"), [width])?,
        epsilon: EPSILON,
    })
}
