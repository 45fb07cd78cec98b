//! A model, whoever computes it.
//!
//! | runtime | where | what it computes with |
//! |---|---|---|
//! | [`crate::gpu`] | GPUs | kernels of our own, a step of decoding as one graph |
//! | [`crate::native`] | processor | weights as they lie in the file, vector instructions |
//! | `plain` | everywhere | Burn's tensor operations in any types: the reference |

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};
use formats::model_bin::Stored;
use formats::progress::Progress;

use super::cache::Cache;
use super::config::Config;
use super::load::{LoadOptions, Types};
use super::plain;
use super::residency::Residency;
use crate::backend::{Backend, Device, Float, values_of_tensor};
use crate::error::{Error, Result};
use crate::nn::linear::as_type;
use crate::sampling::{Sampled, Sampler, sample_batch};
use crate::{gpu, native};

/// GPT-OSS on a device.
pub struct Model {
    config: Config,
    device: Device,
    context: usize,
    runtime: Runtime,
}

/// Who computes.
enum Runtime {
    Plain(Box<plain::Model>),
    Native(Box<native::Model>),
    Gpu(Box<gpu::Model>),
}

/// New tokens of one sequence and the cache of those before.
pub struct Sequence<'a> {
    /// Keys and values of the tokens so far; holds those of `tokens` afterwards.
    pub cache: &'a mut Cache,
    /// At least one.
    pub tokens: &'a [u32],
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

impl Model {
    /// Loads a model after checking that it fits (see [`Residency`]).
    ///
    /// # Errors
    /// [`Error::Memory`] where it does not fit, [`Error::Model`] where the engine or the device cannot run it,
    /// [`Error::Format`] where a container cannot be read.
    pub fn load(
        stored: &Stored,
        options: &LoadOptions,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Model> {
        Residency::plan(stored, options, device)?.check()?;
        let config = Config::new(stored.header(), stored.dims())?;
        let types = options.resolve(&config, device)?;
        let runtime = match types {
            Types::Native { cache, context } => {
                let options = native::Options {
                    context: Some(context),
                    cache: Some(cache),
                    ..native::Options::default()
                };
                let model = native::Model::new(Arc::new(stored.clone()), config.clone(), &options)?;
                Runtime::Native(Box::new(model))
            }
            Types::Gpu { context } => {
                let client = device.client().ok_or_else(|| Error::Device("it has no kernels".into()))?;
                Runtime::Gpu(Box::new(gpu::Model::load(stored, &config, context, client, progress)?))
            }
            Types::Plain(types) => {
                Runtime::Plain(Box::new(plain::Model::load(stored, &config, types, device, progress)?))
            }
        };
        Ok(Model { context: types.context(), config, device: device.clone(), runtime })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The longest sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        match &self.runtime {
            Runtime::Plain(model) => Cache::Plain(model.new_cache()),
            Runtime::Native(model) => Cache::Native(model.new_cache()),
            Runtime::Gpu(model) => Cache::Gpu(model.new_cache()),
        }
    }

    /// Runs new tokens of some sequences through all blocks: f32 `[tokens, embedding_dim]` after the final norm, the
    /// sequences end to end. The caches are longer by the tokens afterwards.
    ///
    /// # Errors
    /// [`Error::Token`] for an id outside the vocabulary, [`Error::Length`] where there is no sequence, or where one is
    /// empty or exceeds the context, [`Error::Cache`] for a cache of another runtime. Nothing has changed then.
    pub fn forward(&self, batch: &mut [Sequence<'_>], trace: Option<&mut Trace>) -> Result<Tensor<2>> {
        for sequence in batch.iter() {
            self.config.check_tokens(sequence.tokens)?;
            sequence.cache.next(sequence.tokens.len())?;
        }
        if batch.is_empty() {
            return Err(Error::Length { length: 0, context: self.context });
        }
        match &self.runtime {
            Runtime::Plain(model) => {
                let mut batch: Vec<_> = batch
                    .iter_mut()
                    .map(|Sequence { cache, tokens }| {
                        Ok(plain::Sequence { cache: Cache::plain(cache)?, tokens })
                    })
                    .collect::<Result<_>>()?;
                model.forward(&mut batch, trace)
            }
            Runtime::Native(model) => {
                // A few tokens are bound by the reading of weights, many by arithmetic.
                let path = match batch.iter().all(|sequence| sequence.tokens.len() == 1) {
                    true => native::Path::Decode,
                    false => native::Path::Prefill,
                };
                let mut batch: Vec<_> = batch
                    .iter_mut()
                    .map(|Sequence { cache, tokens }| {
                        Ok(native::Sequence { cache: Cache::native(cache)?, tokens })
                    })
                    .collect::<Result<_>>()?;
                let Some(trace) = trace else { return Ok(self.rows(model.forward(&mut batch, path, None)?)) };
                let mut found = native::Trace::default();
                let x = model.forward(&mut batch, path, Some(&mut found))?;
                *trace = self.traced(found);
                Ok(self.rows(x))
            }
            Runtime::Gpu(model) => {
                let mut found = native::Trace::default();
                let mut rows = Vec::new();
                let batch: Vec<_> = batch
                    .iter_mut()
                    .map(|Sequence { cache, tokens }| Ok((cache.gpu()?, *tokens)))
                    .collect::<Result<_>>()?;
                for (cache, tokens) in batch {
                    let traced = trace.is_some().then_some(&mut found);
                    rows.extend(model.forward(cache, tokens, traced)?);
                }
                if let Some(trace) = trace {
                    *trace = self.traced(found);
                }
                Ok(self.rows(rows))
            }
        }
    }

    /// f32 rows as a tensor `[rows, width]`.
    fn tensor(&self, values: Vec<f32>, width: usize) -> Tensor<2> {
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), self.device.burn())
    }

    fn rows(&self, values: Vec<f32>) -> Tensor<2> {
        self.tensor(values, self.config.embedding_dim)
    }

    fn traced(&self, found: native::Trace) -> Trace {
        let rows = |all: Vec<Vec<f32>>| all.into_iter().map(|rows| self.rows(rows)).collect();
        let active = self.config.num_active_experts;
        let experts = found.experts.into_iter().map(|ids| {
            let ids: Vec<i32> = ids.into_iter().map(|id| id as i32).collect();
            let tokens = ids.len() / active;
            Tensor::<2, Int>::from_data(TensorData::new(ids, [tokens, active]), self.device.burn())
        });
        Trace {
            embedding: Some(self.rows(found.embedding)),
            attention: rows(found.attention),
            blocks: rows(found.blocks),
            experts: experts.collect(),
            norm: Some(self.rows(found.norm)),
        }
    }

    /// Logits of normalised rows: f32 `[rows, embedding_dim]` → f32 `[rows, vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Format`] where the weights cannot be read any more, [`Error::Device`] where the device failed.
    pub fn unembed(&self, x: Tensor<2>) -> Result<Tensor<2>> {
        match &self.runtime {
            Runtime::Plain(model) => Ok(model.unembed(x)),
            Runtime::Native(model) => Ok(self.tensor(model.unembed(&read(x)?)?, self.config.vocabulary)),
            Runtime::Gpu(model) => Ok(self.tensor(model.unembed(&read(x)?)?, self.config.vocabulary)),
        }
    }

    /// Waits until everything that was asked of the device is done.
    ///
    /// # Errors
    /// [`Error::Device`] where something failed.
    pub fn sync(&self) -> Result<()> {
        match &self.runtime {
            Runtime::Gpu(model) => model.sync(),
            Runtime::Plain(_) | Runtime::Native(_) => self.device.sync(),
        }
    }

    /// Adds a token to each of some sequences: f32 `[sequences, vocabulary]`, the logits that follow.
    ///
    /// # Errors
    /// As [`Model::forward`]; GPUs take [`gpu::MOST_SEQUENCES`] at a time, more are an [`Error::Model`].
    pub fn step(&self, batch: &mut [(&mut Cache, u32)]) -> Result<Tensor<2>> {
        if let Runtime::Gpu(model) = &self.runtime {
            let mut batch: Vec<_> =
                batch.iter_mut().map(|(cache, token)| Ok((cache.gpu()?, *token))).collect::<Result<_>>()?;
            return Ok(self.tensor(model.step(&mut batch)?, self.config.vocabulary));
        }
        let mut batch: Vec<_> = batch
            .iter_mut()
            .map(|(cache, token)| Sequence { cache, tokens: std::slice::from_ref(token) })
            .collect();
        let x = self.forward(&mut batch, None)?;
        self.unembed(x)
    }

    /// Feeds each sequence its token and draws the next, which `each` gets, up to `most` times or until `each` breaks; then the last
    /// tokens drawn are those of `streams` and not in the caches. The fastest way to generate: on a GPU the tokens are drawn where
    /// the logits are, and the host reads nothing else.
    ///
    /// # Errors
    /// As [`Model::step`], and [`Error::Sampling`] where no token can be drawn for one of them. No sampler has accepted one then; except
    /// on GPUs the caches have the tokens that were fed.
    pub fn decode(
        &self,
        streams: &mut [Stream<'_>],
        most: usize,
        each: &mut dyn FnMut(Vec<Sampled>) -> ControlFlow<()>,
    ) -> Result<()> {
        if let Runtime::Gpu(model) = &self.runtime
            && streams.iter().all(|stream| gpu::draws(stream.sampler.options()))
        {
            let mut of_gpu: Vec<_> = streams
                .iter_mut()
                .map(|Stream { cache, token, sampler }| {
                    Ok(gpu::Stream { cache: cache.gpu()?, token: *token, sampler })
                })
                .collect::<Result<_>>()?;
            let decoded = model.decode(&mut of_gpu, most, each);
            let tokens: Vec<u32> = of_gpu.iter().map(|stream| stream.token).collect();
            streams.iter_mut().zip(tokens).for_each(|(stream, token)| stream.token = token);
            return decoded;
        }
        for _ in 0..most {
            let mut batch: Vec<_> =
                streams.iter_mut().map(|stream| (&mut *stream.cache, stream.token)).collect();
            let logits = self.step(&mut batch)?;
            let mut samplers: Vec<_> = streams.iter_mut().map(|stream| &mut *stream.sampler).collect();
            let drawn = self.draw(&mut samplers, logits)?;
            streams.iter_mut().zip(&drawn).for_each(|(stream, sampled)| stream.token = sampled.token);
            if each(drawn).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Measures each kind of kernel of the step that [`Model::decode`] would begin with; nothing where there are no kernels to
    /// be told apart.
    ///
    /// # Errors
    /// As [`Model::step`].
    pub fn profile(&self, streams: &mut [Stream<'_>]) -> Result<Vec<gpu::Share>> {
        let Runtime::Gpu(model) = &self.runtime else { return Ok(Vec::new()) };
        let mut batch: Vec<_> = streams
            .iter_mut()
            .map(|stream| Ok((stream.cache.gpu()?, stream.token)))
            .collect::<Result<_>>()?;
        model.profile(&mut batch)
    }

    /// Draws a token of each row of logits, f32 `[sequences, vocabulary]`, where that is fastest.
    pub(super) fn draw(&self, samplers: &mut [&mut Sampler], logits: Tensor<2>) -> Result<Vec<Sampled>> {
        if self.device.backend() != Backend::Cpu && matches!(self.runtime, Runtime::Plain(_)) {
            let drawn = sample_batch(samplers, logits)?;
            if drawn.iter().any(Result::is_err) {
                for (sampler, _) in samplers.iter_mut().zip(&drawn).filter(|(_, drawn)| drawn.is_ok()) {
                    sampler.truncate(sampler.len() - 1);
                }
            }
            return Ok(drawn.into_iter().collect::<Result<_, _>>()?);
        }
        let logits = read(logits)?;
        let rows = logits.chunks(self.config.vocabulary);
        let draw = |(sampler, row): (&&mut Sampler, _)| sampler.sample_at(row, sampler.next_uniform());
        let drawn: Vec<Sampled> = samplers.iter().zip(rows).map(draw).collect::<Result<_, _>>()?;
        samplers.iter_mut().zip(&drawn).for_each(|(sampler, sampled)| sampler.accept(sampled.token));
        Ok(drawn)
    }

    /// Tokens that a prefill processes at a time.
    fn chunk(&self) -> usize {
        match self.runtime {
            Runtime::Plain(_) => 512,
            Runtime::Native(_) => native::PREFILL,
            Runtime::Gpu(_) => gpu::CHUNK,
        }
    }

    /// Adds tokens to a sequence, in chunks, and returns the logits that follow the last one: f32 `[vocabulary]`.
    ///
    /// # Errors
    /// As [`Model::forward`]; nothing has changed then.
    pub fn prefill(&self, cache: &mut Cache, tokens: &[u32]) -> Result<Tensor<1>> {
        let logits = self.prefill_while(cache, tokens, &mut |_| Ok(ControlFlow::Continue(())))?;
        // `next` has refused an empty sequence.
        logits.ok_or(Error::Length { length: 0, context: self.context() })
    }

    /// [`Model::prefill`] that asks before each chunk, with the tokens in the cache, whether to go on; where not, there
    /// are no logits.
    pub(super) fn prefill_while(
        &self,
        cache: &mut Cache,
        tokens: &[u32],
        goes_on: &mut dyn FnMut(usize) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Tensor<1>>> {
        self.config.check_tokens(tokens)?;
        cache.next(tokens.len())?;
        let mut left = tokens.len();
        let mut logits = None;
        for chunk in tokens.chunks(self.chunk()) {
            if goes_on(cache.len())?.is_break() {
                return Ok(None);
            }
            left -= chunk.len();
            logits = self.add(cache, chunk, left == 0)?;
        }
        Ok(logits)
    }

    /// Adds a chunk; f32 `[vocabulary]`, the logits that follow it, where they are wanted.
    fn add(&self, cache: &mut Cache, tokens: &[u32], wants_logits: bool) -> Result<Option<Tensor<1>>> {
        let Runtime::Gpu(model) = &self.runtime else {
            let x = self.forward(&mut [Sequence { cache, tokens }], None)?;
            let last = wants_logits.then(|| self.unembed(x.narrow(0, tokens.len() - 1, 1)));
            return Ok(last.transpose()?.map(|row| row.squeeze_dim(0)));
        };
        let cache = cache.gpu()?;
        let logits = match tokens {
            _ if !wants_logits => {
                model.fill(cache, tokens)?;
                return Ok(None);
            }
            &[token] => model.step(&mut [(cache, token)])?,
            _ => model.prefill(cache, tokens)?,
        };
        Ok(Some(self.tensor(logits, self.config.vocabulary).squeeze_dim(0)))
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
        self.config.check_tokens(tokens)?;
        let mut cache = self.new_cache();
        cache.next(tokens.len())?;
        // Rows of 200,000 logits: 32 of them are 26 MB.
        for chunk in tokens.chunks(32) {
            let start = cache.len();
            let x = self.forward(&mut [Sequence { cache: &mut cache, tokens: chunk }], None)?;
            each(start..start + chunk.len(), read(self.unembed(x)?)?)?;
        }
        Ok(())
    }
}

/// The values of a tensor in row-major order.
///
/// # Errors
/// [`Error::Device`] where the device failed at some point before.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    values_of_tensor(as_type(tensor, Float::F32))
}
