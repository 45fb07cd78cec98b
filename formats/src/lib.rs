//! GPT-OSS `model.bin`: the format, and everything that reads, writes, verifies and compares such files.
//!
//! The normative text is `spec/model-bin.md`; rule ids in this crate's errors refer to it.
//!
//! # Architecture
//!
//! One model, several containers. Every container is a [`canonical::Source`]: it yields the *canonical*
//! tensors, those of the original checkpoint, row by row and without loading more than was asked for.
//!
//! ```text
//!   checkpoint::Folder ─ original layout ┐                       ┌─ model_bin::write  → model.bin
//!   (SafeTensors)      ─ Hugging Face    ┤                       ├─ unpack            → original SafeTensors
//!   model_bin::Verified (mapped file)    ┼→ canonical::Source →──┼─ gguf::write       → GGUF
//!   gguf::Model                          ┘                       ├─ digest            → BLAKE3 manifest
//!                                                                └─ compare           → differences
//! ```
//!
//! [`model_bin::layout`] is the one description of the file, written with `binrw`. Reading it yields positions
//! ([`model_bin::layout::Tensor`] records dtype, shape and byte range and copies nothing); writing it pulls each
//! tensor's bytes from a [`model_bin::layout::Payload`]. Reading the same description from an endless stream of
//! zeros yields the plan of a file that does not exist yet, so there is no second copy of the layout anywhere.
//!
//! Three levels of reading:
//! 1. [`model_bin::layout::File`], the raw sections as they stand, right or wrong;
//! 2. [`model_bin::section::SectionMap`], every byte attributed to a section, field or tensor exactly once;
//! 3. [`model_bin::Verified`], which only a file without violations yields: typed views of named tensors.
//!
//! # Depends on
//!
//! | module | depends on |
//! |---|---|
//! | [`rules`], [`violation`] | nothing |
//! | [`canonical`] | [`model_bin::layout`] |
//! | [`mxfp4`], [`vocabulary`], [`tokenizer`] | nothing |
//! | [`model_bin`] | [`canonical`], [`rules`] |
//! | [`checkpoint`], [`gguf`] | [`canonical`], [`mxfp4`], [`vocabulary`] |
//! | [`digest`](mod@digest), [`compare`], [`unpack`] | [`canonical`] |
//! | `command` (feature of this name, on by default) | all of them: the verbs of the command line |

pub mod canonical;
pub mod checkpoint;
#[cfg(feature = "command")]
pub mod command;
pub mod compare;
pub mod container;
pub mod digest;
pub mod gguf;
pub mod model_bin;
pub mod mxfp4;
pub mod output;
pub mod progress;
pub mod rules;
pub mod tokenizer;
pub mod unpack;
pub mod violation;
pub mod vocabulary;

pub use rules::Rule;
pub use violation::{Error, Result, Violation};

/// The example of the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
