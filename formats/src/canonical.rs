//! The canonical tensors of a model, whatever container holds it.
//!
//! The canonical form is the original checkpoint's: its names, dtypes and shapes, with embedding and unembedding cut
//! to one row for each token. Every container yields it through [`Source`], every writer consumes it.
//!
//! A tensor is read by rows so that nothing larger than a buffer is ever in memory. A *row* is one element of a
//! vector, otherwise the last axis (for MXFP4 blocks the last two, so that row r of the blocks and row r of the
//! scales are the same row of the matrix); see [`TensorKind::row_bytes`].

use std::ops::Range;

use rayon::prelude::*;

use crate::model_bin::header::{HEAD_DIM, ModelHeader};
use crate::model_bin::tensors::{Dims, TensorId, TensorKind};
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};
use crate::vocabulary::Vocabulary;

/// A model that can be read tensor by tensor.
pub trait Source: Send + Sync {
    /// The hyper-parameters, computed as the genuine exporter does.
    fn header(&self) -> &ModelHeader;

    /// The sizes of the tensors.
    fn dims(&self) -> &Dims;

    /// The vocabulary that the first rows of the embedding belong to.
    fn vocabulary(&self) -> &Vocabulary;

    /// Fills `out` with rows `rows` of the canonical form of `tensor`, row-major and little-endian.
    ///
    /// `out` holds exactly `rows.len() × row_bytes` bytes, and the rows lie within the tensor; anything else is a
    /// programming error and may be answered by any bytes or an error, never by a panic.
    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()>;

    /// Looks for the values that no file may hold, before anything is written: MXFP4 scales above 240 (`SRC-SCALE`) and
    /// NaN in Q, K and V (`SRC-NAN`).
    ///
    /// # Errors
    /// [`Error::Invalid`] with one violation for each tensor concerned.
    fn check_values(&self, progress: &dyn Progress) -> Result<()>;

    /// What this container does not hold in canonical form and where it could not be recovered exactly: a tensor and
    /// why. Empty for a SafeTensors checkpoint.
    fn changed(&self) -> Vec<(TensorId, String)> {
        Vec::new()
    }
}

/// Calls `each` with successive runs of rows of `tensor`, at most `buffer_bytes` at a time (one row at least), in
/// multiples of `granule` rows except for the last run of the tensor.
pub fn for_each_run(
    source: &dyn Source,
    tensor: TensorId,
    granule: u64,
    buffer_bytes: usize,
    mut each: impl FnMut(Range<u64>, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let row_bytes = tensor.kind.row_bytes(source.dims());
    let rows = tensor.kind.rows(source.dims());
    let mut buffer = Vec::new();
    for run in runs(0..rows, granule, row_bytes, buffer_bytes) {
        buffer.resize(((run.end - run.start) * row_bytes) as usize, 0);
        source.read_rows(tensor, run.clone(), &mut buffer)?;
        each(run, &mut buffer)?;
    }
    Ok(())
}

/// Cuts `rows` into runs of at most `buffer_bytes` (one granule at least), each but the last a multiple of `granule`
/// rows long.
pub fn runs(
    rows: Range<u64>,
    granule: u64,
    row_bytes: u64,
    buffer_bytes: usize,
) -> impl Iterator<Item = Range<u64>> {
    let granule = granule.max(1);
    let step = (buffer_bytes as u64 / (row_bytes * granule).max(1)).max(1) * granule;
    let mut start = rows.start;
    std::iter::from_fn(move || {
        let run = start..start.saturating_add(step).min(rows.end);
        start = run.end;
        (run.start < run.end).then_some(run)
    })
}

/// The rows of the canonical tensor that the file stores as one piece: for an expert's tensor, one expert's.
pub fn piece_rows(kind: TensorKind, expert: u32, dims: &Dims) -> Range<u64> {
    let rows = kind.piece_rows(dims);
    let first = rows * u64::from(expert);
    first..first + rows
}

/// Bytes that one thread reads at a time.
const BUFFER: usize = 4 << 20;

/// [`Source::check_values`] for a container in which every tensor can be read at once. `section` is what violations
/// call it.
pub fn check_values(source: &dyn Source, section: &str, progress: &dyn Progress) -> Result<()> {
    let dims = source.dims();
    let tensors: Vec<TensorId> =
        dims.tensors().filter(|id| id.kind.is_scales() || id.kind.is_qkv()).collect();
    let bytes = |id: &TensorId| id.kind.rows(dims) * id.kind.row_bytes(dims);
    progress.begin("checking scales and QKV", tensors.iter().map(bytes).sum());
    let found: Vec<Option<Violation>> = tensors
        .par_iter()
        .map(|&id| {
            let mut bad: Option<(u64, String)> = None;
            let mut count = 0u64;
            for_each_run(source, id, HEAD_DIM.into(), BUFFER, |run, content| {
                let first = run.start * (id.kind.row_bytes(dims) / id.kind.dtype().size());
                let mut add = |index: usize, found: String| {
                    count += 1;
                    bad.get_or_insert((first + index as u64, found));
                };
                if id.kind.is_scales() {
                    let above = content.iter().enumerate().filter(|&(_, &scale)| scale > 240);
                    above.for_each(|(index, scale)| add(index, format!("scale {scale}")));
                } else {
                    let bits = content.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair));
                    let nan = bits.enumerate().filter(|&(_, bits)| bits & 0x7fff > 0x7f80);
                    nan.for_each(|(index, _)| add(index, "NaN".into()));
                }
                progress.advance(content.len() as u64);
                Ok(())
            })?;
            let (rule, needed) = if id.kind.is_scales() {
                (Rule::SourceScale, "scales up to 240")
            } else {
                (Rule::SourceNan, "no NaN")
            };
            Ok(bad.map(|(element, found)| Violation {
                rule,
                section: section.into(),
                field: id.to_string(),
                range: 0..0,
                found: format!("{found} at element {element} ({count} such)"),
                needed: needed.into(),
            }))
        })
        .collect::<Result<_>>()?;
    let violations: Vec<Violation> = found.into_iter().flatten().collect();
    if violations.is_empty() { Ok(()) } else { Err(Error::Invalid { path: section.into(), violations }) }
}
