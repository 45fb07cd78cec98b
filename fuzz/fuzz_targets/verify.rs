//! Runs [`fuzz::verify`].
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(init: fuzz::use_one_thread(), |data: &[u8]| fuzz::verify(data));

#[cfg(not(fuzzing))]
fn main() {}
