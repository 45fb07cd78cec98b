//! A verified model in stored form: what the file's plan says, from a `model.bin` or from a container that could be
//! exported to one. Runtimes load from here, so that both give them the same bytes.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header::ModelHeader;
use super::layout::{self, Payload, PieceId};
use super::tensors::{Dims, Shape};
use super::verify::Depth;
use super::write::{self, SourcePayload};
use super::{Verified, layout::Tensor};
use crate::canonical::Source;
use crate::container::{self, Container};
use crate::progress::Progress;
use crate::violation::{Error, Result};
use crate::vocabulary::Vocabulary;

/// A model in which no rule is broken, as the bytes that a `model.bin` of it stores: rows of Q and K interleaved and
/// scaled, MXFP4 scales with their offset. There is no other way to make one than to verify a container. Clones share it.
#[derive(Clone)]
pub struct Stored {
    path: PathBuf,
    container: Container,
    inner: Inner,
}

#[derive(Clone)]
enum Inner {
    File(Arc<Verified>),
    Source { source: Arc<dyn Source>, plan: Arc<layout::File> },
}

/// How [`Stored::open`] treats a container.
#[derive(Clone, Debug)]
pub struct StoredOptions {
    /// How much of a `model.bin` is verified.
    pub depth: Depth,
    /// A vocabulary file for a checkpoint, in place of its own or o200k's.
    pub vocabulary: Option<PathBuf>,
    /// Whether BF16 experts of a checkpoint are quantised to MXFP4; otherwise they are refused (`SRC-BF16-EXPERTS`).
    pub quantize: bool,
}

impl Default for StoredOptions {
    fn default() -> StoredOptions {
        StoredOptions { depth: Depth::Structure, vocabulary: None, quantize: false }
    }
}

impl Stored {
    /// Opens a `model.bin`, a folder of SafeTensors or a GGUF. A `model.bin` is mapped, anything else is read when a
    /// piece is asked for; nothing is written.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every rule that the container breaks, [`Error::Io`] where it cannot be read.
    pub fn open(path: &Path, options: &StoredOptions, progress: &dyn Progress) -> Result<Stored> {
        let container = Container::detect(path)?;
        let inner = match container {
            Container::ModelBin => Inner::File(Arc::new(Verified::open(path, options.depth, progress)?)),
            Container::Checkpoint | Container::Gguf => {
                let source =
                    container::open(path, options.vocabulary.as_deref(), options.quantize, progress)?;
                let plan = Arc::new(write::plan(source.as_ref())?);
                source.check_values(progress)?;
                Inner::Source { source: source.into(), plan }
            }
        };
        Ok(Stored { path: path.into(), container, inner })
    }

    /// A model that is in no container, such as one of computed weights. `name` stands for its path.
    ///
    /// # Errors
    /// Where the source's header allows no layout.
    pub fn of_source(source: Box<dyn Source>, name: &str) -> Result<Stored> {
        let plan = Arc::new(write::plan(source.as_ref())?);
        let inner = Inner::Source { source: source.into(), plan };
        Ok(Stored { path: name.into(), container: Container::Checkpoint, inner })
    }

    /// Where the model is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is stored in.
    pub fn container(&self) -> Container {
        self.container
    }

    /// The hyper-parameters.
    pub fn header(&self) -> &ModelHeader {
        self.source().header()
    }

    /// The sizes of the tensors.
    pub fn dims(&self) -> &Dims {
        self.source().dims()
    }

    /// The vocabulary, one token for each row of the embedding.
    pub fn vocabulary(&self) -> &Vocabulary {
        self.source().vocabulary()
    }

    /// The canonical tensors, the transform of Q and K undone.
    pub fn source(&self) -> &dyn Source {
        match &self.inner {
            Inner::File(file) => file.as_ref(),
            Inner::Source { source, .. } => source.as_ref(),
        }
    }

    /// The sections of the file, read or planned.
    pub fn layout(&self) -> &layout::File {
        match &self.inner {
            Inner::File(file) => file.file(),
            Inner::Source { plan, .. } => plan,
        }
    }

    /// The shape of a piece, or `None` where the model has no such piece.
    pub fn shape(&self, piece: PieceId) -> Option<Shape> {
        self.layout().weights.piece(piece).map(|tensor| tensor.shape)
    }

    /// The stored bytes of a piece: borrowed from a mapped file, read from any other container.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the model has no such piece; otherwise what reading a checkpoint may give, a NaN
    /// (`SRC-NAN`) included.
    pub fn piece(&self, piece: PieceId) -> Result<Cow<'_, [u8]>> {
        let missing = || Error::Unsupported(format!("{}: no {piece} in this model", self.path.display()));
        let tensor: &Tensor = self.layout().weights.piece(piece).ok_or_else(missing)?;
        match &self.inner {
            Inner::File(file) => {
                let range = tensor.range.start as usize..tensor.range.end as usize;
                Ok(Cow::Borrowed(file.bytes().get(range).ok_or_else(missing)?))
            }
            Inner::Source { source, .. } => {
                let mut bytes = Vec::with_capacity((tensor.range.end - tensor.range.start) as usize);
                SourcePayload::new(source.as_ref(), &())
                    .write_piece(piece, &mut bytes)
                    .map_err(|error| write::unwrap(binrw::Error::Io(error), &self.path))?;
                Ok(Cow::Owned(bytes))
            }
        }
    }
}
