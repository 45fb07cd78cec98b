//! Sections, fields and who owns each byte of a file.

use std::io::Cursor;
use std::ops::Range;

use binrw::BinRead;

use super::header::HEAD_LEN;
use super::layout::{BlobId, File, Prefix};
use super::tensors::{PieceId, Shape, TensorId, TensorKind};

/// A field of fixed position: section, name, type, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// The section that it belongs to.
    pub section: &'static str,
    /// Upstream's name.
    pub name: &'static str,
    /// How its bytes are read.
    pub ty: FieldType,
    /// Its bytes.
    pub range: Range<u64>,
}

/// How the bytes of a fixed field are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// Characters.
    Text(u64),
    /// Unsigned, 4 bytes, little-endian.
    U32,
    /// IEEE 754 binary32, little-endian.
    F32,
    /// 16 bytes in text order.
    Uuid,
}

impl FieldType {
    /// Its bytes.
    pub const fn size(self) -> u64 {
        match self {
            FieldType::Text(size) => size,
            FieldType::U32 | FieldType::F32 => 4,
            FieldType::Uuid => 16,
        }
    }

    /// How the specification writes it.
    pub fn name(self) -> &'static str {
        match self {
            FieldType::Text(_) => "bytes",
            FieldType::U32 => "u32",
            FieldType::F32 => "f32",
            FieldType::Uuid => "UUID",
        }
    }
}

/// The fields of [`super::header::Head`], in order. A test writes a head with a different value in each field and
/// finds it at the position that follows from this table.
const HEAD: &[(&str, &str, FieldType)] = &[
    ("file header", "magic", FieldType::Text(12)),
    ("file header", "zero", FieldType::U32),
    ("file header", "model_uuid", FieldType::Uuid),
    ("model header", "context_length", FieldType::U32),
    ("model header", "num_blocks", FieldType::U32),
    ("model header", "num_experts", FieldType::U32),
    ("model header", "num_active_experts", FieldType::U32),
    ("model header", "embedding_dim", FieldType::U32),
    ("model header", "mlp_dim", FieldType::U32),
    ("model header", "swiglu_limit", FieldType::F32),
    ("model header", "head_dim", FieldType::U32),
    ("model header", "num_heads", FieldType::U32),
    ("model header", "num_kv_heads", FieldType::U32),
    ("model header", "attention_window", FieldType::U32),
    ("model header", "rope_theta", FieldType::F32),
    ("model header", "interpolation_scale", FieldType::F32),
    ("model header", "yarn_offset", FieldType::F32),
    ("model header", "yarn_scale", FieldType::F32),
    ("model header", "yarn_multiplier", FieldType::F32),
    ("model header", "rmsnorm_epsilon", FieldType::F32),
    ("layout header", "layout_uuid", FieldType::Uuid),
    ("tokenizer header", "tokenizer_uuid", FieldType::Uuid),
    ("tokenizer header", "num_special_tokens", FieldType::U32),
    ("tokenizer header", "num_text_tokens", FieldType::U32),
    ("tokenizer header", "regex_size", FieldType::U32),
    ("tokenizer header", "tokens_size", FieldType::U32),
];

/// The fields of the first 148 bytes, with their positions.
pub fn head_fields() -> impl Iterator<Item = Field> {
    HEAD.iter().scan(0, |position, &(section, name, ty)| {
        let start = *position;
        *position += ty.size();
        Some(Field { section, name, ty, range: start..*position })
    })
}

/// The bytes of a field of the head; empty where there is no such field.
pub fn header_field(name: &str) -> Range<u64> {
    head_fields().find(|field| field.name == name).map_or(0..0, |field| field.range)
}

/// The field of the head that holds the byte at `position`: section, name, bytes.
pub(super) fn head_field_at(position: u64) -> (&'static str, &'static str, Range<u64>) {
    head_fields()
        .find(|field| field.range.contains(&position))
        .map_or(("tokenizer header", "tokens_size", HEAD_LEN - 4..HEAD_LEN), |field| {
            (field.section, field.name, field.range)
        })
}

/// The section that a tensor belongs to.
pub fn weights_section(tensor: TensorId) -> String {
    match tensor.kind {
        TensorKind::Embedding => "embedding".into(),
        TensorKind::Norm | TensorKind::Unembedding => "unembedding".into(),
        kind if kind.is_expert() => format!("block {} experts", tensor.block),
        _ => format!("block {} attention and router", tensor.block),
    }
}

/// What a run of bytes is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A field of fixed position.
    Field(FieldType),
    /// The UUID of a special token.
    SpecialUuid,
    /// The regex and its NUL.
    Regex,
    /// Text token records.
    TextTokens,
    /// Zero bytes up to a boundary.
    Padding {
        /// The boundary in bytes.
        align: u64,
    },
    /// A tensor, or one expert's part of one.
    Tensor {
        /// Which.
        id: PieceId,
        /// Row-major.
        shape: Shape,
    },
    /// Bytes that no section accounts for.
    Trailing,
}

/// A run of bytes with one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The section.
    pub section: String,
    /// The field or tensor.
    pub name: String,
    /// What it is.
    pub content: Content,
    /// Its bytes, from the start of the file; may be empty for an empty regex or token list, never for padding.
    pub range: Range<u64>,
}

/// Every byte of a file with its owner, in order and without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionMap {
    /// The runs: each starts where the one before it ends.
    pub spans: Vec<Span>,
}

impl SectionMap {
    /// Attributes every byte of a file, valid or not, as far as its sections can be told apart; what is left is one
    /// span of [`Content::Trailing`].
    pub fn read(bytes: &[u8]) -> SectionMap {
        let len = bytes.len() as u64;
        let mut reader = Cursor::new(bytes);
        if let Ok(file) = File::read_args(&mut reader, binrw::args! { len }) {
            return SectionMap::of(&file, len);
        }
        reader.set_position(0);
        let mut spans = match Prefix::read_args(&mut reader, binrw::args! { len }) {
            Ok(prefix) => prefix_spans(&prefix),
            Err(_) => head_spans().take_while(|span| span.range.end <= len).collect(),
        };
        let end = spans.last().map_or(0, |span| span.range.end);
        spans.extend(trailing(end..len, "unreadable rest"));
        SectionMap { spans }
    }

    /// Attributes every byte of a file of `len` bytes.
    pub fn of(file: &File, len: u64) -> SectionMap {
        let mut spans = prefix_spans(&file.prefix);
        for tensor in file.weights.tensors() {
            let section = weights_section(tensor.id.tensor);
            if !tensor.padding.range.is_empty() {
                spans.push(Span {
                    section: section.clone(),
                    name: "padding".into(),
                    content: Content::Padding { align: tensor.align },
                    range: tensor.padding.range.clone(),
                });
            }
            spans.push(Span {
                section,
                name: tensor.id.to_string(),
                content: Content::Tensor { id: tensor.id, shape: tensor.shape },
                range: tensor.range.clone(),
            });
        }
        spans.extend(trailing(file.weights.end()..len, "trailing bytes"));
        SectionMap { spans }
    }

    /// Runs of spans of the same section: name, bytes, the spans.
    pub fn sections(&self) -> impl Iterator<Item = (&str, Range<u64>, &[Span])> {
        self.spans.chunk_by(|a, b| a.section == b.section).filter_map(|spans| {
            let (first, last) = (spans.first()?, spans.last()?);
            Some((first.section.as_str(), first.range.start..last.range.end, spans))
        })
    }

    /// The span that owns the byte at `position`.
    pub fn owner(&self, position: u64) -> Option<&Span> {
        let after = self.spans.partition_point(|span| span.range.end <= position);
        self.spans.get(after).filter(|span| span.range.contains(&position))
    }
}

fn trailing(range: Range<u64>, name: &str) -> Option<Span> {
    let span = Span { section: name.into(), name: name.into(), content: Content::Trailing, range };
    (!span.range.is_empty()).then_some(span)
}

fn head_spans() -> impl Iterator<Item = Span> {
    head_fields().map(|field| Span {
        section: field.section.into(),
        name: field.name.into(),
        content: Content::Field(field.ty),
        range: field.range,
    })
}

fn prefix_spans(prefix: &Prefix) -> Vec<Span> {
    let mut spans: Vec<Span> = head_spans().collect();
    let uuids = &prefix.special_uuids.range;
    let first_id = u64::from(prefix.head.tokenizer.num_text_tokens);
    spans.extend((uuids.start..uuids.end).step_by(16).zip(first_id..).map(|(start, id)| Span {
        section: BlobId::SpecialUuids.section().into(),
        name: format!("uuid of token {id}"),
        content: Content::SpecialUuid,
        range: start..start + 16,
    }));
    for (blob, content) in [(&prefix.regex, Content::Regex), (&prefix.text_tokens, Content::TextTokens)] {
        let name = blob.id.section();
        spans.push(Span { section: name.into(), name: name.into(), content, range: blob.range.clone() });
    }
    spans
}
