//! The model, top to bottom.
//!
//! Tokens of a batch are rows, laid end to end: everything but attention works on rows and does not care whose they are.
//! Each step is one operation on all threads, in tasks of microseconds. A thread takes the next task whenever it has done
//! one (Rayon's bridge), so that weights are read in their order and a thread that the system interrupts holds up nobody.
//!
//! ```text
//! x ─ norm ─ qkv ─ rotation ─ cache ─ attention ─ out ─┐+ x
//!  ┌───────────────────────────────────────────────────┘
//!  └─ norm ─ router ─ pairs of token and expert, sorted by expert ─ mlp1, SwiGLU ─ mlp2 ─ weighted sum ─ + x
//! ```
//! The threads are a pool of the model's own. A whole pass runs in it, so that its caller waits for a thread once and not
//! at every step.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use formats::model_bin::Stored;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::attention::Attention;
use super::cache::{Cache, CacheLayout};
use super::dense::{self, Widen};
use super::fixed::{FixedGroup, ToFixed, fixed_groups};
use super::mxfp4::{self, Inputs};
use super::order::{Group, dense_groups, packed_groups, to_dense, to_packed};
use super::router::{Choice, Groups, choose};
use super::rows::{AddScaled, RmsNorm, SwiGlu, rotate};
use super::simd::{Dispatch, Level};
use super::split::grid;
use super::weights::{Block, Dense, Weights};
use crate::backend::Float;
use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;
use crate::nn::rope::Frequencies;

/// Tokens that a prefill processes at a time.
pub const PREFILL: usize = 256;

/// Bytes of weights of one task: some microseconds of reading.
const TASK_BYTES: usize = 96 << 10;

/// Tokens whose attention over a key head is one task.
const ATTENTION_TOKENS: usize = 16;

/// How a model computes. `None` leaves the choice to the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The largest number of tokens of a sequence (default: the model's).
    pub context: Option<usize>,
    /// The type of keys and values (default: f16).
    pub cache: Option<Float>,
    /// The instructions (default: the best that the processor has).
    pub level: Option<Level>,
    /// Threads, of which the calling one is none (default: as many as may run at a time).
    pub threads: Option<usize>,
}

/// GPT-OSS on the processor, its weights left where they are stored.
pub struct Model {
    config: Config,
    cache_layout: Arc<CacheLayout>,
    rope: Frequencies,
    weights: Weights,
    dispatch: Dispatch,
    pool: ThreadPool,
}

/// New tokens of one sequence and the cache of those before.
pub struct Sequence<'a> {
    /// Keys and values of the tokens so far; holds those of `tokens` afterwards.
    pub cache: &'a mut Cache,
    /// At least one.
    pub tokens: &'a [u32],
}

/// What experts are multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// f32, rows of weights being decoded for all tokens at once: for many tokens.
    Prefill,
    /// Fixed point of 16 bits a value: for a few tokens, which get the same bits alone and together.
    Decode,
}

/// What a forward pass leaves behind on its way, f32 `[tokens, embedding_dim]` each, for comparisons with a reference.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// The rows of the embedding.
    pub embedding: Vec<f32>,
    /// Each block's residual stream after attention.
    pub attention: Vec<Vec<f32>>,
    /// Each block's output.
    pub blocks: Vec<Vec<f32>>,
    /// Each block's experts, `[tokens, num_active_experts]`, the largest logit first.
    pub experts: Vec<Vec<u32>>,
    /// The output of the final norm.
    pub norm: Vec<f32>,
}

/// Tokens of one sequence that one task of attention takes.
struct Span {
    sequence: usize,
    row: usize,
    positions: Range<usize>,
}

impl Model {
    /// A model whose weights stay in `stored`.
    ///
    /// # Errors
    /// [`Error::Model`] for a context that the model has not or a level that the processor has not, and where sizes of
    /// the configuration and of the weights differ; [`Error::Format`] where a container cannot be read;
    /// [`Error::Device`] where threads cannot be started.
    pub fn new(stored: Arc<Stored>, config: Config, options: &Options) -> Result<Model> {
        let context = options.context.unwrap_or(config.context_length);
        if context == 0 || context > config.context_length {
            return Err(Error::Model {
                field: "--context",
                found: context.to_string(),
                needed: format!("1 to {}, the model's context length", config.context_length),
            });
        }
        let level = options.level.unwrap_or_else(Level::best);
        let dispatch = Dispatch::new(level).ok_or_else(|| Error::Model {
            field: "level",
            found: level.to_string(),
            needed: format!("instructions of this processor, {} at best", Level::best()),
        })?;
        let threads =
            options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let pool = ThreadPoolBuilder::new().thread_name(|index| format!("native-{index}"));
        let pool = pool.num_threads(threads.max(1)).build();
        Ok(Model {
            rope: Frequencies::yarn(&config.yarn(), config.head_dim),
            cache_layout: CacheLayout::of(&config, options.cache.unwrap_or(Float::F16), context).into(),
            weights: Weights::new(stored, &config)?,
            dispatch,
            pool: pool.map_err(|error| Error::Device(error.to_string()))?,
            config,
        })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The sizes of caches.
    pub fn cache_layout(&self) -> &CacheLayout {
        &self.cache_layout
    }

    /// The longest sequence.
    pub fn context(&self) -> usize {
        self.cache_layout.context
    }

    /// The instructions in use.
    pub fn level(&self) -> Level {
        self.dispatch.level()
    }

    /// The threads in use. The calling one waits for them.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.cache_layout.clone())
    }

    /// Adds tokens to a sequence, in chunks, and returns the logits that follow the last one, f32 `[vocabulary]`. Before
    /// each chunk, `watch` gets the number of tokens in the cache; where it breaks, there are no logits.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::Length`] where there are no tokens or they exceed the
    /// context. Nothing has changed then.
    pub fn prefill(
        &self,
        cache: &mut Cache,
        tokens: &[u32],
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<f32>>> {
        self.config.check_tokens(tokens)?;
        cache.next(tokens.len())?;
        let mut last = None;
        for chunk in tokens.chunks(PREFILL) {
            if watch(cache.len()).is_break() {
                return Ok(None);
            }
            let x =
                self.forward(&mut [Sequence { cache: &mut *cache, tokens: chunk }], Path::Prefill, None)?;
            last = Some(x);
        }
        let last = last.as_deref().and_then(|x| x.chunks_exact(self.config.embedding_dim).next_back());
        last.map(|row| self.unembed(row)).transpose()
    }

    /// Adds one token to each of some sequences and returns the logits that follow, f32 `[sequences, vocabulary]`. Those
    /// of a sequence do not depend on which others are in the batch.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn decode(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<f32>> {
        let sequence = |(cache, token)| Sequence { cache, tokens: std::slice::from_ref(token) };
        let mut sequences: Vec<Sequence<'_>> =
            batch.iter_mut().map(|(cache, token)| sequence((&mut **cache, &*token))).collect();
        // Not `forward` and `unembed` one after the other, as the caller would have to wake up in between.
        self.pool.install(|| {
            let x = self.forward(&mut sequences, Path::Decode, None)?;
            self.unembed(&x)
        })
    }

    /// Runs new tokens of some sequences through all blocks: f32 `[tokens, embedding_dim]` after the final norm, the
    /// sequences end to end. The caches are longer by the tokens afterwards.
    ///
    /// # Errors
    /// As [`Model::prefill`], and [`Error::Length`] where there is no sequence.
    pub fn forward(
        &self,
        batch: &mut [Sequence<'_>],
        path: Path,
        trace: Option<&mut Trace>,
    ) -> Result<Vec<f32>> {
        self.pool.install(|| self.pass(batch, path, trace))
    }

    /// [`Model::forward`] on a thread of the pool.
    fn pass(
        &self,
        batch: &mut [Sequence<'_>],
        path: Path,
        mut trace: Option<&mut Trace>,
    ) -> Result<Vec<f32>> {
        let width = self.config.embedding_dim;
        let spans = self.spans(batch)?;
        let tokens: Vec<u32> = batch.iter().flat_map(|sequence| sequence.tokens).copied().collect();
        let mut x = vec![0.0; tokens.len() * width];
        let embedding = self.weights.dense(&self.weights.embedding)?;
        for (token, row) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            self.dispatch.run(Widen { from: embedding.row(*token as usize), to: row });
        }
        let angles: Vec<Angles> = spans
            .iter()
            .flat_map(|span| span.positions.clone())
            .map(|position| Angles::new(&self.rope, position))
            .collect();
        if let Some(trace) = trace.as_deref_mut() {
            trace.embedding.clone_from(&x);
        }
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            self.attention(layer, block, &mut x, &angles, &spans, batch)?;
            if let Some(trace) = trace.as_deref_mut() {
                trace.attention.push(x.clone());
            }
            let choices = self.experts(block, &mut x, path)?;
            if let Some(trace) = trace.as_deref_mut() {
                trace.experts.push(choices.into_iter().flat_map(|choice| choice.experts).collect());
                trace.blocks.push(x.clone());
            }
        }
        for sequence in batch {
            sequence.cache.advance(sequence.tokens.len());
        }
        let x = self.normed(&x, &self.weights.norm);
        if let Some(trace) = trace {
            trace.norm.clone_from(&x);
        }
        Ok(x)
    }

    /// Logits of normalised rows: f32 `[rows, embedding_dim]` → f32 `[rows, vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Format`] where the weights cannot be read any more.
    pub fn unembed(&self, x: &[f32]) -> Result<Vec<f32>> {
        let rows = x.len() / self.config.embedding_dim;
        let mut logits = vec![0.0; rows * self.config.vocabulary];
        self.pool.install(|| self.product(&self.weights.unembedding, &[], x, &mut logits, false))?;
        Ok(logits)
    }

    /// Adds the output of attention to `x`.
    fn attention(
        &self,
        layer: usize,
        block: &Block,
        x: &mut [f32],
        angles: &[Angles],
        spans: &[Span],
        batch: &mut [Sequence<'_>],
    ) -> Result<()> {
        let Config { head_dim, num_heads, num_kv_heads, .. } = self.config;
        let stride = self.config.qkv_rows();
        let (query_width, key_width) = (num_heads * head_dim, num_kv_heads * head_dim);
        let mut qkv = vec![0.0; angles.len() * stride];
        let normed = self.normed(x, &block.attn_norm);
        self.product(&block.qkv, &block.qkv_bias, &normed, &mut qkv, false)?;
        // The stored rows of queries and keys are interleaved pairs, and carry the scale of the scores.
        qkv.par_chunks_exact_mut(stride).zip(angles).for_each(|(row, angles)| {
            rotate(&mut row[..query_width + key_width], &angles.cosines, &angles.sines);
        });
        for span in spans {
            for (position, row) in span.positions.clone().zip(qkv[span.row * stride..].chunks_exact(stride)) {
                let (keys, values) = row[query_width..].split_at(key_width);
                batch[span.sequence].cache.write(layer, position, keys, values);
            }
        }
        let (dispatch, window) = (self.dispatch, self.config.window(layer));
        let mut bounds: Vec<usize> = spans.iter().map(|span| span.row).collect();
        bounds.push(angles.len());
        let head_group = num_heads / num_kv_heads * head_dim;
        let caches: Vec<&Cache> = batch.iter().map(|sequence| &*sequence.cache).collect();
        let mut out = vec![0.0; angles.len() * query_width];
        let tiles = grid(&mut out, query_width, &bounds, head_group).par_bridge();
        tiles.for_each(|(span, mut tile)| {
            let span = &spans[span];
            dispatch.run(Attention {
                cache: caches[span.sequence],
                layer,
                kv_head: tile.columns().start / head_group,
                positions: span.positions.clone(),
                qkv: &qkv[span.row * stride..],
                stride,
                sinks: &block.sinks,
                window,
                out: &mut tile,
            });
        });
        self.product(&block.out, &block.out_bias, &out, x, true)
    }

    /// Adds the output of the experts to `x`.
    fn experts(&self, block: &Block, x: &mut [f32], path: Path) -> Result<Vec<Choice>> {
        let Config { embedding_dim, mlp_dim, num_experts, num_active_experts, swiglu_limit, .. } =
            self.config;
        let normed = self.normed(x, &block.mlp_norm);
        let mut logits = vec![0.0; x.len() / embedding_dim * num_experts];
        self.product(&block.gate, &block.gate_bias, &normed, &mut logits, false)?;
        let choices: Vec<Choice> =
            logits.chunks_exact(num_experts).map(|logits| choose(logits, num_active_experts)).collect();
        let groups = Groups::new(&choices);
        let experts: Vec<_> = groups.experts.iter().map(|&expert| &block.experts[expert as usize]).collect();
        let borrow = |layer| self.weights.packed(layer);
        let mlp1 = experts.iter().map(|expert| borrow(&expert.mlp1)).collect::<Result<Vec<_>>>()?;
        let mlp2 = experts.iter().map(|expert| borrow(&expert.mlp2)).collect::<Result<Vec<_>>>()?;
        let dispatch = self.dispatch;
        let pairs = |group: usize| groups.bounds[group]..groups.bounds[group + 1];

        let inputs = self.inputs(&normed, embedding_dim, path);
        let mut hidden = vec![0.0; groups.tokens.len() * mlp_dim];
        // A column takes two rows, of about half a byte a value; multiples of 16 for SwiGLU.
        let width = (TASK_BYTES / embedding_dim).max(16).next_multiple_of(16);
        let tiles = grid(&mut hidden, mlp_dim, &groups.bounds, width).par_bridge();
        tiles.for_each(|(group, mut tile)| {
            let (columns, bias) = (tile.columns(), &experts[group].mlp1_bias);
            let mut up = vec![0.0; tile.rows() * columns.len()];
            dispatch.run(mxfp4::Product {
                weight: mlp1[group],
                rows: 2 * columns.start..2 * columns.end,
                x: inputs.borrow(),
                tokens: &groups.tokens[pairs(group)],
                put: |pair: usize, row: usize, sum: f32| match row % 2 {
                    0 => *tile.at(pair, row / 2) = sum + bias[row],
                    _ => up[pair * columns.len() + row / 2 - columns.start] = sum + bias[row],
                },
            });
            for (pair, up) in up.chunks_exact(columns.len()).enumerate() {
                dispatch.run(SwiGlu { gate: tile.row(pair), up, limit: swiglu_limit });
            }
        });

        let inputs = self.inputs(&hidden, mlp_dim, path);
        let every_pair: Vec<u32> = (0..groups.tokens.len() as u32).collect();
        let mut outputs = vec![0.0; every_pair.len() * embedding_dim];
        let width = (2 * TASK_BYTES / mlp_dim).max(16);
        let tiles = grid(&mut outputs, embedding_dim, &groups.bounds, width).par_bridge();
        tiles.for_each(|(group, mut tile)| {
            dispatch.run(mxfp4::Product {
                weight: mlp2[group],
                rows: tile.columns(),
                x: inputs.borrow(),
                tokens: &every_pair[pairs(group)],
                put: |pair: usize, row: usize, sum: f32| *tile.at(pair, row) = sum,
            });
        });
        let rows = (x.par_chunks_exact_mut(embedding_dim), &choices, &groups.places);
        rows.into_par_iter().for_each(|(out, choice, places)| {
            for (rank, &place) in places.iter().enumerate() {
                dispatch.run(AddScaled {
                    x: &outputs[place * embedding_dim..][..embedding_dim],
                    bias: &block.experts[choice.experts[rank] as usize].mlp2_bias,
                    weight: choice.weights[rank],
                    out,
                });
            }
        });
        Ok(choices)
    }

    /// RMSNorm of rows.
    fn normed(&self, x: &[f32], scale: &[f32]) -> Vec<f32> {
        let (dispatch, epsilon) = (self.dispatch, self.config.rmsnorm_epsilon);
        let mut normed = vec![0.0; x.len()];
        let rows = x.par_chunks_exact(scale.len()).zip(normed.par_chunks_exact_mut(scale.len()));
        rows.for_each(|(x, out)| dispatch.run(RmsNorm { x, scale, epsilon, out }));
        normed
    }

    /// `out = x · Wᵀ + bias`, or added to what is there.
    fn product(
        &self,
        weight: &Dense,
        bias: &[f32],
        x: &[f32],
        out: &mut [f32],
        accumulate: bool,
    ) -> Result<()> {
        let (weight, dispatch) = (self.weights.dense(weight)?, self.dispatch);
        let (columns, rows) = (weight.columns, weight.rows());
        let groups = dense_groups(columns);
        let mut ordered = vec![Group::ZERO; x.len() / columns * groups];
        let vectors = x.par_chunks_exact(columns).zip(ordered.par_chunks_exact_mut(groups));
        vectors.for_each(|(x, out)| to_dense(x, out));
        let width = (TASK_BYTES / (2 * columns)).clamp(1, rows.div_ceil(4 * self.threads()).max(1));
        let width = width.next_multiple_of(dense::TILE_ROWS);
        let bounds = [0, x.len() / columns];
        let tiles = grid(out, rows, &bounds, width).par_bridge();
        tiles.for_each(|(_, mut tile)| {
            dispatch.run(dense::Product { weight, bias, x: &ordered, out: &mut tile, accumulate });
        });
        Ok(())
    }

    /// Rows as experts take them.
    fn inputs(&self, x: &[f32], columns: usize, path: Path) -> OwnedInputs {
        let (rows, dispatch) = (x.len() / columns, self.dispatch);
        match path {
            Path::Decode => {
                let groups = fixed_groups(columns);
                let mut fixed = vec![FixedGroup::ZERO; rows * groups];
                let vectors = x.par_chunks_exact(columns).zip(fixed.par_chunks_exact_mut(groups));
                vectors.for_each(|(x, out)| dispatch.run(ToFixed { x, out }));
                OwnedInputs::Fixed(fixed)
            }
            Path::Prefill => {
                let groups = packed_groups(columns);
                let mut ordered = vec![Group::ZERO; rows * groups];
                let vectors = x.par_chunks_exact(columns).zip(ordered.par_chunks_exact_mut(groups));
                vectors.for_each(|(x, out)| to_packed(x, out));
                OwnedInputs::Ordered(ordered)
            }
        }
    }

    /// What the tasks of attention are.
    fn spans(&self, batch: &[Sequence<'_>]) -> Result<Vec<Span>> {
        if batch.is_empty() {
            return Err(Error::Length { length: 0, context: self.context() });
        }
        let (mut row, mut spans) = (0, Vec::with_capacity(batch.len()));
        for (index, sequence) in batch.iter().enumerate() {
            self.config.check_tokens(sequence.tokens)?;
            if *sequence.cache.layout() != *self.cache_layout {
                return Err(Error::Cache);
            }
            let positions = sequence.cache.next(sequence.tokens.len())?;
            for start in positions.clone().step_by(ATTENTION_TOKENS) {
                let positions = start..positions.end.min(start + ATTENTION_TOKENS);
                let tokens = positions.len();
                spans.push(Span { sequence: index, row, positions });
                row += tokens;
            }
        }
        Ok(spans)
    }
}

/// Owner of [`Inputs`].
enum OwnedInputs {
    Fixed(Vec<FixedGroup>),
    Ordered(Vec<Group>),
}

impl OwnedInputs {
    fn borrow(&self) -> Inputs<'_> {
        match self {
            OwnedInputs::Fixed(groups) => Inputs::Fixed(groups),
            OwnedInputs::Ordered(groups) => Inputs::Ordered(groups),
        }
    }
}

/// Cosines and sines, times the concentration, of one position.
struct Angles {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Angles {
    fn new(rope: &Frequencies, position: usize) -> Angles {
        let angles = rope.inverse.iter().map(|inverse| (position as f64 * inverse).sin_cos());
        let scaled = angles.map(|(sin, cos)| [cos, sin].map(|value| (value * rope.concentration) as f32));
        let (cosines, sines) = scaled.map(|[cos, sin]| (cos, sin)).unzip();
        Angles { cosines, sines }
    }
}
