//! A verified file: what the engine accepts, with typed views of its tensors.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::header::{ModelHeader, Uuid};
use super::layout::{self, Tensor};
use super::qkv::{self, Part};
use super::tensors::{Dims, PieceId, Shape, TensorId};
use super::verify::{Depth, Report, slice, verify};
use crate::canonical::{Source, check_values};
use crate::mxfp4;
use crate::progress::Progress;
use crate::violation::{Error, Result, Violation};
use crate::vocabulary::Vocabulary;

/// The bytes of a file, mapped or in memory.
pub enum Bytes {
    /// A mapped file.
    Mapped(Mmap),
    /// Bytes in memory.
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps a file.
    ///
    /// The file must not shrink while it is mapped: reading past its new end raises a signal (see the security section
    /// of the specification).
    pub fn map(path: &Path) -> Result<Bytes> {
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        if !metadata.is_file() {
            return Err(Error::Unsupported(format!("{} is not a regular file", path.display())));
        }
        if metadata.len() == 0 {
            return Ok(Bytes::Owned(Vec::new()));
        }
        // SAFETY: the mapping is private to this value and only ever read as bytes, for which every bit pattern is
        // valid. Another process that writes to the file can change what is read, never where: positions were
        // verified once and are not read again.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Bytes::Mapped(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// A `model.bin` in which no rule is broken. There is no other way to make one than to verify a file.
pub struct Verified {
    path: PathBuf,
    bytes: Bytes,
    file: layout::File,
    dims: Dims,
    vocabulary: Vocabulary,
    notes: Vec<Violation>,
    depth: Depth,
}

impl Verified {
    /// Maps and verifies a file.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::Invalid`] with every violation.
    pub fn open(path: &Path, depth: Depth, progress: &dyn Progress) -> Result<Verified> {
        let bytes = Bytes::map(path)?;
        let report = verify(&bytes, depth, progress);
        Verified::new(path, bytes, report)
    }

    /// Verifies a file that is in memory; `path` is what errors call it.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>, depth: Depth) -> Result<Verified> {
        let report = verify(&bytes, depth, &());
        Verified::new(path, Bytes::Owned(bytes), report)
    }

    fn new(path: &Path, bytes: Bytes, report: Report) -> Result<Verified> {
        let valid = report.is_valid();
        let invalid = |violations| Error::Invalid { path: path.into(), violations };
        let Some(file) = report.file.filter(|_| valid) else {
            return Err(invalid(report.violations));
        };
        let dims = file
            .prefix
            .dims()
            .map_err(|error| invalid(vec![super::verify::read_violation(error, bytes.len() as u64)]))?;
        let vocabulary = vocabulary_of(&bytes, &file.prefix);
        Ok(Verified {
            path: path.into(),
            bytes,
            file,
            dims,
            vocabulary,
            notes: report.violations,
            depth: report.depth,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The raw sections with their positions.
    pub fn file(&self) -> &layout::File {
        &self.file
    }

    /// What the verification noted that does not make the file invalid.
    pub fn notes(&self) -> &[Violation] {
        &self.notes
    }

    /// How much was verified.
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// A tensor outside the experts, as the file stores it.
    ///
    /// `None` where the model has no such tensor, or where it is one of experts (see [`Verified::expert`]).
    pub fn dense(&self, id: TensorId) -> Option<Bf16Tensor<'_>> {
        if id.kind.is_expert() {
            return None;
        }
        Some(self.bf16(self.file.weights.piece(PieceId { tensor: id, expert: 0 })?))
    }

    /// The six tensors of one expert, or `None` where the model has no such block or expert.
    pub fn expert(&self, block: u32, expert: u32) -> Option<ExpertTensors<'_>> {
        let pieces = self.file.weights.experts.get(block as usize)?.experts.get(expert as usize)?;
        Some(ExpertTensors {
            mlp1: self.mxfp4(&pieces.mlp1_blocks, &pieces.mlp1_scales),
            mlp1_bias: self.bf16(&pieces.mlp1_bias),
            mlp2: self.mxfp4(&pieces.mlp2_blocks, &pieces.mlp2_scales),
            mlp2_bias: self.bf16(&pieces.mlp2_bias),
        })
    }

    /// The values of Q and K whose checkpoint value cannot be told from the stored one, by tensor: how many.
    /// Reads all QKV tensors.
    pub fn ambiguous_qkv(&self) -> Vec<(TensorId, u64)> {
        let qkv = self.dims.tensors().filter(|id| id.kind.is_qkv());
        qkv.filter_map(|id| {
            let tensor = self.dense(id)?;
            let row_bytes = id.kind.row_bytes(&self.dims) as usize;
            let count = tensor.bytes.chunks_exact(row_bytes).zip(0..).map(|(row, index)| {
                let part = Part::of_row(index, &self.dims);
                let bits = row.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair));
                bits.filter(|&bits| !part.is_invertible(bits)).count() as u64
            });
            Some((id, count.sum()))
        })
        .filter(|&(_, count)| count > 0)
        .collect()
    }

    fn slice(&self, range: &Range<u64>) -> &[u8] {
        slice(&self.bytes, range)
    }

    fn bf16(&self, tensor: &Tensor) -> Bf16Tensor<'_> {
        Bf16Tensor { shape: tensor.shape, bytes: self.slice(&tensor.range) }
    }

    fn mxfp4(&self, blocks: &Tensor, scales: &Tensor) -> Mxfp4Matrix<'_> {
        let [rows, row_blocks] =
            [scales.shape.first(), scales.shape.last()].map(|size| size.copied().unwrap_or(0));
        Mxfp4Matrix {
            rows,
            columns: row_blocks * 32,
            blocks: self.slice(&blocks.range),
            scales: self.slice(&scales.range),
        }
    }
}

/// The canonical tensors, the QKV transform undone and scales without the offset.
impl Source for Verified {
    fn header(&self) -> &ModelHeader {
        &self.file.prefix.head.model
    }

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn check_values(&self, progress: &dyn Progress) -> Result<()> {
        check_values(self, &self.path.display().to_string(), progress)
    }

    fn read_rows(&self, id: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let row_bytes = id.kind.row_bytes(&self.dims) as usize;
        let piece_rows = id.kind.piece_rows(&self.dims).max(1);
        let stored = |piece: u64, rows: Range<u64>| -> Option<&[u8]> {
            let expert = if id.kind.is_expert() { piece as u32 } else { 0 };
            let range = &self.file.weights.piece(PieceId { tensor: id, expert })?.range;
            self.slice(range).get(rows.start as usize * row_bytes..rows.end as usize * row_bytes)
        };
        let outside = || Error::Unsupported(format!("{id}: rows {rows:?} lie outside the tensor"));
        if id.kind.is_qkv() {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(row_bytes)) {
                let row = qkv::stored_row(row, &self.dims);
                out.copy_from_slice(stored(0, row..row + 1).ok_or_else(outside)?);
                qkv::unscale_row(row, out, &self.dims);
            }
            return Ok(());
        }
        let (mut row, mut out) = (rows.start, out);
        while row < rows.end {
            let (piece, within) = (row / piece_rows, row % piece_rows);
            let run = (piece_rows - within).min(rows.end - row);
            let (head, tail) = out.split_at_mut((run as usize * row_bytes).min(out.len()));
            let content = stored(piece, within..within + run).filter(|content| content.len() == head.len());
            head.copy_from_slice(content.ok_or_else(outside)?);
            if id.kind.is_scales() {
                head.iter_mut().for_each(|scale| *scale = scale.wrapping_sub(mxfp4::SCALE_OFFSET));
            }
            (row, out) = (row + run, tail);
        }
        Ok(())
    }
}

/// The vocabulary in a file whose tokenizer section was verified.
fn vocabulary_of(bytes: &[u8], prefix: &layout::Prefix) -> Vocabulary {
    let regex = slice(bytes, &prefix.regex.range);
    Vocabulary {
        special_uuids: slice(bytes, &prefix.special_uuids.range)
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(Uuid)
            .collect(),
        regex: String::from_utf8_lossy(regex.strip_suffix(b"\0").unwrap_or(regex)).into_owned(),
        records: slice(bytes, &prefix.text_tokens.range).to_vec(),
        num_text_tokens: prefix.head.tokenizer.num_text_tokens,
    }
}

/// A BF16 tensor in place.
#[derive(Clone, Copy, Debug)]
pub struct Bf16Tensor<'a> {
    /// Row-major.
    pub shape: Shape,
    /// Little-endian elements; not necessarily aligned to 2 bytes in memory.
    pub bytes: &'a [u8],
}

impl Bf16Tensor<'_> {
    /// The elements in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = half::bf16> {
        self.bytes.as_chunks::<2>().0.iter().map(|&pair| half::bf16::from_le_bytes(pair))
    }
}

/// An MXFP4 matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct Mxfp4Matrix<'a> {
    /// Outputs.
    pub rows: u64,
    /// Inputs, a multiple of 32.
    pub columns: u64,
    /// `[rows, columns / 32, 16]`: two codes a byte, the earlier in the low nibble.
    pub blocks: &'a [u8],
    /// `[rows, columns / 32]`: as stored, 14 above the checkpoint's.
    pub scales: &'a [u8],
}

impl Mxfp4Matrix<'_> {
    /// Decodes the matrix to f32, `[rows, columns]` row-major. In a file that was verified in structure only, a scale
    /// out of range gives wrong values.
    ///
    /// # Errors
    /// Where `out` does not hold rows × columns values.
    pub fn decode(&self, out: &mut [f32]) -> Result<(), mxfp4::LengthMismatch> {
        let scales: Vec<u8> =
            self.scales.iter().map(|scale| scale.wrapping_sub(mxfp4::SCALE_OFFSET)).collect();
        mxfp4::decode(self.blocks, &scales, out)
    }
}

/// The tensors of one expert in place.
#[derive(Clone, Copy, Debug)]
pub struct ExpertTensors<'a> {
    /// `[2·I, H]`: gate in even rows, up in odd ones.
    pub mlp1: Mxfp4Matrix<'a>,
    /// `[2·I]`.
    pub mlp1_bias: Bf16Tensor<'a>,
    /// `[H, I]`.
    pub mlp2: Mxfp4Matrix<'a>,
    /// `[H]`.
    pub mlp2_bias: Bf16Tensor<'a>,
}
