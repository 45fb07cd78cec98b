//! The one description of a `model.bin`: every section in order, weights included. It drives reading, writing and
//! planning; nothing else in this project knows where anything lies.
//!
//! Reading is lenient about *values*: what stands in the file is recorded, right or wrong, so that
//! [`super::verify`] can name every violation. It fails only where no position can be computed any more, with a
//! [`Violation`] as the custom error of [`binrw::Error`].

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use binrw::{BinRead, BinResult, BinWrite, Endian, binrw};

use super::header::{HEAD_LEN, Head};
pub use super::tensors::PieceId;
use super::tensors::{Dims, Shape, TensorId, TensorKind};
use crate::rules::Rule;
use crate::violation::Violation;

/// Boundary of the embedding and of each block's experts. The format's constant, not the system's page size.
pub const PAGE: u64 = 16384;
/// Boundary of most tensors.
pub const ALIGN: u64 = 16;
/// No boundary: a bias follows its weight at once.
pub const FOLLOW: u64 = 1;

/// A whole file.
#[binrw]
#[brw(little)]
#[br(import { len: u64 })]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// Everything up to the weights.
    #[br(args { len })]
    #[bw(args_raw = payload)]
    pub prefix: Prefix,
    /// The weights, the first tensor's padding included.
    #[br(args_raw = At::start(prefix.dims()?, len))]
    #[bw(args_raw = payload)]
    pub weights: Weights,
}

/// Everything before the weights: fixed headers and the variable parts of the tokenizer.
#[binrw]
#[brw(little)]
#[br(import { len: u64 })]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct Prefix {
    /// The first 148 bytes.
    #[br(parse_with = read_head, args(len))]
    pub head: Head,
    /// `num_special_tokens` UUIDs of 16 bytes, by id.
    #[br(args_raw = BlobAt { blob: BlobId::SpecialUuids, size: u64::from(head.tokenizer.num_special_tokens) * 16, len })]
    #[bw(args_raw = payload)]
    pub special_uuids: Blob,
    /// The regex and its NUL.
    #[br(args_raw = BlobAt { blob: BlobId::Regex, size: head.tokenizer.regex_size.into(), len })]
    #[bw(args_raw = payload)]
    pub regex: Blob,
    /// `num_text_tokens` records: u16 length, bytes.
    #[br(args_raw = BlobAt { blob: BlobId::TextTokens, size: head.tokenizer.tokens_size.into(), len })]
    #[bw(args_raw = payload)]
    pub text_tokens: Blob,
}

/// All weights in order: dense ones first, then every block's experts.
#[binrw]
#[brw(little)]
#[br(import_raw(at: At))]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// `embedding.weight`.
    #[br(args_raw = at.piece(TensorKind::Embedding, PAGE))]
    #[bw(args_raw = payload)]
    pub embedding: Tensor,
    /// Attention, norms and router of each block.
    #[br(parse_with = repeat, args(at.dims.num_blocks(), |block| at.block(block)))]
    #[bw(args_raw = payload)]
    pub blocks: Vec<DenseBlock>,
    /// `norm.scale`.
    #[br(args_raw = at.piece(TensorKind::Norm, ALIGN))]
    #[bw(args_raw = payload)]
    pub norm: Tensor,
    /// `unembedding.weight`.
    #[br(args_raw = at.piece(TensorKind::Unembedding, ALIGN))]
    #[bw(args_raw = payload)]
    pub unembedding: Tensor,
    /// The experts of each block.
    #[br(parse_with = repeat, args(at.dims.num_blocks(), |block| at.block(block)))]
    #[bw(args_raw = payload)]
    pub experts: Vec<ExpertBlock>,
}

/// What a block holds beside its experts.
#[binrw]
#[brw(little)]
#[br(import_raw(at: At))]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct DenseBlock {
    /// `attn.norm.scale`.
    #[br(args_raw = at.piece(TensorKind::AttnNorm, ALIGN))]
    #[bw(args_raw = payload)]
    pub attn_norm: Tensor,
    /// `attn.qkv.weight`, Q and K rows interleaved and scaled.
    #[br(args_raw = at.piece(TensorKind::QkvWeight, ALIGN))]
    #[bw(args_raw = payload)]
    pub qkv_weight: Tensor,
    /// `attn.qkv.bias`, likewise.
    #[br(args_raw = at.piece(TensorKind::QkvBias, FOLLOW))]
    #[bw(args_raw = payload)]
    pub qkv_bias: Tensor,
    /// `attn.sinks`.
    #[br(args_raw = at.piece(TensorKind::Sinks, ALIGN))]
    #[bw(args_raw = payload)]
    pub sinks: Tensor,
    /// `attn.out.weight`.
    #[br(args_raw = at.piece(TensorKind::OutWeight, ALIGN))]
    #[bw(args_raw = payload)]
    pub out_weight: Tensor,
    /// `attn.out.bias`.
    #[br(args_raw = at.piece(TensorKind::OutBias, FOLLOW))]
    #[bw(args_raw = payload)]
    pub out_bias: Tensor,
    /// `mlp.norm.scale`.
    #[br(args_raw = at.piece(TensorKind::MlpNorm, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp_norm: Tensor,
    /// `mlp.gate.weight`.
    #[br(args_raw = at.piece(TensorKind::GateWeight, ALIGN))]
    #[bw(args_raw = payload)]
    pub gate_weight: Tensor,
    /// `mlp.gate.bias`.
    #[br(args_raw = at.piece(TensorKind::GateBias, FOLLOW))]
    #[bw(args_raw = payload)]
    pub gate_bias: Tensor,
}

/// The experts of one block.
#[binrw]
#[brw(little)]
#[br(import_raw(at: At))]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertBlock {
    /// `num_experts` experts, the first on a [`PAGE`] boundary.
    #[br(parse_with = repeat, args(at.dims.num_experts(), |expert| at.expert(expert)))]
    #[bw(args_raw = payload)]
    pub experts: Vec<Expert>,
}

/// The six pieces of one expert.
#[binrw]
#[brw(little)]
#[br(import_raw(at: At))]
#[bw(import_raw(payload: &dyn Payload))]
#[derive(Clone, Debug, PartialEq)]
pub struct Expert {
    /// `mlp.mlp1_weight.blocks`.
    #[br(args_raw = at.piece(TensorKind::Mlp1Blocks, if at.expert == 0 { PAGE } else { ALIGN }))]
    #[bw(args_raw = payload)]
    pub mlp1_blocks: Tensor,
    /// `mlp.mlp1_weight.scales`, stored + 14.
    #[br(args_raw = at.piece(TensorKind::Mlp1Scales, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp1_scales: Tensor,
    /// `mlp.mlp1_bias`.
    #[br(args_raw = at.piece(TensorKind::Mlp1Bias, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp1_bias: Tensor,
    /// `mlp.mlp2_weight.blocks`.
    #[br(args_raw = at.piece(TensorKind::Mlp2Blocks, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp2_blocks: Tensor,
    /// `mlp.mlp2_weight.scales`, stored + 14.
    #[br(args_raw = at.piece(TensorKind::Mlp2Scales, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp2_scales: Tensor,
    /// `mlp.mlp2_bias`.
    #[br(args_raw = at.piece(TensorKind::Mlp2Bias, ALIGN))]
    #[bw(args_raw = payload)]
    pub mlp2_bias: Tensor,
}

/// Where the bytes of a file come from when it is written.
pub trait Payload {
    /// Writes all bytes of a variable part of the tokenizer.
    fn write_blob(&self, blob: BlobId, out: &mut dyn Write) -> io::Result<()>;

    /// Writes all bytes of a tensor in the form that the file stores.
    fn write_piece(&self, piece: PieceId, out: &mut dyn Write) -> io::Result<()>;
}

/// A part of the tokenizer whose length the tokenizer header gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobId {
    /// The special tokens' UUIDs.
    SpecialUuids,
    /// The regex with its NUL.
    Regex,
    /// The text token records.
    TextTokens,
}

impl BlobId {
    /// The name of the section.
    pub fn section(self) -> &'static str {
        match self {
            BlobId::SpecialUuids => "special tokens",
            BlobId::Regex => "regex",
            BlobId::TextTokens => "text tokens",
        }
    }

    /// The header field that gives its length.
    pub fn size_field(self) -> &'static str {
        match self {
            BlobId::SpecialUuids => "num_special_tokens",
            BlobId::Regex => "regex_size",
            BlobId::TextTokens => "tokens_size",
        }
    }
}

/// A run of bytes that is recorded, not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Which part of the tokenizer this is.
    pub id: BlobId,
    /// Its bytes, from the start of the file.
    pub range: Range<u64>,
}

/// A weight tensor, or one expert's part of one: recorded when read, streamed when written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Which tensor, and whose expert's.
    pub id: PieceId,
    /// Shape, row-major; the dtype is `id.tensor.kind.dtype()`.
    pub shape: Shape,
    /// The boundary that it starts at.
    pub align: u64,
    /// The padding before it.
    pub padding: Padding,
    /// Its bytes, from the start of the file.
    pub range: Range<u64>,
}

/// Padding before a tensor. The bytes are read and must be zero, but here they are only recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padding {
    /// The bytes, from the start of the file; empty where the boundary was already met.
    pub range: Range<u64>,
    /// From the first to the last byte that is not zero, if any.
    pub nonzero: Option<Range<u64>>,
}

/// Where a description is being read: sizes of the model, position in it, and the length of the file.
#[derive(Clone, Copy, Debug)]
pub struct At {
    dims: Dims,
    block: u32,
    expert: u32,
    len: u64,
}

impl At {
    /// The start of the weights of a file of `len` bytes.
    pub fn start(dims: Dims, len: u64) -> At {
        At { dims, block: 0, expert: 0, len }
    }

    fn block(self, block: u32) -> At {
        At { block, ..self }
    }

    fn expert(self, expert: u32) -> At {
        At { expert, ..self }
    }

    fn piece(self, kind: TensorKind, align: u64) -> PieceAt {
        let id = PieceId { tensor: TensorId { kind, block: self.block }, expert: self.expert };
        PieceAt { id, shape: kind.piece_shape(&self.dims), align, len: self.len }
    }
}

/// What [`Blob`] needs to know to be read.
#[derive(Clone, Copy, Debug)]
pub struct BlobAt {
    blob: BlobId,
    size: u64,
    len: u64,
}

/// What [`Tensor`] needs to know to be read.
#[derive(Clone, Copy, Debug)]
pub struct PieceAt {
    id: PieceId,
    shape: Shape,
    align: u64,
    len: u64,
}

impl Prefix {
    /// Text and special tokens: the rows of embedding and unembedding.
    pub fn num_tokens(&self) -> u64 {
        u64::from(self.head.tokenizer.num_text_tokens) + u64::from(self.head.tokenizer.num_special_tokens)
    }

    /// The sizes of the weights.
    ///
    /// # Errors
    /// A [`Violation`] inside [`binrw::Error::Custom`] where the header allows no layout.
    pub fn dims(&self) -> BinResult<Dims> {
        Dims::new(&self.head.model, self.num_tokens()).map_err(|unlayable| {
            let range = super::section::header_field(unlayable.field);
            custom(Violation {
                rule: unlayable.rule,
                section: "model header".into(),
                field: unlayable.field.into(),
                range,
                found: unlayable.found,
                needed: unlayable.needed.into(),
            })
        })
    }
}

impl Weights {
    /// The layout that a file with these sizes has, without a file: the description read from endless zeros, the
    /// weights' first padding starting at `start`.
    pub fn plan(dims: Dims, start: u64) -> BinResult<Weights> {
        Weights::read_args(&mut Zeros { position: start }, At::start(dims, u64::MAX))
    }

    /// Every tensor in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        std::iter::once(&self.embedding)
            .chain(self.blocks.iter().flat_map(DenseBlock::tensors))
            .chain([&self.norm, &self.unembedding])
            .chain(self.experts.iter().flat_map(|block| block.experts.iter().flat_map(Expert::tensors)))
    }

    /// The end of the last tensor.
    pub fn end(&self) -> u64 {
        self.experts
            .last()
            .and_then(|block| block.experts.last())
            .map_or(self.unembedding.range.end, |expert| expert.mlp2_bias.range.end)
    }

    /// The piece with this id, if the model has it.
    pub fn piece(&self, id: PieceId) -> Option<&Tensor> {
        let TensorId { kind, block } = id.tensor;
        match kind {
            TensorKind::Embedding => Some(&self.embedding),
            TensorKind::Norm => Some(&self.norm),
            TensorKind::Unembedding => Some(&self.unembedding),
            kind if kind.is_expert() => {
                let expert = self.experts.get(block as usize)?.experts.get(id.expert as usize)?;
                expert.tensors().into_iter().find(|tensor| tensor.id.tensor.kind == kind)
            }
            kind => self
                .blocks
                .get(block as usize)?
                .tensors()
                .into_iter()
                .find(|tensor| tensor.id.tensor.kind == kind),
        }
    }
}

impl DenseBlock {
    /// Its tensors in order.
    pub fn tensors(&self) -> [&Tensor; 9] {
        [
            &self.attn_norm,
            &self.qkv_weight,
            &self.qkv_bias,
            &self.sinks,
            &self.out_weight,
            &self.out_bias,
            &self.mlp_norm,
            &self.gate_weight,
            &self.gate_bias,
        ]
    }
}

impl Expert {
    /// Its tensors in order.
    pub fn tensors(&self) -> [&Tensor; 6] {
        [
            &self.mlp1_blocks,
            &self.mlp1_scales,
            &self.mlp1_bias,
            &self.mlp2_blocks,
            &self.mlp2_scales,
            &self.mlp2_bias,
        ]
    }
}

impl BinRead for Blob {
    type Args<'a> = BlobAt;

    fn read_options<R: Read + Seek>(reader: &mut R, _: Endian, at: BlobAt) -> BinResult<Self> {
        let start = reader.stream_position()?;
        let range = start..start + at.size;
        if range.end > at.len {
            return Err(truncated(at.blob.section(), at.blob.section().into(), range, at.len));
        }
        reader.seek(SeekFrom::Start(range.end))?;
        Ok(Blob { id: at.blob, range })
    }
}

impl BinWrite for Blob {
    type Args<'a> = &'a dyn Payload;

    fn write_options<W: Write + Seek>(
        &self,
        writer: &mut W,
        _: Endian,
        payload: &dyn Payload,
    ) -> BinResult<()> {
        expect_position(writer, self.range.start)?;
        payload.write_blob(self.id, writer)?;
        expect_position(writer, self.range.end)
    }
}

impl BinRead for Tensor {
    type Args<'a> = PieceAt;

    fn read_options<R: Read + Seek>(reader: &mut R, endian: Endian, at: PieceAt) -> BinResult<Self> {
        let padding = Padding::read_options(reader, endian, at)?;
        let kind = at.id.tensor.kind;
        let start = padding.range.end;
        let range = start..start + at.shape.elements() * kind.dtype().size();
        if range.end > at.len {
            return Err(truncated(
                &super::section::weights_section(at.id.tensor),
                at.id.to_string(),
                range,
                at.len,
            ));
        }
        reader.seek(SeekFrom::Start(range.end))?;
        Ok(Tensor { id: at.id, shape: at.shape, align: at.align, padding, range })
    }
}

impl BinWrite for Tensor {
    type Args<'a> = &'a dyn Payload;

    fn write_options<W: Write + Seek>(
        &self,
        writer: &mut W,
        endian: Endian,
        payload: &dyn Payload,
    ) -> BinResult<()> {
        self.padding.write_options(writer, endian, ())?;
        expect_position(writer, self.range.start)?;
        payload.write_piece(self.id, writer)?;
        expect_position(writer, self.range.end)
    }
}

impl BinRead for Padding {
    type Args<'a> = PieceAt;

    fn read_options<R: Read + Seek>(reader: &mut R, _: Endian, at: PieceAt) -> BinResult<Self> {
        let start = reader.stream_position()?;
        let range = start..start.next_multiple_of(at.align);
        if range.end > at.len {
            let section = super::section::weights_section(at.id.tensor);
            return Err(truncated(&section, format!("padding before {}", at.id), range, at.len));
        }
        let mut bytes = [0; PAGE as usize];
        let bytes = &mut bytes[..(range.end - range.start) as usize];
        reader.read_exact(bytes)?;
        let first = bytes.iter().position(|&byte| byte != 0);
        let last = bytes.iter().rposition(|&byte| byte != 0);
        let nonzero = first.zip(last).map(|(first, last)| start + first as u64..start + last as u64 + 1);
        Ok(Padding { range, nonzero })
    }
}

impl BinWrite for Padding {
    type Args<'a> = ();

    fn write_options<W: Write + Seek>(&self, writer: &mut W, _: Endian, (): ()) -> BinResult<()> {
        writer.write_all(&[0; PAGE as usize][..(self.range.end - self.range.start) as usize])?;
        Ok(())
    }
}

/// The head, or the field in which a shorter file ends.
#[binrw::parser(reader, endian)]
fn read_head(len: u64) -> BinResult<Head> {
    if len < HEAD_LEN {
        let (section, field, range) = super::section::head_field_at(len);
        return Err(truncated(section, field.into(), range, len));
    }
    Head::read_options(reader, endian, ())
}

/// `count` descriptions, each with its own arguments. Nothing is reserved: a hostile count meets the end of the file
/// first, since no description is empty.
#[binrw::parser(reader, endian)]
fn repeat<T, F>(count: u64, args: F) -> BinResult<Vec<T>>
where
    T: for<'a> BinRead<Args<'a> = At>,
    F: Fn(u32) -> At,
{
    let mut items = Vec::new();
    for index in 0..count as u32 {
        items.push(T::read_options(reader, endian, args(index))?);
    }
    Ok(items)
}

fn truncated(section: &str, field: String, range: Range<u64>, len: u64) -> binrw::Error {
    let needed = format!("{} bytes for it, {} in all at least", range.end - range.start, range.end);
    custom(Violation {
        rule: Rule::Truncated,
        section: section.into(),
        field,
        range,
        found: format!("a file of {len} bytes"),
        needed,
    })
}

fn custom(violation: Violation) -> binrw::Error {
    binrw::Error::Custom { pos: violation.range.start, err: Box::new(violation) }
}

fn expect_position(writer: &mut impl Seek, expected: u64) -> BinResult<()> {
    let position = writer.stream_position()?;
    if position == expected {
        return Ok(());
    }
    let message = format!("the payload moved the writer to byte {position}, the plan has byte {expected}");
    Err(io::Error::other(message).into())
}

/// An endless stream of zeros that can be sought in: what [`Weights::plan`] reads.
struct Zeros {
    position: u64,
}

impl Read for Zeros {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        buffer.fill(0);
        self.position = self.position.saturating_add(buffer.len() as u64);
        Ok(buffer.len())
    }
}

impl Seek for Zeros {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = match to {
            SeekFrom::Start(position) => position,
            SeekFrom::Current(delta) => self.position.saturating_add_signed(delta),
            SeekFrom::End(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(self.position)
    }
}
