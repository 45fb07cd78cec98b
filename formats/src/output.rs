//! Output files and folders that appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tempfile::{Builder, NamedTempFile, TempDir, TempPath};

use crate::{Error, Result};

/// Temporary files and folders that exist now, for [`remove_pending`].
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
        if let Ok(metadata) = fs::symlink_metadata(target)
            && !metadata.is_file()
        {
            return Err(Error::Unsupported(format!(
                "{} is there and is not a regular file; name another output, or remove it",
                target.display()
            )));
        }
        let folder = parent(target);
        let (file, temporary) = builder(0o666)
            .tempfile_in(folder)
            .map(NamedTempFile::into_parts)
            .map_err(bare)
            .map_err(Error::io(folder))?;
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
        forget(&path);
        persisted.map_err(|failure| Error::Io { path: self.target.clone(), source: failure.error })
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            forget(temporary);
        }
    }
}

/// A folder that is filled beside its target and takes the target's name when it is complete.
#[derive(Debug)]
pub struct OutputFolder {
    temporary: TemporaryFolder,
    target: PathBuf,
}

impl OutputFolder {
    /// Starts a folder that will be `target`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the target is there and is anything but an empty folder: nothing is mixed with what
    /// was there or replaced.
    pub fn create(target: &Path) -> Result<OutputFolder> {
        let empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        if fs::symlink_metadata(target).is_ok_and(|metadata| !metadata.is_dir() || !empty(target)) {
            return Err(Error::Unsupported(format!(
                "{} is there and is not an empty folder; name another output, or remove it",
                target.display()
            )));
        }
        let temporary = TemporaryFolder::create_in(parent(target))?;
        Ok(OutputFolder { temporary, target: target.to_path_buf() })
    }

    /// Where to put the contents.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the folder its name.
    pub fn finish(mut self) -> Result<()> {
        // Renaming over an empty folder is an error on some systems.
        let _ = fs::remove_dir(&self.target);
        fs::rename(self.path(), &self.target).map_err(Error::io(&self.target))?;
        self.temporary.0.disable_cleanup(true);
        Ok(())
    }
}

/// A folder for files that nobody keeps. It goes when this is dropped, or with [`remove_pending`].
#[derive(Debug)]
pub struct TemporaryFolder(TempDir);

impl TemporaryFolder {
    /// An empty folder in another one.
    ///
    /// # Errors
    /// [`Error::Io`] where that cannot be written to.
    pub fn create_in(folder: &Path) -> Result<TemporaryFolder> {
        let temporary = builder(0o777).tempdir_in(folder).map_err(bare).map_err(Error::io(folder))?;
        with_pending(|pending| pending.push(temporary.path().to_path_buf()));
        Ok(TemporaryFolder(temporary))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        forget(self.path());
    }
}

/// An error of tempfile as the operating system gave it, without the temporary name in its text.
fn bare(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|inner| inner.source()?.downcast_ref::<io::Error>());
    inner.and_then(io::Error::raw_os_error).map_or(error, io::Error::from_raw_os_error)
}

/// Makes sure that a file holds this: writes it, with its folder, unless it does.
///
/// # Errors
/// As [`Output::create`] and [`Output::finish`].
pub fn provide(path: &Path, content: &[u8]) -> Result<()> {
    if holds(path, content).is_ok_and(|holds| holds) {
        return Ok(());
    }
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let output = Output::create(path)?;
    output.file().write_all(content).map_err(Error::io(path))?;
    output.finish()
}

/// Whether a file holds this and nothing else. The folder may be shared: nothing is read but a file of this length.
///
/// # Errors
/// Where the file cannot be read.
pub fn holds(path: &Path, content: &[u8]) -> io::Result<bool> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() != content.len() as u64 {
        return Ok(false);
    }
    let mut found = Vec::with_capacity(content.len());
    File::open(path)?.take(content.len() as u64).read_to_end(&mut found)?;
    Ok(found == content)
}

/// Removes the temporary files and folders of every unfinished output of this process. For a program that is about to
/// end because of a signal, when nothing is dropped any more.
pub fn remove_pending() {
    with_pending(|pending| {
        for path in pending.drain(..) {
            // It may have been renamed or removed this instant; there is nobody left to tell.
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    });
}

fn builder(mode: u32) -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(".modelbin-").suffix(".partial");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode)); // less the umask, as for anything new
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// The folder that a file is in.
pub(crate) fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn forget(path: &Path) {
    with_pending(|pending| pending.retain(|other| other != path));
}

fn with_pending(change: impl FnOnce(&mut Vec<PathBuf>)) {
    change(&mut PENDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
}
