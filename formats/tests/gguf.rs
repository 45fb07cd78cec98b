//! GGUF both ways: round trips, the forms that other writers use, o200k's merges, hostile files.

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use binrw::{BinRead, BinWrite};
use formats::canonical::{self, Source};
use formats::gguf::container::{Array, Container, Description, Entry, GgmlType, TensorInfo, Text, Value};
use formats::gguf::{self, Model};
use formats::model_bin::header::{ModelHeader, Uuid};
use formats::model_bin::tensors::{Dims, TensorId, TensorKind};
use formats::progress::Progress;
use formats::vocabulary::{O200K_REGEX, SPECIAL_TOKENS, Vocabulary};
use formats::{Error, Result, Rule, Violation};
use rayon::prelude::*;

/// A model whose bytes are a function of tensor, row and position, so that none need be kept.
struct Synthetic {
    header: ModelHeader,
    dims: Dims,
    vocabulary: Vocabulary,
}

impl Synthetic {
    fn new(header: ModelHeader, vocabulary: Vocabulary) -> Synthetic {
        let dims = Dims::new(&header, vocabulary.len()).expect("sound sizes");
        Synthetic { header, dims, vocabulary }
    }

    fn small() -> Synthetic {
        Synthetic::new(header(), small_vocabulary())
    }
}

impl Source for Synthetic {
    fn header(&self) -> &ModelHeader {
        &self.header
    }
    fn dims(&self) -> &Dims {
        &self.dims
    }
    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let row_bytes = tensor.kind.row_bytes(&self.dims) as usize;
        for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
            let seed = (row << 16) ^ (u64::from(tensor.block) << 8) ^ tensor.kind as u64;
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for byte in out {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = (state >> 32) as u8;
                if tensor.kind.is_scales() {
                    *byte %= 241;
                }
            }
        }
        Ok(())
    }
    fn check_values(&self, _: &dyn Progress) -> Result<()> {
        Ok(())
    }
}

/// The released models' numbers, with small sizes that differ from one another where they can.
fn header() -> ModelHeader {
    let f32 = |hex: [u8; 4]| f32::from_le_bytes(hex);
    ModelHeader {
        context_length: 131_072,
        num_blocks: 2,
        num_experts: 5,
        num_active_experts: 4,
        embedding_dim: 64,
        mlp_dim: 96,
        swiglu_limit: 7.0,
        head_dim: 64,
        num_heads: 3,
        num_kv_heads: 1,
        attention_window: 128,
        // facts.md, from the genuine exporter
        rope_theta: f32([0x00, 0x7c, 0x12, 0x48]),
        interpolation_scale: f32([0x00, 0x00, 0x00, 0x3d]),
        yarn_offset: f32([0xb6, 0xa4, 0x5e, 0xbf]),
        yarn_scale: f32([0x46, 0x17, 0xdc, 0x3d]),
        yarn_multiplier: f32([0x86, 0x5c, 0xac, 0x3f]),
        rmsnorm_epsilon: f32([0xac, 0xc5, 0x27, 0x37]),
    }
}

fn small_vocabulary() -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.extend([
        b"th".to_vec(),
        b"the".to_vec(),
        b" the".to_vec(),
        b"\n\n".to_vec(),
        vec![0xe2, 0x80],
        b"in".to_vec(),
    ]);
    let mut records = Vec::new();
    for token in &tokens {
        records.extend((token.len() as u16).to_le_bytes());
        records.extend(token);
    }
    let mut special_uuids = vec![Uuid::default(); 16];
    for token in SPECIAL_TOKENS.iter().filter(|token| token.id != 200_001) {
        special_uuids[token.id as usize - 199_998] = token.uuid;
    }
    Vocabulary { special_uuids, regex: r"\p{L}+|\P{L}".into(), records, num_text_tokens: tokens.len() as u32 }
}

fn tensor_bytes(source: &dyn Source, id: TensorId) -> Vec<u8> {
    let mut bytes = vec![0; (id.kind.rows(source.dims()) * id.kind.row_bytes(source.dims())) as usize];
    source.read_rows(id, 0..id.kind.rows(source.dims()), &mut bytes).expect("readable");
    bytes
}

fn assert_same(a: &dyn Source, b: &dyn Source) {
    assert_eq!(a.header(), b.header());
    assert_eq!(a.dims(), b.dims());
    assert!(a.vocabulary() == b.vocabulary(), "vocabularies differ");
    for id in a.dims().tensors() {
        assert!(tensor_bytes(a, id) == tensor_bytes(b, id), "{id} differs");
    }
}

fn written(source: &dyn Source) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    gguf::write(source, &path, Some("synthetic"), &()).expect("written");
    std::fs::read(path).expect("read")
}

fn model(bytes: &[u8]) -> Result<Model> {
    Model::from_bytes(Path::new("memory"), bytes.to_vec())
}

fn violations(bytes: &[u8]) -> Vec<Violation> {
    match model(bytes) {
        Err(Error::Invalid { violations, .. }) => violations,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}

fn assert_refused(bytes: &[u8], rule: Rule, field: &str) {
    let violations = violations(bytes);
    assert!(
        violations.iter().any(|violation| violation.rule == rule && violation.field.contains(field)),
        "needed {rule} about {field}, found {violations:#?}"
    );
}

/// A file taken apart, so that a test can change something and put it together again.
struct Parts {
    metadata: Vec<Entry>,
    tensors: Vec<(TensorInfo, Vec<u8>)>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Parts {
        let description = Description::read(&mut Cursor::new(bytes)).expect("a description");
        let container = Container::read(Cursor::new(bytes), bytes.len() as u64).expect("a container");
        let data = |info: &TensorInfo| {
            let range = &container.tensor(&info.name.0).expect("listed").range;
            bytes[range.start as usize..range.end as usize].to_vec()
        };
        let tensors = description.tensors.into_iter().map(|info| (info.clone(), data(&info))).collect();
        Parts { metadata: description.metadata, tensors }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.remove(key);
        self.metadata.push(Entry { key: key.into(), value });
    }

    fn remove(&mut self, key: &str) {
        self.metadata.retain(|entry| entry.key.0 != key);
    }

    fn tensor(&mut self, name: &str) -> &mut (TensorInfo, Vec<u8>) {
        self.tensors.iter_mut().find(|(info, _)| info.name.0 == name).expect("such a tensor")
    }

    fn strings(&self, key: &str) -> Vec<String> {
        let entry = self.metadata.iter().find(|entry| entry.key.0 == key).expect("such a key");
        let Value::Array(Array::String(texts)) = &entry.value else { panic!("{key} holds no strings") };
        texts.iter().map(|text| text.0.clone()).collect()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut data = Vec::new();
        let mut tensors = Vec::new();
        for (info, bytes) in &self.tensors {
            tensors.push(TensorInfo { offset: data.len() as u64, ..info.clone() });
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        described(&Description { metadata: self.metadata.clone(), tensors }, &data)
    }
}

fn described(description: &Description, data: &[u8]) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    description.write(&mut bytes).expect("written");
    let mut bytes = bytes.into_inner();
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend(data);
    bytes
}

fn id(kind: TensorKind, block: u32) -> TensorId {
    TensorId { kind, block }
}

#[test]
fn what_is_written_is_read_again() {
    let source = Synthetic::small();
    let bytes = written(&source);
    let model = model(&bytes).expect("a model");
    assert_same(&source, &model);
    assert_eq!(model.changed(), []);
    assert_eq!(bytes, written(&model), "writing what was read");
}

#[test]
fn rows_can_be_read_in_any_pieces() {
    let source = Synthetic::small();
    let model = model(&written(&source)).expect("a model");
    for id in source.dims().tensors() {
        let whole = tensor_bytes(&source, id);
        let row_bytes = id.kind.row_bytes(source.dims()) as usize;
        let rows = id.kind.rows(source.dims());
        for step in [1, 3, 7, 64] {
            for run in canonical::runs(0..rows, 1, 1, step) {
                let mut piece = vec![0; (run.end - run.start) as usize * row_bytes];
                model.read_rows(id, run.clone(), &mut piece).expect("readable");
                assert!(piece == whole[run.start as usize * row_bytes..][..piece.len()], "{id} {run:?}");
            }
        }
    }
}

/// Headers whose words need keys that GGUF cannot hold exactly, or a config that nobody would write.
#[test]
fn every_header_comes_back() {
    let mut headers = vec![
        ModelHeader { context_length: 6963, interpolation_scale: (1.0 / 1.7) as f32, ..header() },
        ModelHeader { yarn_offset: -1.234_567_8, yarn_scale: 0.333_333_34, ..header() },
        ModelHeader { rope_theta: 150_000.02, swiglu_limit: 6.999_999, ..header() },
        ModelHeader { rmsnorm_epsilon: 1e-6, attention_window: 4096, ..header() },
    ];
    headers.push(ModelHeader { num_blocks: 0, ..header() });
    for header in headers {
        let source = Synthetic::new(header, small_vocabulary());
        let model = model(&written(&source)).expect("a model");
        assert_eq!(model.header(), &header);
    }
}

#[test]
fn tensors_are_where_llama_cpp_looks_for_them() {
    let source = Synthetic::small();
    let parts = Parts::of(&written(&source));
    let found: BTreeMap<&str, (u32, &[u64])> = parts
        .tensors
        .iter()
        .map(|(info, _)| (info.name.0.as_str(), (info.ty, info.axes.as_slice())))
        .collect();
    // H 64, I 96, E 5, 3 query heads and 1 key head of 64, 262 text and 16 special tokens
    let mut expected: BTreeMap<String, (u32, Vec<u64>)> = BTreeMap::new();
    let (f32, bf16, mxfp4) = (0, 30, 39);
    expected.insert("token_embd.weight".into(), (bf16, vec![64, 278]));
    expected.insert("output.weight".into(), (bf16, vec![64, 278]));
    expected.insert("output_norm.weight".into(), (f32, vec![64]));
    for block in 0..2 {
        for (name, ty, axes) in [
            ("attn_norm.weight", f32, vec![64]),
            ("post_attention_norm.weight", f32, vec![64]),
            ("attn_q.weight", bf16, vec![64, 192]),
            ("attn_k.weight", bf16, vec![64, 64]),
            ("attn_v.weight", bf16, vec![64, 64]),
            ("attn_q.bias", f32, vec![192]),
            ("attn_k.bias", f32, vec![64]),
            ("attn_v.bias", f32, vec![64]),
            ("attn_output.weight", bf16, vec![192, 64]),
            ("attn_output.bias", f32, vec![64]),
            ("attn_sinks.weight", f32, vec![3]),
            ("ffn_gate_inp.weight", f32, vec![64, 5]),
            ("ffn_gate_inp.bias", f32, vec![5]),
            ("ffn_gate_exps.weight", mxfp4, vec![64, 96, 5]),
            ("ffn_up_exps.weight", mxfp4, vec![64, 96, 5]),
            ("ffn_down_exps.weight", mxfp4, vec![96, 64, 5]),
            ("ffn_gate_exps.bias", f32, vec![96, 5]),
            ("ffn_up_exps.bias", f32, vec![96, 5]),
            ("ffn_down_exps.bias", f32, vec![64, 5]),
        ] {
            expected.insert(format!("blk.{block}.{name}"), (ty, axes));
        }
    }
    let expected: BTreeMap<&str, (u32, &[u64])> =
        expected.iter().map(|(name, (ty, axes))| (name.as_str(), (*ty, axes.as_slice()))).collect();
    assert_eq!(found, expected);
}

/// The element that the original checkpoint has at [expert, row, column], as code and scale.
fn mlp1_element(blocks: &[u8], scales: &[u8], [expert, row, column]: [usize; 3]) -> (u8, u8) {
    let block = (expert * 192 + row) * 2 + column / 32;
    let byte = blocks[block * 16 + column % 32 / 2];
    (if column % 2 == 0 { byte & 15 } else { byte >> 4 }, scales[block])
}

#[test]
fn gate_and_up_rows_and_nibbles_are_ggmls() {
    let source = Synthetic::small();
    let mut parts = Parts::of(&written(&source));
    let blocks = tensor_bytes(&source, id(TensorKind::Mlp1Blocks, 1));
    let scales = tensor_bytes(&source, id(TensorKind::Mlp1Scales, 1));
    let bias = tensor_bytes(&source, id(TensorKind::Mlp1Bias, 1));
    for (parity, name) in ["gate", "up"].into_iter().enumerate() {
        let weights = parts.tensor(&format!("blk.1.ffn_{name}_exps.weight")).1.clone();
        let biases = parts.tensor(&format!("blk.1.ffn_{name}_exps.bias")).1.clone();
        for (expert, row) in (0..5).flat_map(|expert| (0..96).map(move |row| (expert, row))) {
            for column in 0..64 {
                let block = &weights[((expert * 96 + row) * 2 + column / 32) * 17..][..17];
                let byte = block[1 + column % 16];
                let code = if column % 32 < 16 { byte & 15 } else { byte >> 4 };
                let needed = mlp1_element(&blocks, &scales, [expert, 2 * row + parity, column]);
                assert_eq!((code, block[0]), needed, "{name} {expert} {row} {column}");
            }
            let original = &bias[(expert * 192 + 2 * row + parity) * 2..][..2];
            let wide = &biases[(expert * 96 + row) * 4..][..4];
            assert_eq!([0, 0, original[0], original[1]], wide, "{name} bias {expert} {row}");
        }
    }
}

#[test]
fn wide_values_are_rounded_to_even_and_reported() {
    let mut parts = Parts::of(&written(&Synthetic::small()));
    let values: [(u32, u16); 6] = [
        (0x3f80_8000, 0x3f80), // half way: to even, down
        (0x3f81_8000, 0x3f82), // half way: to even, up
        (0x3f80_8001, 0x3f81),
        (0x0000_8001, 0x0001), // a subnormal
        (0x8000_0000, 0x8000), // −0, exact
        (0x7f7f_ffff, 0x7f80), // to infinity
    ];
    let norm = &mut parts.tensor("blk.1.attn_norm.weight").1;
    for (bytes, (wide, _)) in norm.chunks_exact_mut(4).zip(values) {
        bytes.copy_from_slice(&wide.to_le_bytes());
    }
    // A matrix in F16: 1.5 is a BF16, 1 + 2^-10 is not.
    for (name, bits) in [("blk.0.attn_k.weight", 0x3e00u16), ("blk.1.attn_output.weight", 0x3c01)] {
        let (info, data) = parts.tensor(name);
        info.ty = GgmlType::F16.id;
        data.chunks_exact_mut(2).for_each(|value| value.copy_from_slice(&bits.to_le_bytes()));
    }
    let model = model(&parts.bytes()).expect("a model");
    let norm = tensor_bytes(&model, id(TensorKind::AttnNorm, 1));
    for (bytes, (wide, narrow)) in norm.chunks_exact(2).zip(values) {
        assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), narrow, "{wide:08x}");
    }
    let qkv = tensor_bytes(&model, id(TensorKind::QkvWeight, 0));
    assert_eq!(qkv[192 * 128..][..2], 0x3fc0u16.to_le_bytes());
    let changed: Vec<TensorId> = model.changed().into_iter().map(|(id, _)| id).collect();
    assert_eq!(changed, [id(TensorKind::AttnNorm, 1), id(TensorKind::OutWeight, 1)]);
    assert!(model.changed()[0].1.starts_with("5 values"), "{:?}", model.changed());
}

#[test]
fn matrices_may_be_f32_and_norms_bf16() {
    let source = Synthetic::small();
    let mut parts = Parts::of(&written(&source));
    for (info, data) in &mut parts.tensors {
        if info.ty == GgmlType::F32.id {
            info.ty = GgmlType::BF16.id;
            *data = data.chunks_exact(4).flat_map(|wide| [wide[2], wide[3]]).collect();
        } else if info.ty == GgmlType::BF16.id {
            info.ty = GgmlType::F32.id;
            *data = data.chunks_exact(2).flat_map(|narrow| [0, 0, narrow[0], narrow[1]]).collect();
        }
    }
    let model = model(&parts.bytes()).expect("a model");
    assert_same(&source, &model);
    assert_eq!(model.changed(), []);
}

/// A file as llama.cpp's converter writes it, without our keys, gives the words of the genuine exporter.
#[test]
fn the_header_is_computed_as_the_exporter_does() {
    let mut parts = Parts::of(&written(&Synthetic::small()));
    parts.remove("burn_extended.model_header");
    assert_eq!(model(&parts.bytes()).expect("a model").header(), &header());
    for key in [
        "gpt-oss.rope.scaling.yarn_beta_fast",
        "gpt-oss.rope.scaling.yarn_beta_slow",
        "gpt-oss.feed_forward_length",
    ] {
        parts.remove(key);
    }
    assert_eq!(model(&parts.bytes()).expect("a model").header(), &header());
}

#[test]
fn keys_that_contradict_the_stored_header_are_refused() {
    let bytes = written(&Synthetic::small());
    for (key, value) in [
        ("gpt-oss.rope.freq_base", Value::F32(10_000.0)),
        ("gpt-oss.rope.scaling.factor", Value::F32(16.0)),
        ("gpt-oss.context_length", Value::U32(4096)),
        ("gpt-oss.attention.sliding_window", Value::U32(64)),
        ("gpt-oss.attention.sliding_window", Value::String("128".into())),
    ] {
        let mut parts = Parts::of(&bytes);
        parts.set(key, value);
        assert_refused(&parts.bytes(), Rule::SourceConfig, key);
    }
    let mut parts = Parts::of(&bytes);
    parts.set("burn_extended.model_header", Value::Array(Array::U8(vec![0; 68])));
    assert!(!violations(&parts.bytes()).is_empty());
    parts.set("burn_extended.model_header", Value::Array(Array::U8(vec![0; 67])));
    assert_refused(&parts.bytes(), Rule::SourceConfig, "burn_extended.model_header");
}

#[test]
fn every_key_is_needed_and_typed() {
    let mut parts = Parts::of(&written(&Synthetic::small()));
    parts.remove("burn_extended.model_header");
    let bytes = parts.bytes();
    model(&bytes).expect("a model without our header");
    for key in [
        "general.architecture",
        "gpt-oss.context_length",
        "gpt-oss.embedding_length",
        "gpt-oss.block_count",
        "gpt-oss.expert_feed_forward_length",
        "gpt-oss.attention.head_count",
        "gpt-oss.attention.head_count_kv",
        "gpt-oss.attention.key_length",
        "gpt-oss.attention.value_length",
        "gpt-oss.attention.layer_norm_rms_epsilon",
        "gpt-oss.attention.sliding_window",
        "gpt-oss.rope.freq_base",
        "gpt-oss.rope.scaling.type",
        "gpt-oss.rope.scaling.factor",
        "gpt-oss.rope.scaling.original_context_length",
        "gpt-oss.expert_count",
        "gpt-oss.expert_used_count",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
    ] {
        let mut parts = Parts::of(&bytes);
        parts.remove(key);
        assert_refused(&parts.bytes(), Rule::SourceConfig, key);
        parts.set(key, Value::Array(Array::Bool(Vec::new())));
        assert_refused(&parts.bytes(), Rule::SourceConfig, key);
    }
    for (key, value, rule) in [
        ("general.architecture", Value::String("llama".into()), Rule::SourceConfig),
        ("gpt-oss.expert_used_count", Value::U32(2), Rule::SourceActiveExperts),
        ("gpt-oss.expert_count", Value::U32(3), Rule::SourceExperts),
        ("gpt-oss.embedding_length", Value::U32(65), Rule::SourceMultiple),
        ("gpt-oss.attention.value_length", Value::U32(128), Rule::SourceConfig),
        ("gpt-oss.attention.head_count", Value::U32(0), Rule::SourceConfig),
        ("gpt-oss.rope.scaling.type", Value::String("linear".into()), Rule::SourceConfig),
        ("gpt-oss.rope.freq_base", Value::F32(1.0), Rule::SourceConfig),
        ("gpt-oss.rope.scaling.factor", Value::F32(f32::NAN), Rule::SourceConfig),
        ("gpt-oss.attention.layer_norm_rms_epsilon", Value::F32(-1e-5), Rule::SourceConfig),
        ("tokenizer.ggml.model", Value::String("llama".into()), Rule::SourceConfig),
    ] {
        let mut parts = Parts::of(&bytes);
        parts.set(key, value);
        assert_refused(&parts.bytes(), rule, key);
    }
}

#[test]
fn unfit_tensors_are_refused_by_name() {
    let bytes = written(&Synthetic::small());
    // A dense matrix in Q8_0: blocks of 34 bytes for 32 values.
    let mut parts = Parts::of(&bytes);
    let (info, data) = parts.tensor("blk.1.attn_q.weight");
    (info.ty, *data) = (8, vec![0; 64 * 192 / 32 * 34]);
    assert_refused(&parts.bytes(), Rule::SourceDtype, "blk.1.attn_q.weight");
    // Experts in BF16.
    let mut parts = Parts::of(&bytes);
    let (info, data) = parts.tensor("blk.0.ffn_up_exps.weight");
    (info.ty, *data) = (GgmlType::BF16.id, vec![0; 64 * 96 * 5 * 2]);
    let found = violations(&parts.bytes());
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!((found[0].rule, found[0].field.as_str()), (Rule::SourceDtype, "blk.0.ffn_up_exps.weight"));
    // MXFP4 where BF16 belongs.
    let mut parts = Parts::of(&bytes);
    let (info, data) = parts.tensor("output.weight");
    (info.ty, *data) = (GgmlType::MXFP4.id, vec![0; 64 * 278 / 32 * 17]);
    assert_refused(&parts.bytes(), Rule::SourceDtype, "output.weight");
    // Another shape of the same size.
    let mut parts = Parts::of(&bytes);
    parts.tensor("blk.0.attn_output.weight").0.axes = vec![64, 192];
    assert_refused(&parts.bytes(), Rule::SourceShape, "blk.0.attn_output.weight");
    let mut parts = Parts::of(&bytes);
    let (info, data) = parts.tensor("token_embd.weight");
    info.axes[1] -= 1;
    data.truncate(64 * 2 * 277);
    assert_refused(&parts.bytes(), Rule::SourceRows, "token_embd.weight");
    // A missing tensor, one too many, and the same one twice.
    let mut parts = Parts::of(&bytes);
    parts.tensors.retain(|(info, _)| info.name.0 != "blk.1.attn_sinks.weight");
    assert_refused(&parts.bytes(), Rule::SourceMissing, "blk.1.attn_sinks.weight");
    let mut parts = Parts::of(&bytes);
    let mut another = parts.tensors[0].clone();
    another.0.name = "rope_freqs.weight".into();
    parts.tensors.push(another.clone());
    assert_refused(&parts.bytes(), Rule::SourceContainer, "rope_freqs.weight");
    another.0.name = "output_norm.weight".into();
    parts.tensors.pop();
    parts.tensors.push(another);
    assert_refused(&parts.bytes(), Rule::SourceDuplicate, "output_norm.weight");
    // Blocks by the thousand million.
    let mut parts = Parts::of(&bytes);
    parts.remove("burn_extended.model_header");
    parts.set("gpt-oss.block_count", Value::U32(1 << 30));
    assert_refused(&parts.bytes(), Rule::SourceMissing, "blk.2.");
}

#[test]
fn unfit_vocabularies_are_refused() {
    let bytes = written(&Synthetic::small());
    let tokens = Parts::of(&bytes).strings("tokenizer.ggml.tokens");
    let with_token = |id: usize, spelling: &str| {
        let mut parts = Parts::of(&bytes);
        let mut tokens = tokens.clone();
        tokens[id] = spelling.into();
        parts.set(
            "tokenizer.ggml.tokens",
            Value::Array(Array::String(tokens.into_iter().map(Text).collect())),
        );
        parts.bytes()
    };
    assert_refused(&with_token(7, "a b"), Rule::SourceContainer, "tokens[7]");
    assert_refused(&with_token(7, ""), Rule::TokenEmpty, "tokens[7]");
    assert_refused(&with_token(7, &"a".repeat(65_536)), Rule::TokenRecords, "tokens[7]");
    let mut parts = Parts::of(&bytes);
    parts.set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![3; tokens.len()])));
    assert_refused(&parts.bytes(), Rule::SourceConfig, "token_type");
    let mut parts = Parts::of(&bytes);
    parts.remove("burn_extended.tokenizer.special_uuids");
    assert_refused(&parts.bytes(), Rule::SourceConfig, "burn_extended.tokenizer");
    // Without our keys the pattern's name must be o200k's, and then there must be as many tokens.
    parts.remove("burn_extended.tokenizer.regex");
    assert_refused(&parts.bytes(), Rule::SourceConfig, "tokenizer.ggml.pre");
    parts.set("tokenizer.ggml.pre", Value::String("gpt-4o".into()));
    assert_refused(&parts.bytes(), Rule::SourceRows, "tokenizer.ggml.tokens");
}

/// Two tokens of one spelling would make llama.cpp abort.
#[test]
fn a_text_token_spelled_like_a_special_one_cannot_be_written() {
    let mut vocabulary = small_vocabulary();
    let token = b"<|start|>";
    vocabulary.records.extend((token.len() as u16).to_le_bytes());
    vocabulary.records.extend(token);
    vocabulary.num_text_tokens += 1;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let result = gguf::write(&Synthetic::new(header(), vocabulary), &path, None, &());
    assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);
}

/// One block with sizes as small as they can be, and where its tensor data starts.
fn smallest() -> (Vec<u8>, usize) {
    let header = ModelHeader {
        num_blocks: 1,
        num_experts: 4,
        embedding_dim: 32,
        mlp_dim: 32,
        num_heads: 1,
        ..header()
    };
    let bytes = written(&Synthetic::new(header, small_vocabulary()));
    let container = Container::read(Cursor::new(&bytes), bytes.len() as u64).expect("a container");
    let data = container.tensors().map(|(_, tensor)| tensor.range.start).min().expect("tensors");
    (bytes, data as usize)
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (bytes, data) = smallest();
    // The padding behind the last tensor is no tensor's.
    let end = bytes.len() - 31;
    (0..data).chain((data..end).step_by(61)).par_bridge().for_each(|length| {
        let container = Container::read(Cursor::new(&bytes[..length]), length as u64);
        assert!(container.is_err(), "accepted {length} of {} bytes", bytes.len());
    });
}

#[test]
fn no_byte_of_the_descriptions_can_make_it_panic() {
    let (bytes, data) = smallest();
    (0..data).into_par_iter().step_by(5).for_each(|position| {
        for value in [0, 1, 9, 0xff] {
            let mut bytes = bytes.clone();
            bytes[position] = value;
            // Some are still models; what matters is that all end here.
            let _ = model(&bytes);
        }
    });
}

fn raw(version: u32, tensors: u64, metadata: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(metadata.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn key(name: &str, ty: u32) -> Vec<u8> {
    let mut bytes = (name.len() as u64).to_le_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend(ty.to_le_bytes());
    bytes
}

fn refusal(bytes: &[u8]) -> Violation {
    let mut violations = Container::read(Cursor::new(bytes), bytes.len() as u64).expect_err("accepted");
    violations.remove(0)
}

#[test]
fn hostile_headers_are_refused() {
    assert_eq!(refusal(b"").field, "counts");
    assert_eq!(refusal(b"GGML\x03\0\0\0").field, "magic");
    assert!(refusal(&raw(2, 0, 0, &[])).found.contains("version 2"));
    assert!(refusal(&raw(3u32.swap_bytes(), 0, 0, &[])).found.contains("big-endian"));
    Container::read(Cursor::new(raw(3, 0, 0, &[])), 24).expect("an empty container");
    // Counts that no file can hold drive no allocation.
    assert_eq!(refusal(&raw(3, 0, u64::MAX, &[])).field, "entry 0");
    assert_eq!(refusal(&raw(3, u64::MAX, 0, &[])).field, "entry 0");
    let mut string = key("k", 8);
    string.extend(u64::MAX.to_le_bytes());
    assert_eq!(refusal(&raw(3, 0, 1, &string)).field, "entry 0");
    for element in [0u32, 8, 9, 12] {
        let mut array = key("k", 9);
        array.extend(element.to_le_bytes());
        array.extend(u64::MAX.to_le_bytes());
        array.extend([0; 64]);
        assert_eq!(refusal(&raw(3, 0, 1, &array)).section, "GGUF metadata", "array of type {element}");
    }
    assert!(refusal(&raw(3, 0, 1, &key("k", 13))).found.contains("type 13"));
    let mut flag = key("k", 7);
    flag.push(2);
    assert_eq!(refusal(&raw(3, 0, 1, &flag)).field, "entry 0");
    let mut name = key("k", 8);
    name.extend(2u64.to_le_bytes());
    name.extend([0xff, 0xfe]);
    assert!(refusal(&raw(3, 0, 1, &name)).found.contains("UTF-8"));
    let mut twice = key("k", 0);
    twice.push(0);
    twice.extend(twice.clone());
    assert_eq!(refusal(&raw(3, 0, 2, &twice)).rule, Rule::SourceDuplicate);
}

#[test]
fn arrays_may_be_nested_four_deep() {
    let nested = |depth: usize| {
        let mut bytes = key("k", 9);
        for _ in 1..depth {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.push(42);
        raw(3, 0, 1, &bytes)
    };
    let four = nested(4);
    let container = Container::read(Cursor::new(&four), four.len() as u64).expect("four are fine");
    let innermost = Array::U8(vec![42]);
    let value = (0..3).fold(innermost, |inner, _| Array::Array(vec![inner]));
    assert_eq!(container.value("k"), Some(&Value::Array(value)));
    for depth in [5, 100_000] {
        assert!(refusal(&nested(depth)).found.contains("nested"), "{depth}");
    }
}

#[test]
fn every_value_type_is_read_as_written() {
    let scalars = [
        Value::U8(0xfe),
        Value::I8(-2),
        Value::U16(0xfffe),
        Value::I16(-2),
        Value::U32(0xffff_fffe),
        Value::I32(-2),
        Value::F32(-0.1),
        Value::Bool(formats::gguf::container::Flag(true)),
        Value::String("ĠHello".into()),
        Value::U64(u64::MAX - 1),
        Value::I64(-2),
        Value::F64(0.1),
        Value::Array(Array::I16(vec![1, -1])),
        Value::Array(Array::String(vec!["a".into(), "".into()])),
        Value::Array(Array::Array(vec![Array::F64(vec![0.5]), Array::Bool(Vec::new())])),
    ];
    let metadata = scalars
        .iter()
        .zip(0..)
        .map(|(value, index)| Entry { key: Text(format!("k{index}")), value: value.clone() });
    let bytes = described(&Description { metadata: metadata.collect(), tensors: Vec::new() }, &[]);
    let container = Container::read(Cursor::new(&bytes), bytes.len() as u64).expect("a container");
    for (index, value) in scalars.iter().enumerate() {
        assert_eq!(container.value(&format!("k{index}")), Some(value));
    }
    // The first, byte by byte as ggml's gguf.md has it: length and bytes of the key, type, value.
    assert_eq!(bytes[24..39], [2, 0, 0, 0, 0, 0, 0, 0, b'k', b'0', 0, 0, 0, 0, 0xfe]);
}

#[test]
fn hostile_tensor_descriptions_are_refused() {
    let info = |name: &str, axes: &[u64], ty: u32, offset: u64| TensorInfo {
        name: name.into(),
        axes: axes.into(),
        ty,
        offset,
    };
    let file = |metadata: Vec<Entry>, tensors: Vec<TensorInfo>| {
        described(&Description { metadata, tensors }, &[0; 4096])
    };
    let refused = |tensor: TensorInfo| refusal(&file(Vec::new(), vec![tensor]));
    for (axes, ty, offset) in [
        (&[u64::MAX, u64::MAX, u64::MAX, u64::MAX][..], 0, 0),
        (&[1 << 32, 1 << 32], 0, 0),
        (&[1 << 62], 0, 0),
        (&[32], 0, u64::MAX - 31),
        (&[32], 0, 1 << 40),
        (&[1025], 0, 0),
        (&[8], 0, 16),
        (&[33], 39, 0),
        (&[8], 4, 0),
        (&[8], u32::MAX, 0),
    ] {
        let violation = refused(info("t", axes, ty, offset));
        assert_eq!(
            (violation.rule, violation.field.as_str()),
            (Rule::SourceContainer, "t"),
            "{axes:?} {ty} {offset}"
        );
    }
    assert!(refused(info("t", &[1; 5], 0, 0)).found.contains("5 axes"));
    assert_eq!(refused(info("t", &[1; u16::MAX as usize], 0, 0)).section, "GGUF tensor descriptions");

    let overlap = refusal(&file(Vec::new(), vec![info("b", &[16], 0, 32), info("a", &[9], 0, 0)]));
    assert_eq!(overlap.field, "b");
    assert!(overlap.found.contains("shared with a"), "{overlap}");
    let bytes =
        file(Vec::new(), vec![info("b", &[16], 0, 32), info("a", &[8], 0, 0), info("empty", &[0], 0, 32)]);
    let container = Container::read(Cursor::new(&bytes), bytes.len() as u64).expect("neighbours");
    let range = |name| container.tensor(name).expect("there").range.clone();
    assert_eq!((range("a").end, range("b").end), (range("b").start, range("b").start + 64));

    for alignment in
        [Value::U32(0), Value::U32(48), Value::U32(1 << 31), Value::U64(32), Value::String("32".into())]
    {
        let metadata = vec![Entry { key: "general.alignment".into(), value: alignment }];
        assert_eq!(refusal(&file(metadata, Vec::new())).field, "general.alignment");
    }
    let metadata = vec![Entry { key: "general.alignment".into(), value: Value::U32(64) }];
    assert!(refusal(&file(metadata, vec![info("t", &[8], 0, 32)])).needed.contains("alignment 64"));
}

/// The smallest model with the full vocabulary.
fn full_vocabulary() -> Synthetic {
    let header = ModelHeader {
        num_blocks: 1,
        num_experts: 4,
        embedding_dim: 32,
        mlp_dim: 32,
        num_heads: 1,
        num_kv_heads: 1,
        ..header()
    };
    Synthetic::new(header, Vocabulary::o200k().clone())
}

/// GPT-2's BPE, straight from its definition: join the neighbours whose merge comes first, everywhere, until there is none.
fn encode(piece: &str, merges: &HashMap<(&str, &str), usize>, ids: &HashMap<&str, u32>) -> Vec<u32> {
    let mut parts: Vec<String> = piece.chars().map(String::from).collect();
    loop {
        let rank = |pair: &[String]| merges.get(&(pair[0].as_str(), pair[1].as_str())).copied();
        let Some(best) = parts.windows(2).filter_map(rank).min() else {
            break;
        };
        let mut joined: Vec<String> = Vec::new();
        let mut index = 0;
        while index < parts.len() {
            let pair = parts.get(index..index + 2);
            if let Some(pair) = pair.filter(|pair| rank(pair) == Some(best)) {
                joined.push(pair.concat());
                index += 2;
            } else {
                joined.push(parts[index].clone());
                index += 1;
            }
        }
        parts = joined;
    }
    parts.iter().map(|part| ids[part.as_str()]).collect()
}

#[test]
fn o200k_merges_encode_as_tiktoken_does() {
    let source = full_vocabulary();
    let mut parts = Parts::of(&written(&source));
    let (tokens, merges) = (parts.strings("tokenizer.ggml.tokens"), parts.strings("tokenizer.ggml.merges"));
    assert_eq!(tokens.len(), 200_014);
    assert_eq!(tokens[199_998], "<|startoftext|>");
    // Every token of two bytes and more has a merge.
    assert_eq!(merges.len(), 199_998 - 256);
    let tiktoken = tiktoken_rs::o200k_harmony().expect("bundled");
    for (id, name) in tokens.iter().enumerate().skip(199_998) {
        assert_eq!(&tiktoken.decode(&[id as u32]).expect("decoded"), name);
    }

    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let pairs = merges.iter().map(|merge| merge.split_once(' ').expect("two parts"));
    let pairs: HashMap<(&str, &str), usize> = pairs.zip(0..).collect();
    // Single bytes are spelled by the tokens that hold only them.
    let spelling: HashMap<u8, &str> = (0..=255u8)
        .map(|byte| {
            let token =
                source.vocabulary.tokens().position(|token| token == Ok(&[byte])).expect("every byte");
            (byte, tokens[token].as_str())
        })
        .collect();
    let text = "The quick brown fox — naïve façade, 12345.678 €; 東京は日本の首都です。Привет, мир! मानक हिन्दी \
        مرحبا بالعالم 👩‍👩‍👧‍👦 \u{1F1E9}\u{1F1EA}\r\n\r\n\tfn main() { println!(\"{:?}\", vec![0u8; 1 << 20]); }      \
        don't DON'T I'll CamelCaseIdentifier snake_case_identifier https://example.org/?q=%20#x\0\u{7f}zzzzzzzzzz "
        .to_owned()
        + include_str!("../src/gguf/container.rs")
        + include_str!("gguf.rs");
    let regex = fancy_regex::Regex::new(O200K_REGEX).expect("a pattern");
    let mut found = Vec::new();
    for piece in regex.find_iter(&text) {
        let spelled: String = piece.expect("a match").as_str().bytes().map(|byte| spelling[&byte]).collect();
        found.extend(encode(&spelled, &pairs, &ids));
    }
    assert!(found == tiktoken.encode_ordinary(&text), "another encoding");

    // A file of somebody else's: no keys of ours, and the rows of a Hugging Face checkpoint.
    parts.metadata.retain(|entry| !entry.key.0.starts_with("burn_extended."));
    let padded =
        tokens.into_iter().chain((200_014..201_088).map(|id| format!("<|reserved_{id}|>"))).map(Text);
    parts.set("tokenizer.ggml.tokens", Value::Array(Array::String(padded.collect())));
    let types = (0..201_088).map(|id| if id < 199_998 { 1 } else { 3 });
    parts.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types.collect())));
    for name in ["token_embd.weight", "output.weight"] {
        let (info, data) = parts.tensor(name);
        info.axes[1] = 201_088;
        data.resize(201_088 * 64, 0xff);
    }
    assert_same(&source, &model(&parts.bytes()).expect("a model"));
}
