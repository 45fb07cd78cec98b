//! The model, top to bottom.
//!
//! Sequences of a batch are laid end to end: everything but attention works on rows of tokens and does not care whose
//! they are, so sequences of different lengths need no padding.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use burn::tensor::{Int, Tensor};

use super::config::Config;
use crate::backend::{Device, Float};
use crate::error::{Error, Result};
use crate::nn::attention::{Attention, Visibility};
use crate::nn::cache::{CacheLayout, KvCache};
use crate::nn::embedding::TokenTable;
use crate::nn::linear::{Linear, as_type};
use crate::nn::moe::Moe;
use crate::nn::norm::RmsNorm;
use crate::nn::rope::{Frequencies, Pairing, RotationTable};
use crate::nn::rows::concatenated;

/// Tokens that a prefill processes at a time.
const PREFILL: usize = 512;

/// GPT-OSS on a device.
pub struct Model {
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
pub struct Block {
    pub(super) window: Option<usize>,
    pub(super) attn_norm: RmsNorm,
    pub(super) qkv: Linear,
    pub(super) sinks: Tensor<1>,
    pub(super) out: Linear,
    pub(super) mlp_norm: RmsNorm,
    pub(super) moe: Moe,
}

/// New tokens of one sequence and the cache of those before.
pub struct Sequence<'a> {
    /// Keys and values of the tokens so far; holds those of `tokens` afterwards.
    pub cache: &'a mut KvCache,
    /// At least one.
    pub tokens: &'a [u32],
}

/// What a forward pass leaves behind on its way, for comparisons with a reference.
#[derive(Debug, Default)]
pub struct Trace {
    /// The rows of the embedding, f32 `[tokens, embedding_dim]`.
    pub embedding: Option<Tensor<2>>,
    /// Each block's residual stream after attention.
    pub attention: Vec<Tensor<2>>,
    /// Each block's output.
    pub blocks: Vec<Tensor<2>>,
    /// Each block's experts, `[tokens, num_active_experts]`.
    pub experts: Vec<Tensor<2, Int>>,
    /// The output of the final norm.
    pub norm: Option<Tensor<2>>,
}

impl Trace {
    /// The residual stream on its way, by the names of the reference's traces: `embedding`, `block.N.attn`,
    /// `block.N.mlp`, `norm`; f32 `[tokens, embedding_dim]` each.
    pub fn into_named(self) -> impl Iterator<Item = (String, Tensor<2>)> {
        let blocks = self.attention.into_iter().zip(self.blocks).enumerate();
        let blocks = blocks.flat_map(|(block, (attention, output))| {
            [(format!("block.{block}.attn"), attention), (format!("block.{block}.mlp"), output)]
        });
        let embedding = self.embedding.map(|rows| ("embedding".into(), rows));
        embedding.into_iter().chain(blocks).chain(self.norm.map(|rows| ("norm".into(), rows)))
    }
}

/// Where the tokens of a sequence lie in the batch, and what its attention needs.
struct Span {
    rows: Range<usize>,
    positions: Range<usize>,
    full: Visibility,
    windowed: Option<Visibility>,
}

impl Model {
    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The caches of one sequence.
    pub fn cache_layout(&self) -> &CacheLayout {
        &self.cache_layout
    }

    /// The longest sequence.
    pub fn context(&self) -> usize {
        self.cache_layout.context
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.cache_layout.clone(), self.device.burn())
    }

    /// Runs new tokens of some sequences through all blocks: f32 `[tokens, embedding_dim]` after the final norm, the
    /// sequences end to end. The caches are longer by the tokens afterwards.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::Length`] where there is no sequence, or where one is
    /// empty or exceeds the context. Nothing has changed then.
    pub fn forward(&self, batch: &mut [Sequence<'_>], mut trace: Option<&mut Trace>) -> Result<Tensor<2>> {
        let spans = self.spans(batch)?;
        if spans.is_empty() {
            return Err(Error::Length { length: 0, context: self.context() });
        }
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
            self.check_tokens(sequence.tokens)?;
            let count = sequence.tokens.len();
            let positions = sequence.cache.next(count)?;
            let visibility = |window: Option<usize>| {
                let keys = sequence.cache.key_positions(window, count);
                Visibility::causal(positions.clone(), keys, window, self.device.burn())
            };
            let window = self.blocks.iter().find_map(|block| block.window);
            // The ring is at most as long as the context that was asked for.
            let window = window.map(|window| window.min(self.context()));
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

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.config.vocabulary;
        match tokens.iter().position(|&token| token as usize >= vocabulary) {
            Some(position) => Err(Error::Token { token: tokens[position], position, vocabulary }),
            None => Ok(()),
        }
    }

    /// Logits of normalised rows: f32 `[rows, embedding_dim]` → f32 `[rows, vocabulary]`.
    pub fn unembed(&self, x: Tensor<2>) -> Tensor<2> {
        self.unembedding.logits(x)
    }

    /// Adds tokens to a sequence, in chunks, and returns the logits that follow the last one: f32 `[vocabulary]`.
    ///
    /// # Errors
    /// As [`Model::forward`]; nothing has changed then.
    pub fn prefill(&self, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor<1>> {
        let logits = self.prefill_while(cache, tokens, &mut |_| Ok(ControlFlow::Continue(())))?;
        // `next` has refused an empty sequence.
        logits.ok_or(Error::Length { length: 0, context: self.context() })
    }

    /// [`Model::prefill`] that asks before each chunk, with the tokens in the cache, whether to go on; where not, there
    /// are no logits.
    pub(super) fn prefill_while(
        &self,
        cache: &mut KvCache,
        tokens: &[u32],
        goes_on: &mut dyn FnMut(usize) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Tensor<1>>> {
        self.check_tokens(tokens)?;
        cache.next(tokens.len())?;
        let mut last = None;
        for chunk in tokens.chunks(PREFILL) {
            if goes_on(cache.len())?.is_break() {
                return Ok(None);
            }
            let x = self.forward(&mut [Sequence { cache: &mut *cache, tokens: chunk }], None)?;
            last = Some(x.narrow(0, chunk.len() - 1, 1));
        }
        Ok(last.map(|row| self.unembed(row).squeeze_dim(0)))
    }

    /// Logits after each token of a sequence of its own, chunk by chunk: `each` gets the positions and their logits,
    /// f32 `[positions, vocabulary]` row-major.
    ///
    /// # Errors
    /// As [`Model::forward`], [`Error::Device`] where reading back fails, and what `each` returns.
    pub fn logits<E: From<Error>>(
        &self,
        tokens: &[u32],
        mut each: impl FnMut(Range<usize>, Vec<f32>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check_tokens(tokens)?;
        let mut cache = self.new_cache();
        cache.next(tokens.len())?;
        // Rows of 200,000 logits: 32 of them are 26 MB.
        for chunk in tokens.chunks(32) {
            let start = cache.len();
            let x = self.forward(&mut [Sequence { cache: &mut cache, tokens: chunk }], None)?;
            each(start..start + chunk.len(), read(self.unembed(x))?)?;
        }
        Ok(())
    }
}

/// The values of a tensor in row-major order.
///
/// # Errors
/// [`Error::Device`] where the device failed at some point before.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    let data = as_type(tensor, Float::F32).try_into_data();
    let data = data.map_err(|error| Error::Device(format!("{error:?}")))?;
    data.try_into_vec().map_err(|error| Error::Device(format!("{error:?}")))
}
