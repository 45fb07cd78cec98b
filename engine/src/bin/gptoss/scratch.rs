//! A temporary folder that an interrupt removes, too.

use std::env;
use std::path::Path;
use std::process;

use anyhow::Result;
use formats::output::OutputFolder;

/// A folder for files that nobody keeps. It goes when this is dropped, or when an interrupt ends the process.
pub struct Scratch(OutputFolder);

impl Scratch {
    /// An empty folder among the system's temporary ones.
    pub fn new() -> Result<Scratch> {
        // Never finished, so that this name is never given.
        Ok(Scratch(OutputFolder::create(&env::temp_dir().join(format!("gptoss-{}", process::id())))?))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}
