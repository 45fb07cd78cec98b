//! The state of a chat: what has been said, and the tokens that say it to the model.

use openai_harmony::chat::{Author, Content, Conversation, DeveloperContent, Message, Role, SystemContent};

use super::call::ToolCall;
use super::conversation::{self, CHANNELS};
use super::encoding::Encoding;
use super::error::Result;
use super::event::Ending;
use super::parser::{ParsedMessage, StreamParser, Turn};
use super::token;

/// A conversation with a model that is somewhere else: prompts go out as tokens, turns come back as tokens.
///
/// Messages that the model wrote well are said to it again with the very tokens that it chose, not with those that an
/// encoder would choose, so that the next prompt begins with what is in its cache already. After a final answer, the
/// analysis before it is left out of the next prompt, so the prompts agree up to where that turn began; within a tool
/// loop they agree up to the end of the call.
///
/// ```
/// use engine::harmony::{Chat, Encoding, SystemContent, ReasoningEffort};
/// use formats::vocabulary::Vocabulary;
///
/// # fn generate(_prompt: &[u32]) -> Vec<u32> {
/// #     vec![200005, 17196, 200008, 17, 659, 220, 17, 314, 220, 19, 13, 200002]
/// # }
/// let encoding = Encoding::new(Vocabulary::o200k())?;
/// let mut chat = Chat::new(&encoding);
/// chat.set_system(SystemContent::new().with_reasoning_effort(ReasoningEffort::Low))?;
/// chat.add_user("What is 2 + 2?");
/// let prompt = chat.prompt()?;
/// let mut parser = chat.parser();
/// for token in generate(&prompt) {
///     parser.push(token); // show its events
/// }
/// parser.finish();
/// let reply = chat.apply(parser.into_turn())?;
/// assert!(reply.calls.is_empty()); // else run them, add_tool_result for each, and generate again
/// # Ok::<(), engine::harmony::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Chat {
    encoding: Encoding,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    message: Message,
    /// Its tokens, where the model chose them.
    tokens: Option<Vec<u32>>,
}

/// What a turn of the model added to a chat.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The messages that were added.
    pub added: usize,
    /// The calls to answer before the next prompt.
    pub calls: Vec<ToolCall>,
    /// What the model wrote in the name of others, and what it wrote after that: nothing of it was added.
    pub ignored: Vec<ParsedMessage>,
}

impl Chat {
    /// An empty chat.
    pub fn new(encoding: &Encoding) -> Chat {
        Chat { encoding: encoding.clone(), entries: Vec::new() }
    }

    /// A chat that goes on from a conversation.
    ///
    /// # Errors
    /// As [`Encoding::render`].
    pub fn from_conversation(encoding: &Encoding, conversation: Conversation) -> Result<Chat> {
        let mut chat = Chat::new(encoding);
        for message in conversation.messages {
            chat.add(message)?;
        }
        Ok(chat)
    }

    /// Everything that was said, dropped analysis included.
    pub fn conversation(&self) -> Conversation {
        Conversation::from_messages(self.messages().cloned())
    }

    /// Everything that was said, dropped analysis included.
    pub fn messages(&self) -> impl DoubleEndedIterator<Item = &Message> + ExactSizeIterator {
        self.entries.iter().map(|entry| &entry.message)
    }

    /// The number of messages.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Takes back all messages but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.entries.truncate(len);
    }

    /// The content of the system message, if the chat has one: identity, dates, reasoning effort, built-in tools.
    pub fn system(&self) -> Option<&SystemContent> {
        self.messages().find_map(|message| match message.content.first() {
            Some(Content::SystemContent(content)) => Some(content),
            _ => None,
        })
    }

    /// The content of the developer message, if the chat has one: instructions and function tools.
    pub fn developer(&self) -> Option<&DeveloperContent> {
        self.messages().find_map(|message| match message.content.first() {
            Some(Content::DeveloperContent(content)) => Some(content),
            _ => None,
        })
    }

    /// Sets or replaces the system message, which is the first one.
    ///
    /// # Errors
    /// [`super::Error::Message`] for text that openai-harmony cannot encode in time.
    pub fn set_system(&mut self, content: SystemContent) -> Result<()> {
        self.set(Message::from_role_and_content(Role::System, content), 0)
    }

    /// Sets or replaces the developer message, which follows the system message.
    ///
    /// # Errors
    /// As [`Self::set_system`].
    pub fn set_developer(&mut self, content: DeveloperContent) -> Result<()> {
        let after_system = self.messages().take_while(|message| message.author.role == Role::System).count();
        self.set(Message::from_role_and_content(Role::Developer, content), after_system)
    }

    fn set(&mut self, message: Message, position: usize) -> Result<()> {
        conversation::check(position, &message)?;
        let entry = Entry { message, tokens: None };
        let role = &entry.message.author.role;
        match self.entries.iter_mut().find(|other| other.message.author.role == *role) {
            Some(old) => *old = entry,
            None => self.entries.insert(position, entry),
        }
        Ok(())
    }

    /// Adds a message of any role.
    ///
    /// # Errors
    /// As [`Encoding::render`].
    pub fn add(&mut self, message: Message) -> Result<()> {
        conversation::check(self.len(), &message)?;
        self.entries.push(Entry { message, tokens: None });
        Ok(())
    }

    /// Adds a message of the user. Names of special tokens in it stay text.
    pub fn add_user(&mut self, text: impl Into<String>) {
        let message = Message::from_role_and_content(Role::User, text.into());
        self.entries.push(Entry { message, tokens: None });
    }

    /// Adds what a tool answered, in the channel of the call.
    ///
    /// # Errors
    /// [`super::Error::Message`] where the tool's name has characters that end a header's word.
    pub fn add_tool_result(&mut self, call: &ToolCall, output: impl Into<String>) -> Result<()> {
        let author = Author::new(Role::Tool, call.recipient.as_str());
        let mut message = Message::from_author_and_content(author, output.into()).with_recipient("assistant");
        message.channel.clone_from(&call.channel);
        self.add(message)
    }

    /// The calls since the last message of the user that have no result.
    pub fn unanswered(&self) -> Vec<ToolCall> {
        let mut calls: Vec<ToolCall> = Vec::new();
        for message in self.messages() {
            match message.author.role {
                Role::User => calls.clear(),
                Role::Tool => {
                    let answered =
                        calls.iter().position(|it| message.author.name.as_ref() == Some(&it.recipient));
                    if let Some(index) = answered {
                        calls.remove(index);
                    }
                }
                _ => calls.extend(ToolCall::from_message(message)),
            }
        }
        calls
    }

    /// The prompt for the model's next turn, from the first token of the chat to `<|start|>assistant`. Analysis is left
    /// out as in [`Encoding::render_for_completion`].
    ///
    /// # Errors
    /// [`super::Error::Encode`] for a text with a run of a million white space characters.
    pub fn prompt(&self) -> Result<Vec<u32>> {
        let last_final = conversation::last_final(self.messages());
        let said = self
            .entries
            .iter()
            .enumerate()
            .filter(|(index, entry)| !conversation::is_dropped(&entry.message, *index, last_final));
        let messages = said.map(|(_, entry)| (&entry.message, entry.tokens.as_deref()));
        let mut tokens = self.encoding.render_messages(messages)?.concat();
        tokens.extend(self.encoding.assistant());
        Ok(tokens)
    }

    /// A parser for the turn that follows [`Self::prompt`].
    pub fn parser(&self) -> StreamParser {
        StreamParser::new(&self.encoding, Some(Role::Assistant))
    }

    /// Adds the model's turn.
    ///
    /// A message that was malformed is said again as it should have been: an answer that ended the turn without a
    /// known channel is final, any other message without one is analysis or, if it calls a tool, commentary.
    ///
    /// # Errors
    /// [`super::Error::Message`]; then nothing was added.
    pub fn apply(&mut self, turn: Turn) -> Result<Reply> {
        let Turn { messages: mut parsed, tokens, .. } = turn;
        let foreign = parsed.iter().position(|it| it.message.author.role != Role::Assistant);
        let ignored = parsed.split_off(foreign.unwrap_or(parsed.len()));
        let mut entries = Vec::with_capacity(parsed.len());
        let mut calls = Vec::new();
        for parsed in parsed {
            calls.extend(parsed.call());
            let said = if parsed.is_well_formed { self.as_said(&parsed, &tokens) } else { None };
            let message = if said.is_some() { parsed.message } else { repaired(parsed) };
            conversation::check(self.len() + entries.len(), &message)?;
            entries.push(Entry { message, tokens: said });
        }
        let added = entries.len();
        self.entries.extend(entries);
        Ok(Reply { added, calls, ignored })
    }

    /// The tokens of a message as they stand in later prompts: complete, and with `<|end|>` for `<|return|>`.
    fn as_said(&self, parsed: &ParsedMessage, tokens: &[u32]) -> Option<Vec<u32>> {
        let written = tokens.get(parsed.tokens.clone())?;
        let mut said = Vec::with_capacity(written.len() + 3);
        if written.first() != Some(&token::START) {
            said.extend(self.encoding.assistant());
        }
        said.extend(written);
        match parsed.ending {
            Ending::Return => *said.last_mut()? = token::END,
            Ending::Missing | Ending::Cut => said.push(token::END),
            Ending::End | Ending::Call => {}
        }
        Some(said)
    }
}

/// A message with a header as it should be.
fn repaired(parsed: ParsedMessage) -> Message {
    let is_answer = parsed.is_answer();
    let mut message = parsed.message;
    let is_word = |part: &String| conversation::is_word(part.trim_start_matches("<|constrain|>"));
    message.author.name = message.author.name.filter(is_word);
    message.content_type = message.content_type.filter(is_word);
    message.recipient =
        message.recipient.filter(is_word).filter(|recipient| conversation::is_tool(recipient));
    let is_known = |channel: &String| CHANNELS.contains(&channel.as_str());
    message.channel = message.channel.filter(is_known).or_else(|| {
        let channel = match &message.recipient {
            Some(_) => "commentary",
            None if is_answer => "final",
            None => "analysis",
        };
        Some(channel.into())
    });
    message
}
