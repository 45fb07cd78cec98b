//! Which tensors a model has: names, dtypes, symbolic shapes. No positions: those are [`super::layout`]'s.

use std::fmt;
use std::ops::Deref;

use super::header::ModelHeader;
use crate::rules::Rule;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16, little-endian.
    Bf16,
    /// Bytes: MXFP4 blocks and scales.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Dtype::Bf16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// The name that SafeTensors uses.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "BF16",
            Dtype::U8 => "U8",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Text and special tokens that a vocabulary may have (`TOK-COUNT`).
pub const MAX_TOKENS: u64 = 1 << 24;

/// The sizes that shapes are made of. Made by [`Dims::new`] only, which proves that no product of them that the
/// layout needs leaves `u64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    num_blocks: u64,
    vocabulary: u64,
    embedding_dim: u64,
    mlp_dim: u64,
    num_experts: u64,
    head_dim: u64,
    num_heads: u64,
    num_kv_heads: u64,
}

/// A header that no layout can be computed from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unlayable {
    /// The rule that the field breaks.
    pub rule: Rule,
    /// The header field.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What would do.
    pub needed: &'static str,
}

impl Dims {
    /// The sizes of a model with this header and `vocabulary` tokens (text and special).
    ///
    /// # Errors
    /// `HDR-EMBEDDING-DIM` and `HDR-MLP-DIM` where a width is not a positive multiple of 32, `TOK-COUNT` where there are
    /// no tokens or more than [`MAX_TOKENS`], `HDR-OVERFLOW` where the weights would take 2^63 bytes or more.
    pub fn new(header: &ModelHeader, vocabulary: u64) -> Result<Dims, Unlayable> {
        if vocabulary == 0 || vocabulary > MAX_TOKENS {
            let (rule, field) = (Rule::TokenCount, "num_text_tokens");
            return Err(Unlayable {
                rule,
                field,
                found: format!("{vocabulary} tokens in all"),
                needed: "1 to 2^24 tokens",
            });
        }
        for (rule, field, value) in [
            (Rule::EmbeddingDim, "embedding_dim", header.embedding_dim),
            (Rule::MlpDim, "mlp_dim", header.mlp_dim),
        ] {
            if value == 0 || value % 32 != 0 {
                return Err(Unlayable {
                    rule,
                    field,
                    found: value.to_string(),
                    needed: "a positive multiple of 32",
                });
            }
        }
        let dims = Dims {
            num_blocks: header.num_blocks.into(),
            vocabulary,
            embedding_dim: header.embedding_dim.into(),
            mlp_dim: header.mlp_dim.into(),
            num_experts: header.num_experts.into(),
            head_dim: header.head_dim.into(),
            num_heads: header.num_heads.into(),
            num_kv_heads: header.num_kv_heads.into(),
        };
        match dims.upper_bound() {
            Some(bytes) if bytes < 1 << 63 => Ok(dims),
            _ => Err(Unlayable {
                rule: Rule::Overflow,
                field: "num_blocks",
                found: "sizes whose product exceeds 2^63 bytes".into(),
                needed: "weights of less than 2^63 bytes",
            }),
        }
    }

    /// At least the length of the file that these sizes imply, or `None` where it leaves `u128`.
    fn upper_bound(&self) -> Option<u128> {
        const PADDING: u128 = 16384;
        let mut total = PADDING;
        for kind in TensorKind::ALL {
            let elements =
                kind.axes().iter().try_fold(1u128, |product, axis| product.checked_mul(axis.wide(self)))?;
            // Each of an expert's six pieces is padded on its own.
            let pieces = if kind.is_expert() { u128::from(self.num_experts) } else { 1 };
            let bytes = elements
                .checked_mul(kind.dtype().size().into())?
                .checked_add(pieces.checked_mul(PADDING)?)?;
            let copies = if kind.is_per_block() { u128::from(self.num_blocks) } else { 1 };
            total = total.checked_add(bytes.checked_mul(copies)?)?;
        }
        Some(total)
    }

    /// Tokens, text and special: the rows of embedding and unembedding.
    pub fn vocabulary(&self) -> u64 {
        self.vocabulary
    }
    /// Transformer blocks.
    pub fn num_blocks(&self) -> u64 {
        self.num_blocks
    }
    /// Experts of each block.
    pub fn num_experts(&self) -> u64 {
        self.num_experts
    }
    /// Width of the residual stream.
    pub fn embedding_dim(&self) -> u64 {
        self.embedding_dim
    }
    /// Width of an expert.
    pub fn mlp_dim(&self) -> u64 {
        self.mlp_dim
    }
    /// Width of an attention head.
    pub fn head_dim(&self) -> u64 {
        self.head_dim
    }
    /// Query heads.
    pub fn num_heads(&self) -> u64 {
        self.num_heads
    }
    /// Key and value heads.
    pub fn num_kv_heads(&self) -> u64 {
        self.num_kv_heads
    }

    /// Every tensor of the model, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = TensorId> + use<> {
        let blocks = self.num_blocks as u32;
        let of_blocks = move |kinds: &'static [TensorKind]| {
            (0..blocks).flat_map(move |block| kinds.iter().map(move |&kind| TensorId { kind, block }))
        };
        let single = |kind| std::iter::once(TensorId { kind, block: 0 });
        single(TensorKind::Embedding)
            .chain(of_blocks(TensorKind::DENSE_OF_BLOCK))
            .chain(single(TensorKind::Norm))
            .chain(single(TensorKind::Unembedding))
            .chain(of_blocks(TensorKind::EXPERTS_OF_BLOCK))
    }
}

/// One axis of a symbolic shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// V: text and special tokens.
    Vocabulary,
    /// H: `embedding_dim`.
    Embedding,
    /// H / 32.
    EmbeddingBlocks,
    /// 2·I: gate and up rows of `mlp_dim`.
    GateUp,
    /// I / 32.
    MlpBlocks,
    /// E: `num_experts`.
    Experts,
    /// (heads + 2·kv_heads)·D: rows q, then k, then v.
    Qkv,
    /// heads·D.
    Attention,
    /// heads.
    Heads,
    /// 16: the bytes of an MXFP4 block.
    BlockBytes,
}

impl Axis {
    /// How the specification writes it.
    pub const fn symbol(self) -> &'static str {
        match self {
            Axis::Vocabulary => "V",
            Axis::Embedding => "H",
            Axis::EmbeddingBlocks => "H/32",
            Axis::GateUp => "2·I",
            Axis::MlpBlocks => "I/32",
            Axis::Experts => "E",
            Axis::Qkv => "(Q+2·KV)·D",
            Axis::Attention => "Q·D",
            Axis::Heads => "Q",
            Axis::BlockBytes => "16",
        }
    }

    fn wide(self, dims: &Dims) -> u128 {
        let wide = u128::from;
        match self {
            Axis::Vocabulary => wide(dims.vocabulary),
            Axis::Embedding => wide(dims.embedding_dim),
            Axis::EmbeddingBlocks => wide(dims.embedding_dim / 32),
            Axis::GateUp => 2 * wide(dims.mlp_dim),
            Axis::MlpBlocks => wide(dims.mlp_dim / 32),
            Axis::Experts => wide(dims.num_experts),
            Axis::Qkv => (wide(dims.num_heads) + 2 * wide(dims.num_kv_heads)) * wide(dims.head_dim),
            Axis::Attention => wide(dims.num_heads) * wide(dims.head_dim),
            Axis::Heads => wide(dims.num_heads),
            Axis::BlockBytes => 16,
        }
    }

    /// Its size in a model with these sizes.
    pub fn size(self, dims: &Dims) -> u64 {
        // `Dims::new` proved that every product of axes fits.
        self.wide(dims) as u64
    }
}

/// A concrete shape of at most four axes, row-major.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    sizes: [u64; 4],
    rank: u8,
}

impl Shape {
    fn of(axes: &[Axis], dims: &Dims) -> Shape {
        let mut sizes = [1; 4];
        for (size, axis) in sizes.iter_mut().zip(axes) {
            *size = axis.size(dims);
        }
        Shape { sizes, rank: axes.len() as u8 }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.iter().product()
    }
}

impl Deref for Shape {
    type Target = [u64];
    fn deref(&self) -> &[u64] {
        &self.sizes[..self.rank.into()]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

macro_rules! kinds {
    ($( $(#[doc = $doc:literal])+ $kind:ident = $name:literal, $dtype:ident, [$($axis:ident),+]; )+) => {
        /// What a tensor is for. One kind stands for the tensors of that name in every block.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum TensorKind { $( $(#[doc = $doc])+ $kind, )+ }

        impl TensorKind {
            /// Every kind, in the order of the file.
            pub const ALL: &'static [TensorKind] = &[ $( TensorKind::$kind, )+ ];

            /// The original checkpoint's name; within blocks, after `block.N.`.
            pub const fn name(self) -> &'static str { match self { $( TensorKind::$kind => $name, )+ } }

            /// Element type.
            pub const fn dtype(self) -> Dtype { match self { $( TensorKind::$kind => Dtype::$dtype, )+ } }

            /// Symbolic shape, row-major, experts included.
            pub const fn axes(self) -> &'static [Axis] {
                match self { $( TensorKind::$kind => &[ $( Axis::$axis ),+ ], )+ }
            }
        }
    };
}

kinds! {
    /// Token embedding.
    Embedding = "embedding.weight", Bf16, [Vocabulary, Embedding];
    /// Scale of the RMSNorm before attention.
    AttnNorm = "attn.norm.scale", Bf16, [Embedding];
    /// Query, key and value projections.
    QkvWeight = "attn.qkv.weight", Bf16, [Qkv, Embedding];
    /// Their biases.
    QkvBias = "attn.qkv.bias", Bf16, [Qkv];
    /// Sink logit of each query head.
    Sinks = "attn.sinks", Bf16, [Heads];
    /// Output projection of attention.
    OutWeight = "attn.out.weight", Bf16, [Embedding, Attention];
    /// Its bias.
    OutBias = "attn.out.bias", Bf16, [Embedding];
    /// Scale of the RMSNorm before the experts.
    MlpNorm = "mlp.norm.scale", Bf16, [Embedding];
    /// Router.
    GateWeight = "mlp.gate.weight", Bf16, [Experts, Embedding];
    /// Its bias.
    GateBias = "mlp.gate.bias", Bf16, [Experts];
    /// Scale of the final RMSNorm.
    Norm = "norm.scale", Bf16, [Embedding];
    /// Output projection to token logits.
    Unembedding = "unembedding.weight", Bf16, [Vocabulary, Embedding];
    /// Gate (even rows) and up (odd rows) projections: MXFP4 blocks.
    Mlp1Blocks = "mlp.mlp1_weight.blocks", U8, [Experts, GateUp, EmbeddingBlocks, BlockBytes];
    /// Their MXFP4 scales.
    Mlp1Scales = "mlp.mlp1_weight.scales", U8, [Experts, GateUp, EmbeddingBlocks];
    /// Their biases.
    Mlp1Bias = "mlp.mlp1_bias", Bf16, [Experts, GateUp];
    /// Down projection: MXFP4 blocks.
    Mlp2Blocks = "mlp.mlp2_weight.blocks", U8, [Experts, Embedding, MlpBlocks, BlockBytes];
    /// Its MXFP4 scales.
    Mlp2Scales = "mlp.mlp2_weight.scales", U8, [Experts, Embedding, MlpBlocks];
    /// Its bias.
    Mlp2Bias = "mlp.mlp2_bias", Bf16, [Experts, Embedding];
}

impl TensorKind {
    /// The kinds of a block that are not experts, in the order of the file.
    pub const DENSE_OF_BLOCK: &'static [TensorKind] = &[
        TensorKind::AttnNorm,
        TensorKind::QkvWeight,
        TensorKind::QkvBias,
        TensorKind::Sinks,
        TensorKind::OutWeight,
        TensorKind::OutBias,
        TensorKind::MlpNorm,
        TensorKind::GateWeight,
        TensorKind::GateBias,
    ];

    /// The six pieces of an expert, in the order of the file.
    pub const EXPERTS_OF_BLOCK: &'static [TensorKind] = &[
        TensorKind::Mlp1Blocks,
        TensorKind::Mlp1Scales,
        TensorKind::Mlp1Bias,
        TensorKind::Mlp2Blocks,
        TensorKind::Mlp2Scales,
        TensorKind::Mlp2Bias,
    ];

    /// Whether the first axis counts experts, which the file stores one by one.
    pub fn is_expert(self) -> bool {
        self >= TensorKind::Mlp1Blocks
    }

    /// Whether each block has one.
    pub fn is_per_block(self) -> bool {
        !matches!(self, TensorKind::Embedding | TensorKind::Norm | TensorKind::Unembedding)
    }

    /// Whether this is an MXFP4 scale tensor.
    pub fn is_scales(self) -> bool {
        matches!(self, TensorKind::Mlp1Scales | TensorKind::Mlp2Scales)
    }

    /// Whether the format reorders and scales the rows of this tensor.
    pub fn is_qkv(self) -> bool {
        matches!(self, TensorKind::QkvWeight | TensorKind::QkvBias)
    }

    /// Shape of the whole tensor.
    pub fn shape(self, dims: &Dims) -> Shape {
        Shape::of(self.axes(), dims)
    }

    /// Shape of what the file stores in one piece: for an expert's tensor, one expert's.
    pub fn piece_shape(self, dims: &Dims) -> Shape {
        Shape::of(if self.is_expert() { &self.axes()[1..] } else { self.axes() }, dims)
    }

    /// Bytes of a row (see [`crate::canonical`]): one element of a vector, else the last axis; the last two of blocks.
    pub fn row_bytes(self, dims: &Dims) -> u64 {
        let axes = self.axes();
        let last = match axes {
            [] | [_] => 1,
            [.., blocks, Axis::BlockBytes] => blocks.size(dims) * 16,
            [.., last] => last.size(dims),
        };
        last * self.dtype().size()
    }

    /// Rows of the whole tensor.
    pub fn rows(self, dims: &Dims) -> u64 {
        self.shape(dims).elements() * self.dtype().size() / self.row_bytes(dims)
    }

    /// Rows of one stored piece: for an expert's tensor, one expert's.
    pub fn piece_rows(self, dims: &Dims) -> u64 {
        self.piece_shape(dims).elements() * self.dtype().size() / self.row_bytes(dims)
    }
}

/// One tensor of a model, whole (all experts of a block).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId {
    /// What it is for.
    pub kind: TensorKind,
    /// Its block; 0 for the three tensors outside blocks.
    pub block: u32,
}

impl TensorId {
    /// The tensor with this name in the original checkpoint, if a model can have one.
    pub fn from_name(name: &str) -> Option<TensorId> {
        let (block, rest) = match name.strip_prefix("block.").and_then(|rest| rest.split_once('.')) {
            Some((block, rest)) if block == "0" || !block.starts_with(['0', '+']) => {
                (Some(block.parse().ok()?), rest)
            }
            Some(_) => return None,
            None => (None, name),
        };
        let kind = *TensorKind::ALL.iter().find(|kind| kind.name() == rest)?;
        (kind.is_per_block() == block.is_some()).then(|| TensorId { kind, block: block.unwrap_or(0) })
    }
}

/// The name in the original checkpoint.
impl fmt::Display for TensorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind.is_per_block() {
            write!(f, "block.{}.{}", self.block, self.kind.name())
        } else {
            f.write_str(self.kind.name())
        }
    }
}

/// What the file stores in one piece: a tensor, or one expert's part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PieceId {
    /// The tensor.
    pub tensor: TensorId,
    /// The expert; 0 for tensors that are not experts'.
    pub expert: u32,
}

/// The name in the original checkpoint, with `[expert]` behind the name of an expert's tensor.
impl fmt::Display for PieceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.tensor)?;
        if self.tensor.kind.is_expert() { write!(f, "[{}]", self.expert) } else { Ok(()) }
    }
}
