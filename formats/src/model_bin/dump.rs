//! Annotated hexadecimal in which every byte of a file has exactly one line.

use std::io::{self, Write};
use std::ops::Range;

use super::section::{Content, FieldType, SectionMap, Span};
use super::verify::slice;
use crate::model_bin::header::Uuid;
use crate::vocabulary::SpecialToken;

/// How much of long runs is shown.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Lines of 16 bytes that a tensor, padding or regex shows before the rest is summed up in one line.
    pub lines: u64,
    /// Text tokens that are shown before the rest is summed up in one line.
    pub tokens: u64,
}

impl Limits {
    /// Everything is shown.
    pub const NONE: Limits = Limits { lines: u64::MAX, tokens: u64::MAX };
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { lines: 2, tokens: 8 }
    }
}

/// Writes the dump of a file, valid or not. Bytes that cannot be attributed are shown as such.
///
/// # Errors
/// What `out` says; [`io::ErrorKind::Other`] should the map not cover the file exactly, which would be a bug.
pub fn dump(bytes: &[u8], out: &mut dyn Write, limits: Limits) -> io::Result<()> {
    let map = SectionMap::read(bytes);
    let mut dump = Dump { bytes, out, cursor: 0 };
    for (section, range, spans) in map.sections() {
        writeln!(dump.out, "# {section}: {} bytes", range.end - range.start)?;
        for span in spans {
            dump.span(span, limits)?;
        }
    }
    let len = bytes.len() as u64;
    if dump.cursor != len {
        return Err(io::Error::other(format!("attributed {} of {len} bytes", dump.cursor)));
    }
    writeln!(dump.out, "{len:010x}  end: {len} bytes, each attributed once")
}

struct Dump<'a> {
    bytes: &'a [u8],
    out: &'a mut dyn Write,
    cursor: u64,
}

impl Dump<'_> {
    fn span(&mut self, span: &Span, limits: Limits) -> io::Result<()> {
        match span.content {
            Content::Field(_) | Content::SpecialUuid => {
                let value = field_value(&span.content, slice(self.bytes, &span.range));
                self.line(span.range.clone(), &format!("{} = {value}", span.name))
            }
            Content::TextTokens => self.tokens(span, limits.tokens),
            Content::Regex | Content::Padding { .. } | Content::Tensor { .. } | Content::Trailing => {
                let note = match &span.content {
                    Content::Padding { align } => format!("zeros to a multiple of {align}"),
                    Content::Tensor { id, shape } => {
                        format!("{} {} {shape}", span.name, id.tensor.kind.dtype())
                    }
                    _ => span.name.clone(),
                };
                self.run(span.range.clone(), &note, limits.lines)
            }
        }
    }

    /// Lines of 16 bytes, the first with a note.
    fn run(&mut self, range: Range<u64>, note: &str, lines: u64) -> io::Result<()> {
        let mut note = note;
        let shown = range.end.min(range.start.saturating_add(lines.saturating_mul(16)));
        let mut start = range.start;
        while start < shown {
            let end = (start + 16).min(shown);
            self.line(start..end, note)?;
            (start, note) = (end, "");
        }
        self.rest(start..range.end)
    }

    fn tokens(&mut self, span: &Span, tokens: u64) -> io::Result<()> {
        let mut start = span.range.start;
        for id in 0..tokens {
            let rest = slice(self.bytes, &(start..span.range.end));
            let Some((&length, rest)) = rest.split_first_chunk::<2>() else { break };
            let length = u64::from(u16::from_le_bytes(length));
            let Some(token) = rest.get(..length as usize) else { break };
            let end = start + 2 + length;
            self.run(start..end, &format!("token {id} = \"{}\"", token.escape_ascii()), u64::MAX)?;
            start = end;
        }
        self.rest(start..span.range.end)
    }

    /// One line that stands for bytes that are not shown.
    fn rest(&mut self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.advance(&range)?;
        writeln!(
            self.out,
            "{:010x}  … {} bytes more, to {:010x}",
            range.start,
            range.end - range.start,
            range.end
        )
    }

    fn line(&mut self, range: Range<u64>, note: &str) -> io::Result<()> {
        self.advance(&range)?;
        write!(self.out, "{:010x}  ", range.start)?;
        let bytes = slice(self.bytes, &range);
        for byte in bytes {
            write!(self.out, "{byte:02x} ")?;
        }
        write!(self.out, "{:1$}|", "", 3 * 16usize.saturating_sub(bytes.len()))?;
        for &byte in bytes {
            let shown = if (0x20..0x7f).contains(&byte) { byte as char } else { '.' };
            write!(self.out, "{shown}")?;
        }
        write!(self.out, "|")?;
        if note.is_empty() {
            return writeln!(self.out);
        }
        writeln!(self.out, "{:1$}  {note}", "", 16usize.saturating_sub(bytes.len()))
    }

    fn advance(&mut self, range: &Range<u64>) -> io::Result<()> {
        if range.start != self.cursor {
            return Err(io::Error::other(format!("byte {} is attributed twice or never", self.cursor)));
        }
        self.cursor = range.end;
        Ok(())
    }
}

/// The value of a field as people read it.
pub fn field_value(content: &Content, bytes: &[u8]) -> String {
    let word = bytes.first_chunk().map(|&word| u32::from_le_bytes(word)).unwrap_or_default();
    match content {
        Content::Field(FieldType::U32) => word.to_string(),
        Content::Field(FieldType::F32) => f32::from_bits(word).to_string(),
        Content::Field(FieldType::Uuid) | Content::SpecialUuid => {
            let uuid = bytes.first_chunk().map(|&uuid| Uuid(uuid)).unwrap_or_default();
            match SpecialToken::from_uuid(uuid) {
                Some(token) => format!("{uuid} {}", token.name),
                None => uuid.to_string(),
            }
        }
        _ => format!("\"{}\"", bytes.escape_ascii()),
    }
}
