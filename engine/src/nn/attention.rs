//! Attention with what GPT-OSS and its relatives need: grouped queries, sinks, a sliding window, an additive bias.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use super::bias::{BiasProvider, BiasRequest, HIDDEN};
use super::linear::as_type;
use super::rows::{concatenated, indices, rows_of_step};
use crate::backend::Float;
use crate::kernels::product::product;

/// Scaled dot-product attention.
#[derive(Clone)]
pub struct Attention<'a> {
    /// The factor of the scores; `model.bin` has it in the weights already, so that 1 is right there.
    pub scale: f32,
    /// f32 `[heads]`: a logit per head that takes part in the softmax and has no value ("sink",
    /// `gpt_oss/torch/model.py`).
    pub sinks: Option<Tensor<1>>,
    /// Added to the scores.
    pub bias: Option<&'a dyn BiasProvider>,
    /// Which layer the bias is told.
    pub layer: usize,
}

/// The keys that queries meet, and which of them each query sees.
#[derive(Clone, Debug)]
pub struct Visibility {
    /// Positions of the queries.
    pub queries: Range<usize>,
    /// Positions of the keys.
    pub keys: Vec<usize>,
    /// f32 `[1, queries, keys]`, 0 or [a large negative number](HIDDEN), in parts that any device can hold in a buffer: all
    /// but the last have equally many queries. `None` where all see all.
    mask: Option<Vec<Tensor<3>>>,
}

impl Visibility {
    /// Causal attention: a query sees keys up to its own position, the last `window` of them where there is a window
    /// (its own counts).
    pub fn causal(
        queries: Range<usize>,
        keys: Vec<usize>,
        window: Option<usize>,
        device: &Device,
    ) -> Visibility {
        let (first, last) = (queries.start, queries.end.saturating_sub(1));
        // What reaches beyond the first position is no window, and may not fit the device's integers.
        let window = window.filter(|&window| window < queries.end);
        let sees_all = |query: usize| {
            keys.iter().all(|&key| key <= query && window.is_none_or(|window| key + window > query))
        };
        let mask = (!(sees_all(first) && sees_all(last))).then(|| {
            let key = indices(keys.iter().copied(), device).unsqueeze_dim::<2>(0);
            let step = rows_of_step(keys.len());
            let parts = queries.clone().step_by(step).map(|start| {
                let part = start..queries.end.min(start + step);
                let size = [part.len(), keys.len()];
                let query = indices(part, device).unsqueeze_dim::<2>(1);
                let behind = query.expand(size) - key.clone().expand(size);
                let mut hidden = behind.clone().lower_elem(0);
                if let Some(window) = window {
                    hidden = hidden.bool_or(behind.greater_equal_elem(window as i64));
                }
                Tensor::<2>::zeros(size, device).mask_fill(hidden, HIDDEN).unsqueeze_dim(0)
            });
            parts.collect()
        });
        Visibility { queries, keys, mask }
    }

    /// What is added to the scores of some of the queries: f32 `[1, rows, keys]`.
    fn mask(&self, rows: Range<usize>) -> Option<Tensor<3>> {
        let parts = self.mask.as_ref()?;
        let step = parts.first()?.dims()[1];
        let parts = (rows.start / step..rows.end.div_ceil(step)).map(|part| {
            let start = rows.start.max(part * step);
            let end = rows.end.min((part + 1) * step);
            parts[part].clone().narrow(1, start - part * step, end - start)
        });
        Some(concatenated(parts.collect(), 1))
    }
}

impl<'a> Attention<'a> {
    /// Plain attention with this factor, commonly `1 / √head_dim`.
    pub fn scaled(scale: f32) -> Attention<'a> {
        Attention { scale, sinks: None, bias: None, layer: 0 }
    }

    /// f32 queries `[tokens, heads, head_dim]` over f32 keys and values `[kv_heads, keys, head_dim]`:
    /// f32 `[tokens, heads, head_dim]`. Query head `h` reads key head `h / (heads / kv_heads)`.
    pub fn forward(&self, q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, visibility: &Visibility) -> Tensor<3> {
        let [tokens, heads, _] = q.dims();
        let keys = k.dims()[1];
        let step = rows_of_step(heads * keys);
        let k = k.swap_dims(1, 2);
        let parts = (0..tokens).step_by(step).map(|start| {
            let rows = start..tokens.min(start + step);
            let q = q.clone().narrow(0, start, rows.len());
            self.rows(q, k.clone(), v.clone(), rows, visibility)
        });
        concatenated(parts.collect(), 0)
    }

    fn rows(
        &self,
        q: Tensor<3>,
        k: Tensor<3>,
        v: Tensor<3>,
        rows: Range<usize>,
        seen: &Visibility,
    ) -> Tensor<3> {
        let [tokens, heads, head_dim] = q.dims();
        let [kv_heads, _, keys] = k.dims();
        let group = heads / kv_heads;
        // The queries of a group become rows of one product: [kv_heads, group · tokens, head_dim].
        let q = q.reshape([tokens, kv_heads, group, head_dim]).permute([1, 2, 0, 3]);
        let q = q.reshape([kv_heads, group * tokens, head_dim]);
        let mut scores = product(q, k).mul_scalar(self.scale).reshape([heads, tokens, keys]);
        if let Some(bias) = self.bias {
            let queries = seen.queries.start + rows.start..seen.queries.start + rows.end;
            let request = BiasRequest { layer: self.layer, batch: 1, heads, queries, keys: &seen.keys };
            if let Some(bias) = bias.bias(&request, &v.device()) {
                scores = scores + bias.squeeze_dim(0);
            }
        }
        if let Some(mask) = seen.mask(rows) {
            scores = scores + mask;
        }
        let weights = softmax_with_sink(scores, self.sinks.clone());
        let out = product(weights.reshape([kv_heads, group * tokens, keys]), v);
        out.reshape([kv_heads, group, tokens, head_dim])
            .permute([2, 0, 1, 3])
            .reshape([tokens, heads, head_dim])
    }
}

/// Softmax attention of every query over every key, in both directions: f32 queries `[batch, heads, queries, head_dim]`
/// over keys and values `[batch, heads, keys, head_dim]` → f32 `[batch, heads, queries, head_dim]`.
///
/// Products have factors of the type of keys and values; scores and softmax are f32. A bias is asked for as the layer that
/// it comes with.
pub fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scale: f32,
    bias: Option<(&dyn BiasProvider, usize)>,
) -> Tensor<4> {
    let keys: Vec<usize> = (0..k.dims()[2]).collect();
    attend_from(0, q, k, &keys, v, scale, bias)
}

/// [`attend`] for a part of the queries, the first of them at the position `start`, over keys at some positions.
pub fn attend_from(
    start: usize,
    q: Tensor<4>,
    k: Tensor<4>,
    keys: &[usize],
    v: Tensor<4>,
    scale: f32,
    bias: Option<(&dyn BiasProvider, usize)>,
) -> Tensor<4> {
    let [batch, heads, queries, _] = q.dims();
    let factors = k.dtype();
    let cast = |x: Tensor<4>| if x.dtype() == factors { x } else { x.cast(factors) };
    let k = k.swap_dims(2, 3);
    let step = rows_of_step(batch * heads * keys.len());
    let parts = (0..queries).step_by(step).map(|first| {
        let rows = first..queries.min(first + step);
        let q = q.clone().narrow(2, first, rows.len());
        let mut scores = as_type(product(cast(q), k.clone()), Float::F32).mul_scalar(scale);
        let bias = bias.and_then(|(provider, layer)| {
            let queries = start + rows.start..start + rows.end;
            provider.bias(&BiasRequest { layer, batch, heads, queries, keys }, &v.device())
        });
        let is_biased = bias.is_some();
        if let Some(bias) = bias {
            scores = (scores + bias).clamp_min(HIDDEN);
        }
        let largest = scores.clone().max_dim(3);
        let weights = (scores - largest.clone()).exp();
        let mut inverse = weights.clone().sum_dim(3).recip();
        if is_biased {
            // Where all is hidden, nothing is attended to.
            inverse = inverse * largest.greater_elem(HIDDEN / 2.0).float();
        }
        as_type(product(cast(weights * inverse), v.clone()), Float::F32)
    });
    concatenated(parts.collect(), 2)
}

/// Softmax over the last axis of `[heads, queries, keys]` in which a sink logit `[heads]` takes part without being
/// returned: `exp(s) / (Σ exp(s) + exp(sink))`.
pub fn softmax_with_sink(scores: Tensor<3>, sinks: Option<Tensor<1>>) -> Tensor<3> {
    let largest = scores.clone().max_dim(2);
    let Some(sinks) = sinks else {
        let weights = (scores - largest).exp();
        let sum = weights.clone().sum_dim(2);
        return weights / sum;
    };
    let heads = sinks.dims()[0];
    let sinks = sinks.reshape([heads, 1, 1]).expand(largest.dims());
    let largest = largest.max_pair(sinks.clone());
    let weights = (scores - largest.clone()).exp();
    let sum = weights.clone().sum_dim(2) + (sinks - largest).exp();
    weights / sum
}

/// `exp(s) / (Σ exp(s) + 1)`, which can attend to nothing: [`softmax_with_sink`] with a sink of zero.
pub fn quiet_softmax(scores: Tensor<3>) -> Tensor<3> {
    let zero = Tensor::zeros([scores.dims()[0]], &scores.device());
    softmax_with_sink(scores, Some(zero))
}
