//! Runs GPT-OSS and ACE-Step on [Burn](https://burn.dev) from weights that `formats` has verified.
//!
//! # Architecture
//!
//! ```text
//!                 backend      a device, chosen at run time: processor, wgpu, CUDA
//!                    │
//!   kernels ───────► nn        building blocks of plain tensors: attention, caches, RoPE, MXFP4 layers, experts
//!        │           │
//!        ├─► extension   the operations for any program on Burn: mxfp4_linear, moe, sink_attention
//!        └─► gpu     │  native   runtimes of their own: GPUs, the processor
//!             └─────┐│┌──┘
//!   formats ───► gpt_oss       loading, the model, sessions, generation ◄─── sampling
//!                    │
//!                 harmony      conversations ⇄ tokens
//!                    │
//!             command gptoss   chat, parity, bench, selftest, …
//!
//!   formats ───► weights       tensors of a component by name and shape, for a model's one constructor
//!                    │
//!   nn, audio ─► ace_step      text, transformer, autoencoder, vocoder, the pipeline ◄─── diffusion
//!                    │
//!             command ace-step   generate, verify, shapes, plan, demo
//! ```
//!
//! | module | depends on |
//! |---|---|
//! | [`error`], [`backend`] | nothing |
//! | [`kernels`] | [`error`], `formats` for the decoding of MXFP4 on the processor |
//! | [`native`], [`gpu`] | `formats`, [`gpt_oss::Config`], [`kernels`] |
//! | [`nn`] | [`kernels`], [`backend`] |
//! | [`extension`] | [`nn`], [`kernels`] |
//! | [`gpt_oss`] | [`nn`], [`native`], [`gpu`], [`sampling`], `formats` |
//! | [`harmony`] | `formats` for the vocabulary, the crate `openai-harmony` |
//! | [`demo`], [`selftest`] | [`gpt_oss`], [`kernels`], and the files of `fixtures` that they embed |
//! | [`weights`], [`reference`](mod@reference) | `formats` for SafeTensors, [`backend`], [`nn`] |
//! | [`diffusion`], [`audio`] | [`error`], [`backend`], [`reference`](mod@reference) for files of noise |
//! | [`ace_step`] | [`weights`], [`nn`], [`diffusion`], [`audio`], [`kernels`] |
//!
//! What a model needs is decided once, from the header: [`gpt_oss::Residency`] says what will reside where and refuses
//! what cannot fit, [`gpt_oss::Model`] then loads exactly that. [`gpt_oss::Session`] is one sequence of tokens, and
//! [`harmony::Chat`] is what it says. [`ace_step`] says the same of music in its own words.

pub mod ace_step;
pub mod audio;
pub mod backend;
#[cfg(feature = "command")]
pub mod command;
pub mod demo;
pub mod diffusion;
pub mod error;
pub mod extension;
pub mod gpt_oss;
pub mod gpu;
pub mod harmony;
pub mod kernels;
pub mod native;
pub mod nn;
pub mod reference;
pub mod sampling;
pub mod selftest;
pub mod synthetic;
mod user_cache;
pub mod weights;

pub use error::{Error, Result};
