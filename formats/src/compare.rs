//! What differs between two models: a file and the checkpoint it should come from, or any two containers.

use std::fmt;
use std::io::{self, Seek, SeekFrom, Write};
use std::ops::Range;

use binrw::BinWrite;
use rayon::prelude::*;
use serde::Serialize;

use crate::canonical::{Source, for_each_run};
use crate::model_bin::layout::PieceId;
use crate::model_bin::section::{Content, FieldType, SectionMap, Span, head_fields};
use crate::model_bin::tensors::{Dtype, TensorKind};
use crate::model_bin::verify::slice;
use crate::model_bin::write::{SourcePayload, plan, unwrap};
use crate::model_bin::{Verified, qkv};
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Result, Violation};

/// Bytes of a tensor that are read at a time.
const BUFFER: usize = 4 << 20;

/// Compares a file with the bytes that the writer makes of `source`: the writer itself runs, into a comparison instead
/// of a file, so there is no second opinion on what the bytes should be.
///
/// One violation of a `WR-*` rule for each field or tensor that differs; none means that exporting `source` gives this
/// very file. Where the sizes in the headers differ, the weights are not compared.
pub fn against(model: &Verified, source: &dyn Source, progress: &dyn Progress) -> Result<Vec<Violation>> {
    let expected = plan(source)?;
    let mut violations = header_violations(model, source);
    let prefix = &model.file().prefix;
    if prefix.dims().ok() != expected.prefix.dims().ok() {
        return Ok(violations);
    }
    if model.vocabulary() != source.vocabulary() {
        let range = prefix.special_uuids.range.start..prefix.text_tokens.range.end;
        violations.push(Violation {
            rule: Rule::WriterTokenizer,
            section: "tokenizer".into(),
            field: "vocabulary".into(),
            range,
            found: format!("a vocabulary of {} tokens with other contents", prefix.num_tokens()),
            needed: "the vocabulary of the checkpoint".into(),
        });
        if prefix.text_tokens.range.end != expected.prefix.text_tokens.range.end {
            return Ok(violations);
        }
    }
    progress.begin("comparing with the checkpoint", expected.weights.end());
    let map = SectionMap::of(&expected, expected.weights.end());
    let mut sink = Comparison { actual: model.bytes(), position: 0, map: &map, differing: Vec::new() };
    let payload = SourcePayload::new(source, progress);
    expected.write_le_args(&mut sink, &payload).map_err(|error| unwrap(error, model.path()))?;
    for (span, range, bytes) in sink.differing {
        if let Content::Tensor { id, .. } = span.content {
            violations.push(weight_violation(model, source, id, span, range, bytes)?);
        }
    }
    Ok(violations)
}

fn header_violations(model: &Verified, source: &dyn Source) -> Vec<Violation> {
    let [found, needed] = [model.header(), source.header()].map(words);
    head_fields()
        .filter(|field| field.section == "model header")
        .zip(found.into_iter().zip(needed))
        .filter(|(_, (found, needed))| found != needed)
        .map(|(field, (found, needed))| Violation {
            rule: Rule::WriterHeader,
            section: field.section.into(),
            field: field.name.into(),
            range: field.range,
            found: word(field.ty, found),
            needed: format!("{}, computed from the config", word(field.ty, needed)),
        })
        .collect()
}

/// The 17 words of a model header.
fn words(header: &crate::model_bin::header::ModelHeader) -> Vec<u32> {
    let mut bytes = io::Cursor::new(Vec::new());
    // Writing plain numbers to memory does not fail; a shorter list would show as a difference.
    let _ = header.write_le(&mut bytes);
    bytes.into_inner().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

fn word(ty: FieldType, word: u32) -> String {
    match ty {
        FieldType::F32 => format!("{} ({word:#010x})", f32::from_bits(word)),
        _ => word.to_string(),
    }
}

/// The rule that a differing tensor breaks, as far as the difference tells.
fn weight_violation(
    model: &Verified,
    source: &dyn Source,
    id: PieceId,
    span: &Span,
    range: Range<u64>,
    expected: [u8; 2],
) -> Result<Violation> {
    let kind = id.tensor.kind;
    let rule = match kind {
        TensorKind::Embedding | TensorKind::Unembedding => Rule::WriterRows,
        TensorKind::Mlp1Scales | TensorKind::Mlp2Scales => Rule::WriterScale,
        TensorKind::QkvWeight | TensorKind::QkvBias => {
            if is_reordered(model, source, id, range.start - span.range.start)? {
                Rule::WriterQkvOrder
            } else {
                Rule::WriterQkvScale
            }
        }
        _ => Rule::WriterCopy,
    };
    let size = kind.dtype().size();
    let element = (range.start - span.range.start) / size;
    let start = span.range.start + element * size;
    Ok(Violation {
        rule,
        section: span.section.clone(),
        field: span.name.clone(),
        range,
        found: format!(
            "{} at element {element}",
            element_at(kind.dtype(), slice(model.bytes(), &(start..start + size)))
        ),
        needed: element_at(kind.dtype(), &expected[..size as usize]),
    })
}

fn element_at(dtype: Dtype, bytes: &[u8]) -> String {
    match (dtype, bytes) {
        (Dtype::Bf16, &[low, high]) => {
            let bits = u16::from_le_bytes([low, high]);
            format!("{} ({bits:#06x})", half::bf16::from_bits(bits))
        }
        (Dtype::U8, [byte]) => byte.to_string(),
        _ => "nothing".into(),
    }
}

/// Whether the head that holds byte `offset` of a QKV tensor has the rows that it should, in another order.
fn is_reordered(model: &Verified, source: &dyn Source, id: PieceId, offset: u64) -> Result<bool> {
    let dims = source.dims();
    let kind = id.tensor.kind;
    let row_bytes = kind.row_bytes(dims);
    let first = offset / row_bytes / dims.head_dim() * dims.head_dim();
    let mut rows = vec![0; (dims.head_dim() * row_bytes) as usize];
    source.read_rows(id.tensor, first..first + dims.head_dim(), &mut rows)?;
    let mut stored = vec![0; rows.len()];
    qkv::store(first, &rows, &mut stored, row_bytes as usize, dims);
    let actual = model.dense(id.tensor).map(|tensor| tensor.bytes).unwrap_or_default();
    let start = (first * row_bytes) as usize;
    let actual = actual.get(start..start + stored.len()).unwrap_or_default();
    let sorted = |bytes| {
        let mut rows: Vec<&[u8]> = <[u8]>::chunks_exact(bytes, row_bytes as usize).collect();
        rows.sort_unstable();
        rows
    };
    Ok(sorted(actual) == sorted(&stored))
}

/// A writer that compares what it is given with the bytes of a file: span, first to last differing byte, and the
/// expected element at the first.
struct Comparison<'a> {
    actual: &'a [u8],
    position: u64,
    map: &'a SectionMap,
    differing: Vec<(&'a Span, Range<u64>, [u8; 2])>,
}

impl Write for Comparison<'_> {
    fn write(&mut self, expected: &[u8]) -> io::Result<usize> {
        let range = self.position..self.position + expected.len() as u64;
        self.position = range.end;
        let actual = slice(self.actual, &range);
        if actual == expected {
            return Ok(expected.len());
        }
        let different = |&index: &usize| actual.get(index) != expected.get(index);
        let first = (0..expected.len()).find(different).unwrap_or(0);
        let last = (0..expected.len()).rfind(different).unwrap_or(0);
        let range = range.start + first as u64..range.start + last as u64 + 1;
        match self.differing.last_mut() {
            Some((span, known, _)) if span.range.contains(&range.start) => known.end = range.end,
            _ => {
                // Runs of rows start at an element, so an even index starts a BF16.
                let element = |index: usize| expected.get(index).copied().unwrap_or(0);
                let pair = [element(first & !1), element(first | 1)];
                let single = [element(first), 0];
                if let Some(span) = self.map.owner(range.start) {
                    let wide = matches!(span.content, Content::Tensor { id, .. } if id.tensor.kind.dtype() == Dtype::Bf16);
                    self.differing.push((span, range, if wide { pair } else { single }));
                }
            }
        }
        Ok(expected.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Comparison<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Current(0) => Ok(self.position),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// One thing in which two models differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The section ("model header", "block 0 experts", …).
    pub section: String,
    /// The field or tensor.
    pub field: String,
    /// The first differing element, where elements can be compared.
    pub element: Option<u64>,
    /// How many elements differ.
    pub count: u64,
    /// The first model's.
    pub a: String,
    /// The second model's.
    pub b: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {} ≠ {}", self.section, self.field, self.a, self.b)?;
        if let Some(element) = self.element {
            write!(f, " at element {element} ({} differ)", self.count)?;
        }
        Ok(())
    }
}

/// Compares two models in whatever containers, by header field, vocabulary and canonical tensor.
///
/// Q and K are compared after the format's scaling and its inverse, since a file holds no more than that.
/// Where the sizes differ, the tensors are not compared.
pub fn models(a: &dyn Source, b: &dyn Source, progress: &dyn Progress) -> Result<Vec<Difference>> {
    let mut differences: Vec<Difference> = head_fields()
        .filter(|field| field.section == "model header")
        .zip(words(a.header()).into_iter().zip(words(b.header())))
        .filter(|(_, (a, b))| a != b)
        .map(|(field, (a, b))| Difference {
            section: field.section.into(),
            field: field.name.into(),
            element: None,
            count: 1,
            a: word(field.ty, a),
            b: word(field.ty, b),
        })
        .collect();
    if a.vocabulary() != b.vocabulary() {
        let describe = |source: &dyn Source| format!("{} tokens", source.vocabulary().len());
        differences.push(Difference {
            section: "tokenizer".into(),
            field: "vocabulary".into(),
            element: None,
            count: 1,
            a: describe(a),
            b: format!("{} with other contents", describe(b)),
        });
    }
    if a.dims() != b.dims() {
        return Ok(differences);
    }
    let dims = a.dims();
    let tensors: Vec<_> = dims.tensors().collect();
    progress.begin(
        "comparing tensors",
        tensors.iter().map(|id| id.kind.rows(dims) * id.kind.row_bytes(dims)).sum(),
    );
    let found: Vec<Option<Difference>> = tensors
        .par_iter()
        .map(|&id| {
            let row_bytes = id.kind.row_bytes(dims);
            let dtype = id.kind.dtype();
            let mut difference: Option<Difference> = None;
            let mut other = Vec::new();
            for_each_run(a, id, 64, BUFFER, |run, content| {
                other.resize(content.len(), 0);
                b.read_rows(id, run.clone(), &mut other)?;
                if id.kind.is_qkv() {
                    qkv::canonicalise(run.start, content, row_bytes as usize, dims);
                    qkv::canonicalise(run.start, &mut other, row_bytes as usize, dims);
                }
                progress.advance(content.len() as u64);
                if *content == *other {
                    return Ok(());
                }
                let size = dtype.size() as usize;
                let pairs = content
                    .chunks_exact(size)
                    .zip(other.chunks_exact(size))
                    .zip(run.start * row_bytes / size as u64..);
                for ((a, b), element) in pairs.filter(|((a, b), _)| a != b) {
                    difference
                        .get_or_insert_with(|| Difference {
                            section: crate::model_bin::section::weights_section(id),
                            field: id.to_string(),
                            element: Some(element),
                            count: 0,
                            a: element_at(dtype, a),
                            b: element_at(dtype, b),
                        })
                        .count += 1;
                }
                Ok(())
            })?;
            Ok(difference)
        })
        .collect::<Result<_>>()?;
    differences.extend(found.into_iter().flatten());
    Ok(differences)
}

/// Compares two files byte by byte: every span of the first whose bytes differ in the second, trailing bytes included.
/// Either may be invalid: bytes that no section accounts for are compared as such.
pub fn files(a: &[u8], b: &[u8]) -> Vec<Difference> {
    let maps = [a, b].map(SectionMap::read);
    let [spans_a, spans_b] = maps.each_ref().map(|map| map.spans.as_slice());
    let mut differences: Vec<Difference> = Vec::new();
    let mut push = |span: &Span, element, count, a, b| {
        differences.push(Difference {
            section: span.section.clone(),
            field: span.name.clone(),
            element,
            count,
            a,
            b,
        });
    };
    for (left, right) in spans_a.iter().zip(spans_b) {
        if (&left.section, &left.name) != (&right.section, &right.name) {
            push(left, None, 1, "present".into(), format!("{}, {} in its place", right.section, right.name));
            break;
        }
        let (left_bytes, right_bytes) = (slice(a, &left.range), slice(b, &right.range));
        if left_bytes == right_bytes {
            continue;
        }
        let (ty, size) = match left.content {
            Content::Tensor { id, .. } => {
                (Some(id.tensor.kind.dtype()), id.tensor.kind.dtype().size() as usize)
            }
            _ => (None, 1),
        };
        if left_bytes.len() != right_bytes.len() {
            push(
                left,
                None,
                1,
                format!("{} bytes", left_bytes.len()),
                format!("{} bytes", right_bytes.len()),
            );
            continue;
        }
        let differing =
            left_bytes.chunks(size).zip(right_bytes.chunks(size)).enumerate().filter(|(_, (a, b))| a != b);
        let count = differing.clone().count() as u64;
        if let Some((element, (a, b))) = { differing }.next() {
            match (&left.content, ty) {
                (Content::Field(ty @ (FieldType::U32 | FieldType::F32)), _) => {
                    let [a, b] = [left_bytes, right_bytes].map(|bytes| {
                        bytes
                            .first_chunk()
                            .map_or(String::new(), |&bytes| word(*ty, u32::from_le_bytes(bytes)))
                    });
                    push(left, None, 1, a, b);
                }
                (Content::Field(_) | Content::SpecialUuid, _) => {
                    let [a, b] =
                        [left_bytes, right_bytes].map(|bytes| format!("\"{}\"", bytes.escape_ascii()));
                    push(left, None, 1, a, b);
                }
                (_, Some(dtype)) => {
                    push(left, Some(element as u64), count, element_at(dtype, a), element_at(dtype, b))
                }
                (_, None) => push(
                    left,
                    Some(element as u64),
                    count,
                    element_at(Dtype::U8, a),
                    element_at(Dtype::U8, b),
                ),
            }
        }
    }
    let extra =
        |spans: &[Span], other: &[Span]| spans.get(other.len()..).and_then(|rest| rest.first().cloned());
    if let Some(span) = extra(spans_a, spans_b) {
        push(&span, None, 1, "present".into(), "absent".into());
    }
    if let Some(span) = extra(spans_b, spans_a) {
        push(&span, None, 1, "absent".into(), "present".into());
    }
    differences
}
