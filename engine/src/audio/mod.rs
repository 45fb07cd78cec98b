//! Sound: files, sample rates, spectrograms.

pub mod mel;
pub mod resample;
pub mod wav;
