//! The model in plain tensor operations, top to bottom: what the fast ways of computing it are held to, and what computes in
//! types of weights and activations that they do not have.
//!
//! Sequences of a batch are laid end to end: everything but attention works on rows of tokens and does not care whose
//! they are, so sequences of different lengths need no padding.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;

use super::config::Config;
use super::model::Trace;
use crate::backend::Device;
use crate::error::Result;
use crate::nn::attention::{Attention, Visibility};
use crate::nn::cache::{CacheLayout, KvCache};
use crate::nn::embedding::TokenTable;
use crate::nn::linear::Linear;
use crate::nn::moe::Moe;
use crate::nn::norm::RmsNorm;
use crate::nn::rope::{Frequencies, Pairing, RotationTable};
use crate::nn::rows::concatenated;

/// GPT-OSS on a device, of Burn's tensors.
pub(super) struct Model {
    pub(super) config: Config,
    pub(super) device: Device,
    pub(super) cache_layout: Arc<CacheLayout>,
    pub(super) rope: Frequencies,
    pub(super) embedding: TokenTable,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: RmsNorm,
    pub(super) unembedding: TokenTable,
}

/// One transformer block.
pub(super) struct Block {
    pub(super) window: Option<usize>,
    pub(super) attn_norm: RmsNorm,
    pub(super) qkv: Linear,
    pub(super) sinks: Tensor<1>,
    pub(super) out: Linear,
    pub(super) mlp_norm: RmsNorm,
    pub(super) moe: Moe,
}

/// New tokens of one sequence and the cache of those before.
pub(super) struct Sequence<'a> {
    /// Keys and values of the tokens so far; holds those of `tokens` afterwards.
    pub cache: &'a mut KvCache,
    /// At least one.
    pub tokens: &'a [u32],
}

/// Where the tokens of a sequence lie in the batch, and what its attention needs.
struct Span {
    rows: Range<usize>,
    positions: Range<usize>,
    full: Visibility,
    windowed: Option<Visibility>,
}

impl Model {
    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.cache_layout.clone(), self.device.burn())
    }

    /// Runs new tokens of some sequences through all blocks: f32 `[tokens, embedding_dim]` after the final norm, the
    /// sequences end to end. The caches are longer by the tokens afterwards.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) where a sequence is empty or exceeds the context. Nothing has changed then.
    pub fn forward(&self, batch: &mut [Sequence<'_>], mut trace: Option<&mut Trace>) -> Result<Tensor<2>> {
        let spans = self.spans(batch)?;
        let tokens: Vec<u32> = batch.iter().flat_map(|sequence| sequence.tokens).copied().collect();
        let rope = self.rope.table(spans.iter().flat_map(|span| span.positions.clone()), self.device.burn());
        let mut x = self.embedding.rows(&tokens);
        if let Some(trace) = trace.as_deref_mut() {
            trace.embedding = Some(x.clone());
        }
        for (index, block) in self.blocks.iter().enumerate() {
            x = x.clone() + self.attention(index, block, block.attn_norm.forward(x), &rope, &spans, batch);
            let normed = block.mlp_norm.forward(x.clone());
            let selection = block.moe.router.forward(normed.clone());
            if let Some(trace) = trace.as_deref_mut() {
                trace.attention.push(x.clone());
                trace.experts.push(selection.experts.clone());
            }
            x = x + block.moe.forward_selected(normed, selection);
            if let Some(trace) = trace.as_deref_mut() {
                trace.blocks.push(x.clone());
            }
        }
        for sequence in batch {
            sequence.cache.advance(sequence.tokens.len());
        }
        let x = self.norm.forward(x);
        if let Some(trace) = trace {
            trace.norm = Some(x.clone());
        }
        Ok(x)
    }

    /// Attention of a block, without the residual: f32 `[tokens, embedding_dim]`.
    fn attention(
        &self,
        index: usize,
        block: &Block,
        x: Tensor<2>,
        rope: &RotationTable,
        spans: &[Span],
        batch: &mut [Sequence<'_>],
    ) -> Tensor<2> {
        let Config { head_dim, num_heads, num_kv_heads, .. } = self.config;
        let tokens = x.dims()[0];
        let qkv = block.qkv.forward(x).reshape([tokens, num_heads + 2 * num_kv_heads, head_dim]);
        // The stored rows of Q and K are interleaved pairs, and carry the scale of the scores.
        let q = rope.rotate(qkv.clone().narrow(1, 0, num_heads), Pairing::Interleaved);
        let k = rope.rotate(qkv.clone().narrow(1, num_heads, num_kv_heads), Pairing::Interleaved);
        let v = qkv.narrow(1, num_heads + num_kv_heads, num_kv_heads);
        let attention = Attention { scale: 1.0, sinks: Some(block.sinks.clone()), bias: None, layer: index };
        let outputs = spans.iter().zip(batch).map(|(span, sequence)| {
            let of_span = |tensor: &Tensor<3>| tensor.clone().narrow(0, span.rows.start, span.rows.len());
            let [k, v] = [&k, &v].map(|tensor| of_span(tensor).swap_dims(0, 1));
            let (keys, values) = sequence.cache.append(index, k, v);
            let seen = span.windowed.as_ref().filter(|_| block.window.is_some()).unwrap_or(&span.full);
            attention.forward(of_span(&q), keys, values, seen)
        });
        let outputs = concatenated(outputs.collect(), 0).reshape([tokens, num_heads * head_dim]);
        block.out.forward(outputs)
    }

    fn spans(&self, batch: &[Sequence<'_>]) -> Result<Vec<Span>> {
        let mut end = 0;
        let mut spans = Vec::with_capacity(batch.len());
        for sequence in batch {
            let count = sequence.tokens.len();
            let positions = sequence.cache.next(count)?;
            let visibility = |window: Option<usize>| {
                let keys = sequence.cache.key_positions(window, count);
                Visibility::causal(positions.clone(), keys, window, self.device.burn())
            };
            let window = self.blocks.iter().find_map(|block| block.window);
            // The ring is at most as long as the context that was asked for.
            let window = window.map(|window| window.min(self.cache_layout.context));
            spans.push(Span {
                rows: end..end + count,
                full: visibility(None),
                windowed: window.map(|window| visibility(Some(window))),
                positions,
            });
            end += count;
        }
        Ok(spans)
    }

    /// Logits of normalised rows: f32 `[rows, embedding_dim]` → f32 `[rows, vocabulary]`.
    pub fn unembed(&self, x: Tensor<2>) -> Tensor<2> {
        self.unembedding.logits(x)
    }
}
