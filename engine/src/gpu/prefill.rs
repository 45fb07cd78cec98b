//! Many new tokens of one sequence, a chunk at a time.
//!
//! ```text
//! embedding
//!   × blocks   normalise ─ qkv ─ rotate (RoPE, cache) ─ attention ─ out (residual)
//!              normalise, logits ─ dispatch (selection, pairs sorted by expert) ─ gate_up ─ down ─ combine (residual)
//! the last row ─ unembedding (norm)
//! ```

use cubecl::server::Handle;
use half::f16;

use super::{Cache, Model, State};
use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;
use crate::kernels::dispatch::{self, Dispatch};
use crate::kernels::expert_logits;
use crate::kernels::grouped::{self, Grouped};
use crate::kernels::matmul::{self, Matmul};
use crate::kernels::method::Method;
use crate::kernels::normalise::{self, Normalise};
use crate::kernels::prefill_attention::{self, PrefillAttention};
use crate::kernels::rotate::{self, Rotate};
use crate::kernels::router::Router;
use crate::kernels::{copy, embedding, linear};

/// Tokens of a chunk, at most.
const CHUNK: usize = 2048;

/// Buffers of a chunk.
struct Buffers {
    x: Handle,
    /// Normalised rows, then those of attention, in the words of [`Method`].
    rows: Handle,
    qkv: Handle,
    q: Handle,
    attended: Handle,
    logits: Handle,
    ids: Handle,
    shares: Handle,
    order: Handle,
    starts: Handle,
    tiles: Handle,
    hidden: Handle,
    outputs: Handle,
}

impl Model {
    /// Adds tokens to a sequence: f32 `[vocabulary]`, the logits that follow the last one.
    ///
    /// # Errors
    /// [`Error::Length`] where there are none or they exceed the context, [`Error::Token`] for an id outside the vocabulary,
    /// [`Error::Device`] where the device fails.
    pub fn prefill(&self, cache: &mut Cache, tokens: &[u32]) -> Result<Vec<f32>> {
        let length = cache.len() + tokens.len();
        if tokens.is_empty() || length > self.context {
            return Err(Error::Length { length, context: self.context });
        }
        self.config.check_tokens(tokens)?;
        let mut state = self.lock();
        let buffers = self.buffers(tokens.len().min(CHUNK));
        for chunk in tokens.chunks(CHUNK) {
            self.reserve(&mut state, cache, chunk.len())?;
            self.chunk(&state, &buffers, cache, chunk);
            cache.advance(chunk.len());
        }
        let Config { embedding_dim, rmsnorm_epsilon, .. } = self.config;
        let last = (tokens.len() - 1) % CHUNK * embedding_dim;
        let row = &state.buffers.x;
        copy::launch(&self.client, &buffers.x, last, row, 0, embedding_dim);
        self.unembed(&state, 1, rmsnorm_epsilon.to_bits());
        self.read_logits(&state, 1)
    }

    fn buffers(&self, tokens: usize) -> Buffers {
        let Config { embedding_dim, head_dim, num_heads, num_experts, num_active_experts, mlp_dim, .. } =
            self.config;
        let words = |each: usize| self.client.empty(tokens * each * size_of::<u32>());
        let method = Method::of(&self.client);
        let tiles = self.dispatch(tokens).tiles(tokens);
        Buffers {
            x: words(embedding_dim),
            rows: words(method.words(embedding_dim)),
            qkv: words(self.config.qkv_rows()),
            q: words(num_heads * head_dim),
            attended: words(method.words(num_heads * head_dim)),
            logits: words(num_experts),
            ids: words(num_active_experts),
            shares: words(num_active_experts),
            order: words(num_active_experts),
            starts: self.client.empty((num_experts + 1) * size_of::<u32>()),
            tiles: self.client.empty(tiles * 4 * size_of::<u32>()),
            hidden: words(method.words(num_active_experts * mlp_dim)),
            outputs: words(num_active_experts * embedding_dim),
        }
    }

    fn grouped(&self) -> Grouped {
        Grouped {
            experts: self.config.num_experts,
            active: self.config.num_active_experts,
            embedding_dim: self.config.embedding_dim,
            mlp_dim: self.config.mlp_dim,
            limit: self.config.swiglu_limit.to_bits(),
        }
    }

    fn dispatch(&self, tokens: usize) -> Dispatch {
        let Grouped { experts, active, .. } = self.grouped();
        Dispatch { experts, active, tile: self.grouped().pairs_of_tile(&self.client, tokens) }
    }

    /// The kernels of a chunk, after [`Model::reserve`].
    fn chunk(&self, state: &State, b: &Buffers, cache: &Cache, tokens: &[u32]) {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, num_experts, vocabulary, .. } =
            self.config;
        let (client, weights) = (&self.client, &self.weights);
        let (first, count) = (cache.len(), tokens.len());
        let epsilon = self.config.rmsnorm_epsilon.to_bits();
        // All pages of the sequence: a window's ring could hold one page twice.
        let table = self.table(None);
        let page_table = |numbers: Vec<u32>| client.create_from_slice(bytemuck::cast_slice(&numbers));
        let pages = [page_table(cache.full.table(table)), page_table(cache.windowed.table(table))];
        let ids = client.create_from_slice(bytemuck::cast_slice(tokens));
        embedding::launch(client, &weights.embedding, &ids, &b.x, vocabulary, embedding_dim, count);
        let normalised = Normalise { columns: embedding_dim, epsilon };
        let (grouped, dispatched) = (self.grouped(), self.dispatch(count));
        let tiles = dispatched.tiles(count);
        for (index, (block, [keys, values])) in weights.blocks.iter().zip(&state.caches).enumerate() {
            let window = self.config.window(index);
            let pool = if window.is_some() { &self.windowed } else { &self.full };
            let pages = &pages[usize::from(window.is_some())];
            let cache_len = pool.capacity() as usize * self.elements_of_page();
            normalise::launch(client, normalised, count, &b.x, &block.attn_norm, &b.rows);
            let projection =
                Matmul { rows: self.config.qkv_rows(), columns: embedding_dim, bias: true, residual: false };
            let buffers =
                matmul::Buffers { weights: &block.qkv, bias: &block.qkv_bias, x: &b.rows, y: &b.qkv };
            matmul::launch(client, projection, count, &buffers);
            let rotation = Rotate { heads: num_heads, kv_heads: num_kv_heads, head_dim, table };
            let buffers = rotate::Buffers {
                projected: &b.qkv,
                coarse: &self.coarse,
                fine: &self.fine,
                pages,
                q: &b.q,
                keys,
                values,
                cache_len,
            };
            rotate::launch::<f16>(client, rotation, first, count, &buffers);
            let attention = PrefillAttention {
                heads: num_heads,
                kv_heads: num_kv_heads,
                head_dim,
                window: window.unwrap_or(0),
                table,
            };
            let buffers = prefill_attention::Buffers {
                q: &b.q,
                keys,
                values,
                cache_len,
                pages,
                sinks: &block.sinks,
                out: &b.attended,
            };
            prefill_attention::launch::<f16>(client, attention, first, count, &buffers);
            let out =
                Matmul { rows: embedding_dim, columns: num_heads * head_dim, bias: true, residual: true };
            let buffers =
                matmul::Buffers { weights: &block.out, bias: &block.out_bias, x: &b.attended, y: &b.x };
            matmul::launch(client, out, count, &buffers);
            normalise::launch(client, normalised, count, &b.x, &block.mlp_norm, &b.rows);
            let routed = Router { experts: num_experts, columns: embedding_dim, epsilon };
            let buffers = expert_logits::Buffers {
                x: &b.x,
                norm: &block.mlp_norm,
                weights: &block.gate,
                bias: &block.gate_bias,
                logits: &b.logits,
            };
            expert_logits::launch(client, routed, count, &buffers);
            let buffers = dispatch::Buffers {
                logits: &b.logits,
                ids: &b.ids,
                shares: &b.shares,
                order: &b.order,
                starts: &b.starts,
                tiles: &b.tiles,
            };
            dispatch::launch(client, dispatched, count, &buffers);
            let buffers = grouped::Buffers {
                x: &b.rows,
                order: &b.order,
                tiles: &b.tiles,
                codes: &block.mlp1.codes,
                scales: &block.mlp1.scales,
                bias: &block.mlp1_bias,
                y: &b.hidden,
            };
            grouped::gate_up(client, grouped, count, tiles, &buffers);
            let buffers = grouped::Buffers {
                x: &b.hidden,
                codes: &block.mlp2.codes,
                scales: &block.mlp2.scales,
                bias: &block.mlp2_bias,
                y: &b.outputs,
                ..buffers
            };
            grouped::down(client, grouped, count, tiles, &buffers);
            grouped::combine(client, grouped, count, &b.outputs, &b.shares, &b.x);
        }
    }

    /// Logits of the first rows of the step's residual stream.
    pub(super) fn unembed(&self, state: &State, rows: usize, epsilon: u32) {
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
