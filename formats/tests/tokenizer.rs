//! Vocabulary and tokenizer: against tiktoken-rs, against the genuine exporter's bytes, against a naive merge.

use std::sync::LazyLock;

use formats::model_bin::header::{TOKENIZER_UUID, Uuid};
use formats::tokenizer::{DecodeError, EncodeError, MAX_PATTERN, Tokenizer, VocabularyError};
use formats::vocabulary::{Overrun, TiktokenError, Vocabulary};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

static O200K: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(Vocabulary::o200k()).unwrap());

fn vocabulary(tokens: &[&[u8]], regex: &str) -> Vocabulary {
    Vocabulary {
        special_uuids: Vec::new(),
        regex: regex.into(),
        records: tokens
            .iter()
            .flat_map(|token| [&(token.len() as u16).to_le_bytes(), *token].concat())
            .collect(),
        num_text_tokens: tokens.len() as u32,
    }
}

fn tokenizer(tokens: &[&[u8]], regex: &str) -> Tokenizer {
    Tokenizer::new(&vocabulary(tokens, regex)).unwrap()
}

/// A vocabulary of all single bytes.
fn bytewise(regex: &str) -> Vocabulary {
    let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
    let tokens: Vec<&[u8]> = bytes.iter().map(|byte| &byte[..]).collect();
    vocabulary(&tokens, regex)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn o200k_is_the_genuine_exporters() {
    let o200k = Vocabulary::o200k();
    let mut section = TOKENIZER_UUID.0.to_vec();
    for size in [
        o200k.special_uuids.len(),
        o200k.num_text_tokens as usize,
        o200k.regex.len() + 1,
        o200k.records.len(),
    ] {
        section.extend((size as u32).to_le_bytes());
    }
    section.extend(o200k.special_uuids.iter().flat_map(|uuid| uuid.0));
    section.extend(o200k.regex.as_bytes());
    section.push(0);
    section.extend(&o200k.records);
    assert_eq!(116 + section.len(), 1_798_345);
    section.resize(1_802_240 - 116, 0);
    assert_eq!(sha256(&section), "fa67aa10e825696ec618175bd977c6d9ddee701bfc1e3690afe449d56713e76d");
    assert_eq!(o200k.len(), 200_014);
}

#[test]
fn o200k_renders_as_the_upstream_file_and_reads_back() {
    let o200k = Vocabulary::o200k();
    let file = o200k.tiktoken_bytes().unwrap();
    assert_eq!(sha256(&file), "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d");
    let text = String::from_utf8(file).unwrap();
    let back = Vocabulary::from_tiktoken(&text, &o200k.regex, o200k.special_uuids.clone()).unwrap();
    assert!(back == *o200k);
}

#[test]
fn special_tokens_have_the_ids_that_the_runtime_expects() {
    let found: Vec<_> = Vocabulary::o200k().special_tokens().map(|(id, token)| (id, token.name)).collect();
    let expected = [
        (200000, "<|untrusted|>"),
        (200002, "<|return|>"),
        (200003, "<|constrain|>"),
        (200005, "<|channel|>"),
        (200006, "<|start|>"),
        (200007, "<|end|>"),
        (200008, "<|message|>"),
        (200012, "<|call|>"),
        (200013, "<|refusal|>"),
    ];
    assert_eq!(found, expected);
    for (id, name) in expected {
        assert_eq!((O200K.special_id(name), O200K.token(id)), (Some(id), Some(name.as_bytes())));
    }
    assert_eq!([O200K.special_id("<|end_untrusted|>"), O200K.special_id("<|endoftext|>")], [None, None]);
}

#[test]
fn tiktoken_files_are_read_in_any_order_and_faults_are_named() {
    let read = |text| Vocabulary::from_tiktoken(text, "x", vec![Uuid::default()]);
    let read_error = |text| read(text).unwrap_err();
    let vocabulary = read("YmM= 1\n\nYQ== 0\n").unwrap();
    assert_eq!(vocabulary.tokens().collect::<Result<Vec<_>, _>>().unwrap(), [&b"a"[..], b"bc"]);
    assert_eq!((vocabulary.len(), &*vocabulary.regex), (3, "x"));
    assert_eq!(vocabulary.tiktoken_bytes().unwrap(), b"YQ== 0\nYmM= 1\n");
    assert_eq!(read("").unwrap().len(), 1);

    let rank = "a rank below the number of tokens";
    for (text, line, needed) in [
        ("YQ== 0\nYg==", 2, "Base64, a space and a rank"),
        ("Y! 0", 1, "a token in Base64"),
        ("YQ== 1", 1, rank),
        ("YQ== 4000000000", 1, rank),
        ("YQ== 99999999999999999999999", 1, rank),
        ("YQ== -1", 1, rank),
        ("YQ== 0 ", 1, rank),
        ("YQ== 0\n\nYg== 0", 3, "a rank that no other token has"),
    ] {
        assert_eq!(read_error(text), TiktokenError { line, needed }, "{text:?}");
    }
    let long = format!("{} 0", "AAAA".repeat(65536 / 3 + 1));
    assert_eq!(read_error(&long), TiktokenError { line: 1, needed: "a token of at most 65535 bytes" });
}

#[test]
fn malformed_records_end_the_tokens_with_an_error() {
    let whole = vocabulary(&[b"a", b"", b"bcd"], "x").records;
    for length in 0..whole.len() {
        let cut = Vocabulary { records: whole[..length].to_vec(), ..vocabulary(&[], "x") };
        let tokens: Vec<_> = cut.tokens().collect();
        let start = [0, 3, 5].into_iter().rfind(|&start| start < length).unwrap_or(0);
        let overrun = Overrun { start, end: length };
        if [0, 3, 5].contains(&length) {
            assert!(tokens.iter().all(Result::is_ok));
        } else {
            assert_eq!(tokens.last(), Some(&Err(overrun)), "{length}");
            assert_eq!(cut.tiktoken_bytes(), Err(overrun));
            assert_eq!(Tokenizer::new(&cut).unwrap_err(), VocabularyError::Overrun(overrun));
        }
    }
    let short = Vocabulary { num_text_tokens: 4, ..vocabulary(&[b"a", b"b", b"c"], "x") };
    assert_eq!(Tokenizer::new(&short).unwrap_err(), VocabularyError::Count { found: 3, needed: 4 });
    let vast = Vocabulary { num_text_tokens: u32::MAX, ..short };
    assert_eq!(Tokenizer::new(&vast).unwrap_err(), VocabularyError::TooMany(u32::MAX.into()));
}

/// Snippets that exercise each alternative of o200k's pattern.
const SNIPPETS: &[&str] = &[
    "The quick brown fox jumps over the lazy dog. ",
    "It's what they'd said: \"We'll see, I'm sure you've done it, they're late, don't.\" HE'S HERE'LL ",
    "fn main() {\n    let x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n\tprintln!(\"{x:?}\");\n}\n",
    "def f(a, *, b=None):\r\n    return {'a': a, \"b\": [b] * 3}  # comment\r\n\r\n",
    "<div class=\"x-y\"><a href='https://example.org/a/b?c=d&e=%20#f'>link</a></div>\n",
    "SELECT COUNT(*) FROM t WHERE a >= 1e-9 AND b != 'x''y'; -- done\n",
    "1 12 123 1234 12345678901234567890 3.14159 0xdeadBEEF 1,000,000 ١٢٣٤ ④⑤Ⅷ½ ",
    "Größe, naïve, Ça va? ¿Qué tal, señor? Łódź, Příliš žluťoučký kůň. ",
    "Съешь ещё этих мягких французских булок, да выпей чаю. ",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ",
    "いろはにほへと ちりぬるを。 東京特許許可局、隣の客はよく柿食う客だ。\n",
    "我能吞下玻璃而不伤身体。機器學習模型。",
    "키스의 고유조건은 입술끼리 만나야 하고 ",
    "אני יכול לאכול זכוכית. نص حكيم له سر قاطع وذو شأن عظيم ",
    "मैं काँच खा सकता हूँ। ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ",
    "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽 e\u{301}o\u{308} Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤a̴̵̜l̶̢̡g͍̖o \u{1f1e9}\u{1f1ea} ",
    "ǅungla ǈubav ʰʷ camelCaseWordsHTTPServer snake_case_word SCREAMING_CASE iPhone ",
    "   ",
    "\t\t",
    "\n",
    "\n\n\n",
    " \n \n",
    "\r\n\r\n",
    "\r",
    "      x",
    "\u{a0}\u{2003}\u{3000}",
    "\u{2028}\u{85}",
    "\0\u{1}\u{7}\u{8}\u{b}\u{c}\u{1b}[31m\u{7f}",
    "\u{feff}",
    "\u{200b}\u{200d}\u{fffd}\u{10ffff}\u{e000}",
    "!!!???...---===///\\\\\\",
    " ===\n/\n//\r\n",
    "\"'`´‘’“”«»",
    "'S'T'RE'll'D 'tis ",
    "ſ'ſ K's",
    "<|start|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababababab",
    "================================",
];

/// A long text from the snippets, with long runs between them; the same every time.
fn mixed_text(bytes: usize) -> String {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    let mut text = String::new();
    while text.len() < bytes {
        let snippet = SNIPPETS[random(SNIPPETS.len())];
        match random(200) {
            0 => text.push_str(&snippet.repeat(1 + random(40))),
            1 => (0..random(3000)).for_each(|_| text.extend(snippet.chars().next())),
            2..40 => text.extend(snippet.chars().skip(random(8)).take(random(12))),
            _ => text.push_str(snippet),
        }
    }
    text
}

#[test]
fn encodes_a_large_mixed_text_as_tiktoken_does() {
    let text = mixed_text(1 << 20);
    let ids = O200K.encode(&text).unwrap();
    assert!(ids == tiktoken_rs::o200k_base_singleton().encode_ordinary(&text), "another encoding");
    assert!(O200K.decode(&ids).unwrap() == text.as_bytes());
    assert!(O200K.decode_lossy(&ids) == text);
}

#[test]
fn encodes_long_runs_as_tiktoken_does() {
    for run in ["a", "A", "ab", "7", "!", " ", "\n", " \n", "\u{301}", "中", "aA", "=", "\u{1f600}", "zq"] {
        for text in [run.repeat(20_000), format!("x{}x", run.repeat(9_999))] {
            let ids = O200K.encode(&text).unwrap();
            assert!(ids == tiktoken_rs::o200k_base_singleton().encode_ordinary(&text), "run of {run:?}");
        }
    }
}

proptest! {
    #[test]
    fn encodes_any_text_as_tiktoken_does(text in prop_oneof![
        ".{0,200}",
        "[ \\t\\r\\n\u{a0}a-cA-C1-3'!/]{0,80}",
        "[\u{300}-\u{310}aAʰ中ǅ ']{0,60}",
        proptest::collection::vec(any::<char>(), 0..100).prop_map(String::from_iter),
    ]) {
        let ids = O200K.encode(&text).unwrap();
        prop_assert_eq!(&ids, &tiktoken_rs::o200k_base_singleton().encode_ordinary(&text));
        prop_assert_eq!(O200K.decode(&ids).unwrap(), text.as_bytes());
    }

    /// In any vocabulary, also one with duplicates: the merge of the definition, pair by pair.
    #[test]
    fn merges_as_defined(
        tokens in proptest::collection::vec("[abc]{2,6}", 0..40),
        text in "[abc]{0,60}",
    ) {
        let tokens: Vec<&[u8]> = [&b"b"[..], b"a", b"c"].into_iter().chain(tokens.iter().map(String::as_bytes)).collect();
        let rank = |bytes: &[u8]| tokens.iter().position(|token| *token == bytes);
        let mut parts: Vec<Vec<u8>> = text.bytes().map(|byte| vec![byte]).collect();
        if let Some(id) = rank(text.as_bytes()) {
            parts = vec![tokens[id].to_vec()];
        }
        while let Some((_, at)) = (1..parts.len())
            .filter_map(|at| Some((rank(&parts[at - 1..=at].concat())?, at)))
            .min()
        {
            let merged = parts[at - 1..=at].concat();
            parts.splice(at - 1..=at, [merged]);
        }
        let expected: Vec<u32> = parts.iter().map(|part| rank(part).unwrap() as u32).collect();
        prop_assert_eq!(tokenizer(&tokens, ".+").encode(&text).unwrap(), expected);
    }

    /// Whatever the pattern: an encoding that decodes to the text, or an error; never a panic.
    #[test]
    fn any_pattern_is_survived(pattern in "[ab().*+?|\\[\\]\\\\^$<=!{}0-9,Ksp]{0,20}", text in "[ab \n]{0,40}") {
        if let Ok(tokenizer) = Tokenizer::new(&bytewise(&pattern)) && let Ok(ids) = tokenizer.encode(&text) {
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.as_bytes());
        }
    }
}

#[test]
fn special_names_are_tokens_only_where_asked_for() {
    let text = "<|start|>user<|message|>a <|b|> <|endoftext|><|end|><|start|>";
    let ids = O200K.encode_with_special(text).unwrap();
    let ordinary = |text| tiktoken_rs::o200k_base_singleton().encode_ordinary(text);
    let expected = [
        vec![200006],
        ordinary("user"),
        vec![200008],
        ordinary("a <|b|> <|endoftext|>"),
        vec![200007, 200006],
    ];
    assert_eq!(ids, expected.concat());
    assert_eq!(O200K.decode_lossy(&ids), text);
    assert_eq!(O200K.encode(text).unwrap(), ordinary(text));
    assert_eq!(O200K.encode_with_special("").unwrap(), Vec::<u32>::new());

    // tiktoken's own special tokens of o200k_harmony, as far as their names agree.
    let text = "<|start|>assistant<|channel|>analysis<|message|>Let's see.<|end|><|<|call|>|><|return|>";
    let harmony = tiktoken_rs::o200k_harmony_singleton().encode_with_special_tokens(text);
    assert_eq!(O200K.encode_with_special(text).unwrap(), harmony);
}

#[test]
fn special_tokens_follow_the_text_tokens_of_the_vocabulary() {
    let start = Vocabulary::o200k().special_uuids[200006 - 199998];
    let vocabulary = Vocabulary { special_uuids: vec![Uuid::default(), start, start], ..bytewise(".") };
    let tokenizer = Tokenizer::new(&vocabulary).unwrap();
    assert_eq!(tokenizer.encode_with_special("a<|start|><|end").unwrap(), [97, 257, 60, 124, 101, 110, 100]);
    assert_eq!(tokenizer.decode(&[257]).unwrap(), b"<|start|>");
}

#[test]
fn tokens_without_text_are_refused_or_replaced() {
    for id in [199_998, 199_999, 200_001, 200_014, u32::MAX] {
        assert_eq!(O200K.decode(&[0, id]).unwrap_err(), DecodeError { id, index: 1 });
        assert_eq!(O200K.decode_lossy(&[0, id, 0]), "!\u{fffd}!");
    }
    assert_eq!(O200K.decode(&[]).unwrap(), b"");
    // The first byte of a two-byte character alone.
    let id = O200K.id(b"\xc3").unwrap();
    assert_eq!((O200K.decode(&[id]).unwrap(), O200K.decode_lossy(&[id])), (vec![0xc3], "\u{fffd}".into()));
}

#[test]
fn bytes_without_a_token_are_named() {
    let small = tokenizer(&[b"a", b"b", b"ab", b"xy"], "[a-z]+|\\s+");
    assert_eq!(small.encode("abaab").unwrap(), [2, 0, 2]);
    assert_eq!(small.encode("abxyxy").unwrap(), [2, 3, 3], "x and y only exist merged");
    assert_eq!(small.encode("abxyx").unwrap_err(), EncodeError::MissingByte { byte: b'x', at: 4 });
    assert_eq!(small.encode("ab ab").unwrap_err(), EncodeError::MissingByte { byte: b' ', at: 2 });
    let nothing = tokenizer(&[], ".");
    assert_eq!(nothing.encode("").unwrap(), Vec::<u32>::new());
    assert_eq!(nothing.encode("é").unwrap_err(), EncodeError::MissingByte { byte: 0xc3, at: 0 });
}

#[test]
fn text_that_the_pattern_does_not_match_is_named() {
    for (pattern, text, at) in [
        ("a", "aab", 2),
        ("a", "baa", 0),
        ("a*", "aab", 2),
        ("", "a", 0),
        ("a\\Kb", "ab", 0),
        ("(?=(ab)\\K)", "ab", 0),
        ("^a", "aa", 1),
    ] {
        let tokenizer = Tokenizer::new(&bytewise(pattern)).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap_err(), EncodeError::Unmatched { at }, "{pattern}");
    }
}

#[test]
fn hostile_patterns_are_refused_at_once() {
    let nested = format!("{}a{}", "(".repeat(1000), ")".repeat(1000));
    let many = r"(?:\w{90}(?!a))".repeat(130);
    for pattern in [
        r"(((a{500}){500}){500})",
        r"((((a{500}){500}){500})(?!b)){500}",
        r"\w{100000}",
        r"(?:\w{1000}(?!a)){1000}",
        r"(a\g<1>|\g<1>\g<1>)\g<1>",
        r"(?<!\w{1000})a",
        r"(?<=(?:\w{1,200}){1,200}a)b",
        "(",
        "[",
        "\\",
        "(?P<a>x)\\k<b>",
        &nested,
        &many,
    ] {
        let error = Tokenizer::new(&bytewise(pattern)).map(|_| ());
        assert!(matches!(error, Err(VocabularyError::Pattern(_))), "{pattern}: {error:?}");
    }
    let long = "a".repeat(MAX_PATTERN + 1);
    assert_eq!(
        Tokenizer::new(&bytewise(&long)).unwrap_err(),
        VocabularyError::PatternLength(MAX_PATTERN + 1)
    );
}

#[test]
fn patterns_that_backtrack_without_end_are_stopped() {
    for (pattern, text) in [
        (r"(?:(?:a|a(?!c))+)+b|.", "a".repeat(40)),
        (r"(a|a)*\1b", "a".repeat(40)),
        (r"(?:(?=a)a|a(?!b))*c", "a".repeat(60)),
        (r"(a*)*(\1)*b", "a".repeat(60)),
    ] {
        let error = Tokenizer::new(&bytewise(pattern)).unwrap().encode(&text).unwrap_err();
        assert!(matches!(error, EncodeError::Search { at: 0, .. }), "{pattern}: {error}");
    }
}

#[test]
fn patterns_that_look_at_the_whole_rest_for_each_piece_are_stopped() {
    // Each piece is one byte, found after a search to the end: seconds for half a megabyte, quadratic from there.
    let error = Tokenizer::new(&bytewise("a*!|a")).unwrap().encode(&"a".repeat(1 << 19)).unwrap_err();
    assert!(matches!(error, EncodeError::Time { .. }), "{error}");
}

#[test]
fn a_million_spaces_are_an_error_and_no_crash() {
    let error = O200K.encode(&" ".repeat(1_100_000)).unwrap_err();
    assert!(matches!(error, EncodeError::Search { at: 0, .. }), "{error}");
}
