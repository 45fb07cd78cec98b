//! GPT-OSS on the processor, in plain Rust and vector instructions, from weights as they lie in a mapped `model.bin`.
//!
//! ```text
//! simd     instructions of a level ──► fixed, dense, mxfp4, attention, rows    kernels
//! order    the orders in which kernels take their inputs
//! split    tiles of an output that several threads write
//! weights  pieces of a stored model, borrowed
//! cache    keys and values in shared pages
//! router   the choice of experts
//!                   all of it ──► model
//! ```
//!
//! A token reads every matrix that it meets once, so decoding is as fast as memory: nothing is copied or unpacked
//! beforehand, and the file is all that resides. A prefill reads a matrix once for hundreds of tokens and is as fast as
//! arithmetic. Sums, norms, softmax and the residual stream are f32.

mod attention;
mod cache;
mod dense;
mod fixed;
mod model;
mod mxfp4;
mod order;
mod router;
mod rows;
mod simd;
mod split;
mod weights;

pub use cache::{Cache, CacheLayout};
pub use model::{Model, Options, PREFILL, Path, Sequence, Trace};
pub use simd::Level;
