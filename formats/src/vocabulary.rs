//! The vocabulary of a tokenizer section: regex, text tokens by rank, special tokens by id.

use crate::model_bin::header::Uuid;

/// A vocabulary, as a `model.bin` stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary {
    /// UUID of each special token in the order of ids; zero for a reserved slot.
    pub special_uuids: Vec<Uuid>,
    /// The splitting pattern, without the NUL that the file puts behind it.
    pub regex: String,
    /// Text tokens, each as u16 length (little-endian) and bytes, in rank order.
    pub records: Vec<u8>,
    /// Text tokens in `records`.
    pub num_text_tokens: u32,
}

impl Vocabulary {
    /// Text and special tokens: the rows of the embedding.
    pub fn len(&self) -> u64 {
        u64::from(self.num_text_tokens) + self.special_uuids.len() as u64
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
