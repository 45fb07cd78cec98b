//! The cases of the JSON files.

use engine::harmony::{
    Author, Chat, Conversation, Encoding, Ending, Event, Message, Role, StreamParser, ToolCall, Turn,
};
use openai_harmony::StreamableParser;
use serde::Deserialize;
use serde_json::Value;

use crate::case::{assert_tokens, cases, encoding, spelled, tokens};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Render {
    name: String,
    #[serde(rename = "source")]
    _source: String,
    #[serde(default)]
    whole: bool,
    conversation: Conversation,
    #[serde(default)]
    text: Vec<String>,
    #[serde(default)]
    tokens: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parse {
    name: String,
    #[serde(rename = "source")]
    _source: String,
    /// Null for tokens that begin with `<|start|>`.
    #[serde(default = "assistant")]
    role: Option<Role>,
    #[serde(default)]
    text: Vec<String>,
    #[serde(default)]
    tokens: Vec<Value>,
    messages: Vec<Expected>,
    #[serde(default)]
    notices: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    role: Role,
    name: Option<String>,
    channel: Option<String>,
    recipient: Option<String>,
    content_type: Option<String>,
    text: String,
    ending: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Chats {
    name: String,
    #[serde(rename = "source")]
    _source: String,
    start: Vec<Message>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Step {
    Prompt {
        prompt: Vec<String>,
    },
    PromptTokens {
        prompt_tokens: Vec<Value>,
    },
    Turn {
        turn: Vec<String>,
        #[serde(default)]
        ignored: usize,
    },
    TurnTokens {
        turn_tokens: Vec<Value>,
    },
    User {
        user: String,
    },
    Result {
        result: String,
        call: Call,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    recipient: String,
    arguments: Option<Value>,
}

fn assistant() -> Option<Role> {
    Some(Role::Assistant)
}

impl Expected {
    fn message(&self) -> Message {
        let author = Author { role: self.role.clone(), name: self.name.clone() };
        let mut message = Message::from_author_and_content(author, self.text.as_str());
        message.channel.clone_from(&self.channel);
        message.recipient.clone_from(&self.recipient);
        message.content_type.clone_from(&self.content_type);
        message
    }
}

#[test]
fn conversations_are_rendered_as_documented() {
    let encoding = encoding();
    let cases: Vec<Render> = cases("render.json");
    assert!(cases.len() >= 20, "{} cases", cases.len());
    for case in cases {
        let found = if case.whole {
            encoding.render(&case.conversation)
        } else {
            encoding.render_for_completion(&case.conversation)
        };
        assert_tokens(&case.name, &found.unwrap(), &spelled(&case.text, &case.tokens));
        // The conversation survives its own JSON.
        let json = serde_json::to_string(&case.conversation).unwrap();
        assert_eq!(serde_json::from_str::<Conversation>(&json).unwrap(), case.conversation, "{}", case.name);
    }
}

#[test]
fn well_formed_tokens_are_parsed_as_documented() {
    let encoding = encoding();
    let cases: Vec<Parse> = cases("parse.json");
    assert!(cases.len() >= 15, "{} cases", cases.len());
    for case in cases {
        let turn = check(&encoding, &case);
        assert!(turn.messages.iter().all(|message| message.is_well_formed), "{}", case.name);
        // And the upstream parser agrees, but it cannot read users with names, and takes a content type without a
        // recipient for one.
        let is_known = |message: &Message| {
            (message.author.role == Role::Tool || message.author.name.is_none())
                && (message.content_type.is_none() || message.recipient.is_some())
        };
        if turn.messages.iter().all(|parsed| is_known(&parsed.message)) {
            let harmony =
                openai_harmony::load_harmony_encoding(openai_harmony::HarmonyEncodingName::HarmonyGptOss);
            let mut upstream = StreamableParser::new(harmony.unwrap(), case.role.clone()).unwrap();
            for &token in &turn.tokens {
                upstream.process(token).unwrap();
            }
            let ours: Vec<_> = turn.messages.iter().map(|parsed| parsed.message.clone()).collect();
            assert_eq!(upstream.messages(), ours, "{}", case.name);
        }
    }
}

#[test]
fn malformed_tokens_lose_nothing_and_are_reported() {
    let encoding = encoding();
    let cases: Vec<Parse> = cases("malformed.json");
    assert!(cases.len() >= 70, "{} cases", cases.len());
    for case in cases {
        check(&encoding, &case);
    }
}

/// Parses a case, compares, and checks what holds for any tokens.
fn check(encoding: &Encoding, case: &Parse) -> Turn {
    let tokens = spelled(&case.text, &case.tokens);
    let turn = encoding.parse(&tokens, case.role.clone());
    let name = &case.name;
    assert_tokens(name, &turn.tokens, &tokens);
    let found: Vec<_> = turn.messages.iter().map(|it| (it.message.clone(), json(&it.ending))).collect();
    let wanted: Vec<_> =
        case.messages.iter().map(|it| (it.message(), Value::String(it.ending.clone()))).collect();
    assert_eq!(found, wanted, "{name}: messages; notices {:?}", turn.notices);
    let notices: Vec<Value> = turn.notices.iter().map(json).collect();
    let matches = |found: &Value, wanted: &Value| match wanted {
        Value::Object(fields) => fields.iter().all(|(field, value)| found[field] == *value),
        name => found["problem"] == *name,
    };
    let all = notices.len() == case.notices.len()
        && notices.iter().zip(&case.notices).all(|(found, wanted)| matches(found, wanted));
    assert!(all, "{name}: found {}, wanted {}", json(&notices), json(&case.notices));
    for notice in &turn.notices {
        assert!(!notice.to_string().is_empty());
    }
    assert_stream(encoding, &tokens, &case.role, &turn, name);
    turn
}

fn json(value: &impl serde::Serialize) -> Value {
    serde_json::to_value(value).unwrap()
}

/// The events of a stream tell the same as the turn does.
pub fn assert_stream(encoding: &Encoding, tokens: &[u32], role: &Option<Role>, turn: &Turn, name: &str) {
    let mut parser = StreamParser::new(encoding, role.clone());
    let mut events = Vec::new();
    for &token in tokens {
        events.extend(parser.push(token));
        let text: String = events
            .iter()
            .rev()
            .take_while(|event| !matches!(event, Event::Start(_)))
            .filter_map(|event| match event {
                Event::Delta { text } => Some(text.as_str()),
                _ => None,
            })
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        if let Some((_, current)) = parser.current() {
            assert_eq!(current, text, "{name}: the content so far");
        }
    }
    events.extend(parser.finish());
    assert!(parser.finish().is_empty(), "{name}: finished twice");
    let mut messages = Vec::new();
    let mut notices = Vec::new();
    let mut open = None;
    for event in events {
        match (event, &mut open) {
            (Event::Notice(notice), _) => notices.push(notice),
            (Event::Start(header), None) => open = Some((header, String::new())),
            (Event::Delta { text }, Some((_, content))) => {
                assert!(!text.is_empty(), "{name}: an empty delta");
                content.push_str(&text);
            }
            (Event::End { ending }, open) => messages.push((open.take().expect(name), ending)),
            (event, _) => panic!("{name}: {event:?} out of place"),
        }
    }
    assert!(open.is_none(), "{name}: a message without an end");
    assert_eq!(notices, turn.notices, "{name}");
    assert_eq!(messages.len(), turn.messages.len(), "{name}");
    let mut covered = 0;
    for (((header, content), ending), parsed) in messages.into_iter().zip(&turn.messages) {
        let message = &parsed.message;
        assert_eq!((content.as_str(), ending), (parsed.text(), parsed.ending), "{name}");
        assert_eq!(
            (header.role, header.name, header.channel, header.recipient, header.content_type),
            (
                message.author.role.clone(),
                message.author.name.clone(),
                message.channel.clone(),
                message.recipient.clone(),
                message.content_type.clone()
            ),
            "{name}"
        );
        assert!(covered <= parsed.tokens.start && parsed.tokens.start <= parsed.tokens.end, "{name}: ranges");
        assert!(parsed.tokens.end <= tokens.len(), "{name}: ranges");
        covered = parsed.tokens.end;
        let last = parsed.tokens.clone().next_back().map(|last| tokens[last]);
        match ending {
            Ending::End => assert_eq!(last, Some(200007), "{name}"),
            Ending::Return => assert_eq!(last, Some(200002), "{name}"),
            Ending::Call => assert_eq!(last, Some(200012), "{name}"),
            Ending::Missing | Ending::Cut => {}
        }
    }
}

#[test]
fn chats_go_on_as_documented() {
    let encoding = encoding();
    let cases: Vec<Chats> = cases("chat.json");
    assert!(cases.len() >= 10, "{} cases", cases.len());
    for case in cases {
        let name = &case.name;
        let mut chat = Chat::from_conversation(&encoding, Conversation::from_messages(case.start)).unwrap();
        let mut calls: Vec<ToolCall> = Vec::new();
        for step in case.steps {
            let (turn, expected_ignored) = match step {
                Step::Prompt { prompt } => {
                    assert_tokens(name, &chat.prompt().unwrap(), &tokens(&prompt.join("\n")));
                    continue;
                }
                Step::PromptTokens { prompt_tokens } => {
                    assert_tokens(name, &chat.prompt().unwrap(), &spelled(&[], &prompt_tokens));
                    continue;
                }
                Step::User { user } => {
                    chat.add_user(user);
                    continue;
                }
                Step::Result { result, call } => {
                    assert_eq!(chat.unanswered(), calls, "{name}");
                    let found = calls.remove(0);
                    assert_eq!(found.recipient, call.recipient, "{name}");
                    if let Some(arguments) = call.arguments {
                        assert_eq!(found.json().unwrap(), arguments, "{name}");
                    }
                    chat.add_tool_result(&found, result).unwrap();
                    assert_eq!(chat.unanswered(), calls, "{name}");
                    continue;
                }
                Step::Turn { turn, ignored } => (tokens(&turn.join("\n")), ignored),
                Step::TurnTokens { turn_tokens } => (spelled(&[], &turn_tokens), 0),
            };
            let mut parser = chat.parser();
            for token in turn {
                parser.push(token);
            }
            parser.finish();
            let before = chat.len();
            let turn = parser.into_turn();
            let parsed = turn.messages.len();
            let reply = chat.apply(turn).unwrap();
            assert_eq!(reply.ignored.len(), expected_ignored, "{name}");
            assert_eq!(
                (chat.len(), reply.added),
                (before + reply.added, parsed - expected_ignored),
                "{name}"
            );
            calls = reply.calls;
        }
        // What was said can be saved and read back, analysis included.
        let json = serde_json::to_string(&chat.conversation()).unwrap();
        let back = Chat::from_conversation(&encoding, serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(back.conversation(), chat.conversation(), "{name}");
    }
}
