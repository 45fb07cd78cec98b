//! Output files that appear whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tempfile::{Builder, NamedTempFile, TempPath};

use crate::{Error, Result};

/// Temporary files that exist now, for [`remove_pending`].
static PENDING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file that is written beside its target and takes the target's name when it is complete.
///
/// Dropped before [`Output::finish`], it is removed and the target stays as it was.
#[derive(Debug)]
pub struct Output {
    file: File,
    temporary: Option<TempPath>,
    target: PathBuf,
}

impl Output {
    /// Starts a file that will be `target`. Nothing is visible under that name until [`Output::finish`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the target is there and is not a regular file (a symbolic link is never followed),
    /// [`Error::Io`] where the folder cannot be written to.
    pub fn create(target: &Path) -> Result<Output> {
        if let Ok(metadata) = fs::symlink_metadata(target) && !metadata.is_file() {
            return Err(Error::Unsupported(format!(
                "{} is there and is not a regular file; name another output, or remove it",
                target.display()
            )));
        }
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = Builder::new();
        builder.prefix(".modelbin-").suffix(".partial");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask, as for any new file
        let (file, temporary) =
            builder.tempfile_in(folder).map(NamedTempFile::into_parts).map_err(Error::io(folder))?;
        with_pending(|pending| pending.push(temporary.to_path_buf()));
        Ok(Output { file, temporary: Some(temporary), target: target.to_path_buf() })
    }

    /// The file being written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Brings the bytes to disk and gives the file its name, replacing what was there.
    pub fn finish(mut self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.target))?;
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        let path = temporary.to_path_buf();
        let persisted = temporary.persist(&self.target);
        with_pending(|pending| pending.retain(|other| *other != path));
        persisted.map_err(|failure| Error::Io { path: self.target.clone(), source: failure.error })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let path = temporary.to_path_buf();
            with_pending(|pending| pending.retain(|other| *other != path));
        }
    }
}

/// Removes the temporary files of every unfinished [`Output`] of this process. For a program that is about to end
/// because of a signal, when nothing is dropped any more.
pub fn remove_pending() {
    with_pending(|pending| {
        for path in pending.drain(..) {
            // It may have been renamed or removed this instant; there is nobody left to tell.
            let _ = fs::remove_file(path);
        }
    });
}

fn with_pending(change: impl FnOnce(&mut Vec<PathBuf>)) {
    change(&mut PENDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}
