//! Runs [`fuzz::checkpoint`].
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(init: fuzz::use_one_thread(), |data: &[u8]| fuzz::checkpoint(data));

#[cfg(not(fuzzing))]
fn main() {}
