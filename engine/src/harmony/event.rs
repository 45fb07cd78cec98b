//! What the parser tells.

use std::fmt;

use openai_harmony::chat::{Author, Message, Role};
use serde::Serialize;

use super::conversation;

/// Something that happened while tokens were parsed.
///
/// As JSON, an object whose `event` is `start`, `delta`, `end` or `notice`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A message begins; its header is complete.
    Start(Header),
    /// More of its content.
    Delta {
        /// Whole characters, never empty.
        text: String,
    },
    /// The message is complete, or as complete as it gets.
    End {
        /// How it ended.
        ending: Ending,
    },
    /// Something was malformed; what could be understood was.
    Notice(Notice),
}

/// The header of a message.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Header {
    /// Who wrote it.
    pub role: Role,
    /// The tool's name; rarely, that of a user or an assistant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `analysis`, `commentary` or `final`; anything else comes with a notice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// Whom it is for: the tool that is called, or `assistant` in a tool's result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<String>,
    /// `<|constrain|>json`, or a word such as `code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
}

impl Header {
    /// Whether the message calls a tool.
    pub fn is_call(&self) -> bool {
        self.role == Role::Assistant && self.recipient.as_deref().is_some_and(conversation::is_tool)
    }

    pub(super) fn into_message(self, text: String) -> Message {
        let mut message = Message::from_author_and_content(Author { role: self.role, name: self.name }, text);
        message.channel = self.channel;
        message.recipient = self.recipient;
        message.content_type = self.content_type;
        message
    }
}

/// How a message ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// `<|end|>`
    End,
    /// `<|return|>`: and so did the turn.
    Return,
    /// `<|call|>`: a tool's turn.
    Call,
    /// Not at all: the next message began.
    Missing,
    /// Not at all: the stream ended.
    Cut,
}

impl Ending {
    /// The token's name, nothing where there is none.
    pub fn as_str(self) -> &'static str {
        match self {
            Ending::End => "<|end|>",
            Ending::Return => "<|return|>",
            Ending::Call => "<|call|>",
            Ending::Missing | Ending::Cut => "",
        }
    }
}

/// Something malformed, and where.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Notice {
    /// Index among the parser's tokens of the token at which it showed; their number where it showed at the end.
    pub at: usize,
    /// What it is.
    #[serde(flatten)]
    pub problem: Problem,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "token {}: {}", self.at, self.problem)
    }
}

/// What was malformed, and how it was understood.
///
/// As JSON, fields of the notice, of which `problem` is the name of the variant in snake case.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "problem", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Problem {
    /// A message begins without `<|start|>`.
    MissingStart,
    /// `<|start|>` with nothing behind it but the next one. The latter counts.
    RepeatedStart,
    /// A message or the next header begins before the end of this message, which ends here.
    MissingEnd,
    /// No `<|message|>` between header and content. What is no header is content.
    MissingMessage,
    /// The header names no role. It is the assistant's.
    MissingRole,
    /// The header names this instead of a role. It is the assistant's.
    UnknownRole {
        /// What stands there.
        found: String,
    },
    /// The role twice. Once counts.
    RepeatedRole,
    /// A message of somebody whose turn it is not, so the model invents it.
    ForeignRole {
        /// Whose it says it is.
        role: Role,
    },
    /// A message of the assistant without a channel.
    MissingChannel,
    /// A channel without `<|channel|>` in front of it. It counts.
    MissingChannelToken,
    /// A channel that GPT-OSS was not trained on. It counts.
    UnknownChannel {
        /// Its name.
        found: String,
    },
    /// A second channel. The last counts.
    RepeatedChannel {
        /// The one before.
        dropped: String,
    },
    /// `to=` with nothing behind it.
    EmptyRecipient,
    /// A recipient without `to=`. It counts.
    BareRecipient,
    /// A second recipient. The last counts.
    RepeatedRecipient {
        /// The one before.
        dropped: String,
    },
    /// A recipient or an author with characters that no name has. It does not count in later prompts.
    UnfitName {
        /// The name.
        found: String,
    },
    /// `<|constrain|>` with nothing behind it.
    EmptyContentType,
    /// A special token of the header spelled as text. It counts.
    SpelledToken {
        /// Its name.
        token: String,
    },
    /// Text in a header or between messages that means nothing there. It belongs to no message.
    StrayText {
        /// The text; only its beginning where it follows the end of a turn.
        text: String,
    },
    /// A special token, or an id that is no token, where it means nothing. It belongs to no message.
    StrayToken {
        /// The id.
        token: u32,
    },
    /// Content that is no UTF-8 has U+FFFD in its place.
    InvalidUtf8,
    /// A call that does not end with `<|call|>`. It is a call all the same.
    CallWithoutCallToken,
    /// `<|call|>` at the end of a message without a tool as recipient.
    CallWithoutRecipient,
    /// The stream ended within a message.
    Truncated,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::MissingStart => f.write_str("a message without <|start|>"),
            Problem::RepeatedStart => f.write_str("<|start|> twice, counted once"),
            Problem::MissingEnd => f.write_str("the next message begins before the end of this one"),
            Problem::MissingMessage => f.write_str("no <|message|> before the content"),
            Problem::MissingRole => f.write_str("a header without a role, taken as the assistant's"),
            Problem::UnknownRole { found } => write!(f, "{found:?} is no role, taken as the assistant's"),
            Problem::RepeatedRole => f.write_str("the role twice, counted once"),
            Problem::ForeignRole { role } => write!(f, "the model wrote a message of the role {role}"),
            Problem::MissingChannel => f.write_str("no channel"),
            Problem::MissingChannelToken => f.write_str("a channel without <|channel|>, counted"),
            Problem::UnknownChannel { found } => write!(f, "unknown channel {found:?}"),
            Problem::RepeatedChannel { dropped } => write!(f, "a second channel, instead of {dropped:?}"),
            Problem::EmptyRecipient => f.write_str("to= without a recipient"),
            Problem::BareRecipient => f.write_str("a recipient without to=, counted"),
            Problem::RepeatedRecipient { dropped } => {
                write!(f, "a second recipient, instead of {dropped:?}")
            }
            Problem::UnfitName { found } => write!(f, "{found:?} is no name, left out"),
            Problem::EmptyContentType => f.write_str("<|constrain|> without a content type"),
            Problem::SpelledToken { token } => write!(f, "{token} spelled as text, counted"),
            Problem::StrayText { text } => write!(f, "stray text {text:?}, left out"),
            Problem::StrayToken { token } => write!(f, "stray token {token}, left out"),
            Problem::InvalidUtf8 => f.write_str("content that is no UTF-8, replaced by U+FFFD"),
            Problem::CallWithoutCallToken => f.write_str("a tool call that does not end with <|call|>"),
            Problem::CallWithoutRecipient => f.write_str("<|call|> without a tool to call"),
            Problem::Truncated => f.write_str("the stream ended within a message"),
        }
    }
}
