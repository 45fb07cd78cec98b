//! Where files go that can be made again.

use std::path::PathBuf;

/// This project's folder in the user's caches, by the custom of the system; not necessarily there yet. `None` where the
/// environment does not say whose user this is.
pub fn folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library/Caches"))
    } else {
        variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
    };
    Some(caches?.join("burn-extended"))
}
