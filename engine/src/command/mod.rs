//! What the commands of this crate share on the command line.

pub mod interrupt;
mod styles;
mod values;

pub use styles::Styles;
pub use values::{Size, backends, floats};
