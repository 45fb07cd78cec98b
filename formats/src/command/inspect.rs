//! `inspect` and `dump`.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::Result;
use indicatif::HumanBytes;

use super::terminal::{Console, Outcome};
use crate::model_bin::dump::{self, Limits, field_value};
use crate::model_bin::model::Bytes;
use crate::model_bin::section::{Content, SectionMap, Span};

/// The verb `dump`.
pub fn dump(file: &Path, limits: Limits) -> Result<Outcome> {
    let bytes = Bytes::map(file)?;
    let mut out = BufWriter::new(io::stdout().lock());
    dump::dump(&bytes, &mut out, limits)?;
    out.flush()?;
    Ok(Outcome::Fine)
}

/// The verb `inspect`.
pub fn inspect(console: &Console, file: &Path, tensors: bool) -> Result<Outcome> {
    let bytes = Bytes::map(file)?;
    let map = SectionMap::read(&bytes);
    let value = |span: &Span| {
        let content = bytes.get(span.range.start as usize..span.range.end as usize).unwrap_or_default();
        field_value(&span.content, content)
    };
    let mut out = BufWriter::new(io::stdout().lock());
    if console.json {
        console.document(&mut out, &document(file, &bytes, &map, &value))?;
        out.flush()?;
        return Ok(Outcome::Fine);
    }
    writeln!(out, "{}: {} ({} bytes)", file.display(), HumanBytes(bytes.len() as u64), bytes.len())?;
    for (section, range, spans) in map.sections() {
        let size = HumanBytes(range.end - range.start).to_string();
        let padding: u64 = spans
            .iter()
            .filter(|span| matches!(span.content, Content::Padding { .. }))
            .map(|span| span.range.end - span.range.start)
            .sum();
        write!(out, "{:>14}  {size:>12}  {section}", range.start)?;
        if padding > 0 {
            write!(out, " ({padding} bytes of padding)")?;
        }
        writeln!(out)?;
        for span in spans {
            match &span.content {
                Content::Field(_) => writeln!(out, "{:>30}  {} = {}", "", span.name, value(span))?,
                Content::SpecialUuid if value(span).contains('<') => {
                    writeln!(out, "{:>30}  {} = {}", "", span.name, value(span))?;
                }
                Content::Regex => writeln!(out, "{:>30}  {}", "", value(span))?,
                Content::Tensor { id, shape } if tensors || id.expert == 0 => {
                    let dtype = id.tensor.kind.dtype();
                    writeln!(out, "{:>30}  {} {dtype} {shape} at {}", "", span.name, span.range.start)?;
                }
                _ => {}
            }
        }
    }
    out.flush()?;
    Ok(Outcome::Fine)
}

fn document(
    file: &Path,
    bytes: &[u8],
    map: &SectionMap,
    value: &dyn Fn(&Span) -> String,
) -> serde_json::Value {
    let part = |span: &Span| {
        let mut part = serde_json::json!({ "name": span.name, "range": [span.range.start, span.range.end] });
        match &span.content {
            Content::Field(_) | Content::SpecialUuid | Content::Regex => part["value"] = value(span).into(),
            Content::Padding { align } => part["align"] = (*align).into(),
            Content::Tensor { id, shape } => {
                part["dtype"] = id.tensor.kind.dtype().name().into();
                part["shape"] = shape.to_vec().into();
            }
            Content::TextTokens | Content::Trailing => {}
        }
        part
    };
    let sections: Vec<_> = map
        .sections()
        .map(|(name, range, spans)| {
            let parts: Vec<_> = spans.iter().map(part).collect();
            serde_json::json!({ "section": name, "range": [range.start, range.end], "parts": parts })
        })
        .collect();
    serde_json::json!({ "path": file, "bytes": bytes.len(), "sections": sections })
}
