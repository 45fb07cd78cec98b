//! One SafeTensors file of any model: its header, checked, and its tensors by name.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::shard::Shard;
use crate::violation::{Error, Result};

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its sizes, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes, from the start of the file.
    pub range: Range<u64>,
}

/// A SafeTensors file whose header is sound (rules `SRC-CONTAINER` and `SRC-DUPLICATE`): every byte behind it belongs to
/// exactly one tensor, whose dtype and shape account for it.
///
/// Nothing is mapped and nothing but the header is read before it is asked for.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    shard: Shard,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every violation of the header, [`Error::Io`] where the file cannot be read.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let (shard, entries) = Shard::open(path, &name)?;
        let tensors = entries.into_iter().map(|(name, stored)| {
            let shape = stored.shape.iter().map(|&size| size as usize).collect();
            (name, TensorInfo { dtype: stored.dtype, shape, range: stored.range })
        });
        Ok(TensorFile { path: path.into(), shard, tensors: tensors.collect() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor by its name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The bytes of a tensor, little-endian and in row-major order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no such tensor, [`Error::Io`] where the file cannot be read any more.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::Unsupported(format!("{}: no tensor {name}", self.path.display())));
        };
        let mut bytes = vec![0; (tensor.range.end - tensor.range.start) as usize];
        self.shard.read_at(&mut bytes, tensor.range.start)?;
        Ok(bytes)
    }

    /// The bytes of a part of a tensor, from `offset` bytes behind its first one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no such tensor or it ends before the part does, [`Error::Io`] where the file
    /// cannot be read any more.
    pub fn read_part(&self, name: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let tensor = self.tensors.get(name);
        let part = tensor.and_then(|tensor| {
            let start = tensor.range.start.checked_add(offset)?;
            let end = start.checked_add(out.len() as u64)?;
            (end <= tensor.range.end).then_some(start)
        });
        let Some(start) = part else {
            let part = format!("{} bytes at {offset} of a tensor {name}", out.len());
            return Err(Error::Unsupported(format!("{}: no {part}", self.path.display())));
        };
        self.shard.read_at(out, start)
    }
}
