//! Conversations from flags and files.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use engine::harmony::{
    Chat, Conversation, DeveloperContent, Encoding, Message, ReasoningEffort, SystemContent,
};
use formats::output::Output;
use serde_json::Value;

use crate::options::read_text;
use crate::tools::Tools;

/// How long the model thinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Effort {
    /// Briefly.
    Low,
    /// As it deems right.
    Medium,
    /// Thoroughly.
    High,
}

impl From<Effort> for ReasoningEffort {
    fn from(effort: Effort) -> ReasoningEffort {
        match effort {
            Effort::Low => ReasoningEffort::Low,
            Effort::Medium => ReasoningEffort::Medium,
            Effort::High => ReasoningEffort::High,
        }
    }
}

/// What a conversation begins with.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Conversation")]
pub struct Opening {
    /// Reasoning effort.
    #[arg(long, value_enum, default_value = "medium")]
    pub reasoning: Effort,
    /// Who the model is, in the system message [default: Harmony's].
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Instructions, in the developer message.
    #[arg(long, value_name = "TEXT")]
    pub developer: Option<String>,
    /// Today's date, in the system message, such as 2026-11-23.
    #[arg(long, value_name = "DATE")]
    pub date: Option<String>,
    /// Function tools: a JSON file of descriptions, or `demo` for a built-in set that runs here.
    #[arg(long, value_name = "FILE", default_value = "none")]
    pub tools: String,
}

impl Opening {
    /// A chat in which nothing was said yet, and the tools of its developer message.
    pub fn chat(&self, encoding: &Encoding) -> Result<(Chat, Tools)> {
        let mut system = SystemContent::new().with_reasoning_effort(self.reasoning.into());
        if let Some(identity) = &self.system {
            system = system.with_model_identity(identity);
        }
        if let Some(date) = &self.date {
            system = system.with_conversation_start_date(date);
        }
        let mut chat = Chat::new(encoding);
        chat.set_system(system)?;
        let tools = Tools::named(&self.tools)?;
        if self.developer.is_some() || !tools.descriptions.is_empty() {
            chat.set_developer(developer(DeveloperContent::new(), self.developer.as_deref(), &tools))
                .context("--developer and --tools")?;
        }
        Ok((chat, tools))
    }
}

/// A developer message with these instructions, if any, and tools in place of those that it has.
pub fn developer(
    mut content: DeveloperContent,
    instructions: Option<&str>,
    tools: &Tools,
) -> DeveloperContent {
    if let Some(instructions) = instructions {
        content = content.with_instructions(instructions);
    }
    if let Some(namespaces) = &mut content.tools {
        namespaces.remove("functions");
    }
    if tools.descriptions.is_empty() {
        content.tools = content.tools.filter(|namespaces| !namespaces.is_empty());
        content
    } else {
        content.with_function_tools(tools.descriptions.clone())
    }
}

/// Reads a conversation as openai-harmony serialises it: an object with a list `messages`, or the list alone.
pub fn read(path: &Path) -> Result<Conversation> {
    let text = read_text(path)?;
    let name = path.display();
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{name} is no JSON"))?;
    let list = match value {
        Value::Object(mut object) => {
            object.remove("messages").with_context(|| format!("{name}: found no \"messages\""))?
        }
        value => value,
    };
    let messages: Vec<Message> = serde_json::from_value(list).with_context(|| {
        format!("{name}: needed a Harmony conversation, such as {{\"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}")
    })?;
    ensure!(!messages.is_empty(), "{name}: found no message, needed one at least");
    Ok(Conversation::from_messages(messages))
}

/// Writes a conversation; the file appears when it is complete.
pub fn write(path: &Path, conversation: &Conversation) -> Result<()> {
    let output = Output::create(path)?;
    let mut text = serde_json::to_string_pretty(conversation)?;
    text.push('\n');
    output.file().write_all(text.as_bytes()).with_context(|| path.display().to_string())?;
    output.finish()?;
    Ok(())
}
