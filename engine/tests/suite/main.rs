//! The model and what it is made of, on every device that is there.

mod config;
mod devices;
mod generate;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod gpu;
mod native;
mod nn;
mod numerics;
mod sampling;
mod session;
mod trace;
