//! Tokens to messages, one token at a time.

use std::ops::Range;

use formats::tokenizer::{Decoded, TextDecoder};
use openai_harmony::chat::{Content, Message, Role};

use super::call::ToolCall;
use super::conversation::{CHANNELS, is_tool};
use super::encoding::Encoding;
use super::event::{Ending, Event, Header, Notice, Problem};
use super::header::{Draft, Grown, Mark};
use super::token;

/// A lenient parser of the tokens of messages.
///
/// It accepts any tokens. Where they are malformed, it takes the most likely meaning, says so by a [`Notice`] and goes
/// on; it never takes back what it said before. All tokens are kept. Content is told as soon as it is known to be such:
/// without `<|message|>`, that is after 512 bytes or at the end of the message.
///
/// ```
/// use engine::harmony::{Encoding, Event, Role, StreamParser};
/// use formats::vocabulary::Vocabulary;
///
/// let encoding = Encoding::new(Vocabulary::o200k())?;
/// let mut parser = StreamParser::new(&encoding, Some(Role::Assistant));
/// // <|channel|>final<|message|>2 + 2 = 4.<|return|>
/// for token in [200005, 17196, 200008, 17, 659, 220, 17, 314, 220, 19, 13, 200002] {
///     for event in parser.push(token) {
///         match event {
///             Event::Start(header) => println!("[{}]", header.channel.as_deref().unwrap_or("?")),
///             Event::Delta { text } => print!("{text}"),
///             Event::End { .. } => println!(),
///             Event::Notice(notice) => eprintln!("{notice}"),
///         }
///     }
/// }
/// parser.finish();
/// assert_eq!(parser.into_turn().answer(), "2 + 2 = 4.");
/// # Ok::<(), engine::harmony::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StreamParser {
    encoding: Encoding,
    /// Whose turn it is, where that is known.
    turn: Option<Role>,
    state: State,
    parsed: Turn,
}

/// What tokens were parsed to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Turn {
    /// The messages, in order.
    pub messages: Vec<ParsedMessage>,
    /// What was malformed, in order.
    pub notices: Vec<Notice>,
    /// All tokens, as they came.
    pub tokens: Vec<u32>,
}

/// A message and the tokens that it was parsed from.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedMessage {
    /// The message. Its content is one text.
    pub message: Message,
    /// How it ended.
    pub ending: Ending,
    /// Its tokens, a range of [`Turn::tokens`], the ending included. `<|start|>` and the role are missing where they
    /// stood in the prompt.
    pub tokens: Range<usize>,
    /// Whether there was no notice about it, [`Problem::Truncated`] aside.
    pub is_well_formed: bool,
}

impl ParsedMessage {
    /// The call that the message is, if it is one and did not break off.
    pub fn call(&self) -> Option<ToolCall> {
        (self.ending != Ending::Cut).then(|| ToolCall::from_message(&self.message)).flatten()
    }

    /// Whether it answers the user: it is in the final channel, or it ended the turn without a channel that is known.
    pub fn is_answer(&self) -> bool {
        let Message { author, recipient, channel, .. } = &self.message;
        author.role == Role::Assistant
            && !recipient.as_deref().is_some_and(is_tool)
            && match channel.as_deref() {
                Some(channel) if CHANNELS.contains(&channel) => channel == "final",
                _ => self.ending == Ending::Return,
            }
    }

    /// Its content.
    pub fn text(&self) -> &str {
        super::call::text(&self.message)
    }
}

impl Turn {
    /// The content of all messages in a channel, with a line break between messages.
    pub fn text(&self, channel: &str) -> String {
        let in_channel = self.messages.iter().filter(|it| it.message.channel.as_deref() == Some(channel));
        in_channel.map(ParsedMessage::text).collect::<Vec<_>>().join("\n")
    }

    /// The content of the messages that answer the user, malformed headers or not.
    pub fn answer(&self) -> String {
        let answers = self.messages.iter().filter(|parsed| parsed.is_answer());
        answers.map(ParsedMessage::text).collect::<Vec<_>>().join("\n")
    }

    /// Shortens the content of the last message to so many bytes (to the character that they end in), as if nothing had
    /// followed. It is said again by its text then, not by its tokens.
    pub fn shorten_last(&mut self, bytes: usize) {
        let Some(last) = self.messages.last_mut() else { return };
        if let Some(Content::Text(content)) = last.message.content.first_mut()
            && bytes < content.text.len()
        {
            let end = content.text.floor_char_boundary(bytes);
            content.text.truncate(end);
            last.is_well_formed = false;
            last.ending = Ending::Cut;
        }
    }

    /// The tool calls, in order.
    pub fn calls(&self) -> Vec<ToolCall> {
        self.messages.iter().filter_map(ParsedMessage::call).collect()
    }
}

#[derive(Clone, Debug)]
enum State {
    /// Between messages.
    Between {
        /// Whether text is surplus here, because the turn has ended.
        ended: bool,
        /// Whether that was said.
        told: bool,
    },
    Header(Draft),
    Content(Body),
}

const BETWEEN: State = State::Between { ended: false, told: false };

/// A message whose header is complete.
#[derive(Clone, Debug)]
struct Body {
    start: usize,
    header: Header,
    text: String,
    decoder: TextDecoder,
    is_invalid: bool,
    is_well_formed: bool,
}

impl StreamParser {
    /// A parser for what follows a prompt that ends with `<|start|>` and this role, or, without a role, for tokens that
    /// begin with `<|start|>`.
    pub fn new(encoding: &Encoding, role: Option<Role>) -> StreamParser {
        let state = match &role {
            Some(role) => State::Header(Draft::new(0, Some(role.clone()))),
            None => BETWEEN,
        };
        StreamParser { encoding: encoding.clone(), turn: role, state, parsed: Turn::default() }
    }

    /// Takes one token and tells what came of it.
    pub fn push(&mut self, token: u32) -> Vec<Event> {
        let mut events = Vec::new();
        let at = self.parsed.tokens.len();
        self.parsed.tokens.push(token);
        match token {
            token::START => self.start(at, &mut events),
            token::CHANNEL => self.channel(at, &mut events),
            token::CONSTRAIN => self.constrain(at, &mut events),
            token::MESSAGE => self.message(at, &mut events),
            token::END => self.end(at, Ending::End, &mut events),
            token::RETURN => self.end(at, Ending::Return, &mut events),
            token::CALL => self.end(at, Ending::Call, &mut events),
            token => match self.encoding.clone().text(token) {
                Some(bytes) => self.text(at, bytes, &mut events),
                None => self.notice(at, Problem::StrayToken { token }, &mut events),
            },
        }
        events
    }

    /// Says that no more tokens come, and tells what came of a message that is not complete.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let at = self.parsed.tokens.len();
        match self.take() {
            State::Between { .. } => {}
            State::Header(draft) if draft.is_blank() => {}
            State::Header(draft) => {
                self.header_without_message(at, draft, Ending::Cut, &mut events);
            }
            State::Content(body) => self.close(at, body, Ending::Cut, &mut events),
        }
        events
    }

    /// All tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.parsed.tokens
    }

    /// The complete messages so far.
    pub fn messages(&self) -> &[ParsedMessage] {
        &self.parsed.messages
    }

    /// All notices so far.
    pub fn notices(&self) -> &[Notice] {
        &self.parsed.notices
    }

    /// The message that is being written: its header and its content so far.
    pub fn current(&self) -> Option<(&Header, &str)> {
        match &self.state {
            State::Content(body) => Some((&body.header, &body.text)),
            State::Between { .. } | State::Header(_) => None,
        }
    }

    /// What was parsed; [`Self::finish`] comes first.
    pub fn into_turn(self) -> Turn {
        self.parsed
    }

    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, BETWEEN)
    }

    /// Whose message it is if nothing says so.
    fn default_role(&self) -> Role {
        self.turn.clone().unwrap_or(Role::Assistant)
    }

    /// Notes a problem, and that the message being parsed has one.
    fn notice(&mut self, at: usize, problem: Problem, events: &mut Vec<Event>) {
        match &mut self.state {
            State::Between { .. } => {}
            State::Header(draft) => draft.malformed = true,
            State::Content(body) => body.is_well_formed = false,
        }
        let notice = Notice { at, problem };
        events.push(Event::Notice(notice.clone()));
        self.parsed.notices.push(notice);
    }

    /// A header without `<|start|>`.
    fn imply_start(&mut self, at: usize, role: Option<Role>, events: &mut Vec<Event>) {
        let mut draft = Draft::new(at, role);
        draft.implied = true;
        self.state = State::Header(draft);
        self.notice(at, Problem::MissingStart, events);
    }

    fn start(&mut self, at: usize, events: &mut Vec<Event>) {
        match self.take() {
            State::Between { .. } => {}
            State::Header(draft) if draft.is_blank() => self.notice(at, Problem::RepeatedStart, events),
            State::Header(draft) => {
                self.header_without_message(at, draft, Ending::Missing, events);
            }
            State::Content(mut body) => {
                self.note(&mut body, at, Problem::MissingEnd, events);
                self.close(at, body, Ending::Missing, events);
            }
        }
        self.state = State::Header(Draft::new(at, None));
    }

    fn channel(&mut self, at: usize, events: &mut Vec<Event>) {
        match self.take() {
            State::Between { .. } => self.imply_start(at, Some(self.default_role()), events),
            State::Header(draft) if draft.holds_content() => {
                let role = self.header_without_message(at, draft, Ending::Missing, events);
                self.imply_start(at, Some(role), events);
            }
            State::Header(draft) => self.state = State::Header(draft),
            State::Content(mut body) => {
                let role = body.header.role.clone();
                self.note(&mut body, at, Problem::MissingEnd, events);
                self.close(at, body, Ending::Missing, events);
                self.imply_start(at, Some(role), events);
            }
        }
        self.mark(at, Mark::Channel, token::CHANNEL, events);
    }

    fn constrain(&mut self, at: usize, events: &mut Vec<Event>) {
        if let State::Between { .. } = self.state {
            self.imply_start(at, Some(self.default_role()), events);
        }
        self.mark(at, Mark::Constrain, token::CONSTRAIN, events);
    }

    fn mark(&mut self, at: usize, mark: Mark, token: u32, events: &mut Vec<Event>) {
        let fits = match &mut self.state {
            State::Header(draft) => draft.mark(mark),
            State::Between { .. } | State::Content(_) => false,
        };
        if !fits {
            self.notice(at, Problem::StrayToken { token }, events);
        }
    }

    fn message(&mut self, at: usize, events: &mut Vec<Event>) {
        if let State::Between { .. } = self.state {
            self.imply_start(at, Some(self.default_role()), events);
        }
        match self.take() {
            State::Header(draft) => self.header(at, draft, true, events),
            state => {
                self.state = state;
                self.notice(at, Problem::StrayToken { token: token::MESSAGE }, events);
            }
        }
    }

    fn end(&mut self, at: usize, ending: Ending, events: &mut Vec<Event>) {
        match self.take() {
            State::Content(body) => self.close(at, body, ending, events),
            State::Header(draft) if !draft.is_blank() => {
                self.header_without_message(at, draft, ending, events);
            }
            state => {
                if let State::Between { .. } = state {
                    self.state = state;
                }
                let token = self.parsed.tokens[at];
                self.notice(at, Problem::StrayToken { token }, events);
            }
        }
        // Then text is no message without <|start|> any more.
        if ending != Ending::End
            && let State::Between { ended, .. } = &mut self.state
        {
            *ended = true;
        }
    }

    fn text(&mut self, at: usize, bytes: &[u8], events: &mut Vec<Event>) {
        match &mut self.state {
            State::Between { ended, told } => {
                let is_surplus = *ended;
                if is_surplus || bytes.trim_ascii().is_empty() {
                    if !(is_surplus && std::mem::replace(told, is_surplus)) {
                        let text = String::from_utf8_lossy(bytes).into_owned();
                        self.notice(at, Problem::StrayText { text }, events);
                    }
                    return;
                }
                self.imply_start(at, None, events);
                self.text(at, bytes.trim_ascii_start(), events);
            }
            State::Header(draft) => match draft.grow(bytes) {
                Grown::Header => {}
                Grown::Spelled(content) => {
                    let token = "<|message|>".into();
                    self.notice(at, Problem::SpelledToken { token }, events);
                    if let State::Header(draft) = self.take() {
                        self.header(at, draft, true, events);
                    }
                    self.text(at, &content, events);
                }
                Grown::Overlong(surplus) => {
                    if let State::Header(draft) = self.take() {
                        self.header(at, draft, false, events);
                    }
                    self.text(at, &surplus, events);
                }
            },
            State::Content(_) => self.content(at, bytes, events),
        }
    }

    /// A header that `<|message|>` follows (`complete`), or that is too long to be one.
    fn header(&mut self, at: usize, draft: Draft, complete: bool, events: &mut Vec<Event>) {
        let (start, malformed) = (draft.start, draft.malformed);
        let parsed = draft.parse(&self.default_role(), complete);
        self.open(at, start, malformed, parsed.header, parsed.problems, events);
        self.text(at, &parsed.rest, events);
    }

    /// A header, and perhaps content, that ended before `<|message|>`. Returns whose it was.
    fn header_without_message(
        &mut self,
        at: usize,
        draft: Draft,
        ending: Ending,
        events: &mut Vec<Event>,
    ) -> Role {
        let Draft { start, malformed, implied, .. } = draft;
        let parsed = draft.parse(&self.default_role(), false);
        let role = parsed.header.role.clone();
        let is_header = parsed.header.channel.is_some() || parsed.header.recipient.is_some();
        let text = String::from_utf8_lossy(&parsed.rest);
        let has_token = !matches!(ending, Ending::Missing | Ending::Cut);
        if ending == Ending::Cut && (parsed.is_cut || text.is_empty()) {
            // Nothing is wrong but that there is no more of it.
            self.notice(at, Problem::Truncated, events);
        } else if implied && !is_header && !has_token && !text.contains(char::is_alphanumeric) {
            // A full stop or the like between two messages.
            self.notice(at, Problem::StrayText { text: text.into_owned() }, events);
        } else if has_token && is_header || !text.is_empty() {
            self.open(at, start, malformed, parsed.header, parsed.problems, events);
            self.text(at, &parsed.rest, events);
            if let State::Content(body) = self.take() {
                self.close(at, body, ending, events);
            }
        } else {
            // A header that says nothing but, perhaps, a role.
            for problem in parsed.problems {
                self.notice(at, problem, events);
            }
        }
        role
    }

    /// Begins the content.
    fn open(
        &mut self,
        at: usize,
        start: usize,
        malformed: bool,
        header: Header,
        mut problems: Vec<Problem>,
        events: &mut Vec<Event>,
    ) {
        if self.turn.as_ref().is_some_and(|role| *role != header.role) {
            problems.push(Problem::ForeignRole { role: header.role.clone() });
        }
        self.state = State::Content(Body {
            start,
            header: header.clone(),
            text: String::new(),
            decoder: TextDecoder::default(),
            is_invalid: false,
            is_well_formed: !malformed,
        });
        for problem in problems {
            self.notice(at, problem, events);
        }
        events.push(Event::Start(header));
    }

    /// Adds to the content.
    fn content(&mut self, at: usize, bytes: &[u8], events: &mut Vec<Event>) {
        let State::Content(body) = &mut self.state else { return };
        let Decoded { text, is_valid } = body.decoder.push(bytes);
        body.text.push_str(&text);
        if !is_valid && !std::mem::replace(&mut body.is_invalid, true) {
            self.notice(at, Problem::InvalidUtf8, events);
        }
        if !text.is_empty() {
            events.push(Event::Delta { text });
        }
    }

    /// Notes a problem of a message that is being closed.
    fn note(&mut self, body: &mut Body, at: usize, problem: Problem, events: &mut Vec<Event>) {
        body.is_well_formed = false;
        self.notice(at, problem, events);
    }

    /// Ends a message at the token `at`, which is its last one if it is an ending.
    fn close(&mut self, at: usize, mut body: Body, ending: Ending, events: &mut Vec<Event>) {
        if body.decoder.is_pending() {
            // An incomplete character.
            body.text.push(char::REPLACEMENT_CHARACTER);
            if !body.is_invalid {
                self.note(&mut body, at, Problem::InvalidUtf8, events);
            }
            events.push(Event::Delta { text: char::REPLACEMENT_CHARACTER.into() });
        }
        match ending {
            Ending::End | Ending::Return if body.header.is_call() => {
                self.note(&mut body, at, Problem::CallWithoutCallToken, events);
            }
            Ending::Call if !body.header.is_call() => {
                self.note(&mut body, at, Problem::CallWithoutRecipient, events);
            }
            Ending::Cut => self.notice(at, Problem::Truncated, events),
            _ => {}
        }
        let end = if matches!(ending, Ending::Missing | Ending::Cut) { at } else { at + 1 };
        self.parsed.messages.push(ParsedMessage {
            message: body.header.into_message(body.text),
            ending,
            tokens: body.start..end,
            is_well_formed: body.is_well_formed,
        });
        events.push(Event::End { ending });
    }
}
