//! The `modelbin` command: writes, reads, verifies and compares GPT-OSS `model.bin` files.

mod demo;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand, ValueHint};
use formats::command::{Console, Outcome, Pages, Talk, Verb, exit_on_interrupt};

/// What the command is called, in messages and on its pages.
const NAME: &str = "modelbin";

/// Write, read, verify and compare GPT-OSS model.bin files.
///
/// Exit status: 0 fine, 1 violations or differences, 2 could not run.
#[derive(Parser)]
#[command(name = NAME, version, max_term_width = 100, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verbs,
    #[command(flatten)]
    talk: Talk,
}

#[derive(Subcommand)]
enum Verbs {
    #[command(flatten)]
    Format(Verb),
    /// Export, verify, unpack and compare a small built-in checkpoint, showing each step.
    Demo {
        /// Keep the files in this folder instead of a temporary one.
        #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dst: Option<PathBuf>,
    },
    #[command(flatten)]
    Pages(Pages),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    exit_on_interrupt(NAME);
    let console = Console::new(NAME, &arguments.talk);
    console.conclude(run(&console, arguments.verb))
}

fn run(console: &Console, verb: Verbs) -> Result<Outcome> {
    match verb {
        Verbs::Format(verb) => verb.run(console),
        Verbs::Demo { dst } => demo::demo(dst),
        Verbs::Pages(page) => page.print(Arguments::command()),
    }
}
