//! The vocabulary as GGUF metadata.

use std::collections::HashMap;

use super::container::{Array, Container, Entry, Text, Value};
use super::merges::merges;
use super::metadata::{entry, string, violation};
use crate::model_bin::header::Uuid;
use crate::rules::Rule;
use crate::violation::{Error, Result, Violation};
use crate::vocabulary::{SpecialToken, Vocabulary};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
/// The splitting pattern: our own key, since GGUF only has names of patterns that llama.cpp knows.
const REGEX: &str = "burn_extended.tokenizer.regex";
/// UUIDs of the special tokens in the order of ids: our own key.
const SPECIAL_UUIDS: &str = "burn_extended.tokenizer.special_uuids";
/// llama.cpp's name of o200k's pattern.
const O200K_PRE: &str = "gpt-4o";

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

/// The special tokens that o200k_harmony names; the others are `<|reserved_N|>` to it, whatever the exporter's UUID.
const NAMED: [&str; 7] =
    ["<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"];

/// The metadata of a vocabulary.
///
/// # Errors
/// [`Error::Unsupported`] where two tokens would have the same spelling, which llama.cpp does not survive.
pub(super) fn entries(vocabulary: &Vocabulary) -> Result<Vec<Entry>> {
    let o200k = Vocabulary::o200k();
    let harmony = vocabulary.special_uuids == o200k.special_uuids;
    let special_name = |slot: usize, uuid: &Uuid| {
        let known =
            SpecialToken::from_uuid(*uuid).map(|token| token.name).filter(|name| NAMED.contains(name));
        match (known, slot) {
            (Some(name), _) => name.to_owned(),
            (None, 0) if harmony => "<|startoftext|>".into(),
            (None, 1) if harmony => "<|endoftext|>".into(),
            _ => format!("<|reserved_{}|>", vocabulary.num_text_tokens as usize + slot),
        }
    };
    let text: Vec<&[u8]> = vocabulary
        .tokens()
        .collect::<Result<_, _>>()
        .map_err(|overrun| Error::Unsupported(overrun.to_string()))?;
    let special: Vec<String> =
        vocabulary.special_uuids.iter().enumerate().map(|(slot, uuid)| special_name(slot, uuid)).collect();
    let mut ranks = HashMap::with_capacity(text.len() + special.len());
    // A special name is ASCII without blanks, so its bytes are its spelling.
    for (token, id) in text.iter().copied().chain(special.iter().map(String::as_bytes)).zip(0..) {
        if let Some(other) = ranks.insert(token, id) {
            let spelling = spell(token);
            return Err(Error::Unsupported(format!(
                "tokens {other} and {id} would both be {spelling} in GGUF"
            )));
        }
    }
    for name in &special {
        ranks.remove(name.as_bytes());
    }
    let merges = merges(&text, &ranks);
    let merges = text.iter().zip(merges).filter_map(|(token, length)| {
        let (left, right) = token.split_at_checked(length?)?;
        Some(Text(spell(left) + " " + &spell(right)))
    });

    let strings = |texts: Vec<Text>| Value::Array(Array::String(texts));
    let types = std::iter::repeat_n(NORMAL, text.len()).chain(std::iter::repeat_n(CONTROL, special.len()));
    let id_of =
        |name: &str| special.iter().position(|other| other == name).map(|slot| (text.len() + slot) as u32);
    let pre = if vocabulary.regex == o200k.regex { O200K_PRE } else { "default" };
    let mut entries = vec![
        entry(MODEL, Value::String("gpt2".into())),
        entry(PRE, Value::String(pre.into())),
        entry(
            TOKENS,
            strings(
                text.iter()
                    .map(|token| Text(spell(token)))
                    .chain(special.iter().cloned().map(Text))
                    .collect(),
            ),
        ),
        entry(TYPES, Value::Array(Array::I32(types.collect()))),
        entry("tokenizer.ggml.merges", strings(merges.collect())),
    ];
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "<|startoftext|>"),
        ("tokenizer.ggml.eos_token_id", "<|return|>"),
        ("tokenizer.ggml.padding_token_id", "<|endoftext|>"),
    ] {
        entries.extend(id_of(name).map(|id| entry(key, Value::U32(id))));
    }
    entries.push(entry(REGEX, Value::String(vocabulary.regex.as_str().into())));
    let uuids = vocabulary.special_uuids.iter().map(|uuid| Text(uuid.to_string())).collect();
    entries.push(entry(SPECIAL_UUIDS, strings(uuids)));
    Ok(entries)
}

/// The vocabulary of a file: by our own keys where it has them, otherwise o200k's pattern and special tokens, with the
/// file's text tokens; further rows (a Hugging Face checkpoint has 201088) are left out.
pub(super) fn vocabulary(container: &Container) -> Result<Vocabulary, Vec<Violation>> {
    let refuse =
        |rule, field: &str, found: String, needed: &str| Err(vec![violation(rule, field, found, needed)]);
    let config = Rule::SourceConfig;
    let (model, pre) = (string(container, MODEL)?, string(container, PRE)?);
    if model != "gpt2" {
        return refuse(config, MODEL, model.into(), "gpt2: byte-level BPE");
    }
    let tokens = match container.value(TOKENS) {
        Some(Value::Array(Array::String(tokens))) => tokens,
        other => return refuse(config, TOKENS, kind(other), "an array of strings"),
    };
    let own = match (container.value(REGEX), container.value(SPECIAL_UUIDS)) {
        (Some(Value::String(regex)), Some(Value::Array(Array::String(uuids)))) => {
            Some((regex.0.clone(), uuids))
        }
        (None, None) => None,
        _ => {
            return refuse(
                config,
                REGEX,
                "one of the two keys, or another type".into(),
                "a string and an array of strings",
            );
        }
    };
    let (regex, special_uuids, num_text_tokens) = match own {
        Some((regex, uuids)) => {
            let parse = |text: &Text| uuid::Uuid::try_parse(&text.0).map(|uuid| Uuid(uuid.into_bytes()));
            let Ok(uuids) = uuids.iter().map(parse).collect::<Result<Vec<_>, _>>() else {
                return refuse(
                    config,
                    SPECIAL_UUIDS,
                    "another string".into(),
                    "a UUID for each special token",
                );
            };
            let count = tokens.len().saturating_sub(uuids.len());
            (regex, uuids, count)
        }
        None if pre == O200K_PRE => {
            let o200k = Vocabulary::o200k();
            if (tokens.len() as u64) < o200k.len() {
                let needed = format!("at least o200k's {}", o200k.len());
                return refuse(Rule::SourceRows, TOKENS, format!("{} tokens", tokens.len()), &needed);
            }
            (o200k.regex.clone(), o200k.special_uuids.clone(), o200k.num_text_tokens as usize)
        }
        None => return refuse(config, PRE, pre.into(), "gpt-4o, the pattern of GPT-OSS"),
    };
    let text = tokens.get(..num_text_tokens).unwrap_or_default();
    if let Some(types) = container.value(TYPES) {
        let Value::Array(Array::I32(types)) = types else {
            return refuse(config, TYPES, kind(Some(types)), "an array of i32");
        };
        if types.len() != tokens.len() {
            return refuse(config, TYPES, format!("{} types", types.len()), "a type for each token");
        }
        if let Some(id) = types.iter().take(text.len()).position(|ty| *ty != NORMAL) {
            return refuse(
                config,
                TYPES,
                format!("token {id} of another type"),
                "type 1 for each text token",
            );
        }
    }
    let bytes = byte_of_char();
    let mut records = Vec::new();
    for (id, token) in text.iter().enumerate() {
        let field = format!("{TOKENS}[{id}]");
        let spelled: Option<Vec<u8>> = token.0.chars().map(|char| *bytes.get(char as usize)?).collect();
        let Some(token) = spelled else {
            return refuse(
                Rule::SourceContainer,
                &field,
                format!("{:?}", token.0),
                "GPT-2's spelling of bytes",
            );
        };
        if token.is_empty() {
            return refuse(Rule::TokenEmpty, &field, "no bytes".into(), "at least one byte");
        }
        let Ok(length) = u16::try_from(token.len()) else {
            return refuse(Rule::TokenRecords, &field, format!("{} bytes", token.len()), "at most 65535");
        };
        records.extend(length.to_le_bytes());
        records.extend(token);
    }
    let num_text_tokens = text.len() as u32; // the caller refuses more tokens than 2^24
    Ok(Vocabulary { special_uuids, regex, records, num_text_tokens })
}

fn kind(value: Option<&Value>) -> String {
    if value.is_some() { "another type".into() } else { "no such key".into() }
}

/// GPT-2's spelling of a byte: itself where it is a printable character, otherwise one from U+0100 on in order.
fn char_of_byte(byte: u8) -> char {
    let stands_for_itself = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if stands_for_itself(byte) {
        return byte.into();
    }
    let moved_before = (0..byte).filter(|&other| !stands_for_itself(other)).count() as u32;
    char::from_u32(256 + moved_before).unwrap_or_default()
}

/// The byte that each character up to the last one of GPT-2's spelling stands for.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut bytes = vec![None; 512];
    for byte in 0..=u8::MAX {
        if let Some(slot) = bytes.get_mut(char_of_byte(byte) as usize) {
            *slot = Some(byte);
        }
    }
    bytes
}

fn spell(token: &[u8]) -> String {
    token.iter().map(|&byte| char_of_byte(byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_spelled_as_gpt2_spells_them() {
        // From GPT-2's own vocabulary: Ġ is the blank, Ċ the line feed; é is two bytes.
        assert_eq!(spell(" Hello\n".as_bytes()), "ĠHelloĊ");
        assert_eq!(spell("é".as_bytes()), "Ã©");
        assert_eq!(spell(&[0, 127, 128, 173]), "ĀġĢŃ");
        let bytes = byte_of_char();
        assert_eq!(bytes.iter().flatten().count(), 256);
        assert!((0..=u8::MAX).all(|byte| bytes[char_of_byte(byte) as usize] == Some(byte)));
    }
}
