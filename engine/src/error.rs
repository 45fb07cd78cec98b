//! What can go wrong, always with what to do about it.

use std::fmt;
use std::path::PathBuf;

use crate::backend::Backend;
use crate::weights::Mismatch;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A container could not be read or breaks a rule of its format.
    #[error(transparent)]
    Format(#[from] formats::Error),
    /// The backend is not part of this build, or this machine has no device for it.
    #[error("backend {backend}: {reason}")]
    Backend {
        /// What was asked for.
        backend: Backend,
        /// Why it cannot be had, and what to do.
        reason: String,
    },
    /// A model that this engine cannot run, although its file is valid.
    #[error("{field}: found {found}, needed {needed}")]
    Model {
        /// The field of the header or the option.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        needed: String,
    },
    /// The weights or the caches do not fit in memory.
    #[error(
        "{what}: {needed} needed, {available} available; {advice}",
        needed = Bytes(*needed), available = Bytes(*available)
    )]
    Memory {
        /// What was to reside there.
        what: String,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that there are.
        available: u64,
        /// Options that would make it fit.
        advice: &'static str,
    },
    /// A token id outside the vocabulary.
    #[error("token {token} at position {position}: the vocabulary has {vocabulary} tokens")]
    Token {
        /// The id.
        token: u32,
        /// Where it stands in the tokens given.
        position: usize,
        /// The number of ids.
        vocabulary: usize,
    },
    /// A sequence longer than the context, or none at all.
    #[error("a sequence of {length} tokens: needed 1 to {context} (the context length)")]
    Length {
        /// Tokens of the sequence.
        length: usize,
        /// Tokens that there is room for.
        context: usize,
    },
    /// A session has too few tokens to go back to a length.
    #[error("going back to {length} tokens: the session has {tokens}")]
    Rollback {
        /// The length.
        length: usize,
        /// Tokens of the session.
        tokens: usize,
    },
    /// A cache, or a snapshot of one, of another model.
    #[error(
        "the cache belongs to another model, or one that is computed in another way: make it with this model's new_cache"
    )]
    Cache,
    /// Sampling options outside their range.
    #[error(transparent)]
    SamplingOptions(#[from] crate::sampling::OptionsError),
    /// No token could be drawn.
    #[error(transparent)]
    Sampling(#[from] crate::sampling::SampleError),
    /// A conversation could not be rendered.
    #[error(transparent)]
    Harmony(#[from] crate::harmony::Error),
    /// A tensor or an option that an operation of [`crate::extension`] cannot take.
    #[error("{operation}: {argument} is {found}, needed {needed}")]
    Argument {
        /// The operation.
        operation: &'static str,
        /// The name of the argument.
        argument: &'static str,
        /// What it is.
        found: String,
        /// What it has to be.
        needed: String,
    },
    /// A component of a checkpoint without one of its files, or with a configuration that is none.
    #[error("{path}: {reason}", path = path.display())]
    Component {
        /// The folder or the file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Names or shapes that are not those of the model; all that were found are listed.
    #[error("{path}: {list}", path = path.display(), list = Listed(mismatches))]
    Mismatches {
        /// The SafeTensors file.
        path: PathBuf,
        /// What is wrong, by name.
        mismatches: Vec<Mismatch>,
    },
    /// A tensor of a file that cannot be used.
    #[error("{path}: {tensor}: found {found}, needed {needed}", path = path.display())]
    Weights {
        /// The SafeTensors file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
        /// What it has to be.
        needed: String,
    },
    /// Lyrics in a script that their tokenizer has no letters for.
    #[error("lyrics, line {line}: found {found}, needed {needed}")]
    Lyrics {
        /// The line, from 1.
        line: usize,
        /// Some of the characters.
        found: String,
        /// How to write them instead.
        needed: &'static str,
    },
    /// A sound file that cannot be read or written.
    #[error("{path}: {reason}", path = path.display())]
    Audio {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The caller ended a run.
    #[error("ended after {done} of {total} steps")]
    Cancelled {
        /// Steps that were done.
        done: usize,
        /// Steps of the run.
        total: usize,
    },
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(String),
}

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Problems on one line, the first of many.
struct Listed<'a>(&'a [Mismatch]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        for (index, mismatch) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{mismatch}", if index > 0 { "; " } else { "" })?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// A number of bytes for people.
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.iter().find(|(size, _)| self.0 >= *size) {
            Some((size, unit)) => f.pad(&format!("{:.2} {unit}", self.0 as f64 / *size as f64)),
            None => f.pad(&format!("{} B", self.0)),
        }
    }
}
