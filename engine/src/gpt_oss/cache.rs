//! Keys and values of one sequence, in the form of the runtime that computes it.

use std::ops::Range;

use crate::backend::Float;
use crate::error::{Error, Result};
use crate::nn::cache::{self, KvCache};
use crate::{gpu, native};

/// Keys and values of one sequence. A clone is independent and shares what neither has changed.
#[derive(Clone, Debug)]
pub enum Cache {
    /// Of plain tensors.
    Plain(KvCache),
    /// Of the processor's own runtime.
    Native(native::Cache),
    /// Of the runtime of GPUs.
    Gpu(gpu::Cache),
}

/// What going back to a length of a cache takes.
#[derive(Clone, Debug)]
pub enum Snapshot {
    /// Rings, which forget.
    Plain(cache::Snapshot),
    /// Pages, which sequences own together.
    Native(native::Cache),
    /// Pages on a GPU.
    Gpu(gpu::Cache),
}

impl Cache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        match self {
            Cache::Plain(cache) => cache.len(),
            Cache::Native(cache) => cache.len(),
            Cache::Gpu(cache) => cache.len(),
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
            Cache::Gpu(cache) => cache.next(tokens),
        }
    }

    /// Keeps what going back to the present length takes.
    pub fn snapshot(&self) -> Snapshot {
        match self {
            Cache::Plain(cache) => Snapshot::Plain(cache.snapshot()),
            Cache::Native(cache) => Snapshot::Native(cache.clone()),
            Cache::Gpu(cache) => Snapshot::Gpu(cache.clone()),
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
            (Cache::Gpu(cache), Snapshot::Gpu(snapshot)) => cache.clone_from(snapshot),
            _ => return Err(Error::Cache),
        }
        Ok(())
    }

    pub(super) fn plain(&mut self) -> Result<&mut KvCache> {
        if let Cache::Plain(cache) = self { Ok(cache) } else { Err(Error::Cache) }
    }

    pub(super) fn native(&mut self) -> Result<&mut native::Cache> {
        if let Cache::Native(cache) = self { Ok(cache) } else { Err(Error::Cache) }
    }

    pub(super) fn gpu(&mut self) -> Result<&mut gpu::Cache> {
        if let Cache::Gpu(cache) = self { Ok(cache) } else { Err(Error::Cache) }
    }
}

impl Snapshot {
    /// Tokens in the cache when it was taken.
    pub fn len(&self) -> usize {
        match self {
            Snapshot::Plain(snapshot) => snapshot.len(),
            Snapshot::Native(cache) => cache.len(),
            Snapshot::Gpu(cache) => cache.len(),
        }
    }

    /// Whether it was taken of an empty cache.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The sizes of caches.
pub(super) enum CacheLayout {
    Plain(cache::CacheLayout),
    Native(native::CacheLayout),
    Gpu(gpu::CacheLayout),
}

impl CacheLayout {
    /// The type of keys and values.
    pub fn float(&self) -> Float {
        match self {
            CacheLayout::Plain(layout) => layout.float,
            CacheLayout::Native(layout) => layout.element,
            CacheLayout::Gpu(_) => Float::F16,
        }
    }

    /// Bytes of a cache of `tokens` tokens.
    pub fn bytes(&self, tokens: usize) -> u64 {
        match self {
            CacheLayout::Plain(layout) => layout.bytes(tokens),
            CacheLayout::Native(layout) => layout.bytes(tokens),
            CacheLayout::Gpu(layout) => layout.bytes(tokens),
        }
    }

    /// Bytes that a snapshot may come to cost.
    pub fn snapshot_bytes(&self) -> u64 {
        match self {
            CacheLayout::Plain(layout) => layout.snapshot_bytes(),
            CacheLayout::Native(layout) => layout.snapshot_bytes(),
            CacheLayout::Gpu(layout) => layout.snapshot_bytes(),
        }
    }

    /// Bytes of the largest buffer of a cache of `tokens` tokens.
    pub fn largest_buffer(&self, tokens: usize) -> u64 {
        match self {
            CacheLayout::Plain(layout) => layout.token() / 2 * tokens as u64,
            CacheLayout::Native(layout) => layout.page_bytes() as u64,
            CacheLayout::Gpu(layout) => layout.largest_buffer(tokens),
        }
    }

    /// Tokens, `context` at most, of the longest cache of at most so many bytes.
    pub fn longest(&self, context: usize, bytes: u64) -> usize {
        let (mut fits, mut exceeds) = (0, context + 1);
        while exceeds - fits > 1 {
            let middle = fits.midpoint(exceeds);
            if self.bytes(middle) <= bytes { fits = middle } else { exceeds = middle }
        }
        fits
    }
}
