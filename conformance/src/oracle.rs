//! A second opinion on where things lie, written from the specification's prose without `formats`: plain arithmetic,
//! no checks. The suite holds the declarative description of `formats` to it and takes the positions of its invalid
//! cases from it.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where each tensor lies and the padding before it, by name; an expert's with its number behind the name.
pub struct Oracle {
    /// Bytes of each tensor.
    pub tensors: BTreeMap<String, Range<u64>>,
    /// Padding before each tensor that has any.
    pub paddings: BTreeMap<String, Range<u64>>,
    /// Special tokens' UUIDs.
    pub special_uuids: Range<u64>,
    /// Regex and NUL.
    pub regex: Range<u64>,
    /// Text token records.
    pub text_tokens: Range<u64>,
    /// Length of the file.
    pub len: u64,
}

/// The little-endian u32 at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> u64 {
    let word: [u8; 4] = bytes[offset..offset + 4].try_into().expect("four bytes");
    u32::from_le_bytes(word).into()
}

/// Lays out the file that starts with `bytes`.
///
/// # Panics
/// Where `bytes` is shorter than the headers: the suite only gives it files of its own.
pub fn oracle(bytes: &[u8]) -> Oracle {
    let [blocks, experts, h, i] = [36, 40, 48, 52].map(|at| u32_at(bytes, at));
    let [head_dim, heads, kv_heads] = [60, 64, 68].map(|at| u32_at(bytes, at));
    let [special, text, regex_size, tokens_size] = [132, 136, 140, 144].map(|at| u32_at(bytes, at));
    let uuids_end = 148 + 16 * special;
    let regex_end = uuids_end + regex_size;
    let mut oracle = Oracle {
        tensors: BTreeMap::new(),
        paddings: BTreeMap::new(),
        special_uuids: 148..uuids_end,
        regex: uuids_end..regex_end,
        text_tokens: regex_end..regex_end + tokens_size,
        len: regex_end + tokens_size,
    };
    let mut put = |name: String, bytes: u64, align: u64| {
        let start = oracle.len.div_ceil(align) * align;
        if start > oracle.len {
            oracle.paddings.insert(name.clone(), oracle.len..start);
        }
        oracle.tensors.insert(name, start..start + bytes);
        oracle.len = start + bytes;
    };
    let vocabulary = special + text;
    let qkv = (heads + 2 * kv_heads) * head_dim;
    put("embedding.weight".into(), vocabulary * h * 2, 16384);
    for block in 0..blocks {
        for (name, bytes, align) in [
            ("attn.norm.scale", h * 2, 16),
            ("attn.qkv.weight", qkv * h * 2, 16),
            ("attn.qkv.bias", qkv * 2, 1),
            ("attn.sinks", heads * 2, 16),
            ("attn.out.weight", h * heads * head_dim * 2, 16),
            ("attn.out.bias", h * 2, 1),
            ("mlp.norm.scale", h * 2, 16),
            ("mlp.gate.weight", experts * h * 2, 16),
            ("mlp.gate.bias", experts * 2, 1),
        ] {
            put(format!("block.{block}.{name}"), bytes, align);
        }
    }
    put("norm.scale".into(), h * 2, 16);
    put("unembedding.weight".into(), vocabulary * h * 2, 16);
    for block in 0..blocks {
        for expert in 0..experts {
            for (name, bytes, align) in [
                ("mlp1_weight.blocks", 2 * i * h / 2, if expert == 0 { 16384 } else { 16 }),
                ("mlp1_weight.scales", 2 * i * h / 32, 16),
                ("mlp1_bias", 2 * i * 2, 16),
                ("mlp2_weight.blocks", h * i / 2, 16),
                ("mlp2_weight.scales", h * i / 32, 16),
                ("mlp2_bias", h * 2, 16),
            ] {
                put(format!("block.{block}.mlp.{name}[{expert}]"), bytes, align);
            }
        }
    }
    oracle
}
