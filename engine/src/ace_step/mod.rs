//! ACE-Step v1: music from a prompt and lyrics.

pub mod dcae;
pub mod erg;
pub mod lyrics;
pub mod prompt;
pub mod transformer;
pub mod umt5;
pub mod verify;
pub mod vocoder;
