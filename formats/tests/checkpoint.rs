//! Checkpoint folders: what is read from each layout, and what is refused under which name.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use formats::canonical::Source;
use formats::checkpoint::{Folder, Layout, Options};
use formats::model_bin::tensors::{TensorId, TensorKind};
use formats::mxfp4;
use formats::vocabulary::Vocabulary;
use formats::{Error, Rule, Violation};
use half::bf16;
use proptest::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

const TOKENS: usize = 300;
const ROWS: usize = 310;
const BLOCKS: usize = 2;
const H: usize = 96;
const I: usize = 64;
const E: usize = 5;
const HEADS: usize = 4;
const KV: usize = 2;
const D: usize = 64;

fn vocabulary() -> Vocabulary {
    Vocabulary { special_uuids: vec![], regex: ".".into(), records: vec![], num_text_tokens: TOKENS as u32 }
}

fn options() -> Options {
    Options { vocabulary: vocabulary(), quantize: false }
}

#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A checkpoint in memory, changed by a test and then written.
#[derive(Clone)]
struct Checkpoint {
    config: Value,
    tensors: BTreeMap<String, Stored>,
    /// How many files, and whether an index names them.
    shards: usize,
    index: bool,
}

/// Bytes that differ from tensor to tensor: xorshift, seeded by the name.
fn bytes(name: &str, len: usize) -> Vec<u8> {
    let mut state = name
        .bytes()
        .fold(0x9e37_79b9_7f4a_7c15_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn stored(name: &str, dtype: Dtype, shape: &[usize]) -> Stored {
    let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let mut data = bytes(name, len);
    match dtype {
        // Finite: the top exponent bit is cleared.
        Dtype::BF16 => data.iter_mut().skip(1).step_by(2).for_each(|byte| *byte &= 0xbf),
        Dtype::U8 if name.ends_with("scales") => data.iter_mut().for_each(|byte| *byte %= 241),
        _ => {}
    }
    Stored { dtype, shape: shape.to_vec(), data }
}

fn original_config() -> Value {
    json!({
        "num_hidden_layers": BLOCKS, "num_experts": E, "experts_per_token": 4, "vocab_size": ROWS,
        "hidden_size": H, "intermediate_size": I, "swiglu_limit": 7.0, "head_dim": D,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "sliding_window": 16,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32
    })
}

fn original() -> Checkpoint {
    let mut tensors = BTreeMap::new();
    let mut put = |name: String, dtype, shape: &[usize]| {
        let tensor = stored(&name, dtype, shape);
        tensors.insert(name, tensor);
    };
    let bf16 = Dtype::BF16;
    put("embedding.weight".into(), bf16, &[ROWS, H]);
    put("unembedding.weight".into(), bf16, &[ROWS, H]);
    put("norm.scale".into(), bf16, &[H]);
    for n in 0..BLOCKS {
        let qkv = (HEADS + 2 * KV) * D;
        put(format!("block.{n}.attn.norm.scale"), bf16, &[H]);
        put(format!("block.{n}.attn.qkv.weight"), bf16, &[qkv, H]);
        put(format!("block.{n}.attn.qkv.bias"), bf16, &[qkv]);
        put(format!("block.{n}.attn.sinks"), bf16, &[HEADS]);
        put(format!("block.{n}.attn.out.weight"), bf16, &[H, HEADS * D]);
        put(format!("block.{n}.attn.out.bias"), bf16, &[H]);
        put(format!("block.{n}.mlp.norm.scale"), bf16, &[H]);
        put(format!("block.{n}.mlp.gate.weight"), bf16, &[E, H]);
        put(format!("block.{n}.mlp.gate.bias"), bf16, &[E]);
        put(format!("block.{n}.mlp.mlp1_weight.blocks"), Dtype::U8, &[E, 2 * I, H / 32, 16]);
        put(format!("block.{n}.mlp.mlp1_weight.scales"), Dtype::U8, &[E, 2 * I, H / 32]);
        put(format!("block.{n}.mlp.mlp1_bias"), bf16, &[E, 2 * I]);
        put(format!("block.{n}.mlp.mlp2_weight.blocks"), Dtype::U8, &[E, H, I / 32, 16]);
        put(format!("block.{n}.mlp.mlp2_weight.scales"), Dtype::U8, &[E, H, I / 32]);
        put(format!("block.{n}.mlp.mlp2_bias"), bf16, &[E, H]);
    }
    Checkpoint { config: original_config(), tensors, shards: 1, index: false }
}

/// The same model under Hugging Face's names (table of facts.md).
fn hugging_face() -> Checkpoint {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in original().tensors {
        let layer = name.strip_prefix("block.").and_then(|rest| rest.split_once('.'));
        let Some((n, rest)) = layer else {
            let name = match name.as_str() {
                "embedding.weight" => "model.embed_tokens.weight",
                "unembedding.weight" => "lm_head.weight",
                _ => "model.norm.weight",
            };
            tensors.insert(name.into(), tensor);
            continue;
        };
        if let Some(part) = rest.strip_prefix("attn.qkv.") {
            let mut start = 0;
            for (projection, heads) in [("q", HEADS), ("k", KV), ("v", KV)] {
                let mut shape = tensor.shape.clone();
                shape[0] = heads * D;
                let end = start + shape.iter().product::<usize>() * 2;
                let data = tensor.data[start..end].to_vec();
                start = end;
                let name = format!("model.layers.{n}.self_attn.{projection}_proj.{part}");
                tensors.insert(name, Stored { dtype: Dtype::BF16, shape, data });
            }
            continue;
        }
        let rest = match rest {
            "attn.norm.scale" => "input_layernorm.weight",
            "attn.sinks" => "self_attn.sinks",
            "attn.out.weight" => "self_attn.o_proj.weight",
            "attn.out.bias" => "self_attn.o_proj.bias",
            "mlp.norm.scale" => "post_attention_layernorm.weight",
            "mlp.gate.weight" => "mlp.router.weight",
            "mlp.gate.bias" => "mlp.router.bias",
            "mlp.mlp1_weight.blocks" => "mlp.experts.gate_up_proj_blocks",
            "mlp.mlp1_weight.scales" => "mlp.experts.gate_up_proj_scales",
            "mlp.mlp1_bias" => "mlp.experts.gate_up_proj_bias",
            "mlp.mlp2_weight.blocks" => "mlp.experts.down_proj_blocks",
            "mlp.mlp2_weight.scales" => "mlp.experts.down_proj_scales",
            "mlp.mlp2_bias" => "mlp.experts.down_proj_bias",
            other => panic!("{other}"),
        };
        tensors.insert(format!("model.layers.{n}.{rest}"), tensor);
    }
    let config = json!({
        "model_type": "gpt_oss", "num_hidden_layers": BLOCKS, "num_local_experts": E, "num_experts_per_tok": 4,
        "hidden_size": H, "intermediate_size": I, "head_dim": D, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "sliding_window": 16, "rope_theta": 150000, "rms_norm_eps": 1e-5,
        "attention_bias": true, "tie_word_embeddings": false,
        "rope_scaling": {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096}
    });
    Checkpoint { config, tensors, shards: 1, index: false }
}

/// Experts as BF16 `[E, columns, rows]`, of values between 2^-10 and 2^5 in magnitude.
fn hugging_face_bf16() -> Checkpoint {
    let mut checkpoint = hugging_face();
    for n in 0..BLOCKS {
        for (matrix, columns, rows) in [("gate_up_proj", H, 2 * I), ("down_proj", I, H)] {
            let name = format!("model.layers.{n}.mlp.experts.{matrix}");
            for suffix in ["_blocks", "_scales"] {
                checkpoint.tensors.remove(&format!("{name}{suffix}")).unwrap();
            }
            let mut tensor = stored(&name, Dtype::BF16, &[E, columns, rows]);
            for element in tensor.data.chunks_exact_mut(2) {
                let bits = u16::from_le_bytes([element[0], element[1]]);
                let exponent = 117 + (bits >> 7) % 15;
                element.copy_from_slice(&(bits & 0x807f | exponent << 7).to_le_bytes());
            }
            checkpoint.tensors.insert(name, tensor);
        }
    }
    checkpoint
}

fn serialize<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Stored)>) -> Vec<u8> {
    let views: Vec<(&String, TensorView)> = tensors
        .into_iter()
        .map(|(name, tensor)| {
            (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
        })
        .collect();
    safetensors::serialize(views, Some(HashMap::from([("format".into(), "pt".into())]))).unwrap()
}

impl Checkpoint {
    fn shard_name(&self, shard: usize) -> String {
        match self.shards {
            1 => "model.safetensors".into(),
            count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
        }
    }

    /// Neighbours in name order, such as q, k and v, come to lie in different shards.
    fn write(&self) -> TempDir {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        let mut weight_map = BTreeMap::new();
        for shard in 0..self.shards {
            let mine = self
                .tensors
                .iter()
                .enumerate()
                .filter(|(n, _)| n % self.shards == shard)
                .map(|(_, entry)| entry);
            weight_map.extend(mine.clone().map(|(name, _)| (name.clone(), self.shard_name(shard))));
            fs::write(dir.path().join(self.shard_name(shard)), serialize(mine)).unwrap();
        }
        if self.index {
            write_index(dir.path(), &json!({"metadata": {"total_size": 0}, "weight_map": weight_map}));
        }
        dir
    }

    fn tensor(&mut self, name: &str) -> &mut Stored {
        self.tensors.get_mut(name).unwrap()
    }

    fn refused(&self) -> Vec<Violation> {
        refusal(self.write().path())
    }
}

fn write_index(dir: &Path, index: &Value) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn refusal(dir: &Path) -> Vec<Violation> {
    match Folder::open(dir, options()) {
        Err(Error::Invalid { path, violations }) => {
            assert_eq!(path, dir);
            assert!(!violations.is_empty());
            violations
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_refused(violations: &[Violation], rule: Rule, field: &str) {
    let found: Vec<_> =
        violations.iter().map(|violation| (violation.rule, violation.field.as_str())).collect();
    assert_eq!(found, [(rule, field)], "{violations:#?}");
}

fn read_all(folder: &Folder, id: TensorId) -> Vec<u8> {
    let rows = id.kind.rows(folder.dims());
    let mut out = vec![0; (rows * id.kind.row_bytes(folder.dims())) as usize];
    folder.read_rows(id, 0..rows, &mut out).unwrap();
    out
}

/// The canonical bytes: the original checkpoint's, embeddings cut to the vocabulary.
fn canonical(id: TensorId) -> Vec<u8> {
    let data = original().tensors.remove(&id.to_string()).unwrap().data;
    match id.kind {
        TensorKind::Embedding | TensorKind::Unembedding => data[..TOKENS * H * 2].to_vec(),
        _ => data,
    }
}

#[test]
fn both_layouts_yield_the_canonical_tensors_however_they_are_sharded() {
    for (checkpoint, layout) in [(original(), Layout::Original), (hugging_face(), Layout::HuggingFace)] {
        for (shards, index) in [(1, false), (1, true), (3, false), (7, true)] {
            let dir = Checkpoint { shards, index, ..checkpoint.clone() }.write();
            let folder = Folder::open(dir.path(), options()).unwrap();
            assert_eq!((folder.layout(), folder.path(), folder.notes()), (layout, dir.path(), &[][..]));
            assert_eq!(folder.dims().tensors().count(), 3 + BLOCKS * 15);
            for id in folder.dims().tensors() {
                assert!(read_all(&folder, id) == canonical(id), "{id} of {layout}, {shards} shards");
            }
            assert_eq!((folder.header().num_experts, folder.header().context_length), (E as u32, 131072));
            folder.check_values(&()).unwrap();
        }
    }
}

#[test]
fn rows_are_read_from_any_start_to_any_end() {
    let dir = Checkpoint { shards: 4, ..hugging_face() }.write();
    let folder = Folder::open(dir.path(), options()).unwrap();
    for kind in [TensorKind::QkvWeight, TensorKind::QkvBias, TensorKind::Mlp1Blocks, TensorKind::Embedding] {
        let id = TensorId { kind, block: u32::from(kind.is_per_block()) };
        let (rows, row_bytes) = (kind.rows(folder.dims()), kind.row_bytes(folder.dims()));
        let whole = canonical(id);
        for (start, end) in
            [(0, 0), (0, 1), (63, 65), (255, 257), (200, 300), (rows - 1, rows), (rows, rows), (0, rows)]
        {
            let mut out = vec![0; ((end - start) * row_bytes) as usize];
            folder.read_rows(id, start..end, &mut out).unwrap();
            assert!(
                out == whole[(start * row_bytes) as usize..(end * row_bytes) as usize],
                "{id} {start}..{end}"
            );
        }
        let mut out = vec![0; row_bytes as usize];
        for bad in [rows..rows + 1, 0..2, u64::MAX - 1..u64::MAX, 0..0] {
            assert!(folder.read_rows(id, bad, &mut out).is_err());
        }
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = folder.read_rows(id, 2..1, &mut out);
        assert!(reversed.is_err());
    }
    let beyond = TensorId { kind: TensorKind::AttnNorm, block: BLOCKS as u32 };
    assert!(folder.read_rows(beyond, 0..1, &mut [0; 2]).is_err());
}

/// Rows of the matrix, gathered from the transposed tensor, each quantised whole.
#[test]
fn bf16_experts_are_transposed_and_quantised() {
    let checkpoint = Checkpoint { shards: 2, ..hugging_face_bf16() };
    let dir = checkpoint.write();
    let folder = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap();
    assert_eq!(folder.layout(), Layout::HuggingFaceBf16);
    folder.check_values(&()).unwrap();
    for block in 0..BLOCKS as u32 {
        for (name, columns, rows, kinds) in [
            ("gate_up_proj", H, 2 * I, [TensorKind::Mlp1Blocks, TensorKind::Mlp1Scales]),
            ("down_proj", I, H, [TensorKind::Mlp2Blocks, TensorKind::Mlp2Scales]),
        ] {
            let stored = &checkpoint.tensors[&format!("model.layers.{block}.mlp.experts.{name}")];
            let mut blocks = vec![0; E * rows * columns / 2];
            let mut scales = vec![0; E * rows * columns / 32];
            for row in 0..E * rows {
                let value = |column| {
                    let at = 2 * ((row / rows * columns + column) * rows + row % rows);
                    bf16::from_le_bytes([stored.data[at], stored.data[at + 1]]).to_f32()
                };
                let values: Vec<f32> = (0..columns).map(value).collect();
                let (half, part) = (columns / 2, columns / 32);
                let (blocks, scales) = (&mut blocks[row * half..][..half], &mut scales[row * part..][..part]);
                mxfp4::quantize_row(&values, blocks, scales).unwrap();
                for (column, &value) in values.iter().enumerate() {
                    // Each value lies within a step of MXFP4 at the block's magnitude.
                    let code = blocks[column / 2] >> (4 * (column % 2)) & 15;
                    let most = values[column / 32 * 32..][..32]
                        .iter()
                        .fold(0f32, |most, value| most.max(value.abs()));
                    assert!((mxfp4::value(code, scales[column / 32]) - value).abs() <= most / 3.0);
                }
            }
            let [of_blocks, of_scales] = kinds.map(|kind| read_all(&folder, TensorId { kind, block }));
            assert!(of_blocks == blocks && of_scales == scales, "{name}");
            // Rows of two experts, not starting with either.
            let id = TensorId { kind: kinds[0], block };
            let mut out = vec![0; rows * columns / 2];
            folder.read_rows(id, rows as u64 / 2..rows as u64 * 3 / 2, &mut out).unwrap();
            assert!(out == blocks[rows / 2 * columns / 2..][..out.len()]);
        }
    }
    let bias = TensorId { kind: TensorKind::Mlp1Bias, block: 1 };
    assert_eq!(read_all(&folder, bias), canonical(bias));
}

#[test]
fn values_that_are_in_mxfp4_already_survive_quantisation() {
    let mut checkpoint = hugging_face_bf16();
    let name = "model.layers.0.mlp.experts.down_proj";
    let tensor = checkpoint.tensor(name);
    let random = bytes(name, tensor.data.len());
    for (n, element) in tensor.data.chunks_exact_mut(2).enumerate() {
        let (column, row) = (n / H % I, n % H);
        // One scale for the 32 columns of a block; code 7 makes sure that it is used.
        let scale = 100 + (row % 40) as u8;
        let code = if column % 32 == 0 { 7 } else { random[n] & 15 };
        element.copy_from_slice(&bf16::from_f32(mxfp4::value(code, scale)).to_le_bytes());
    }
    let expected = tensor.data.clone();
    let dir = checkpoint.write();
    let folder = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap();
    let blocks = read_all(&folder, TensorId { kind: TensorKind::Mlp2Blocks, block: 0 });
    let scales = read_all(&folder, TensorId { kind: TensorKind::Mlp2Scales, block: 0 });
    for (n, element) in expected.chunks_exact(2).enumerate() {
        let (expert, column, row) = (n / (H * I), n / H % I, n % H);
        let at = (expert * H + row) * I + column;
        let code = blocks[at / 2] >> (4 * (at % 2)) & 15;
        assert_eq!(
            mxfp4::value(code, scales[at / 32]),
            bf16::from_le_bytes([element[0], element[1]]).to_f32()
        );
    }
}

#[test]
fn bf16_experts_are_refused_unless_quantising_was_asked_for() {
    let violations = hugging_face_bf16().refused();
    assert_refused(&violations, Rule::SourceExpertsBf16, "model.layers.0.mlp.experts.gate_up_proj");
    assert_eq!(violations[0].range.end - violations[0].range.start, (E * H * 2 * I * 2) as u64);
    assert!(violations[0].found.ends_with("3 more such tensors"), "{}", violations[0].found);
}

/// Each case that facts.md lists under "Where the genuine exporter is wrong or silent" and that an opened folder shows.
#[test]
fn what_the_genuine_exporter_gets_wrong_is_refused_by_name() {
    type Change = fn(&mut Checkpoint);
    fn retype(checkpoint: &mut Checkpoint, name: &str, dtype: Dtype) {
        let shape = checkpoint.tensor(name).shape.clone();
        *checkpoint.tensor(name) = stored(name, dtype, &shape);
    }
    fn reshape(checkpoint: &mut Checkpoint, name: &str, shape: &[usize]) {
        *checkpoint.tensor(name) = stored(name, checkpoint.tensors[name].dtype, shape);
    }
    let cases: &[(&str, Change, Rule, &str, &str)] = &[
        // Silent success with a broken file.
        (
            "F32 unembedding",
            |c| retype(c, "unembedding.weight", Dtype::F32),
            Rule::SourceDtype,
            "unembedding.weight",
            "F32",
        ),
        (
            "F32 qkv",
            |c| retype(c, "block.1.attn.qkv.weight", Dtype::F32),
            Rule::SourceDtype,
            "block.1.attn.qkv.weight",
            "F32",
        ),
        (
            "F32 qkv bias",
            |c| retype(c, "block.0.attn.qkv.bias", Dtype::F32),
            Rule::SourceDtype,
            "block.0.attn.qkv.bias",
            "F32",
        ),
        (
            "F32 MLP bias",
            |c| retype(c, "block.1.mlp.mlp2_bias", Dtype::F32),
            Rule::SourceDtype,
            "block.1.mlp.mlp2_bias",
            "F32",
        ),
        (
            "F16 gate",
            |c| retype(c, "block.0.mlp.gate.weight", Dtype::F16),
            Rule::SourceDtype,
            "block.0.mlp.gate.weight",
            "F16",
        ),
        (
            "BF16 scales",
            |c| retype(c, "block.0.mlp.mlp1_weight.scales", Dtype::BF16),
            Rule::SourceDtype,
            "block.0.mlp.mlp1_weight.scales",
            "BF16",
        ),
        (
            "F32 blocks",
            |c| retype(c, "block.0.mlp.mlp2_weight.blocks", Dtype::F32),
            Rule::SourceDtype,
            "block.0.mlp.mlp2_weight.blocks",
            "F32",
        ),
        (
            "too few embedding rows",
            |c| reshape(c, "embedding.weight", &[TOKENS - 1, H]),
            Rule::SourceRows,
            "embedding.weight",
            "299 rows",
        ),
        (
            "too few unembedding rows",
            |c| reshape(c, "unembedding.weight", &[TOKENS - 1, H]),
            Rule::SourceRows,
            "unembedding.weight",
            "299 rows",
        ),
        (
            "FP8 embedding",
            |c| retype(c, "embedding.weight", Dtype::F8_E4M3),
            Rule::SourceDtype,
            "embedding.weight",
            "F8_E4M3 (FP8)",
        ),
        (
            "hidden size not a multiple of 32",
            |c| c.config["hidden_size"] = json!(H + 1),
            Rule::SourceMultiple,
            "hidden_size",
            "97",
        ),
        (
            "too few layers in the config",
            |c| c.config["num_hidden_layers"] = json!(1),
            Rule::SourceConfig,
            "num_hidden_layers",
            "1, beside the tensor block.1.mlp.norm.scale",
        ),
        (
            "another number of active experts",
            |c| c.config["experts_per_token"] = json!(2),
            Rule::SourceActiveExperts,
            "experts_per_token",
            "2",
        ),
        // Failures with unhelpful messages.
        (
            "missing tensor",
            |c| {
                c.tensors.remove("block.1.attn.sinks");
            },
            Rule::SourceMissing,
            "block.1.attn.sinks",
            "no such tensor",
        ),
        (
            "missing key",
            |c| {
                c.config.as_object_mut().unwrap().remove("head_dim");
            },
            Rule::SourceConfig,
            "head_dim",
            "no such key",
        ),
        ("head_dim", |c| c.config["head_dim"] = json!(32), Rule::SourceConfig, "head_dim", "32"),
        ("norm not BF16", |c| retype(c, "norm.scale", Dtype::F32), Rule::SourceDtype, "norm.scale", "F32"),
        (
            "sinks not BF16",
            |c| retype(c, "block.0.attn.sinks", Dtype::F16),
            Rule::SourceDtype,
            "block.0.attn.sinks",
            "F16",
        ),
        (
            "embedding not BF16",
            |c| retype(c, "embedding.weight", Dtype::F16),
            Rule::SourceDtype,
            "embedding.weight",
            "F16",
        ),
        ("θ = 1", |c| c.config["rope_theta"] = json!(1), Rule::SourceConfig, "rope_theta", "1"),
        (
            "factor = 0",
            |c| c.config["rope_scaling_factor"] = json!(0),
            Rule::SourceConfig,
            "rope_scaling_factor",
            "0",
        ),
        ("α = β", |c| c.config["rope_ntk_alpha"] = json!(32), Rule::SourceConfig, "rope_ntk_alpha", "32"),
        ("null", |c| c.config["sliding_window"] = Value::Null, Rule::SourceConfig, "sliding_window", "null"),
        ("negative", |c| c.config["sliding_window"] = json!(-1), Rule::SourceConfig, "sliding_window", "-1"),
    ];
    for (name, change, rule, field, found) in cases {
        let mut checkpoint = original();
        change(&mut checkpoint);
        let violations = checkpoint.refused();
        // A wrong width or head_dim contradicts the tensors as well; the config is named first.
        let others = violations[1..]
            .iter()
            .all(|other| matches!(other.rule, Rule::SourceShape) && rule.id().starts_with("SRC-"));
        assert!(others && (violations.len() == 1 || *name == "head_dim"), "{name}: {violations:#?}");
        let violation = &violations[0];
        assert_eq!(
            (violation.rule, violation.field.as_str(), violation.found.as_str()),
            (*rule, *field, *found),
            "{name}"
        );
        let is_tensor = checkpoint.tensors.contains_key(*field);
        let file = if field.contains('.') { "model.safetensors" } else { "config.json" };
        assert_eq!(violation.section, file, "{name}");
        if is_tensor {
            let data = fs::read(checkpoint.write().path().join(file)).unwrap();
            let range = violation.range.start as usize..violation.range.end as usize;
            assert!(data[range] == checkpoint.tensors[*field].data, "{name}");
        }
    }
}

/// Contradictions between config and tensors show in several tensors; all are listed.
#[test]
fn configs_that_contradict_the_tensors_are_refused() {
    for (key, value, count) in [
        ("hidden_size", H + 32, 3 + BLOCKS * 11),
        ("intermediate_size", I * 2, BLOCKS * 5),
        ("num_experts", E - 1, BLOCKS * 8),
        ("num_experts", E + 1, BLOCKS * 8),
        ("num_attention_heads", HEADS + KV, BLOCKS * 4),
        ("num_key_value_heads", 1, BLOCKS * 2),
    ] {
        let mut checkpoint = original();
        checkpoint.config[key] = json!(value);
        let violations = checkpoint.refused();
        assert!(violations.iter().all(|violation| violation.rule == Rule::SourceShape), "{violations:#?}");
        assert_eq!(violations.len(), count, "{key} {value}: {violations:#?}");
    }
}

#[test]
fn three_experts_are_too_few() {
    let mut checkpoint = original();
    checkpoint.config["num_experts"] = json!(3);
    assert_eq!(checkpoint.refused()[0].rule, Rule::SourceExperts);
}

#[test]
fn every_violation_is_listed_at_once() {
    let mut checkpoint = original();
    checkpoint.config["rope_theta"] = json!(0.5);
    checkpoint.tensors.remove("norm.scale");
    checkpoint.tensors.insert("block.0.mlp.gate.bias".into(), stored("x", Dtype::F32, &[E + 1]));
    let rules: Vec<_> = checkpoint.refused().iter().map(|violation| violation.rule).collect();
    assert_eq!(rules, [Rule::SourceConfig, Rule::SourceDtype, Rule::SourceShape, Rule::SourceMissing]);
}

/// The shapes of q, k and v are checked each, not only their sum.
#[test]
fn hugging_face_tensors_are_refused_under_their_own_names() {
    let mut checkpoint = hugging_face();
    let q = "model.layers.0.self_attn.q_proj.weight";
    let k = "model.layers.0.self_attn.k_proj.weight";
    checkpoint.tensors.insert(q.into(), stored(q, Dtype::BF16, &[KV * D, H]));
    checkpoint.tensors.insert(k.into(), stored(k, Dtype::BF16, &[HEADS * D, H]));
    checkpoint.tensors.remove("model.layers.1.self_attn.v_proj.bias");
    let found: Vec<_> =
        checkpoint.refused().into_iter().map(|violation| (violation.rule, violation.field)).collect();
    let expected = [
        (Rule::SourceShape, q.to_string()),
        (Rule::SourceShape, k.to_string()),
        (Rule::SourceMissing, "model.layers.1.self_attn.v_proj.bias".to_string()),
    ];
    assert_eq!(found, expected);
}

#[test]
fn bf16_experts_of_another_dtype_or_beside_mxfp4_are_refused() {
    let name = "model.layers.1.mlp.experts.down_proj";
    let mut checkpoint = hugging_face_bf16();
    *checkpoint.tensor(name) = stored(name, Dtype::F32, &[E, I, H]);
    let dir = checkpoint.write();
    let violations = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap_err();
    assert_refused(violations.violations(), Rule::SourceDtype, name);

    let mut checkpoint = hugging_face();
    checkpoint.tensors.insert(name.into(), stored(name, Dtype::BF16, &[E, I, H]));
    let dir = checkpoint.write();
    let error = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap_err();
    let found: Vec<_> =
        error.violations().iter().map(|violation| (violation.rule, violation.field.clone())).collect();
    let expected = ["_blocks", "_scales"].map(|suffix| (Rule::SourceDuplicate, format!("{name}{suffix}")));
    assert_eq!(found, expected);
}

#[test]
fn one_block_of_bf16_experts_beside_blocks_of_mxfp4_is_read() {
    let (mut checkpoint, bf16) = (hugging_face(), hugging_face_bf16());
    let name = "model.layers.1.mlp.experts.down_proj";
    checkpoint.tensors.remove(&format!("{name}_blocks"));
    checkpoint.tensors.remove(&format!("{name}_scales"));
    checkpoint.tensors.insert(name.into(), bf16.tensors[name].clone());
    let dir = checkpoint.write();
    let folder = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap();
    let id = TensorId { kind: TensorKind::Mlp2Blocks, block: 0 };
    assert!(read_all(&folder, id) == canonical(id));
}

#[test]
fn the_number_of_layers_does_not_drive_the_work() {
    let mut checkpoint = original();
    checkpoint.config["num_hidden_layers"] = json!(u32::MAX);
    let violations = checkpoint.refused();
    assert!(violations.len() <= 65, "{}", violations.len());
    assert!(violations.iter().all(|violation| violation.rule == Rule::SourceMissing));
    assert!(violations.last().unwrap().found.contains("not listed"));
    checkpoint.config["num_experts"] = json!(u32::MAX);
    checkpoint.config["num_attention_heads"] = json!(u32::MAX);
    checkpoint.config["num_key_value_heads"] = json!(u32::MAX);
    checkpoint.config["hidden_size"] = json!(u32::MAX - 31);
    assert_refused(&checkpoint.refused(), Rule::SourceConfig, "num_hidden_layers");
}

#[test]
fn a_name_in_two_shards_is_refused_naming_both() {
    let checkpoint = Checkpoint { shards: 2, ..original() };
    for index in [false, true] {
        let dir = Checkpoint { index, ..checkpoint.clone() }.write();
        fs::write(
            dir.path().join("zz.safetensors"),
            serialize([(&"norm.scale".into(), &checkpoint.tensors["norm.scale"])]),
        )
        .unwrap();
        let violations = refusal(dir.path());
        assert_refused(&violations, Rule::SourceDuplicate, "norm.scale");
        assert!(violations[0].found.contains("zz.safetensors"), "{}", violations[0].found);
        assert!(violations[0].found.contains("model-0000"), "{}", violations[0].found);
    }
}

#[test]
fn junk_is_noted_or_refused_before_anything_is_written() {
    let dir = original().write();
    fs::write(dir.path().join("README.md"), "x").unwrap();
    fs::create_dir(dir.path().join("original")).unwrap();
    fs::write(dir.path().join("original/model.safetensors"), "x").unwrap();
    assert_eq!(
        Folder::open(dir.path(), options()).unwrap().notes(),
        ["ignored beside the checkpoint: README.md"]
    );
    fs::write(dir.path().join("._model.safetensors"), "junk").unwrap();
    let violations = refusal(dir.path());
    assert_refused(&violations, Rule::SourceContainer, "header length");
    assert_eq!(violations[0].section, "._model.safetensors");

    // An index says what belongs to the checkpoint.
    let dir = Checkpoint { index: true, ..original() }.write();
    fs::write(dir.path().join("._model.safetensors"), "junk").unwrap();
    let folder = Folder::open(dir.path(), options()).unwrap();
    assert_eq!(folder.notes(), ["not named by the index and ignored: ._model.safetensors"]);

    let mut checkpoint = original();
    checkpoint.tensors.insert("block.0.attn.extra".into(), stored("x", Dtype::F64, &[3]));
    let dir = checkpoint.write();
    let folder = Folder::open(dir.path(), options()).unwrap();
    assert_eq!(folder.notes(), ["tensors that the model does not have, ignored: block.0.attn.extra"]);
}

#[test]
fn folders_without_a_checkpoint_say_what_is_there() {
    let dir = TempDir::new().unwrap();
    let violations = refusal(dir.path());
    let found: Vec<_> =
        violations.iter().map(|violation| (violation.rule, violation.field.as_str())).collect();
    assert_eq!(found, [(Rule::SourceConfig, "config.json"), (Rule::SourceMissing, "SafeTensors files")]);

    // A download from Hugging Face without its own shards.
    fs::create_dir(dir.path().join("original")).unwrap();
    fs::write(dir.path().join("original/model.safetensors"), "x").unwrap();
    assert!(refusal(dir.path())[1].found.contains("sub-folder original"));

    let missing = Folder::open(&dir.path().join("nowhere"), options());
    assert!(matches!(missing, Err(Error::Io { .. })));

    let mut other = original();
    other.tensors = BTreeMap::from([("bert.pooler.weight".into(), stored("x", Dtype::F32, &[2]))]);
    let violations = other.refused();
    assert_refused(&violations, Rule::SourceMissing, "embedding.weight");
    assert!(violations[0].found.contains("bert.pooler.weight"));

    let mut both = original();
    both.tensors.extend(hugging_face().tensors);
    assert_refused(&both.refused(), Rule::SourceContainer, "layout");
}

#[test]
fn an_index_that_disagrees_with_the_shards_is_refused() {
    let checkpoint = Checkpoint { shards: 2, index: true, ..original() };
    let dir = checkpoint.write();
    let path = dir.path().join("model.safetensors.index.json");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut index = index.clone();
        change(&mut index["weight_map"]);
        write_index(dir.path(), &index);
        refusal(dir.path())
    };
    // The names alternate between the shards: the first is in the first.
    let first = checkpoint.tensors.keys().next().unwrap().as_str();
    let other = checkpoint.shard_name(1);
    assert_refused(&changed(&|map| map[first] = json!(other)), Rule::SourceContainer, first);
    assert_refused(&changed(&|map| map["extra"] = json!(other)), Rule::SourceMissing, "extra");
    for escape in
        ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./model.safetensors"]
    {
        let violations = changed(&|map| map[first] = json!(escape));
        assert_refused(&violations, Rule::SourceContainer, escape);
        assert_eq!(violations[0].section, "model.safetensors.index.json");
    }
    assert_refused(&changed(&|map| *map = json!([])), Rule::SourceContainer, "weight_map");
    assert_refused(&changed(&|map| map[first] = json!(7)), Rule::SourceContainer, "weight_map");

    let twice = index.to_string().replacen(
        "\"weight_map\":{",
        &format!("\"weight_map\":{{\"{first}\":\"{other}\","),
        1,
    );
    fs::write(&path, twice).unwrap();
    let rules: Vec<_> = refusal(dir.path()).iter().map(|violation| violation.rule).collect();
    assert_eq!(rules, [Rule::SourceDuplicate, Rule::SourceContainer]);

    // A shard that was not fetched is one violation, not one for each of its tensors.
    write_index(dir.path(), &index);
    fs::remove_file(dir.path().join(&other)).unwrap();
    assert_refused(&refusal(dir.path()), Rule::SourceMissing, &other);
}

#[cfg(unix)]
#[test]
fn links_may_not_lead_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let outside = original().write();
    let dir = TempDir::new().unwrap();
    fs::copy(outside.path().join("config.json"), dir.path().join("config.json")).unwrap();
    let link = dir.path().join("model.safetensors");
    symlink(outside.path().join("model.safetensors"), &link).unwrap();
    assert_refused(&refusal(dir.path()), Rule::SourceContainer, "model.safetensors");

    // Within the folder a link is fine, and so is one to the folder.
    fs::remove_file(&link).unwrap();
    fs::copy(outside.path().join("model.safetensors"), dir.path().join("blob")).unwrap();
    symlink("blob", &link).unwrap();
    Folder::open(dir.path(), options()).unwrap();
    let alias = outside.path().join("alias");
    symlink(dir.path(), &alias).unwrap();
    Folder::open(&alias, options()).unwrap();

    fs::remove_file(&link).unwrap();
    fs::create_dir(&link).unwrap();
    assert_refused(&refusal(dir.path()), Rule::SourceContainer, "model.safetensors");
}

#[cfg(unix)]
#[test]
fn a_snapshot_of_the_hugging_face_cache_may_link_into_its_store() {
    use std::os::unix::fs::symlink;
    let checkpoint = original().write();
    let cache = TempDir::new().unwrap();
    let snapshot = cache.path().join("models--openai--gpt-oss-20b/snapshots/6cee5e81");
    let store = cache.path().join("models--openai--gpt-oss-20b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(&store).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(checkpoint.path().join(name), store.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    Folder::open(&snapshot, options()).unwrap();

    // Anywhere else in the cache is outside, and so is a store that is itself a link.
    let link = snapshot.join("model.safetensors");
    fs::remove_file(&link).unwrap();
    fs::copy(checkpoint.path().join("model.safetensors"), cache.path().join("elsewhere")).unwrap();
    symlink("../../../elsewhere", &link).unwrap();
    assert_refused(&refusal(&snapshot), Rule::SourceContainer, "model.safetensors");
    fs::remove_dir_all(&store).unwrap();
    symlink(checkpoint.path(), &store).unwrap();
    fs::remove_file(&link).unwrap();
    symlink("../../blobs/model.safetensors", &link).unwrap();
    let found: Vec<_> =
        refusal(&snapshot).into_iter().filter(|found| found.rule == Rule::SourceContainer).collect();
    let files: Vec<&str> = found.iter().map(|found| found.section.as_str()).collect();
    assert_eq!(files, ["config.json", "model.safetensors"]);
}

fn shard(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

#[test]
fn unsound_shards_are_refused() {
    let a = r#""a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    let cases: &[(&str, Vec<u8>, Rule, &str)] = &[
        ("empty", vec![], Rule::SourceContainer, "header length"),
        ("7 bytes", vec![0; 7], Rule::SourceContainer, "header length"),
        ("no header", vec![0; 8], Rule::SourceContainer, "header"),
        ("header past the end", 9u64.to_le_bytes().to_vec(), Rule::SourceContainer, "header length"),
        ("huge header", u64::MAX.to_le_bytes().to_vec(), Rule::SourceContainer, "header length"),
        ("no JSON", shard("{a", 0), Rule::SourceContainer, "header"),
        ("array", shard("[]", 0), Rule::SourceContainer, "header"),
        (
            "unknown dtype",
            shard(&format!("{{{}}}", a.replace("U8", "U7")), 4),
            Rule::SourceContainer,
            "header",
        ),
        (
            "negative",
            shard(&format!("{{{}}}", a.replace("[0,4]", "[-1,4]")), 4),
            Rule::SourceContainer,
            "header",
        ),
        ("metadata", shard(r#"{"__metadata__":7}"#, 0), Rule::SourceContainer, "header"),
        ("truncated", shard(&format!("{{{a}}}"), 3), Rule::SourceContainer, "a"),
        ("trailing", shard(&format!("{{{a}}}"), 5), Rule::SourceContainer, "data"),
        (
            "out of file",
            shard(&format!("{{{}}}", a.replace("[0,4]", "[0,18446744073709551615]")), 4),
            Rule::SourceContainer,
            "a",
        ),
        ("backwards", shard(&format!("{{{}}}", a.replace("[0,4]", "[4,0]")), 4), Rule::SourceContainer, "a"),
        ("wrong size", shard(&format!("{{{}}}", a.replace("[4]", "[5]")), 4), Rule::SourceContainer, "a"),
        (
            "overflow",
            shard(&format!("{{{}}}", a.replace("[4]", "[4294967296,4294967296,4]")), 4),
            Rule::SourceContainer,
            "a",
        ),
        ("gap", shard(&format!("{{{}}}", a.replace("[0,4]", "[1,5]")), 5), Rule::SourceContainer, "a"),
        (
            "overlap",
            shard(&format!("{{{a},{}}}", a.replace("\"a\"", "\"b\"").replace("[0,4]", "[2,6]")), 6),
            Rule::SourceContainer,
            "b",
        ),
        ("twice", shard(&format!("{{{a},{}}}", a.replace("[0,4]", "[4,8]")), 8), Rule::SourceDuplicate, "a"),
    ];
    for (name, bytes, rule, field) in cases {
        let dir = original().write();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let violations = refusal(dir.path());
        assert_eq!(
            (violations[0].rule, violations[0].field.as_str()),
            (*rule, *field),
            "{name}: {violations:#?}"
        );
        assert_eq!((violations.len(), violations[0].section.as_str()), (1, "model.safetensors"), "{name}");
        assert!(violations[0].range.end <= bytes.len() as u64, "{name}: {:?}", violations[0].range);
    }
}

#[test]
fn a_truncated_shard_is_refused_at_every_byte_of_its_header() {
    let dir = original().write();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for len in (0..header).step_by(7).chain(0..16).chain([header, whole.len() / 2, whole.len() - 1]) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(refusal(dir.path()).iter().all(|violation| violation.rule == Rule::SourceContainer), "{len}");
    }
}

#[test]
fn scales_above_240_are_found_with_their_elements() {
    for (mut checkpoint, name) in [
        (original(), "block.1.mlp.mlp2_weight.scales"),
        (hugging_face(), "model.layers.1.mlp.experts.down_proj_scales"),
    ] {
        // 240 is the largest that fits.
        checkpoint.tensor(name).data[0] = 240;
        let dir = checkpoint.write();
        Folder::open(dir.path(), options()).unwrap().check_values(&()).unwrap();

        let row = I / 32;
        let element = (3 * H + 5) * row + 1;
        checkpoint.tensor(name).data[element] = 241;
        for at in [element + 1, element + 2, element + 9] {
            checkpoint.tensor(name).data[at] = 255;
        }
        let dir = checkpoint.write();
        let error = Folder::open(dir.path(), options()).unwrap().check_values(&()).unwrap_err();
        assert_refused(error.violations(), Rule::SourceScale, name);
        let violation = &error.violations()[0];
        let found = "241 at element [3, 5, 1], 255 at element [3, 6, 0], 255 at element [3, 6, 1] and 1 more";
        assert_eq!(violation.found, found);
        let file = fs::read(dir.path().join("model.safetensors")).unwrap();
        assert_eq!(file[violation.range.start as usize..violation.range.end as usize], [241]);
    }
}

#[test]
fn nan_in_qkv_is_found_and_infinity_is_not() {
    let mut checkpoint = original();
    let infinity = bf16::INFINITY.to_le_bytes();
    checkpoint.tensor("block.0.attn.qkv.weight").data[..2].copy_from_slice(&infinity);
    // NaN elsewhere is the verifier's concern.
    checkpoint.tensor("norm.scale").data[..2].copy_from_slice(&bf16::NAN.to_le_bytes());
    let dir = checkpoint.write();
    Folder::open(dir.path(), options()).unwrap().check_values(&()).unwrap();

    checkpoint.tensor("block.0.attn.qkv.bias").data[6..8].copy_from_slice(&0xff81u16.to_le_bytes());
    let weight = checkpoint.tensor("block.1.attn.qkv.weight");
    let last = weight.data.len() - 2;
    weight.data[last..].copy_from_slice(&0x7f81u16.to_le_bytes());
    let dir = checkpoint.write();
    let error = Folder::open(dir.path(), options()).unwrap().check_values(&()).unwrap_err();
    let found: Vec<_> = error
        .violations()
        .iter()
        .map(|violation| (violation.rule, violation.field.as_str(), violation.found.as_str()))
        .collect();
    let position = format!("NaN at element [{}, {}]", (HEADS + 2 * KV) * D - 1, H - 1);
    let expected = [
        (Rule::SourceNan, "block.0.attn.qkv.bias", "NaN at element [3]"),
        (Rule::SourceNan, "block.1.attn.qkv.weight", position.as_str()),
    ];
    assert_eq!(found, expected);
}

#[test]
fn infinite_experts_are_found_before_and_while_quantising() {
    let mut checkpoint = hugging_face_bf16();
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let at = (2 * H + 40) * 2 * I + 7;
    checkpoint.tensor(name).data[2 * at..2 * at + 2].copy_from_slice(&bf16::INFINITY.to_le_bytes());
    let dir = checkpoint.write();
    let folder = Folder::open(dir.path(), Options { quantize: true, ..options() }).unwrap();
    let id = TensorId { kind: TensorKind::Mlp1Scales, block: 0 };
    let mut out = vec![0; H / 32];
    let row = 2 * 2 * I as u64;
    for error in
        [folder.check_values(&()).unwrap_err(), folder.read_rows(id, row..row + 1, &mut out).unwrap_err()]
    {
        assert_refused(error.violations(), Rule::SourceNan, name);
        assert_eq!(error.violations()[0].found, "inf at element [2, 40, 7]");
    }
    folder.read_rows(id, row - 1..row, &mut out).unwrap();
}

#[test]
fn a_tensor_that_vanishes_after_opening_is_an_error() {
    let dir = original().write();
    let folder = Folder::open(dir.path(), options()).unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("model.safetensors"))
        .unwrap()
        .set_len(100)
        .unwrap();
    let id = TensorId { kind: TensorKind::Norm, block: 0 };
    assert!(matches!(folder.read_rows(id, 0..1, &mut [0; 2]), Err(Error::Io { .. })));
    assert!(matches!(folder.check_values(&()), Err(Error::Io { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever stands in a header or config, opening answers.
    #[test]
    fn damaged_headers_never_panic(at in 0usize..4000, byte: u8, in_config: bool) {
        let dir = original().write();
        let path = dir.path().join(if in_config { "config.json" } else { "model.safetensors" });
        let mut bytes = fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        fs::write(&path, bytes).unwrap();
        if let Ok(folder) = Folder::open(dir.path(), options()) {
            for id in folder.dims().tensors() {
                prop_assert_eq!(read_all(&folder, id).len() as u64, id.kind.rows(folder.dims()) * id.kind.row_bytes(folder.dims()));
            }
        }
    }
}
