//! Many new tokens of one sequence, a chunk at a time.
//!
//! ```text
//! embedding
//!   × blocks   project ─ attention ─ finish     (`rows`)
//! the last row ─ unembedding (norm)
//! ```

use cubecl::server::Handle;
use half::f16;

use super::rows::{Place, Rows};
use super::{Cache, Model, Stage, State};
use crate::error::Result;
use crate::gpt_oss::config::Config;
use crate::kernels::method::Method;
use crate::kernels::prefill_attention::{self, PrefillAttention};
use crate::kernels::{copy, embedding, linear, normalise};
use crate::native::Trace;

/// Tokens of a chunk, at most.
pub const CHUNK: usize = 2048;
/// Rows that [`Model::unembed`] multiplies at a time.
const ROWS: usize = 4;

impl Model {
    /// Adds tokens to a sequence.
    ///
    /// # Errors
    /// [`Error::Length`] where there are none or they exceed the context, [`Error::Token`] for an id outside the vocabulary,
    /// [`Error::Device`] where the device fails.
    ///
    /// [`Error::Length`]: crate::Error::Length
    /// [`Error::Token`]: crate::Error::Token
    /// [`Error::Device`]: crate::Error::Device
    pub fn fill(&self, cache: &mut Cache, tokens: &[u32]) -> Result<()> {
        self.run(&mut self.lock(), cache, tokens, None, &mut |_, _| Ok(()))
    }

    /// [`Model::fill`], and the logits that follow the last token: f32 `[vocabulary]`.
    ///
    /// # Errors
    /// As [`Model::fill`].
    pub fn prefill(&self, cache: &mut Cache, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut state = self.lock();
        let (width, row) = (self.config.embedding_dim, state.buffers.x.clone());
        self.run(&mut state, cache, tokens, None, &mut |x, count| {
            copy::launch(&self.client, x, (count - 1) * width, &row, 0, width);
            Ok(())
        })?;
        self.unembed_step(&state, 1, self.config.rmsnorm_epsilon.to_bits());
        self.read_logits(&state, 1)
    }

    /// [`Model::fill`], and f32 `[tokens, embedding_dim]`, the rows after the final norm.
    ///
    /// # Errors
    /// As [`Model::fill`].
    pub fn forward(
        &self,
        cache: &mut Cache,
        tokens: &[u32],
        mut trace: Option<&mut Trace>,
    ) -> Result<Vec<f32>> {
        let width = self.config.embedding_dim;
        let mut rows = Vec::with_capacity(tokens.len() * width);
        let mut state = self.lock();
        self.run(&mut state, cache, tokens, trace.as_deref_mut(), &mut |x, count| {
            let normed = self.client.empty(count * width * size_of::<f32>());
            normalise::launch_for(
                &self.client,
                self.normalisation(),
                count,
                x,
                &self.weights.norm,
                &normed,
                Method::Units,
            );
            rows.extend(self.read::<f32>(&normed, count * width)?);
            Ok(())
        })?;
        if let Some(trace) = trace {
            trace.norm.extend_from_slice(&rows);
        }
        Ok(rows)
    }

    /// Logits of normalised rows: f32 `[rows, embedding_dim]` → f32 `[rows, vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    pub fn unembed(&self, rows: &[f32]) -> Result<Vec<f32>> {
        let Config { embedding_dim, vocabulary, .. } = self.config;
        let unembedding = linear::Linear {
            rows: vocabulary,
            columns: embedding_dim,
            bias: false,
            residual: false,
            epsilon: None,
        };
        let mut logits = Vec::with_capacity(rows.len() / embedding_dim * vocabulary);
        let _alone = self.lock();
        for rows in rows.chunks(ROWS * embedding_dim) {
            let count = rows.len() / embedding_dim;
            let x = self.client.create_from_slice(bytemuck::cast_slice(rows));
            let y = self.client.empty(count * vocabulary * size_of::<f32>());
            let buffers = linear::Buffers {
                weights: &self.weights.unembedding,
                bias: &self.weights.norm,
                norm: &self.weights.norm,
                x: &x,
                y: &y,
            };
            linear::launch(&self.client, unembedding, count, &buffers);
            logits.extend(self.read::<f32>(&y, count * vocabulary)?);
        }
        Ok(logits)
    }

    /// Chunk after chunk; `each` gets the residual stream of one, f32 `[count, embedding_dim]`, and its `count`.
    fn run(
        &self,
        state: &mut State,
        cache: &mut Cache,
        tokens: &[u32],
        mut trace: Option<&mut Trace>,
        each: &mut dyn FnMut(&Handle, usize) -> Result<()>,
    ) -> Result<()> {
        cache.check_owner(&self.full)?;
        cache.next(tokens.len())?;
        self.config.check_tokens(tokens)?;
        let rows = Rows::empty(&self.client, &self.config, tokens.len().min(CHUNK));
        for chunk in tokens.chunks(CHUNK) {
            self.reserve(state, cache, chunk.len())?;
            self.chunk(state, &rows, cache, chunk, trace.as_deref_mut())?;
            cache.advance(chunk.len());
            each(&rows.x, chunk.len())?;
        }
        Ok(())
    }

    /// The kernels of a chunk, after [`Model::reserve`].
    fn chunk(
        &self,
        state: &State,
        rows: &Rows,
        cache: &Cache,
        tokens: &[u32],
        mut trace: Option<&mut Trace>,
    ) -> Result<()> {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, vocabulary, .. } = self.config;
        let (client, weights) = (&self.client, &self.weights);
        let (first, count) = (cache.len(), tokens.len());
        // All pages of the sequence: a window's ring could hold one page twice.
        let table = self.table(None);
        let upload = |numbers: &[u32]| client.create_from_slice(bytemuck::cast_slice(numbers));
        let pages = [&cache.full, &cache.windowed].map(|pages| upload(&pages.table(table)));
        let positions: Vec<u32> = (first as u32..).take(count).collect();
        let (ids, positions) = (upload(tokens), upload(&positions));
        embedding::launch(client, &weights.embedding, &ids, &rows.x, vocabulary, embedding_dim, count);
        let x = || self.read::<f32>(&rows.x, count * embedding_dim);
        if let Some(trace) = trace.as_deref_mut() {
            trace.embedding.extend(x()?);
            let blocks = weights.blocks.len();
            trace.attention.resize(blocks, Vec::new());
            trace.experts.resize(blocks, Vec::new());
            trace.blocks.resize(blocks, Vec::new());
        }
        for (index, (block, [keys, values])) in weights.blocks.iter().zip(&state.caches).enumerate() {
            let window = self.config.window(index);
            let place = Place {
                keys,
                values,
                cache_len: self.cache_len(window.is_some()),
                positions: &positions,
                pages: &pages[usize::from(window.is_some())],
                table,
                each: false,
            };
            self.project(rows, block, count, &place);
            let attention = PrefillAttention {
                heads: num_heads,
                kv_heads: num_kv_heads,
                head_dim,
                window: window.unwrap_or(0),
                table,
            };
            let buffers = prefill_attention::Buffers {
                q: &rows.q,
                keys,
                values,
                cache_len: place.cache_len,
                pages: place.pages,
                sinks: &block.sinks,
                out: &rows.attended,
            };
            prefill_attention::launch::<f16>(client, attention, first, count, &buffers);
            self.finish(rows, block, count, &|stage| stage == Stage::Out);
            if let Some(trace) = trace.as_deref_mut() {
                trace.attention[index].extend(x()?);
            }
            self.finish(rows, block, count, &|stage| stage != Stage::Out);
            if let Some(trace) = trace.as_deref_mut() {
                let active = self.config.num_active_experts;
                trace.experts[index].extend(self.read::<u32>(&rows.ids, count * active)?);
                trace.blocks[index].extend(x()?);
            }
        }
        Ok(())
    }

    /// Logits of the first rows of the step's residual stream.
    pub(super) fn unembed_step(&self, state: &State, rows: usize, epsilon: u32) {
        let Config { embedding_dim, vocabulary, .. } = self.config;
        let unembedding = linear::Linear {
            rows: vocabulary,
            columns: embedding_dim,
            bias: false,
            residual: false,
            epsilon: Some(epsilon),
        };
        let buffers = linear::Buffers {
            weights: &self.weights.unembedding,
            bias: &self.weights.norm,
            norm: &self.weights.norm,
            x: &state.buffers.x,
            y: &state.buffers.logits,
        };
        linear::launch(&self.client, unembedding, rows, &buffers);
    }
}
