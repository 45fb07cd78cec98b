//! JSON objects with any values under the keys that the readers know.

use std::collections::BTreeMap;

use arbitrary::Arbitrary;

/// A change to an object.
#[derive(Arbitrary, Debug)]
pub(crate) enum Edit {
    Set(u8, Literal),
    Remove(u8),
    Duplicate(u8, Literal),
    Unknown(String, Literal),
}

#[derive(Arbitrary, Debug)]
pub(crate) enum Literal {
    Integer(i32),
    Wide(u64),
    Real(f64),
    Known(u8),
    Text(String),
}

const KNOWN: [&str; 28] = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "0",
    "-0",
    "1",
    "4",
    "32",
    "64",
    "0.5",
    "1.7",
    "1e-5",
    "1e400",
    "-1e400",
    "1e-400",
    "4294967295",
    "4294967296",
    "18446744073709551616",
    "NaN",
    "1.0",
    "4.0",
    "\"yarn\"",
    "\"silu\"",
    "[\"sliding_attention\"]",
    "[\"sliding_attention\",\"full_attention\"]",
    "\"\\ud800\"",
];

impl Literal {
    fn text(&self) -> String {
        match self {
            Literal::Integer(value) => value.to_string(),
            Literal::Wide(value) => value.to_string(),
            Literal::Real(value) => format!("{value:e}"),
            Literal::Known(index) => KNOWN[usize::from(*index) % KNOWN.len()].into(),
            Literal::Text(text) => quoted(text),
        }
    }
}

/// An object as keys (`object.key` for what lies in another) and the text of their values.
#[derive(Clone, Debug)]
pub(crate) struct Object(Vec<(String, String)>);

impl Object {
    pub(crate) fn new<'a>(entries: impl IntoIterator<Item = (&'a str, &'a str)>) -> Object {
        Object(entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }

    pub(crate) fn edit(&mut self, keys: &[&str], edits: &[Edit]) {
        let key = |index: &u8| keys[usize::from(*index) % keys.len()].to_owned();
        for edit in edits {
            match edit {
                Edit::Set(index, value) => {
                    let key = key(index);
                    match self.0.iter_mut().find(|(known, _)| *known == key) {
                        Some(entry) => entry.1 = value.text(),
                        None => self.0.push((key, value.text())),
                    }
                }
                Edit::Remove(index) => self.0.retain(|(known, _)| *known != key(index)),
                Edit::Duplicate(index, value) => self.0.push((key(index), value.text())),
                Edit::Unknown(key, value) => self.0.push((key.clone(), value.text())),
            }
        }
    }

    /// Its JSON.
    pub(crate) fn text(&self) -> String {
        let mut root = Vec::new();
        let mut nested: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (key, value) in &self.0 {
            match key.split_once('.') {
                Some((object, key)) => {
                    nested.entry(object).or_default().push(format!("{}:{value}", quoted(key)))
                }
                None => root.push(format!("{}:{value}", quoted(key))),
            }
        }
        root.extend(nested.iter().map(|(key, entries)| format!("{}:{{{}}}", quoted(key), entries.join(","))));
        format!("{{{}}}", root.join(","))
    }
}

pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
