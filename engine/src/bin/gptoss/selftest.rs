//! `selftest`: whether the numbers of a backend can be trusted.

use std::io::Write;

use anyhow::Result;
use engine::backend::Backend;
use engine::command::{Styles, backends};
use engine::selftest::{self, Check, Options, Report};
use formats::command::{Console, Outcome};
use serde::Serialize;

#[derive(clap::Args)]
pub struct Arguments {
    /// The backend to test [default: every one that this build and this machine have].
    #[arg(long, value_parser = backends())]
    backend: Option<Backend>,
    /// Also check every kernel by itself, in every variant that the device can run, against float64.
    #[arg(long)]
    all: bool,
}

/// What became of a backend.
#[derive(Serialize)]
struct Entry {
    backend: Backend,
    /// Whether its numbers can be trusted; nothing where there is no such device.
    trusted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// `gptoss selftest`.
pub fn selftest(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let options = Options { kernels: arguments.all };
    let mut entries = Vec::new();
    match arguments.backend {
        Some(backend) => entries.push(test(backend, &backend.open()?, options)),
        None => {
            for backend in Backend::ALL.into_iter().filter(|backend| backend.is_compiled()) {
                entries.push(match backend.open() {
                    Ok(device) => test(backend, &device, options),
                    Err(error) => {
                        Entry { backend, trusted: None, report: None, error: Some(error.to_string()) }
                    }
                });
            }
        }
    }
    let trusted = entries.iter().all(|entry| entry.trusted != Some(false));
    let mut out = std::io::stdout().lock();
    if console.json {
        console.document(&mut out, &serde_json::json!({ "trusted": trusted, "backends": entries }))?;
        return Ok(Outcome::of(trusted));
    }
    let styles = Styles::of_stdout();
    for Entry { backend, trusted, report, error } in &entries {
        match (trusted, error) {
            (Some(true), _) => writeln!(out, "{0}{backend}: its numbers can be trusted{0:#}", styles.good)?,
            (Some(false), _) => {
                writeln!(out, "{0}{backend}: its numbers cannot be trusted{0:#}", styles.warning)?
            }
            (None, _) => writeln!(out, "{backend}: not tested")?,
        }
        if let Some(Report { device, checks }) = report {
            writeln!(out, "  {device}")?;
            for check in checks {
                let Check { name, worst_tensor, error, bound, failure } = check;
                let verdict = if check.passed() { "ok" } else { "WRONG" };
                let found = match failure {
                    Some(failure) => failure.clone(),
                    None => format!("{error:.2e} in {worst_tensor}, needed {bound:.2e} at most"),
                };
                writeln!(out, "  {verdict:5} {name}: {found}")?;
            }
        }
        if let Some(error) = error {
            writeln!(out, "  {error}")?;
        }
    }
    Ok(Outcome::of(trusted))
}

/// A device that fails outright is not to be trusted either.
fn test(backend: Backend, device: &engine::backend::Device, options: Options) -> Entry {
    match selftest::run(device, options) {
        Ok(report) => {
            Entry { backend, trusted: Some(report.is_trusted()), report: Some(report), error: None }
        }
        Err(error) => Entry { backend, trusted: Some(false), report: None, error: Some(error.to_string()) },
    }
}
