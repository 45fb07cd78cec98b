//! A GPT-OSS checkpoint: a folder of SafeTensors files and a `config.json`.
//!
//! [`Folder`] reads the three layouts there are and yields the canonical tensors of all of them. Opening one reads
//! headers and the config only, and finds everything that makes a checkpoint unfit before a writer starts. Nothing is
//! memory-mapped: mapped pages count as resident memory, and an export's stays small whatever the model's size.

pub mod config;
mod folder;
mod names;
mod quantized;
mod shard;
mod tensor_file;
mod values;

use std::fmt;

pub use folder::Folder;
pub use tensor_file::{TensorFile, TensorInfo};

use crate::vocabulary::Vocabulary;

/// Which names and which form of experts a checkpoint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// OpenAI's: `embedding.weight`, `block.N.…`, MXFP4 experts.
    Original,
    /// Hugging Face's: `model.embed_tokens.weight`, `model.layers.N.…`, MXFP4 experts.
    HuggingFace,
    /// Hugging Face's with BF16 experts, transposed, as fine-tuning leaves them.
    HuggingFaceBf16,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Layout::Original => "original",
            Layout::HuggingFace => "Hugging Face",
            Layout::HuggingFaceBf16 => "Hugging Face, BF16 experts",
        })
    }
}

/// How a checkpoint is to be read.
#[derive(Clone, Debug)]
pub struct Options {
    /// The vocabulary whose tokens the first rows of the embedding belong to.
    pub vocabulary: Vocabulary,
    /// Whether BF16 experts are quantised to MXFP4; otherwise they are refused (`SRC-BF16-EXPERTS`).
    pub quantize: bool,
}
