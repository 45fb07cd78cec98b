//! Operations that Burn does not have, each with an implementation for every GPU (CubeCL) and one for the processor
//! (native Rust). The plain-tensor reference of an operation stands in [`crate::nn`].

pub mod mxfp4;
pub mod product;
