//! `export`, `unpack` and `convert`.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Result, bail};
use indicatif::HumanBytes;

use super::CheckpointOptions;
use super::compare::open;
use super::terminal::{Console, Outcome, plural};
use crate::canonical::Source;
use crate::checkpoint::{Folder, Options};
use crate::container::{self, Container};
use crate::model_bin::layout::File;
use crate::model_bin::section::SectionMap;
use crate::model_bin::{Depth, Verified, write};
use crate::{gguf, unpack as unpacking};

/// The verb `export`.
pub fn export(console: &Console, src: &Path, dst: &Path, options: &CheckpointOptions) -> Result<Outcome> {
    if !src.is_dir() {
        bail!("{} is not a folder; to convert a GGUF file, use `{} convert`", src.display(), console.name);
    }
    let vocabulary = container::vocabulary_for(src, options.vocab.as_deref())?;
    let folder = Folder::open(src, Options { vocabulary, quantize: options.quantize })?;
    let file = write::write(&folder, dst, console)?;
    console.done();
    let notes: Vec<String> = folder.notes().iter().map(ToString::to_string).collect();
    summary(console, &format!("{} layout", folder.layout()), &file, src, dst, &notes)
}

/// The verb `convert`.
pub fn convert(console: &Console, src: &Path, dst: &Path, options: &CheckpointOptions) -> Result<Outcome> {
    let container = Container::detect(src)?;
    let to_gguf = dst.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    let source = open(console, src, options)?;
    let notes: Vec<String> = source.changed().iter().map(|(id, reason)| format!("{id}: {reason}")).collect();
    if !to_gguf {
        let file = write::write(&*source, dst, console)?;
        console.done();
        return summary(console, &container.to_string(), &file, src, dst, &notes);
    }
    let name = src.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    gguf::write(&*source, dst, name.as_deref(), console)?;
    console.done();
    let bytes = dst.metadata()?.len();
    let mut out = io::stdout().lock();
    if console.json {
        let document = serde_json::json!({
            "source": src, "target": dst, "container": "gguf", "bytes": bytes, "notes": notes, "seconds": console.seconds(),
        });
        console.document(&mut out, &document)?;
    } else {
        print_notes(&mut out, &notes)?;
        writeln!(out, "{}: GGUF of {}, {:.1} s", dst.display(), HumanBytes(bytes), console.seconds())?;
    }
    Ok(Outcome::Fine)
}

/// The verb `unpack`.
pub fn unpack(console: &Console, file: &Path, dst: &Path) -> Result<Outcome> {
    let (source, ambiguous): (Box<dyn Source>, _) = match Container::detect(file)? {
        Container::ModelBin => {
            let model = Verified::open(file, Depth::Structure, console)?;
            let ambiguous = model.ambiguous_qkv();
            (Box::new(model), ambiguous)
        }
        Container::Gguf => (Box::new(gguf::Model::open(file)?), Vec::new()),
        Container::Checkpoint => bail!("{} is a folder already", file.display()),
    };
    let unpacked = unpacking::unpack(&*source, dst, console)?;
    console.done();
    let mut out = io::stdout().lock();
    let values: u64 = ambiguous.iter().map(|(_, count)| count).sum();
    if console.json {
        let ambiguous: Vec<_> = ambiguous
            .iter()
            .map(|(id, count)| serde_json::json!({ "tensor": id.to_string(), "values": count }))
            .collect();
        let document = serde_json::json!({
            "source": file,
            "target": dst,
            "lost_fields": unpacked.lost_fields,
            "vocabulary_written": unpacked.vocabulary_written,
            "ambiguous": ambiguous,
            "seconds": console.seconds(),
        });
        console.document(&mut out, &document)?;
        return Ok(Outcome::of(unpacked.lost_fields.is_empty()));
    }
    writeln!(out, "{}: original-layout checkpoint, {:.1} s", dst.display(), console.seconds())?;
    if unpacked.vocabulary_written {
        writeln!(out, "  the vocabulary is not o200k's: it is in vocabulary.json")?;
    }
    for (id, count) in &ambiguous {
        writeln!(
            out,
            "  {id}: {count} values came from one of several checkpoint values; the even one was taken"
        )?;
    }
    if values > 0 {
        writeln!(
            out,
            "  exporting again gives the same file all the same: they scale to the same stored values"
        )?;
    }
    for field in &unpacked.lost_fields {
        writeln!(out, "  {field}: no config gives this value; exporting again gives another")?;
    }
    Ok(Outcome::of(unpacked.lost_fields.is_empty()))
}

fn print_notes(out: &mut dyn Write, notes: &[String]) -> io::Result<()> {
    notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))
}

/// A line per section of the file that was written, and what it came from.
fn summary(
    console: &Console,
    from: &str,
    file: &File,
    src: &Path,
    dst: &Path,
    notes: &[String],
) -> Result<Outcome> {
    let len = file.weights.end();
    let map = SectionMap::of(file, len);
    let mut out = io::stdout().lock();
    if console.json {
        let sections: Vec<_> = map
            .sections()
            .map(|(name, range, _)| serde_json::json!({ "section": name, "range": [range.start, range.end] }))
            .collect();
        let document = serde_json::json!({
            "source": src,
            "from": from,
            "target": dst,
            "bytes": len,
            "sections": sections,
            "notes": notes,
            "seconds": console.seconds(),
        });
        console.document(&mut out, &document)?;
        return Ok(Outcome::Fine);
    }
    print_notes(&mut out, notes)?;
    for (name, range, spans) in map.sections() {
        let size = HumanBytes(range.end - range.start).to_string();
        writeln!(
            out,
            "{:>14}  {size:>12}  {name} ({} part{})",
            range.start,
            spans.len(),
            plural(spans.len())
        )?;
    }
    let header = &file.prefix.head.model;
    let (blocks, experts) = (header.num_blocks, header.num_experts);
    writeln!(
        out,
        "{}: {} from {} ({from}), {blocks} blocks of {experts} experts, {:.1} s",
        dst.display(),
        HumanBytes(len),
        src.display(),
        console.seconds(),
    )?;
    Ok(Outcome::Fine)
}
