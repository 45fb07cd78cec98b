//! Who owns which page of the device's caches.
//!
//! Keys and values of all sequences live in two pools: one of the layers that see everything, one of those with a window. A page
//! holds [`PAGE`] positions in every layer of its pool. Sequences own pages together: a snapshot or a fork counts the same pages
//! once more, and who writes to a page that others own copies it before ([`Cache::reserve`]).
//!
//! ```text
//! sequence, 150 tokens, window of 128      full      [ 7 | 2 | 9 ]        pages of positions 0.., 64.., 128..
//!                                          windowed  [ 4 | 1 | 3 ]        the first is given back at 192 tokens
//! ```

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;

use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;
use crate::kernels::qkv::PAGE;

use super::CHUNK;

/// Pages that the pools first have.
pub(super) const FIRST_PAGES: u32 = 16;

/// The pages of a pool that nobody owns.
#[derive(Debug, Default)]
struct Free {
    pages: Vec<u32>,
    capacity: u32,
}

/// Hands out pages.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool {
    free: Arc<Mutex<Free>>,
}

impl Pool {
    /// Pages, owned or not.
    pub fn capacity(&self) -> u32 {
        self.lock().capacity
    }

    /// Adds pages up to `capacity`.
    pub fn grow(&self, capacity: u32) {
        let mut free = self.lock();
        let more = (free.capacity..capacity).rev();
        free.pages.splice(0..0, more);
        free.capacity = free.capacity.max(capacity);
    }

    /// A page that nobody owned, or `None` where there is none.
    pub fn take(&self) -> Option<Arc<Page>> {
        let number = self.lock().pages.pop()?;
        Some(Arc::new(Page { number, free: self.free.clone() }))
    }

    /// Pages that nobody owns.
    pub fn available(&self) -> usize {
        self.lock().pages.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page, which goes back to its pool with its last owner.
#[derive(Debug)]
pub(super) struct Page {
    pub number: u32,
    free: Arc<Mutex<Free>>,
}

impl Drop for Page {
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pages.push(self.number);
    }
}

/// Keys and values of one sequence. A clone is a snapshot: it costs nothing until one of the two goes on.
#[derive(Clone, Debug)]
pub struct Cache {
    /// The pool of full pages, by which the model is known.
    pool: Pool,
    pub(super) full: Pages,
    pub(super) windowed: Pages,
    len: usize,
    context: usize,
}

/// The pages of a sequence in one pool, from the page of the oldest position that can still be seen.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    /// Which page of the sequence the first one is.
    first: usize,
    pages: VecDeque<Arc<Page>>,
    window: Option<usize>,
}

/// A page that must be copied before it is written to.
pub(super) struct Copy {
    pub from: Arc<Page>,
    pub to: Arc<Page>,
}

impl Cache {
    pub(super) fn new(pool: Pool, window: usize, context: usize) -> Cache {
        let pages = |window| Pages { first: 0, pages: VecDeque::new(), window };
        Cache { pool, full: pages(None), windowed: pages(Some(window)), len: 0, context }
    }

    /// Refuses a cache whose pages are not those of a pool: it is another model's.
    ///
    /// # Errors
    /// [`Error::Cache`].
    pub(super) fn check_owner(&self, pool: &Pool) -> Result<()> {
        if Arc::ptr_eq(&self.pool.free, &pool.free) { Ok(()) } else { Err(Error::Cache) }
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
        let end = self.len.saturating_add(tokens);
        if tokens == 0 || end > self.context {
            return Err(Error::Length { length: end, context: self.context });
        }
        Ok(self.len..end)
    }

    /// Counts tokens whose keys and values were written.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        for pages in [&mut self.full, &mut self.windowed] {
            pages.drop_unseen(self.len);
        }
    }
}

impl Pages {
    /// Pages that [`Pages::reserve`] would take.
    pub fn missing(&self, len: usize, tokens: usize) -> usize {
        let end = (len + tokens).div_ceil(PAGE);
        end.saturating_sub(self.first + self.pages.len()) + usize::from(self.shares_last(len))
    }

    /// Gives back pages after those of `len` tokens that others own as well: made for a token that was not kept.
    pub fn drop_unused(&mut self, len: usize) {
        let used = len.div_ceil(PAGE).saturating_sub(self.first);
        while self.pages.len() > used && self.pages.back().is_some_and(|last| Arc::strong_count(last) > 1) {
            self.pages.pop_back();
        }
    }

    /// Makes room for `tokens` more tokens after `len`; `None` where the pool has too few pages, and nothing has changed then.
    /// What is returned must be copied before anything is written.
    pub fn reserve(&mut self, pool: &Pool, len: usize, tokens: usize) -> Option<Option<Copy>> {
        let mut taken: Vec<Arc<Page>> =
            (0..self.missing(len, tokens)).map(|_| pool.take()).collect::<Option<_>>()?;
        let copy = match self.pages.back_mut() {
            Some(last) if !len.is_multiple_of(PAGE) && Arc::strong_count(last) > 1 => {
                taken.pop().map(|page| {
                    let from = std::mem::replace(last, page);
                    Copy { from, to: last.clone() }
                })
            }
            _ => None,
        };
        self.pages.extend(taken);
        Some(copy)
    }

    /// Whether the page of the next position is owned by others as well.
    fn shares_last(&self, len: usize) -> bool {
        !len.is_multiple_of(PAGE) && self.pages.back().is_some_and(|last| Arc::strong_count(last) > 1)
    }

    /// Page numbers as kernels look them up: page `n` of the sequence at `n mod table`.
    pub fn table(&self, table: usize) -> Vec<u32> {
        let mut numbers = vec![0; table];
        for (n, page) in self.pages.iter().enumerate() {
            numbers[(self.first + n) % table] = page.number;
        }
        numbers
    }

    fn drop_unseen(&mut self, len: usize) {
        let Some(window) = self.window else { return };
        // The next token sees the `window − 1` positions before its own.
        let oldest = (len + 1).saturating_sub(window);
        while (self.first + 1) * PAGE <= oldest && self.pages.pop_front().is_some() {
            self.first += 1;
        }
    }
}

/// The sizes of the pools.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheLayout {
    /// Bytes of a page's keys, or of its values.
    page_bytes: u64,
    /// Layers that see everything, and those with a window.
    layers: [u64; 2],
    window: usize,
}

impl CacheLayout {
    /// The pools of a model.
    pub fn of(config: &Config) -> CacheLayout {
        let windowed = (0..config.num_blocks).filter(|&block| config.window(block).is_some()).count();
        CacheLayout {
            page_bytes: (elements_of_page(config) * size_of::<f16>()) as u64,
            layers: [(config.num_blocks - windowed) as u64, windowed as u64],
            window: config.attention_window,
        }
    }

    /// Bytes of pools for one sequence of `tokens` tokens: pools double, and while they do, what they were is there too. Layers with
    /// a window hold a chunk of a prefill beside it.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let held = [tokens, tokens.min(self.window + CHUNK + PAGE)];
        let pages = held.map(|tokens| match capacity(tokens) {
            all if all > u64::from(FIRST_PAGES) => all + all / 2,
            all => all,
        });
        let pools = self.layers.into_iter().zip(pages);
        pools.map(|(layers, pages)| layers * pages * 2 * self.page_bytes).sum()
    }

    /// Bytes that a snapshot may come to cost: the pages of the windows and the last of each other layer.
    pub fn snapshot_bytes(&self) -> u64 {
        let windowed = self.window.div_ceil(PAGE) as u64 + 1;
        (self.layers[0] + self.layers[1] * windowed) * 2 * self.page_bytes
    }

    /// Bytes of the keys of a layer.
    pub fn largest_buffer(&self, tokens: usize) -> u64 {
        capacity(tokens) * self.page_bytes
    }
}

/// Elements of a page's keys.
pub(super) fn elements_of_page(config: &Config) -> usize {
    config.num_kv_heads * PAGE * config.head_dim
}

fn capacity(tokens: usize) -> u64 {
    u64::from(FIRST_PAGES).max(tokens.div_ceil(PAGE) as u64).next_power_of_two()
}
