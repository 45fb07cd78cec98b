//! Attention with what GPT-OSS and its relatives need: grouped queries, sinks, a sliding window, an additive bias.

use std::ops::Range;

use burn::tensor::{Device, Tensor};

use super::bias::{BiasProvider, BiasRequest};
use super::rows::{concatenated, indices, rows_of_step};
use crate::kernels::product::product;

/// Added to the score of a key that a query may not see: far below any score, and finite so that no device has to
/// handle infinities.
const HIDDEN: f32 = -1e30;

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
            let request = BiasRequest { layer: self.layer, queries, keys: &seen.keys, heads };
            scores = scores + bias.bias(&request, &v.device());
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
