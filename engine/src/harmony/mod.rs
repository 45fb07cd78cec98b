//! Harmony, the conversation format of GPT-OSS: messages to tokens and back.
//!
//! Source: OpenAI's format guide (`docs/format.md` of the crate openai-harmony 0.0.8, also
//! <https://cookbook.openai.com/articles/openai-harmony>).
//!
//! A message is `<|start|>HEADER<|message|>CONTENT<|end|>`. The header names a role and, for the assistant, a channel:
//! `analysis` is reasoning, `commentary` holds tool calls and announcements of them, `final` is the answer. A turn of
//! the model ends with `<|return|>` after an answer or with `<|call|>` after a tool call ([`token::STOP`]).
//!
//! - [`Encoding`] renders conversations, with the crate openai-harmony and the vocabulary of the model itself;
//! - [`StreamParser`] turns tokens into [`Event`]s and messages, whatever the tokens are;
//! - [`Chat`] keeps a conversation and makes the next prompt from it.
//!
//! The types of conversations are those of openai-harmony and so is their JSON: `{"messages": [{"role": "user",
//! "content": "Hi"}, …]}` is read by `serde_json::from_str::<Conversation>`. The content of a system message is
//! `[{"type": "system_content", "reasoning_effort": "Low", …}]`, that of a developer message
//! `[{"type": "developer_content", "instructions": "…", "tools": {"functions": {"name": "functions", "tools": […]}}}]`.
//! What such JSON leaves out, the prompt leaves out: the defaults are those of `SystemContent::new`, not of the JSON.
//!
//! # Tools
//! ```
//! use engine::harmony::{Chat, DeveloperContent, Encoding, SystemContent, ToolDescription};
//! use formats::vocabulary::Vocabulary;
//!
//! let encoding = Encoding::new(Vocabulary::o200k())?;
//! let mut chat = Chat::new(&encoding);
//! chat.set_system(SystemContent::new())?;
//! chat.set_developer(DeveloperContent::new().with_function_tools(vec![ToolDescription::new(
//!     "get_weather",
//!     "The weather in a city.",
//!     Some(serde_json::json!({
//!         "type": "object",
//!         "properties": {"city": {"type": "string"}},
//!         "required": ["city"],
//!     })),
//! )]))?;
//! chat.add_user("What is the weather in Rome?");
//!
//! // The model answers:
//! let answer = "<|channel|>analysis<|message|>Call it.<|end|><|start|>assistant<|channel|>commentary \
//!     to=functions.get_weather <|constrain|>json<|message|>{\"city\":\"Rome\"}<|call|>";
//! let tokens = encoding.tokenizer().encode_with_special(answer)?;
//! let mut parser = chat.parser();
//! for token in tokens {
//!     parser.push(token);
//! }
//! parser.finish();
//! for call in chat.apply(parser.into_turn())?.calls {
//!     assert_eq!((call.name(), call.json().unwrap()["city"].as_str()), ("get_weather", Some("Rome")));
//!     chat.add_tool_result(&call, "{\"sky\":\"clear\"}")?;
//! }
//!
//! // The next prompt repeats the model's tokens, reasoning included, and adds the result.
//! let prompt = encoding.decode(&chat.prompt()?);
//! assert!(prompt.ends_with(&format!(
//!     "<|start|>assistant{answer}<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>\
//!     {{\"sky\":\"clear\"}}<|end|><|start|>assistant"
//! )));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Untrusted text
//! The text of messages is encoded without special tokens, so that it cannot end a message or begin another. Names in
//! headers (tools, channels, recipients) are checked, since they could.

mod call;
mod chat;
mod conversation;
mod encoding;
mod error;
mod event;
mod header;
mod parser;
pub mod token;
mod vocabulary_file;

pub use openai_harmony::chat::{
    Author, ChannelConfig, Content, Conversation, DeveloperContent, Message, ReasoningEffort, Role,
    SystemContent, TextContent, ToolDescription, ToolNamespaceConfig,
};

pub use self::call::{ArgumentsError, ToolCall};
pub use self::chat::{Chat, Reply};
pub use self::conversation::CHANNELS;
pub use self::encoding::Encoding;
pub use self::error::{Error, Result};
pub use self::event::{Ending, Event, Header, Notice, Problem};
pub use self::parser::{ParsedMessage, StreamParser, Turn};
pub use self::vocabulary_file::{CACHE_VARIABLE, FOLDER_VARIABLE, private_cache};
