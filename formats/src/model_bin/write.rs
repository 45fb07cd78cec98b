//! Writes a model to a `model.bin`, streaming: the description asks for each tensor's bytes as it comes to it.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use binrw::BinWrite;

use super::header::{HEAD_DIM, HEAD_LEN, Head, TokenizerHeader};
use super::layout::{self, Blob, BlobId, Payload, PieceId, Prefix, Weights};
use super::qkv;
use super::verify::{bf16_all_finite, check_prefix};
use crate::canonical::{Source, piece_rows, runs};
use crate::mxfp4::SCALE_OFFSET;
use crate::output::Output;
use crate::progress::Progress;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};

/// Bytes that are written before the disk is asked to take them.
const FLUSH: usize = 128 << 20;
/// Bytes that are read, transformed and handed on at a time.
const BUFFER: usize = 4 << 20;
/// Buffers on their way to the file; with the two of the transform all that an export holds of the model.
const BUFFERS_IN_FLIGHT: usize = 4;

/// Computes the layout of the file that [`write()`] would write, every position included.
///
/// # Errors
/// [`Error::Invalid`] where header or vocabulary break a rule, so that the file would be invalid.
pub fn plan(source: &dyn Source) -> Result<layout::File> {
    let vocabulary = source.vocabulary();
    let too_long = |what: &str| Error::Unsupported(format!("the vocabulary's {what} does not fit a u32"));
    let sizes = TokenizerHeader {
        num_special_tokens: vocabulary
            .special_uuids
            .len()
            .try_into()
            .map_err(|_| too_long("special token count"))?,
        num_text_tokens: vocabulary.num_text_tokens,
        regex_size: (vocabulary.regex.len() + 1).try_into().map_err(|_| too_long("regex"))?,
        tokens_size: vocabulary.records.len().try_into().map_err(|_| too_long("text token list"))?,
    };
    let mut end = HEAD_LEN;
    let mut blob = |id, size: u64| {
        let start = end;
        end += size;
        Blob { id, range: start..end }
    };
    let prefix = Prefix {
        head: Head::new(*source.header(), sizes),
        special_uuids: blob(BlobId::SpecialUuids, u64::from(sizes.num_special_tokens) * 16),
        regex: blob(BlobId::Regex, sizes.regex_size.into()),
        text_tokens: blob(BlobId::TextTokens, sizes.tokens_size.into()),
    };
    let start = prefix.text_tokens.range.end;
    let invalid = |violations| Error::Invalid { path: "the model to be written".into(), violations };
    let bytes = prefix_bytes(&prefix, source)?;
    let violations = check_prefix(&bytes, &prefix);
    if violations.iter().any(Violation::is_error) {
        return Err(invalid(violations));
    }
    let weights = prefix
        .dims()
        .and_then(|dims| Weights::plan(dims, start))
        .map_err(|error| invalid(vec![super::verify::read_violation(error, start)]))?;
    Ok(layout::File { prefix, weights })
}

/// Writes `source` to `target`, which appears when it is complete and on disk.
///
/// Values that no file may hold are looked for first where that is cheap ([`Source::check_values`]) and in passing
/// otherwise; either way nothing is left behind.
///
/// # Errors
/// [`Error::Invalid`] for a model that breaks a rule, [`Error::Io`] where reading or writing fails.
pub fn write(source: &dyn Source, target: &Path, progress: &dyn Progress) -> Result<layout::File> {
    let file = plan(source)?;
    source.check_values(progress)?;
    let output = Output::create(target)?;
    progress.begin("writing", file.weights.end());
    thread::scope(|scope| {
        let (mut sink, drain) = Pipe::new();
        let destination = output.file();
        let writer = scope.spawn(move || drain.into_file(destination));
        let payload = SourcePayload::new(source, progress);
        let written = file.write_le_args(&mut sink, &payload).map_err(|error| unwrap(error, target));
        let flushed = sink.finish();
        // A failing disk ends the pipe first, so its error is the cause.
        match writer.join() {
            Ok(result) => result.map_err(Error::io(target))?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        written?;
        flushed.map_err(Error::io(target))
    })?;
    output.finish()?;
    Ok(file)
}

/// Writes `source` to a stream that can tell its position, from its start on. Nothing is checked in advance: a value
/// that no file may hold ends the writing in the middle.
///
/// # Errors
/// As [`write()`].
pub fn write_to<W: Write + Seek>(
    source: &dyn Source,
    out: &mut W,
    progress: &dyn Progress,
) -> Result<layout::File> {
    let file = plan(source)?;
    let payload = SourcePayload::new(source, progress);
    file.write_le_args(out, &payload).map_err(|error| unwrap(error, Path::new("the output")))?;
    Ok(file)
}

/// The prefix of a file in memory.
fn prefix_bytes(prefix: &Prefix, source: &dyn Source) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    let payload = SourcePayload::new(source, &());
    prefix
        .write_le_args(&mut bytes, &payload)
        .map_err(|error| unwrap(error, Path::new("the tokenizer section")))?;
    Ok(bytes.into_inner())
}

/// The error of this crate inside an error of the description, or what the operating system said.
pub(crate) fn unwrap(error: binrw::Error, path: &Path) -> Error {
    match error {
        binrw::Error::Io(io) => match io.downcast::<Error>() {
            Ok(error) => error,
            Err(io) => Error::Io { path: path.into(), source: io },
        },
        other => Error::Io { path: path.into(), source: io::Error::other(other.to_string()) },
    }
}

/// A model as the bytes that the file stores.
pub struct SourcePayload<'a> {
    source: &'a dyn Source,
    progress: &'a dyn Progress,
    /// What was read, and the transform of it.
    buffers: RefCell<(Vec<u8>, Vec<u8>)>,
}

impl<'a> SourcePayload<'a> {
    /// The payload of `source`; `progress` advances with each run of rows.
    pub fn new(source: &'a dyn Source, progress: &'a dyn Progress) -> SourcePayload<'a> {
        SourcePayload { source, progress, buffers: RefCell::default() }
    }

    /// Refuses NaN; infinities pass, they are only noted when the file is verified.
    fn refuse_nan(&self, piece: PieceId, rows: &Range<u64>, content: &[u8]) -> Result<()> {
        if bf16_all_finite(content) {
            return Ok(());
        }
        let mut bits = content.as_chunks::<2>().0.iter().map(|&pair| u16::from_le_bytes(pair));
        match bits.position(|bits| bits & 0x7fff > 0x7f80) {
            Some(index) => Err(self.refused(piece, Rule::SourceNan, rows, index / 2, "NaN", "no NaN")),
            None => Ok(()),
        }
    }

    fn refused(
        &self,
        piece: PieceId,
        rule: Rule,
        rows: &Range<u64>,
        index: usize,
        found: &str,
        needed: &str,
    ) -> Error {
        let kind = piece.tensor.kind;
        let element = rows.start * (kind.row_bytes(self.source.dims()) / kind.dtype().size()) + index as u64;
        Error::Invalid {
            path: "the checkpoint".into(),
            violations: vec![Violation {
                rule,
                section: "checkpoint".into(),
                field: piece.tensor.to_string(),
                range: 0..0,
                found: format!("{found} at element {element}"),
                needed: needed.into(),
            }],
        }
    }
}

impl Payload for SourcePayload<'_> {
    fn write_blob(&self, blob: BlobId, out: &mut dyn Write) -> io::Result<()> {
        let vocabulary = self.source.vocabulary();
        match blob {
            BlobId::SpecialUuids => {
                vocabulary.special_uuids.iter().try_for_each(|uuid| out.write_all(&uuid.0))
            }
            BlobId::Regex => out.write_all(vocabulary.regex.as_bytes()).and_then(|()| out.write_all(&[0])),
            BlobId::TextTokens => out.write_all(&vocabulary.records),
        }
    }

    fn write_piece(&self, piece: PieceId, out: &mut dyn Write) -> io::Result<()> {
        let dims = self.source.dims();
        let kind = piece.tensor.kind;
        let row_bytes = kind.row_bytes(dims);
        let granule = if kind.is_qkv() { u64::from(HEAD_DIM) } else { 1 };
        let (content, stored) = &mut *self.buffers.borrow_mut();
        for run in runs(piece_rows(kind, piece.expert, dims), granule, row_bytes, BUFFER) {
            content.resize(((run.end - run.start) * row_bytes) as usize, 0);
            self.source.read_rows(piece.tensor, run.clone(), content).map_err(io::Error::other)?;
            if kind.is_scales() {
                if let Some(index) = content.iter().position(|&scale| scale > 254 - SCALE_OFFSET) {
                    let found = format!("scale {}", content[index]);
                    return Err(io::Error::other(self.refused(
                        piece,
                        Rule::SourceScale,
                        &run,
                        index,
                        &found,
                        "at most 240",
                    )));
                }
                content.iter_mut().for_each(|scale| *scale += SCALE_OFFSET);
            } else if kind.dtype() == super::tensors::Dtype::Bf16 {
                self.refuse_nan(piece, &run, content).map_err(io::Error::other)?;
            }
            if kind.is_qkv() {
                stored.resize(content.len(), 0);
                qkv::store(run.start, content, stored, row_bytes as usize, dims);
                out.write_all(stored)?;
            } else {
                out.write_all(content)?;
            }
            self.progress.advance(content.len() as u64);
        }
        Ok(())
    }
}

/// The near end of a pipe to a thread that writes the file, so that reading and writing overlap.
struct Pipe {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
    position: u64,
}

/// The far end.
struct Drain {
    full: Receiver<Vec<u8>>,
    empty: mpsc::Sender<Vec<u8>>,
}

impl Pipe {
    fn new() -> (Pipe, Drain) {
        let (full, full_end) = mpsc::sync_channel(BUFFERS_IN_FLIGHT);
        let (empty, empty_end) = mpsc::channel();
        for _ in 0..BUFFERS_IN_FLIGHT {
            // The receiver is alive: it is returned below.
            let _ = empty.send(Vec::with_capacity(BUFFER));
        }
        let pipe = Pipe { full, empty: empty_end, buffer: Vec::with_capacity(BUFFER), position: 0 };
        (pipe, Drain { full: full_end, empty })
    }

    fn send(&mut self) -> io::Result<()> {
        let next = self.empty.recv().map_err(|_| gone())?;
        self.full.send(std::mem::replace(&mut self.buffer, next)).map_err(|_| gone())
    }

    fn finish(mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}

/// The writing thread ended early; its own result says why.
fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the writing thread has stopped")
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == BUFFER {
            self.send()?;
        }
        let taken = bytes.len().min(BUFFER - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        self.position += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the position only: the description writes from start to end.
impl Seek for Pipe {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Current(0) => Ok(self.position),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Drain {
    fn into_file(self, mut file: &File) -> io::Result<()> {
        thread::scope(|scope| {
            let (tick, ticks) = mpsc::sync_channel(1);
            // The disk works while the next bytes are prepared, instead of all at once at the end.
            let flusher = scope.spawn(move || ticks.iter().try_for_each(|()| file.sync_data()));
            let mut unflushed = 0;
            for mut buffer in self.full {
                file.write_all(&buffer)?;
                unflushed += buffer.len();
                if unflushed >= FLUSH && tick.try_send(()).is_ok() {
                    unflushed = 0;
                }
                buffer.clear();
                // The other end may be done and gone.
                let _ = self.empty.send(buffer);
            }
            drop(tick);
            flusher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}
