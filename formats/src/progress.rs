//! How long work tells how far it is.

/// Receives the progress of an operation. `()` ignores it.
pub trait Progress: Sync {
    /// A step begins that will move `total` bytes.
    fn begin(&self, step: &str, total: u64);

    /// `bytes` more of the current step are done.
    fn advance(&self, bytes: u64);
}

impl Progress for () {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
}
