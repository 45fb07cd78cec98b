//! Attention of the blocks: linear over the frames, softmax over the context.

use burn::tensor::Tensor;
use burn::tensor::activation::relu;

use super::rope::Table;
use crate::error::Result;
use crate::kernels::product::product;
use crate::nn::attention::attend;
use crate::nn::bias::BiasProvider;
use crate::nn::hooks::Hooks;
use crate::nn::linear::{Linear, as_type};
use crate::weights::Weights;

/// What the denominator of linear attention cannot fall below.
const EPSILON: f32 = 1e-15;

/// Linear attention with ReLU features (Katharopoulos et al. 2020, arXiv:2006.16236; `CustomLiteLAProcessor2_0` of
/// `acestep/models/customer_attention_processor.py`): `Σ_t v_t (k_t · q_s) / Σ_t (k_t · q_s)`.
///
/// There is no score matrix, so it takes no [`BiasProvider`].
pub struct LinearAttention {
    qkv: Linear,
    out: Linear,
    head_dim: usize,
}

impl LinearAttention {
    pub(super) fn new(width: usize, head_dim: usize, weights: &Weights<'_>) -> Result<LinearAttention> {
        Ok(LinearAttention {
            qkv: weights.stacked(&["to_q", "to_k", "to_v"], [width, width], true)?,
            out: weights.linear("to_out.0", [width, width], true)?,
            head_dim,
        })
    }

    /// f32 `[batch, frames, width]` → the same. Frames whose `frame_mask`, f32 `[batch, frames]`, is 0 are not attended to.
    ///
    /// `tau` multiplies the queries, which changes nothing but rounding: the factor is in numerator and denominator.
    pub fn forward(
        &self,
        x: Tensor<3>,
        rope: &Table,
        frame_mask: Option<&Tensor<2>>,
        tau: Option<f32>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let [batch, frames, width] = x.dims();
        let heads = width / self.head_dim;
        let qkv = self.qkv.forward(x);
        let part = |index| qkv.clone().narrow(2, index * width, width);
        hooks.see("to_q", &part(0));
        let split = |x: Tensor<3>| x.reshape([batch, frames, heads, self.head_dim]);
        let [q, k, mut v] = [part(0), part(1), part(2)].map(split);
        let mut q = rope.apply(q);
        let mut k = rope.apply(k);
        if let Some(tau) = tau {
            q = q.mul_scalar(tau);
        }
        if let Some(mask) = frame_mask {
            let mask = mask.clone().reshape([batch, frames, 1, 1]);
            [q, k, v] = [q, k, v].map(|x| x * mask.clone());
        }
        let [q, k, v] = [relu(q), relu(k), v].map(|x| x.swap_dims(1, 2));
        let out = linear_attention(q, k, v);
        let out = self.out.forward(out.swap_dims(1, 2).reshape([batch, frames, width]));
        hooks.see("", &out);
        out
    }
}

/// `q (kᵀ v) / (q · Σ k)` for features that are not negative, f32 `[batch, heads, positions, head_dim]` each and in f32.
pub fn linear_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let keys = k.clone().sum_dim(2);
    let states = product(k.swap_dims(2, 3), v);
    let weights = (q.clone() * keys).sum_dim(3);
    product(q, states) / weights.add_scalar(EPSILON)
}

/// Softmax attention of frames over the context. Of the original's two sets of projections, one is never used.
pub struct CrossAttention {
    q: Linear,
    kv: Linear,
    out: Linear,
    head_dim: usize,
}

/// A context as one block's cross-attention meets it: turned keys, and values.
pub struct ContextStates {
    /// `[batch, heads, tokens, head_dim]`, in the type of products.
    k: Tensor<4>,
    /// The same.
    v: Tensor<4>,
}

/// What attention needs beside the frames.
#[derive(Clone, Copy)]
pub(in crate::ace_step) struct Surroundings<'a> {
    pub(in crate::ace_step) context: &'a ContextStates,
    /// Hides what of the context is padding; and the layer that asks it.
    pub(in crate::ace_step) bias: (&'a dyn BiasProvider, usize),
    pub(in crate::ace_step) rope: &'a Table,
    /// f32 `[batch, frames]`: frames where it is 0 are not attended to, and attend to nothing.
    pub(in crate::ace_step) frame_mask: Option<&'a Tensor<2>>,
    /// Multiplies the queries.
    pub(in crate::ace_step) tau: Option<f32>,
}

impl CrossAttention {
    pub(super) fn new(width: usize, head_dim: usize, weights: &Weights<'_>) -> Result<CrossAttention> {
        for name in ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] {
            weights.unused_linear(name, [width, width]);
        }
        Ok(CrossAttention {
            q: weights.linear("to_q", [width, width], true)?,
            kv: weights.stacked(&["to_k", "to_v"], [width, width], true)?,
            out: weights.linear("to_out.0", [width, width], true)?,
            head_dim,
        })
    }

    /// Keys and values of a context, f32 `[batch, tokens, width]`: the same in every step.
    pub(super) fn prepare(&self, context: Tensor<3>, rope: &Table) -> ContextStates {
        let [batch, tokens, width] = context.dims();
        let kv = self.kv.forward(context);
        let split = |index| {
            let part = kv.clone().narrow(2, index * width, width);
            part.reshape([batch, tokens, width / self.head_dim, self.head_dim])
        };
        let [k, v] = [rope.apply(split(0)), split(1)].map(|x| as_type(x.swap_dims(1, 2), self.q.compute));
        ContextStates { k, v }
    }

    /// f32 `[batch, frames, width]` → the same.
    pub(in crate::ace_step) fn forward(
        &self,
        x: Tensor<3>,
        around: &Surroundings<'_>,
        hooks: &Hooks<'_>,
    ) -> Tensor<3> {
        let [batch, frames, width] = x.dims();
        let q = self.q.forward(x).reshape([batch, frames, width / self.head_dim, self.head_dim]);
        let scale = (self.head_dim as f32).sqrt().recip() * around.tau.unwrap_or(1.0);
        let q = around.rope.apply(q).swap_dims(1, 2);
        let ContextStates { k, v } = around.context;
        let out = attend(q, k.clone(), v.clone(), scale, Some(around.bias));
        let mut out = out.swap_dims(1, 2).reshape([batch, frames, width]);
        if let Some(mask) = around.frame_mask {
            out = out * mask.clone().reshape([batch, frames, 1]);
        }
        let out = self.out.forward(out);
        hooks.see("", &out);
        out
    }
}
