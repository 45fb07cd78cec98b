//! A token of each of several sequences: a step whose products have tiles, so that every weight is read once for all of them.
//!
//! ```text
//! tokens, positions, page tables
//!   ├ embedding
//!   ├ × blocks   project ─ attention [─ join] ─ finish     (`rows`)
//!   ├ normalise ─ unembedding
//!   └ choice ─► tokens, positions + 1
//! ```

use cubecl::client::Client;
use half::f16;

use super::rows::Place;
use super::{Model, Stage, State, Step, Wanted};
use crate::gpt_oss::config::Config;
use crate::kernels::attention::{self, Attention};
use crate::kernels::embedding;
use crate::kernels::method::Method;

/// Sequences from which on tiles are faster.
pub(super) fn tiled_from(client: &Client) -> usize {
    match Method::of(client) {
        // As measured on an H100.
        Method::TensorCores => 4,
        // A guess: their smallest tile has 64 rows.
        Method::Fragments | Method::Units => 16,
    }
}

impl Model {
    /// The kernels of a step up to the logits, those of the wanted stages.
    pub(super) fn enqueue_batch(&self, state: &State, step: Step, wanted: &Wanted<'_>) {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, vocabulary, .. } = self.config;
        let (client, b, rows, weights) = (&self.client, &state.buffers, &state.rows, &self.weights);
        let sequences = step.sequences;
        if wanted(Stage::Embedding) {
            embedding::launch(
                client,
                &weights.embedding,
                &b.tokens,
                &rows.x,
                vocabulary,
                embedding_dim,
                sequences,
            );
        }
        for (index, (block, [keys, values])) in weights.blocks.iter().zip(&state.caches).enumerate() {
            let window = self.config.window(index);
            let place = Place {
                keys,
                values,
                cache_len: self.cache_len(window.is_some()),
                positions: &b.positions,
                pages: if window.is_some() { &b.windowed_pages } else { &b.full_pages },
                table: self.table(window),
                each: true,
            };
            if wanted(Stage::Qkv) {
                self.project(rows, block, sequences, &place);
            }
            if wanted(Stage::Attention) {
                let attending = Attention {
                    heads: num_heads,
                    kv_heads: num_kv_heads,
                    head_dim,
                    window: window.unwrap_or(0),
                    table: place.table,
                    splits: if window.is_some() { 1 } else { step.splits },
                    method: Method::of(client),
                };
                let buffers = attention::Buffers {
                    q: &rows.q,
                    keys,
                    values,
                    cache_len: place.cache_len,
                    positions: &b.positions,
                    pages: place.pages,
                    sinks: &block.sinks,
                    partial: &b.partial,
                    out: &rows.attended,
                };
                attention::launch::<f16>(client, attending, sequences, &buffers);
            }
            self.finish(rows, block, sequences, wanted);
        }
        if wanted(Stage::Unembedding) {
            self.unembed_rows(rows, sequences, &b.logits);
        }
    }
}
