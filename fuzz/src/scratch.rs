//! Files for what reads files only.

use std::path::Path;

use tempfile::TempDir;

/// A folder for this input, in memory where the system has such a place.
pub(crate) fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = tempfile::Builder::new();
    let folder = if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() };
    folder.expect("a folder for temporary files")
}
