//! A vocabulary as a JSON file, for models whose vocabulary is not o200k's.
//!
//! ```json
//! { "regex": "…", "special_uuids": ["00000000-0000-…", …], "tokens": ["IQ==", …] }
//! ```
//! Tokens are base64, in rank order; UUIDs are in the order of ids, zero for a reserved slot.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use super::Vocabulary;
use crate::model_bin::header::Uuid;
use crate::violation::{Error, Result};

/// The name of the file in a checkpoint folder.
pub const FILE_NAME: &str = "vocabulary.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    regex: String,
    special_uuids: Vec<String>,
    tokens: Vec<String>,
}

impl Vocabulary {
    /// The vocabulary as the JSON of this module.
    pub fn to_json(&self) -> serde_json::Value {
        let tokens = self.tokens().flatten().map(|token| BASE64_STANDARD.encode(token)).collect::<Vec<_>>();
        let special_uuids = self.special_uuids.iter().map(Uuid::to_string).collect::<Vec<_>>();
        serde_json::json!({ "regex": self.regex, "special_uuids": special_uuids, "tokens": tokens })
    }

    /// Reads the JSON of this module.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Unsupported`] that names the entry which cannot be read.
    pub fn load(path: &Path) -> Result<Vocabulary> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let wrong = |what: String| Error::Unsupported(format!("{}: {what}", path.display()));
        let stored: Stored = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let special_uuids = stored.special_uuids.iter().map(|uuid| {
            let parsed =
                uuid::Uuid::parse_str(uuid).map_err(|error| wrong(format!("UUID \"{uuid}\": {error}")))?;
            Ok(Uuid(parsed.into_bytes()))
        });
        let special_uuids = special_uuids.collect::<Result<_>>()?;
        let mut records = Vec::new();
        for (id, token) in stored.tokens.iter().enumerate() {
            let bytes =
                BASE64_STANDARD.decode(token).map_err(|error| wrong(format!("token {id}: {error}")))?;
            let length = u16::try_from(bytes.len())
                .map_err(|_| wrong(format!("token {id} is longer than 65535 bytes")))?;
            records.extend(length.to_le_bytes());
            records.extend(bytes);
        }
        let num_text_tokens =
            u32::try_from(stored.tokens.len()).map_err(|_| wrong("more than 2^32 − 1 tokens".into()))?;
        Ok(Vocabulary { special_uuids, regex: stored.regex, records, num_text_tokens })
    }
}
