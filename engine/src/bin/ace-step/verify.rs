//! `verify`: how far every part is from the original.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::ValueHint;
use engine::ace_step::verify::{self, Options, Outcome as PartOutcome, Part};
use engine::backend::Backend;
use engine::command::{Styles, backends};
use formats::command::{Console, Outcome};
use serde_json::json;

#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of inputs and results of the original code.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    folder: PathBuf,
    /// Vocabulary of the lyric tokenizer, `vocab.json` of the original repository; without it that part is absent.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    lyric_vocab: Option<PathBuf>,
    /// Verify these parts only. May be given several times.
    #[arg(long, value_name = "PART", value_parser = clap::builder::PossibleValuesParser::new(verify::names()))]
    part: Vec<String>,
    /// Show every tensor.
    #[arg(long)]
    all: bool,
    /// Who computes.
    #[arg(long, value_parser = backends(), default_value_t = Backend::Cpu)]
    backend: Backend,
}

/// `ace-step verify`.
pub fn verify(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let folder = &arguments.folder;
    ensure!(folder.is_dir(), "{}: no such folder", folder.display());
    let device = arguments.backend.open()?;
    let options = Options { lyric_vocab: arguments.lyric_vocab.clone(), parts: arguments.part.clone() };
    let mut out = std::io::stdout().lock();
    let styles = Styles::of_stdout();
    let mut parts = Vec::new();
    for part in verify::verify(folder, &options, &device) {
        if !console.json {
            print(&mut out, &part, arguments.all, styles)?;
            out.flush()?;
        }
        parts.push(part);
    }
    let compared = parts.iter().filter(|part| !part.is_absent()).count();
    let passed = parts.iter().filter(|part| part.passed()).count();
    let fine = compared > 0 && passed == compared;
    if console.json {
        let document = json!({
            "passed": fine,
            "backend": device.backend(),
            "device": device.name(),
            "parts": parts,
        });
        console.document(&mut out, &document)?;
    } else if compared == 0 {
        writeln!(out, "no part of ACE-Step in {}: see fixtures/ace-step/README.md", folder.display())?;
    } else {
        let absent = parts.len() - compared;
        writeln!(out, "{passed} of {compared} parts pass on {}, {absent} absent", device.name())?;
    }
    Ok(Outcome::of(fine))
}

fn print(out: &mut impl Write, part: &Part, all: bool, styles: Styles) -> std::io::Result<()> {
    let name = part.name;
    let Styles { good, warning, dim, .. } = styles;
    match &part.outcome {
        PartOutcome::Absent { missing } => writeln!(out, "{dim}absent{dim:#}  {name:16} {missing}")?,
        PartOutcome::Failed { error } => writeln!(out, "{warning}FAILED{warning:#}  {name:16} {error}")?,
        PartOutcome::Compared { comparisons } => {
            let (style, verdict) = if part.passed() { (good, "passed") } else { (warning, "FAILED") };
            let worst = part.worst().map(ToString::to_string).unwrap_or_default();
            let count = comparisons.len();
            writeln!(out, "{style}{verdict}{style:#}  {name:16} {count:4} compared, worst {worst}")?;
            if let Some(first) = part.first_failure() {
                writeln!(out, "        {:16} first to fail: {first}", "")?;
            }
            for comparison in comparisons.iter().filter(|_| all) {
                writeln!(out, "        {comparison}")?;
            }
        }
    }
    Ok(())
}
