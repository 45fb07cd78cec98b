//! The canonical tensors of a model, whatever container holds it.
//!
//! The canonical form is the original checkpoint's: its names, dtypes and shapes, with embedding and unembedding cut
//! to one row for each token. Every container yields it through [`Source`], every writer consumes it.
//!
//! A tensor is read by rows so that nothing larger than a buffer is ever in memory. A *row* is one element of a
//! vector, otherwise the last axis (for MXFP4 blocks the last two, so that row r of the blocks and row r of the
//! scales are the same row of the matrix); see [`TensorKind::row_bytes`].

use std::ops::Range;

use crate::Result;
use crate::model_bin::header::ModelHeader;
use crate::model_bin::tensors::{Dims, TensorId, TensorKind};
use crate::vocabulary::Vocabulary;

/// A model that can be read tensor by tensor.
pub trait Source: Sync {
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
    for_each_run_in(row_bytes, 0..rows, granule, buffer_bytes, |run, buffer| {
        source.read_rows(tensor, run.clone(), buffer)?;
        each(run, buffer)
    })
}

/// [`for_each_run`] over some rows only and without reading: `each` fills the buffer itself.
pub fn for_each_run_in(
    row_bytes: u64,
    rows: Range<u64>,
    granule: u64,
    buffer_bytes: usize,
    mut each: impl FnMut(Range<u64>, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let granule = granule.max(1);
    let step = (buffer_bytes as u64 / (row_bytes * granule).max(1)).max(1) * granule;
    let mut buffer = vec![0; (step.min(rows.end - rows.start) * row_bytes) as usize];
    let mut start = rows.start;
    while start < rows.end {
        let run = start..(start + step).min(rows.end);
        let bytes = ((run.end - run.start) * row_bytes) as usize;
        each(run.clone(), &mut buffer[..bytes])?;
        start = run.end;
    }
    Ok(())
}

/// The rows of the canonical tensor that the file stores as one piece: for an expert's tensor, one expert's.
pub fn piece_rows(kind: TensorKind, expert: u32, dims: &Dims) -> Range<u64> {
    let rows = kind.piece_rows(dims);
    let first = rows * u64::from(expert);
    first..first + rows
}
