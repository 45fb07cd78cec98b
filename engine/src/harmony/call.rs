//! Tool calls.

use openai_harmony::chat::{Content, Message, Role};
use serde::Serialize;
use serde_json::{Map, Value};

use super::conversation::is_tool;

/// A call of a tool by the assistant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    /// The tool as the model names it, `functions.get_weather`.
    pub recipient: String,
    /// The channel of the call, which is that of its result: `commentary` for functions, `analysis` for the tools
    /// `browser` and `python`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    /// `<|constrain|>json`, `code` or the like, where the model says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The arguments, as the model wrote them.
    pub arguments: String,
}

/// Why arguments are no JSON.
#[derive(Debug, thiserror::Error)]
#[error("the arguments of {recipient} are no JSON: {source}; tell the model so in the tool's result")]
pub struct ArgumentsError {
    /// The tool.
    pub recipient: String,
    /// Where and why.
    pub source: serde_json::Error,
}

impl ToolCall {
    /// The call that a message is, if it is one.
    pub fn from_message(message: &Message) -> Option<ToolCall> {
        let recipient = message.recipient.as_deref().filter(|recipient| is_tool(recipient))?;
        (message.author.role == Role::Assistant).then(|| ToolCall {
            recipient: recipient.into(),
            channel: message.channel.clone(),
            content_type: message.content_type.clone(),
            arguments: text(message).into(),
        })
    }

    /// The tool's name without the namespace `functions`.
    pub fn name(&self) -> &str {
        self.recipient.strip_prefix("functions.").unwrap_or(&self.recipient)
    }

    /// The arguments as JSON; no arguments are an empty object.
    ///
    /// # Errors
    /// Arguments that are no JSON: broken, or the code of a call to `python`.
    pub fn json(&self) -> Result<Value, ArgumentsError> {
        if self.arguments.trim().is_empty() {
            return Ok(Value::Object(Map::new()));
        }
        serde_json::from_str(&self.arguments)
            .map_err(|source| ArgumentsError { recipient: self.recipient.clone(), source })
    }
}

/// The first text of a message: all of it, in a message that was parsed.
pub(super) fn text(message: &Message) -> &str {
    message
        .content
        .iter()
        .find_map(|content| match content {
            Content::Text(text) => Some(text.text.as_str()),
            Content::SystemContent(_) | Content::DeveloperContent(_) => None,
        })
        .unwrap_or_default()
}
