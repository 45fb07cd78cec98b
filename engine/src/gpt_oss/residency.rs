//! What will reside where, before anything is loaded.

use std::fmt;

use formats::container::Container;
use formats::model_bin::Stored;
use formats::model_bin::tensors::{TensorId, TensorKind};

use super::config::Config;
use super::load::{LoadOptions, PlainTypes, Types};
use crate::backend::{Backend, Device, Float};
use crate::error::{Bytes, Error, Result};
use crate::gpu;

/// The memory that a model will take on a device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Residency {
    /// Where it will reside.
    pub device: String,
    /// What will reside there, weights first.
    pub parts: Vec<Part>,
    /// Tokens that the caches are counted for.
    pub context: usize,
    /// Bytes of the caches of a sequence that begins.
    pub first_cache: u64,
    /// Bytes of each snapshot of a sequence.
    pub snapshot: u64,
    /// Bytes in use while a layer is loaded, in host memory.
    pub staging: u64,
    /// Bytes that there are, where known: what the host has available, or all of a GPU's memory.
    pub available: Option<u64>,
    /// Tokens that there is room for, where that is known and less than `context`.
    pub tokens: Option<usize>,
    /// Whether the device is the host, so that `staging` is taken from the same memory.
    pub is_host: bool,
    /// What needs the largest buffers, and their bytes. (Plain tensors cut embeddings that exceed the device's limit.)
    pub largest_buffers: [(&'static str, u64); 2],
    /// Bytes of the largest buffer that the device can have, where there is a limit.
    pub max_buffer: Option<u64>,
}

/// One line of the plan.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// The type in which it resides.
    pub stored_as: String,
    /// Bytes.
    pub bytes: u64,
}

impl Residency {
    /// Plans the loading of a model. Nothing is read but its header.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that the engine cannot run or options that the device does not support.
    pub fn plan(stored: &Stored, options: &LoadOptions, device: &Device) -> Result<Residency> {
        let config = Config::new(stored.header(), stored.dims())?;
        let types = options.resolve(&config, device)?;
        let dims = stored.dims();
        let elements = |share: Share| -> u64 {
            let ids = dims.tensors().filter(|id: &TensorId| Share::of(id.kind) == share);
            ids.map(|id| id.kind.shape(dims).elements()).sum()
        };
        let packed = elements(Share::Experts);
        let weight = |name, float: Float, count: u64| Part {
            name,
            stored_as: float.to_string(),
            bytes: count * float.size(),
        };
        // The processor's own runtime leaves matrices where they are.
        let as_stored = |part: Part| match stored.container() {
            Container::ModelBin => {
                Part { stored_as: format!("{}, as the file is mapped", part.stored_as), ..part }
            }
            Container::Checkpoint | Container::Gguf => part,
        };
        let packed_experts = Part { name: "experts", stored_as: "MXFP4, packed".into(), bytes: packed };
        let (matrices, experts) = match types {
            Types::Native { .. } => (None, as_stored(packed_experts)),
            Types::Gpu { .. } => (Some(Float::Bf16), packed_experts),
            Types::Plain(types) => match types.experts {
                None => (Some(types.weights), packed_experts),
                // A block of 32 values is 17 packed bytes.
                Some(float) => (Some(types.weights), weight("experts", float, packed / 17 * 32)),
            },
        };
        let matrix = |name, share| match matrices {
            None => as_stored(weight(name, Float::Bf16, elements(share))),
            Some(float) => weight(name, float, elements(share)),
        };
        let (cache, context) = (types.cache_layout(&config), types.context());
        let mut parts = vec![
            matrix("embedding and unembedding", Share::Table),
            matrix("attention and routers", Share::Matrix),
            weight("norms, biases, sinks", Float::F32, elements(Share::Vector)),
            experts,
        ];
        if let Types::Gpu { context } = types {
            let bytes = gpu::working_bytes(&config, context);
            parts.push(Part { name: "activations", stored_as: "f32 and halves".into(), bytes });
        }
        parts.push(Part {
            name: "caches of one full sequence",
            stored_as: cache.float().to_string(),
            bytes: cache.bytes(context),
        });
        // The gate and up projections of all experts, without their scales; dequantised ones have a buffer each.
        let gate_up = 2 * config.mlp_dim as u64 * config.embedding_dim as u64;
        let largest_expert_tensor = match types {
            Types::Plain(PlainTypes { experts: Some(float), .. }) => gate_up * float.size(),
            _ => config.num_experts as u64 * gate_up / 2,
        };
        let layer_experts = if config.num_blocks == 0 { 0 } else { packed / config.num_blocks as u64 };
        let table = config.vocabulary as u64 * config.embedding_dim as u64;
        let staging = matrices.map_or(0, |float| layer_experts.max(table * float.size()));
        let experts = ("the experts of a block", largest_expert_tensor);
        let unembedding = ("the unembedding", table * Float::Bf16.size());
        let largest_tensor = match types {
            Types::Gpu { .. } if unembedding.1 > experts.1 => unembedding,
            // Plain tensors cut tables.
            Types::Gpu { .. } | Types::Native { .. } | Types::Plain(_) => experts,
        };
        let mut residency = Residency {
            device: format!("{} ({})", device.name(), device.backend()),
            parts,
            context,
            first_cache: cache.bytes(context.min(256)),
            snapshot: cache.snapshot_bytes(),
            staging,
            available: options.memory.or(device.memory()),
            largest_buffers: [
                largest_tensor,
                ("the keys of a full sequence in a block", cache.largest_buffer(context)),
            ],
            max_buffer: device.max_buffer(),
            tokens: None,
            is_host: device.backend() == Backend::Cpu,
        };
        residency.tokens = residency.available.and_then(|available| {
            let room = available.saturating_sub(residency.weights());
            (cache.bytes(context) > room).then(|| cache.longest(context, room))
        });
        Ok(residency)
    }

    /// Bytes of the weights and of what else always resides there.
    pub fn weights(&self) -> u64 {
        self.parts[..self.parts.len() - 1].iter().map(|part| part.bytes).sum()
    }

    /// Bytes that must be there to begin with: weights and a short sequence, and what loading takes. Long sequences take
    /// more as they grow.
    pub fn needed(&self) -> u64 {
        self.weights() + self.first_cache + if self.is_host { self.staging } else { 0 }
    }

    /// Refuses what cannot fit.
    ///
    /// # Errors
    /// [`Error::Memory`] with the numbers.
    pub fn check(&self) -> Result<()> {
        let limit = self.max_buffer.unwrap_or(u64::MAX);
        if let Some((name, bytes)) = self.largest_buffers.iter().find(|(_, bytes)| *bytes > limit) {
            return Err(Error::Memory {
                what: format!("{name} in one buffer of {}", self.device),
                needed: *bytes,
                available: limit,
                advice: "the device limits the size of a buffer; use a smaller --context if it is the keys, or \
                         another --backend",
            });
        }
        match self.available {
            Some(available) if available < self.needed() => Err(Error::Memory {
                what: format!("the model on {}", self.device),
                needed: self.needed(),
                available,
                advice: "keep the experts packed (no --dequantize), use --weights bf16 or f16 where the device has \
                         it, or another --backend; --memory overrides what was found",
            }),
            _ => Ok(()),
        }
    }
}

/// What resides in the same way.
#[derive(Clone, Copy, PartialEq)]
enum Share {
    Table,
    Matrix,
    /// Blocks and scales.
    Experts,
    /// Always f32.
    Vector,
}

impl Share {
    fn of(kind: TensorKind) -> Share {
        match kind {
            TensorKind::Embedding | TensorKind::Unembedding => Share::Table,
            TensorKind::QkvWeight | TensorKind::OutWeight | TensorKind::GateWeight => Share::Matrix,
            TensorKind::Mlp1Blocks
            | TensorKind::Mlp1Scales
            | TensorKind::Mlp2Blocks
            | TensorKind::Mlp2Scales => Share::Experts,
            _ => Share::Vector,
        }
    }
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "on {}:", self.device)?;
        for part in &self.parts {
            writeln!(f, "  {:>12}  {} ({})", Bytes(part.bytes).to_string(), part.name, part.stored_as)?;
        }
        let total = self.weights() + self.parts.last().map_or(0, |part| part.bytes);
        let limit = match self.tokens {
            Some(tokens) => format!("; a sequence of more than about {tokens} tokens will not fit"),
            None => String::new(),
        };
        let available = match self.available {
            Some(bytes) if self.is_host => format!("{:>12}  available{limit}", Bytes(bytes).to_string()),
            Some(bytes) => {
                format!("{:>12}  on the device, what others use included{limit}", Bytes(bytes).to_string())
            }
            None => format!("{:>12}  available: the driver does not say", "?"),
        };
        writeln!(
            f,
            "  {:>12}  with {} tokens; {} at first, {} for each turn's snapshot, {} of the host's while loading",
            Bytes(total).to_string(),
            self.context,
            Bytes(self.needed()),
            Bytes(self.snapshot),
            Bytes(self.staging),
        )?;
        writeln!(f, "  {available}")
    }
}
