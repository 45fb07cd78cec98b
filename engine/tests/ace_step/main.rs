//! ACE-Step beside the original's fixtures, and what must hold without them.

mod audio;
mod command;
#[path = "../suite/devices.rs"]
mod devices;
mod diffusion;
mod fixture;
mod generate;
mod pipeline;
mod text;
mod transformer;
