//! `verify`, `diff` and `digest`.

use std::io::{self, Write};
use std::path::Path;

use anyhow::Result;
use indicatif::HumanBytes;

use super::CheckpointOptions;
use super::terminal::{Console, Outcome, plural, print_violations, violations_json};
use crate::canonical::Source;
use crate::container::{self, Container};
use crate::model_bin::model::Bytes;
use crate::model_bin::{Depth, Verified, verify as check};
use crate::{Violation, compare, digest};

/// Opens a model in any container.
pub fn open(console: &Console, path: &Path, options: &CheckpointOptions) -> Result<Box<dyn Source>> {
    Ok(container::open(path, options.vocab.as_deref(), options.quantize, console)?)
}

/// The verb `verify`.
pub fn verify(
    console: &Console,
    file: &Path,
    against: Option<&Path>,
    structure: bool,
    options: &CheckpointOptions,
) -> Result<Outcome> {
    let depth = if structure { Depth::Structure } else { Depth::Full };
    let bytes = Bytes::map(file)?;
    let report = check::verify(&bytes, depth, console);
    let mut violations = report.violations.clone();
    let tensors = report.file.as_ref().map_or(0, |file| file.weights.tensors().count());
    let len = report.len;
    if let Some(checkpoint) = against
        && report.is_valid()
    {
        let model = Verified::open(file, Depth::Structure, console)?;
        let source = open(console, checkpoint, options)?;
        violations.extend(compare::against(&model, &*source, console)?);
    }
    console.done();
    let valid = !violations.iter().any(Violation::is_error);
    let mut out = io::stdout().lock();
    if console.json {
        let document = serde_json::json!({
            "path": file,
            "bytes": len,
            "depth": depth,
            "against": against,
            "tensors": tensors,
            "seconds": console.seconds(),
            "valid": valid,
            "violations": violations_json(&violations),
        });
        console.document(&mut out, &document)?;
    } else {
        write!(out, "{}: ", file.display())?;
        if valid {
            let checked = match (depth, against) {
                (Depth::Structure, None) => "structure only",
                (Depth::Full, None) => "structure and values",
                (Depth::Structure, Some(_)) => "structure and every byte against the checkpoint",
                (Depth::Full, Some(_)) => "structure, values and every byte against the checkpoint",
            };
            let (size, seconds) = (HumanBytes(len), console.seconds());
            write!(out, "valid ({checked}; {size}, {tensors} tensors, {seconds:.3} s)")?;
            if violations.is_empty() {
                writeln!(out)?;
            } else {
                write!(out, ", ")?;
            }
        }
        if !violations.is_empty() {
            print_violations(&mut out, &violations)?;
        }
    }
    Ok(Outcome::of(valid))
}

/// The verb `diff`.
pub fn diff(console: &Console, a: &Path, b: &Path, options: &CheckpointOptions) -> Result<Outcome> {
    let both_files =
        Container::detect(a)? == Container::ModelBin && Container::detect(b)? == Container::ModelBin;
    let differences = if both_files {
        let [bytes_a, bytes_b] = [Bytes::map(a)?, Bytes::map(b)?];
        compare::files(&bytes_a, &bytes_b)
    } else {
        let [model_a, model_b] = [open(console, a, options)?, open(console, b, options)?];
        compare::models(&*model_a, &*model_b, console)?
    };
    console.done();
    let mut out = io::stdout().lock();
    if console.json {
        let document = serde_json::json!({ "a": a, "b": b, "differences": differences });
        console.document(&mut out, &document)?;
    } else if differences.is_empty() {
        let what = if both_files { "identical" } else { "the same model" };
        writeln!(out, "{} and {}: {what}", a.display(), b.display())?;
    } else {
        let count = differences.len();
        writeln!(out, "{} and {}: {count} difference{}", a.display(), b.display(), plural(count))?;
        for difference in &differences {
            writeln!(out, "  {difference}")?;
        }
    }
    Ok(Outcome::of(differences.is_empty()))
}

/// The verb `digest`.
pub fn digest(console: &Console, path: &Path, options: &CheckpointOptions) -> Result<Outcome> {
    let source = open(console, path, options)?;
    let manifest = digest::digest(&*source, console)?;
    console.done();
    let mut out = io::stdout().lock();
    if console.json {
        console.document(&mut out, &serde_json::to_value(&manifest)?)?;
        return Ok(Outcome::Fine);
    }
    for tensor in &manifest.tensors {
        writeln!(out, "{tensor}")?;
    }
    writeln!(out, "{}  model of {} tensors", manifest.model, manifest.tensors.len())?;
    for changed in &manifest.changed {
        writeln!(out, "changed by the container: {}: {}", changed.name, changed.reason)?;
    }
    Ok(Outcome::Fine)
}
