//! A folder of a checkpoint, and what is wrong with it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use formats::checkpoint::TensorFile;
use formats::progress::Progress;
use safetensors::Dtype;
use serde::de::DeserializeOwned;

use super::{ExpectedTensors, Role, Types, Weights, values};
use crate::backend::Device;
use crate::error::{Error, Result};

/// Names that the SafeTensors file of a component may have.
const FILES: [&str; 2] = ["diffusion_pytorch_model.safetensors", "model.safetensors"];

/// A component of a checkpoint: its configuration, and the header of its tensors, which are not read before they are
/// needed.
#[derive(Debug)]
pub struct Component<C> {
    /// The folder.
    pub path: PathBuf,
    /// `config.json`.
    pub config: C,
    /// The SafeTensors file.
    pub file: TensorFile,
}

/// A tensor of a file that is not what the model's constructor asks for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Mismatch {
    /// The released name.
    pub tensor: String,
    /// What is in the file.
    pub found: String,
    /// What the model needs.
    pub needed: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: found {}, needed {}", self.tensor, self.found, self.needed)
    }
}

impl<C: DeserializeOwned> Component<C> {
    /// Reads the configuration and the header.
    ///
    /// # Errors
    /// [`Error::Component`] where a file is missing or the configuration is not one, [`Error::Format`] where the header of
    /// the SafeTensors file is not sound.
    pub fn open(path: &Path) -> Result<Component<C>> {
        let config = read_json(&path.join("config.json"))?;
        let file = FILES.iter().map(|name| path.join(name)).find(|file| file.is_file());
        let file = file.ok_or_else(|| Error::Component {
            path: path.into(),
            reason: format!("no weights; needed {} or {}", FILES[0], FILES[1]),
        })?;
        Ok(Component { path: path.into(), config, file: TensorFile::open(&file)? })
    }
}

impl<C> Component<C> {
    /// Every tensor that is missing, not expected or of another shape or type. Unsorted problems of a file would be no help:
    /// they come in the order of their names.
    pub fn check(&self, expected: &ExpectedTensors) -> Vec<Mismatch> {
        let mut mismatches = Vec::new();
        let stored: std::collections::BTreeMap<_, _> =
            self.file.tensors().iter().map(|(name, info)| (values::released_name(name), info)).collect();
        for (name, wanted) in expected {
            let needed = format!("shape {:?}", wanted.shape);
            let found = match stored.get(name) {
                None if wanted.role == Role::Optional => continue,
                None => "no such tensor".into(),
                Some(info) if info.shape != wanted.shape => format!("shape {:?}", info.shape),
                Some(info) if !matches!(info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) => {
                    format!("{:?}, which is no type of weights", info.dtype)
                }
                Some(_) => continue,
            };
            mismatches.push(Mismatch { tensor: name.clone(), found, needed });
        }
        let unexpected = stored.iter().filter(|(name, _)| !expected.contains_key(*name));
        mismatches.extend(unexpected.map(|(name, info)| Mismatch {
            tensor: name.clone(),
            found: format!("{:?} {:?}", info.dtype, info.shape),
            needed: "no such tensor".into(),
        }));
        mismatches.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        mismatches
    }

    /// Checks every name and shape, then brings tensor after tensor to the device.
    ///
    /// # Errors
    /// [`Error::Mismatches`] before anything is loaded, [`Error::Weights`] for a tensor that holds what is no number.
    pub fn load<M>(
        &self,
        device: &Device,
        types: Types,
        progress: &dyn Progress,
        build: impl Fn(&Weights<'_>) -> Result<M>,
    ) -> Result<M> {
        let expected = super::expected(&build)?;
        let mismatches = self.check(&expected);
        if !mismatches.is_empty() {
            return Err(Error::Mismatches { path: self.file.path().into(), mismatches });
        }
        let used = expected.iter().filter(|(_, wanted)| wanted.role == Role::Used);
        let bytes = used.map(|(name, _)| values::stored_bytes(&self.file, name)).sum();
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        progress.begin(&format!("loading {name}"), bytes);
        let model = super::of_file(&self.file, device, types, progress, &build)?;
        device.sync()?;
        Ok(model)
    }
}

/// A JSON file of some type.
///
/// # Errors
/// [`Error::Component`] where it cannot be read or is of another type.
pub(crate) fn read_json<C: DeserializeOwned>(path: &Path) -> Result<C> {
    let refuse = |reason: String| Error::Component { path: path.into(), reason };
    let text = fs::read(path).map_err(|error| refuse(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))
}
