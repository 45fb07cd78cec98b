//! The `model.bin` format: description, reader, verifier and writer.

pub mod dump;
pub mod header;
pub mod layout;
pub mod model;
pub mod qkv;
pub mod section;
pub mod stored;
pub mod tensors;
pub mod verify;
pub mod write;

pub use model::Verified;
pub use stored::{Stored, StoredOptions};
pub use verify::{Depth, Report};
