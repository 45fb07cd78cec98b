//! What can be wrong with a vocabulary, its file or a conversation.

use std::path::PathBuf;

/// Why something cannot be said in Harmony. Parsing has no errors: it tells by [`super::Notice`]s.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model's vocabulary is not the one that Harmony is defined for.
    #[error(
        "chat needs the vocabulary o200k_harmony, this model has another: {difference}; generate plain text"
    )]
    Vocabulary {
        /// The first difference.
        difference: String,
    },
    /// The vocabulary file that openai-harmony reads cannot be put where it looks.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file or its folder.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A message that would not be one after rendering.
    #[error("message {index}, {field}: found {found}, needed {needed}")]
    Message {
        /// Its place in the conversation, from 0.
        index: usize,
        /// The part concerned.
        field: &'static str,
        /// What is there.
        found: String,
        /// What would do.
        needed: &'static str,
    },
    /// A text that the tokenizer gives up on: a run of a million white space characters.
    #[error(transparent)]
    Encode(#[from] formats::tokenizer::EncodeError),
    /// openai-harmony failed in a way that the checks before it should have excluded.
    #[error("openai-harmony: {0}")]
    Library(String),
}

/// The result of this module's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;
