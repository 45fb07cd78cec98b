//! The command `gptoss`: chats with GPT-OSS models, measures them, and converts, verifies and inspects their files.

mod bench;
mod chat;
mod conversation;
mod demo;
mod generate;
mod info;
mod input;
mod logits;
mod options;
mod parity;
mod selftest;
mod tools;
mod turn;
mod view;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, Parser, Subcommand};
use engine::command::interrupt;
use formats::command::{Console, Outcome, Pages, Talk, Verb};

/// What the command is called, in messages and on its pages.
const NAME: &str = "gptoss";

/// Chat with GPT-OSS models; measure them; convert, verify and inspect their files.
///
/// Exit status: 0 fine, 1 violations, differences or numbers not to be trusted, 2 could not run.
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
    /// Export, verify and load the built-in demo model, and hold a conversation with it that checks itself.
    ///
    /// Exits with 1 where an answer is wrong. With --json, standard output holds an event on each line; the documents of
    /// the export and the verification follow their steps.
    Demo(demo::Arguments),
    /// Chat in the terminal; lines from a pipe do, too.
    ///
    /// /help lists what can be said beside messages. With --json, standard output holds an event on each line.
    Chat(chat::Arguments),
    /// Generate once, from a prompt or a Harmony conversation.
    ///
    /// With --json, standard output holds an event on each line: tokens, headers and contents of messages, and numbers.
    Generate(generate::Arguments),
    /// Compare logits position by position: with a stored reference, another checkpoint, backend or type.
    ///
    /// Exits with 1 where a threshold is passed, or where a logit is infinite or not a number.
    Parity(parity::Arguments),
    /// Write the logits of every position to a SafeTensors file.
    Logits(logits::Arguments),
    /// Measure the time to load, and the speed of reading and writing.
    Bench(bench::Arguments),
    /// Run a small golden trace and say whether a backend's numbers can be trusted.
    Selftest(selftest::Arguments),
    /// Show a model, where it would reside, and the devices of this machine.
    Info(info::Arguments),
    #[command(flatten)]
    Format(Verb),
    #[command(flatten)]
    Pages(Pages),
}

fn main() -> ExitCode {
    if let Some((name, value)) = engine::harmony::private_cache() {
        // SAFETY: no other thread exists yet.
        unsafe { std::env::set_var(name, value) };
    }
    let Arguments { verb, talk } = Arguments::parse();
    interrupt::install(NAME);
    let mut console = Console::new(NAME, &talk);
    console.json_lines = matches!(verb, Verbs::Chat(_) | Verbs::Generate(_) | Verbs::Demo(_));
    // Drivers and kernels may panic; the message is on standard error already, and the status shall say what it means.
    let result = catch_unwind(AssertUnwindSafe(|| run(&console, &verb)));
    let result =
        result.unwrap_or_else(|_| bail!("a panic ended the work, see above; another --backend may do it"));
    console.conclude(result.map_err(expose))
}

fn run(console: &Console, verb: &Verbs) -> Result<Outcome> {
    match verb {
        Verbs::Demo(arguments) => demo::demo(console, arguments),
        Verbs::Chat(arguments) => chat::chat(console, arguments),
        Verbs::Generate(arguments) => generate::generate(console, arguments),
        Verbs::Parity(arguments) => parity::parity(console, arguments),
        Verbs::Logits(arguments) => logits::logits(console, arguments),
        Verbs::Bench(arguments) => bench::bench(console, arguments),
        Verbs::Selftest(arguments) => selftest::selftest(console, arguments),
        Verbs::Info(arguments) => info::info(console, arguments),
        Verbs::Format(verb) => verb.run(console),
        Verbs::Pages(page) => page.print(Arguments::command()),
    }
}

/// Violations that come through the engine, as the console lists them.
fn expose(error: anyhow::Error) -> anyhow::Error {
    if !matches!(error.downcast_ref(), Some(engine::Error::Format(formats::Error::Invalid { .. }))) {
        return error;
    }
    match error.downcast() {
        Ok(engine::Error::Format(error)) => error.into(),
        Ok(other) => other.into(),
        Err(error) => error,
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
