//! The command `ace-step`: music from a prompt and lyrics.

mod bench;
mod device;
mod steps;
mod verify;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use engine::command::interrupt;
use formats::command::{Console, Outcome, Pages, Talk};

/// What the command is called, in messages and on its pages.
const NAME: &str = "ace-step";

/// Music from a prompt and lyrics: ACE-Step v1 (3.5B), from the released weights.
///
/// Exit status: 0 fine, 1 differences, 2 could not run.
#[derive(Parser)]
#[command(name = NAME, version, max_term_width = 100, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verbs,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant)]
enum Verbs {
    /// Compare every part with the results of the original code in a folder laid out like fixtures/ace-step.
    ///
    /// Exits with 1 where a part misses its tolerance, or where the folder has none.
    Verify(verify::Arguments),
    /// Measure how long a song takes here, with random weights in the released shapes.
    Bench(bench::Arguments),
    #[command(flatten)]
    Pages(Pages),
}

fn main() -> ExitCode {
    let Arguments { verb, talk } = Arguments::parse();
    interrupt::install(NAME);
    let console = Console::new(NAME, &talk);
    // Drivers and kernels may panic; the message is on standard error already, and the status shall say what it means.
    let result = catch_unwind(AssertUnwindSafe(|| run(&console, &verb)));
    let result =
        result.unwrap_or_else(|_| bail!("a panic ended the work, see above; another --backend may do it"));
    console.conclude(result)
}

fn run(console: &Console, verb: &Verbs) -> Result<Outcome> {
    match verb {
        Verbs::Verify(arguments) => verify::verify(console, arguments),
        Verbs::Bench(arguments) => bench::bench(console, arguments),
        Verbs::Pages(page) => page.print(Arguments::command()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Arguments::command().debug_assert();
    }
}
