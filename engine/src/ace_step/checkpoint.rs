//! A released checkpoint: a folder of components.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{dcae, transformer, umt5, vocoder};
use crate::error::Result;
use crate::weights::{self, ExpectedTensors, Mismatch, Role, Weights};

/// Folder of the transformer.
pub const TRANSFORMER: &str = "ace_step_transformer";
/// Folder of the autoencoder of mel spectrograms.
pub const DCAE: &str = "music_dcae_f8c8";
/// Folder of the vocoder.
pub const VOCODER: &str = "music_vocoder";
/// Folder of the prompt's encoder and its tokenizer.
pub const UMT5: &str = "umt5-base";

/// A checkpoint whose configurations and headers are read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder.
    pub path: PathBuf,
    /// `ace_step_transformer`.
    pub transformer: weights::Component<transformer::Config>,
    /// `music_dcae_f8c8`.
    pub dcae: weights::Component<dcae::Config>,
    /// `music_vocoder`.
    pub vocoder: weights::Component<vocoder::Config>,
    /// `umt5-base`.
    pub umt5: weights::Component<umt5::Config>,
}

impl Checkpoint {
    /// Reads the configurations and headers.
    ///
    /// # Errors
    /// As [`weights::Component::open`]'s, of the first component that cannot be had.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Ok(Checkpoint {
            path: path.into(),
            transformer: weights::Component::open(&path.join(TRANSFORMER))?,
            dcae: weights::Component::open(&path.join(DCAE))?,
            vocoder: weights::Component::open(&path.join(VOCODER))?,
            umt5: weights::Component::open(&path.join(UMT5))?,
        })
    }
}

/// What a component's header says.
#[derive(Clone, Debug, Serialize)]
pub struct Component {
    /// Its folder.
    pub name: &'static str,
    /// What is there.
    #[serde(flatten)]
    pub found: Found,
}

/// What is in a component's folder.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Found {
    /// No component, or a configuration that this code cannot run.
    Unreadable {
        /// Why.
        error: String,
    },
    /// Tensors.
    Tensors {
        /// How many.
        tensors: usize,
        /// Their elements.
        parameters: u64,
        /// The elements of those that inference needs.
        used: u64,
        /// Bytes of the file.
        bytes: u64,
        /// What is not as the model needs it.
        mismatches: Vec<Mismatch>,
    },
}

impl Component {
    /// Whether it is exactly what the model asks for.
    pub fn is_right(&self) -> bool {
        matches!(&self.found, Found::Tensors { mismatches, .. } if mismatches.is_empty())
    }
}

/// The components of a checkpoint beside what their configurations ask for, from the headers alone.
pub fn shapes(folder: &Path) -> Vec<Component> {
    let found = [
        (TRANSFORMER, described(&folder.join(TRANSFORMER), transformer::Transformer::new)),
        (DCAE, described(&folder.join(DCAE), dcae::Autoencoder::new)),
        (VOCODER, described(&folder.join(VOCODER), vocoder::Vocoder::new)),
        (UMT5, described(&folder.join(UMT5), umt5::Encoder::new)),
    ];
    let named = found.into_iter().map(|(name, found)| {
        let found = found.unwrap_or_else(|error| Found::Unreadable { error: error.to_string() });
        Component { name, found }
    });
    named.collect()
}

fn described<C: DeserializeOwned, M>(
    folder: &Path,
    new: impl Fn(&C, &Weights<'_>) -> Result<M>,
) -> Result<Found> {
    let component = weights::Component::<C>::open(folder)?;
    let expected = weights::expected(|weights| new(&component.config, weights))?;
    let stored = component.file.tensors();
    let elements = |shape: &[usize]| shape.iter().map(|&size| size as u64).product::<u64>();
    Ok(Found::Tensors {
        tensors: stored.len(),
        parameters: stored.values().map(|info| elements(&info.shape)).sum(),
        used: used_elements(&expected),
        bytes: stored.values().map(|info| info.range.end - info.range.start).sum(),
        mismatches: component.check(&expected),
    })
}

/// The elements of the tensors that inference needs.
pub fn used_elements(expected: &ExpectedTensors) -> u64 {
    let used = expected.values().filter(|wanted| wanted.role == Role::Used);
    used.map(|wanted| wanted.shape.iter().map(|&size| size as u64).product::<u64>()).sum()
}
