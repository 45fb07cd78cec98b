//! BF16 experts, which Hugging Face stores transposed, as the MXFP4 experts of the canonical form.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use rayon::prelude::*;

use crate::mxfp4::{BLOCK, BLOCK_BYTES, quantize_row};
use crate::violation::Result;

/// One expert's matrix in MXFP4, block column by block column: what a strip of 32 rows of the transposed matrix, which
/// lie together in the file, turns into.
#[derive(Debug)]
pub(super) struct Matrix {
    rows: usize,
    /// `[columns / 32, rows, 16]`.
    blocks: Vec<u8>,
    /// `[columns / 32, rows]`.
    scales: Vec<u8>,
}

/// A BF16 value that MXFP4 cannot hold, and where it stands in the transposed matrix.
pub(super) struct NotFiniteAt {
    pub(super) element: u64,
    pub(super) bytes: [u8; 2],
}

impl Matrix {
    /// Quantises a matrix of `rows` × `columns` (a multiple of 32) values that is stored transposed in BF16;
    /// `read_at` fills a buffer with the stored matrix's bytes from an offset on.
    ///
    /// Memory: the result, and a strip of 32 · `rows` values for each thread.
    pub(super) fn quantize(
        rows: usize,
        columns: usize,
        read_at: impl Fn(&mut [u8], u64) -> Result<()> + Sync,
    ) -> Result<Result<Matrix, NotFiniteAt>> {
        let strips = columns / BLOCK;
        let mut blocks = vec![0; strips * rows * BLOCK_BYTES];
        let mut scales = vec![0; strips * rows];
        let failed = blocks
            .par_chunks_mut((rows * BLOCK_BYTES).max(1))
            .zip(scales.par_chunks_mut(rows.max(1)))
            .enumerate()
            .map_init(
                || vec![0; BLOCK * rows * 2],
                |stored, (strip, (blocks, scales))| {
                    let first = strip as u64 * (BLOCK * rows) as u64;
                    read_at(stored, first * 2)?;
                    Ok(quantize_strip(stored, rows, blocks, scales)
                        .err()
                        .map(|failed| NotFiniteAt { element: first + failed.element, ..failed }))
                },
            )
            .find_map_first(|outcome| outcome.transpose());
        match failed {
            None => Ok(Ok(Matrix { rows, blocks, scales })),
            Some(Ok(not_finite)) => Ok(Err(not_finite)),
            Some(Err(error)) => Err(error),
        }
    }

    /// Copies a row's blocks, 16 bytes for each 32 columns.
    pub(super) fn copy_blocks(&self, row: usize, out: &mut [u8]) {
        let blocks = self.blocks.chunks_exact(BLOCK_BYTES).skip(row).step_by(self.rows.max(1));
        for (out, block) in out.chunks_exact_mut(BLOCK_BYTES).zip(blocks) {
            out.copy_from_slice(block);
        }
    }

    /// Copies a row's scales, one for each 32 columns.
    pub(super) fn copy_scales(&self, row: usize, out: &mut [u8]) {
        for (out, scale) in out.iter_mut().zip(self.scales.iter().skip(row).step_by(self.rows.max(1))) {
            *out = *scale;
        }
    }
}

/// Quantises 32 stored rows of `rows` values each: a block of each row of the matrix.
fn quantize_strip(
    stored: &[u8],
    rows: usize,
    blocks: &mut [u8],
    scales: &mut [u8],
) -> Result<(), NotFiniteAt> {
    let (stored, _) = stored.as_chunks::<2>();
    for (row, (block, scale)) in
        blocks.chunks_exact_mut(BLOCK_BYTES).zip(scales.chunks_exact_mut(1)).enumerate()
    {
        let mut values = [0.0; BLOCK];
        for (value, stored) in values.iter_mut().zip(stored.iter().skip(row).step_by(rows)) {
            *value = bf16::from_le_bytes(*stored).to_f32();
        }
        quantize_row(&values, block, scale).map_err(|not_finite| NotFiniteAt {
            element: (not_finite.index * rows + row) as u64,
            bytes: bf16::from_f32(not_finite.value).to_le_bytes(),
        })?;
    }
    Ok(())
}

/// Which expert's matrix: the stored tensor's shard and bytes within it.
pub(super) type MatrixKey = (usize, Range<u64>);

/// The matrices quantised last, so that blocks and scales of one come from one quantisation.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<VecDeque<(MatrixKey, Arc<Matrix>)>>);

impl Recent {
    /// Enough for a writer that works on a few experts at once; a matrix of a released model has 9 MB at most.
    const CAPACITY: usize = 4;

    /// The matrix of this key, made unless it is here. Nothing is locked while it is made: a thread that waits for
    /// others' work takes up other work meanwhile, which may come back here.
    pub(super) fn get(&self, key: MatrixKey, make: impl FnOnce() -> Result<Matrix>) -> Result<Arc<Matrix>> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, matrix)) = lock().iter().find(|(other, _)| *other == key) {
            return Ok(matrix.clone());
        }
        let matrix = Arc::new(make()?);
        let mut recent = lock();
        if recent.len() >= Recent::CAPACITY {
            recent.pop_front();
        }
        recent.push_back((key, matrix.clone()));
        Ok(matrix)
    }
}
