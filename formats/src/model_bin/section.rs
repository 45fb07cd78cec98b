//! Sections, fields and who owns each byte of a file.

use std::ops::Range;

use super::header::HEAD_LEN;
use super::tensors::{TensorId, TensorKind};

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
        .map_or(("tokenizer header", "tokens_size", HEAD_LEN - 4..HEAD_LEN), |field| (field.section, field.name, field.range))
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
