//! The model and what it is made of, on every device that is there.

mod config;
mod devices;
mod extension;
mod generate;
mod gpu;
mod kernels;
mod native;
mod nn;
mod numerics;
mod sampling;
mod session;
mod trace;
