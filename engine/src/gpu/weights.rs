//! The weights of a model in buffers of a device, as the file stores them: bf16 matrices and MXFP4 experts. Vectors become f32.

use cubecl::client::Client;
use cubecl::server::Handle;
use formats::model_bin::Stored;
use formats::model_bin::layout::PieceId;
use formats::model_bin::tensors::{TensorId, TensorKind};
use formats::progress::Progress;

use crate::error::Result;
use crate::gpt_oss::config::Config;

/// The buffers of a model.
pub(super) struct Weights {
    /// bf16 `[vocabulary, embedding_dim]`.
    pub embedding: Handle,
    pub blocks: Vec<Block>,
    /// f32 `[embedding_dim]`.
    pub norm: Handle,
    /// bf16 `[vocabulary, embedding_dim]`.
    pub unembedding: Handle,
}

/// The buffers of a block.
pub(super) struct Block {
    pub attn_norm: Handle,
    pub qkv: Handle,
    pub qkv_bias: Handle,
    pub sinks: Handle,
    pub out: Handle,
    pub out_bias: Handle,
    pub mlp_norm: Handle,
    pub gate: Handle,
    pub gate_bias: Handle,
    pub mlp1: Packed,
    pub mlp1_bias: Handle,
    pub mlp2: Packed,
    pub mlp2_bias: Handle,
}

/// MXFP4 matrices of all experts.
pub(super) struct Packed {
    pub codes: Handle,
    pub scales: Handle,
}

impl Weights {
    /// Uploads a model.
    pub fn upload(
        client: &Client,
        stored: &Stored,
        config: &Config,
        progress: &dyn Progress,
    ) -> Result<Weights> {
        let tensors = stored.layout().weights.tensors();
        progress.begin("loading", tensors.map(|tensor| tensor.range.end - tensor.range.start).sum());
        let loader = Loader { client, stored, config, progress };
        let outside = |kind| TensorId { kind, block: 0 };
        Ok(Weights {
            embedding: loader.bytes(outside(TensorKind::Embedding))?,
            blocks: (0..config.num_blocks as u32).map(|block| loader.block(block)).collect::<Result<_>>()?,
            norm: loader.vector(outside(TensorKind::Norm))?,
            unembedding: loader.bytes(outside(TensorKind::Unembedding))?,
        })
    }
}

struct Loader<'a> {
    client: &'a Client,
    stored: &'a Stored,
    config: &'a Config,
    progress: &'a dyn Progress,
}

impl Loader<'_> {
    fn block(&self, block: u32) -> Result<Block> {
        let id = |kind| TensorId { kind, block };
        Ok(Block {
            attn_norm: self.vector(id(TensorKind::AttnNorm))?,
            qkv: self.bytes(id(TensorKind::QkvWeight))?,
            qkv_bias: self.vector(id(TensorKind::QkvBias))?,
            sinks: self.vector(id(TensorKind::Sinks))?,
            out: self.bytes(id(TensorKind::OutWeight))?,
            out_bias: self.vector(id(TensorKind::OutBias))?,
            mlp_norm: self.vector(id(TensorKind::MlpNorm))?,
            gate: self.bytes(id(TensorKind::GateWeight))?,
            gate_bias: self.vector(id(TensorKind::GateBias))?,
            mlp1: self.packed(id(TensorKind::Mlp1Blocks), id(TensorKind::Mlp1Scales))?,
            mlp1_bias: self.vector(id(TensorKind::Mlp1Bias))?,
            mlp2: self.packed(id(TensorKind::Mlp2Blocks), id(TensorKind::Mlp2Scales))?,
            mlp2_bias: self.vector(id(TensorKind::Mlp2Bias))?,
        })
    }

    fn packed(&self, codes: TensorId, scales: TensorId) -> Result<Packed> {
        Ok(Packed { codes: self.bytes(codes)?, scales: self.bytes(scales)? })
    }

    /// A tensor as it is stored, its experts one after the other.
    fn bytes(&self, tensor: TensorId) -> Result<Handle> {
        let bytes = self.pieces(tensor)?;
        Ok(self.client.memory_persistent_allocation((), |()| self.client.create_from_slice(&bytes)))
    }

    /// A bf16 tensor as f32.
    fn vector(&self, tensor: TensorId) -> Result<Handle> {
        let bytes = self.pieces(tensor)?;
        let pairs = bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = pairs.map(|&pair| half::bf16::from_le_bytes(pair).to_f32()).collect();
        let values = bytemuck::cast_slice(&values);
        Ok(self.client.memory_persistent_allocation((), |()| self.client.create_from_slice(values)))
    }

    fn pieces(&self, tensor: TensorId) -> Result<std::borrow::Cow<'_, [u8]>> {
        let experts = if tensor.kind.is_expert() { self.config.num_experts as u32 } else { 1 };
        let piece = |expert| -> Result<_> {
            let bytes = self.stored.piece(PieceId { tensor, expert })?;
            self.progress.advance(bytes.len() as u64);
            Ok(bytes)
        };
        if experts == 1 {
            return piece(0);
        }
        let mut all = Vec::new();
        for expert in 0..experts {
            all.extend_from_slice(&piece(expert)?);
        }
        Ok(all.into())
    }
}
