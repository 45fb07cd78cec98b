//! Target `tokenizer_section`.

use std::io::Cursor;
use std::path::Path;

use arbitrary::Arbitrary;
use binrw::BinWrite;
use formats::canonical::Source;
use formats::model_bin::header::{Head, TokenizerHeader, Uuid};
use formats::model_bin::layout::Weights;
use formats::model_bin::tensors::Dims;
use formats::model_bin::verify::verify;
use formats::model_bin::{Depth, Verified};
use formats::tokenizer::{EncodeError, Tokenizer};
use formats::vocabulary::{SPECIAL_TOKENS, Vocabulary};

use crate::bounded;
use crate::tiny::{Tiny, records};

/// Tokens up to which a file gets its weights; embedding and unembedding take 128 bytes for each.
const MAX_TOKENS: u64 = 1024;
/// A pattern that takes any text whole, so that byte-pair encoding alone decides.
const WHOLE: &str = r"[\s\S]+";

#[derive(Arbitrary, Debug)]
struct Section {
    special: Vec<Special>,
    regex: Pattern,
    tokens: Tokens,
    /// Added to the counts and sizes of the tokenizer header.
    wrong: Option<[i8; 4]>,
    text: Text,
}

#[derive(Arbitrary, Debug)]
enum Text {
    Any(String),
    /// Tokens one after the other, so that there is something to merge.
    Tokens(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Special {
    Known(u8),
    Zero,
    Any([u8; 16]),
}

#[derive(Arbitrary, Debug)]
enum Pattern {
    Whole,
    Parts(Vec<u8>),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Tokens {
    /// All single bytes, and these.
    Complete(Vec<Vec<u8>>),
    /// All single bytes, and for each of these the join of two tokens before it: longer ones, or one of four letters.
    Joined(Vec<(u8, u8)>),
    Records(Vec<u8>),
}

/// Pieces of patterns, of which some are expensive together.
const PARTS: [&str; 32] = [
    "(?:",
    "(",
    ")",
    "*",
    "+",
    "?",
    "|",
    "[",
    "]",
    "a",
    "b",
    "\\p{L}",
    "\\p{N}{1,3}",
    "\\s+(?!\\S)",
    "\\s",
    ".",
    "{9}",
    "{1,99}",
    "(?=",
    "(?!",
    "(?<=",
    "(?>",
    "^",
    "$",
    "\\1",
    "\\b",
    "(?i)",
    "++",
    "[^\\r\\n]",
    "*?",
    "\\K",
    "\\G",
];

/// Whatever the section holds, the verdict is bounded in memory. A section that verifies makes a tokenizer unless its
/// pattern does not compile; what that encodes it decodes to the same text; and where the pattern takes the text
/// whole, its tokens are those of byte-pair encoding as it is defined.
pub fn tokenizer_section(data: &[u8]) {
    let Some(section) = crate::instructions::<Section>(data) else { return };
    let (bytes, vocabulary) = section.file();
    let text = &section.text.of(&vocabulary);
    let report = bounded(bytes.len(), || verify(&bytes, Depth::Structure, &()));
    if !report.is_valid() {
        // No verified file, but a source may have such a vocabulary.
        if let Ok(tokenizer) = Tokenizer::new(&vocabulary) {
            check_text(&tokenizer, text);
        }
        return;
    }
    let path = Path::new("fuzzed.bin");
    let verified = Verified::from_bytes(path, bytes, Depth::Structure).expect("a file that was verified");
    assert_eq!(*verified.vocabulary(), vocabulary);
    let Ok(tokenizer) = Tokenizer::new(&vocabulary) else { return };
    for (id, token) in (0..).zip(vocabulary.tokens()) {
        assert_eq!(tokenizer.token(id), token.ok());
    }
    let error = check_text(&tokenizer, text);
    assert!(
        !matches!(error, Some(EncodeError::MissingByte { .. })),
        "{error:?}, of a vocabulary with all bytes"
    );
    if vocabulary.regex == WHOLE && !text.is_empty() && text.len() <= 256 {
        assert_eq!(tokenizer.encode(text), Ok(merged(text.as_bytes(), &vocabulary)));
    }
}

/// The error of encoding, if it fails.
fn check_text(tokenizer: &Tokenizer, text: &str) -> Option<EncodeError> {
    let with_names = format!("<|start|>{text}<|end|>");
    if let Ok(ids) = tokenizer.encode_with_special(&with_names) {
        assert_eq!(tokenizer.decode(&ids).as_deref(), Ok(with_names.as_bytes()));
    }
    match tokenizer.encode(text) {
        Ok(ids) => {
            assert_eq!(tokenizer.decode(&ids).as_deref(), Ok(text.as_bytes()));
            assert_eq!(tokenizer.decode_lossy(&ids), text);
            None
        }
        Err(error) => Some(error),
    }
}

/// Byte-pair encoding as it is defined: while two neighbours form a token, those of lowest rank, leftmost, do.
fn merged(text: &[u8], vocabulary: &Vocabulary) -> Vec<u32> {
    let tokens: Vec<&[u8]> = vocabulary.tokens().map(|token| token.expect("a verified record")).collect();
    let id = |bytes: &[u8]| tokens.iter().position(|token| *token == bytes);
    if let Some(id) = id(text) {
        return vec![id as u32];
    }
    let mut parts: Vec<Vec<u8>> = text.iter().map(|&byte| vec![byte]).collect();
    loop {
        let pairs = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((id(&pair.concat())?, at)));
        let Some((joined, at)) = pairs.min() else { break };
        parts.splice(at..at + 2, [tokens[joined].to_vec()]);
    }
    parts.iter().map(|part| id(part).expect("a token") as u32).collect()
}

impl Section {
    /// The file with this section, and the section's vocabulary as far as it can be told.
    fn file(&self) -> (Vec<u8>, Vocabulary) {
        let regex = self.regex.bytes();
        let (records, count) = self.tokens.records();
        let special_uuids: Vec<Uuid> = self.special.iter().map(Special::uuid).collect();
        let [a, b, c, d] = self.wrong.unwrap_or_default().map(i32::from);
        let sizes = TokenizerHeader {
            num_special_tokens: (special_uuids.len() as u32).wrapping_add_signed(a),
            num_text_tokens: count.wrapping_add_signed(b),
            regex_size: (regex.len() as u32 + 1).wrapping_add_signed(c),
            tokens_size: (records.len() as u32).wrapping_add_signed(d),
        };
        let header = *Tiny::new(0).header();
        let mut bytes = Cursor::new(Vec::new());
        Head::new(header, sizes).write(&mut bytes).expect("a head in memory");
        let mut bytes = bytes.into_inner();
        special_uuids.iter().for_each(|uuid| bytes.extend(uuid.0));
        bytes.extend(regex.iter().chain(&[0]));
        bytes.extend(&records);
        let tokens = u64::from(sizes.num_special_tokens) + u64::from(sizes.num_text_tokens);
        if tokens <= MAX_TOKENS
            && let Ok(dims) = Dims::new(&header, tokens)
        {
            let weights = Weights::plan(dims, bytes.len() as u64).expect("a plan of small sizes");
            bytes.resize(weights.end() as usize, 0);
        }
        let regex = String::from_utf8_lossy(&regex).into_owned();
        (bytes, Vocabulary { special_uuids, regex, records, num_text_tokens: count })
    }
}

impl Text {
    fn of(&self, vocabulary: &Vocabulary) -> String {
        match self {
            Text::Any(text) => text.clone(),
            Text::Tokens(indices) => {
                let tokens: Vec<Vec<u8>> = vocabulary.tokens().flatten().map(<[u8]>::to_vec).collect();
                let bytes = indices
                    .iter()
                    .flat_map(|&index| pick(&tokens, index))
                    .copied()
                    .take(4096)
                    .collect::<Vec<_>>();
                String::from_utf8_lossy(&bytes).into_owned()
            }
        }
    }
}

impl Special {
    fn uuid(&self) -> Uuid {
        match self {
            Special::Known(index) => SPECIAL_TOKENS[usize::from(*index) % SPECIAL_TOKENS.len()].uuid,
            Special::Zero => Uuid::default(),
            Special::Any(bytes) => Uuid(*bytes),
        }
    }
}

impl Pattern {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Pattern::Whole => WHOLE.into(),
            Pattern::Parts(parts) => {
                parts.iter().flat_map(|&part| PARTS[usize::from(part) % 32].bytes()).collect()
            }
            Pattern::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// A token: with half of the indices one of the last, otherwise one of four letters.
fn pick(tokens: &[Vec<u8>], index: u8) -> &[u8] {
    let last = tokens.len().saturating_sub(1 + usize::from(index & 0x7f));
    let at = if index < 128 { usize::from(b'a' + index % 4) } else { last };
    tokens.get(at).map_or(&[], Vec::as_slice)
}

impl Tokens {
    /// The records, and how many they are meant to be.
    fn records(&self) -> (Vec<u8>, u32) {
        let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        match self {
            Tokens::Complete(more) => tokens.extend(more.iter().cloned()),
            Tokens::Joined(pairs) => {
                for &(left, right) in pairs {
                    let joined = [pick(&tokens, left), pick(&tokens, right)].concat();
                    if joined.len() <= 1024 && !tokens.contains(&joined) {
                        tokens.push(joined);
                    }
                }
            }
            Tokens::Records(records) => return (records.clone(), records.len() as u32 / 3),
        }
        tokens.iter_mut().for_each(|token| token.truncate(u16::MAX.into()));
        let count = tokens.len() as u32;
        (records(tokens), count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A section that byte-pair encoding is compared on.
    #[test]
    fn a_section_of_joined_tokens_is_valid_and_encodes() {
        let special = vec![Special::Known(5), Special::Zero];
        let tokens = Tokens::Joined(vec![(0, 1), (128, 2), (128, 129)]);
        let section =
            Section { special, regex: Pattern::Whole, tokens, wrong: None, text: Text::Any(String::new()) };
        let (bytes, vocabulary) = section.file();
        assert!(verify(&bytes, Depth::Structure, &()).is_valid());
        let tokenizer = Tokenizer::new(&vocabulary).expect("a tokenizer");
        // ab, then abc, then abcab.
        assert_eq!(tokenizer.encode("xabcabab"), Ok(vec![120, 258, 256]));
        assert_eq!(merged(b"xabcabab", &vocabulary), [120, 258, 256]);
    }
}
