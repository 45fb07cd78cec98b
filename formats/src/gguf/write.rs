//! Writing a GGUF file from any source.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use binrw::BinWrite;
use rayon::prelude::*;

use super::container::{DEFAULT_ALIGNMENT, Description, GgmlType, TensorInfo, Text};
use super::tensors::{
    CODE_BYTES, Overlap, Part, encode_f32, encode_mxfp4, parts, unit_bytes, unit_elements, units_per_row,
    written_type,
};
use super::{metadata, vocabulary};
use crate::canonical::{Source, runs};
use crate::model_bin::tensors::{Dims, TensorId, TensorKind};
use crate::output::Output;
use crate::progress::Progress;
use crate::violation::{Error, Result};

/// Canonical bytes that one thread works on at a time.
const BUFFER: usize = 4 << 20;

/// A tensor of the new file.
struct Target {
    part: Part,
    ty: GgmlType,
    /// Start of its data in the file.
    start: u64,
    /// Its bytes.
    size: u64,
}

/// Writes `source` as GGUF to `target`; `name` becomes `general.name`.
///
/// The file has a row of both embeddings for each token of the vocabulary. Nothing is rounded: BF16 is kept or widened
/// to F32, and MXFP4 keeps its codes and scales.
///
/// # Errors
/// Those of reading the source and of [`Output`]; [`Error::Unsupported`] for a vocabulary that GGUF cannot hold.
pub fn write(source: &dyn Source, target: &Path, name: Option<&str>, progress: &dyn Progress) -> Result<()> {
    let dims = source.dims();
    let mut metadata = metadata::entries(source.header(), name);
    metadata.extend(vocabulary::entries(source.vocabulary())?);

    // Codes and scales are one tensor in GGUF; the codes stand for both here.
    let ids: Vec<TensorId> = dims.tensors().filter(|id| !id.kind.is_scales()).collect();
    let mut offset = 0;
    let mut plan: Vec<(TensorId, Vec<Target>)> = Vec::new();
    for id in ids {
        let targets = parts(id, dims).into_iter().map(|part| {
            let ty = written_type(id.kind);
            let size = part.axes.iter().product::<u64>() / ty.elements * ty.bytes;
            let start = offset;
            offset = (start + size).next_multiple_of(DEFAULT_ALIGNMENT);
            Target { part, ty, start, size }
        });
        plan.push((id, targets.collect()));
    }

    let infos = plan.iter().flat_map(|(_, targets)| targets).map(|target| TensorInfo {
        name: Text(target.part.name.clone()),
        axes: target.part.axes.clone(),
        ty: target.ty.id,
        offset: target.start,
    });
    let mut head = Cursor::new(Vec::new());
    let description = Description { metadata, tensors: infos.collect() };
    description.write(&mut head).map_err(|error| Error::Unsupported(format!("GGUF metadata: {error}")))?;
    let head = head.into_inner();
    let data = (head.len() as u64).next_multiple_of(DEFAULT_ALIGNMENT);
    for target in plan.iter_mut().flat_map(|(_, targets)| targets) {
        target.start += data;
    }

    let output = Output::create(target)?;
    let file = output.file();
    let write_at = |bytes: &[u8], start: u64| {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, start).map_err(Error::io(target))
    };
    // What lies between tensors is never written, and so zero.
    file.set_len(data + offset).map_err(Error::io(target))?;
    progress.begin("GGUF", plan.iter().flat_map(|(_, targets)| targets).map(|target| target.size).sum());
    write_at(&head, 0)?;
    let jobs: Vec<_> = plan
        .iter()
        .flat_map(|(id, targets)| {
            let (rows, row_bytes) = (id.kind.rows(dims), id.kind.row_bytes(dims));
            runs(0..rows, 1, row_bytes, BUFFER).map(move |run| (*id, targets, run))
        })
        .collect();
    jobs.into_par_iter().try_for_each_init(
        Buffers::default,
        |buffers, (id, targets, rows)| -> Result<()> {
            let units_per_row = units_per_row(id.kind, dims);
            buffers.read(source, id, rows.clone())?;
            for Target { part, ty, start, .. } in targets {
                let run = rows.start * units_per_row..rows.end * units_per_row;
                if let Some(overlap) = part.overlap(&run) {
                    let first = overlap.units.start;
                    let stored = buffers.encode(id.kind, *ty, &overlap, dims);
                    write_at(stored, start + first * (stored.len() as u64 / overlap.len()))?;
                    progress.advance(stored.len() as u64);
                }
            }
            Ok(())
        },
    )?;
    output.finish()
}

/// One thread's buffers.
#[derive(Default)]
struct Buffers {
    /// Canonical rows: BF16, or MXFP4 codes.
    rows: Vec<u8>,
    /// The scales of these codes.
    scales: Vec<u8>,
    /// What the GGUF tensor stores.
    stored: Vec<u8>,
}

impl Buffers {
    fn read(&mut self, source: &dyn Source, id: TensorId, rows: Range<u64>) -> Result<()> {
        let dims = source.dims();
        let count = rows.end - rows.start;
        self.rows.resize((count * id.kind.row_bytes(dims)) as usize, 0);
        source.read_rows(id, rows.clone(), &mut self.rows)?;
        let scales = match id.kind {
            TensorKind::Mlp1Blocks => TensorKind::Mlp1Scales,
            TensorKind::Mlp2Blocks => TensorKind::Mlp2Scales,
            _ => return Ok(()),
        };
        self.scales.resize((count * scales.row_bytes(dims)) as usize, 0);
        source.read_rows(TensorId { kind: scales, ..id }, rows, &mut self.scales)
    }

    /// The bytes that GGUF stores for some units of the rows.
    fn encode(&mut self, kind: TensorKind, ty: GgmlType, overlap: &Overlap, dims: &Dims) -> &[u8] {
        let size = unit_bytes(kind, dims) as usize;
        let count = overlap.len() as usize;
        let stored_size = (unit_elements(kind, dims) / ty.elements * ty.bytes) as usize;
        self.stored.resize(count * stored_size, 0);
        // Neighbours in both files are encoded in one go.
        let (group, stride) = if overlap.stride == 1 { (count, 1) } else { (1, overlap.stride) };
        for (index, stored) in self.stored.chunks_exact_mut(group * stored_size).enumerate() {
            let first = overlap.first + index * stride;
            let units = |size: usize| first * size..(first + group) * size;
            let rows = self.rows.get(units(size)).unwrap_or_default();
            match ty {
                GgmlType::MXFP4 => {
                    let scales = self.scales.get(units(size / CODE_BYTES)).unwrap_or_default();
                    encode_mxfp4(rows, scales, stored);
                }
                GgmlType::F32 => encode_f32(rows, stored),
                _ => stored.copy_from_slice(rows),
            }
        }
        &self.stored
    }
}
