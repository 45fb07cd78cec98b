//! Which conversations can be rendered, and which messages a prompt holds.

use openai_harmony::chat::{Content, DeveloperContent, Message, Role, ToolDescription};
use serde_json::Value;

use super::error::{Error, Result};

/// The channels that GPT-OSS was trained on.
pub const CHANNELS: [&str; 3] = ["analysis", "commentary", "final"];

/// Longest run of letters, of white space or of other characters in the text of a system or developer message;
/// openai-harmony takes quadratic time for such runs and panics at a million spaces.
const MAX_RUN: usize = 20_000;

/// The messages that the next prompt holds: analysis that a final answer follows is left out.
pub(super) fn current(messages: &[Message]) -> impl Iterator<Item = &Message> {
    let answered = last_final(messages.iter());
    messages
        .iter()
        .enumerate()
        .filter(move |(index, message)| !is_dropped(message, *index, answered))
        .map(|it| it.1)
}

/// The index of the last final answer.
pub(super) fn last_final<'a>(
    messages: impl DoubleEndedIterator<Item = &'a Message> + ExactSizeIterator,
) -> usize {
    messages.enumerate().rfind(|(_, message)| is_final(message)).map_or(0, |(index, _)| index)
}

/// Whether a message before the last final answer is not said again.
pub(super) fn is_dropped(message: &Message, index: usize, last_final: usize) -> bool {
    index < last_final && message.channel.as_deref() == Some("analysis")
}

fn is_final(message: &Message) -> bool {
    message.author.role == Role::Assistant && message.channel.as_deref() == Some("final")
}

/// Whether a recipient is a tool, so that a message to it is a call.
pub(super) fn is_tool(recipient: &str) -> bool {
    !recipient.is_empty() && recipient != "all" && Role::try_from(recipient).is_err()
}

/// Refuses a message that would be rendered as something else than a message.
pub(super) fn check(index: usize, message: &Message) -> Result<()> {
    let error = |field, found: String, needed| Err(Error::Message { index, field, found, needed });
    let author = &message.author;
    if author.role == Role::Tool {
        match author.name.as_deref() {
            None => return error("author", "a tool without a name".into(), "the tool's name"),
            // It stands where the role stands.
            Some(name) if !is_tool(name) => {
                return error("author", format!("a tool named {name:?}"), "a name that is no role");
            }
            Some(_) => {}
        }
    }
    let fields = [("author", &author.name), ("recipient", &message.recipient), ("channel", &message.channel)];
    for (field, value) in fields {
        if let Some(value) = value.as_deref().filter(|value| !is_word(value)) {
            return error(field, format!("{value:?}"), "a word without white space and without <|");
        }
    }
    if let Some(content_type) = &message.content_type {
        let rest = content_type.strip_prefix("<|constrain|>").unwrap_or(content_type);
        if !is_word(rest.strip_prefix(' ').unwrap_or(rest)) {
            return error(
                "content type",
                format!("{content_type:?}"),
                "a word such as json, or <|constrain|>json",
            );
        }
    }
    for content in &message.content {
        let value = match content {
            Content::Text(_) if message.content.iter().all(|it| matches!(it, Content::Text(_))) => continue,
            Content::SystemContent(_) if author.role != Role::System => {
                return error("content", format!("system content of {}", author.role), "the role system");
            }
            Content::DeveloperContent(_) if author.role != Role::Developer => {
                return error(
                    "content",
                    format!("developer content of {}", author.role),
                    "the role developer",
                );
            }
            Content::DeveloperContent(content) if let Some((found, needed)) = unfit_tool(content) => {
                return error("tools", found, needed);
            }
            content => serde_json::to_value(content).map_err(|error| Error::Library(error.to_string()))?,
        };
        if let Some(run) = longest_run(&value).filter(|&run| run > MAX_RUN) {
            return error(
                "content",
                format!("{run} characters without a break"),
                "at most 20,000 letters, spaces or other characters in a row",
            );
        }
    }
    Ok(())
}

/// The first tool that could not be described or called: what it is, and what would do.
fn unfit_tool(content: &DeveloperContent) -> Option<(String, &'static str)> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    for (_, namespace) in content.tools.iter().flatten() {
        for (index, ToolDescription { name, parameters, .. }) in namespace.tools.iter().enumerate() {
            if name.is_empty() || !name.chars().all(is_name) {
                return Some((format!("a function named {name:?}"), "a name of letters, digits, _ and -"));
            }
            if namespace.tools[..index].iter().any(|other| other.name == *name) {
                return Some((format!("two functions named {name}"), "different names"));
            }
            if parameters.as_ref().is_some_and(|schema| !schema.is_object()) {
                let found = format!("parameters of {name} that are no object");
                return Some((found, "a JSON schema of an object, or none"));
            }
        }
    }
    None
}

/// Whether a part of a header stays one part.
pub(super) fn is_word(value: &str) -> bool {
    !value.is_empty()
        && !value.contains("<|")
        && !value.contains(|c: char| c.is_whitespace() || c.is_control())
}

/// The longest run of characters of one kind in any string of a value.
fn longest_run(value: &Value) -> Option<usize> {
    match value {
        Value::String(text) => {
            let kinds: Vec<_> = text.chars().map(|c| (c.is_whitespace(), c.is_alphabetic())).collect();
            kinds.chunk_by(|a, b| a == b).map(<[_]>::len).max()
        }
        Value::Array(values) => values.iter().filter_map(longest_run).max(),
        Value::Object(values) => {
            values.iter().filter_map(|(key, value)| longest_run(value).max(Some(key.len()))).max()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}
