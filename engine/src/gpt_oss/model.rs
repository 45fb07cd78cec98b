//! A model, whoever computes it.
//!
//! | runtime | where | what it computes with |
//! |---|---|---|
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
use crate::backend::{Device, Float};
use crate::error::{Error, Result};
use crate::native;
use crate::nn::linear::as_type;

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
}

/// New tokens of one sequence and the cache of those before.
pub struct Sequence<'a> {
    /// Keys and values of the tokens so far; holds those of `tokens` afterwards.
    pub cache: &'a mut Cache,
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
        }
    }

    /// f32 rows as a tensor `[rows, embedding_dim]`.
    fn rows(&self, values: Vec<f32>) -> Tensor<2> {
        let width = self.config.embedding_dim;
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), self.device.burn())
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
            Runtime::Native(model) => {
                let [rows, _] = x.dims();
                let logits = model.unembed(&read(x)?)?;
                let shape = [rows, self.config.vocabulary];
                Ok(Tensor::from_data(TensorData::new(logits, shape), self.device.burn()))
            }
        }
    }

    /// Tokens that a prefill processes at a time.
    fn chunk(&self) -> usize {
        match self.runtime {
            Runtime::Plain(_) => 512,
            Runtime::Native(_) => native::PREFILL,
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
        let mut last = None;
        for chunk in tokens.chunks(self.chunk()) {
            if goes_on(cache.len())?.is_break() {
                return Ok(None);
            }
            let x = self.forward(&mut [Sequence { cache: &mut *cache, tokens: chunk }], None)?;
            last = Some(x.narrow(0, chunk.len() - 1, 1));
        }
        last.map(|row| Ok(self.unembed(row)?.squeeze_dim(0))).transpose()
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
    let data = as_type(tensor, Float::F32).try_into_data();
    let data = data.map_err(|error| Error::Device(format!("{error:?}")))?;
    data.try_into_vec().map_err(|error| Error::Device(format!("{error:?}")))
}
