//! What a sequence has had so far.

use std::collections::HashMap;

/// The tokens of a sequence and how often each occurred.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    /// In order; whether the token was generated.
    tokens: Vec<(u32, bool)>,
    counts: HashMap<u32, Counts>,
    generated: usize,
}

/// How often a token occurred.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// In the prompt or generated.
    pub all: u32,
    /// Generated.
    pub generated: u32,
}

impl History {
    pub fn push(&mut self, token: u32, generated: bool) {
        self.tokens.push((token, generated));
        self.generated += usize::from(generated);
        let counts = self.counts.entry(token).or_default();
        counts.all += 1;
        counts.generated += u32::from(generated);
    }

    pub fn pop(&mut self) -> Option<u32> {
        let (token, generated) = self.tokens.pop()?;
        self.generated -= usize::from(generated);
        if let Some(counts) = self.counts.get_mut(&token) {
            counts.all -= 1;
            counts.generated -= u32::from(generated);
            if counts.all == 0 {
                self.counts.remove(&token);
            }
        }
        Some(token)
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Every token that occurred, in no order.
    pub fn counts(&self) -> impl Iterator<Item = (u32, Counts)> {
        self.counts.iter().map(|(&token, &counts)| (token, counts))
    }

    /// How often one token occurred.
    pub fn count(&self, token: u32) -> Counts {
        self.counts.get(&token).copied().unwrap_or_default()
    }
}
