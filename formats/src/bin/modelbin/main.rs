//! The `modelbin` command: writes, reads, verifies and compares GPT-OSS `model.bin` files.

mod compare;
mod convert;
mod demo;
mod inspect;
mod terminal;
mod tokenize;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand, ValueHint};
use formats::Error;
use formats::model_bin::dump::Limits;

use terminal::Outcome;

/// Write, read, verify and compare GPT-OSS model.bin files.
///
/// Exit status: 0 fine, 1 violations or differences, 2 could not run.
#[derive(Parser)]
#[command(name = "modelbin", version, max_term_width = 100, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// Print one JSON document on standard output instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// No progress on standard error.
    #[arg(long, short, global = true)]
    quiet: bool,
}

/// Where a checkpoint's vocabulary comes from and what to do with BF16 experts.
#[derive(clap::Args)]
struct CheckpointOptions {
    /// Vocabulary of the checkpoint as JSON; otherwise its own vocabulary.json, otherwise o200k.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    vocab: Option<PathBuf>,
    /// Quantise BF16 experts to MXFP4 (least squared error per block) instead of refusing them.
    #[arg(long)]
    quantize: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Write a model.bin from a SafeTensors checkpoint, byte for byte as OpenAI's exporter does.
    Export {
        /// Folder of the checkpoint: original or Hugging Face layout, sharded or not.
        #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        src: PathBuf,
        /// The model.bin to write; it appears when it is complete.
        #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        dst: PathBuf,
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// Check a model.bin against every rule of the specification.
    Verify {
        /// The model.bin.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Compare every byte with what this checkpoint exports to.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        against: Option<PathBuf>,
        /// Headers, tokenizer, paddings and length only: milliseconds, whatever the size.
        #[arg(long)]
        structure: bool,
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// Show sections, header, tokenizer and tensors of a model.bin.
    Inspect {
        /// The model.bin.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// List every tensor, each expert's included.
        #[arg(long)]
        tensors: bool,
    },
    /// Annotated hexadecimal in which every byte of the file is attributed exactly once.
    Dump {
        /// The model.bin, valid or not.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Show every byte instead of the first lines of each tensor.
        #[arg(long)]
        full: bool,
    },
    /// Compare two models: two model.bin files byte by byte, other containers tensor by tensor.
    Diff {
        /// A model.bin, a GGUF file or a checkpoint folder.
        #[arg(value_hint = ValueHint::AnyPath)]
        a: PathBuf,
        /// Another.
        #[arg(value_hint = ValueHint::AnyPath)]
        b: PathBuf,
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// Turn a model.bin (or a GGUF file) back into an original-layout SafeTensors checkpoint.
    Unpack {
        /// The model.bin or GGUF file.
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The folder to write; it must not exist or be empty.
        #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dst: PathBuf,
    },
    /// Convert between model.bin and GGUF, in either direction.
    Convert {
        /// A model.bin, a GGUF file or a checkpoint folder.
        #[arg(value_hint = ValueHint::AnyPath)]
        src: PathBuf,
        /// The file to write: GGUF where it ends in .gguf, otherwise a model.bin.
        #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        dst: PathBuf,
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// BLAKE3 of each tensor in a form that is the same in every container.
    Digest {
        /// A model.bin, a GGUF file or a checkpoint folder.
        #[arg(value_hint = ValueHint::AnyPath)]
        path: PathBuf,
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// Encode text to token ids, or decode ids, with a model.bin's own vocabulary.
    Tokenize {
        /// The model.bin; without it, the bundled o200k vocabulary.
        #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
        model: Option<PathBuf>,
        /// Read ids instead of text.
        #[arg(long, short)]
        decode: bool,
        /// Recognise special tokens such as <|start|> in the text.
        #[arg(long)]
        special: bool,
        /// The text (or ids, separated by spaces or commas); without it, standard input.
        text: Option<String>,
    },
    /// Export, verify, unpack and compare a small built-in checkpoint, showing each step.
    Demo {
        /// Keep the files in this folder instead of a temporary one.
        #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dst: Option<PathBuf>,
    },
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page of this command and its verbs, in roff.
    Man,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // The library writes beside its targets; a signal must not leave that behind.
    let handler = ctrlc::set_handler(|| {
        formats::output::remove_pending();
        std::process::exit(130);
    });
    if let Err(error) = handler {
        eprintln!("modelbin: no handler for interrupts: {error}");
    }
    let json = arguments.json;
    match run(arguments) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Differs) => ExitCode::from(1),
        Err(error) => report(&error, json),
    }
}

fn run(arguments: Arguments) -> Result<Outcome> {
    let console = terminal::Console::new(arguments.json, arguments.quiet);
    match arguments.verb {
        Verb::Export { src, dst, checkpoint } => convert::export(&console, &src, &dst, &checkpoint),
        Verb::Verify { file, against, structure, checkpoint } => {
            compare::verify(&console, &file, against.as_deref(), structure, &checkpoint)
        }
        Verb::Inspect { file, tensors } => inspect::inspect(&console, &file, tensors),
        Verb::Dump { file, full } => {
            inspect::dump(&file, if full { Limits::NONE } else { Limits::default() })
        }
        Verb::Diff { a, b, checkpoint } => compare::diff(&console, &a, &b, &checkpoint),
        Verb::Unpack { file, dst } => convert::unpack(&console, &file, &dst),
        Verb::Convert { src, dst, checkpoint } => convert::convert(&console, &src, &dst, &checkpoint),
        Verb::Digest { path, checkpoint } => compare::digest(&console, &path, &checkpoint),
        Verb::Tokenize { model, decode, special, text } => {
            tokenize::tokenize(&console, model.as_deref(), text, decode, special)
        }
        Verb::Demo { dst } => demo::demo(&terminal::Console::new(false, true), dst),
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "modelbin", &mut io::stdout());
            Ok(Outcome::Fine)
        }
        Verb::Man => manual(),
    }
}

/// The page of the command, then one of each verb.
fn manual() -> Result<Outcome> {
    let mut command = Arguments::command();
    command.build();
    let mut out = io::stdout().lock();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for verb in command.get_subcommands() {
        clap_mangen::Man::new(verb.clone()).render(&mut out)?;
    }
    out.flush()?;
    Ok(Outcome::Fine)
}

/// Says why the command could not do its work, and chooses the exit status.
fn report(error: &anyhow::Error, json: bool) -> ExitCode {
    let broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    match error.downcast_ref::<Error>() {
        Some(Error::Invalid { path, violations }) => {
            if json {
                let document = serde_json::json!({
                    "path": path, "valid": false, "violations": terminal::violations_json(violations),
                });
                println!("{document:#}");
            } else {
                eprint!("{}: ", path.display());
                terminal::print_violations(&mut io::stderr(), violations).unwrap_or_default();
            }
            ExitCode::from(1)
        }
        _ => {
            if json {
                println!("{:#}", serde_json::json!({ "error": format!("{error:#}") }));
            }
            eprintln!("modelbin: {error:#}");
            ExitCode::from(2)
        }
    }
}
