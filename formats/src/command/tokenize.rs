//! `tokenize`.

use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};

use super::terminal::{Console, Outcome};
use crate::canonical::Source;
use crate::model_bin::{Depth, Verified};
use crate::tokenizer::Tokenizer;
use crate::vocabulary::Vocabulary;

/// The verb `tokenize`.
pub fn tokenize(
    console: &Console,
    model: Option<&Path>,
    text: Option<&str>,
    decode: bool,
    special: bool,
) -> Result<Outcome> {
    let tokenizer = match model {
        Some(path) => Tokenizer::new(Verified::open(path, Depth::Structure, console)?.vocabulary())?,
        None => Tokenizer::new(Vocabulary::o200k())?,
    };
    console.done();
    let text = match text {
        Some(text) => text.to_owned(),
        None => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        }
    };
    let mut out = io::stdout().lock();
    if decode {
        let words = text.split(|c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']'));
        let ids = words.filter(|word| !word.is_empty());
        let ids: Vec<u32> = ids
            .map(|word| word.parse().with_context(|| format!("\"{word}\" is not a token id")))
            .collect::<Result<_>>()?;
        let bytes = tokenizer.decode(&ids)?;
        if console.json {
            let document = serde_json::json!({ "ids": ids, "text": String::from_utf8_lossy(&bytes) });
            console.document(&mut out, &document)?;
        } else {
            out.write_all(&bytes)?;
        }
        return Ok(Outcome::Fine);
    }
    let ids = if special { tokenizer.encode_with_special(&text)? } else { tokenizer.encode(&text)? };
    if console.json {
        writeln!(out, "{}", serde_json::json!({ "ids": ids, "count": ids.len() }))?;
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        writeln!(out, "{}", ids.join(" "))?;
    }
    Ok(Outcome::Fine)
}
