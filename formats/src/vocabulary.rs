//! The vocabulary of a tokenizer section: regex, text tokens by rank, special tokens by id.

mod json;

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

pub use self::json::FILE_NAME;
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

/// o200k's splitting pattern, tiktoken-rs's `O200K_BASE_PAT_STR`.
pub const O200K_REGEX: &str = include_str!(concat!(env!("OUT_DIR"), "/o200k.regex"));
/// Its text tokens.
const O200K_RECORDS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/o200k.records"));
/// Their number.
const O200K_TEXT_TOKENS: u32 = 199_998;
/// Special tokens that the genuine exporter writes with o200k, ids 199998 to 200013.
const O200K_SPECIAL_TOKENS: u32 = 16;
/// A token whose UUID the genuine exporter never writes, since it spells the name in two ways.
const END_UNTRUSTED: u32 = 200_001;

impl Vocabulary {
    /// o200k_harmony, as the genuine exporter writes it.
    pub fn o200k() -> &'static Vocabulary {
        static O200K: LazyLock<Vocabulary> = LazyLock::new(Vocabulary::build_o200k);
        &O200K
    }

    fn build_o200k() -> Vocabulary {
        let uuid = |id| {
            SPECIAL_TOKENS.iter().find(|token| token.id == id && id != END_UNTRUSTED).map(|token| token.uuid)
        };
        let ids = O200K_TEXT_TOKENS..O200K_TEXT_TOKENS + O200K_SPECIAL_TOKENS;
        Vocabulary {
            special_uuids: ids.map(|id| uuid(id).unwrap_or_default()).collect(),
            regex: O200K_REGEX.into(),
            records: O200K_RECORDS.to_vec(),
            num_text_tokens: O200K_TEXT_TOKENS,
        }
    }

    /// A vocabulary from tiktoken's file format: a line for each token, its bytes in Base64, a space, its rank.
    ///
    /// Lines may stand in any order; empty ones are skipped.
    ///
    /// # Errors
    /// The first line that is not of this form, that holds more than 65535 bytes, or whose rank occurs twice or is not
    /// below the number of tokens.
    pub fn from_tiktoken(
        text: &str,
        regex: &str,
        special_uuids: Vec<Uuid>,
    ) -> Result<Vocabulary, TiktokenError> {
        let lines = || (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty());
        let mut tokens: Vec<Option<Vec<u8>>> = vec![None; lines().count()];
        for (line, content) in lines() {
            let error = |needed| TiktokenError { line, needed };
            let (token, rank) = content.split_once(' ').ok_or_else(|| error("Base64, a space and a rank"))?;
            let token = BASE64.decode(token).map_err(|_| error("a token in Base64"))?;
            let slot = rank.parse().ok().and_then(|rank: usize| tokens.get_mut(rank));
            let slot = slot.ok_or_else(|| error("a rank below the number of tokens"))?;
            if token.len() > usize::from(u16::MAX) {
                return Err(error("a token of at most 65535 bytes"));
            }
            if slot.replace(token).is_some() {
                return Err(error("a rank that no other token has"));
            }
        }
        let num_text_tokens = tokens
            .len()
            .try_into()
            .map_err(|_| TiktokenError { line: tokens.len(), needed: "fewer than 2^32 tokens" })?;
        let mut records = Vec::new();
        for token in tokens.iter().flatten() {
            records.extend((token.len() as u16).to_le_bytes());
            records.extend(token);
        }
        Ok(Vocabulary { special_uuids, regex: regex.into(), records, num_text_tokens })
    }

    /// The text tokens in tiktoken's file format, by rank.
    ///
    /// # Errors
    /// Records that run over their end.
    pub fn tiktoken_bytes(&self) -> Result<Vec<u8>, Overrun> {
        let mut text = String::with_capacity(self.records.len() * 2);
        for (rank, token) in self.tokens().enumerate() {
            BASE64.encode_string(token?, &mut text);
            text.push_str(&format!(" {rank}\n"));
        }
        Ok(text.into_bytes())
    }

    /// The bytes of the text tokens, by rank.
    pub fn tokens(&self) -> Tokens<'_> {
        Tokens { records: &self.records, rest: &self.records }
    }

    /// The special tokens that have a UUID of the specification's table, with their ids in this vocabulary.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &'static SpecialToken)> {
        (self.num_text_tokens..=u32::MAX)
            .zip(&self.special_uuids)
            .filter_map(|(id, &uuid)| Some((id, SpecialToken::from_uuid(uuid)?)))
    }

    /// Text and special tokens: the rows of the embedding.
    pub fn len(&self) -> u64 {
        u64::from(self.num_text_tokens) + self.special_uuids.len() as u64
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Iterates over text token records; ends after an error.
#[derive(Clone, Debug)]
pub struct Tokens<'a> {
    records: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Result<&'a [u8], Overrun>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let token = self.rest.split_first_chunk().and_then(|(&length, rest)| {
            let (token, rest) = rest.split_at_checked(u16::from_le_bytes(length).into())?;
            self.rest = rest;
            Some(token)
        });
        Some(token.ok_or_else(|| {
            let start = self.records.len() - self.rest.len();
            self.rest = &[];
            Overrun { start, end: self.records.len() }
        }))
    }
}

/// A text token record that does not end within the records (`TOK-RECORDS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the token record at byte {start} of the records runs over their end at byte {end}")]
pub struct Overrun {
    /// Where the record starts, in bytes from the start of the records.
    pub start: usize,
    /// Bytes of the records.
    pub end: usize,
}

/// A line that does not belong into a vocabulary file of tiktoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: needed {needed}")]
pub struct TiktokenError {
    /// Counted from 1.
    pub line: usize,
    /// What should be there.
    pub needed: &'static str,
}

/// A special token of o200k_harmony.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// As text spells it, `<|start|>`.
    pub name: &'static str,
    /// In the o200k vocabulary.
    pub id: u32,
    /// In the file.
    pub uuid: Uuid,
}

impl SpecialToken {
    /// The token with this UUID.
    pub fn from_uuid(uuid: Uuid) -> Option<&'static SpecialToken> {
        SPECIAL_TOKENS.iter().find(|token| token.uuid == uuid)
    }
}

const fn special(name: &'static str, id: u32, uuid: u128) -> SpecialToken {
    SpecialToken { name, id, uuid: Uuid(uuid.to_be_bytes()) }
}

/// The special tokens that have a UUID, by id. Source: the table of the genuine `create-local-model.py`.
pub const SPECIAL_TOKENS: &[SpecialToken] = &[
    special("<|untrusted|>", 200000, 0x07d7da55_b346_4cff_8b37_7cefacf8a3e8),
    special("<|end_untrusted|>", 200001, 0xf265bd9c_c717_469e_a447_920687d65d90),
    special("<|return|>", 200002, 0xf799ff69_1992_43c4_a3d8_d831f475dc75),
    special("<|constrain|>", 200003, 0xc0bb14c7_6022_49da_ad08_792d67e8b470),
    special("<|channel|>", 200005, 0xfd3dda11_c8ab_4033_876e_d93deb172c93),
    special("<|start|>", 200006, 0x55a77c2f_8a01_4c54_8ac2_313bfc7e208d),
    special("<|end|>", 200007, 0xfcac2f6d_4705_4f6b_b228_642accac7238),
    special("<|message|>", 200008, 0x16e40431_f47f_4b22_b59b_8b278fc30a54),
    special("<|call|>", 200012, 0x1220f796_e388_4de5_b487_fe2eb5fe03c0),
    special("<|refusal|>", 200013, 0xe15ba702_28c4_4292_ab8f_ffa434709128),
];
