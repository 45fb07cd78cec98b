//! Keys and values of past tokens, in pages that sequences share.
//!
//! ```text
//! layer ── pages of 64 positions, the first of them dropped where a window has passed them
//! page  ── for each key head: keys [head_dim, 64], then values [64, head_dim padded to 16]
//! ```
//! Keys lie transposed, so that the scores of neighbouring positions are neighbours too. A clone shares all pages; whoever
//! writes to a shared page copies it first. So a clone is the snapshot that a sequence goes back to, and costs the pages
//! of windows and one more for each other layer at most.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::Float;
use crate::error::{Error, Result};
use crate::gpt_oss::config::Config;

/// Positions of a page.
pub const PAGE: usize = 64;

fn write(float: Float, value: f32, to: &mut [u8]) {
    match float {
        Float::F32 => to.copy_from_slice(&value.to_le_bytes()),
        Float::F16 => to.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Float::Bf16 => to.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// The sizes of a cache.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheLayout {
    /// Key heads, equally many value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The type in which keys and values are stored.
    pub element: Float,
    /// The largest number of tokens.
    pub context: usize,
    /// The window of each layer, `None` for full attention.
    pub windows: Vec<Option<usize>>,
}

impl CacheLayout {
    /// The layout for a model, for sequences of at most `context` tokens.
    pub fn of(config: &Config, element: Float, context: usize) -> CacheLayout {
        CacheLayout {
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            element,
            context,
            windows: (0..config.num_blocks).map(|block| config.window(block)).collect(),
        }
    }

    /// Width of a stored value head, a multiple of 16.
    pub fn value_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    fn key_bytes(&self) -> usize {
        self.head_dim * PAGE * self.element.size() as usize
    }

    fn head_bytes(&self) -> usize {
        self.key_bytes() + PAGE * self.value_dim() * self.element.size() as usize
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }

    /// Bytes of a cache of `tokens` tokens that shares nothing: [`Cache::bytes`], whole pages. While tokens are added,
    /// layers with a window hold their pages too.
    pub fn bytes(&self, tokens: usize) -> u64 {
        let pages =
            |window: &Option<usize>| (first_page(*window, tokens)..tokens.div_ceil(PAGE)).len() as u64;
        self.windows.iter().map(pages).sum::<u64>() * self.page_bytes() as u64
    }

    /// Tokens of the longest cache of at most so many bytes, layers with a window counted at their largest.
    pub fn longest(&self, bytes: u64) -> usize {
        let page = self.page_bytes() as u64;
        let bounded: u64 = self.windows.iter().flatten().map(|&window| self.window_pages(window)).sum();
        let growing = self.windows.iter().filter(|window| window.is_none()).count() as u64;
        match growing * page {
            0 => self.context,
            each => ((bytes.saturating_sub(bounded * page) / each) as usize)
                .saturating_mul(PAGE)
                .min(self.context),
        }
    }

    /// Bytes that a clone costs at most: of a layer with full attention the page that either writes to, of a layer with
    /// a window all pages, as the other drops them.
    pub fn snapshot_bytes(&self) -> u64 {
        let pages = self.windows.iter().map(|window| window.map_or(1, |window| self.window_pages(window)));
        pages.sum::<u64>() * self.page_bytes() as u64
    }

    /// The most pages of a layer with a window, when no token is being added.
    fn window_pages(&self, window: usize) -> u64 {
        // The next token sees `window − 1` stored ones, the first of which may be the last on its page.
        let pages = (window + PAGE - 3) / PAGE + 1;
        pages.min(self.context.div_ceil(PAGE)) as u64
    }
}

/// The first page that a token at `position` sees.
pub fn first_page(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window) / PAGE)
}

/// Keys and values of one sequence. Clones are cheap and independent.
#[derive(Clone, Debug)]
pub struct Cache {
    layout: Arc<CacheLayout>,
    layers: Vec<Layer>,
    len: usize,
}

#[derive(Clone, Debug, Default)]
struct Layer {
    /// The number of the first page that is kept.
    first: usize,
    pages: VecDeque<Arc<Page>>,
}

#[derive(Clone, Debug)]
struct Page(Box<[u8]>);

/// Keys and values of one head on one page.
#[derive(Clone, Copy)]
pub struct HeadPage<'a> {
    /// `[head_dim, PAGE]`.
    pub keys: &'a [u8],
    /// `[PAGE, value_dim]`.
    pub values: &'a [u8],
}

impl Cache {
    /// An empty cache.
    pub fn new(layout: Arc<CacheLayout>) -> Cache {
        let layers = layout.windows.iter().map(|_| Layer::default()).collect();
        Cache { layout, layers, len: 0 }
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

    /// Bytes of the pages that it refers to, shared ones included.
    pub fn bytes(&self) -> u64 {
        let pages: usize = self.layers.iter().map(|layer| layer.pages.len()).sum();
        (pages * self.layout.page_bytes()) as u64
    }

    /// The positions that `tokens` more tokens will have.
    ///
    /// # Errors
    /// [`Error::Length`] where there are none or they exceed the context.
    pub fn next(&self, tokens: usize) -> Result<Range<usize>> {
        let (length, context) = (self.len.saturating_add(tokens), self.layout.context);
        if tokens == 0 || length > context {
            return Err(Error::Length { length, context });
        }
        Ok(self.len..length)
    }

    /// Writes keys and values of a token at a position to a layer, f32 `[kv_heads, head_dim]` each. The position is at
    /// most one page further than what was written before. [`Cache::advance`] follows when all layers have been served.
    pub(super) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let (layout, stored) = (&*self.layout, &mut self.layers[layer]);
        let size = layout.element.size() as usize;
        let page = position / PAGE - stored.first;
        while stored.pages.len() <= page {
            stored.pages.push_back(Arc::new(Page(vec![0; layout.page_bytes()].into())));
        }
        let page = &mut Arc::make_mut(&mut stored.pages[page]).0;
        let slot = position % PAGE;
        let heads = keys.chunks_exact(layout.head_dim).zip(values.chunks_exact(layout.head_dim));
        for ((keys, values), head) in heads.zip(page.chunks_exact_mut(layout.head_bytes())) {
            let (stored_keys, stored_values) = head.split_at_mut(layout.key_bytes());
            for (key, column) in keys.iter().zip(stored_keys.chunks_exact_mut(PAGE * size)) {
                write(layout.element, *key, &mut column[slot * size..][..size]);
            }
            let row = &mut stored_values[slot * layout.value_dim() * size..];
            for (value, place) in values.iter().zip(row.chunks_exact_mut(size)) {
                write(layout.element, *value, place);
            }
        }
    }

    /// A head's part of a page that is kept.
    pub(super) fn page(&self, layer: usize, page: usize, head: usize) -> HeadPage<'_> {
        let stored = &self.layers[layer];
        let bytes = &stored.pages[page - stored.first].0[head * self.layout.head_bytes()..];
        let (keys, values) = bytes[..self.layout.head_bytes()].split_at(self.layout.key_bytes());
        HeadPage { keys, values }
    }

    /// Counts the tokens whose keys and values were written, and drops the pages that no later one sees.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        for (layer, window) in self.layers.iter_mut().zip(&self.layout.windows) {
            let first = first_page(*window, self.len);
            layer.pages.drain(..first.saturating_sub(layer.first).min(layer.pages.len()));
            layer.first = layer.first.max(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(element: Float) -> Arc<CacheLayout> {
        let windows = vec![Some(70), None];
        Arc::new(CacheLayout { kv_heads: 2, head_dim: 6, element, context: 1000, windows })
    }

    fn extend(cache: &mut Cache, tokens: usize, value: f32) {
        for position in cache.next(tokens).unwrap() {
            for layer in 0..2 {
                let keys: Vec<f32> = (0..12).map(|i| value + i as f32 + position as f32 / 256.0).collect();
                let values: Vec<f32> = keys.iter().map(|key| -key).collect();
                cache.write(layer, position, &keys, &values);
            }
        }
        cache.advance(tokens);
    }

    /// The value of component `dim` at a position, from keys and from values.
    fn read(cache: &Cache, layer: usize, position: usize, head: usize, dim: usize) -> [f32; 2] {
        let page = cache.page(layer, position / PAGE, head);
        let number = |bytes: &[u8], index: usize| match cache.layout.element {
            Float::F32 => f32::from_le_bytes(bytes[4 * index..][..4].try_into().unwrap()),
            Float::F16 => f16::from_le_bytes(bytes[2 * index..][..2].try_into().unwrap()).to_f32(),
            Float::Bf16 => bf16::from_le_bytes(bytes[2 * index..][..2].try_into().unwrap()).to_f32(),
        };
        let slot = position % PAGE;
        [number(page.keys, dim * PAGE + slot), number(page.values, slot * 16 + dim)]
    }

    #[test]
    fn what_was_written_is_read_in_every_type() {
        for (element, error) in [(Float::F32, 0.0), (Float::F16, 0.01), (Float::Bf16, 0.06)] {
            let mut cache = Cache::new(layout(element));
            extend(&mut cache, 100, 1.0);
            for (position, head, dim) in [(40, 0, 0), (99, 1, 5), (64, 1, 2)] {
                let truth = 1.0 + (head * 6 + dim) as f32 + position as f32 / 256.0;
                let [key, value] = read(&cache, 0, position, head, dim);
                assert!((key - truth).abs() <= error && (value + truth).abs() <= error, "{element:?}");
            }
        }
    }

    #[test]
    fn windows_drop_what_nobody_sees_any_more() {
        let mut cache = Cache::new(layout(Float::F16));
        for len in 1..=400usize {
            extend(&mut cache, 1, 0.0);
            assert_eq!(cache.layers[1].pages.len(), len.div_ceil(PAGE));
            // The next token sees itself and the 69 before it.
            let seen = (len + 1).saturating_sub(70);
            assert_eq!(cache.layers[0].first, seen / PAGE, "{len}");
            assert_eq!(cache.bytes(), cache.layout.bytes(len), "{len}");
        }
        assert!(cache.next(0).is_err() && cache.next(600).is_ok() && cache.next(601).is_err());
    }

    #[test]
    fn the_longest_cache_fits_and_hardly_a_longer_one() {
        let layout = layout(Float::F16);
        let page = layout.page_bytes() as u64;
        for bytes in (3 * page..16 * page).step_by(layout.page_bytes() / 4) {
            let tokens = layout.longest(bytes);
            assert!(layout.bytes(tokens) <= bytes && layout.bytes(tokens + PAGE + 1) > bytes, "{bytes}");
        }
        assert_eq!([0, u64::MAX].map(|bytes| layout.longest(bytes)), [0, layout.context]);
    }

    #[test]
    fn windows_are_counted_at_their_largest() {
        for (window, context) in [(1, 500), (2, 500), (65, 500), (66, 500), (67, 500), (128, 500), (128, 100)]
        {
            let layout =
                CacheLayout { context, windows: vec![Some(window)], ..(*layout(Float::F32)).clone() };
            let largest = (0..=context).map(|tokens| layout.bytes(tokens)).max();
            assert_eq!(Some(layout.snapshot_bytes()), largest, "{window} {context}");
            assert_eq!(layout.longest(0), context);
        }
    }

    #[test]
    fn snapshots_cost_what_the_other_has_dropped_or_copied() {
        let mut cache = Cache::new(layout(Float::F16));
        let snapshots: Vec<Cache> = std::iter::repeat_with(|| {
            extend(&mut cache, 1, 0.0);
            cache.clone()
        })
        .take(200)
        .collect();
        extend(&mut cache, 300, 0.0);
        let cost = |snapshot: &Cache| {
            let layers = snapshot.layers.iter().zip(&cache.layers);
            let own = layers.flat_map(|(snapshot, cache)| {
                snapshot
                    .pages
                    .iter()
                    .filter(|&page| !cache.pages.iter().any(|other| Arc::ptr_eq(page, other)))
            });
            (own.count() * cache.layout.page_bytes()) as u64
        };
        assert_eq!(snapshots.iter().map(cost).max(), Some(cache.layout.snapshot_bytes()));
    }

    #[test]
    fn clones_share_pages_until_one_is_written_to() {
        let mut cache = Cache::new(layout(Float::F32));
        extend(&mut cache, 90, 1.0);
        let snapshot = cache.clone();
        extend(&mut cache, 1, 2.0);
        assert!(Arc::ptr_eq(&cache.layers[1].pages[0], &snapshot.layers[1].pages[0]));
        assert!(!Arc::ptr_eq(&cache.layers[1].pages[1], &snapshot.layers[1].pages[1]));
        let mut fork = snapshot.clone();
        drop(snapshot);
        extend(&mut fork, 1, 3.0);
        assert_eq!([cache.len(), fork.len()], [91, 91]);
        let at = |cache| read(cache, 1, 90, 0, 0)[0].floor();
        assert_eq!([at(&cache), at(&fork)], [2.0, 3.0]);
    }
}
