//! From ranks to merges.
//!
//! A `model.bin` has tiktoken's ranks, llama.cpp wants GPT-2's list of merges. BPE over the ranks below a token's own
//! joins its bytes to two parts, and joining those is the token's merge. Listed by rank the merges give the same
//! encoding: joins never cross the border of a token that comes about later, so inside it they happen as if it stood
//! alone.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rayon::prelude::*;

/// For each token, by rank, the length of the left part of its merge. `None` for a single byte, and for a token that
/// BPE cannot form: tiktoken finds such a token only where it is a whole piece of text, merges not at all.
pub(super) fn merges(tokens: &[&[u8]], ranks: &HashMap<&[u8], u32>) -> Vec<Option<usize>> {
    tokens
        .par_iter()
        .enumerate()
        .map_init(Parts::default, |parts, (rank, token)| parts.last_join(token, rank, ranks))
        .collect()
}

/// The parts that a token's bytes are joined to. Kept from token to token to save allocations.
#[derive(Default)]
struct Parts {
    /// End of the part that starts here; 0 where none does.
    ends: Vec<usize>,
    /// Start of the part before the one that starts here.
    previous: Vec<usize>,
    /// Rank, start and end of two neighbours that are a token together, lowest rank and leftmost first. Some are out
    /// of date: one of the two has been joined to another since.
    pairs: BinaryHeap<Reverse<(u32, usize, usize)>>,
}

impl Parts {
    fn last_join(&mut self, token: &[u8], rank: usize, ranks: &HashMap<&[u8], u32>) -> Option<usize> {
        self.ends.clear();
        self.ends.extend(1..=token.len());
        self.previous.clear();
        self.previous.extend((0..=token.len()).map(|start| start.saturating_sub(1)));
        self.pairs.clear();
        let pair = |start: usize, end: usize| {
            let pair = *ranks.get(token.get(start..end)?)?;
            ((pair as usize) < rank).then_some(Reverse((pair, start, end)))
        };
        self.pairs.extend((0..token.len()).filter_map(|start| pair(start, start + 2)));
        let mut count = token.len();
        while let Some(Reverse((_, start, end))) = self.pairs.pop() {
            let middle = self.end(start);
            if middle == 0 || self.end(middle) != end {
                continue;
            }
            set(&mut self.ends, start, end);
            set(&mut self.ends, middle, 0);
            set(&mut self.previous, end, start);
            count -= 1;
            if start > 0 {
                let before = self.previous.get(start).copied().unwrap_or(0);
                self.pairs.extend(pair(before, end));
            }
            if end < token.len() {
                self.pairs.extend(pair(start, self.end(end)));
            }
        }
        (count == 2).then(|| self.end(0))
    }

    fn end(&self, start: usize) -> usize {
        self.ends.get(start).copied().unwrap_or(0)
    }
}

fn set(positions: &mut [usize], at: usize, value: usize) {
    if let Some(position) = positions.get_mut(at) {
        *position = value;
    }
}
