//! BLAKE3 digests of a model's tensors that do not depend on the container (`spec/digest.md`).

use std::fmt;

use rayon::prelude::*;
use serde::Serialize;

use crate::canonical::{Source, for_each_run};
use crate::model_bin::qkv;
use crate::model_bin::tensors::TensorId;
use crate::progress::Progress;
use crate::violation::Result;

/// Bytes of a tensor that are hashed at a time.
const BUFFER: usize = 4 << 20;

/// The digest of one tensor in canonical form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorDigest {
    /// The original checkpoint's name.
    pub name: String,
    /// As SafeTensors spells it.
    pub dtype: &'static str,
    /// Row-major.
    pub shape: Vec<u64>,
    /// BLAKE3 of the elements, little-endian and row-major, in hexadecimal.
    pub blake3: String,
}

impl fmt::Display for TensorDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {} {:?} {}", self.blake3, self.dtype, self.shape, self.name)
    }
}

/// The digests of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// BLAKE3 of the manifest's lines, one for each tensor, sorted by name.
    pub model: String,
    /// Sorted by name.
    pub tensors: Vec<TensorDigest>,
    /// Tensors that the container does not hold exactly, and why: their digests may differ from the original's.
    pub changed: Vec<Changed>,
}

/// A tensor that a container changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// The original checkpoint's name.
    pub name: String,
    /// What happened to it.
    pub reason: String,
}

/// Digests every tensor of a model. Reads the whole model, on all cores.
pub fn digest(source: &dyn Source, progress: &dyn Progress) -> Result<Manifest> {
    let dims = source.dims();
    let ids: Vec<TensorId> = dims.tensors().collect();
    progress.begin("hashing", ids.iter().map(|id| id.kind.rows(dims) * id.kind.row_bytes(dims)).sum());
    let mut tensors: Vec<TensorDigest> = ids
        .par_iter()
        .map(|&id| {
            let mut hasher = blake3::Hasher::new();
            for_each_run(source, id, 64, BUFFER, |run, content| {
                if id.kind.is_qkv() {
                    qkv::canonicalise(run.start, content, id.kind.row_bytes(dims) as usize, dims);
                }
                hasher.update_rayon(content);
                progress.advance(content.len() as u64);
                Ok(())
            })?;
            Ok(TensorDigest {
                name: id.to_string(),
                dtype: id.kind.dtype().name(),
                shape: id.kind.shape(dims).to_vec(),
                blake3: hasher.finalize().to_hex().to_string(),
            })
        })
        .collect::<Result<_>>()?;
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let mut model = blake3::Hasher::new();
    for tensor in &tensors {
        model.update(format!("{tensor}\n").as_bytes());
    }
    let changed =
        source.changed().into_iter().map(|(id, reason)| Changed { name: id.to_string(), reason }).collect();
    Ok(Manifest { model: model.finalize().to_hex().to_string(), tensors, changed })
}
