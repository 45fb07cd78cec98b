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

use std::ops::ControlFlow;

use burn::tensor::Tensor;

use super::cache::{Cache, Snapshot};
use super::model::{Model, Stream};
use crate::error::{Error, Result};
use crate::sampling::{Sampled, Sampler};

/// A sequence and its caches.
#[derive(Clone)]
pub struct Session<'m> {
    model: &'m Model,
    tokens: Vec<u32>,
    cache: Cache,
    /// What follows the last token.
    logits: Option<Tensor<1>>,
    marks: Vec<Mark>,
}

/// A length that can be gone back to.
#[derive(Clone)]
struct Mark {
    snapshot: Snapshot,
    /// What followed the last token then.
    logits: Option<Tensor<1>>,
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
        let marks = vec![Mark { snapshot: cache.snapshot(), logits: None }];
        Session { model, tokens: Vec::new(), cache, logits: None, marks }
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
        self.marks.iter().map(|mark| mark.snapshot.len())
    }

    /// Adds tokens; the logits that follow the last one, f32 `[vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Token`] and [`Error::Length`]; nothing has changed then. Where the device fails, the session has the tokens that
    /// were added before.
    pub fn advance(&mut self, tokens: &[u32]) -> Result<Tensor<1>> {
        let before = self.cache.len();
        let logits = self.model.prefill(&mut self.cache, tokens);
        let added = self.cache.len() - before;
        self.tokens.extend_from_slice(&tokens[..added]);
        if added > 0 {
            self.logits = logits.as_ref().ok().cloned();
        }
        logits
    }

    /// Adds a token, draws the next, shows it to `each`, adds it, and so on ([`Model::decode`]): up to `most` times or until
    /// `each` breaks. All but the last are in the session then.
    ///
    /// # Errors
    /// As [`Model::decode`]; the session has the tokens that were drawn before.
    pub fn decode(
        &mut self,
        sampler: &mut Sampler,
        token: u32,
        most: usize,
        each: &mut dyn FnMut(Sampled) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut next = token;
        let before = self.cache.len();
        let (tokens, cache) = (&mut self.tokens, &mut self.cache);
        let decoded =
            self.model.decode(&mut [Stream { cache: &mut *cache, token, sampler }], most, &mut |drawn| {
                drawn.into_iter().try_for_each(|sampled| {
                    tokens.push(std::mem::replace(&mut next, sampled.token));
                    each(sampled)
                })
            });
        // A token that was fed and after which none could be drawn.
        if cache.len() > tokens.len() {
            tokens.push(next);
        }
        if cache.len() > before {
            self.logits = None;
        }
        decoded
    }

    /// Makes the present length one that can be gone back to for free. Costs the memory of the rings, once they are
    /// written to again ([`crate::nn::cache::CacheLayout::snapshot_bytes`]), and of a row of logits.
    pub fn snapshot(&mut self) {
        if self.marks.last().is_none_or(|last| last.snapshot.len() < self.tokens.len()) {
            self.marks.push(Mark { snapshot: self.cache.snapshot(), logits: self.logits.clone() });
        }
    }

    /// Forgets all snapshots but that of the empty session and the last `count`, to save memory.
    pub fn keep_snapshots(&mut self, count: usize) {
        let end = self.marks.len().saturating_sub(count).max(1);
        self.marks.drain(1..end);
    }

    /// Goes back to the first `len` tokens, from the nearest earlier snapshot, from which on tokens are computed again.
    ///
    /// # Errors
    /// [`Error::Rollback`] where there are fewer tokens.
    pub fn rollback(&mut self, len: usize) -> Result<Rollback> {
        if len > self.tokens.len() {
            return Err(Error::Rollback { length: len, tokens: self.tokens.len() });
        }
        if len == self.tokens.len() {
            return Ok(Rollback { len, recomputed: 0 });
        }
        let known = self.tokens[..len].to_vec();
        self.return_to(len)?;
        let again = &known[self.tokens.len()..];
        if !again.is_empty() {
            self.advance(again)?;
        }
        Ok(Rollback { len, recomputed: again.len() })
    }

    /// Makes the session's tokens exactly `tokens`, keeping what it can: it goes back to the last snapshot within the
    /// common prefix and prefills from there.
    ///
    /// # Errors
    /// [`Error::Token`] and [`Error::Length`]; nothing has changed then.
    pub fn advance_to(&mut self, tokens: &[u32]) -> Result<Advance> {
        let advance = self.advance_to_while(tokens, &mut |_| Ok(ControlFlow::Continue(())))?;
        // It was never told to stop.
        advance.ok_or(Error::Length { length: tokens.len(), context: self.model.context() })
    }

    /// [`Session::advance_to`] that can be watched and ended: `watch` gets the number of tokens that there are before
    /// each chunk that is prefilled. Where it breaks, there is nothing to return, and the session has these tokens.
    ///
    /// # Errors
    /// As [`Session::advance_to`].
    pub fn advance_to_watched(
        &mut self,
        tokens: &[u32],
        watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Advance>> {
        let model = self.model;
        self.advance_to_while(tokens, &mut |len| {
            // Devices work behind the host's back: what was asked for before shall be done when this is watched.
            model.sync()?;
            Ok(watch(len))
        })
    }

    fn advance_to_while(
        &mut self,
        tokens: &[u32],
        goes_on: &mut dyn FnMut(usize) -> Result<ControlFlow<()>>,
    ) -> Result<Option<Advance>> {
        let context = self.model.context();
        if tokens.is_empty() || tokens.len() > context {
            return Err(Error::Length { length: tokens.len(), context });
        }
        self.model.config().check_tokens(tokens)?;
        let common = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        if common < self.tokens.len() {
            self.return_to(common)?;
        }
        if self.tokens.len() == tokens.len() {
            if let Some(logits) = self.logits.clone() {
                return Ok(Some(Advance { reused: tokens.len(), recomputed: 0, prefilled: 0, logits }));
            }
            // A prefill was ended here: the last token is computed once more, for its logits.
            self.return_to(tokens.len() - 1)?;
        }
        let reused = self.tokens.len();
        let known = common.min(tokens.len() - 1);
        self.logits = None;
        let logits = self.model.prefill_while(&mut self.cache, &tokens[reused..], goes_on);
        self.tokens.extend_from_slice(&tokens[reused..self.cache.len()]);
        self.logits = logits?;
        Ok(self.logits.clone().map(|logits| Advance {
            reused,
            recomputed: known - reused,
            prefilled: tokens.len() - known,
            logits,
        }))
    }

    /// A second session that shares everything so far; what either does afterwards is its own.
    pub fn fork(&self) -> Session<'m> {
        self.clone()
    }

    /// Restores the last snapshot of at most `len` tokens, its tokens and its logits, and forgets later ones.
    fn return_to(&mut self, len: usize) -> Result<()> {
        // The first snapshot, that of the empty session, is never dropped.
        let last = self.marks.iter().rposition(|mark| mark.snapshot.len() <= len).unwrap_or(0);
        self.marks.truncate(last + 1);
        let mark = &self.marks[last];
        self.cache.restore(&mark.snapshot)?;
        self.tokens.truncate(mark.snapshot.len());
        self.logits.clone_from(&mark.logits);
        Ok(())
    }
}
