//! Opens a model in whatever container it is.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::canonical::Source;
use crate::checkpoint::{Folder, Options};
use crate::gguf;
use crate::model_bin::{Depth, Verified};
use crate::output::parent;
use crate::progress::Progress;
use crate::violation::{Error, Result};
use crate::vocabulary::{FILE_NAME, Vocabulary};

/// How a model is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// A folder of SafeTensors files.
    Checkpoint,
    /// A GGUF file.
    Gguf,
    /// A `model.bin`, which is what any other file is taken for.
    ModelBin,
}

impl Container {
    /// Looks at the first bytes and at the name only.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Unsupported`] for a file of a checkpoint's folder.
    pub fn detect(path: &Path) -> Result<Container> {
        if path.metadata().map_err(Error::io(path))?.is_dir() {
            return Ok(Container::Checkpoint);
        }
        let mut magic = Vec::new();
        File::open(path).and_then(|file| file.take(4).read_to_end(&mut magic)).map_err(Error::io(path))?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if matches!(extension, "safetensors" | "json") {
            return Err(Error::Unsupported(format!(
                "{} is a part of a checkpoint; name its folder, {}",
                path.display(),
                parent(path).display()
            )));
        }
        Ok(if magic == *b"GGUF" { Container::Gguf } else { Container::ModelBin })
    }
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Container::Checkpoint => "SafeTensors checkpoint",
            Container::Gguf => "GGUF",
            Container::ModelBin => "model.bin",
        })
    }
}

/// The vocabulary of a checkpoint folder: the given file's, else the folder's own `vocabulary.json`, else o200k.
pub fn vocabulary_for(folder: &Path, given: Option<&Path>) -> Result<Vocabulary> {
    let own = folder.join(FILE_NAME);
    match given {
        Some(path) => Vocabulary::load(path),
        None if own.is_file() => Vocabulary::load(&own),
        None => Ok(Vocabulary::o200k().clone()),
    }
}

/// Opens a model. BF16 experts of a checkpoint are quantised if `quantize` says so and refused otherwise.
///
/// # Errors
/// [`Error::Invalid`] with every rule that the container breaks; a `model.bin` is verified in structure only.
pub fn open(
    path: &Path,
    vocabulary: Option<&Path>,
    quantize: bool,
    progress: &dyn Progress,
) -> Result<Box<dyn Source>> {
    Ok(match Container::detect(path)? {
        Container::Checkpoint => {
            let vocabulary = vocabulary_for(path, vocabulary)?;
            Box::new(Folder::open(path, Options { vocabulary, quantize })?)
        }
        Container::Gguf => Box::new(gguf::Model::open(path)?),
        Container::ModelBin => Box::new(Verified::open(path, Depth::Structure, progress)?),
    })
}
