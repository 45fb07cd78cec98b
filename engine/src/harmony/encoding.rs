//! Conversations to tokens.

use std::sync::{Arc, Mutex, PoisonError};

use formats::tokenizer::Tokenizer;
use formats::vocabulary::{O200K_REGEX, Vocabulary};
use openai_harmony::chat::{Content, Conversation, Message, Role};
use openai_harmony::{HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding};

use super::conversation;
use super::error::{Error, Result};
use super::parser::{StreamParser, Turn};
use super::{token, vocabulary_file};

/// Renders conversations to tokens and parses tokens to messages, with the vocabulary o200k_harmony.
///
/// Cloning is cheap, and all encodings of a process share one copy of the tables.
///
/// ```
/// use engine::harmony::{Conversation, Encoding, Message, Role, SystemContent};
/// use formats::vocabulary::Vocabulary;
///
/// let encoding = Encoding::new(Vocabulary::o200k())?; // or that of a model.bin
/// let conversation = Conversation::from_messages([
///     Message::from_role_and_content(Role::System, SystemContent::new()),
///     Message::from_role_and_content(Role::User, "What is 2 + 2?"),
/// ]);
/// let prompt = encoding.render_for_completion(&conversation)?;
/// assert!(encoding.decode(&prompt).ends_with("<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"));
/// # Ok::<(), engine::harmony::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Encoding {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Knows headers, the system message and the developer message.
    harmony: HarmonyEncoding,
    /// Encodes the text of all other messages, in O(n log n) time and without panics.
    tokenizer: Tokenizer,
    /// `<|start|>assistant`
    assistant: Vec<u32>,
}

/// There is one vocabulary, so one encoding.
static LOADED: Mutex<Option<Arc<Shared>>> = Mutex::new(None);

impl Encoding {
    /// The encoding for a model's vocabulary. The first call takes up to a second and writes the vocabulary's
    /// file where openai-harmony reads it (see [`super::private_cache`]). The network is never used: to be sure of that,
    /// it gives openai-harmony a base URL that nothing can be downloaded from, for the whole process.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] where the vocabulary is not exactly o200k_harmony; [`Error::File`] where the file cannot
    /// be put in its place, or another one stands in the folder that the environment names.
    pub fn new(vocabulary: &Vocabulary) -> Result<Encoding> {
        check(vocabulary).map_err(|difference| Error::Vocabulary { difference })?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match &*loaded {
            Some(shared) => Arc::clone(shared),
            None => Arc::clone(loaded.insert(Arc::new(Shared::load(vocabulary)?))),
        };
        Ok(Encoding { shared })
    }

    /// The tokens of a conversation as it stands: nothing is dropped, nothing is added.
    ///
    /// # Errors
    /// [`Error::Message`] for the first message that would not be one: a tool without a name, a channel with a space,
    /// system content under another role.
    pub fn render(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let messages = conversation.messages.iter().map(|message| (message, None));
        Ok(self.render_messages(messages)?.concat())
    }

    /// The prompt for the assistant's next message: the conversation without the reasoning of answered questions, and
    /// `<|start|>assistant`.
    ///
    /// What is in the analysis channel is dropped if a message in the final channel follows it, so a tool loop that
    /// still goes on keeps its reasoning. Source: "Handling reasoning output in subsequent sampling" of the format
    /// guide. (openai-harmony 0.0.8 on its own keeps the reasoning of all answers but the first, and in a tool loop
    /// that of all.)
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_for_completion(&self, conversation: &Conversation) -> Result<Vec<u32>> {
        let messages = conversation::current(&conversation.messages).map(|message| (message, None));
        let mut tokens = self.render_messages(messages)?.concat();
        tokens.extend(self.assistant());
        Ok(tokens)
    }

    /// Parses tokens that are there already; see [`StreamParser::new`] for `role`.
    pub fn parse(&self, tokens: &[u32], role: Option<Role>) -> Turn {
        let mut parser = StreamParser::new(self, role);
        for &token in tokens {
            parser.push(token);
        }
        parser.finish();
        parser.into_turn()
    }

    /// The tokens as text, special tokens by their names, U+FFFD for what is no text.
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.shared.tokenizer.decode_lossy(tokens)
    }

    /// The tokenizer, which knows nothing of messages.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.tokenizer
    }

    /// `<|start|>assistant`
    pub(super) fn assistant(&self) -> &[u32] {
        &self.shared.assistant
    }

    /// The bytes of a text token; none for a special token or an id outside the vocabulary.
    pub(super) fn text(&self, token: u32) -> Option<&[u8]> {
        (token < Vocabulary::o200k().num_text_tokens).then(|| self.shared.tokenizer.token(token)).flatten()
    }

    /// The tokens of each message, those that are given as they are.
    pub(super) fn render_messages<'a>(
        &self,
        messages: impl IntoIterator<Item = (&'a Message, Option<&'a [u32]>)>,
    ) -> Result<Vec<Vec<u32>>> {
        let messages: Vec<_> = messages.into_iter().collect();
        for (index, (message, _)) in messages.iter().enumerate() {
            conversation::check(index, message)?;
        }
        // The crate renders a system message according to the tools of the developer message, so it gets all of them;
        // but without plain text, which it takes quadratic time for.
        let hollow: Vec<Message> = messages.iter().map(|(message, _)| hollow(message)).collect();
        let rendered = self
            .shared
            .harmony
            .render_conversation(&hollow, None)
            .map_err(|error| Error::Library(format!("{error:#}")))?;
        // It never makes special tokens of text, so this is where messages begin.
        let parts: Vec<&[u32]> = rendered.chunk_by(|_, &next| next != token::START).collect();
        if parts.len() != messages.len() {
            return Err(Error::Library(format!("{} messages from {}", parts.len(), messages.len())));
        }
        let mut all = Vec::with_capacity(parts.len());
        for ((message, given), part) in messages.iter().zip(parts) {
            let tokens = match (given, plain(message), part.split_last()) {
                (Some(given), ..) => given.to_vec(),
                (None, Some(texts), Some((end, header))) => {
                    let mut tokens = header.to_vec();
                    for text in texts {
                        tokens.extend(self.shared.tokenizer.encode(text)?);
                    }
                    tokens.push(*end);
                    tokens
                }
                _ => part.to_vec(),
            };
            all.push(tokens);
        }
        Ok(all)
    }
}

impl Shared {
    fn load(vocabulary: &Vocabulary) -> Result<Shared> {
        let difference = |difference: String| Error::Vocabulary { difference };
        let tokenizer = Tokenizer::new(vocabulary).map_err(|error| difference(error.to_string()))?;
        let file = vocabulary.tiktoken_bytes().map_err(|error| difference(error.to_string()))?;
        vocabulary_file::provide(&file)?;
        let harmony = load_harmony_encoding(HarmonyEncodingName::HarmonyGptOss)
            .map_err(|error| Error::Library(format!("{error:#}")))?;
        // Somebody may have changed the file in between.
        let same = |id: u32, bytes: &[u8]| harmony.tokenizer().decode_bytes([id]).is_ok_and(|it| it == bytes);
        let texts = (0..).zip(vocabulary.tokens());
        let mut special = token::NAMES.iter();
        if !texts.into_iter().all(|(id, bytes)| bytes.is_ok_and(|bytes| same(id, bytes)))
            || !special.all(|&(id, name)| same(id, name.as_bytes()))
        {
            return Err(Error::Library("it loaded another vocabulary than the model's".into()));
        }
        let assistant = [&[token::START], &tokenizer.encode(Role::Assistant.as_str())?[..]].concat();
        Ok(Shared { harmony, tokenizer, assistant })
    }
}

/// What keeps a vocabulary from being o200k_harmony.
fn check(vocabulary: &Vocabulary) -> Result<(), String> {
    let o200k = Vocabulary::o200k();
    if vocabulary.num_text_tokens != o200k.num_text_tokens {
        return Err(format!(
            "{} text tokens, o200k has {}",
            vocabulary.num_text_tokens, o200k.num_text_tokens
        ));
    }
    if vocabulary.records != o200k.records {
        let differs = vocabulary.tokens().zip(o200k.tokens()).position(|(found, needed)| found != needed);
        return Err(match differs {
            Some(id) => format!("text token {id} has other bytes"),
            None => "its records are cut off or too many".into(),
        });
    }
    if vocabulary.regex != O200K_REGEX {
        return Err("another splitting pattern".into());
    }
    match token::NAMES.iter().find(|&&(id, name)| {
        !vocabulary.special_tokens().any(|(known, special)| known == id && special.name == name)
    }) {
        Some((id, name)) => Err(format!("token {id} is not {name}")),
        None => Ok(()),
    }
}

/// The texts of a message that has no other content.
fn plain(message: &Message) -> Option<Vec<&str>> {
    message
        .content
        .iter()
        .map(|content| match content {
            Content::Text(text) => Some(text.text.as_str()),
            Content::SystemContent(_) | Content::DeveloperContent(_) => None,
        })
        .collect()
}

/// A message whose plain text is left out.
fn hollow(message: &Message) -> Message {
    Message {
        author: message.author.clone(),
        recipient: message.recipient.clone(),
        content: if plain(message).is_some() { Vec::new() } else { message.content.clone() },
        channel: message.channel.clone(),
        content_type: message.content_type.clone(),
    }
}
