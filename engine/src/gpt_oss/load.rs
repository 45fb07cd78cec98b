//! Brings a stored model to a device, piece by piece.

use formats::model_bin::Stored;
use formats::model_bin::layout::PieceId;
use formats::model_bin::tensors::{TensorId, TensorKind};
use formats::progress::Progress;

use burn::tensor::{DType, Tensor, TensorData};

use super::cache::CacheLayout;
use super::config::Config;
use super::plain::{Block, Model};
use crate::backend::{Backend, Device, Float};
use crate::error::{Error, Result};
use crate::nn::embedding::TokenTable;
use crate::nn::linear::{Linear, as_type};
use crate::nn::moe::{ExpertLinear, Moe, Router};
use crate::nn::mxfp4::Mxfp4Linear;
use crate::nn::norm::RmsNorm;
use crate::nn::rope::Frequencies;
use crate::{gpu, native, nn};

/// How a model resides and computes. `None` leaves the choice to the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOptions {
    /// Whether plain tensor operations compute it, the reference, also where there is a faster runtime. So they do where
    /// `activations`, `weights`, `dequantize` or, on a GPU, a `cache` of another type than f16 ask for it.
    pub plain_tensors: bool,
    /// The type of the factors of products of plain tensors (default: bf16 on CUDA, f32 elsewhere). Sums, norms, softmax
    /// and the residual stream are f32 always.
    pub activations: Option<Float>,
    /// The type of matrices that are not MXFP4, as plain tensors (default: that of `activations`). Types above bf16 hold
    /// the same values.
    pub weights: Option<Float>,
    /// The type of keys and values (default: f16; f32 as plain tensors on the processor).
    pub cache: Option<Float>,
    /// Whether experts are decoded to the type of `weights` while loading, the baseline that packed ones are measured
    /// against.
    pub dequantize: bool,
    /// The largest number of tokens of a sequence (default: the model's).
    pub context: Option<usize>,
    /// Bytes that may be used, in place of what the device says.
    pub memory: Option<u64>,
}

/// [`LoadOptions`] with every choice made.
#[derive(Clone, Copy, Debug)]
pub(super) enum Types {
    /// The processor's own runtime, from weights as they are stored.
    Native {
        cache: Float,
        context: usize,
    },
    /// The runtime of GPUs: the same weights, f16 caches.
    Gpu {
        context: usize,
    },
    Plain(PlainTypes),
}

/// The types of plain tensors.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlainTypes {
    pub(super) activations: Float,
    pub(super) weights: Float,
    cache: Float,
    /// `None`: packed.
    pub(super) experts: Option<Float>,
    context: usize,
}

impl LoadOptions {
    pub(super) fn resolve(&self, config: &Config, device: &Device) -> Result<Types> {
        let context = self.context.unwrap_or(config.context_length);
        if context == 0 || context > config.context_length {
            return Err(Error::Model {
                field: "--context",
                found: context.to_string(),
                needed: format!("1 to {}, the model's context length", config.context_length),
            });
        }
        let plain =
            self.plain_tensors || self.activations.is_some() || self.weights.is_some() || self.dequantize;
        let cache = self.cache.unwrap_or(Float::F16);
        if device.backend() == Backend::Cpu && !plain {
            return Ok(Types::Native { cache, context });
        }
        if !plain && cache == Float::F16 && gpu::runs(config, device) {
            return Ok(Types::Gpu { context });
        }
        let on_cuda = device.backend() == Backend::Cuda;
        let activations = self.activations.unwrap_or(if on_cuda { Float::Bf16 } else { Float::F32 });
        let weights = self.weights.unwrap_or(activations);
        let half_cache = device.backend() != Backend::Cpu && device.supports(Float::F16);
        let cache = self.cache.unwrap_or(if half_cache { Float::F16 } else { Float::F32 });
        for (field, float) in [("--activations", activations), ("--weights", weights), ("--cache", cache)] {
            if !device.supports(float) {
                return Err(Error::Model {
                    field,
                    found: float.to_string(),
                    needed: format!("a type that {} has; f32 always works", device.name()),
                });
            }
        }
        let experts = self.dequantize.then_some(weights);
        Ok(Types::Plain(PlainTypes { activations, weights, cache, experts, context }))
    }
}

impl Types {
    /// The largest number of tokens of a sequence.
    pub(super) fn context(&self) -> usize {
        match self {
            Types::Native { context, .. } | Types::Gpu { context } => *context,
            Types::Plain(types) => types.context,
        }
    }

    pub(super) fn cache_layout(&self, config: &Config) -> CacheLayout {
        match *self {
            Types::Native { cache, context } => {
                CacheLayout::Native(native::CacheLayout::of(config, cache, context))
            }
            Types::Gpu { .. } => CacheLayout::Gpu(gpu::CacheLayout::of(config)),
            Types::Plain(types) => CacheLayout::Plain(types.cache_layout(config)),
        }
    }
}

impl PlainTypes {
    fn cache_layout(&self, config: &Config) -> nn::cache::CacheLayout {
        let window = |block| config.window(block).map(|window| window.min(self.context));
        nn::cache::CacheLayout {
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            float: self.cache,
            context: self.context,
            windows: (0..config.num_blocks).map(window).collect(),
        }
    }
}

impl Model {
    /// Brings a model to a device.
    pub(super) fn load(
        stored: &Stored,
        config: &Config,
        types: PlainTypes,
        device: &Device,
        progress: &dyn Progress,
    ) -> Result<Model> {
        let weights = &stored.layout().weights;
        progress
            .begin("loading", weights.tensors().map(|tensor| tensor.range.end - tensor.range.start).sum());
        let loader = Loader { stored, device, types, config, progress };
        let embedding = loader.table(TensorKind::Embedding)?;
        let blocks = (0..config.num_blocks).map(|block| loader.block(block)).collect::<Result<_>>()?;
        let norm = loader.norm(TensorId { kind: TensorKind::Norm, block: 0 })?;
        let unembedding = loader.table(TensorKind::Unembedding)?;
        device.sync()?;
        Ok(Model {
            rope: Frequencies::yarn(&config.yarn(), config.head_dim),
            cache_layout: types.cache_layout(config).into(),
            device: device.clone(),
            config: config.clone(),
            embedding,
            blocks,
            norm,
            unembedding,
        })
    }
}

struct Loader<'a> {
    stored: &'a Stored,
    device: &'a Device,
    types: PlainTypes,
    config: &'a Config,
    progress: &'a dyn Progress,
}

impl Loader<'_> {
    fn block(&self, block: usize) -> Result<Block> {
        let id = |kind| TensorId { kind, block: block as u32 };
        let config = self.config;
        Ok(Block {
            window: config.window(block),
            attn_norm: self.norm(id(TensorKind::AttnNorm))?,
            qkv: self.linear(id(TensorKind::QkvWeight), id(TensorKind::QkvBias))?,
            sinks: self.vector(id(TensorKind::Sinks))?,
            out: self.linear(id(TensorKind::OutWeight), id(TensorKind::OutBias))?,
            mlp_norm: self.norm(id(TensorKind::MlpNorm))?,
            moe: Moe {
                router: Router {
                    // The choice of experts is a step function of the logits: f32 keeps it that of the reference.
                    gate: Linear {
                        compute: Float::F32,
                        ..self.linear(id(TensorKind::GateWeight), id(TensorKind::GateBias))?
                    },
                    active: config.num_active_experts,
                },
                mlp1: self.experts(
                    [id(TensorKind::Mlp1Blocks), id(TensorKind::Mlp1Scales)],
                    [config.num_experts, 2 * config.mlp_dim, config.embedding_dim],
                )?,
                mlp1_bias: self.expert_bias(id(TensorKind::Mlp1Bias))?,
                mlp2: self.experts(
                    [id(TensorKind::Mlp2Blocks), id(TensorKind::Mlp2Scales)],
                    [config.num_experts, config.embedding_dim, config.mlp_dim],
                )?,
                mlp2_bias: self.expert_bias(id(TensorKind::Mlp2Bias))?,
                swiglu_limit: config.swiglu_limit,
                compute: self.types.activations,
            },
        })
    }

    fn norm(&self, id: TensorId) -> Result<RmsNorm> {
        Ok(RmsNorm { scale: self.vector(id)?, epsilon: self.config.rmsnorm_epsilon })
    }

    fn linear(&self, weight: TensorId, bias: TensorId) -> Result<Linear> {
        let [rows, columns] = self.matrix_shape(weight);
        let bytes = self.piece(weight, 0)?;
        Ok(Linear {
            weight: self.upload([rows, columns], &bytes, self.types.weights),
            bias: Some(self.vector(bias)?),
            compute: self.types.activations,
        })
    }

    fn vector(&self, id: TensorId) -> Result<Tensor<1>> {
        let bytes = self.piece(id, 0)?;
        Ok(self.upload([bytes.len() / 2], &bytes, Float::F32))
    }

    /// Embedding or unembedding, in parts that the device can hold in one buffer each.
    fn table(&self, kind: TensorKind) -> Result<TokenTable> {
        let id = TensorId { kind, block: 0 };
        let [rows, columns] = self.matrix_shape(id);
        let bytes = self.piece(id, 0)?;
        // Products convert a part to the type of the activations as a whole.
        let row_bytes = columns as u64 * self.types.weights.size().max(self.types.activations.size());
        let limit = self.device.max_buffer().unwrap_or(u64::MAX);
        let rows_of_part = ((limit / row_bytes).max(1) as usize).min(rows);
        let parts = bytes
            .chunks(rows_of_part * columns * 2)
            .map(|part| self.upload([part.len() / (2 * columns), columns], part, self.types.weights));
        Ok(TokenTable { parts: parts.collect(), compute: self.types.activations })
    }

    fn experts(&self, [blocks, scales]: [TensorId; 2], dims: [usize; 3]) -> Result<ExpertLinear> {
        let [experts, rows, columns] = dims;
        let packed = Mxfp4Linear::from_stored(
            self.pieces(blocks, rows * columns / 2)?,
            self.pieces(scales, rows * columns / 32)?,
            dims,
            self.device.burn(),
        )
        .map_err(|error| Error::Model {
            field: "experts",
            found: error.to_string(),
            needed: "sizes of the header".into(),
        })?;
        let Some(float) = self.types.experts else {
            return Ok(ExpertLinear::Packed(packed.into()));
        };
        let decoded = (0..experts).map(|expert| {
            let matrix = packed.expert(expert).decoded().reshape([rows, columns]);
            as_type(matrix, float)
        });
        Ok(ExpertLinear::Dequantized(decoded.collect()))
    }

    fn expert_bias(&self, id: TensorId) -> Result<Tensor<2>> {
        let rows = id.kind.piece_shape(self.stored.dims()).elements() as usize;
        let bytes = self.pieces(id, 2 * rows)?;
        Ok(self.upload([self.config.num_experts, rows], &bytes, Float::F32))
    }

    /// The pieces of all experts, one after the other.
    fn pieces(&self, id: TensorId, piece_bytes: usize) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(piece_bytes * self.config.num_experts);
        for expert in 0..self.config.num_experts {
            all.extend_from_slice(&self.piece(id, expert as u32)?);
        }
        Ok(all)
    }

    fn piece(&self, tensor: TensorId, expert: u32) -> Result<std::borrow::Cow<'_, [u8]>> {
        let bytes = self.stored.piece(PieceId { tensor, expert })?;
        self.progress.advance(bytes.len() as u64);
        Ok(bytes)
    }

    fn matrix_shape(&self, id: TensorId) -> [usize; 2] {
        let shape = id.kind.shape(self.stored.dims());
        let rows = shape.first().copied().unwrap_or(0) as usize;
        [rows, shape.elements() as usize / rows.max(1)]
    }

    /// BF16 bytes as a tensor of `float`. bf16 goes as it is; other types are converted on the way, exactly for f32.
    fn upload<const D: usize>(&self, shape: [usize; D], bytes: &[u8], float: Float) -> Tensor<D> {
        let pairs = bytes.as_chunks::<2>().0.iter();
        let data = match float {
            Float::Bf16 => TensorData::from_bytes_vec(bytes.to_vec(), shape.to_vec(), DType::BF16),
            Float::F32 => {
                let values = pairs.map(|&pair| half::bf16::from_le_bytes(pair).to_f32());
                TensorData::new(values.collect::<Vec<f32>>(), shape)
            }
            Float::F16 => {
                let values = pairs.map(|&pair| half::f16::from_f32(half::bf16::from_le_bytes(pair).to_f32()));
                TensorData::new(values.collect::<Vec<half::f16>>(), shape)
            }
        };
        Tensor::from_data(data, (self.device.burn(), DType::from(float)))
    }
}
