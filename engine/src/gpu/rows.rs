//! What a block does with many rows, whether they are tokens of one sequence or of many: the products have tiles.
//!
//! ```text
//! x ─ normalise ─ qkv ─ rotate (RoPE, cache) ─► q          attention (of the caller) ─► attended
//! attended ─ out (residual) ─ normalise, logits ─ dispatch ─ gate_up ─ down ─ combine (residual)
//! ```

use cubecl::client::Client;
use cubecl::server::Handle;
use half::f16;

use super::pages::elements_of_page;
use super::weights::Block;
use super::{Model, Stage, Wanted};
use crate::gpt_oss::config::Config;
use crate::kernels::dispatch::{self, Dispatch};
use crate::kernels::expert_logits;
use crate::kernels::grouped::{self, Grouped};
use crate::kernels::matmul::{self, Matmul};
use crate::kernels::method::Method;
use crate::kernels::normalise::{self, Normalise};
use crate::kernels::rotate::{self, Rotate};
use crate::kernels::router::{self, Router};

/// Rows, up to which the router reads its weights once for each: it is done sooner so.
const FEW: usize = 32;

/// Buffers of rows.
pub(super) struct Rows<H = Handle> {
    pub x: H,
    /// Normalised rows in the words of [`Method`].
    pub normed: H,
    qkv: H,
    pub q: H,
    /// In the words of [`Method`].
    pub attended: H,
    logits: H,
    pub ids: H,
    shares: H,
    order: H,
    starts: H,
    tiles: H,
    hidden: H,
    outputs: H,
}

/// A block's cache and where the rows stand in it.
pub(super) struct Place<'a> {
    pub keys: &'a Handle,
    pub values: &'a Handle,
    /// Elements of each.
    pub cache_len: usize,
    /// u32 `[rows]`.
    pub positions: &'a Handle,
    /// u32 `[sequences, table]`.
    pub pages: &'a Handle,
    pub table: usize,
    /// Whether every row is of a sequence of its own.
    pub each: bool,
}

impl Rows {
    /// Buffers for `count` rows.
    pub fn empty(client: &Client, config: &Config, count: usize) -> Rows {
        Rows::new(config, Method::of(client), count, &mut |words| client.empty(words * size_of::<u32>()))
    }
}

impl<H> Rows<H> {
    /// Makes each of so many words.
    pub fn new(config: &Config, method: Method, count: usize, words: &mut dyn FnMut(usize) -> H) -> Rows<H> {
        let Config { embedding_dim, head_dim, num_heads, num_experts, num_active_experts, mlp_dim, .. } =
            *config;
        // Fewer rows may have more tiles, for theirs are smaller.
        let tiles = count * num_active_experts;
        Rows {
            x: words(count * embedding_dim),
            normed: words(count * method.words(embedding_dim)),
            qkv: words(count * config.qkv_rows()),
            q: words(count * num_heads * head_dim),
            attended: words(count * method.words(num_heads * head_dim)),
            logits: words(count * num_experts),
            ids: words(count * num_active_experts),
            shares: words(count * num_active_experts),
            order: words(count * num_active_experts),
            starts: words(num_experts + 1),
            tiles: words(tiles * 4),
            hidden: words(count * method.words(num_active_experts * mlp_dim)),
            outputs: words(count * num_active_experts * embedding_dim),
        }
    }
}

impl Model {
    /// Elements of a cache of a block.
    pub(super) fn cache_len(&self, windowed: bool) -> usize {
        let pool = if windowed { &self.windowed } else { &self.full };
        pool.capacity() as usize * elements_of_page(&self.config)
    }

    pub(super) fn normalisation(&self) -> Normalise {
        let Config { embedding_dim, rmsnorm_epsilon, .. } = self.config;
        Normalise { columns: embedding_dim, epsilon: rmsnorm_epsilon.to_bits() }
    }

    /// From the residual stream to rotated queries and a longer cache.
    pub(super) fn project(&self, b: &Rows, block: &Block, count: usize, place: &Place<'_>) {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, .. } = self.config;
        let client = &self.client;
        normalise::launch(client, self.normalisation(), count, &b.x, &block.attn_norm, &b.normed);
        let projection =
            Matmul { rows: self.config.qkv_rows(), columns: embedding_dim, bias: true, residual: false };
        let buffers = matmul::Buffers { weights: &block.qkv, bias: &block.qkv_bias, x: &b.normed, y: &b.qkv };
        matmul::launch(client, projection, count, &buffers);
        let &Place { keys, values, cache_len, positions, pages, table, each } = place;
        let rotation = Rotate { heads: num_heads, kv_heads: num_kv_heads, head_dim, table, each };
        let buffers = rotate::Buffers {
            projected: &b.qkv,
            coarse: &self.coarse,
            fine: &self.fine,
            positions,
            pages,
            q: &b.q,
            keys,
            values,
            cache_len,
        };
        rotate::launch::<f16>(client, rotation, count, &buffers);
    }

    /// From what attention found to the residual stream after the experts, the kernels of the wanted stages.
    pub(super) fn finish(&self, b: &Rows, block: &Block, count: usize, wanted: &Wanted<'_>) {
        let Config { embedding_dim, head_dim, num_heads, num_experts, .. } = self.config;
        let client = &self.client;
        if wanted(Stage::Out) {
            let out =
                Matmul { rows: embedding_dim, columns: num_heads * head_dim, bias: true, residual: true };
            let buffers =
                matmul::Buffers { weights: &block.out, bias: &block.out_bias, x: &b.attended, y: &b.x };
            matmul::launch(client, out, count, &buffers);
        }
        let (grouped, dispatched) = (self.grouped(), self.dispatch(count));
        if wanted(Stage::Router) {
            let normalised = self.normalisation();
            let routed = Router { experts: num_experts, columns: embedding_dim, epsilon: normalised.epsilon };
            if count <= FEW {
                let buffers = router::Buffers {
                    x: &b.x,
                    norm: &block.mlp_norm,
                    weights: &block.gate,
                    bias: &block.gate_bias,
                    logits: &b.logits,
                    normed: &b.normed,
                };
                router::launch_rows(client, routed, count, &buffers);
            } else {
                normalise::launch(client, normalised, count, &b.x, &block.mlp_norm, &b.normed);
                let buffers = expert_logits::Buffers {
                    x: &b.x,
                    norm: &block.mlp_norm,
                    weights: &block.gate,
                    bias: &block.gate_bias,
                    logits: &b.logits,
                };
                expert_logits::launch(client, routed, count, &buffers);
            }
            let buffers = dispatch::Buffers {
                logits: &b.logits,
                ids: &b.ids,
                shares: &b.shares,
                order: &b.order,
                starts: &b.starts,
                tiles: &b.tiles,
            };
            dispatch::launch(client, dispatched, count, &buffers);
        }
        let tiles = dispatched.tiles(count);
        let buffers = grouped::Buffers {
            x: &b.normed,
            order: &b.order,
            tiles: &b.tiles,
            codes: &block.mlp1.codes,
            scales: &block.mlp1.scales,
            bias: &block.mlp1_bias,
            y: &b.hidden,
        };
        if wanted(Stage::GateUp) {
            grouped::gate_up(client, grouped, count, tiles, &buffers);
        }
        if wanted(Stage::Down) {
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

    /// The logits of rows into f32 `[count, vocabulary]`.
    pub(super) fn unembed_rows(&self, b: &Rows, count: usize, logits: &Handle) {
        let Config { embedding_dim, vocabulary, .. } = self.config;
        let norm = &self.weights.norm;
        normalise::launch(&self.client, self.normalisation(), count, &b.x, norm, &b.normed);
        let unembedding = Matmul { rows: vocabulary, columns: embedding_dim, bias: false, residual: false };
        let weights = &self.weights.unembedding;
        let buffers = matmul::Buffers { weights, bias: norm, x: &b.normed, y: logits };
        matmul::launch(&self.client, unembedding, count, &buffers);
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
}
