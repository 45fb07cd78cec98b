//! GPT-OSS on a GPU by kernels of our own: a step of decoding is one recorded graph.
//!
//! ```text
//! tokens, positions, page tables (device)          written by the host before a run, tokens and positions then by the graph
//!   │
//!   ├ embedding
//!   ├ × blocks   qkv (norm, bias, RoPE, cache) ─ attention [─ join] ─ out (bias, residual)
//!   │            router (norm, logits) ─ gate_up (selection, SwiGLU) ─ down (weights, residual)
//!   ├ unembedding (norm)
//!   └ argmax ─► tokens, positions + 1
//! ```
//!
//! A prefill is as many kernels for a chunk of tokens (`prefill`), started one by one.
//!
//! Every buffer keeps its address, so a graph is recorded once for a batch size and a number of splits of attention, and replayed
//! for every token. `pages` has the caches.

mod pages;
mod prefill;
mod weights;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};

use cubecl::bytes::Bytes;
use cubecl::client::{Client, Graph};
use cubecl::server::{Handle, ServerError};
use formats::model_bin::Stored;
use formats::progress::Progress;
use half::f16;

pub use pages::Cache;

use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;
use crate::kernels::mxfp4_dot::Decoding;
use crate::kernels::qkv::{FINE, PAGE};
use crate::kernels::{argmax, attention, copy, down, embedding, gate_up, linear, qkv, router};
use crate::nn::frequencies::Frequencies;
use pages::{Copy, Pages, Pool};
use weights::Weights;

/// Sequences of a batch, at most.
pub const MOST_SEQUENCES: usize = 32;
/// Pages that the pools first have.
const FIRST_PAGES: u32 = 16;

/// A model on a device.
pub struct Model {
    client: Client,
    config: Config,
    context: usize,
    weights: Weights,
    decoding: Decoding,
    coarse: Handle,
    fine: Handle,
    state: Mutex<State>,
    full: Pool,
    windowed: Pool,
}

/// What runs of the model share.
struct State {
    /// Keys and values of each block.
    caches: Vec<[Handle; 2]>,
    buffers: Buffers,
    graphs: HashMap<Step, Graph>,
}

/// What a graph is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Step {
    sequences: usize,
    splits: usize,
    chooses: bool,
}

/// Buffers of a step, for [`MOST_SEQUENCES`].
struct Buffers {
    /// u32: the next token of each sequence.
    tokens: Handle,
    /// u32: its position.
    positions: Handle,
    /// u32: page numbers of each sequence.
    full_pages: Handle,
    windowed_pages: Handle,
    x: Handle,
    q: Handle,
    partial: Handle,
    attended: Handle,
    router_logits: Handle,
    normed: Handle,
    hidden: Handle,
    ids: Handle,
    shares: Handle,
    logits: Handle,
    argmax: Handle,
    chosen: Handle,
}

/// A kind of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Rows of the embedding.
    Embedding,
    /// Norm, projection, bias, RoPE and the writing of the cache.
    Qkv,
    /// Attention over the cache.
    Attention,
    /// The output projection and the residual.
    Out,
    /// Norm and router.
    Router,
    /// Gate and up projections of the selected experts.
    GateUp,
    /// Their down projections and the residual.
    Down,
    /// Norm and logits.
    Unembedding,
    /// The choice of the token.
    Choice,
}

impl Stage {
    /// Every stage, in the order of a step.
    pub const ALL: [Stage; 9] = [
        Stage::Embedding,
        Stage::Qkv,
        Stage::Attention,
        Stage::Out,
        Stage::Router,
        Stage::GateUp,
        Stage::Down,
        Stage::Unembedding,
        Stage::Choice,
    ];
}

/// The share of a stage in a step.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Share {
    /// Which.
    pub stage: Stage,
    /// Seconds of all its kernels in a step, the gaps between them included.
    pub seconds: f64,
    /// Bytes of weights that they read.
    pub bytes: u64,
}

/// What has been asked of the device and will come.
type Reading<'a> = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send + 'a>>;

/// Splits of attention over everything, at most.
const MOST_SPLITS: usize = 32;

impl Model {
    /// Uploads a model for sequences of up to `context` tokens.
    ///
    /// # Errors
    /// [`Error::Format`] where a container cannot be read, [`Error::Device`] where the device fails.
    pub fn load(
        stored: &Stored,
        config: &Config,
        context: usize,
        client: Client,
        progress: &dyn Progress,
    ) -> Result<Model> {
        let client = on_its_own_stream(client)?;
        let weights = Weights::upload(&client, stored, config, progress)?;
        let (coarse, fine) = angles(config, context);
        let upload = |values: Vec<f32>| client.create_from_slice(bytemuck::cast_slice(&values));
        let model = Model {
            coarse: upload(coarse),
            fine: upload(fine),
            state: Mutex::new(State {
                caches: Vec::new(),
                buffers: Buffers::new(&client, config, context),
                graphs: HashMap::new(),
            }),
            config: config.clone(),
            decoding: Decoding::of(&client),
            context,
            weights,
            client,
            full: Pool::default(),
            windowed: Pool::default(),
        };
        model.grow(&mut model.lock(), FIRST_PAGES, FIRST_PAGES);
        model.sync()?;
        Ok(model)
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.config.attention_window)
    }

    /// Waits until the device is done.
    pub fn sync(&self) -> Result<()> {
        cubecl::future::block_on(self.client.sync()).map_err(failed)
    }

    /// Adds a token to each of some sequences: f32 `[sequences, vocabulary]`, the logits that follow.
    ///
    /// # Errors
    /// [`Error::Length`] where there is no sequence or one has no room, [`Error::Token`] for an id outside the vocabulary,
    /// [`Error::Model`] for more than [`MOST_SEQUENCES`], [`Error::Device`] where the device fails.
    pub fn step(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<f32>> {
        let mut state = self.lock();
        let graph = self.prepare(&mut state, batch, false)?;
        replay(&graph)?;
        for (cache, _) in batch.iter_mut() {
            cache.advance(1);
        }
        self.read_logits(&state, batch.len())
    }

    /// f32 `[rows, vocabulary]`.
    fn read_logits(&self, state: &State, rows: usize) -> Result<Vec<f32>> {
        let logits = prefix(&state.buffers.logits, rows * self.config.vocabulary);
        let bytes = self.client.read_one(logits).map_err(failed)?;
        Ok(bytemuck::cast_slice(&bytes).to_vec())
    }

    /// Generates `count` tokens of each sequence greedily, after the given ones. A step is begun before the tokens of the last are
    /// read, so that the device need not wait for the host.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn generate(&self, batch: &mut [(&mut Cache, u32)], count: usize) -> Result<Vec<Vec<u32>>> {
        let mut state = self.lock();
        let mut written: Vec<Vec<u32>> = vec![Vec::new(); batch.len()];
        let mut pending: Option<Reading<'_>> = None;
        for index in 0..=count {
            let next = match index {
                _ if index == count => None,
                0 => Some(self.prepare(&mut state, batch, true)?),
                _ => Some(self.extend(&mut state, batch)?),
            };
            let next = match next {
                Some(graph) => {
                    replay(&graph)?;
                    batch.iter_mut().for_each(|(cache, _)| cache.advance(1));
                    let chosen = prefix(&state.buffers.chosen, 2 * batch.len());
                    Some(Box::pin(self.client.read_async(vec![chosen])) as Reading<'_>)
                }
                None => None,
            };
            if let Some(read) = pending.take() {
                let chosen = cubecl::future::block_on(read).map_err(failed)?;
                let chosen: &[u32] = bytemuck::cast_slice(&chosen[0]);
                for (tokens, [token, _]) in written.iter_mut().zip(chosen.as_chunks::<2>().0) {
                    tokens.push(*token);
                }
            }
            pending = next;
        }
        for ((_, token), tokens) in batch.iter_mut().zip(&written) {
            *token = tokens.last().copied().unwrap_or(*token);
        }
        Ok(written)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a token of each sequence, writes everything that the graph reads, and finds or records it.
    fn prepare(&self, state: &mut State, batch: &mut [(&mut Cache, u32)], chooses: bool) -> Result<Graph> {
        let step = self.step_of(batch, chooses)?;
        self.reserve_step(state, batch)?;
        self.write_tables(state, batch);
        self.write_state(state, batch);
        if let Some(graph) = state.graphs.get(&step) {
            return Ok(graph.clone());
        }
        let graph = self.record(state, step)?;
        self.write_state(state, batch);
        Ok(graph)
    }

    /// Tells the device the tokens and their positions.
    fn write_state(&self, state: &State, batch: &[(&mut Cache, u32)]) {
        let tokens: Vec<u32> = batch.iter().map(|(_, token)| *token).collect();
        let positions: Vec<u32> = batch.iter().map(|(cache, _)| cache.len() as u32).collect();
        for (buffer, values) in [(&state.buffers.tokens, tokens), (&state.buffers.positions, positions)] {
            self.client.write(&prefix(buffer, values.len()), Bytes::from_elems(values));
        }
    }

    /// [`Model::prepare`] after a step that chose the tokens itself.
    fn extend(&self, state: &mut State, batch: &mut [(&mut Cache, u32)]) -> Result<Graph> {
        let step = self.step_of(batch, true)?;
        if self.reserve_step(state, batch)? {
            self.write_tables(state, batch);
        }
        if let Some(graph) = state.graphs.get(&step) {
            return Ok(graph.clone());
        }
        // Recording runs the step: what it chose is overwritten by what was there before.
        let saved = [&state.buffers.tokens, &state.buffers.positions]
            .map(|buffer| self.client.read_one(buffer.clone()));
        let graph = self.record(state, step)?;
        for (buffer, bytes) in [&state.buffers.tokens, &state.buffers.positions].into_iter().zip(saved) {
            self.client.write(buffer, bytes.map_err(failed)?);
        }
        Ok(graph)
    }

    fn step_of(&self, batch: &[(&mut Cache, u32)], chooses: bool) -> Result<Step> {
        let longest = batch.iter().map(|(cache, _)| cache.len() + 1).max().unwrap_or(0);
        if batch.is_empty() || longest > self.context {
            return Err(Error::Length { length: longest, context: self.context });
        }
        if batch.len() > MOST_SEQUENCES {
            return Err(Error::Model {
                field: "sequences",
                found: batch.len().to_string(),
                needed: format!("{MOST_SEQUENCES} at most in a batch"),
            });
        }
        for (_, token) in batch {
            self.config.check_tokens(std::slice::from_ref(token))?;
        }
        let splits = longest.div_ceil(2 * PAGE).next_power_of_two().min(MOST_SPLITS);
        Ok(Step { sequences: batch.len(), splits, chooses })
    }

    /// Makes room for more tokens of a sequence. Whether it got another page.
    fn reserve(&self, state: &mut State, cache: &mut Cache, tokens: usize) -> Result<bool> {
        let len = cache.len();
        let [full, windowed] = [&cache.full, &cache.windowed].map(|pages| pages.missing(len, tokens));
        if full + windowed == 0 {
            return Ok(false);
        }
        let grown = |pool: &Pool, missing: usize| match missing.checked_sub(pool.available()) {
            Some(more) if more > 0 => (pool.capacity() + more as u32).next_power_of_two(),
            _ => pool.capacity(),
        };
        self.grow(state, grown(&self.full, full), grown(&self.windowed, windowed));
        let exhausted = || Error::Device("the pages that were counted are not there".into());
        let copies = [
            cache.full.reserve(&self.full, len, tokens).ok_or_else(exhausted)?,
            cache.windowed.reserve(&self.windowed, len, tokens).ok_or_else(exhausted)?,
        ];
        for (copy, windowed) in copies.into_iter().zip([false, true]) {
            if let Some(copy) = copy {
                self.copy(state, &copy, windowed);
            }
        }
        Ok(true)
    }

    /// Makes room for a token of each sequence. Whether any got another page.
    fn reserve_step(&self, state: &mut State, batch: &mut [(&mut Cache, u32)]) -> Result<bool> {
        let mut any = false;
        for (cache, _) in batch {
            any |= self.reserve(state, cache, 1)?;
        }
        Ok(any)
    }

    fn write_tables(&self, state: &State, batch: &[(&mut Cache, u32)]) {
        let tables = [
            (&state.buffers.full_pages, self.table(None), (|cache| &cache.full) as fn(&Cache) -> &Pages),
            (&state.buffers.windowed_pages, self.table(Some(self.config.attention_window)), |cache| {
                &cache.windowed
            }),
        ];
        for (buffer, table, pages) in tables {
            let numbers: Vec<u32> = batch.iter().flat_map(|(cache, _)| pages(cache).table(table)).collect();
            self.client.write(&prefix(buffer, numbers.len()), Bytes::from_elems(numbers));
        }
    }

    /// Page numbers of a sequence on the device.
    fn table(&self, window: Option<usize>) -> usize {
        table(self.context, window)
    }

    fn elements_of_page(&self) -> usize {
        self.config.num_kv_heads * PAGE * self.config.head_dim
    }

    /// Makes the pools larger, which moves them and makes graphs void.
    fn grow(&self, state: &mut State, full: u32, windowed: u32) {
        if full <= self.full.capacity() && windowed <= self.windowed.capacity() {
            return;
        }
        let page = self.elements_of_page();
        let old: Vec<[Handle; 2]> = std::mem::take(&mut state.caches);
        for block in 0..self.config.num_blocks {
            let (pool, capacity) = match self.config.window(block) {
                Some(_) => (&self.windowed, windowed),
                None => (&self.full, full),
            };
            let before = pool.capacity() as usize * page;
            let new = [(); 2].map(|()| self.client.empty(capacity as usize * page * size_of::<f16>()));
            if let Some(old) = old.get(block) {
                for (old, new) in old.iter().zip(&new) {
                    copy::launch(&self.client, old, 0, new, 0, before / 2);
                }
            }
            state.caches.push(new);
        }
        self.full.grow(full);
        self.windowed.grow(windowed);
        state.graphs.clear();
    }

    fn copy(&self, state: &State, copy: &Copy, windowed: bool) {
        let words = self.elements_of_page() / 2;
        for (block, caches) in state.caches.iter().enumerate() {
            if self.config.window(block).is_some() == windowed {
                for cache in caches {
                    let (from, to) = (copy.from.number as usize, copy.to.number as usize);
                    copy::launch(&self.client, cache, from * words, cache, to * words, words);
                }
            }
        }
    }

    /// Records the graph of a step, which runs it: what it writes is what running it again will write, but for the tokens and
    /// positions that it chooses.
    fn record(&self, state: &mut State, step: Step) -> Result<Graph> {
        let graph = self.capture(state, step, &|_| true)?;
        state.graphs.insert(step, graph.clone());
        Ok(graph)
    }

    fn capture(&self, state: &State, step: Step, wanted: &dyn Fn(Stage) -> bool) -> Result<Graph> {
        self.client.graph_prepare().map_err(failed)?;
        self.enqueue(state, step, wanted);
        self.client.start_capture().map_err(failed)?;
        self.enqueue(state, step, wanted);
        self.client.stop_capture().map_err(failed)
    }

    /// Measures each stage of a step by itself: a graph of its kernels in all blocks, replayed.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn profile(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<Share>> {
        let mut state = self.lock();
        let step = self.step_of(batch, true)?;
        self.prepare(&mut state, batch, true)?;
        let repeats = 20;
        let mut shares = Vec::new();
        for stage in Stage::ALL {
            let graph = self.capture(&state, step, &|other| other == stage)?;
            let mut times = Vec::new();
            for _ in 0..5 {
                self.write_state(&state, batch);
                self.sync()?;
                let start = std::time::Instant::now();
                for _ in 0..repeats {
                    replay(&graph)?;
                }
                self.sync()?;
                times.push(start.elapsed().as_secs_f64() / f64::from(repeats));
            }
            times.sort_by(f64::total_cmp);
            shares.push(Share { stage, seconds: times[2], bytes: self.bytes_of(stage) });
        }
        Ok(shares)
    }

    /// Bytes of weights that a stage reads for one sequence.
    fn bytes_of(&self, stage: Stage) -> u64 {
        let config = &self.config;
        let width = config.embedding_dim;
        let of_block = match stage {
            Stage::Qkv => 2 * config.qkv_rows() * width,
            Stage::Out => 2 * config.num_heads * config.head_dim * width,
            Stage::Router => 2 * config.num_experts * width,
            Stage::GateUp => config.num_active_experts * 2 * config.mlp_dim * width / 32 * 17,
            Stage::Down => config.num_active_experts * config.mlp_dim * width / 32 * 17,
            Stage::Unembedding => return (2 * config.vocabulary * width) as u64,
            Stage::Embedding | Stage::Attention | Stage::Choice => 0,
        };
        (of_block * config.num_blocks) as u64
    }

    /// The kernels of a step, those of the wanted stages.
    fn enqueue(&self, state: &State, step: Step, wanted: &dyn Fn(Stage) -> bool) {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, vocabulary, .. } = self.config;
        let (client, b, weights) = (&self.client, &state.buffers, &self.weights);
        let sequences = step.sequences;
        let epsilon = self.config.rmsnorm_epsilon.to_bits();
        if wanted(Stage::Embedding) {
            embedding::launch(
                client,
                &weights.embedding,
                &b.tokens,
                &b.x,
                vocabulary,
                embedding_dim,
                sequences,
            );
        }
        for (index, (block, [keys, values])) in weights.blocks.iter().zip(&state.caches).enumerate() {
            let window = self.config.window(index);
            let table = self.table(window);
            let (pool, pages) = match window {
                Some(_) => (&self.windowed, &b.windowed_pages),
                None => (&self.full, &b.full_pages),
            };
            let cache_len = pool.capacity() as usize * self.elements_of_page();
            let projection = qkv::Qkv {
                columns: embedding_dim,
                heads: num_heads,
                kv_heads: num_kv_heads,
                head_dim,
                epsilon,
                table,
            };
            let buffers = qkv::Buffers {
                x: &b.x,
                norm: &block.attn_norm,
                weights: &block.qkv,
                bias: &block.qkv_bias,
                coarse: &self.coarse,
                fine: &self.fine,
                positions: &b.positions,
                pages,
                q: &b.q,
                keys,
                values,
                cache_len,
            };
            if wanted(Stage::Qkv) {
                qkv::launch::<f16>(client, projection, sequences, &buffers);
            }
            let attending = attention::Attention {
                heads: num_heads,
                kv_heads: num_kv_heads,
                head_dim,
                window: window.unwrap_or(0),
                table,
                splits: if window.is_some() { 1 } else { step.splits },
            };
            let buffers = attention::Buffers {
                q: &b.q,
                keys,
                values,
                cache_len,
                positions: &b.positions,
                pages,
                sinks: &block.sinks,
                partial: &b.partial,
                out: &b.attended,
            };
            if wanted(Stage::Attention) {
                attention::launch::<f16>(client, attending, sequences, &buffers);
            }
            let out = linear::Linear {
                rows: embedding_dim,
                columns: num_heads * head_dim,
                bias: true,
                residual: true,
                epsilon: None,
            };
            let buffers = linear::Buffers {
                weights: &block.out,
                bias: &block.out_bias,
                norm: &block.mlp_norm,
                x: &b.attended,
                y: &b.x,
            };
            if wanted(Stage::Out) {
                linear::launch(client, out, sequences, &buffers);
            }
            let routing =
                router::Router { experts: self.config.num_experts, columns: embedding_dim, epsilon };
            let buffers = router::Buffers {
                x: &b.x,
                norm: &block.mlp_norm,
                weights: &block.gate,
                bias: &block.gate_bias,
                logits: &b.router_logits,
                normed: &b.normed,
            };
            if wanted(Stage::Router) {
                router::launch(client, routing, sequences, &buffers);
            }
            let experts = gate_up::Experts {
                experts: self.config.num_experts,
                active: self.config.num_active_experts,
                embedding_dim,
                mlp_dim: self.config.mlp_dim,
                limit: self.config.swiglu_limit.to_bits(),
                decoding: self.decoding,
            };
            let buffers = gate_up::Buffers {
                logits: &b.router_logits,
                normed: &b.normed,
                codes: &block.mlp1.codes,
                scales: &block.mlp1.scales,
                bias: &block.mlp1_bias,
                hidden: &b.hidden,
                ids: &b.ids,
                shares: &b.shares,
            };
            if wanted(Stage::GateUp) {
                gate_up::launch(client, experts, sequences, &buffers);
            }
            let buffers = down::Buffers {
                hidden: &b.hidden,
                ids: &b.ids,
                shares: &b.shares,
                codes: &block.mlp2.codes,
                scales: &block.mlp2.scales,
                bias: &block.mlp2_bias,
                x: &b.x,
            };
            if wanted(Stage::Down) {
                down::launch(client, experts, sequences, &buffers);
            }
        }
        if wanted(Stage::Unembedding) {
            self.unembed(state, sequences, epsilon);
        }
        if step.chooses && wanted(Stage::Choice) {
            let buffers = argmax::Buffers {
                logits: &b.logits,
                partial: &b.argmax,
                tokens: &b.tokens,
                positions: &b.positions,
                chosen: &b.chosen,
            };
            argmax::launch(client, vocabulary, sequences, &buffers);
        }
    }
}

impl Buffers {
    fn new(client: &Client, config: &Config, context: usize) -> Buffers {
        let Config {
            embedding_dim,
            head_dim,
            num_heads,
            num_experts,
            num_active_experts,
            mlp_dim,
            vocabulary,
            ..
        } = *config;
        let words = |each: usize| client.create_from_slice(&vec![0; MOST_SEQUENCES * each * 4]);
        Buffers {
            tokens: words(1),
            positions: words(1),
            full_pages: words(table(context, None)),
            windowed_pages: words(table(context, Some(config.attention_window))),
            x: words(embedding_dim),
            q: words(num_heads * head_dim),
            partial: words(num_heads * MOST_SPLITS * (head_dim + 2)),
            attended: words(num_heads * head_dim),
            router_logits: words(num_experts),
            normed: words(embedding_dim),
            hidden: words(num_active_experts * mlp_dim),
            ids: words(num_active_experts),
            shares: words(num_active_experts),
            logits: words(vocabulary),
            argmax: words(argmax::partial_len(1)),
            chosen: words(2),
        }
    }
}

/// Page numbers of a sequence on the device: all of them, or as many as a window and the page that is written to may touch.
fn table(context: usize, window: Option<usize>) -> usize {
    let positions = window.map_or(context, |window| (window + 2 * PAGE).min(context + PAGE));
    positions.div_ceil(PAGE).max(1)
}

/// Cosines and sines of a model's rotation in two tables: of the multiples of [`FINE`], and of what lies between them, times the
/// concentration. In f64, so that every device rotates by the same angles.
fn angles(config: &Config, context: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies = Frequencies::yarn(&config.yarn(), config.head_dim);
    let rows = |positions: &mut dyn Iterator<Item = usize>, factor: f64| {
        let pair = |position: usize, inverse: f64| {
            let (sin, cos) = (position as f64 * inverse).sin_cos();
            [(cos * factor) as f32, (sin * factor) as f32]
        };
        positions
            .flat_map(|position| frequencies.inverse.iter().flat_map(move |&inverse| pair(position, inverse)))
            .collect()
    };
    let coarse = rows(&mut (0..=context / FINE).map(|row| row * FINE), 1.0);
    (coarse, rows(&mut (0..FINE), frequencies.concentration))
}

/// Whatever thread uses the client, its work stands in one queue, as a graph needs, and in nobody else's.
fn on_its_own_stream(mut client: Client) -> Result<Client> {
    // Streams belong to threads: that of a thread which has ended belongs to no other.
    let stream = std::thread::scope(|scope| scope.spawn(|| client.empty(4).stream).join());
    let stream = stream.map_err(|_| Error::Device("no stream could be made".into()))?;
    // SAFETY: all work of the model goes through this client and its clones.
    unsafe { client.set_stream(stream) };
    Ok(client)
}

/// Runs a graph that was found or recorded under the present lock.
fn replay(graph: &Graph) -> Result<()> {
    // SAFETY: the model owns every buffer of a graph and frees them only when it clears the graphs; its client is pinned to one
    // stream, and its state is locked.
    unsafe { graph.replay() }.map_err(failed)
}

/// The first words of a buffer.
fn prefix(handle: &Handle, words: usize) -> Handle {
    let bytes = words as u64 * 4;
    handle.clone().offset_end(handle.size_in_used() - bytes)
}

fn failed(error: impl std::fmt::Debug) -> Error {
    Error::Device(format!("{error:?}"))
}
