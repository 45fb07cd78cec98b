//! Renders tiktoken-rs's o200k vocabulary as the records of a `model.bin`.
//!
//! tiktoken-rs only hands it out as a ready encoder that takes 0.2 s (seconds, unoptimised) to build, so that is done
//! once, here.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

const NUM_TEXT_TOKENS: u32 = 199_998;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let o200k = tiktoken_rs::o200k_base()?;
    let mut records = Vec::new();
    for rank in 0..NUM_TEXT_TOKENS {
        let token = o200k.decode_bytes(&[rank])?;
        records.extend(u16::try_from(token.len())?.to_le_bytes());
        records.extend(token);
    }
    let folder = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    fs::write(Path::new(&folder).join("o200k.records"), records)?;
    fs::write(Path::new(&folder).join("o200k.regex"), tiktoken_rs::O200K_BASE_PAT_STR)?;
    Ok(())
}
