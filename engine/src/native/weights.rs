//! The weights of a stored model, where they lie.

use std::borrow::Cow;
use std::sync::Arc;

use formats::model_bin::Stored;
use formats::model_bin::tensors::{PieceId, TensorId, TensorKind};

use super::dense::Bf16Matrix;
use super::mxfp4::PackedMatrix;
use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;

/// A piece of a stored model.
enum Piece {
    /// In the mapped file, from where it is borrowed whenever it is used.
    Mapped(PieceId),
    /// Read from a container that cannot be mapped.
    Read(Vec<u8>),
}

/// A bf16 matrix.
pub struct Dense {
    bytes: Piece,
    columns: usize,
}

/// An MXFP4 matrix.
pub struct Packed {
    codes: Piece,
    scales: Piece,
    columns: usize,
}

/// The two layers of an expert.
pub struct Expert {
    /// Gate (even rows) and up (odd rows): `[2·mlp_dim, embedding_dim]`.
    pub mlp1: Packed,
    /// `[2·mlp_dim]`.
    pub mlp1_bias: Vec<f32>,
    /// Down: `[embedding_dim, mlp_dim]`.
    pub mlp2: Packed,
    /// `[embedding_dim]`.
    pub mlp2_bias: Vec<f32>,
}

/// One transformer block.
pub struct Block {
    /// Scale of the norm before attention.
    pub attn_norm: Vec<f32>,
    /// `[(heads + 2·kv_heads)·head_dim, embedding_dim]`.
    pub qkv: Dense,
    /// One for each of its rows.
    pub qkv_bias: Vec<f32>,
    /// Sink logits of the query heads.
    pub sinks: Vec<f32>,
    /// `[embedding_dim, heads·head_dim]`.
    pub out: Dense,
    /// One for each of its rows.
    pub out_bias: Vec<f32>,
    /// Scale of the norm before the experts.
    pub mlp_norm: Vec<f32>,
    /// The router, `[experts, embedding_dim]`.
    pub gate: Dense,
    /// One for each expert.
    pub gate_bias: Vec<f32>,
    /// The experts.
    pub experts: Vec<Expert>,
}

/// All weights: matrices where they are stored, vectors as f32.
pub struct Weights {
    stored: Arc<Stored>,
    /// `[vocabulary, embedding_dim]`.
    pub embedding: Dense,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Scale of the last norm.
    pub norm: Vec<f32>,
    /// `[vocabulary, embedding_dim]`.
    pub unembedding: Dense,
}

impl Weights {
    /// The weights of a model with this configuration.
    ///
    /// # Errors
    /// [`Error::Format`] where a piece cannot be read, [`Error::Model`] where one has not the size that the configuration
    /// implies.
    pub fn new(stored: Arc<Stored>, config: &Config) -> Result<Weights> {
        let reader = Reader { stored: &stored, config };
        let single = |kind| TensorId { kind, block: 0 };
        let (embedding_dim, vocabulary) = (config.embedding_dim, config.vocabulary);
        let table = |kind| reader.dense(single(kind), vocabulary, embedding_dim);
        let [embedding, unembedding] = [table(TensorKind::Embedding)?, table(TensorKind::Unembedding)?];
        let blocks = (0..config.num_blocks).map(|block| reader.block(block as u32)).collect::<Result<_>>()?;
        let norm = reader.vector(single(TensorKind::Norm), 0, embedding_dim)?;
        Ok(Weights { embedding, blocks, norm, unembedding, stored })
    }

    /// Borrows a matrix.
    ///
    /// # Errors
    /// [`Error::Format`], which a piece that could be borrowed before does not give.
    pub fn dense<'a>(&'a self, matrix: &'a Dense) -> Result<Bf16Matrix<'a>> {
        Ok(Bf16Matrix { bytes: self.bytes(&matrix.bytes)?, columns: matrix.columns })
    }

    /// Borrows a matrix.
    ///
    /// # Errors
    /// As [`Weights::dense`].
    pub fn packed<'a>(&'a self, matrix: &'a Packed) -> Result<PackedMatrix<'a>> {
        let [codes, scales] = [self.bytes(&matrix.codes)?, self.bytes(&matrix.scales)?];
        Ok(PackedMatrix { codes, scales, columns: matrix.columns })
    }

    fn bytes<'a>(&'a self, piece: &'a Piece) -> Result<&'a [u8]> {
        match piece {
            Piece::Read(bytes) => Ok(bytes),
            Piece::Mapped(id) => match self.stored.piece(*id)? {
                Cow::Borrowed(bytes) => Ok(bytes),
                Cow::Owned(_) => Err(Error::Device(format!("{id} is not mapped any more"))),
            },
        }
    }
}

/// Takes the pieces of a stored model.
struct Reader<'a> {
    stored: &'a Stored,
    config: &'a Config,
}

impl Reader<'_> {
    fn block(&self, block: u32) -> Result<Block> {
        let Config { embedding_dim, num_heads, head_dim, num_experts, .. } = *self.config;
        let id = |kind| TensorId { kind, block };
        let vector = |kind, length| self.vector(id(kind), 0, length);
        let attention = num_heads * head_dim;
        let qkv = self.config.qkv_rows();
        Ok(Block {
            attn_norm: vector(TensorKind::AttnNorm, embedding_dim)?,
            qkv: self.dense(id(TensorKind::QkvWeight), qkv, embedding_dim)?,
            qkv_bias: vector(TensorKind::QkvBias, qkv)?,
            sinks: vector(TensorKind::Sinks, num_heads)?,
            out: self.dense(id(TensorKind::OutWeight), embedding_dim, attention)?,
            out_bias: vector(TensorKind::OutBias, embedding_dim)?,
            mlp_norm: vector(TensorKind::MlpNorm, embedding_dim)?,
            gate: self.dense(id(TensorKind::GateWeight), num_experts, embedding_dim)?,
            gate_bias: vector(TensorKind::GateBias, num_experts)?,
            experts: (0..num_experts as u32)
                .map(|expert| self.expert(block, expert))
                .collect::<Result<_>>()?,
        })
    }

    fn expert(&self, block: u32, expert: u32) -> Result<Expert> {
        let Config { embedding_dim, mlp_dim, .. } = *self.config;
        let packed = |codes, scales, rows: usize, columns: usize| -> Result<Packed> {
            let [codes, scales] = [codes, scales].map(|kind| TensorId { kind, block });
            Ok(Packed {
                codes: self.piece(codes, expert, rows * columns / 2)?,
                scales: self.piece(scales, expert, rows * columns / 32)?,
                columns,
            })
        };
        let bias = |kind, rows| self.vector(TensorId { kind, block }, expert, rows);
        Ok(Expert {
            mlp1: packed(TensorKind::Mlp1Blocks, TensorKind::Mlp1Scales, 2 * mlp_dim, embedding_dim)?,
            mlp1_bias: bias(TensorKind::Mlp1Bias, 2 * mlp_dim)?,
            mlp2: packed(TensorKind::Mlp2Blocks, TensorKind::Mlp2Scales, embedding_dim, mlp_dim)?,
            mlp2_bias: bias(TensorKind::Mlp2Bias, embedding_dim)?,
        })
    }

    fn dense(&self, tensor: TensorId, rows: usize, columns: usize) -> Result<Dense> {
        Ok(Dense { bytes: self.piece(tensor, 0, rows * columns * 2)?, columns })
    }

    fn vector(&self, tensor: TensorId, expert: u32, length: usize) -> Result<Vec<f32>> {
        let bytes = self.checked(PieceId { tensor, expert }, 2 * length)?;
        let values = bytes.as_chunks::<2>().0.iter();
        Ok(values.map(|&pair| half::bf16::from_le_bytes(pair).to_f32()).collect())
    }

    fn piece(&self, tensor: TensorId, expert: u32, length: usize) -> Result<Piece> {
        let id = PieceId { tensor, expert };
        Ok(match self.checked(id, length)? {
            Cow::Borrowed(_) => Piece::Mapped(id),
            Cow::Owned(bytes) => Piece::Read(bytes),
        })
    }

    fn checked(&self, id: PieceId, length: usize) -> Result<Cow<'_, [u8]>> {
        let bytes = self.stored.piece(id)?;
        if bytes.len() != length {
            return Err(Error::Model {
                field: id.tensor.kind.name(),
                found: format!("{} bytes", bytes.len()),
                needed: format!("{length} bytes, as the header implies"),
            });
        }
        Ok(bytes)
    }
}
