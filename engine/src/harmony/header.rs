//! Headers, well-formed or not.
//!
//! A well-formed header is `ROLE[:NAME] [to=RECIPIENT]<|channel|>CHANNEL [to=RECIPIENT] [TYPE | <|constrain|>TYPE]`; for
//! a tool's message its name stands in the place of the role. What follows is read as leniently as possible: the
//! parts are known by what they look like, wherever they stand.

use openai_harmony::chat::Role;

use super::conversation::{CHANNELS, is_tool, is_word};
use super::event::{Header, Problem};
use super::token;

/// Bytes of text that a header may have. What is longer has no `<|message|>`.
pub(super) const MAX_HEADER: usize = 512;

/// Special tokens that a header may have.
const MAX_MARKS: usize = 16;
/// `<|message|>`, spelled.
const MESSAGE: &[u8] = b"<|message|>";
const ROLES: [&str; 5] = ["assistant", "developer", "system", "tool", "user"];
/// Content types that are known without `<|constrain|>` where the header's end is unknown.
const BARE_TYPES: [&str; 2] = ["json", "code"];

/// A special token within a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Channel,
    Constrain,
}

/// A header that is not complete yet.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// Index of its first token.
    pub start: usize,
    /// Whether there was something malformed before it is read.
    pub malformed: bool,
    /// Whether it begins without `<|start|>`.
    pub implied: bool,
    /// The role, if it is known without being said.
    role: Option<Role>,
    /// Its text, without the special tokens.
    text: Vec<u8>,
    /// The special tokens: how much of `text` stands before each.
    marks: Vec<(usize, Mark)>,
}

/// What text makes of a header.
pub(super) enum Grown {
    /// Nothing new.
    Header,
    /// `<|message|>` spelled as text; the content begins with this.
    Spelled(Vec<u8>),
    /// Too long for a header; what is too much.
    Overlong(Vec<u8>),
}

/// A header that has been read.
pub(super) struct Parsed {
    pub header: Header,
    pub problems: Vec<Problem>,
    /// What is no header, in a header without `<|message|>`.
    pub rest: Vec<u8>,
    /// Whether that may be the beginning of a channel's name or of a content type.
    pub is_cut: bool,
}

impl Draft {
    pub fn new(start: usize, role: Option<Role>) -> Draft {
        Draft { start, malformed: false, implied: false, role, text: Vec::new(), marks: Vec::new() }
    }

    /// Whether nothing has been said yet.
    pub fn is_blank(&self) -> bool {
        self.marks.is_empty() && self.text.is_empty()
    }

    /// Adds a special token; false if there are too many.
    pub fn mark(&mut self, mark: Mark) -> bool {
        let fits = self.marks.len() < MAX_MARKS;
        if fits {
            self.marks.push((self.text.len(), mark));
        }
        fits
    }

    pub fn grow(&mut self, bytes: &[u8]) -> Grown {
        // Text on both sides of a special token spells nothing.
        let after_mark = self.marks.last().map_or(0, |&(at, _)| at);
        let from = self.text.len().saturating_sub(MESSAGE.len() - 1).max(after_mark);
        self.text.extend(bytes);
        let spelled = find(&self.text[from..], MESSAGE).map(|at| from + at);
        if let Some(at) = spelled.filter(|at| at + MESSAGE.len() <= MAX_HEADER) {
            let content = self.text.split_off(at + MESSAGE.len());
            self.text.truncate(at);
            return Grown::Spelled(content);
        }
        if self.text.len() > MAX_HEADER {
            return Grown::Overlong(self.text.split_off(MAX_HEADER));
        }
        Grown::Header
    }

    /// Whether it holds a message's content already, so that another channel belongs to another message. A call is
    /// not taken apart.
    pub fn holds_content(&self) -> bool {
        let as_content = self.clone().parse(&Role::Assistant, false);
        if as_content.header.recipient.is_some() {
            return false;
        }
        if self.marks.iter().any(|(_, mark)| *mark == Mark::Channel) {
            return !as_content.rest.is_empty();
        }
        // A single word may be a misspelled role.
        let as_header = self.clone().parse(&Role::Assistant, true);
        as_header.problems.iter().any(|it| matches!(it, Problem::StrayText { text } if text.contains(' ')))
    }

    /// Reads the header. `default` is whose message it is if it does not say; `complete` is whether `<|message|>`
    /// followed, so that there is no content in it.
    pub fn parse(self, default: &Role, complete: bool) -> Parsed {
        let Draft { role, text, marks, implied, .. } = self;
        let wanted = if role.is_none() { Wanted::Role } else { Wanted::Anything };
        let mut reader = Reader {
            text: &text,
            marks: &marks,
            at: 0,
            complete,
            wanted,
            role,
            author: None,
            channel: None,
            recipient: None,
            content_type: None,
            stray: Vec::new(),
            problems: Vec::new(),
        };
        while reader.step() {}
        reader.finish(default, implied)
    }
}

/// What a header's next word should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Role,
    Channel,
    ContentType,
    Anything,
}

struct Reader<'a> {
    text: &'a [u8],
    marks: &'a [(usize, Mark)],
    /// Bytes read.
    at: usize,
    complete: bool,
    wanted: Wanted,
    role: Option<Role>,
    /// What stands in the place of the role and is none: a tool's name, or a name behind a role.
    author: Option<String>,
    channel: Option<String>,
    recipient: Option<String>,
    content_type: Option<String>,
    stray: Vec<String>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    /// Reads a word or a mark; false at the end of the header.
    fn step(&mut self) -> bool {
        let limit = self.marks.first().map_or(self.text.len(), |&(at, _)| at);
        let space = self.text[self.at..limit].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.at += space;
        if self.at == limit {
            let Some((&(_, mark), marks)) = self.marks.split_first() else { return false };
            self.marks = marks;
            self.want(mark);
            return true;
        }
        let rest = &self.text[self.at..limit];
        for (name, mark) in [("<|channel|>", Mark::Channel), ("<|constrain|>", Mark::Constrain)] {
            if rest.starts_with(name.as_bytes()) {
                self.problems.push(Problem::SpelledToken { token: name.into() });
                self.at += name.len();
                self.want(mark);
                return true;
            }
        }
        let space = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
        let word = &rest[..find(&rest[1..], b"<|").map_or(space, |token| space.min(token + 1))];
        let valid = word.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let read = match self.wanted {
            _ if valid.is_empty() => Read::Stray,
            Wanted::Role => self.read_role(valid),
            Wanted::Channel => self.read_channel(valid),
            Wanted::ContentType => self.read_content_type(valid),
            Wanted::Anything => self.read_anything(valid),
        };
        match read {
            Read::Part(bytes) => self.at += bytes,
            Read::Word => self.at += valid.len(),
            Read::Stray if self.is_header() => {
                self.stray.push(String::from_utf8_lossy(word).into_owned());
                self.at += word.len();
            }
            Read::Stray => return false,
        }
        true
    }

    /// Whether what comes next must be part of the header: where `<|message|>` or a channel follows.
    fn is_header(&self) -> bool {
        self.complete || self.marks.iter().any(|(_, mark)| *mark == Mark::Channel)
    }

    fn want(&mut self, mark: Mark) {
        self.miss();
        self.wanted = match mark {
            Mark::Channel => Wanted::Channel,
            Mark::Constrain => Wanted::ContentType,
        };
    }

    /// Notes that a mark had nothing behind it.
    fn miss(&mut self) {
        match self.wanted {
            Wanted::Channel => self.problems.push(Problem::MissingChannel),
            Wanted::ContentType => self.problems.push(Problem::EmptyContentType),
            Wanted::Role | Wanted::Anything => {}
        }
    }

    fn read_role(&mut self, word: &str) -> Read {
        self.wanted = Wanted::Anything;
        if word.starts_with("to=") || channel_at(word).is_some() {
            return Read::Part(0);
        }
        if let Some(role) = ROLES.iter().find(|role| word.starts_with(**role)) {
            let rest = &word[role.len()..];
            let name = rest.strip_prefix(':').filter(|name| !name.is_empty());
            if rest.is_empty() || name.is_some() {
                self.role = Role::try_from(*role).ok();
                self.author = name.map(Into::into);
                return Read::Word;
            }
            if rest.starts_with("to=") || rest.starts_with(*role) || channel_at(rest).is_some() {
                self.role = Role::try_from(*role).ok();
                return Read::Part(role.len());
            }
        }
        if !is_name(word) || !(self.is_header() || is_qualified(word)) {
            return Read::Stray;
        }
        self.author = Some(word.into());
        Read::Word
    }

    fn read_channel(&mut self, word: &str) -> Read {
        if let Some(name) = channel_at(word) {
            self.set_channel(name);
            return Read::Part(name.len());
        }
        if !self.is_header() {
            return Read::Stray;
        }
        if word.starts_with("to=") {
            self.miss();
            self.wanted = Wanted::Anything;
            return Read::Part(0);
        }
        self.problems.push(Problem::UnknownChannel { found: word.into() });
        self.set_channel(word);
        Read::Word
    }

    fn read_content_type(&mut self, word: &str) -> Read {
        let length = word.find(|c| !is_type(c)).unwrap_or(word.len());
        if length == 0 || self.is_header() && length < word.len() {
            return Read::Stray;
        }
        self.wanted = Wanted::Anything;
        self.content_type = Some(format!("<|constrain|>{}", &word[..length]));
        Read::Part(length)
    }

    fn read_anything(&mut self, word: &str) -> Read {
        if let Some(recipient) = word.strip_prefix("to=") {
            // What follows may be content, which begins with none of a name's characters.
            let content = |c: char| !self.is_header() && "{[<\"".contains(c);
            let length = recipient.find(content).unwrap_or(recipient.len());
            self.set_recipient(&recipient[..length]);
            return Read::Part("to=".len() + length);
        }
        let role = self.role.as_ref().map_or("assistant", Role::as_str);
        if self.channel.is_none()
            && word.strip_prefix(role).is_some_and(|it| it.is_empty() || channel_at(it).is_some())
        {
            self.problems.push(Problem::RepeatedRole);
            return Read::Part(role.len());
        }
        if let Some(name) = channel_at(word).filter(|_| self.channel.is_none()) {
            self.problems.push(Problem::MissingChannelToken);
            self.set_channel(name);
            return Read::Part(name.len());
        }
        if self.content_type.is_none() && (self.recipient.is_some() || self.channel.is_some()) {
            let length = word.find(|c| !is_type(c)).unwrap_or(word.len());
            let is_bare = BARE_TYPES.contains(&&word[..length]);
            let is_type = if self.is_header() {
                length == word.len() && (is_bare || self.recipient.is_some() && !word.contains('.'))
            } else {
                is_bare && self.recipient.is_some()
            };
            if is_type {
                self.content_type = Some(word[..length].into());
                return Read::Part(length);
            }
        }
        if self.is_header() && self.recipient.is_none() && is_qualified(word) {
            self.problems.push(Problem::BareRecipient);
            self.set_recipient(word);
            return Read::Word;
        }
        Read::Stray
    }

    fn set_channel(&mut self, name: &str) {
        self.wanted = Wanted::Anything;
        if let Some(dropped) = self.channel.replace(name.into()) {
            self.problems.push(Problem::RepeatedChannel { dropped });
        }
    }

    fn set_recipient(&mut self, name: &str) {
        if name.is_empty() {
            self.problems.push(Problem::EmptyRecipient);
        } else if let Some(dropped) = self.recipient.replace(name.into()) {
            self.problems.push(Problem::RepeatedRecipient { dropped });
        }
    }

    fn finish(mut self, default: &Role, implied: bool) -> Parsed {
        if !self.complete {
            self.problems.push(Problem::MissingMessage);
        }
        self.miss();
        let (role, name) = match (self.role.take(), self.author.take()) {
            (Some(role), name) => (role, name),
            // Tools have their names instead of a role.
            (None, Some(name)) if is_tool(&name) && (is_qualified(&name) || self.recipient.is_some()) => {
                (Role::Tool, Some(name))
            }
            (None, Some(found)) => {
                self.problems.push(Problem::UnknownRole { found });
                (default.clone(), None)
            }
            (None, None) => {
                if !implied {
                    self.problems.push(Problem::MissingRole);
                }
                (default.clone(), None)
            }
        };
        for found in [&name, &self.recipient].into_iter().flatten().filter(|name| !is_word(name)) {
            self.problems.push(Problem::UnfitName { found: found.clone() });
        }
        let is_said = self.problems.contains(&Problem::MissingChannel);
        if role == Role::Assistant && self.channel.is_none() && !is_said {
            self.problems.push(Problem::MissingChannel);
        }
        // Those within the content.
        self.problems.extend(self.marks.iter().map(|_| Problem::StrayToken { token: token::CONSTRAIN }));
        if !self.stray.is_empty() {
            self.problems.push(Problem::StrayText { text: self.stray.join(" ") });
        }
        let rest = self.text[self.at..].to_vec();
        Parsed {
            is_cut: matches!(self.wanted, Wanted::Channel | Wanted::ContentType)
                && !rest.iter().any(u8::is_ascii_whitespace),
            header: Header {
                role,
                name,
                channel: self.channel,
                recipient: self.recipient,
                content_type: self.content_type,
            },
            problems: self.problems,
            rest,
        }
    }
}

/// How much of a word was read.
enum Read {
    /// So many bytes.
    Part(usize),
    Word,
    /// Nothing: it is no part of a header.
    Stray,
}

/// The channel that a word is or begins with: `final`, `final?`, `commentaryto=…`, `analysisWe`, but not `finally`.
fn channel_at(word: &str) -> Option<&'static str> {
    CHANNELS.into_iter().find(|channel| {
        let Some(rest) = word.strip_prefix(channel) else { return false };
        let mut next = rest.chars();
        rest.starts_with("to=")
            || match (next.next(), next.next()) {
                (Some('.' | '-' | '_'), Some(next)) => !next.is_alphanumeric(),
                (Some(next), _) => !next.is_lowercase(),
                (None, _) => true,
            }
    })
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:/".contains(c))
}

/// Whether it is a name in a namespace: `functions.get_weather`.
fn is_qualified(word: &str) -> bool {
    is_name(word) && word.contains('.') && !word.ends_with('.')
}

fn is_type(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_-.+/".contains(c)
}

fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}
