//! Where GGUF keeps the canonical tensors, and in which form.
//!
//! A *unit* is what one GGUF tensor's elements are counted in when a canonical tensor is spread over several: a row
//! of a matrix, one element of a bias. A canonical tensor's units are numbered through all of its rows.

use std::ops::Range;

use half::{bf16, f16};

use super::container::GgmlType;
use crate::model_bin::tensors::{Axis, Dims, TensorId, TensorKind};

/// Values of an MXFP4 block.
const BLOCK_VALUES: u64 = 32;
/// Bytes of an MXFP4 block's codes, as in the canonical form.
pub(super) const CODE_BYTES: usize = 16;
/// Bytes of a ggml MXFP4 block: scale, then codes.
const BLOCK_BYTES: usize = 17;

/// A GGUF tensor that holds all or some units of a canonical tensor.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// The GGUF tensor's name.
    pub name: String,
    /// The canonical unit that is its unit 0.
    first: u64,
    /// Canonical units from one of its units to the next.
    stride: u64,
    /// Its units.
    count: u64,
    /// Elements along each axis, fastest first.
    pub axes: Vec<u64>,
}

/// A run of a part's units, and where they are in a run of the canonical tensor's.
pub(super) struct Overlap {
    /// Units of the part.
    pub units: Range<u64>,
    /// The first of them, counted from the start of the canonical run.
    pub first: usize,
    /// From one to the next in the canonical run.
    pub stride: usize,
}

impl Part {
    /// Which of the canonical units `run` this part holds.
    pub fn overlap(&self, run: &Range<u64>) -> Option<Overlap> {
        let index = |unit: u64| unit.saturating_sub(self.first).div_ceil(self.stride).min(self.count);
        let units = index(run.start)..index(run.end);
        let first = (self.first + units.start * self.stride).saturating_sub(run.start) as usize;
        (!units.is_empty()).then_some(Overlap { units, first, stride: self.stride as usize })
    }

    /// All of its units.
    pub fn units(&self) -> Range<u64> {
        0..self.count
    }
}

impl Overlap {
    /// Units in it.
    pub fn len(&self) -> u64 {
        self.units.end - self.units.start
    }
}

/// Units of a row of this kind.
pub(super) fn units_per_row(kind: TensorKind, dims: &Dims) -> u64 {
    // Gate and up alternate: for the weights row by row, for the bias element by element.
    if kind == TensorKind::Mlp1Bias { 2 * dims.mlp_dim() } else { 1 }
}

/// Canonical bytes of a unit.
pub(super) fn unit_bytes(kind: TensorKind, dims: &Dims) -> u64 {
    kind.row_bytes(dims) / units_per_row(kind, dims)
}

/// Values of a unit: those of a row of the matrix where the tensor is its codes.
pub(super) fn unit_elements(kind: TensorKind, dims: &Dims) -> u64 {
    unit_bytes(kind, dims) / kind.dtype().size() * if is_mxfp4(kind) { 2 } else { 1 }
}

/// The type in which [`super::write()`] stores this kind: F32 for whatever ggml's kernels want in F32.
pub(super) fn written_type(kind: TensorKind) -> GgmlType {
    match kind {
        TensorKind::Embedding | TensorKind::QkvWeight | TensorKind::OutWeight | TensorKind::Unembedding => {
            GgmlType::BF16
        }
        kind if is_mxfp4(kind) => GgmlType::MXFP4,
        _ => GgmlType::F32,
    }
}

/// Whether this kind is one half, codes or scales, of an MXFP4 tensor.
pub(super) fn is_mxfp4(kind: TensorKind) -> bool {
    kind.is_scales() || matches!(kind, TensorKind::Mlp1Blocks | TensorKind::Mlp2Blocks)
}

/// The GGUF tensors that hold a canonical tensor.
pub(super) fn parts(tensor: TensorId, dims: &Dims) -> Vec<Part> {
    use TensorKind::*;
    let kind = tensor.kind;
    let units = kind.rows(dims) * units_per_row(kind, dims);
    let query = dims.num_heads() * dims.head_dim();
    let key = dims.num_kv_heads() * dims.head_dim();
    let qkv = [(0, query), (query, key), (query + key, key)];
    let whole = |name| vec![(name, 0, 1, units)];
    let concatenated = |names: [&'static str; 3]| {
        names.into_iter().zip(qkv).map(|(name, (first, count))| (name, first, 1, count)).collect()
    };
    let alternating = |gate, up| vec![(gate, 0, 2, units / 2), (up, 1, 2, units / 2)];
    let parts = match kind {
        Embedding => whole("token_embd.weight"),
        AttnNorm => whole("attn_norm.weight"),
        QkvWeight => concatenated(["attn_q.weight", "attn_k.weight", "attn_v.weight"]),
        QkvBias => concatenated(["attn_q.bias", "attn_k.bias", "attn_v.bias"]),
        Sinks => whole("attn_sinks.weight"),
        OutWeight => whole("attn_output.weight"),
        OutBias => whole("attn_output.bias"),
        MlpNorm => whole("post_attention_norm.weight"),
        GateWeight => whole("ffn_gate_inp.weight"),
        GateBias => whole("ffn_gate_inp.bias"),
        Norm => whole("output_norm.weight"),
        Unembedding => whole("output.weight"),
        Mlp1Blocks | Mlp1Scales => alternating("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        Mlp1Bias => alternating("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        Mlp2Blocks | Mlp2Scales => whole("ffn_down_exps.weight"),
        Mlp2Bias => whole("ffn_down_exps.bias"),
    };
    parts
        .into_iter()
        .map(|(name, first, stride, count)| {
            let name = if kind.is_per_block() { format!("blk.{}.{name}", tensor.block) } else { name.into() };
            let size = |axis: &Axis| match axis {
                Axis::BlockBytes => None,
                Axis::EmbeddingBlocks | Axis::MlpBlocks => Some(axis.size(dims) * BLOCK_VALUES),
                Axis::GateUp => Some(axis.size(dims) / 2),
                Axis::Qkv => Some(count),
                axis => Some(axis.size(dims)),
            };
            let axes = kind.axes().iter().rev().filter_map(size).collect();
            Part { name, first, stride, count, axes }
        })
        .collect()
}

/// How a GGUF tensor's bytes become a canonical tensor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoding {
    /// BF16 as it is.
    Bf16,
    /// F32, rounded to BF16.
    F32,
    /// F16, rounded to BF16.
    F16,
    /// The codes of MXFP4 blocks.
    Codes,
    /// The scales of MXFP4 blocks.
    Scales,
}

impl Decoding {
    /// How a tensor of this type serves a canonical tensor of this kind, if it does.
    pub fn new(kind: TensorKind, ty: GgmlType) -> Option<Decoding> {
        match ty {
            GgmlType::MXFP4 if kind.is_scales() => Some(Decoding::Scales),
            GgmlType::MXFP4 if is_mxfp4(kind) => Some(Decoding::Codes),
            _ if is_mxfp4(kind) => None,
            GgmlType::BF16 => Some(Decoding::Bf16),
            GgmlType::F32 => Some(Decoding::F32),
            GgmlType::F16 => Some(Decoding::F16),
            _ => None,
        }
    }

    /// What a tensor of this kind must be stored as.
    pub fn needed(kind: TensorKind) -> &'static str {
        if is_mxfp4(kind) { "MXFP4" } else { "BF16, F32 or F16" }
    }

    /// Bytes in the GGUF tensor for `canonical` bytes.
    pub fn stored_bytes(self, canonical: u64) -> u64 {
        match self {
            Decoding::Bf16 | Decoding::F16 => canonical,
            Decoding::F32 => canonical * 2,
            Decoding::Codes => canonical / CODE_BYTES as u64 * BLOCK_BYTES as u64,
            Decoding::Scales => canonical * BLOCK_BYTES as u64,
        }
    }

    /// Fills `canonical` from the bytes of a GGUF tensor.
    pub fn decode(self, stored: &[u8], canonical: &mut [u8]) {
        match self {
            Decoding::Bf16 => canonical.copy_from_slice(stored),
            Decoding::F32 | Decoding::F16 => {
                let mut values = canonical.as_chunks_mut::<2>().0.iter_mut();
                self.for_each_value(stored, |wide| {
                    if let Some(value) = values.next() {
                        *value = to_bf16(wide).to_le_bytes();
                    }
                });
            }
            Decoding::Codes => {
                let blocks = canonical.as_chunks_mut::<CODE_BYTES>().0;
                for (codes, [_, block @ ..]) in blocks.iter_mut().zip(stored.as_chunks::<BLOCK_BYTES>().0) {
                    *codes = paired(block);
                }
            }
            Decoding::Scales => {
                for (scale, [stored, ..]) in canonical.iter_mut().zip(stored.as_chunks::<BLOCK_BYTES>().0) {
                    *scale = *stored;
                }
            }
        }
    }

    /// How many of the stored values are not exactly a BF16.
    pub fn count_inexact(self, stored: &[u8]) -> u64 {
        let mut inexact = 0;
        self.for_each_value(stored, |wide| inexact += u64::from(!is_bf16(wide)));
        inexact
    }

    fn for_each_value(self, stored: &[u8], each: impl FnMut(f32)) {
        match self {
            Decoding::F32 => stored.as_chunks().0.iter().copied().map(f32::from_le_bytes).for_each(each),
            Decoding::F16 => {
                stored.as_chunks().0.iter().copied().map(f16::from_le_bytes).map(f16::to_f32).for_each(each);
            }
            Decoding::Bf16 | Decoding::Codes | Decoding::Scales => {}
        }
    }
}

/// Whether a value is exactly a BF16: the upper half of an F32.
fn is_bf16(wide: f32) -> bool {
    wide.to_bits() & 0xffff == 0
}

/// Rounded to nearest even. A value that is a BF16 keeps its bits, which `bf16::from_f32` would not promise of a NaN.
fn to_bf16(wide: f32) -> bf16 {
    if is_bf16(wide) { bf16::from_bits((wide.to_bits() >> 16) as u16) } else { bf16::from_f32(wide) }
}

/// Canonical codes, byte j holding elements 2j and 2j + 1, from ggml's, byte j holding elements j and j + 16.
pub(super) fn paired(halves: &[u8; CODE_BYTES]) -> [u8; CODE_BYTES] {
    let (pairs, _) = halves.as_chunks::<2>();
    let mut codes = [0; CODE_BYTES];
    let (low, high) = codes.split_at_mut(CODE_BYTES / 2);
    for ((low, high), [even, odd]) in low.iter_mut().zip(high).zip(pairs) {
        *low = even & 0x0f | odd << 4;
        *high = even >> 4 | odd & 0xf0;
    }
    codes
}

/// The inverse of [`paired`].
pub(super) fn halved(pairs: &[u8; CODE_BYTES]) -> [u8; CODE_BYTES] {
    let mut halves = [0; CODE_BYTES];
    let (low, high) = pairs.split_at(CODE_BYTES / 2);
    let (targets, _) = halves.as_chunks_mut::<2>();
    for ((low, high), [even, odd]) in low.iter().zip(high).zip(targets) {
        *even = low & 0x0f | high << 4;
        *odd = low >> 4 | high & 0xf0;
    }
    halves
}

/// The blocks of ggml from canonical codes and scales, as many as there are scales.
pub(super) fn encode_mxfp4(codes: &[u8], scales: &[u8], stored: &mut [u8]) {
    let blocks = codes.as_chunks::<CODE_BYTES>().0.iter().zip(scales);
    for (target, (codes, scale)) in stored.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().zip(blocks) {
        let [head, tail @ ..] = target;
        *head = *scale;
        *tail = halved(codes);
    }
}

/// F32 from canonical BF16, which is exact.
pub(super) fn encode_f32(canonical: &[u8], stored: &mut [u8]) {
    for (target, [low, high]) in stored.as_chunks_mut::<4>().0.iter_mut().zip(canonical.as_chunks::<2>().0) {
        *target = [0, 0, *low, *high];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element i of a block has code i where i < 16, then 15 down to 0. Both forms written out by hand.
    #[test]
    fn nibbles_are_halved_and_paired() {
        let pairs: [u8; 16] = [
            0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc,
            0xfe, // elements 0 to 15, two neighbours in a byte
            0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, // elements 16 to 31
        ];
        let halves: [u8; 16] = [
            0xf0, 0xe1, 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87, // elements j and j + 16 in byte j
            0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f,
        ];
        assert_eq!(halved(&pairs), halves);
        assert_eq!(paired(&halves), pairs);
    }
}
