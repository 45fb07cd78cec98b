//! One sequence of tokens: growing, going back, forking.
//!
//! A chat drops the analysis of finished turns, so the tokens of the next prompt agree with those in the cache only up
//! to the last prompt's end. A session keeps a snapshot there, goes back to it and prefills what is new:
//!
//! ```text
//! turn 1   [ prompt 1 | analysis 1  final 1 ]
//!                     ▲ snapshot
//! turn 2   [ prompt 1 | final 1  user 2 | …        only "final 1  user 2" is prefilled
//!                                       ▲ snapshot
//! ```

use burn::tensor::Tensor;

use super::model::Model;
use crate::error::{Error, Result};
use crate::nn::cache::{KvCache, Snapshot};

/// A sequence and its caches.
#[derive(Clone)]
pub struct Session<'m> {
    model: &'m Model,
    tokens: Vec<u32>,
    cache: KvCache,
    snapshots: Vec<Snapshot>,
}

/// What [`Session::advance_to`] did.
#[derive(Debug)]
pub struct Advance {
    /// Tokens whose keys and values were still there.
    pub reused: usize,
    /// Tokens that were known but had to be computed again, because no snapshot was near.
    pub recomputed: usize,
    /// Tokens that are new.
    pub prefilled: usize,
    /// Logits after the last token, f32 `[vocabulary]`.
    pub logits: Tensor<1>,
}

/// What [`Session::rollback`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollback {
    /// The length now.
    pub len: usize,
    /// Tokens that were computed again, from the nearest earlier snapshot on.
    pub recomputed: usize,
}

impl<'m> Session<'m> {
    /// An empty session.
    pub fn new(model: &'m Model) -> Session<'m> {
        let cache = model.new_cache();
        let snapshots = vec![cache.snapshot()];
        Session { model, tokens: Vec::new(), cache, snapshots }
    }

    /// The model that it runs on.
    pub fn model(&self) -> &'m Model {
        self.model
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that there is still room for.
    pub fn room(&self) -> usize {
        self.model.context() - self.tokens.len()
    }

    /// Lengths that can be gone back to without computing anything again, ascending.
    pub fn snapshots(&self) -> impl Iterator<Item = usize> {
        self.snapshots.iter().map(Snapshot::len)
    }

    /// Adds tokens; the logits that follow the last one, f32 `[vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Token`] and [`Error::Length`]; nothing has changed then.
    pub fn advance(&mut self, tokens: &[u32]) -> Result<Tensor<1>> {
        let logits = self.model.prefill(&mut self.cache, tokens)?;
        self.tokens.extend_from_slice(tokens);
        Ok(logits)
    }

    /// Makes the present length one that can be gone back to for free. Costs the memory of the rings, once they are
    /// written to again ([`crate::nn::cache::CacheLayout::snapshot_bytes`]).
    pub fn snapshot(&mut self) {
        if self.snapshots.last().is_none_or(|last| last.len() < self.tokens.len()) {
            self.snapshots.push(self.cache.snapshot());
        }
    }

    /// Forgets all snapshots but that of the empty session and the last one, to save memory.
    pub fn drop_old_snapshots(&mut self) {
        let end = self.snapshots.len().saturating_sub(1).max(1);
        self.snapshots.drain(1..end);
    }

    /// Goes back to the first `len` tokens, from the nearest earlier snapshot, from which on tokens are computed again.
    ///
    /// # Errors
    /// [`Error::Length`] where there are fewer tokens.
    pub fn rollback(&mut self, len: usize) -> Result<Rollback> {
        if len > self.tokens.len() {
            return Err(Error::Length { length: len, context: self.tokens.len() });
        }
        if len == self.tokens.len() {
            return Ok(Rollback { len, recomputed: 0 });
        }
        let from = self.return_to(len);
        let again = self.tokens[from..len].to_vec();
        self.tokens.truncate(from);
        if !again.is_empty() {
            self.advance(&again)?;
        }
        Ok(Rollback { len, recomputed: again.len() })
    }

    /// Makes the session's tokens exactly `tokens`, keeping what it can: it goes back to the last snapshot within the
    /// common prefix and prefills from there. At least the last token is computed, for its logits.
    ///
    /// # Errors
    /// [`Error::Token`] and [`Error::Length`]; nothing has changed then.
    pub fn advance_to(&mut self, tokens: &[u32]) -> Result<Advance> {
        let context = self.model.context();
        if tokens.is_empty() || tokens.len() > context {
            return Err(Error::Length { length: tokens.len(), context });
        }
        self.model.check_tokens(tokens)?;
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let known = common.min(tokens.len() - 1);
        let reused = if known == self.tokens.len() { known } else { self.return_to(known) };
        self.tokens.truncate(reused);
        let logits = self.advance(&tokens[reused..])?;
        let recomputed = known - reused;
        Ok(Advance { reused, recomputed, prefilled: tokens.len() - known, logits })
    }

    /// A second session that shares everything so far; what either does afterwards is its own.
    pub fn fork(&self) -> Session<'m> {
        self.clone()
    }

    /// Restores the last snapshot of at most `len` tokens, forgets later ones and returns its length. The tokens are
    /// left to the caller.
    fn return_to(&mut self, len: usize) -> usize {
        // The first snapshot, that of the empty session, is never dropped.
        let last = self.snapshots.iter().rposition(|snapshot| snapshot.len() <= len).unwrap_or(0);
        self.snapshots.truncate(last + 1);
        let snapshot = &self.snapshots[last];
        self.cache.restore(snapshot);
        snapshot.len()
    }
}
