//! Cases as they stand in the files, and the tokens that they spell.

use std::path::Path;
use std::sync::LazyLock;

use engine::harmony::Encoding;
use formats::tokenizer::Tokenizer;
use formats::vocabulary::Vocabulary;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The table of the format guide.
pub const SPECIAL: [(&str, u32); 7] = [
    ("<|return|>", 200002),
    ("<|constrain|>", 200003),
    ("<|channel|>", 200005),
    ("<|start|>", 200006),
    ("<|end|>", 200007),
    ("<|message|>", 200008),
    ("<|call|>", 200012),
];

pub static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(Vocabulary::o200k()).unwrap());

pub fn encoding() -> Encoding {
    Encoding::new(Vocabulary::o200k()).unwrap()
}

/// Every case of a file.
pub fn cases<T: DeserializeOwned>(file: &str) -> Vec<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/harmony").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Text without special tokens.
pub fn plain(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text).unwrap()
}

/// Text with special tokens.
pub fn tokens(text: &str) -> Vec<u32> {
    let first = SPECIAL.iter().filter_map(|&(name, id)| Some((text.find(name)?, name, id))).min();
    match first {
        Some((at, name, id)) => [plain(&text[..at]), vec![id], tokens(&text[at + name.len()..])].concat(),
        None => plain(text),
    }
}

/// What `text` or `tokens` of a case spells.
pub fn spelled(text: &[String], parts: &[Value]) -> Vec<u32> {
    let mut all = tokens(&text.join("\n"));
    for part in parts {
        match part {
            Value::String(text) => all.extend(tokens(text)),
            Value::Number(id) => all.push(u32::try_from(id.as_u64().unwrap()).unwrap()),
            part => all.extend(plain(part["plain"].as_str().unwrap())),
        }
    }
    all
}

/// Fails with both texts if tokens differ.
pub fn assert_tokens(name: &str, found: &[u32], wanted: &[u32]) {
    if found != wanted {
        let text = |tokens| TOKENIZER.decode_lossy(tokens);
        panic!(
            "{name}\n found: {}\nwanted: {}\n found: {found:?}\nwanted: {wanted:?}",
            text(found),
            text(wanted)
        );
    }
}
