//! Building blocks of transformers that Burn does not have in the form that these models need.
//!
//! Everything here is made of plain tensor operations, so it runs wherever Burn does and is the reference that kernels
//! are tested against. Shapes are written `[tokens, heads, head_dim]`; sums are in f32 whatever the weights are.

pub mod attention;
pub mod bias;
pub mod cache;
pub mod conv;
pub mod embedding;
pub mod frequencies;
pub mod hooks;
pub mod linear;
pub mod moe;
pub mod mxfp4;
pub mod norm;
pub mod rope;
pub(crate) mod rows;
pub mod swiglu;
