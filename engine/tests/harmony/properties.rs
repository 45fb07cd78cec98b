//! What holds for any tokens.

use engine::harmony::{Chat, Role, Turn};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::case::{SPECIAL, TOKENIZER, encoding, plain, tokens};
use crate::corpus::assert_stream;

/// Pieces that headers and their accidents are made of.
const PIECES: [&str; 24] = [
    "assistant",
    "user",
    "functions.f",
    "analysis",
    "commentary",
    "final",
    " to=functions.f",
    "to=",
    " json",
    "code",
    " ",
    "\n",
    "?",
    "{\"a\":1}",
    "Hello there",
    "💖",
    "naïve",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|start|>",
    "<|end|>",
    "<|",
    "word word word word word word word word word word word word word word word word word word word ",
];

fn special() -> impl Strategy<Value = u32> {
    select(SPECIAL.map(|(_, id)| id).to_vec())
}

/// Any ids, most of them special or of text that occurs in headers.
fn any_tokens() -> impl Strategy<Value = Vec<u32>> {
    let text = select(PIECES.to_vec()).prop_map(plain);
    let token = prop_oneof![
        6 => special().prop_map(|id| vec![id]),
        8 => text,
        1 => (0..200_100u32).prop_map(|id| vec![id]),
        1 => any::<u32>().prop_map(|id| vec![id]),
    ];
    vec(token, 0..40).prop_map(|parts| parts.concat())
}

fn any_role() -> impl Strategy<Value = Option<Role>> {
    select(vec![None, Some(Role::Assistant), Some(Role::User)])
}

/// The same bytes as other tokens: every text token as its single bytes.
fn bytewise(tokens: &[u32]) -> Vec<u32> {
    let single = |byte: &u8| TOKENIZER.id(&[*byte]).unwrap();
    let split = |&id: &u32| match TOKENIZER.token(id) {
        Some(bytes) if id < 199_998 => bytes.iter().map(single).collect(),
        _ => vec![id],
    };
    tokens.iter().flat_map(split).collect()
}

fn said(turn: &Turn) -> Vec<(String, String)> {
    turn.messages.iter().map(|it| (format!("{:?}", it.message), format!("{:?}", it.ending))).collect()
}

/// A message of the assistant: channel, recipient, whether that stands in the role section, type, content.
fn any_message() -> impl Strategy<Value = (&'static str, Option<&'static str>, bool, &'static str, String)> {
    (
        select(vec!["analysis", "commentary", "final"]),
        select(vec![None, Some("functions.f"), Some("python"), Some("browser.search")]),
        any::<bool>(),
        select(vec!["", " <|constrain|>json", "<|constrain|>json", " code"]),
        ".{0,40}",
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics_and_all_tokens_are_kept(tokens in any_tokens(), role in any_role()) {
        let encoding = encoding();
        let turn = encoding.parse(&tokens, role.clone());
        prop_assert_eq!(&turn.tokens, &tokens);
        assert_stream(&encoding, &tokens, &role, &turn, "any tokens");
    }

    #[test]
    fn every_turn_can_be_added_and_said_again(tokens in any_tokens()) {
        let encoding = encoding();
        let mut chat = Chat::new(&encoding);
        chat.add_user("Hello");
        let mut parser = chat.parser();
        tokens.iter().for_each(|token| {
            parser.push(*token);
        });
        let turn = parser.into_turn();
        let own = turn.messages.iter().take_while(|it| it.message.author.role == Role::Assistant).count();
        let reply = chat.apply(turn).unwrap();
        prop_assert_eq!(reply.added, own);
        prop_assert_eq!(chat.len(), 1 + own);
        chat.prompt().unwrap();
    }

    #[test]
    fn what_is_between_message_and_end_is_the_content(
        before in any_tokens(),
        text in "[^\u{0}]{1,60}",
        after in any_tokens(),
    ) {
        // Whatever came before, a message that begins well is read well.
        let message = [tokens("<|start|>assistant<|channel|>final<|message|>"), plain(&text), tokens("<|end|>")];
        let all = [before, message.concat(), tokens("<|start|>"), after].concat();
        let turn = encoding().parse(&all, Some(Role::Assistant));
        let found = turn.messages.iter().any(|it| {
            it.text() == text && it.is_well_formed && it.message.channel.as_deref() == Some("final")
        });
        prop_assert!(found, "{:?}", turn);
    }

    #[test]
    fn well_formed_messages_come_back(messages in vec(any_message(), 1..6)) {
        let encoding = encoding();
        let mut all = Vec::new();
        for (channel, recipient, in_role, content_type, text) in &messages {
            let to = recipient.map_or(String::new(), |name| format!(" to={name}"));
            // Without a recipient a bare word has no place.
            let content_type = if recipient.is_none() && !content_type.contains('<') { "" } else { content_type };
            let (role, after) = if *in_role { (to.as_str(), "") } else { ("", to.as_str()) };
            all.extend(tokens(&format!("<|start|>assistant{role}<|channel|>{channel}{after}{content_type}<|message|>")));
            all.extend(plain(text));
            all.extend(tokens(if recipient.is_some() { "<|call|>" } else { "<|end|>" }));
        }
        for stream in [all.clone(), bytewise(&all)] {
            let turn = encoding.parse(&stream, None);
            prop_assert_eq!(&turn.notices, &[]);
            prop_assert_eq!(turn.messages.len(), messages.len());
            for (parsed, (channel, recipient, _, _, text)) in turn.messages.iter().zip(&messages) {
                prop_assert_eq!(parsed.text(), text);
                prop_assert_eq!(parsed.message.channel.as_deref(), Some(*channel));
                prop_assert_eq!(parsed.message.recipient.as_deref(), *recipient);
                prop_assert_eq!(parsed.call().is_some(), recipient.is_some());
            }
        }
    }

    #[test]
    fn how_text_is_cut_into_tokens_changes_nothing(tokens in any_tokens(), role in any_role()) {
        let encoding = encoding();
        let turn = encoding.parse(&tokens, role.clone());
        let again = encoding.parse(&bytewise(&tokens), role);
        prop_assert_eq!(said(&turn), said(&again));
    }

    #[test]
    fn content_is_decoded_as_a_whole(ids in vec(0..199_998u32, 0..30)) {
        let all = [tokens("<|channel|>final<|message|>"), ids.clone(), tokens("<|return|>")].concat();
        let turn = encoding().parse(&all, Some(Role::Assistant));
        prop_assert_eq!(turn.text("final"), TOKENIZER.decode_lossy(&ids));
    }
}
