//! GPT-OSS on a GPU by kernels of our own: a step of decoding is one recorded graph.
//!
//! ```text
//! tokens, positions, page tables (device)          written by the host before a run, tokens and positions then by the graph
//!   │
//!   ├ embedding
//!   ├ × blocks   qkv (norm, bias, RoPE, cache) ─ attention [─ join] ─ out (bias, residual)
//!   │            router (norm, logits) ─ gate_up (selection, SwiGLU) ─ down (weights, residual)
//!   ├ unembedding (norm)
//!   └ choice ─► tokens, positions + 1
//! ```
//!
//! A batch of more sequences is a graph of other kernels (`batch`), which read every weight once for all of them.
//! A prefill is as many kernels for a chunk of tokens (`prefill`), started one by one.
//!
//! Every buffer keeps its address, so a graph is recorded once for a batch size and a number of splits of attention, and replayed
//! for every token. `pages` has the caches.

mod batch;
pub(crate) mod choice;
mod pages;
mod prefill;
mod rows;
mod weights;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};

use cubecl::bytes::Bytes;
use cubecl::client::{Client, Graph};
use cubecl::server::{Handle, ServerError};
use formats::model_bin::Stored;
use formats::progress::Progress;
use half::f16;

pub use pages::{Cache, CacheLayout};
pub use prefill::CHUNK;

use crate::backend::{self, Device, Float, failed, recording, waiting};
use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;
use crate::kernels::method::Method;
use crate::kernels::mxfp4_dot::Decoding;
use crate::kernels::prefill_attention::PrefillAttention;
use crate::kernels::qkv::{FINE, PAGE};
use crate::kernels::sample::{Parameters, RING, Ways};
use crate::kernels::{attention, copy, dispatch, down, embedding, gate_up, linear, qkv, router};
use crate::nn::frequencies::Frequencies;
use crate::sampling::{Options, Sampled, Sampler};
use choice::{Choice, OfStep};
use pages::{Copy, FIRST_PAGES, Pages, Pool, elements_of_page};
use rows::Rows;
use weights::Weights;

/// Sequences of a batch, at most.
pub const MOST_SEQUENCES: usize = 32;

/// A model on a device.
pub struct Model {
    client: Client,
    config: Config,
    context: usize,
    weights: Weights,
    decoding: Decoding,
    tiled_from: usize,
    coarse: Handle,
    fine: Handle,
    state: Mutex<State>,
    full: Pool,
    windowed: Pool,
}

/// A sequence that draws its tokens.
pub struct Stream<'a> {
    /// Keys and values of the tokens before `token`.
    pub cache: &'a mut Cache,
    /// The next token to be fed.
    pub token: u32,
    /// What draws the tokens after it.
    pub sampler: &'a mut Sampler,
}

/// What runs of the model share.
struct State {
    /// Keys and values of each block.
    caches: Vec<[Handle; 2]>,
    buffers: Buffers,
    /// Of a step whose products have tiles.
    rows: Rows,
    choice: Choice,
    graphs: HashMap<Step, Graph>,
    /// How often [`Model::prepare`] has written what a step reads.
    prepared: u64,
}

/// Stages of a step that are wanted.
type Wanted<'a> = dyn Fn(Stage) -> bool + Sync + 'a;

/// What a graph is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Step {
    sequences: usize,
    splits: usize,
    /// How it chooses the next tokens, if it does.
    choice: Option<Ways>,
    /// Whether its products have tiles (`batch`).
    tiled: bool,
}

/// Buffers of a step, for [`MOST_SEQUENCES`].
struct Buffers<H = Handle> {
    /// u32: the next token of each sequence.
    tokens: H,
    /// u32: its position.
    positions: H,
    /// u32: page numbers of each sequence.
    full_pages: H,
    windowed_pages: H,
    x: H,
    q: H,
    partial: H,
    attended: H,
    router_logits: H,
    normed: H,
    hidden: H,
    ids: H,
    shares: H,
    logits: H,
    chosen: H,
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
    /// Bytes of weights that they read where there is one sequence.
    pub bytes_for_one: u64,
}

/// What has been asked of the device and will come. It is awaited in any case: what nobody waits for leaves its buffer mapped.
struct Reading<'a>(Option<Coming<'a>>);

type Coming<'a> = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send + 'a>>;

impl Reading<'_> {
    fn wait(mut self) -> Result<Vec<Bytes>> {
        let Some(reading) = self.0.take() else { return Ok(Vec::new()) };
        waiting(|| cubecl::future::block_on(reading)).map_err(failed)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        // Its content is not wanted, and what failed will fail again where it is.
        self.0.take().map(|reading| waiting(|| cubecl::future::block_on(reading)));
    }
}

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
                buffers: Buffers::new(config, context, &mut |words| {
                    client.create_from_slice(&vec![0; MOST_SEQUENCES * words * size_of::<u32>()])
                }),
                rows: Rows::empty(&client, config, MOST_SEQUENCES),
                choice: Choice::new(&client, MOST_SEQUENCES, config.vocabulary),
                graphs: HashMap::new(),
                prepared: 0,
            }),
            tiled_from: batch::tiled_from(&client),
            config: config.clone(),
            decoding: Decoding::of(&client),
            context,
            weights,
            client,
            full: Pool::default(),
            windowed: Pool::default(),
        };
        model.grow(&mut model.lock(), FIRST_PAGES, FIRST_PAGES)?;
        model.sync()?;
        Ok(model)
    }

    /// Lets steps of at least so many sequences multiply with tiles, which read a weight once for all sequences; without it, from
    /// as many on as that is faster.
    pub fn tiled_from(mut self, sequences: usize) -> Model {
        self.tiled_from = sequences;
        self
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.full.clone(), self.config.attention_window, self.context)
    }

    /// Waits until the device is done.
    ///
    /// # Errors
    /// [`Error::Device`] where something failed.
    pub fn sync(&self) -> Result<()> {
        backend::sync(&self.client)
    }

    /// Adds a token to each of some sequences: f32 `[sequences, vocabulary]`, the logits that follow.
    ///
    /// # Errors
    /// [`Error::Length`] where there is no sequence or one has no room, [`Error::Token`] for an id outside the vocabulary,
    /// [`Error::Model`] for more than [`MOST_SEQUENCES`], [`Error::Device`] where the device fails.
    pub fn step(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<f32>> {
        let mut state = self.lock();
        let logits = self.logits(&mut state, batch)?;
        for (cache, _) in batch.iter_mut() {
            cache.advance(1);
        }
        Ok(logits)
    }

    /// The logits after a token of each sequence, which the caches do not count.
    fn logits(&self, state: &mut State, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<f32>> {
        let graph = self.prepare(state, batch, None)?;
        replay(&graph)?;
        self.read_logits(state, batch.len())
    }

    /// f32 `[rows, vocabulary]`.
    fn read_logits(&self, state: &State, rows: usize) -> Result<Vec<f32>> {
        self.read(&state.buffers.logits, rows * self.config.vocabulary)
    }

    /// Feeds each sequence its token and draws the next, which `each` gets, up to `most` times or until `each` breaks; then the last
    /// tokens drawn are those of `streams` and not in the caches. A step is begun before the tokens of the last are read, so that
    /// the device need not wait for the host. While `each` has them, others may use the model.
    ///
    /// # Errors
    /// As [`Model::step`], once the context is full, and [`Error::Sampling`] where no token can be drawn. The caches hold what
    /// was drawn before.
    pub fn decode(
        &self,
        streams: &mut [Stream<'_>],
        most: usize,
        each: &mut dyn FnMut(Vec<Sampled>) -> ControlFlow<()>,
    ) -> Result<()> {
        let longest = streams.iter().map(|stream| stream.cache.len()).max().unwrap_or(0);
        let wanted = longest.saturating_add(most);
        let most = most.min(self.context.saturating_sub(longest));
        for stream in streams.iter() {
            stream.sampler.check_vocabulary(self.config.vocabulary)?;
        }
        let ways = streams.iter().map(|stream| Ways::of(stream.sampler.options()));
        let ways = ways.reduce(Ways::or).unwrap_or_default();
        let mut state = self.lock();
        // Which preparation the steps go on from.
        let mut turn = state.prepared;
        let mut underway: Option<Reading<'_>> = None;
        // Steps begun, and those of them since random numbers were written.
        let (mut begun, mut drawn) = (0, 0);
        loop {
            let graph = match underway {
                _ if begun == most => None,
                None => {
                    let graph = self.prepare(&mut state, &mut fed(streams), Some(ways))?;
                    self.write_choices(&state, streams);
                    (turn, drawn) = (state.prepared, 0);
                    Some(graph)
                }
                // What the next step would read is another's since then.
                Some(_) if state.prepared != turn => None,
                Some(_) => self.extend(&mut state, &mut fed(streams), ways)?,
            };
            let next = match graph {
                None => None,
                Some(graph) => {
                    if drawn == RING {
                        self.write_uniforms(&state, streams);
                        drawn = 0;
                    }
                    replay(&graph)?;
                    (begun, drawn) = (begun + 1, drawn + 1);
                    let chosen = prefix(&state.buffers.chosen, 2 * streams.len());
                    Some(Reading(Some(Box::pin(self.client.read_async(vec![chosen])))))
                }
            };
            let last = std::mem::replace(&mut underway, next);
            let Some(last) = last else {
                match underway {
                    Some(_) => continue,
                    None if wanted > self.context => {
                        return Err(Error::Length { length: wanted, context: self.context });
                    }
                    None => return Ok(()),
                }
            };
            let chosen = last.wait()?;
            let Some(drawn) = chosen.first().and_then(|chosen| self.drawn(chosen)) else {
                drop(underway);
                return Err(self.refusal(&mut state, streams));
            };
            for (stream, sampled) in streams.iter_mut().zip(&drawn) {
                stream.cache.advance(1);
                stream.token = sampled.token;
                stream.sampler.accept(sampled.token);
            }
            drop(state);
            if each(drawn).is_break() {
                // What was begun since then feeds a token too many, which the next one to come overwrites.
                return Ok(());
            }
            state = self.lock();
        }
    }

    /// What a step drew; `None` where a sequence drew nothing.
    fn drawn(&self, chosen: &[u8]) -> Option<Vec<Sampled>> {
        let chosen: &[u32] = bytemuck::cast_slice(chosen);
        let sampled = |&[token, logprob]: &[u32; 2]| {
            let logprob = f32::from_bits(logprob);
            let is_drawn = (token as usize) < self.config.vocabulary && logprob.is_finite();
            is_drawn.then(|| Sampled { token, logprob, top_logprobs: Vec::new() })
        };
        chosen.as_chunks::<2>().0.iter().map(sampled).collect()
    }

    /// Why no token could be drawn, as the processor says it of the same logits.
    fn refusal(&self, state: &mut State, streams: &mut [Stream<'_>]) -> Error {
        let logits = match self.logits(state, &mut fed(streams)) {
            Ok(logits) => logits,
            Err(error) => return error,
        };
        let rows = streams.iter().zip(logits.chunks(self.config.vocabulary));
        let refused = rows.map(|(stream, row)| stream.sampler.sample_at(row, stream.sampler.next_uniform()));
        let refused = refused.filter_map(Result::err).next();
        refused.map_or_else(|| Error::Device("it drew no token although there are some".into()), Error::from)
    }

    /// Tells the device how to choose, and gives each sequence of the batch its row.
    fn write_choices(&self, state: &State, streams: &[Stream<'_>]) {
        let mut parameters = Vec::with_capacity(streams.len());
        for (row, Stream { cache, sampler, .. }) in (0..).zip(streams) {
            state.choice.write_row(&self.client, row, sampler, cache.len());
            parameters.push(state.choice.parameters_of(sampler.options(), row));
        }
        state.choice.write_parameters(&self.client, &parameters);
    }

    /// Random numbers for more tokens, while a step is under way.
    fn write_uniforms(&self, state: &State, streams: &[Stream<'_>]) {
        for (row, Stream { cache, sampler, .. }) in (0..).zip(streams) {
            let (generated, position) = (sampler.generated() + 1, cache.len() + 1);
            state.choice.write_uniforms(&self.client, row, sampler.options(), generated, position);
        }
    }

    /// The first words of a buffer.
    fn read<W: bytemuck::Pod>(&self, buffer: &Handle, words: usize) -> Result<Vec<W>> {
        backend::read(&self.client, &prefix(buffer, words))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for a token of each sequence, writes everything that the graph reads, and finds or records it.
    fn prepare(
        &self,
        state: &mut State,
        batch: &mut [(&mut Cache, u32)],
        choice: Option<Ways>,
    ) -> Result<Graph> {
        let step = self.step_of(batch, 1, choice)?;
        self.reserve_step(state, batch, 1)?;
        state.prepared += 1;
        self.write_tables(state, batch);
        self.write_state(state, batch);
        if let Some(graph) = state.graphs.get(&step) {
            return Ok(graph.clone());
        }
        if let Some(ways) = choice {
            // Recording runs the step, which may count nothing.
            state.choice.reserve(&self.client, ways);
            state.choice.write_parameters(&self.client, &vec![Parameters::GREEDY; step.sequences]);
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

    /// [`Model::prepare`] while a step is under way that chooses the tokens itself. `None` where the graph must be recorded first,
    /// which runs it: then the step must end before.
    fn extend(
        &self,
        state: &mut State,
        batch: &mut [(&mut Cache, u32)],
        choice: Ways,
    ) -> Result<Option<Graph>> {
        let step = self.step_of(batch, 2, Some(choice))?;
        let Some(graph) = state.graphs.get(&step).cloned() else { return Ok(None) };
        if self.reserve_step(state, batch, 2)? {
            self.write_tables(state, batch);
        }
        // Where the pools grew, the graph is void.
        Ok(state.graphs.contains_key(&step).then_some(graph))
    }

    /// The step that adds the last of `tokens` tokens to each sequence.
    fn step_of(&self, batch: &[(&mut Cache, u32)], tokens: usize, choice: Option<Ways>) -> Result<Step> {
        let longest = batch.iter().map(|(cache, _)| cache.len() + tokens).max().unwrap_or(0);
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
        for (cache, token) in batch {
            cache.check_owner(&self.full)?;
            self.config.check_tokens(std::slice::from_ref(token))?;
        }
        let tiled = batch.len() >= self.tiled_from;
        // Many sequences fill the device with fewer parts of each.
        let of_split = if tiled { 4 } else { 2 };
        let splits = longest.div_ceil(of_split * PAGE).next_power_of_two().min(MOST_SPLITS);
        Ok(Step { sequences: batch.len(), splits, tiled, choice })
    }

    /// Makes room for more tokens of a sequence. Whether it got another page.
    fn reserve(&self, state: &mut State, cache: &mut Cache, tokens: usize) -> Result<bool> {
        let len = cache.len();
        let [full, windowed] = [&mut cache.full, &mut cache.windowed].map(|pages| {
            pages.drop_unused(len);
            pages.missing(len, tokens)
        });
        if full + windowed == 0 {
            return Ok(false);
        }
        let grown = |pool: &Pool, missing: usize| match missing.checked_sub(pool.available()) {
            Some(more) if more > 0 => (pool.capacity() + more as u32).next_power_of_two(),
            _ => pool.capacity(),
        };
        self.grow(state, grown(&self.full, full), grown(&self.windowed, windowed))?;
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

    /// Makes room for tokens of each sequence. Whether any got another page.
    fn reserve_step(
        &self,
        state: &mut State,
        batch: &mut [(&mut Cache, u32)],
        tokens: usize,
    ) -> Result<bool> {
        let mut any = false;
        for (cache, _) in batch {
            any |= self.reserve(state, cache, tokens)?;
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

    /// Makes the pools larger, which moves them and makes graphs void.
    ///
    /// # Errors
    /// [`Error::Memory`] where a pool exceeds what the device can address, [`Error::Device`] where there is no room. Nothing has
    /// changed then.
    fn grow(&self, state: &mut State, full: u32, windowed: u32) -> Result<()> {
        let page = elements_of_page(&self.config);
        let pools = [(&self.full, full), (&self.windowed, windowed)];
        let grows = pools.map(|(pool, capacity)| capacity > pool.capacity());
        if grows == [false, false] {
            return Ok(());
        }
        // Kernels count elements in 32 bits.
        let most =
            self.client.properties().memory.max_page_size.min(u32::MAX as u64 * size_of::<f16>() as u64);
        for (_, capacity) in pools {
            let needed = capacity as u64 * (page * size_of::<f16>()) as u64;
            if needed > most {
                let what = "the keys of all sequences in a block".into();
                let advice = "use fewer or shorter sequences";
                return Err(Error::Memory { what, needed, available: most, advice });
            }
        }
        let is_windowed = |block| usize::from(self.config.window(block).is_some());
        let mut new = Vec::new();
        for block in (0..self.config.num_blocks).filter(|&block| grows[is_windowed(block)]) {
            let bytes = pools[is_windowed(block)].1 as usize * page * size_of::<f16>();
            new.push((block, [(); 2].map(|()| self.client.empty(bytes))));
        }
        // An allocation that fails says so only here.
        let made = self.client.sync_buffers(new.iter().flat_map(|(_, caches)| caches));
        waiting(|| cubecl::future::block_on(made)).map_err(failed)?;
        for (block, caches) in new {
            match state.caches.get_mut(block) {
                None => state.caches.push(caches),
                Some(old) => {
                    let before = pools[is_windowed(block)].0.capacity() as usize * page;
                    for (old, new) in old.iter().zip(&caches) {
                        copy::launch(&self.client, old, 0, new, 0, before / 2);
                    }
                    *old = caches;
                }
            }
        }
        pools.iter().for_each(|(pool, capacity)| pool.grow(*capacity));
        state.graphs.clear();
        Ok(())
    }

    fn copy(&self, state: &State, copy: &Copy, windowed: bool) {
        let words = elements_of_page(&self.config) / 2;
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

    fn capture(&self, state: &State, step: Step, wanted: &Wanted<'_>) -> Result<Graph> {
        self.client.graph_prepare().map_err(failed)?;
        self.enqueue(state, step, wanted);
        // Whatever another thread asks of the device meanwhile would be recorded or spoil the recording.
        let alone = || {
            self.client.start_capture()?;
            self.enqueue(state, step, wanted);
            self.client.stop_capture()
        };
        recording(|| self.client.exclusive(alone)).flatten().map_err(failed)
    }

    /// Measures each stage of a step by itself: a graph of its kernels in all blocks, replayed.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn profile(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Vec<Share>> {
        let mut state = self.lock();
        let choice = Some(Ways::default());
        let step = self.step_of(batch, 1, choice)?;
        self.prepare(&mut state, batch, choice)?;
        state.choice.write_parameters(&self.client, &vec![Parameters::GREEDY; step.sequences]);
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
            shares.push(Share { stage, seconds: times[2], bytes_for_one: self.bytes_of(stage) });
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
    fn enqueue(&self, state: &State, step: Step, wanted: &Wanted<'_>) {
        if step.tiled {
            self.enqueue_batch(state, step, wanted);
        } else {
            self.enqueue_few(state, step, wanted);
        }
        if let Some(ways) = step.choice
            && wanted(Stage::Choice)
        {
            let Buffers { logits, tokens, positions, chosen, .. } = &state.buffers;
            let of_step = OfStep { logits, tokens, positions, chosen };
            state.choice.enqueue(&self.client, ways, step.sequences, &of_step);
        }
    }

    /// The kernels of a step of few sequences up to the logits, those of the wanted stages.
    fn enqueue_few(&self, state: &State, step: Step, wanted: &Wanted<'_>) {
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
            let pages = if window.is_some() { &b.windowed_pages } else { &b.full_pages };
            let cache_len = self.cache_len(window.is_some());
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
                method: Method::Units,
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
            self.unembed_step(state, sequences, epsilon);
        }
    }
}

impl<H> Buffers<H> {
    /// Makes each of so many words for a sequence.
    fn new(config: &Config, context: usize, words: &mut dyn FnMut(usize) -> H) -> Buffers<H> {
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

/// Whatever thread uses the client, its work stands in one queue, as a graph needs, and in nobody else's as long as there are no
/// more streams than CubeCL keeps (128).
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

/// What is fed next.
fn fed<'a>(streams: &'a mut [Stream<'_>]) -> Vec<(&'a mut Cache, u32)> {
    streams.iter_mut().map(|stream| (&mut *stream.cache, stream.token)).collect()
}

/// Whether this runtime computes a model of such sizes on a device. Logits are written two at a time, and attention keeps the queries
/// that share a key head in shared memory.
pub fn runs(config: &Config, device: &Device) -> bool {
    let Some(client) = device.client() else { return false };
    let table = (config.vocabulary * config.embedding_dim * size_of::<f16>()) as u64;
    let Config { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    let step = attention::shared_bytes(heads / kv_heads, head_dim, size_of::<f16>());
    let prefill = PrefillAttention { heads, kv_heads, head_dim, window: 0, table: 1 }.shared_bytes();
    device.supports(Float::F16)
        && device.max_buffer().is_none_or(|limit| table <= limit)
        && step.max(prefill) <= client.properties().hardware.max_shared_memory_size
        && config.num_experts <= dispatch::MOST_EXPERTS
        && config.vocabulary.is_multiple_of(2)
        // Cubes on an axis: rows of the projection and of the unembedding.
        && config.qkv_rows().max(config.vocabulary / 32) <= 2 * 65_535
}

/// Bytes of a model's activations.
pub fn working_bytes(config: &Config, context: usize) -> u64 {
    // Counts, biases and scores of the choice.
    let mut words = 3 * MOST_SEQUENCES * config.vocabulary;
    // Angles.
    words += (context / FINE + 1 + FINE) * config.head_dim;
    Buffers::new(config, context, &mut |each| words += MOST_SEQUENCES * each);
    for rows in [MOST_SEQUENCES, context.min(CHUNK)] {
        Rows::new(config, Method::Units, rows, &mut |more| words += more);
    }
    (words * size_of::<u32>()) as u64
}

/// Whether the device draws tokens with such options.
pub fn draws(options: &Options) -> bool {
    options.top_logprobs == 0
}

/// The first words of a buffer.
fn prefix(handle: &Handle, words: usize) -> Handle {
    let bytes = words as u64 * 4;
    handle.clone().offset_end(handle.size_in_used() - bytes)
}
