//! The vocabulary file that openai-harmony reads, put where it looks before it looks.
//!
//! The crate has no way to take a vocabulary from memory. It reads `o200k_base.tiktoken` in the folder that
//! [`FOLDER_VARIABLE`] names or, without it, a file in a cache folder ([`CACHE_VARIABLE`], else one in the system's
//! temporary folder) whose name is the SHA-1 of a URL; if that file is missing or another, it downloads it. Here it
//! gets a URL that nothing can be downloaded from, and the file is written and compared before the crate runs.

use std::fs;
use std::path::{Path, PathBuf};

use formats::output;

use crate::user_cache;

use super::error::{Error, Result};

/// Names a folder that holds `o200k_base.tiktoken`. Where it is set, the file there has to be the right one.
pub const FOLDER_VARIABLE: &str = "TIKTOKEN_ENCODINGS_BASE";
/// Names the cache folder of openai-harmony. This module replaces what is stale there.
pub const CACHE_VARIABLE: &str = "TIKTOKEN_RS_CACHE_DIR";

/// The crate appends the file's name. The scheme does not exist, so that no HTTP client can follow it.
const BASE_URL: &str = "offline:/";
/// SHA-1 of `offline:/o200k_base.tiktoken` in hexadecimal.
const CACHED_NAME: &str = "87d8ab1b65317659e56fec899345038e48dfb11e";
const FILE_NAME: &str = "o200k_base.tiktoken";

/// A private cache folder for the vocabulary file: what a program may set in its environment at its start, before
/// there are threads. The name of the variable and its value.
///
/// Nobody has to: without it, the file goes to a folder that all users of the machine share, where one user may be in
/// the way of another. `None` if the user has set either variable, or no private folder can be made.
///
/// ```no_run
/// if let Some((name, value)) = engine::harmony::private_cache() {
///     // SAFETY: no other thread exists yet.
///     unsafe { std::env::set_var(name, value) };
/// }
/// ```
pub fn private_cache() -> Option<(&'static str, PathBuf)> {
    if [FOLDER_VARIABLE, CACHE_VARIABLE].iter().any(|name| std::env::var_os(name).is_some()) {
        return None;
    }
    let folder = user_cache::folder()?;
    fs::create_dir_all(&folder).ok()?;
    Some((CACHE_VARIABLE, folder))
}

/// Makes sure that openai-harmony will find `content` and will not use the network.
pub(super) fn provide(content: &[u8]) -> Result<()> {
    // Nothing else in a process has a reason to set it; if something did, the crate keeps that.
    openai_harmony::tiktoken_ext::set_tiktoken_base_url(BASE_URL);
    // The crate looks at these in the same order, and likewise ignores what is not Unicode.
    if let Ok(folder) = std::env::var(FOLDER_VARIABLE) {
        let path = Path::new(&folder).join(FILE_NAME);
        return match output::holds(&path, content) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::File {
                path,
                problem: format!(
                    "not the vocabulary o200k; remove the file, or unset {FOLDER_VARIABLE}, and it will be made"
                ),
            }),
            Err(_) if !folder.is_empty() => write(path, content),
            Err(source) => Err(Error::File {
                path,
                problem: format!("{source}; {FOLDER_VARIABLE} is empty: unset it or name a folder"),
            }),
        };
    }
    let folder = std::env::var(CACHE_VARIABLE)
        .map_or_else(|_| std::env::temp_dir().join("tiktoken-rs-cache"), PathBuf::from);
    write(folder.join(CACHED_NAME), content)
}

fn write(path: PathBuf, content: &[u8]) -> Result<()> {
    output::provide(&path, content).map_err(|error| Error::File {
        path,
        problem: format!("{error}; set {CACHE_VARIABLE} to a folder that you may write to"),
    })
}
