//! The command `ace-step`: music from a prompt and lyrics.

mod bench;
mod demo;
mod device;
mod generate;
mod options;
mod picture;
mod plan;
mod shapes;
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
    /// The whole pipeline with a tiny model of random weights: it proves that everything runs, and gives noise.
    Demo(demo::Arguments),
    /// Make a song.
    Generate(generate::Arguments),
    /// Check the names and shapes of a checkpoint's tensors, from the headers alone.
    ///
    /// Exits with 1 where anything is missing, not expected or of another shape.
    Shapes(shapes::Arguments),
    /// Compare every part with the results of the original code in a folder laid out like fixtures/ace-step.
    ///
    /// Exits with 1 where a part misses its tolerance, or where the folder has none.
    Verify(verify::Arguments),
    /// Measure how long a song takes here, with random weights in the released shapes.
    Bench(bench::Arguments),
    /// Show memory and operations for a length and a number of steps.
    Plan(plan::Arguments),
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
        Verbs::Demo(arguments) => demo::demo(console, arguments),
        Verbs::Generate(arguments) => generate::generate(console, arguments),
        Verbs::Shapes(arguments) => shapes::shapes(console, arguments),
        Verbs::Verify(arguments) => verify::verify(console, arguments),
        Verbs::Bench(arguments) => bench::bench(console, arguments),
        Verbs::Plan(arguments) => plan::plan(console, arguments),
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
