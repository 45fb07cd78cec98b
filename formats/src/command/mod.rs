//! The verbs of the command line, for every binary that has them: `modelbin` and the engine's `gptoss`.
//!
//! This module is command code: it prints. Results go to standard output, as text or as one JSON document; progress and
//! errors go to standard error. Exit status: 0 fine, 1 violations or differences, 2 could not run.
//!
//! A binary flattens [`Verb`], [`Talk`] and [`Pages`] into its own arguments, so that every flag, its help, the
//! completions and the manual come from one place and speak of the command that runs.
//!
//! ```
//! use clap::{Parser, Subcommand};
//! use formats::command::{Console, Outcome, Talk, Verb};
//!
//! #[derive(Parser)]
//! struct Arguments {
//!     #[command(subcommand)]
//!     verb: Verbs,
//!     #[command(flatten)]
//!     talk: Talk,
//! }
//!
//! #[derive(Subcommand)]
//! enum Verbs {
//!     #[command(flatten)]
//!     Format(Verb),
//! }
//!
//! let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/model-bin/ordinary.bin");
//! let Arguments { verb: Verbs::Format(verb), talk } = Arguments::parse_from(["mine", "verify", file, "--quiet"]);
//! let console = Console::new("mine", &talk);
//! assert_eq!(verb.run(&console).unwrap(), Outcome::Fine);
//! ```

mod compare;
mod convert;
mod inspect;
mod pages;
mod terminal;
mod tokenize;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand, ValueHint};

pub use self::pages::Pages;
pub use self::terminal::{Console, Outcome, bar, exit_on_interrupt, explained};
use crate::model_bin::dump::Limits;

/// How to talk: flags that every verb takes.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Talk {
    /// Print one JSON document on standard output instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress on standard error.
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// Where a checkpoint's vocabulary comes from and what to do with BF16 experts.
#[derive(Args, Clone, Debug, Default)]
pub struct CheckpointOptions {
    /// Vocabulary of the checkpoint as JSON; otherwise its own vocabulary.json, otherwise o200k.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub vocab: Option<PathBuf>,
    /// Quantise BF16 experts to MXFP4 (least squared error per block) instead of refusing them.
    #[arg(long)]
    pub quantize: bool,
}

/// What can be done with a model in any container.
#[derive(Subcommand, Clone, Debug)]
pub enum Verb {
    /// Write a model.bin from a SafeTensors checkpoint, byte for byte as OpenAI's exporter does.
    Export {
        /// Folder of the checkpoint: original or Hugging Face layout, sharded or not.
        #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        src: PathBuf,
        /// The model.bin to write; it appears when it is complete.
        #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        dst: PathBuf,
        /// How checkpoints are read.
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
        /// How checkpoints are read.
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
        /// How checkpoints are read.
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
        /// How checkpoints are read.
        #[command(flatten)]
        checkpoint: CheckpointOptions,
    },
    /// BLAKE3 of each tensor in a form that is the same in every container.
    Digest {
        /// A model.bin, a GGUF file or a checkpoint folder.
        #[arg(value_hint = ValueHint::AnyPath)]
        path: PathBuf,
        /// How checkpoints are read.
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
}

impl Verb {
    /// Does it, and prints what was found.
    ///
    /// # Errors
    /// Why it could not run, for [`Console::conclude`]. A [`crate::Error::Invalid`] among them is a finding, too.
    pub fn run(&self, console: &Console) -> Result<Outcome> {
        match self {
            Verb::Export { src, dst, checkpoint } => convert::export(console, src, dst, checkpoint),
            Verb::Verify { file, against, structure, checkpoint } => {
                compare::verify(console, file, against.as_deref(), *structure, checkpoint)
            }
            Verb::Inspect { file, tensors } => inspect::inspect(console, file, *tensors),
            Verb::Dump { file, full } => {
                inspect::dump(file, if *full { Limits::NONE } else { Limits::default() })
            }
            Verb::Diff { a, b, checkpoint } => compare::diff(console, a, b, checkpoint),
            Verb::Unpack { file, dst } => convert::unpack(console, file, dst),
            Verb::Convert { src, dst, checkpoint } => convert::convert(console, src, dst, checkpoint),
            Verb::Digest { path, checkpoint } => compare::digest(console, path, checkpoint),
            Verb::Tokenize { model, decode, special, text } => {
                tokenize::tokenize(console, model.as_deref(), text.as_deref(), *decode, *special)
            }
        }
    }
}
