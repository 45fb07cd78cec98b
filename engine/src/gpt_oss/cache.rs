//! Keys and values of one sequence, in the form of the runtime that computes it.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::native;
use crate::nn::cache::{self, KvCache};

/// Keys and values of one sequence. A clone is independent and shares what neither has changed.
#[derive(Clone, Debug)]
pub enum Cache {
    /// Of plain tensors.
    Plain(KvCache),
    /// Of the processor's own runtime.
    Native(native::Cache),
}

/// What going back to a length of a cache takes.
#[derive(Clone, Debug)]
pub enum Snapshot {
    /// Rings, which forget.
    Plain(cache::Snapshot),
    /// Pages, which sequences own together.
    Native(native::Cache),
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        match self {
            Cache::Plain(cache) => cache.len(),
            Cache::Native(cache) => cache.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The positions that `tokens` more tokens will have.
    ///
    /// # Errors
    /// [`Error::Length`] where there are none or they exceed the context.
    pub fn next(&self, tokens: usize) -> Result<Range<usize>> {
        match self {
            Cache::Plain(cache) => cache.next(tokens),
            Cache::Native(cache) => cache.next(tokens),
        }
    }

    /// Keeps what going back to the present length takes.
    pub fn snapshot(&self) -> Snapshot {
        match self {
            Cache::Plain(cache) => Snapshot::Plain(cache.snapshot()),
            Cache::Native(cache) => Snapshot::Native(cache.clone()),
        }
    }

    /// Goes back to a snapshot of this cache, or of one that it was cloned from.
    ///
    /// # Errors
    /// [`Error::Cache`] for a snapshot of another runtime.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        match (self, snapshot) {
            (Cache::Plain(cache), Snapshot::Plain(snapshot)) => cache.restore(snapshot),
            (Cache::Native(cache), Snapshot::Native(snapshot)) => cache.clone_from(snapshot),
            _ => return Err(Error::Cache),
        }
        Ok(())
    }

    pub(super) fn plain(&mut self) -> Result<&mut KvCache> {
        match self {
            Cache::Plain(cache) => Ok(cache),
            Cache::Native(_) => Err(Error::Cache),
        }
    }

    pub(super) fn native(&mut self) -> Result<&mut native::Cache> {
        match self {
            Cache::Native(cache) => Ok(cache),
            Cache::Plain(_) => Err(Error::Cache),
        }
    }
}

impl Snapshot {
    /// Tokens in the cache when it was taken.
    pub fn len(&self) -> usize {
        match self {
            Snapshot::Plain(snapshot) => snapshot.len(),
            Snapshot::Native(cache) => cache.len(),
        }
    }

    /// Whether it was taken of an empty cache.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
