//! Lyrics: what a user writes, and the ids that the transformer takes.
//!
//! ```text
//! [verse]                      a tag of the song's structure
//! Neon lights they flicker     a line in the language that the caller names
//!                              a blank line
//! [de] Das ist ein Tag         a line in another language, by its ISO 639-1 code
//! [fr]                         the language of the lines that follow
//! ```
//!
//! The original detects the language of each line; here the caller says it. English is cleaned exactly as in the original.
//! Of other languages, quotes, case and blanks are; numbers, symbols and abbreviations, which the original writes out in
//! each of them, are left as they are, and a [`Note`] says where. Chinese, Japanese and Korean are taken in the Latin
//! letters that the original makes of them: pinyin with the digits of the tones (`ni3hao3shi4jie4`), romaji, and the
//! academic romanisation of Korean (`salanghae-yo`).

pub mod english;
pub mod numbers;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// `[UNK]`, which stands for characters that the vocabulary does not have.
pub const UNKNOWN: u32 = 1;
/// `[SPACE]`, which also ends a line.
pub const SPACE: u32 = 2;
/// `[START]`, with which a song begins.
pub const START: u32 = 261;

/// Tags of a song's structure that have ids of their own.
pub const TAGS: [&str; 12] = [
    "start",
    "intro",
    "verse",
    "chorus",
    "bridge",
    "outro",
    "end",
    "inst",
    "solo",
    "hook",
    "pre-chorus",
    "break",
];

/// A language that the model sings in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English.
    #[default]
    En,
    /// German.
    De,
    /// French.
    Fr,
    /// Spanish.
    Es,
    /// Italian.
    It,
    /// Portuguese.
    Pt,
    /// Polish.
    Pl,
    /// Turkish.
    Tr,
    /// Russian.
    Ru,
    /// Czech.
    Cs,
    /// Dutch.
    Nl,
    /// Arabic.
    Ar,
    /// Chinese, in pinyin.
    Zh,
    /// Japanese, in romaji.
    Ja,
    /// Hungarian.
    Hu,
    /// Korean, romanised.
    Ko,
    /// Hindi.
    Hi,
}

impl Language {
    /// Every language.
    pub const ALL: [Language; 17] = [
        Language::En,
        Language::De,
        Language::Fr,
        Language::Es,
        Language::It,
        Language::Pt,
        Language::Pl,
        Language::Tr,
        Language::Ru,
        Language::Cs,
        Language::Nl,
        Language::Ar,
        Language::Zh,
        Language::Ja,
        Language::Hu,
        Language::Ko,
        Language::Hi,
    ];

    /// ISO 639-1.
    pub const fn code(self) -> &'static str {
        match self {
            Language::En => "en",
            Language::De => "de",
            Language::Fr => "fr",
            Language::Es => "es",
            Language::It => "it",
            Language::Pt => "pt",
            Language::Pl => "pl",
            Language::Tr => "tr",
            Language::Ru => "ru",
            Language::Cs => "cs",
            Language::Nl => "nl",
            Language::Ar => "ar",
            Language::Zh => "zh",
            Language::Ja => "ja",
            Language::Hu => "hu",
            Language::Ko => "ko",
            Language::Hi => "hi",
        }
    }

    /// The token that a line begins with.
    pub fn token(self) -> String {
        match self {
            Language::Zh => "[zh-cn]".into(),
            other => format!("[{other}]"),
        }
    }

    /// Text as the tokenizer takes it. English is exact; see the [module](self) for the others.
    pub fn clean(self, text: &str) -> String {
        match self {
            Language::En => english::clean(text),
            // Neither has its quotes taken out.
            Language::Ja | Language::Hi => with_single_blanks(&text.to_lowercase()),
            // The dotted capital would leave its dot behind.
            Language::Tr => with_single_blanks(&text.replace('"', "").replace('İ', "i").to_lowercase()),
            _ => with_single_blanks(&text.replace('"', "").to_lowercase()),
        }
    }

    /// What the original would have written in words of this language, in clean text.
    fn unwritten(self, clean: &str) -> String {
        const SYMBOLS: &str = "&@%#$£€°";
        let mut found = String::new();
        let mut before = ' ';
        for c in clean.chars() {
            let is_unwritten = match self {
                // The original leaves them to its romanisation, or as they are.
                Language::En | Language::Ja | Language::Hi => false,
                // The digit of a tone.
                Language::Zh if before.is_alphabetic() && ('1'..='5').contains(&c) => false,
                _ => c.is_ascii_digit() || SYMBOLS.contains(c),
            };
            if is_unwritten && !found.contains(c) {
                found.push(c);
            }
            before = c;
        }
        found
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.code())
    }
}

impl FromStr for Language {
    type Err = String;
    fn from_str(text: &str) -> Result<Language, String> {
        let found = Language::ALL.into_iter().find(|language| language.code() == text);
        let found = found.or_else(|| (text == "zh-cn").then_some(Language::Zh));
        let codes = Language::ALL.map(Language::code).join(", ");
        found.ok_or_else(|| format!("found {text}, needed one of {codes}"))
    }
}

/// What is sung.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lyrics {
    /// Line by line, blank ones among them. Without lines, the music is instrumental.
    pub lines: Vec<Line>,
}

/// A line of lyrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its number in the text, from 1, by which notes and errors name it.
    pub number: usize,
    /// What is sung, or a tag of the structure such as `[chorus]`. Nothing in a blank line.
    pub text: String,
    /// The language. A line that begins with a tag is read as English.
    pub language: Language,
}

impl Lyrics {
    /// Reads text in the syntax of the [module](self). Lines that name no language are in `language`.
    pub fn parse(text: &str, mut language: Language) -> Lyrics {
        let mut lines = Vec::new();
        if text.is_empty() {
            return Lyrics { lines };
        }
        for (index, text) in text.split('\n').enumerate() {
            let (number, text) = (index + 1, text.trim_matches(is_blank));
            let named = text.strip_prefix('[').and_then(|text| text.split_once(']'));
            match named.and_then(|(code, text)| Some((code.parse::<Language>().ok()?, text))) {
                Some((named, "")) => language = named,
                Some((language, text)) => {
                    lines.push(Line { number, text: text.trim_start_matches(is_blank).into(), language });
                }
                None => lines.push(Line { number, text: text.into(), language }),
            }
        }
        Lyrics { lines }
    }
}

/// Something about lyrics that the user may want to write otherwise, with the [number](Line::number) of its line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "note")]
pub enum Note {
    /// A line in brackets that is none of the [`TAGS`].
    Tag {
        /// Where.
        line: usize,
        /// The tag.
        found: String,
    },
    /// Digits or symbols that the original writes out in the line's language.
    Unwritten {
        /// Where.
        line: usize,
        /// The line's language.
        language: Language,
        /// The characters.
        found: String,
    },
    /// Characters that the vocabulary does not have: the model is told that there is something unknown.
    Unknown {
        /// Where.
        line: usize,
        /// The characters.
        found: String,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::Tag { line, found } => {
                let known = TAGS.map(|tag| format!("[{tag}]")).join(" ");
                write!(f, "line {line}: {found} is no tag that the model knows, which are {known}")
            }
            Note::Unwritten { line, language, found } => {
                write!(f, "line {line}: write out {found} in words ({language})")
            }
            Note::Unknown { line, found } => {
                write!(f, "line {line}: the vocabulary does not have {found}")
            }
        }
    }
}

/// Lyrics as ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// Which of them the model attends to: all, and none where there are no lyrics.
    pub mask: Vec<bool>,
    /// What the user may want to write otherwise.
    pub notes: Vec<Note>,
}

/// The tokenizer of lyrics: byte pairs of cleaned text (`vocab.json` of `acestep/models/lyrics_utils`).
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: PathBuf,
    tokenizer: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads the vocabulary, a file of the original repository and not of the checkpoint.
    ///
    /// # Errors
    /// [`Error::Component`] where it cannot be read, is no tokenizer, or lacks the tokens that songs are made of.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let refuse = |reason: String| Error::Component { path: path.into(), reason };
        let json = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(|error| refuse(error.to_string()))?;
        let fixed = [("[UNK]", UNKNOWN), ("[SPACE]", SPACE), ("[START]", START)];
        for (token, needed) in fixed {
            let found = tokenizer.token_to_id(token);
            if found != Some(needed) {
                let found = found.map_or("none".into(), |id| id.to_string());
                return Err(refuse(format!("the id of {token}: found {found}, needed {needed}")));
            }
        }
        let tags = TAGS.map(|tag| format!("[{tag}]"));
        for token in tags.into_iter().chain(Language::ALL.map(Language::token)) {
            if tokenizer.token_to_id(&token).is_none() {
                return Err(refuse(format!("found no {token}, needed one of ACE-Step's vocabulary")));
            }
        }
        Ok(Tokenizer { path: path.into(), tokenizer })
    }

    /// Number of ids, which is the number of rows of the transformer's `lyric_embs`.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The ids of [clean](Language::clean) text.
    ///
    /// # Errors
    /// [`Error::Component`] where the vocabulary cannot be applied.
    pub fn encode_clean(&self, clean: &str, language: Language) -> Result<Vec<u32>> {
        let text = format!("{}{clean}", language.token()).replace(' ', "[SPACE]");
        let encoding = self.tokenizer.encode(text, true).map_err(|error| Error::Component {
            path: self.path.clone(),
            reason: format!("{clean:?}: {error}"),
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A song: a start, each line with an end. Without lines it is a single id that is masked.
    ///
    /// # Errors
    /// [`Error::Lyrics`] for characters of Chinese, Japanese or Korean, which have to be romanised.
    pub fn encode(&self, lyrics: &Lyrics) -> Result<Encoded> {
        if lyrics.lines.is_empty() {
            return Ok(Encoded { ids: vec![0], mask: vec![false], notes: Vec::new() });
        }
        let mut ids = vec![START];
        let mut notes = Vec::new();
        for line in &lyrics.lines {
            let (number, text) = (line.number, line.text.trim_matches(is_blank));
            let tag = leading_tag(text);
            if let Some((found, needed)) = unromanised(text) {
                let needed = if tag.is_some() { "a tag such as [verse] or [chorus]" } else { needed };
                return Err(Error::Lyrics { line: number, found, needed });
            }
            if !text.is_empty() {
                let language = if tag.is_some() { Language::En } else { line.language };
                let clean = language.clean(text);
                let of_line = self.encode_clean(&clean, language)?;
                if let Some(tag) = tag.filter(|tag| !TAGS.contains(&tag.to_lowercase().as_str())) {
                    notes.push(Note::Tag { line: number, found: format!("[{tag}]") });
                }
                // The brackets of a tag that is none are no further news.
                let sung = tag.and_then(|_| clean.split_once(']')).map_or(clean.as_str(), |(_, sung)| sung);
                let found = language.unwritten(sung);
                if !found.is_empty() {
                    notes.push(Note::Unwritten { line: number, language, found });
                }
                let found = self.unknown(sung);
                if !found.is_empty() && of_line.contains(&UNKNOWN) {
                    notes.push(Note::Unknown { line: number, found });
                }
                ids.extend(of_line);
            }
            ids.push(SPACE);
        }
        let mask = vec![true; ids.len()];
        Ok(Encoded { ids, mask, notes })
    }

    /// The characters of clean text that have no ids.
    fn unknown(&self, clean: &str) -> String {
        let mut found = String::new();
        for c in clean.chars().filter(|&c| c != ' ') {
            let is_known = self.tokenizer.token_to_id(c.encode_utf8(&mut [0; 4])).is_some();
            if !is_known && !found.contains(c) {
                found.push(c);
            }
        }
        found
    }
}

/// What stands in brackets at the beginning of a line.
fn leading_tag(text: &str) -> Option<&str> {
    Some(text.strip_prefix('[')?.split_once(']')?.0)
}

/// White space as Python knows it.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Words with a single blank between them.
fn with_single_blanks(text: &str) -> String {
    text.split(is_blank).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Characters of a script that the original romanises, and what to write instead.
fn unromanised(text: &str) -> Option<(String, &'static str)> {
    const PINYIN: &str = "pinyin with tone digits as zh, such as ni3hao3, or romaji as ja";
    const ROMAJI: &str = "romaji as ja, such as sakura";
    const KOREAN: &str = "Korean in Latin letters as ko, such as salanghae-yo";
    let needed = |c: char| match c {
        // The middle dot between names is punctuation.
        '\u{30fb}' => None,
        '\u{3041}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' | '\u{ff66}'..='\u{ff9f}' => Some(ROMAJI),
        '\u{3005}' | '\u{3007}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' => Some(PINYIN),
        '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}' => Some(PINYIN),
        '\u{1100}'..='\u{11ff}' | '\u{3130}'..='\u{318f}' | '\u{a960}'..='\u{a97f}' => Some(KOREAN),
        '\u{ac00}'..='\u{d7ff}' => Some(KOREAN),
        _ => None,
    };
    let kinds: Vec<_> = text.chars().filter_map(needed).collect();
    // Kana among Han make it Japanese.
    let needed_of_text = if kinds.contains(&ROMAJI) { ROMAJI } else { *kinds.first()? };
    let found = text.chars().filter(|&c| needed(c).is_some()).take(8).collect();
    Some((found, needed_of_text))
}
