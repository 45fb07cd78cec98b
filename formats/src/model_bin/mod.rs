//! The `model.bin` format: description, reader, verifier and writer.

pub mod header;
pub mod layout;
pub mod section;
pub mod tensors;
