//! Operations that Burn does not have. The plain-tensor reference of an operation stands in [`crate::nn`].
//!
//! | file | for | operation |
//! |---|---|---|
//! | [`mxfp4`], [`product`] | Burn's tensors, every backend | MXFP4 experts, f32 products |
//! | [`depthwise_glu`] | the same | the middle of ACE-Step's feed-forward layers |
//! | [`embedding`], [`qkv`], [`attention`], [`linear`], [`router`], [`gate_up`], [`down`], [`sample`] | a token of each sequence | a step of decoding, in this order |
//! | [`normalise`], [`matmul`], [`rotate`], [`prefill_attention`], [`expert_logits`], [`dispatch`], [`grouped`] | many tokens of a sequence | a chunk of a prefill, in this order; a step for several sequences has [`attention`] and [`router`] instead |
//! | [`mxfp4_linear`], [`pages`], [`rows`] | Burn's tensors, with the kernels above | what [`crate::extension`] needs besides |
//! | [`copy`] | both | |
//!
//! Each file ends with the definition of its operation in float64 and a [`check`] against it.
//!
//! What they share: `group` sums a row with a plane or in shared memory, `dense` and `mxfp4_dot` are products with one row,
//! `tile` with many by the [`method`] of the device, `few` those for which tensor cores are kept waiting by the weights.

pub mod attention;
pub mod check;
pub mod copy;
mod dense;
pub mod depthwise_glu;
pub mod dispatch;
pub mod down;
pub mod embedding;
pub mod expert_logits;
mod exponential;
mod few;
pub mod gate_up;
pub mod group;
pub mod grouped;
pub mod linear;
pub mod matmul;
pub mod method;
pub mod mxfp4;
pub mod mxfp4_dot;
pub mod mxfp4_linear;
pub mod normalise;
pub mod pages;
pub mod prefill_attention;
pub mod product;
pub mod qkv;
pub mod rotate;
pub mod router;
pub mod rows;
pub mod sample;
mod tile;
