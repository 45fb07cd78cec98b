//! `shapes`: a checkpoint's tensors beside those that the model asks for.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::ValueHint;
use engine::ace_step::checkpoint::{self, Component, Found};
use engine::command::Styles;
use engine::error::Bytes;
use formats::command::{Console, Outcome};
use serde_json::json;

#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of a released checkpoint.
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    folder: PathBuf,
}

/// `ace-step shapes`.
pub fn shapes(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let components = checkpoint::shapes(&arguments.folder);
    let fine = components.iter().all(Component::is_right);
    let mut out = std::io::stdout().lock();
    if console.json {
        console.document(&mut out, &json!({ "right": fine, "components": components }))?;
        return Ok(Outcome::of(fine));
    }
    let Styles { good, warning, .. } = Styles::of_stdout();
    for component in &components {
        let name = component.name;
        match &component.found {
            Found::Unreadable { error } => writeln!(out, "{warning}WRONG{warning:#}  {name:22} {error}")?,
            Found::Tensors { tensors, parameters, used, bytes, mismatches } => {
                let (style, verdict) =
                    if mismatches.is_empty() { (good, "right") } else { (warning, "WRONG") };
                writeln!(
                    out,
                    "{style}{verdict}{style:#}  {name:22} {tensors} tensors, {parameters} parameters ({used} \
                     needed for inference), {}",
                    Bytes(*bytes)
                )?;
                for mismatch in mismatches {
                    writeln!(out, "       {mismatch}")?;
                }
            }
        }
    }
    Ok(Outcome::of(fine))
}
