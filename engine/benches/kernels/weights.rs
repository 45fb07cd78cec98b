//! Random weights of a model's true shapes, the experts dequantised, and what is measured of them on every device.

use engine::backend::Device;
use engine::gpt_oss::Config;
use engine::synthetic;
use formats::model_bin::Stored;
use formats::model_bin::header::ModelHeader;
use formats::model_bin::layout::PieceId;
use formats::model_bin::tensors::{TensorId, TensorKind};
use formats::mxfp4::SCALE_OFFSET;
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::suite::{self, Case, Work};

/// Blocks whose dense matrices are read in turn, so that no cache keeps them.
const BLOCKS: usize = 8;

/// Bytes of the unembedding of gpt-oss-20b, rounded up, and of all that is on a device at a time.
const LARGEST: u64 = 1200 << 20;
const MEMORY: u64 = 6 << 30;

/// Shapes, and the weights that they need.
pub struct Weights {
    stored: Stored,
    config: Config,
    shapes: &'static str,
    /// Bytes of the buffer that is copied.
    pub copied: usize,
    /// Tokens of a prefill.
    pub prompts: Vec<usize>,
    /// Tokens in a cache.
    pub depths: Vec<usize>,
    /// Bytes of caches that are read in turn.
    pub caches: usize,
}

/// One of an expert's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrix {
    GateUp,
    Down,
}

impl Matrix {
    pub const ALL: [Matrix; 2] = [Matrix::GateUp, Matrix::Down];

    pub fn name(self) -> &'static str {
        match self {
            Matrix::GateUp => "gate and up",
            Matrix::Down => "down",
        }
    }

    /// Rows and columns.
    pub fn shape(self, config: &Config) -> [usize; 2] {
        match self {
            Matrix::GateUp => [2 * config.mlp_dim, config.embedding_dim],
            Matrix::Down => [config.embedding_dim, config.mlp_dim],
        }
    }

    /// The tensors of codes and of scales.
    fn kinds(self) -> [TensorKind; 2] {
        match self {
            Matrix::GateUp => [TensorKind::Mlp1Blocks, TensorKind::Mlp1Scales],
            Matrix::Down => [TensorKind::Mlp2Blocks, TensorKind::Mlp2Scales],
        }
    }
}

/// A dense layer.
pub struct Dense {
    pub kind: TensorKind,
    pub rows: usize,
    pub columns: usize,
    /// Blocks whose matrices are read in turn.
    pub count: usize,
}

impl Weights {
    /// The shapes of gpt-oss-20b where the device has buffers and memory for them, small ones elsewhere and for tests.
    pub fn fitting(device: &Device, is_test: bool) -> Result<Weights, Box<dyn std::error::Error>> {
        let large = ModelHeader { num_blocks: BLOCKS as u32, ..ModelHeader::GPT_OSS_20B };
        let has = |limit: Option<u64>, bytes: u64| limit.is_none_or(|limit| limit >= bytes);
        let is_large = !is_test && has(device.max_buffer(), LARGEST) && has(device.memory(), MEMORY);
        let small = ModelHeader {
            num_experts: 8,
            embedding_dim: 320,
            mlp_dim: 320,
            num_heads: 16,
            num_kv_heads: 2,
            ..large
        };
        let stored = synthetic::stored(if is_large { large } else { small })?;
        let config = Config::new(stored.header(), stored.dims())?;
        let (prompts, depths) = if is_large {
            (vec![128, 512, 2048], vec![300, 4096, 16_384])
        } else {
            (vec![32, 128], vec![300, 1024])
        };
        Ok(Weights {
            stored,
            config,
            shapes: if is_large { "gpt-oss-20b" } else { "small" },
            copied: if is_large { 1 << 30 } else { 32 << 20 },
            prompts,
            depths,
            caches: if is_large { 256 << 20 } else { 2 << 20 },
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn shapes(&self) -> &'static str {
        self.shapes
    }

    /// Sets of selected experts that have none in common.
    pub fn sets(&self) -> usize {
        self.config.num_experts / self.config.num_active_experts
    }

    /// The experts of a set.
    pub fn set(&self, set: usize) -> std::ops::Range<usize> {
        let active = self.config.num_active_experts;
        set * active..(set + 1) * active
    }

    /// A dense matrix of a block, bf16.
    pub fn dense(&self, kind: TensorKind, block: usize) -> Vec<u8> {
        self.piece(kind, block, 0)
    }

    /// An expert's codes and stored scales.
    pub fn packed(&self, matrix: Matrix, expert: usize) -> [Vec<u8>; 2] {
        matrix.kinds().map(|kind| self.piece(kind, 0, expert))
    }

    /// An expert's matrix, dequantised, row after row.
    pub fn decoded(&self, matrix: Matrix, expert: usize) -> Vec<bf16> {
        let [_, columns] = matrix.shape(&self.config);
        let [codes, scales] = self.packed(matrix, expert);
        let rows = codes.par_chunks_exact(columns / 2).zip(scales.par_chunks_exact(columns / 32));
        let decoded = rows.flat_map_iter(|(codes, scales)| {
            let scales: Vec<u8> = scales.iter().map(|scale| scale.wrapping_sub(SCALE_OFFSET)).collect();
            let mut row = vec![0.0; columns];
            formats::mxfp4::decode(codes, &scales, &mut row).expect("lengths of a row");
            row.into_iter().map(bf16::from_f32)
        });
        decoded.collect()
    }

    fn piece(&self, kind: TensorKind, block: usize, expert: usize) -> Vec<u8> {
        let id = PieceId { tensor: TensorId { kind, block: block as u32 }, expert: expert as u32 };
        self.stored.piece(id).expect("random weights have every piece").into_owned()
    }

    /// Logits of routers that choose a set's experts, or others for every token.
    pub fn logits_of_set(&self, set: usize) -> Vec<f32> {
        let chosen = self.set(set);
        (0..self.config.num_experts).map(|expert| if chosen.contains(&expert) { 1.0 } else { -1.0 }).collect()
    }

    /// The tokens that choose each expert, by logits `[tokens, experts]`.
    pub fn tokens_of_experts(&self, logits: &[f32]) -> Vec<Vec<u32>> {
        let mut of_expert = vec![Vec::new(); self.config.num_experts];
        for (token, logits) in logits.chunks_exact(self.config.num_experts).enumerate() {
            let mut experts: Vec<usize> = (0..logits.len()).collect();
            experts.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            for &expert in &experts[..self.config.num_active_experts] {
                of_expert[expert].push(token as u32);
            }
        }
        of_expert
    }

    /// A copy of so many bytes: the roofline of everything that reads memory.
    pub fn copy(bytes: usize) -> Case {
        let name = format!("{} MiB", bytes >> 20);
        Case { group: "copy", name, stored: None, work: Work::Bytes(2 * bytes as u64) }
    }

    /// The dense layers for one token.
    pub fn dense_layers(&self) -> [(Case, Dense); 3] {
        let Config { embedding_dim, head_dim, num_heads, vocabulary, .. } = self.config;
        let layer = |name, kind, rows, columns, count| {
            let name = format!("{name} {rows} x {columns}, dense");
            let work = Work::Bytes((rows * columns * size_of::<bf16>()) as u64);
            (Case { group: "gemv", name, stored: None, work }, Dense { kind, rows, columns, count })
        };
        [
            layer("QKV", TensorKind::QkvWeight, self.config.qkv_rows(), embedding_dim, BLOCKS),
            layer("output", TensorKind::OutWeight, embedding_dim, num_heads * head_dim, BLOCKS),
            layer("unembedding", TensorKind::Unembedding, vocabulary, embedding_dim, 1),
        ]
    }

    /// A matrix of the experts of one token.
    pub fn experts_of_a_token(&self, matrix: Matrix, stored: suite::Stored) -> Case {
        let active = self.config.num_active_experts;
        let [rows, columns] = matrix.shape(&self.config);
        let bytes = active * rows * columns / 32 * stored.bytes_of_32();
        let name = format!("{}, {active} experts", matrix.name());
        Case { group: "gemv", name, stored: Some(stored), work: Work::Bytes(bytes as u64) }
    }

    /// The experts of some tokens.
    pub fn experts(&self, tokens: usize, stored: suite::Stored) -> Case {
        let values = Matrix::ALL.map(|matrix| matrix.shape(&self.config).iter().product::<usize>());
        let operations = 2 * tokens * self.config.num_active_experts * values.iter().sum::<usize>();
        let (name, work) = (format!("{tokens} tokens"), Work::Operations(operations as u64));
        Case { group: "moe", name, stored: Some(stored), work }
    }

    /// Attention of one token over the cache of so many.
    pub fn attention_of_a_token(&self, depth: usize) -> Case {
        let work = Work::Bytes(self.bytes_of_cache(depth) as u64);
        Case { group: "attention", name: format!("decode at {depth}"), stored: None, work }
    }

    /// Causal attention of some tokens that come first.
    pub fn attention(&self, tokens: usize) -> Case {
        let operations = 2 * tokens * (tokens + 1) * self.config.num_heads * self.config.head_dim;
        let work = Work::Operations(operations as u64);
        Case { group: "attention", name: format!("prefill of {tokens}"), stored: None, work }
    }

    /// Bytes of keys and values of some tokens in f16.
    pub fn bytes_of_cache(&self, tokens: usize) -> usize {
        2 * 2 * tokens * self.config.num_kv_heads * self.config.head_dim
    }
}

/// Numbers between −1 and 1.
pub fn floats(count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(count as u64);
    (0..count).map(|_| (random.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
