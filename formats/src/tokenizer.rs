//! Byte-pair encoding with the tokens and the regex of a vocabulary, as tiktoken does it.
//!
//! The regex splits the text into pieces. A piece that is a token becomes that token; any other starts as single
//! bytes, of which the two neighbours that together form the token of lowest rank merge (the leftmost such pair among
//! equals), until no two neighbours form a token.
//!
//! # Bounds
//! A vocabulary is input like any other. Merging a piece of n bytes takes O(n log n) time and O(n) memory, with at
//! most 3n look-ups of byte strings no longer than the longest token. Patterns are limited in size before and after
//! compilation. A search for a piece may take [`MAX_BACKTRACKS`] steps back, each of which looks at the rest of the text
//! once at most. No regex engine bounds the time of finding *all* matches better than by the square of the text's
//! length, so there is a limit to the time, too: [`SPLIT_TIME`] and [`SPLIT_TIME_PER_BYTE`]. It does not apply to
//! o200k's pattern, which takes time proportional to the text.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use fancy_regex::{Regex, RegexBuilder};
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::model_bin::tensors::MAX_TOKENS;
use crate::vocabulary::{O200K_REGEX, Overrun, Vocabulary};

/// Longest pattern in bytes; o200k's has 274.
pub const MAX_PATTERN: usize = 2048;
/// Steps back that the search for one piece may take; o200k's pattern needs a handful.
pub const MAX_BACKTRACKS: usize = 1_000;
/// Time that splitting a text may take, beside [`SPLIT_TIME_PER_BYTE`].
pub const SPLIT_TIME: Duration = Duration::from_secs(1);
/// Time that splitting a text may take for each of its bytes, beside [`SPLIT_TIME`].
pub const SPLIT_TIME_PER_BYTE: Duration = Duration::from_micros(10);

/// Bytes of one compiled part of a pattern. A pattern has at most [`MAX_PATTERN`] parts and needs a dozen bytes for
/// one of this size.
const MAX_COMPILED_PART: usize = 2 << 20;
/// Instructions of a compiled pattern.
const MAX_PROGRAM: usize = 1 << 16;

/// Why there is no tokenizer for a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyError {
    /// A token record is cut off.
    #[error(transparent)]
    Overrun(#[from] Overrun),
    /// The records are not as many as the vocabulary says.
    #[error("found {found} token records, needed {needed}")]
    Count {
        /// Records.
        found: usize,
        /// What the vocabulary says.
        needed: u32,
    },
    /// More tokens than the format allows.
    #[error("found {0} tokens, needed 2^24 at most")]
    TooMany(u64),
    /// The pattern is longer than [`MAX_PATTERN`].
    #[error("found a regex of {0} bytes, needed {MAX_PATTERN} at most")]
    PatternLength(usize),
    /// The pattern cannot be compiled, or not within the limits.
    #[error("the regex does not compile: {0}")]
    Pattern(String),
}

/// Why a text could not be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The regex gave up.
    #[error("the regex finds no piece from byte {at} of the text on: {reason}")]
    Search {
        /// Bytes of the text before it.
        at: usize,
        /// What the regex engine says.
        reason: String,
    },
    /// The regex takes too long.
    #[error("the regex had split {at} bytes of the text when its time was up")]
    Time {
        /// Bytes of the text that had been split.
        at: usize,
    },
    /// The piece that should start here starts elsewhere or nowhere, so that a part of the text belongs to no piece.
    #[error("the regex does not match the text at byte {at}")]
    Unmatched {
        /// Bytes of the text before it.
        at: usize,
    },
    /// The vocabulary has no token for a byte that merges with no neighbour.
    #[error("byte {at} of the text, {byte:#04x}, has no token")]
    MissingByte {
        /// The byte.
        byte: u8,
        /// Where in the text.
        at: usize,
    },
}

/// A token that stands for no text: an id outside the vocabulary or a reserved one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("token {id} at index {index} stands for no text")]
pub struct DecodeError {
    /// The token.
    pub id: u32,
    /// Its position among the tokens to decode.
    pub index: usize,
}

/// Encoder and decoder of a vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    /// The bytes of all text tokens, one after the other.
    bytes: Vec<u8>,
    /// Where each of them ends in `bytes`.
    ends: Vec<usize>,
    longest: usize,
    /// Text tokens by their bytes, seeded at random: a vocabulary can't be made to collide.
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Tokens of single bytes.
    single: [Option<u32>; 256],
    /// Special tokens, each name once.
    special: Vec<(u32, &'static str)>,
    regex: Regex,
    /// Whether the pattern is one that needs no watching.
    trusted: bool,
}

impl Tokenizer {
    /// A tokenizer for any vocabulary. Where two tokens are equal, encoding takes the first.
    ///
    /// # Errors
    /// Malformed records, or a pattern that is invalid or too large.
    pub fn new(vocabulary: &Vocabulary) -> Result<Tokenizer, VocabularyError> {
        if vocabulary.len() > MAX_TOKENS {
            return Err(VocabularyError::TooMany(vocabulary.len()));
        }
        let pattern = &vocabulary.regex;
        if pattern.len() > MAX_PATTERN {
            return Err(VocabularyError::PatternLength(pattern.len()));
        }
        let regex = RegexBuilder::new(pattern)
            .backtrack_limit(MAX_BACKTRACKS)
            .delegate_size_limit(MAX_COMPILED_PART)
            .delegate_dfa_size_limit(MAX_COMPILED_PART)
            .delegate_dfa_skip_cache_capacity_check(false)
            .max_prog_size(MAX_PROGRAM)
            .build()
            .map_err(|error| VocabularyError::Pattern(error.to_string()))?;
        let mut special: Vec<(u32, &'static str)> = Vec::new();
        for (id, token) in vocabulary.special_tokens() {
            if special.iter().all(|&(_, name)| name != token.name) {
                special.push((id, token.name));
            }
        }
        let mut tokenizer = Tokenizer {
            bytes: Vec::with_capacity(vocabulary.records.len()),
            ends: Vec::with_capacity(vocabulary.records.len() / 8),
            longest: 0,
            ids: HashTable::with_capacity(vocabulary.records.len() / 8),
            hasher: DefaultHashBuilder::default(),
            single: [None; 256],
            special,
            regex,
            trusted: pattern == O200K_REGEX,
        };
        for token in vocabulary.tokens() {
            tokenizer.add(token?);
        }
        let (found, needed) = (tokenizer.ends.len(), vocabulary.num_text_tokens);
        if found != needed as usize {
            return Err(VocabularyError::Count { found, needed });
        }
        Ok(tokenizer)
    }

    fn add(&mut self, token: &[u8]) {
        let id = self.ends.len() as u32;
        let known = self.id(token).is_some();
        self.bytes.extend(token);
        self.ends.push(self.bytes.len());
        if known {
            return;
        }
        if let [byte] = token {
            self.single[usize::from(*byte)] = Some(id);
        }
        self.longest = self.longest.max(token.len());
        let Tokenizer { bytes, ends, ids, hasher, .. } = self;
        ids.insert_unique(hasher.hash_one(token), id, |&id| {
            hasher.hash_one(text(bytes, ends, id).unwrap_or_default())
        });
    }

    /// The id of the text token with these bytes.
    pub fn id(&self, token: &[u8]) -> Option<u32> {
        if token.len() > self.longest {
            return None;
        }
        let hash = self.hasher.hash_one(token);
        self.ids.find(hash, |&id| text(&self.bytes, &self.ends, id) == Some(token)).copied()
    }

    /// The id of the special token of this name (`<|start|>`), if the vocabulary has it.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.special.iter().find(|&&(_, known)| known == name).map(|&(id, _)| id)
    }

    /// The bytes that a token stands for: a special token's name for such a token.
    pub fn token(&self, id: u32) -> Option<&[u8]> {
        let special =
            || self.special.iter().find(|&&(known, _)| known == id).map(|(_, name)| name.as_bytes());
        text(&self.bytes, &self.ends, id).or_else(special)
    }

    /// Encodes text in which names of special tokens are text like any other.
    ///
    /// # Errors
    /// What the vocabulary cannot express, or not within the limits. o200k expresses everything; only a run of a
    /// million white space characters exceeds a limit.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        self.encode_into(text, 0, Budget::new(self, text), &mut ids)?;
        Ok(ids)
    }

    /// Encodes text in which the name of a special token (`<|start|>`) stands for that token.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let mut ids = Vec::with_capacity(text.len() / 4);
        let budget = Budget::new(self, text);
        let mut start = 0;
        for (at, _) in text.match_indices("<|") {
            let special = self.special.iter().find(|(_, name)| text[at..].starts_with(name));
            if let Some((id, name)) = special {
                self.encode_into(&text[start..at], start, budget, &mut ids)?;
                ids.push(*id);
                start = at + name.len();
            }
        }
        self.encode_into(&text[start..], start, budget, &mut ids)?;
        Ok(ids)
    }

    /// Encodes `text`, which starts at byte `offset` of the whole.
    fn encode_into(
        &self,
        text: &str,
        offset: usize,
        budget: Budget,
        ids: &mut Vec<u32>,
    ) -> Result<(), EncodeError> {
        let mut done = 0;
        for found in self.regex.find_iter(text) {
            let piece = found
                .map_err(|error| EncodeError::Search { at: offset + done, reason: error.to_string() })?
                .range();
            if budget.is_spent() {
                return Err(EncodeError::Time { at: offset + done });
            }
            if piece.is_empty() {
                continue;
            }
            let bytes = text.as_bytes().get(piece.clone()).filter(|_| piece.start == done);
            let bytes = bytes.ok_or(EncodeError::Unmatched { at: offset + done })?;
            match self.id(bytes) {
                Some(id) => ids.push(id),
                None => self
                    .merge(bytes, ids)
                    .map_err(|at| EncodeError::MissingByte { byte: bytes[at], at: offset + done + at })?,
            }
            done = piece.end;
        }
        if done < text.len() {
            return Err(EncodeError::Unmatched { at: offset + done });
        }
        Ok(())
    }

    /// Appends the tokens of a piece that is no token itself; the error is the position of a byte without a token.
    fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) -> Result<(), usize> {
        // A part is known by its first byte. `parts[start]` of a byte within a part is stale.
        let mut parts: Vec<Part> = (0..piece.len())
            .map(|start| Part {
                previous: start.checked_sub(1),
                end: start + 1,
                id: self.single[usize::from(piece[start])],
                pair: None,
            })
            .collect();
        // Pairs of neighbours that form a token: its rank (its id) and where they start. An entry is out of date once
        // the pair at its start has another rank: the same rank means the same bytes, so the same pair.
        let mut pairs = BinaryHeap::with_capacity(piece.len());
        let pair_up = |parts: &mut [Part], pairs: &mut BinaryHeap<_>, start: usize| {
            let second = parts[start].end;
            parts[start].pair = parts.get(second).and_then(|second| self.id(&piece[start..second.end]));
            if let Some(id) = parts[start].pair {
                pairs.push(Reverse((id, start)));
            }
        };
        for start in 0..piece.len() {
            pair_up(&mut parts, &mut pairs, start);
        }
        while let Some(Reverse((id, start))) = pairs.pop() {
            if parts[start].pair != Some(id) {
                continue;
            }
            let second = parts[start].end;
            let end = parts[second].end;
            parts[second].pair = None;
            parts[start].end = end;
            parts[start].id = Some(id);
            if let Some(next) = parts.get_mut(end) {
                next.previous = Some(start);
            }
            pair_up(&mut parts, &mut pairs, start);
            if let Some(previous) = parts[start].previous {
                pair_up(&mut parts, &mut pairs, previous);
            }
        }
        let mut start = 0;
        while let Some(part) = parts.get(start) {
            ids.push(part.id.ok_or(start)?);
            start = part.end;
        }
        Ok(())
    }

    /// The bytes that tokens stand for; special tokens become their names. They need not be UTF-8.
    ///
    /// # Errors
    /// The first token that stands for no text.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, DecodeError> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for (index, &id) in ids.iter().enumerate() {
            bytes.extend(self.token(id).ok_or(DecodeError { id, index })?);
        }
        Ok(bytes)
    }

    /// The text that tokens stand for, with U+FFFD for invalid UTF-8 and for tokens that stand for no text.
    pub fn decode_lossy(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> =
            ids.iter().flat_map(|&id| self.token(id).unwrap_or("\u{fffd}".as_bytes())).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// The bytes of tokens to text, whole characters at a time.
#[derive(Clone, Debug, Default)]
pub struct TextDecoder {
    /// The beginning of a character that is not complete yet.
    pending: Vec<u8>,
}

/// What [`TextDecoder::push`] made of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The characters that are complete now; U+FFFD for bytes that are none.
    pub text: String,
    /// Whether there were no such bytes.
    pub is_valid: bool,
}

impl TextDecoder {
    /// Takes the bytes that come next.
    pub fn push(&mut self, bytes: &[u8]) -> Decoded {
        self.pending.extend_from_slice(bytes);
        let mut decoded = Decoded { text: String::new(), is_valid: true };
        let mut rest = &self.pending[..];
        while let Err(error) = std::str::from_utf8(rest) {
            let (valid, more) = rest.split_at(error.valid_up_to());
            decoded.text.push_str(&String::from_utf8_lossy(valid));
            rest = more;
            let Some(length) = error.error_len() else {
                self.pending = rest.to_vec();
                return decoded;
            };
            decoded.text.push(char::REPLACEMENT_CHARACTER);
            decoded.is_valid = false;
            rest = &rest[length..];
        }
        decoded.text.push_str(&String::from_utf8_lossy(rest));
        self.pending.clear();
        decoded
    }

    /// Whether a character is not complete.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("text_tokens", &self.ends.len())
            .field("special", &self.special)
            .field("regex", &self.regex)
            .finish_non_exhaustive()
    }
}

/// The bytes of a text token.
fn text<'a>(bytes: &'a [u8], ends: &[usize], id: u32) -> Option<&'a [u8]> {
    let id = id as usize;
    let start = id.checked_sub(1).map_or(Some(0), |previous| ends.get(previous).copied())?;
    bytes.get(start..*ends.get(id)?)
}

/// A token in the making: neighbouring bytes of a piece.
struct Part {
    /// Where the part before it starts.
    previous: Option<usize>,
    end: usize,
    id: Option<u32>,
    /// The token that this part and the next form.
    pair: Option<u32>,
}

/// The time that a pattern may take.
#[derive(Clone, Copy)]
struct Budget {
    end: Option<Instant>,
}

impl Budget {
    fn new(tokenizer: &Tokenizer, text: &str) -> Budget {
        let bytes = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let end = (!tokenizer.trusted)
            .then(|| Instant::now() + SPLIT_TIME + SPLIT_TIME_PER_BYTE.saturating_mul(bytes));
        Budget { end }
    }

    fn is_spent(self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }
}
