//! Operations that Burn does not have. The plain-tensor reference of an operation stands in [`crate::nn`].
//!
//! | file | for | operation |
//! |---|---|---|
//! | [`mxfp4`], [`product`] | Burn's tensors, every backend | MXFP4 experts, f32 products |
//! | [`embedding`], [`qkv`], [`attention`], [`linear`], [`router`], [`gate_up`], [`down`], [`argmax`] | a token of each sequence | a step of decoding, in this order |
//! | [`normalise`], [`matmul`], [`rotate`], [`prefill_attention`], [`expert_logits`], [`dispatch`], [`grouped`] | many tokens of a sequence | a chunk of a prefill, in this order |
//! | [`copy`] | both | |
//!
//! What they share: `group` sums a row with a plane or in shared memory, `dense` and `mxfp4_dot` are products with one row,
//! `tile` with many by the [`method`] of the device.

#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod argmax;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod attention;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod copy;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod dense;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod dispatch;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod down;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod embedding;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod expert_logits;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod gate_up;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod group;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod grouped;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod linear;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod matmul;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod method;
pub mod mxfp4;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod mxfp4_dot;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod normalise;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod prefill_attention;
pub mod product;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod qkv;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod rotate;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod router;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod tile;
