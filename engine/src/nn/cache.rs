//! Keys and values of past tokens.
//!
//! A layer with full attention keeps all of them, in a buffer that doubles until the context is reached. A layer with
//! a sliding window keeps the last `window` only, in a ring: position `p` lies in slot `p mod window`.
//!
//! ```text
//! full layer   [ 0 1 2 3 4 5 6 7 8 . . . . . . . ]   len 9, capacity 16
//! window of 4  [ 8 5 6 7 ]                           the next token overwrites 5
//! ```
//!
//! Truncating a full layer is free, truncating a ring is impossible: what it overwrote is gone. So a
//! [`Snapshot`] keeps a copy of the rings at some length, and only there (or from there on) can a cache go back.
//! Tensors are shared until one of the owners writes, so snapshots and clones cost memory only then.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::linear::as_type;
use super::rows::concatenated;
use crate::backend::Float;
use crate::error::{Error, Result};

/// Tokens that the buffer of a full layer first has room for.
const FIRST_CAPACITY: usize = 256;

/// The sizes of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheLayout {
    /// Key heads, equally many value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The type in which keys and values are stored.
    pub float: Float,
    /// The largest number of tokens.
    pub context: usize,
    /// The window of each layer, `None` for full attention.
    pub windows: Vec<Option<usize>>,
}

impl CacheLayout {
    /// Bytes of keys and values of one token in one layer.
    pub(crate) fn token(&self) -> u64 {
        2 * (self.kv_heads * self.head_dim) as u64 * self.float.size()
    }

    /// Bytes of a cache of `tokens` tokens, room to grow not counted.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let slots = self.windows.iter().map(|window| window.unwrap_or(tokens) as u64);
        slots.sum::<u64>() * self.token()
    }

    /// Tokens of the longest cache of at most so many bytes.
    pub fn longest(&self, bytes: u64) -> usize {
        let growing = self.windows.iter().filter(|window| window.is_none()).count() as u64;
        let left = bytes.saturating_sub(self.snapshot_bytes());
        match growing * self.token() {
            0 => self.context,
            each => ((left / each) as usize).min(self.context),
        }
    }

    /// Bytes of the rings, which each snapshot holds once more.
    pub fn snapshot_bytes(&self) -> u64 {
        self.windows.iter().flatten().map(|&window| window as u64).sum::<u64>() * self.token()
    }
}

/// The caches of all layers for one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    layout: Arc<CacheLayout>,
    layers: Vec<Layer>,
    len: usize,
}

/// Keys and values, `[kv_heads, slots, head_dim]` each.
#[derive(Clone, Debug)]
struct Layer {
    keys: Tensor<3>,
    values: Tensor<3>,
}

/// The rings of a cache at some length.
#[derive(Clone, Debug)]
pub struct Snapshot {
    len: usize,
    rings: Vec<Layer>,
}

impl Snapshot {
    /// Tokens in the cache when it was taken.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it was taken of an empty cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl KvCache {
    /// An empty cache; the rings are allocated at once.
    pub fn new(layout: Arc<CacheLayout>, device: &Device) -> KvCache {
        let layers = layout.windows.iter().map(|window| {
            let slots = window.unwrap_or(FIRST_CAPACITY.min(layout.context));
            let zeros =
                || Tensor::zeros([layout.kv_heads, slots, layout.head_dim], (device, layout.float.into()));
            Layer { keys: zeros(), values: zeros() }
        });
        KvCache { layers: layers.collect(), layout, len: 0 }
    }

    /// The sizes.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The positions that `tokens` more tokens will have.
    ///
    /// # Errors
    /// [`Error::Length`] where there are none or they exceed the context.
    pub fn next(&self, tokens: usize) -> Result<Range<usize>> {
        let length = self.len + tokens;
        if tokens == 0 || length > self.layout.context {
            return Err(Error::Length { length, context: self.layout.context });
        }
        Ok(self.len..length)
    }

    /// Positions of the keys that [`KvCache::append`] returns for `tokens` new tokens in a layer with this window.
    pub fn key_positions(&self, window: Option<usize>, tokens: usize) -> Vec<usize> {
        let (start, end) = (self.len, self.len + tokens);
        match window {
            None => (0..end).collect(),
            // One token is written before the ring is read.
            Some(window) if tokens == 1 => ring_positions(end, window),
            Some(window) => ring_positions(start, window).into_iter().chain(start..end).collect(),
        }
    }

    /// Adds keys and values of new tokens to a layer, f32 `[kv_heads, tokens, head_dim]` each, and returns those that
    /// the tokens may attend to, f32 `[kv_heads, keys, head_dim]`, in the order of [`KvCache::key_positions`].
    /// [`KvCache::advance`] follows when all layers have been served.
    pub fn append(&mut self, layer: usize, keys: Tensor<3>, values: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let float = self.layout.float;
        let (keys, values) = (as_type(keys, float), as_type(values, float));
        let tokens = keys.dims()[1];
        let (start, end) = (self.len, self.len + tokens);
        let stored = &mut self.layers[layer];
        let (all_keys, all_values) = match self.layout.windows[layer] {
            None => {
                stored.reserve(end, self.layout.context);
                stored.write(start, 0..tokens, keys, values);
                stored.read(end)
            }
            Some(window) if tokens == 1 => {
                stored.write(start % window, 0..1, keys, values);
                stored.read(end.min(window))
            }
            Some(window) => {
                let past = stored.read(start.min(window));
                // Two writes where the new tokens pass the end of the ring.
                let kept = tokens.saturating_sub(window)..tokens;
                let slot = (start + kept.start) % window;
                let cut = (kept.start + window - slot).min(tokens);
                stored.write(slot, kept.start..cut, keys.clone(), values.clone());
                stored.write(0, cut..tokens, keys.clone(), values.clone());
                match start {
                    0 => (keys, values),
                    _ => (concatenated(vec![past.0, keys], 1), concatenated(vec![past.1, values], 1)),
                }
            }
        };
        (as_type(all_keys, Float::F32), as_type(all_values, Float::F32))
    }

    /// Counts the tokens whose keys and values were added.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Keeps what going back to the present length takes.
    pub fn snapshot(&self) -> Snapshot {
        let rings = self.layers.iter().zip(&self.layout.windows).filter(|(_, window)| window.is_some());
        Snapshot { len: self.len, rings: rings.map(|(layer, _)| layer.clone()).collect() }
    }

    /// Goes back to a snapshot of this cache, or of one that it was cloned from.
    pub fn restore(&mut self, snapshot: &Snapshot) {
        let windowed =
            self.layers.iter_mut().zip(&self.layout.windows).filter(|(_, window)| window.is_some());
        for ((layer, _), ring) in windowed.zip(&snapshot.rings) {
            *layer = ring.clone();
        }
        self.len = snapshot.len;
    }
}

/// Positions in the slots of a ring after `len` tokens, slot by slot, empty slots (they are the last) left out.
fn ring_positions(len: usize, window: usize) -> Vec<usize> {
    let Some(last) = len.checked_sub(1) else { return Vec::new() };
    (0..len.min(window)).map(|slot| last - (last + window - slot) % window).collect()
}

impl Layer {
    /// Makes room for `slots` slots by doubling, `limit` at most.
    fn reserve(&mut self, slots: usize, limit: usize) {
        let [heads, capacity, width] = self.keys.dims();
        if slots <= capacity {
            return;
        }
        let size = [heads, slots.next_power_of_two().min(limit), width];
        for tensor in [&mut self.keys, &mut self.values] {
            tensor.inplace(|old| {
                let room = Tensor::zeros(size, (&old.device(), old.dtype()));
                room.slice_assign([0..heads, 0..capacity, 0..width], old)
            });
        }
    }

    /// Writes some of the given tokens from slot `slot` on.
    fn write(&mut self, slot: usize, tokens: Range<usize>, keys: Tensor<3>, values: Tensor<3>) {
        if tokens.is_empty() {
            return;
        }
        let [heads, _, width] = self.keys.dims();
        let slots = [0..heads, slot..slot + tokens.len(), 0..width];
        for (stored, new) in [(&mut self.keys, keys), (&mut self.values, values)] {
            let new = new.narrow(1, tokens.start, tokens.len());
            stored.inplace(|stored| stored.slice_assign(slots.clone(), new));
        }
    }

    /// The first `slots` slots.
    fn read(&self, slots: usize) -> (Tensor<3>, Tensor<3>) {
        let part = |tensor: &Tensor<3>| match tensor.dims()[1] {
            capacity if capacity == slots => tensor.clone(),
            _ => tensor.clone().narrow(1, 0, slots.max(1)),
        };
        (part(&self.keys), part(&self.values))
    }
}
