//! What the verbs share on the terminal: outcome, progress, lists of violations, how a command ends.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::Talk;
use crate::progress::Progress;
use crate::{Error, Violation};

/// How a verb that could run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Exit status 0.
    Fine,
    /// Exit status 1: violations or differences.
    Differs,
}

impl Outcome {
    /// Fine if it holds.
    pub fn of(fine: bool) -> Outcome {
        if fine { Outcome::Fine } else { Outcome::Differs }
    }
}

/// How to talk: text or JSON, and progress on standard error: a bar on a terminal, a line per step elsewhere.
pub struct Console {
    /// The command that runs, for messages.
    pub name: &'static str,
    /// Whether standard output holds one JSON document.
    pub json: bool,
    /// Whether standard output holds one JSON document on each line, so that errors take one line, too.
    pub json_lines: bool,
    /// Whether standard error holds errors only.
    pub quiet: bool,
    step: Mutex<Option<ProgressBar>>,
    started: Instant,
}

impl Console {
    /// A console of the command `name` that starts its clock now.
    pub fn new(name: &'static str, talk: &Talk) -> Console {
        Console {
            name,
            json: talk.json,
            json_lines: false,
            quiet: talk.quiet,
            step: Mutex::new(None),
            started: Instant::now(),
        }
    }

    /// Says why the command could not do its work if it could not, and chooses the exit status.
    ///
    /// [`Error::Invalid`] is listed and is 1. A broken pipe is no failure: the reader has seen enough.
    pub fn conclude(&self, result: anyhow::Result<Outcome>) -> ExitCode {
        self.done();
        let error = match result {
            Ok(Outcome::Fine) => return ExitCode::SUCCESS,
            Ok(Outcome::Differs) => return ExitCode::from(1),
            Err(error) => error,
        };
        let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        };
        if error.chain().any(broken_pipe) {
            return ExitCode::SUCCESS;
        }
        let mut out = io::stdout();
        let mut print = |document| self.document(&mut out, &document);
        // Where these go nowhere, there is nobody left to tell; the status says it.
        if let Some(Error::Invalid { path, violations }) = error.downcast_ref::<Error>() {
            let _ = if self.json {
                print(serde_json::json!({
                    "path": path, "valid": false, "violations": violations_json(violations),
                }))
            } else {
                eprint!("{}: ", path.display());
                print_violations(&mut io::stderr(), violations)
            };
            return ExitCode::from(1);
        }
        let text = explained(&error);
        if self.json {
            let _ = print(match self.json_lines {
                true => serde_json::json!({ "event": "error", "error": text }),
                false => serde_json::json!({ "error": text }),
            });
        }
        eprintln!("{}: {text}", self.name);
        ExitCode::from(2)
    }

    /// Writes a JSON document, on one line where there may be more of them.
    pub fn document(&self, out: &mut dyn Write, document: &serde_json::Value) -> io::Result<()> {
        if self.json_lines { writeln!(out, "{document}") } else { writeln!(out, "{document:#}") }
    }

    /// Removes the bar, so that text can follow.
    pub fn done(&self) {
        if let Some(bar) = self.bar().take() {
            bar.finish_and_clear();
        }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, Option<ProgressBar>> {
        self.step.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Progress for Console {
    fn begin(&self, step: &str, total: u64) {
        if self.quiet {
            return;
        }
        if !io::stderr().is_terminal() {
            eprintln!("{step}: {}", HumanBytes(total));
            return;
        }
        let bar = bar(step, total, "{bytes:>10} of {total_bytes}  {bytes_per_sec}");
        if let Some(previous) = self.bar().replace(bar) {
            previous.finish_and_clear();
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar() {
            bar.inc(bytes);
        }
    }
}

/// A bar for a step of `total` units, which `counts` tells in indicatif's template language.
pub fn bar(step: &str, total: u64, counts: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{{msg:24}} {{bar:32}} {counts}, {{eta}} left"));
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_message(step.to_owned()).with_style(style)
}

/// An error and its causes on one line. Many errors tell their cause in their own text; it is not told again.
pub fn explained(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Lets an interrupt or a request to terminate end the process with status 130, unfinished outputs removed.
///
/// Outputs are written beside their targets; a signal must not leave that behind.
pub fn exit_on_interrupt(name: &str) {
    let handler = ctrlc::set_handler(|| {
        crate::output::remove_pending();
        std::process::exit(130);
    });
    if let Err(error) = handler {
        eprintln!("{name}: no handler for interrupts: {error}");
    }
}

/// Prints a heading and each violation on three lines: rule and place, what and what for, advice.
pub fn print_violations(out: &mut dyn Write, violations: &[Violation]) -> io::Result<()> {
    let errors = violations.iter().filter(|violation| violation.is_error()).count();
    let notes = violations.len() - errors;
    writeln!(out, "{errors} violation{}, {notes} note{}", plural(errors), plural(notes))?;
    for violation in violations {
        let kind = if violation.is_error() { "" } else { "note " };
        write!(out, "  {kind}{}  {}, {}", violation.rule, violation.section, violation.field)?;
        if !violation.range.is_empty() {
            write!(out, " [bytes {}..{}]", violation.range.start, violation.range.end)?;
        }
        writeln!(out, "\n      found {}, needed {}", violation.found, violation.needed)?;
        writeln!(out, "      {}", violation.rule.advice())?;
    }
    Ok(())
}

/// Violations for programs: what [`Violation`] holds, and the rule's level and advice.
pub fn violations_json(violations: &[Violation]) -> serde_json::Value {
    let entry = |violation: &Violation| {
        serde_json::json!({
            "rule": violation.rule,
            "level": violation.rule.level().to_string(),
            "section": violation.section,
            "field": violation.field,
            "range": [violation.range.start, violation.range.end],
            "found": violation.found,
            "needed": violation.needed,
            "advice": violation.rule.advice(),
        })
    };
    violations.iter().map(entry).collect()
}

/// The plural's s.
pub fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let missing = || io::Error::from_raw_os_error(2);
        let error = anyhow::Error::from(Error::Io { path: "a".into(), source: missing() }).context("--dst");
        assert_eq!(explained(&error), format!("--dst: a: {}", missing()));
        let error = anyhow::Error::from(missing()).context("b").context("c");
        assert_eq!(explained(&error), format!("c: b: {}", missing()));
    }
}
