//! English lyrics as the model was trained on them: lower case, with numbers, abbreviations and symbols in words
//! (`acestep/models/lyrics_utils/lyric_tokenizer.py`).

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::numbers::{self, Currency};
use super::with_single_blanks;

/// Abbreviations that end in a dot, in the order in which they are replaced.
const ABBREVIATIONS: [(&str, &str); 18] = [
    ("mrs", "misess"),
    ("mr", "mister"),
    ("dr", "doctor"),
    ("st", "saint"),
    ("co", "company"),
    ("jr", "junior"),
    ("maj", "major"),
    ("gen", "general"),
    ("drs", "doctors"),
    ("rev", "reverend"),
    ("lt", "lieutenant"),
    ("hon", "honorable"),
    ("sgt", "sergeant"),
    ("capt", "captain"),
    ("esq", "esquire"),
    ("ltd", "limited"),
    ("col", "colonel"),
    ("ft", "fort"),
];

/// Symbols, which become words of their own.
const SYMBOLS: [(char, &str); 7] = [
    ('&', " and "),
    ('@', " at "),
    ('%', " percent "),
    ('#', " hash "),
    ('$', " dollar "),
    ('£', " pound "),
    ('°', " degree "),
];

/// The patterns of the original.
struct Patterns {
    with_commas: Regex,
    currencies: [(Currency, Regex); 3],
    decimal: Regex,
    ordinal: Regex,
    digits: Regex,
    abbreviations: Vec<(Regex, &'static str)>,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    let pattern = |pattern: &str| Regex::new(pattern).expect("the patterns are constants");
    let currency = |sign: &str| pattern(&format!("{sign}[0-9.,]*[0-9]+|[0-9.,]*[0-9]+{sign}"));
    Patterns {
        with_commas: pattern(r"\b\d{1,3}(,\d{3})*(\.\d+)?\b"),
        currencies: [
            (Currency::Pound, currency("£")),
            (Currency::Dollar, currency(r"\$")),
            (Currency::Euro, currency("€")),
        ],
        decimal: pattern("[0-9]+[.,][0-9]+"),
        ordinal: pattern("[0-9]+(st|nd|rd|th)"),
        digits: pattern("[0-9]+"),
        abbreviations: ABBREVIATIONS
            .iter()
            .map(|(short, long)| (pattern(&format!(r"(?i)\b{short}\.")), *long))
            .collect(),
    }
});

/// A line as the tokenizer takes it.
pub fn clean(text: &str) -> String {
    let mut text = text.replace('"', "").to_lowercase();
    // Numbers that have no words leave all of them as they are.
    text = numbers_in_words(&text).unwrap_or(text);
    for (pattern, long) in &PATTERNS.abbreviations {
        text = pattern.replace_all(&text, *long).into_owned();
    }
    for (symbol, word) in SYMBOLS {
        text = text.replace(symbol, word);
    }
    with_single_blanks(&text)
}

/// Every number in words; `None` where one has none.
fn numbers_in_words(text: &str) -> Option<String> {
    let patterns = &*PATTERNS;
    let mut text = replaced(text, &patterns.with_commas, |number| Some(number.replace(',', "")))?;
    for (currency, pattern) in &patterns.currencies {
        match replaced(&text, pattern, |amount| amount_in_words(amount, *currency)) {
            Some(spoken) => text = spoken,
            // An amount such as $1.2.3 ends the search for amounts, and only that.
            None => break,
        }
    }
    let text = replaced(&text, &patterns.decimal, |number| {
        numbers::decimal(number.replace(',', ".").parse().ok()?)
    })?;
    let text = replaced(&text, &patterns.ordinal, |number| {
        numbers::ordinal(number.trim_end_matches(|c: char| c.is_ascii_alphabetic()))
    })?;
    replaced(&text, &patterns.digits, numbers::cardinal)
}

/// An amount with the sign of its currency; whole amounts are said without hundredths.
fn amount_in_words(amount: &str, currency: Currency) -> Option<String> {
    let digits = amount.replace(',', ".").replace(|c: char| !c.is_ascii_digit() && c != '.', "");
    let amount: f64 = digits.parse().ok()?;
    let words = numbers::currency(amount, currency)?;
    let units = words.rfind(", ").filter(|_| amount.fract() == 0.0);
    Some(units.map_or(words.as_str(), |end| &words[..end]).to_owned())
}

/// Every match in other words, or `None` where one of them has none.
fn replaced(text: &str, pattern: &Regex, words: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut end = 0;
    for found in pattern.find_iter(text) {
        let found = found.ok()?;
        out.push_str(&text[end..found.start()]);
        out.push_str(&words(found.as_str())?);
        end = found.end();
    }
    out.push_str(&text[end..]);
    Some(out)
}
