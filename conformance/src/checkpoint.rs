//! Checkpoints that must be refused: changes to the committed original-layout checkpoint that the base file was made of.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use formats::Rule;
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::cases::{Case, Input};

const CONFIG: &str = include_str!("../../fixtures/checkpoints/original/config.json");
const TENSORS: &[u8] = include_bytes!("../../fixtures/checkpoints/original/model.safetensors");
const VOCABULARY: &str = include_str!("../../fixtures/checkpoints/original/vocabulary.json");

/// One tensor in memory.
#[derive(Clone)]
pub struct Tensor {
    /// As in the file.
    pub name: String,
    /// As in the file.
    pub dtype: Dtype,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Little-endian.
    pub data: Vec<u8>,
}

/// A checkpoint in memory.
pub struct Checkpoint {
    /// `config.json`.
    pub config: Value,
    /// `model.safetensors`.
    pub tensors: Vec<Tensor>,
    /// A second SafeTensors file, if any.
    pub second: Vec<Tensor>,
    /// Other files: name and contents; they replace those of the same name.
    pub files: Vec<(&'static str, Vec<u8>)>,
}

impl Checkpoint {
    /// The committed one.
    pub fn base() -> Result<Checkpoint> {
        let file =
            SafeTensors::deserialize(TENSORS).context("fixtures/checkpoints/original/model.safetensors")?;
        let mut tensors: Vec<Tensor> = file
            .iter()
            .map(|(name, view)| Tensor {
                name: name.into(),
                dtype: view.dtype(),
                shape: view.shape().into(),
                data: view.data().into(),
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Checkpoint {
            config: serde_json::from_str(CONFIG)?,
            tensors,
            second: Vec::new(),
            files: Vec::new(),
        })
    }

    /// Writes the files into a folder that exists.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::write(folder.join("config.json"), self.config.to_string())?;
        fs::write(folder.join("vocabulary.json"), VOCABULARY)?;
        for (name, tensors) in [("model.safetensors", &self.tensors), ("more.safetensors", &self.second)] {
            if !tensors.is_empty() {
                let views: Vec<(&str, TensorView<'_>)> = tensors
                    .iter()
                    .map(|tensor| {
                        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data)?;
                        Ok((tensor.name.as_str(), view))
                    })
                    .collect::<Result<_>>()?;
                fs::write(folder.join(name), safetensors::serialize(views, None)?)?;
            }
        }
        self.files.iter().try_for_each(|(name, contents)| Ok(fs::write(folder.join(name), contents)?))
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of the base checkpoint")
    }

    /// Gives a BF16 tensor another dtype of the same meaning.
    fn retype(&mut self, name: &str, dtype: Dtype) {
        let tensor = self.tensor(name);
        let values = tensor.data.chunks(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]));
        tensor.data = match dtype {
            Dtype::F32 => values.flat_map(|value| value.to_f32().to_le_bytes()).collect(),
            Dtype::F16 => {
                values.flat_map(|value| half::f16::from_f32(value.to_f32()).to_le_bytes()).collect()
            }
            Dtype::F8_E4M3 => values.map(|_| 0x38).collect(),
            _ => unreachable!("the cases use these three"),
        };
        tensor.dtype = dtype;
    }

    /// Widens a byte tensor to BF16 or F32 elements of the same shape.
    fn widen(&mut self, name: &str, dtype: Dtype) {
        let tensor = self.tensor(name);
        let size = dtype.bitsize() / 8;
        tensor.data = tensor.data.iter().flat_map(|&byte| vec![byte; size]).collect();
        tensor.dtype = dtype;
    }

    fn keep_rows(&mut self, name: &str, rows: usize) {
        let tensor = self.tensor(name);
        let row = tensor.data.len() / tensor.shape[0];
        tensor.shape[0] = rows;
        tensor.data.truncate(rows * row);
    }

    fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }
}

/// Cases about checkpoints: name, rule, field, why, change.
pub(crate) fn cases() -> Vec<Case> {
    type Row = (&'static str, Rule, &'static str, &'static str, fn(&mut Checkpoint));
    let silent = "the genuine exporter writes a broken file without a word";
    let rows: &[Row] = &[
        // Where the genuine exporter succeeds silently with a broken file.
        ("f32-unembedding", Rule::SourceDtype, "unembedding.weight", silent, |c| {
            c.retype("unembedding.weight", Dtype::F32)
        }),
        ("f32-qkv", Rule::SourceDtype, "block.0.attn.qkv.weight", silent, |c| {
            c.retype("block.0.attn.qkv.weight", Dtype::F32);
        }),
        ("f32-mlp-bias", Rule::SourceDtype, "block.1.mlp.mlp2_bias", silent, |c| {
            c.retype("block.1.mlp.mlp2_bias", Dtype::F32);
        }),
        ("f16-gate", Rule::SourceDtype, "block.0.mlp.gate.weight", silent, |c| {
            c.retype("block.0.mlp.gate.weight", Dtype::F16);
        }),
        ("bf16-scales", Rule::SourceDtype, "block.0.mlp.mlp1_weight.scales", silent, |c| {
            c.widen("block.0.mlp.mlp1_weight.scales", Dtype::BF16);
        }),
        ("f32-blocks", Rule::SourceDtype, "block.0.mlp.mlp2_weight.blocks", silent, |c| {
            c.widen("block.0.mlp.mlp2_weight.blocks", Dtype::F32);
        }),
        ("fp8-embedding", Rule::SourceDtype, "embedding.weight", "the file has no flag for the dtype", |c| {
            c.retype("embedding.weight", Dtype::F8_E4M3);
        }),
        ("hidden-size-disagrees", Rule::SourceShape, "embedding.weight", silent, |c| {
            c.set("hidden_size", json!(64))
        }),
        ("fewer-experts-than-tensors", Rule::SourceShape, "block.0.mlp.mlp1_weight.blocks", silent, |c| {
            for block in 0..2 {
                for name in
                    ["gate.weight", "gate.bias", "mlp1_weight.blocks", "mlp1_weight.scales", "mlp1_bias"]
                {
                    let tensor = c.tensor(&format!("block.{block}.mlp.{name}"));
                    let expert = tensor.data.len() / 4;
                    tensor.shape[0] = 5;
                    tensor.data.extend(vec![1; expert]);
                }
            }
        }),
        ("embedding-too-short", Rule::SourceRows, "embedding.weight", silent, |c| {
            c.keep_rows("embedding.weight", 299)
        }),
        ("unembedding-too-short", Rule::SourceRows, "unembedding.weight", silent, |c| {
            c.keep_rows("unembedding.weight", 1);
        }),
        ("hidden-size-not-a-multiple-of-32", Rule::SourceMultiple, "hidden_size", silent, |c| {
            c.set("hidden_size", json!(48));
        }),
        ("intermediate-size-not-a-multiple-of-32", Rule::SourceMultiple, "intermediate_size", silent, |c| {
            c.set("intermediate_size", json!(80));
        }),
        ("same-tensor-in-two-files", Rule::SourceDuplicate, "norm.scale", silent, |c| {
            let copy = c.tensor("norm.scale").clone();
            c.second.push(copy);
        }),
        ("experts-per-token-8", Rule::SourceActiveExperts, "experts_per_token", silent, |c| {
            c.set("experts_per_token", json!(8));
        }),
        // Where it fails late, or with a message that names neither tensor nor key.
        ("tensor-missing", Rule::SourceMissing, "block.1.attn.sinks", "the message should name it", |c| {
            c.tensors.retain(|tensor| tensor.name != "block.1.attn.sinks");
        }),
        (
            "num-experts-too-large",
            Rule::SourceShape,
            "block.0.mlp.mlp1_weight.blocks",
            "the message should name it",
            |c| {
                c.set("num_experts", json!(6));
            },
        ),
        (
            "head-counts-wrong",
            Rule::SourceShape,
            "block.0.attn.qkv.weight",
            "the message should name it",
            |c| {
                c.set("num_attention_heads", json!(4));
            },
        ),
        ("three-experts", Rule::SourceExperts, "num_experts", "the router selects four", |c| {
            c.set("num_experts", json!(3));
        }),
        ("head-dim-128", Rule::SourceConfig, "head_dim", "the interleaving is defined for 64", |c| {
            c.set("head_dim", json!(128));
        }),
        ("config-key-missing", Rule::SourceConfig, "sliding_window", "the message should name it", |c| {
            c.config.as_object_mut().expect("an object").remove("sliding_window");
        }),
        ("rope-theta-1", Rule::SourceConfig, "rope_theta", "its logarithm divides", |c| {
            c.set("rope_theta", json!(1))
        }),
        ("rope-factor-0", Rule::SourceConfig, "rope_scaling_factor", "it divides", |c| {
            c.set("rope_scaling_factor", json!(0));
        }),
        ("alpha-equals-beta", Rule::SourceConfig, "rope_ntk_alpha", "their difference divides", |c| {
            c.set("rope_ntk_alpha", json!(32));
        }),
        ("window-null", Rule::SourceConfig, "sliding_window", "the header has no null", |c| {
            c.set("sliding_window", json!(null));
        }),
        (
            "blocks-negative",
            Rule::SourceConfig,
            "num_hidden_layers",
            "the header's counts are unsigned",
            |c| {
                c.set("num_hidden_layers", json!(-1));
            },
        ),
        // Values.
        (
            "scale-241",
            Rule::SourceScale,
            "block.0.mlp.mlp1_weight.scales",
            "241 + 14 is the exponent of infinity",
            |c| {
                c.tensor("block.0.mlp.mlp1_weight.scales").data[17] = 241;
            },
        ),
        (
            "scale-242-wraps",
            Rule::SourceScale,
            "block.1.mlp.mlp2_weight.scales",
            "242 + 14 wraps to 0",
            |c| {
                c.tensor("block.1.mlp.mlp2_weight.scales").data[3] = 242;
            },
        ),
        (
            "nan-in-q",
            Rule::SourceNan,
            "block.1.attn.qkv.weight",
            "its payload depends on the writer's machine",
            |c| {
                c.tensor("block.1.attn.qkv.weight").data[8..10].copy_from_slice(&0x7fc1u16.to_le_bytes());
            },
        ),
        (
            "nan-in-v-bias",
            Rule::SourceNan,
            "block.0.attn.qkv.bias",
            "its payload depends on the writer's machine",
            |c| {
                let end = c.tensor("block.0.attn.qkv.bias").data.len();
                c.tensor("block.0.attn.qkv.bias").data[end - 2..].copy_from_slice(&0xffffu16.to_le_bytes());
            },
        ),
        ("nan-in-the-unembedding", Rule::SourceNan, "unembedding.weight", "the model is damaged", |c| {
            c.tensor("unembedding.weight").data[100..102].copy_from_slice(&0x7f81u16.to_le_bytes());
        }),
        // Containers.
        ("shard-cut-short", Rule::SourceContainer, "more.safetensors", "a broken download", |c| {
            c.files.push(("more.safetensors", vec![8, 0, 0, 0]));
        }),
        (
            "shard-outside-the-folder",
            Rule::SourceContainer,
            "../model.safetensors",
            "a checkpoint must not reach other files",
            |c| {
                let index = json!({ "weight_map": { "norm.scale": "../model.safetensors" } });
                c.files.push(("model.safetensors.index.json", index.to_string().into_bytes()));
            },
        ),
        (
            "experts-in-bf16",
            Rule::SourceExpertsBf16,
            "experts",
            "nobody wants to lose precision unasked",
            |c| {
                c.files.push((
                    "config.json",
                    include_bytes!("../../fixtures/checkpoints/hf-bf16/config.json").to_vec(),
                ));
                c.tensors.clear();
                for (name, contents) in [
                    (
                        "model-00001-of-00002.safetensors",
                        &include_bytes!(
                            "../../fixtures/checkpoints/hf-bf16/model-00001-of-00002.safetensors"
                        )[..],
                    ),
                    (
                        "model-00002-of-00002.safetensors",
                        include_bytes!("../../fixtures/checkpoints/hf-bf16/model-00002-of-00002.safetensors"),
                    ),
                    (
                        "model.safetensors.index.json",
                        include_bytes!("../../fixtures/checkpoints/hf-bf16/model.safetensors.index.json"),
                    ),
                ] {
                    c.files.push((name, contents.to_vec()));
                }
            },
        ),
    ];
    rows.iter()
        .map(|&(name, rule, field, rationale, change)| Case {
            name: name.into(),
            rationale,
            rule,
            range: 0..0,
            field: field.into(),
            input: Input::Checkpoint(change),
        })
        .collect()
}
