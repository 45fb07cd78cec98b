//! The prompt's tokenizer: `tokenizer.json` of `umt5-base`, a SentencePiece unigram model (Kudo 2018, arXiv:1804.10959)
//! in the form of the crate `tokenizers`.

use std::path::{Path, PathBuf};

use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

use crate::error::{Error, Result};

/// Tokens of a prompt at most, its end among them; what is beyond them is cut off (`acestep/pipeline_ace_step.py`).
pub const MAX_TOKENS: usize = 256;
/// `</s>`, with which every prompt ends.
pub const END: u32 = 1;
/// `<pad>`.
pub const PADDING: u32 = 0;

/// Prompts as ids, padded to the length of the longest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Ids of each prompt, equally many.
    pub ids: Vec<Vec<u32>>,
    /// Which of them are no padding.
    pub mask: Vec<Vec<bool>>,
}

impl Tokens {
    /// Ids of different lengths, padded at the end.
    pub fn padded(prompts: Vec<Vec<u32>>) -> Tokens {
        let length = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let mask = prompts.iter().map(|ids| (0..length).map(|at| at < ids.len()).collect()).collect();
        let mut ids = prompts;
        ids.iter_mut().for_each(|ids| ids.resize(length, PADDING));
        Tokens { ids, mask }
    }

    /// `[batch, tokens]`.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no prompt, where one has no tokens but padding, or where ids and mask are not
    /// equally many.
    pub fn shape(&self) -> Result<[usize; 2]> {
        let refuse = |argument, found: String, needed: String| {
            Err(Error::Argument { operation: "umt5", argument, found, needed })
        };
        let batch = self.ids.len();
        let length = self.ids.first().map_or(0, Vec::len);
        if length == 0 {
            return refuse("ids", "empty".into(), "a prompt of at least one token".into());
        }
        if let Some(ids) = self.ids.iter().find(|ids| ids.len() != length) {
            let found = format!("a prompt of {} tokens beside one of {length}", ids.len());
            return refuse("ids", found, "prompts of one length".into());
        }
        if self.mask.len() != batch {
            return refuse("mask", format!("for {} prompts", self.mask.len()), format!("one for {batch}"));
        }
        if let Some(mask) = self.mask.iter().find(|mask| mask.len() != length) {
            return refuse("mask", format!("for {} tokens", mask.len()), format!("one for {length}"));
        }
        if let Some(sample) = self.mask.iter().position(|mask| !mask.contains(&true)) {
            let found = format!("all padding in prompt {sample}");
            return refuse("mask", found, "at least one token that is none".into());
        }
        Ok([batch, length])
    }
}

/// From text to the ids that [`umt5::Encoder`](super::umt5::Encoder) takes.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder. Its settings for padding and truncation are not those of the pipeline and
    /// do not count.
    ///
    /// # Errors
    /// [`Error::Component`] where the file cannot be read, is no tokenizer, or does not end a text with the id 1.
    pub fn open(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        let refuse = |reason: String| Error::Component { path: path.clone(), reason };
        let json = std::fs::read(&path).map_err(|error| refuse(error.to_string()))?;
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(json).map_err(|error| refuse(error.to_string()))?;
        let truncation = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: MAX_TOKENS,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        tokenizer.with_padding(None);
        tokenizer.with_truncation(Some(truncation)).map_err(|error| refuse(error.to_string()))?;
        let tokenizer = Tokenizer { path: path.clone(), tokenizer };
        match tokenizer.encode_one("")?.as_slice() {
            [END] => Ok(tokenizer),
            other => {
                Err(refuse(format!("found {other:?} for a text without words, needed [{END}], its end")))
            }
        }
    }

    /// The ids of prompts, the end among them: at most [`MAX_TOKENS`], at least the end itself.
    ///
    /// # Errors
    /// [`Error::Component`] where the tokenizer has no token for a character and none for the unknown.
    pub fn encode(&self, prompts: &[&str]) -> Result<Tokens> {
        let prompts = prompts.iter().map(|prompt| self.encode_one(prompt));
        Ok(Tokens::padded(prompts.collect::<Result<_>>()?))
    }

    fn encode_one(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(prompt, true);
        let refuse = |error: tokenizers::Error| {
            let reason = format!("{prompt:?}: {error}");
            Error::Component { path: self.path.clone(), reason }
        };
        Ok(encoding.map_err(refuse)?.get_ids().to_vec())
    }
}
