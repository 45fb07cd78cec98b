//! `lyric_tokenizer/`: lines and songs, cleaned and as ids.

use super::Context;
use crate::ace_step::lyrics::{Language, Lyrics, Tokenizer};
use crate::error::{Error, Result};
use crate::reference::Comparison;
use crate::weights::read_json;

#[derive(serde::Deserialize)]
struct Cases {
    vocab_size: usize,
    lines: Vec<LineCase>,
    songs: Vec<SongCase>,
}

#[derive(serde::Deserialize)]
struct LineCase {
    text: String,
    lang: Language,
    cleaned: String,
    ids: Vec<u32>,
}

#[derive(serde::Deserialize)]
struct SongCase {
    lyrics: String,
    all_lines_lang: Language,
    ids: Vec<u32>,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let path = context.path("lyric_tokenizer/cases.json");
    let Some(vocab) = &context.options.lyric_vocab else {
        let reason = "found no vocabulary of the lyric tokenizer, needed one".into();
        return Err(Error::Component { path, reason });
    };
    let tokenizer = Tokenizer::open(vocab)?;
    let cases: Cases = read_json(&path)?;
    let mut found = vec![Comparison::same("vocabulary", &tokenizer.vocabulary(), &cases.vocab_size)];
    for (index, LineCase { text, lang, cleaned, ids }) in cases.lines.iter().enumerate() {
        // What the original romanised is given romanised.
        let is_romanised = matches!(lang, Language::Zh | Language::Ja | Language::Ko);
        let clean = lang.clean(if is_romanised { cleaned } else { text });
        let of_line = tokenizer.encode_clean(&clean, *lang)?;
        found.push(Comparison::same(&format!("lines.{index}.cleaned"), &clean, cleaned));
        found.push(Comparison::same(&format!("lines.{index}.ids"), &of_line, ids));
    }
    for (index, SongCase { lyrics, all_lines_lang, ids }) in cases.songs.iter().enumerate() {
        let song = tokenizer.encode(&Lyrics::parse(lyrics, *all_lines_lang))?;
        found.push(Comparison::same(&format!("songs.{index}.ids"), &song.ids, ids));
    }
    Ok(found)
}
