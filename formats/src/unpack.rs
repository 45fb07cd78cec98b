//! Any model back to an original-layout SafeTensors checkpoint.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;

use crate::canonical::{Source, for_each_run};
use crate::checkpoint::config;
use crate::model_bin::tensors::{Dtype, TensorId};
use crate::output::OutputFolder;
use crate::progress::Progress;
use crate::violation::{Error, Result};
use crate::vocabulary::Vocabulary;

/// Bytes of a tensor that are moved at a time.
const BUFFER: usize = 4 << 20;

/// What an unpacked checkpoint could not keep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unpacked {
    /// Header fields that no config reproduces: exporting again gives another value there.
    pub lost_fields: Vec<&'static str>,
    /// Whether the vocabulary is not o200k and so was written beside the weights.
    pub vocabulary_written: bool,
}

/// Writes `source` to the folder `target`: `config.json`, `model.safetensors`, and `vocabulary.json` where the vocabulary
/// is not o200k's. Exporting that folder gives a file with the same tensors again.
///
/// # Errors
/// [`Error::Unsupported`] where `target` is there and not an empty folder, [`Error::Io`] where reading or writing fails.
pub fn unpack(source: &dyn Source, target: &Path, progress: &dyn Progress) -> Result<Unpacked> {
    let folder = OutputFolder::create(target)?;
    let recovered = config::recover(source.header());
    let write = |name: &str, value: &serde_json::Value| {
        let path = folder.path().join(name);
        fs::write(&path, format!("{value:#}\n")).map_err(Error::io(path))
    };
    write("config.json", &recovered.json.into())?;
    let vocabulary_written = source.vocabulary() != Vocabulary::o200k();
    if vocabulary_written {
        write(crate::vocabulary::FILE_NAME, &source.vocabulary().to_json())?;
    }
    write_tensors(source, &folder.path().join("model.safetensors"), progress)?;
    folder.finish()?;
    Ok(Unpacked { lost_fields: recovered.lost, vocabulary_written })
}

/// The tensors of a model as one SafeTensors file.
fn write_tensors(source: &dyn Source, path: &Path, progress: &dyn Progress) -> Result<()> {
    let dims = source.dims();
    let ids: Vec<TensorId> = dims.tensors().collect();
    let mut offset = 0;
    let infos = ids.iter().map(|id| {
        let shape = id.kind.shape(dims);
        let start = offset;
        offset += (shape.elements() * id.kind.dtype().size()) as usize;
        let dtype = match id.kind.dtype() {
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::U8 => safetensors::Dtype::U8,
        };
        let shape = shape.iter().map(|&size| size as usize).collect();
        (id.to_string(), TensorInfo { dtype, shape, data_offsets: (start, offset) })
    });
    let format = [("format".to_string(), "pt".to_string())].into();
    let malformed = |error: &dyn std::fmt::Display| {
        Error::Unsupported(format!("SafeTensors cannot hold this model: {error}"))
    };
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(|error| malformed(&error))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|error| malformed(&error))?;
    // The data starts on a multiple of 8, as the safetensors crate writes it.
    header.resize(header.len().next_multiple_of(8), b' ');

    progress.begin("unpacking", offset as u64);
    let file = fs::File::create_new(path).map_err(Error::io(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io(path));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for &id in &ids {
        for_each_run(source, id, 64, BUFFER, |_, content| {
            write(content)?;
            progress.advance(content.len() as u64);
            Ok(())
        })?;
    }
    out.flush().and_then(|()| file.sync_all()).map_err(Error::io(path))
}
