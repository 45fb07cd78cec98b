//! Target `checkpoint`.

use std::fs;
use std::path::Path;

use arbitrary::Arbitrary;
use formats::Error;
use formats::canonical::Source;
use formats::checkpoint::{Folder, Layout, Options};
use formats::model_bin::tensors::{TensorId, TensorKind};

use crate::json::{self, quoted};
use crate::tiny::{self, Tiny};
use crate::{accepted, bounded, config, scratch};

const INDEX: &str = "model.safetensors.index.json";
/// Bytes up to which a shard gets the data that its header describes.
const MAX_DATA: u64 = 1 << 18;

#[derive(Arbitrary, Debug)]
struct Input {
    layout: u8,
    quantize: bool,
    blocks: bool,
    /// Shards that the tensors are spread over.
    shards: u8,
    config: Text,
    index: Index,
    edits: Vec<Edit>,
    /// Bytes of tensors: which, where, and what.
    values: Vec<(u8, u16, [u8; 2])>,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Edited(Vec<json::Edit>),
    Any(String),
    Missing,
}

#[derive(Arbitrary, Debug)]
enum Index {
    None,
    True,
    /// Entries that name another file.
    Wrong(Vec<(u8, u8)>),
    Any(String),
}

/// A change to the shards' headers, or to their bytes.
#[derive(Arbitrary, Debug)]
enum Edit {
    Remove(u8),
    Repeat(u8, u8),
    Dtype(u8, u8),
    Axis(u8, u8, Size),
    Axes(u8, Vec<Size>),
    Offsets(u8, Size, Size),
    Rename(u8, String),
    Rows(u8, i8),
    Length(u8, u64),
    Header(u8, String),
    Append(u8, Vec<u8>),
    Whole(u8, Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    Small(u8),
    Any(u64),
    Extreme(u8),
}

const DTYPES: [&str; 12] =
    ["BF16", "U8", "F16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "bf16"];
const FILES: [&str; 12] = [
    "model-0.safetensors",
    "model-1.safetensors",
    "model-2.safetensors",
    "",
    ".",
    "../model-0.safetensors",
    "/dev/zero",
    "folder/model-0.safetensors",
    "config.json",
    "model-9.safetensors",
    "model-0.safetensors/",
    "a\\b",
];

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    shard: usize,
    /// Instead of those that follow from the sizes.
    offsets: Option<(u64, u64)>,
}

/// A folder is opened within bounded memory or refused with violations. One that is accepted, and whose values are
/// sound, can be read whole and exported, and the export is valid.
pub fn checkpoint(data: &[u8]) {
    let folder = scratch::folder();
    let dir = folder.path();
    // The input as a shard, as the index and as the config.
    fs::write(dir.join("model.safetensors"), data).expect("a file");
    fs::write(dir.join(config::FILE), config::tiny(0).text()).expect("a file");
    open(dir, data.len(), false);
    fs::write(dir.join(INDEX), data).expect("a file");
    open(dir, data.len(), false);
    let Some(input) = crate::instructions::<Input>(data) else { return };
    for name in [INDEX, config::FILE, "model.safetensors"] {
        fs::remove_file(dir.join(name)).expect("a file that was written");
    }
    let bytes = input.write(dir);
    open(dir, bytes, input.quantize);
}

fn open(dir: &Path, bytes: usize, quantize: bool) {
    let options = Options { vocabulary: tiny::vocabulary(), quantize };
    match bounded(bytes, || Folder::open(dir, options)) {
        Ok(folder) => {
            assert!(quantize || folder.layout() != Layout::HuggingFaceBf16);
            accepted::check(&folder);
        }
        Err(Error::Invalid { violations, .. }) => {
            assert!(violations.iter().any(|violation| violation.is_error()));
            assert!(violations.iter().all(|violation| violation.range.start <= violation.range.end));
        }
        // A name that no file can have, such as `a/`.
        Err(Error::Io { .. }) => {}
        Err(other) => panic!("{other}"),
    }
}

impl Size {
    fn value(self) -> u64 {
        const EXTREMES: [u64; 8] = [0, 1, 32, 1 << 31, 1 << 32, 1 << 62, i64::MAX as u64, u64::MAX];
        match self {
            Size::Small(size) => size.into(),
            Size::Any(size) => size,
            Size::Extreme(index) => EXTREMES[usize::from(index) % EXTREMES.len()],
        }
    }
}

impl Input {
    /// Writes the folder; returns the bytes in it.
    fn write(&self, dir: &Path) -> usize {
        let shards = usize::from(self.shards % 3) + 1;
        let mut tensors = tensors(self.layout, self.blocks.into());
        let count = tensors.len();
        for (index, tensor) in tensors.iter_mut().enumerate() {
            tensor.shard = index * shards / count;
        }
        for edit in &self.edits {
            edit.apply(&mut tensors, shards);
        }
        let mut total = 0;
        let mut write = |name: &str, bytes: &[u8]| {
            total += bytes.len();
            fs::write(dir.join(name), bytes).expect("a file");
        };
        for (shard, name) in FILES.iter().enumerate().take(shards) {
            write(name, &self.shard(&tensors, shard));
        }
        match &self.config {
            Text::Edited(edits) => {
                let mut config = config::tiny(self.blocks.into());
                config.edit(&config::KEYS, edits);
                write(config::FILE, config.text().as_bytes());
            }
            Text::Any(text) => write(config::FILE, text.as_bytes()),
            Text::Missing => {}
        }
        let wrong: &[(u8, u8)] = match &self.index {
            Index::None => return total,
            Index::Any(text) => {
                write(INDEX, text.as_bytes());
                return total;
            }
            Index::True => &[],
            Index::Wrong(wrong) => wrong,
        };
        let mut files: Vec<&str> = tensors.iter().map(|tensor| FILES[tensor.shard]).collect();
        for &(index, file) in wrong {
            let count = files.len().max(1);
            if let Some(name) = files.get_mut(usize::from(index) % count) {
                *name = FILES[usize::from(file) % FILES.len()];
            }
        }
        let entries = tensors.iter().zip(files);
        let entries: Vec<String> =
            entries.map(|(tensor, file)| format!("{}:{}", quoted(&tensor.name), quoted(file))).collect();
        write(INDEX, format!("{{\"weight_map\":{{{}}}}}", entries.join(",")).as_bytes());
        total
    }

    /// The bytes of a shard.
    fn shard(&self, tensors: &[Tensor], shard: usize) -> Vec<u8> {
        let mut end = 0u64;
        let mut starts = Vec::new();
        let held = || (0..).zip(tensors).filter(|(_, tensor)| tensor.shard == shard);
        let entries = held().map(|(_, tensor)| {
            let start = end;
            end = end.saturating_add(tensor.bytes());
            starts.push(start);
            let (first, last) = tensor.offsets.unwrap_or((start, end));
            let Tensor { name, dtype, shape, .. } = tensor;
            format!(
                "{}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{first},{last}]}}",
                quoted(name)
            )
        });
        let mut header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
        let of_shard = |number: &u8| usize::from(*number) % (usize::from(self.shards % 3) + 1) == shard;
        for edit in &self.edits {
            if let Edit::Header(number, text) = edit
                && of_shard(number)
            {
                header = text.clone();
            }
        }
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        let data = bytes.len();
        bytes.resize(data + end.min(MAX_DATA) as usize, 0);
        for &(number, offset, value) in &self.values {
            let index = usize::from(number) % tensors.len().max(1);
            let Some(start) = held().zip(&starts).find(|((other, _), _)| *other == index) else { continue };
            let at = data.saturating_add(*start.1 as usize).saturating_add(usize::from(offset) * 2);
            bytes.get_mut(at..).into_iter().flatten().zip(value).for_each(|(byte, value)| *byte = value);
        }
        for edit in &self.edits {
            match edit {
                Edit::Length(number, length) if of_shard(number) => {
                    bytes[..8].copy_from_slice(&length.to_le_bytes())
                }
                Edit::Append(number, more) if of_shard(number) => bytes.extend(more),
                Edit::Whole(number, whole) if of_shard(number) => {
                    bytes.clone_from(whole);
                    bytes.resize(bytes.len().max(8), 0);
                }
                _ => {}
            }
        }
        bytes
    }
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let size = match self.dtype {
            "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => 1,
            "F32" => 4,
            "F64" | "I64" => 8,
            _ => 2,
        };
        self.shape.iter().fold(size, |product: u64, &axis| product.saturating_mul(axis))
    }
}

impl Edit {
    fn apply(&self, tensors: &mut Vec<Tensor>, shards: usize) {
        let count = tensors.len().max(1);
        let index = |index: &u8| usize::from(*index) % count;
        match self {
            Edit::Remove(at) if index(at) < tensors.len() => {
                tensors.remove(index(at));
            }
            Edit::Repeat(at, shard) => {
                if let Some(tensor) = tensors.get(index(at)) {
                    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
                    let shard = usize::from(*shard) % shards;
                    tensors.push(Tensor { name, dtype: tensor.dtype, shape, shard, offsets: None });
                }
            }
            Edit::Dtype(at, dtype) => {
                if let Some(tensor) = tensors.get_mut(index(at)) {
                    tensor.dtype = DTYPES[usize::from(*dtype) % DTYPES.len()];
                }
            }
            Edit::Axis(at, axis, size) => {
                let shape = tensors.get_mut(index(at)).map(|tensor| &mut tensor.shape);
                if let Some(old) = shape.and_then(|shape| shape.get_mut(usize::from(axis % 4))) {
                    *old = size.value();
                }
            }
            Edit::Axes(at, sizes) => {
                if let Some(tensor) = tensors.get_mut(index(at)) {
                    tensor.shape = sizes.iter().map(|size| size.value()).collect();
                }
            }
            Edit::Offsets(at, first, last) => {
                if let Some(tensor) = tensors.get_mut(index(at)) {
                    tensor.offsets = Some((first.value(), last.value()));
                }
            }
            Edit::Rename(at, name) => {
                if let Some(tensor) = tensors.get_mut(index(at)) {
                    tensor.name.clone_from(name);
                }
            }
            Edit::Rows(at, more) => {
                if let Some(rows) = tensors.get_mut(index(at)).and_then(|tensor| tensor.shape.first_mut()) {
                    *rows = rows.saturating_add_signed((*more).into());
                }
            }
            _ => {}
        }
    }
}

/// The tensors of [`Tiny`] in one of the layouts.
fn tensors(layout: u8, blocks: u32) -> Vec<Tensor> {
    let model = Tiny::new(blocks);
    let dims = model.dims();
    let bf16 = layout % 3 == 2;
    let mut tensors = Vec::new();
    for id in dims.tensors() {
        let shape = id.kind.shape(dims).to_vec();
        let mut add = |name: String, dtype, shape: Vec<u64>| {
            tensors.push(Tensor { name, dtype, shape, shard: 0, offsets: None });
        };
        if layout.is_multiple_of(3) {
            add(id.to_string(), id.kind.dtype().name(), shape);
            continue;
        }
        let head = dims.head_dim();
        let (q, kv) = (dims.num_heads() * head, dims.num_kv_heads() * head);
        match id.kind {
            TensorKind::QkvWeight | TensorKind::QkvBias => {
                let what = if id.kind == TensorKind::QkvWeight { "weight" } else { "bias" };
                for (part, rows) in [("q", q), ("k", kv), ("v", kv)] {
                    let shape = std::iter::once(rows).chain(shape.iter().skip(1).copied()).collect();
                    add(format!("model.layers.{}.self_attn.{part}_proj.{what}", id.block), "BF16", shape);
                }
            }
            TensorKind::Mlp1Scales | TensorKind::Mlp2Scales if bf16 => {}
            TensorKind::Mlp1Blocks if bf16 => {
                let shape = vec![dims.num_experts(), dims.embedding_dim(), 2 * dims.mlp_dim()];
                add(hugging_face(id).replace("_blocks", ""), "BF16", shape);
            }
            TensorKind::Mlp2Blocks if bf16 => {
                let shape = vec![dims.num_experts(), dims.mlp_dim(), dims.embedding_dim()];
                add(hugging_face(id).replace("_blocks", ""), "BF16", shape);
            }
            kind => add(hugging_face(id), kind.dtype().name(), shape),
        }
    }
    tensors
}

/// Hugging Face's name of a tensor that it does not split.
fn hugging_face(id: TensorId) -> String {
    let name = match id.kind {
        TensorKind::Embedding => return "model.embed_tokens.weight".into(),
        TensorKind::Norm => return "model.norm.weight".into(),
        TensorKind::Unembedding => return "lm_head.weight".into(),
        TensorKind::AttnNorm => "input_layernorm.weight",
        TensorKind::QkvWeight | TensorKind::QkvBias => "self_attn.qkv_proj.weight",
        TensorKind::Sinks => "self_attn.sinks",
        TensorKind::OutWeight => "self_attn.o_proj.weight",
        TensorKind::OutBias => "self_attn.o_proj.bias",
        TensorKind::MlpNorm => "post_attention_layernorm.weight",
        TensorKind::GateWeight => "mlp.router.weight",
        TensorKind::GateBias => "mlp.router.bias",
        TensorKind::Mlp1Blocks => "mlp.experts.gate_up_proj_blocks",
        TensorKind::Mlp1Scales => "mlp.experts.gate_up_proj_scales",
        TensorKind::Mlp1Bias => "mlp.experts.gate_up_proj_bias",
        TensorKind::Mlp2Blocks => "mlp.experts.down_proj_blocks",
        TensorKind::Mlp2Scales => "mlp.experts.down_proj_scales",
        TensorKind::Mlp2Bias => "mlp.experts.down_proj_bias",
    };
    format!("model.layers.{}.{name}", id.block)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without edits there is nothing to refuse; otherwise the target would look at refusals only.
    #[test]
    fn an_unedited_folder_of_each_layout_is_accepted() {
        for layout in 0..3 {
            let config = Text::Edited(Vec::new());
            let (edits, values, index) = (Vec::new(), Vec::new(), Index::True);
            let input =
                Input { layout, quantize: true, blocks: true, shards: 2, config, index, edits, values };
            let folder = scratch::folder();
            input.write(folder.path());
            let options = Options { vocabulary: tiny::vocabulary(), quantize: true };
            let accepted = Folder::open(folder.path(), options).expect("a sound folder");
            assert_eq!(accepted.layout() as u8, layout);
            tiny::model_bin(&accepted).expect("an export");
        }
    }
}
