//! A GGUF file as a source of canonical tensors.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Cursor};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::container::{Container, Tensor};
use super::tensors::{Decoding, Overlap, Part, parts, unit_bytes, units_per_row};
use super::{metadata, vocabulary};
use crate::canonical::{self, Source};
use crate::model_bin::header::ModelHeader;
use crate::model_bin::tensors::{Dims, TensorId, TensorKind};
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};
use crate::vocabulary::Vocabulary;

/// Bytes that one thread reads from the file at a time.
const BUFFER: u64 = 1 << 20;
/// Violations that are listed before the rest is left out.
const MAX_VIOLATIONS: usize = 64;
const SECTION: &str = "GGUF tensors";

/// An open GGUF file of a GPT-OSS model. Rows are read from the file when they are asked for.
#[derive(Debug)]
pub struct Model {
    path: PathBuf,
    bytes: Bytes,
    header: ModelHeader,
    dims: Dims,
    vocabulary: Vocabulary,
    tensors: HashMap<TensorId, Vec<Stored>>,
    changed: Vec<(TensorId, String)>,
}

/// A part of a canonical tensor in the file.
#[derive(Debug)]
struct Stored {
    part: Part,
    decoding: Decoding,
    /// Start of its data in the file.
    start: u64,
}

#[derive(Debug)]
enum Bytes {
    File(File),
    Memory(Vec<u8>),
}

impl Model {
    /// Opens a file: reads metadata and descriptions, and whatever is F32 or F16, to know which values BF16 cannot hold.
    ///
    /// # Errors
    /// [`Error::Invalid`] with `SRC-*` violations (and `TOK-*` for a token that no vocabulary can have),
    /// [`Error::Io`], and [`Error::Unsupported`] for what is no regular file.
    pub fn open(path: &Path) -> Result<Model> {
        let file = File::open(path).map_err(Error::io(path))?;
        if !file.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::Unsupported(format!("{} is not a regular file", path.display())));
        }
        Model::new(path, Bytes::File(file))
    }

    /// As [`Model::open`], from a file's bytes; `path` is for messages.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Model> {
        Model::new(path, Bytes::Memory(bytes))
    }

    fn new(path: &Path, bytes: Bytes) -> Result<Model> {
        let invalid = |violations| Error::Invalid { path: path.into(), violations };
        let container = match &bytes {
            Bytes::File(file) => {
                let len = file.metadata().map_err(Error::io(path))?.len();
                Container::read(BufReader::new(file), len)
            }
            Bytes::Memory(bytes) => Container::read(Cursor::new(bytes), bytes.len() as u64),
        };
        let container = container.map_err(invalid)?;
        let header = metadata::header(&container).map_err(invalid)?;
        let vocabulary = vocabulary::vocabulary(&container).map_err(invalid)?;
        let dims = Dims::new(&header, vocabulary.len()).map_err(|unlayable| {
            let rule = Rule::SourceConfig;
            invalid(vec![metadata::violation(rule, unlayable.field, unlayable.found, unlayable.needed)])
        })?;
        let tensors = locate(&container, &dims).map_err(invalid)?;
        let mut model =
            Model { path: path.into(), bytes, header, dims, vocabulary, tensors, changed: Vec::new() };
        model.changed = model.inexact()?;
        Ok(model)
    }

    /// The tensors with values that are no BF16.
    fn inexact(&self) -> Result<Vec<(TensorId, String)>> {
        let wide = |stored: &&Stored| matches!(stored.decoding, Decoding::F32 | Decoding::F16);
        let mut changed: Vec<(TensorId, String)> = self
            .tensors
            .par_iter()
            .map(|(&id, parts)| {
                let unit_bytes = unit_bytes(id.kind, &self.dims);
                let mut inexact = 0;
                for stored in parts.iter().filter(wide) {
                    self.read_units(stored, stored.part.units(), unit_bytes, |_, bytes| {
                        inexact += stored.decoding.count_inexact(bytes);
                    })?;
                }
                let reason = || {
                    format!("{inexact} values are no BF16 in the GGUF file and were rounded to nearest even")
                };
                Ok((inexact > 0).then(|| (id, reason())))
            })
            .filter_map(Result::transpose)
            .collect::<Result<_>>()?;
        changed.sort();
        Ok(changed)
    }

    /// Calls `each` with runs of stored units: how many came before, and their bytes.
    fn read_units(
        &self,
        stored: &Stored,
        units: Range<u64>,
        unit_bytes: u64,
        mut each: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let stored_bytes = stored.decoding.stored_bytes(unit_bytes);
        let mut buffer = Vec::new();
        for run in canonical::runs(units.clone(), 1, stored_bytes, BUFFER as usize) {
            buffer.resize(((run.end - run.start) * stored_bytes) as usize, 0);
            self.bytes
                .read_at(&mut buffer, stored.start + run.start * stored_bytes)
                .map_err(Error::io(&self.path))?;
            each((run.start - units.start) as usize, &buffer);
        }
        Ok(())
    }
}

impl Source for Model {
    fn header(&self) -> &ModelHeader {
        &self.header
    }

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let units_per_row = units_per_row(tensor.kind, &self.dims);
        let run = rows.start.saturating_mul(units_per_row)..rows.end.saturating_mul(units_per_row);
        let unit_bytes = unit_bytes(tensor.kind, &self.dims);
        let size = unit_bytes as usize;
        for stored in self.tensors.get(&tensor).into_iter().flatten() {
            let Some(Overlap { units, first, stride }) = stored.part.overlap(&run) else {
                continue;
            };
            let stored_size = stored.decoding.stored_bytes(unit_bytes) as usize;
            self.read_units(stored, units, unit_bytes, |before, bytes| {
                // Neighbours in both files are decoded in one go.
                let step = if stride == 1 { bytes.len() } else { stored_size };
                for (index, bytes) in bytes.chunks_exact(step).enumerate() {
                    let start = (first + (before + index) * stride) * size;
                    let length = step / stored_size * size;
                    if let Some(out) = out.get_mut(start..start + length) {
                        stored.decoding.decode(bytes, out);
                    }
                }
            })?;
        }
        Ok(())
    }

    fn check_values(&self, progress: &dyn Progress) -> Result<()> {
        canonical::check_values(self, &self.path.to_string_lossy(), progress)
    }

    fn changed(&self) -> Vec<(TensorId, String)> {
        self.changed.clone()
    }
}

impl Bytes {
    fn read_at(&self, out: &mut [u8], start: u64) -> io::Result<()> {
        match self {
            Bytes::File(file) => std::os::unix::fs::FileExt::read_exact_at(file, out, start),
            Bytes::Memory(bytes) => {
                let found =
                    usize::try_from(start).ok().and_then(|start| bytes.get(start..)?.get(..out.len()));
                out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// Finds every part of every canonical tensor, and nothing else, in the file.
fn locate(container: &Container, dims: &Dims) -> Result<HashMap<TensorId, Vec<Stored>>, Vec<Violation>> {
    let mut tensors = HashMap::new();
    let mut violations = Vec::new();
    let mut known = HashSet::new();
    for id in dims.tensors() {
        let mut stored = Vec::new();
        for part in parts(id, dims) {
            match check(id, &part, container.tensor(&part.name)) {
                Ok((decoding, start)) => {
                    known.insert(part.name.clone());
                    stored.push(Stored { part, decoding, start });
                }
                Err(violation) => violations.push(violation),
            }
        }
        tensors.insert(id, stored);
        // Each block that the metadata makes up adds violations, so a hostile number of blocks ends here.
        if violations.len() >= MAX_VIOLATIONS {
            return Err(violations);
        }
    }
    // Codes and scales are one GGUF tensor, which is named once.
    violations.dedup_by(|a, b| a.field == b.field && a.rule == b.rule);
    if violations.is_empty() {
        let unknown = container.tensors().filter(|(name, _)| !known.contains(*name)).take(MAX_VIOLATIONS);
        violations.extend(unknown.map(|(name, tensor)| Violation {
            rule: Rule::SourceContainer,
            section: SECTION.into(),
            field: name.into(),
            range: tensor.range.clone(),
            found: "a tensor that GPT-OSS does not have".into(),
            needed: "the tensors of GPT-OSS only".into(),
        }));
    }
    if violations.is_empty() { Ok(tensors) } else { Err(violations) }
}

/// How a part is decoded and where it starts, if it is there in a form that can be used.
fn check(id: TensorId, part: &Part, tensor: Option<&Tensor>) -> Result<(Decoding, u64), Violation> {
    let refuse = |rule, range, found, needed: String| {
        Err(Violation { rule, section: SECTION.into(), field: part.name.clone(), range, found, needed })
    };
    let Some(tensor) = tensor else {
        return refuse(Rule::SourceMissing, 0..0, "no such tensor".into(), format!("it, for {id}"));
    };
    let range = tensor.range.clone();
    let Some(decoding) = Decoding::new(id.kind, tensor.ty) else {
        return refuse(Rule::SourceDtype, range, tensor.ty.to_string(), Decoding::needed(id.kind).into());
    };
    if tensor.axes != part.axes {
        // A Hugging Face checkpoint pads both embeddings with rows that no token has.
        let padded = matches!(id.kind, TensorKind::Embedding | TensorKind::Unembedding);
        match (tensor.axes.as_slice(), part.axes.as_slice()) {
            ([width, rows], [needed_width, needed_rows]) if padded && width == needed_width => {
                if rows < needed_rows {
                    let found = format!("{rows} rows");
                    return refuse(
                        Rule::SourceRows,
                        range,
                        found,
                        format!("a row for each of {needed_rows} tokens"),
                    );
                }
            }
            (found, needed) => {
                return refuse(
                    Rule::SourceShape,
                    range,
                    format!("{found:?}"),
                    format!("{needed:?}, fastest axis first"),
                );
            }
        }
    }
    Ok((decoding, range.start))
}
