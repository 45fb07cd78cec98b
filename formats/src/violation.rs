//! What is wrong with an input, in one shape for every kind of file.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;

use crate::rules::{Level, Rule};

/// One broken rule: where, what was found, and what was needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The rule of the specification.
    pub rule: Rule,
    /// The section of the file ("model header", "block 3 attention", …) or, for a checkpoint, the file's name.
    pub section: String,
    /// The field or tensor.
    pub field: String,
    /// The bytes concerned, from the start of the file; empty where no byte can be named (a missing tensor).
    pub range: Range<u64>,
    /// What is there.
    pub found: String,
    /// What the rule needs.
    pub needed: String,
}

impl Violation {
    /// Whether the rule is a MUST, so that the file is invalid.
    pub fn is_error(&self) -> bool {
        self.rule.level() != Level::Note
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, {}", self.rule, self.section, self.field)?;
        if !self.range.is_empty() {
            write!(f, " [bytes {}..{}]", self.range.start, self.range.end)?;
        }
        write!(f, ": found {}, needed {} ({})", self.found, self.needed, self.rule.advice())
    }
}

impl std::error::Error for Violation {}

/// Why an operation on a model could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The input breaks rules; all that were found are listed.
    #[error("{path}: {list}", path = path.display(), list = Listed(violations))]
    Invalid {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, at least one.
        violations: Vec<Violation>,
    },
    /// The request itself makes no sense for this input.
    #[error("{0}")]
    Unsupported(String),
}

impl Error {
    /// An I/O error at a path.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    /// The broken rules, where that is the reason.
    pub fn violations(&self) -> &[Violation] {
        match self {
            Error::Invalid { violations, .. } => violations,
            _ => &[],
        }
    }
}

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

struct Listed<'a>(&'a [Violation]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notes = self.0.iter().filter(|violation| !violation.is_error()).count();
        write!(f, "{} violation(s)", self.0.len() - notes)?;
        for violation in self.0.iter().filter(|violation| violation.is_error()) {
            write!(f, "\n  {violation}")?;
        }
        Ok(())
    }
}
