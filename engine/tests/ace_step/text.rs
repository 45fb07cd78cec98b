//! The prompt's encoder and the two tokenizers beside the original's results, and what must hold without them.

use std::fs;

use burn::tensor::Tensor;
use engine::Error;
use engine::ace_step::lyrics::{self, Language, Line, Lyrics, Note, english, numbers};
use engine::ace_step::prompt::{self, Tokens};
use engine::ace_step::umt5::{Config, Encoder};
use engine::backend::{Backend, Device, Float};
use engine::nn::hooks::Hooks;
use engine::reference::{Comparison, Reference, Tolerance};
use engine::weights::{self, Component, Types};
use proptest::prelude::*;
use serde::Deserialize;

use crate::devices::devices;
use crate::fixture::{assert_part, folder, lyric_vocab};

#[test]
fn umt5_is_the_original_s() {
    assert_part("umt5", 10);
}

#[test]
fn the_lyric_tokenizer_is_the_original_s() {
    if lyric_vocab().is_some() {
        assert_part("lyric_tokenizer", 27);
    } else {
        eprintln!(
            "NOT TESTED: the lyric tokenizer; its vocabulary is not here (ACE_STEP_LYRIC_VOCAB names it)"
        );
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

fn umt5(device: &Device, types: Types) -> Encoder {
    let component = Component::<Config>::open(&folder().join("umt5")).unwrap();
    component.load(device, types, &(), |weights| Encoder::new(&component.config, weights)).unwrap()
}

fn hidden(encoder: &Encoder, tokens: &Tokens) -> Result<Tensor<3>, Error> {
    encoder.forward(tokens, None, &Hooks::none())
}

#[test]
fn a_prompt_is_encoded_the_same_alone_and_beside_a_longer_one() {
    let (short, long) = (vec![17, 30, 9, 1], vec![42, 15, 27, 3, 36, 34, 43, 47, 39, 1]);
    for device in devices() {
        let encoder = umt5(&device, Types::F32);
        let both = hidden(&encoder, &Tokens::padded(vec![short.clone(), long.clone()])).unwrap();
        let width = encoder.config().d_model;
        assert_eq!(both.dims(), [2, long.len(), width]);
        for (sample, ids) in [&short, &long].into_iter().enumerate() {
            let alone = values(hidden(&encoder, &Tokens::padded(vec![ids.clone()])).unwrap());
            let part = both.clone().slice([sample..sample + 1, 0..ids.len(), 0..width]);
            let part = values(part);
            let comparison = Comparison::of("hidden", &part, &alone, Tolerance::of(1e-5));
            assert!(comparison.passed(), "{comparison}");
        }
    }
}

#[test]
fn umt5_in_bf16_is_near_the_original_in_f32() {
    let io = Reference::open(&folder().join("umt5/io.safetensors")).unwrap();
    let [_, length] = io.shape("input_ids").unwrap() else { panic!("two axes") };
    let ids: Vec<u32> = io.integers("input_ids").unwrap().iter().map(|&id| id as u32).collect();
    let mask: Vec<bool> = io.integers("attention_mask").unwrap().iter().map(|&flag| flag != 0).collect();
    let tokens = Tokens {
        ids: ids.chunks(*length).map(<[u32]>::to_vec).collect(),
        mask: mask.chunks(*length).map(<[bool]>::to_vec).collect(),
    };
    for device in devices().into_iter().filter(|device| device.supports(Float::Bf16)) {
        let hidden = hidden(&umt5(&device, Types::BF16), &tokens).unwrap();
        // 8 bits of precision over 4 blocks; the values are of size 1.
        let comparison = io.compare("last_hidden_state", hidden, Tolerance::of(0.15)).unwrap();
        assert!(comparison.passed(), "{comparison}");
        assert!(comparison.error > 1e-5, "bf16 has fewer digits than {comparison}");
    }
}

#[test]
fn the_released_encoder_has_the_parameters_that_are_published() {
    let expected = weights::expected(|weights| Encoder::new(&Config::released(), weights)).unwrap();
    let used = expected.values().filter(|tensor| tensor.role == weights::Role::Used);
    let parameters: usize = used.clone().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
    // 256384 · 768 + 12 · (4 · 768² + 3 · 768 · 2048 + 32 · 12 + 2 · 768) + 768
    assert_eq!(parameters, 281_861_376);
    assert_eq!(used.count(), 2 + 12 * 10);
    assert_eq!(
        expected["encoder.block.11.layer.0.SelfAttention.relative_attention_bias.weight"].shape,
        [32, 12]
    );
    assert_eq!(expected["encoder.embed_tokens.weight"].role, weights::Role::Optional);
}

#[test]
fn umt5_refuses_what_is_no_prompt() {
    let encoder = umt5(&Backend::Cpu.open().unwrap(), Types::F32);
    let argument = |ids: &[&[u32]], mask: &[&[bool]]| {
        let tokens = Tokens {
            ids: ids.iter().map(|ids| ids.to_vec()).collect(),
            mask: mask.iter().map(|mask| mask.to_vec()).collect(),
        };
        match hidden(&encoder, &tokens) {
            Err(Error::Argument { operation: "umt5", argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(argument(&[], &[]), "ids");
    assert_eq!(argument(&[&[]], &[&[]]), "ids");
    assert_eq!(argument(&[&[3, 1], &[1]], &[&[true; 2], &[true; 2]]), "ids");
    assert_eq!(argument(&[&[3, 1]], &[]), "mask");
    assert_eq!(argument(&[&[3, 1]], &[&[true]]), "mask");
    assert_eq!(argument(&[&[3, 1]], &[&[false; 2]]), "mask");
    let beyond = hidden(&encoder, &Tokens::padded(vec![vec![3, 48, 1]]));
    assert!(matches!(beyond, Err(Error::Token { token: 48, position: 1, vocabulary: 48 })), "{beyond:?}");
}

#[test]
fn umt5_refuses_a_configuration_that_it_cannot_run() {
    let field = |change: fn(&mut Config)| {
        let mut config = Config::released();
        change(&mut config);
        match weights::expected(|weights| Encoder::new(&config, weights)) {
            Err(Error::Model { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(field(|config| config.num_heads = 0), "num_heads");
    assert_eq!(field(|config| config.vocab_size = usize::MAX), "vocab_size");
    assert_eq!(field(|config| config.feed_forward_proj = "relu".into()), "feed_forward_proj");
    assert_eq!(field(|config| config.layer_norm_epsilon = f64::NAN), "layer_norm_epsilon");
    assert_eq!(field(|config| config.relative_attention_num_buckets = 30), "relative_attention_num_buckets");
    assert_eq!(field(|config| config.relative_attention_max_distance = 8), "relative_attention_max_distance");
}

#[test]
fn a_token_whose_row_is_no_number_is_named_when_it_is_used() {
    let original = folder().join("umt5");
    let spoilt = tempfile::tempdir().unwrap();
    fs::copy(original.join("config.json"), spoilt.path().join("config.json")).unwrap();
    let mut bytes = fs::read(original.join("model.safetensors")).unwrap();
    let component = Component::<Config>::open(&original).unwrap();
    let row =
        component.file.tensors()["shared.weight"].range.start as usize + 2 * 7 * component.config.d_model;
    bytes[row..row + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    fs::write(spoilt.path().join("model.safetensors"), bytes).unwrap();

    let device = Backend::Cpu.open().unwrap();
    let component = Component::<Config>::open(spoilt.path()).unwrap();
    let load = |weights: &weights::Weights<'_>| Encoder::new(&component.config, weights);
    let encoder = component.load(&device, Types::F32, &(), load).unwrap();
    hidden(&encoder, &Tokens::padded(vec![vec![6, 8, 1]])).unwrap();
    match hidden(&encoder, &Tokens::padded(vec![vec![6, 7, 1]])) {
        Err(Error::Weights { tensor, .. }) => assert_eq!(tensor, "shared.weight"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn weights_from_a_seed_have_a_token_table_too() {
    let mut config = Component::<Config>::open(&folder().join("umt5")).unwrap().config;
    // As large as the released one, which takes no memory.
    config.vocab_size = Config::released().vocab_size;
    let device = Backend::Cpu.open().unwrap();
    let of_seed = |seed, ids: Vec<u32>| {
        let build = |weights: &weights::Weights<'_>| Encoder::new(&config, weights);
        let encoder = weights::random(seed, &device, Types::F32, build).unwrap();
        values(hidden(&encoder, &Tokens::padded(vec![ids])).unwrap())
    };
    let first = of_seed(1, vec![256_000, 1]);
    assert!(first.iter().all(|value| value.is_finite()));
    assert_eq!(first, of_seed(1, vec![256_000, 1]));
    assert_ne!(first, of_seed(1, vec![256_001, 1]));
    assert_ne!(first, of_seed(2, vec![256_000, 1]));
}

fn prompt_tokenizer() -> prompt::Tokenizer {
    prompt::Tokenizer::open(&folder().join("umt5-tokenizer")).unwrap()
}

/// The ids are those of the paths with the highest sums of scores, found by hand.
#[test]
fn prompts_become_the_most_probable_pieces() {
    let tokenizer = prompt_tokenizer();
    let ids = |prompt: &str| tokenizer.encode(&[prompt]).unwrap().ids.remove(0);
    // ▁ja zz: −7.0, ▁ja z z: −7.6, ▁jazz: −8.0
    assert_eq!(ids("jazz"), [5, 6, 1]);
    // ▁pop: −6.5, ▁po p: −7.0
    assert_eq!(ids("pop"), [9, 1]);
    // ▁ja z: −5.8
    assert_eq!(ids("jaz"), [5, 7, 1]);
    // ▁po o: −7.0, ▁ p o o: −14.0
    assert_eq!(ids("poo, pop"), [8, 11, 12, 9, 1]);
    // Blanks are one, and wide letters are letters.
    assert_eq!(ids("pop   jazz"), [9, 5, 6, 1]);
    assert_eq!(ids("ｊａｚｚ"), [5, 6, 1]);
    // Unknown letters one after the other are one unknown.
    assert_eq!(ids("xyz"), [3, 2, 7, 1]);
    assert_eq!(ids(""), [1]);
}

#[test]
fn long_prompts_end_after_256_tokens_and_short_ones_are_padded() {
    let tokenizer = prompt_tokenizer();
    let long = "pop ".repeat(255);
    let tokens = tokenizer.encode(&[&long, &format!("{long}jazz"), "jazz"]).unwrap();
    // 255 of the words and the end; the blank at the end of the first is a token that is cut off.
    let cut = [vec![9; 255], vec![1]].concat();
    assert_eq!(tokens.ids[0], cut);
    assert_eq!(tokens.ids[1], cut);
    assert_eq!(tokens.ids[2], [vec![5, 6, 1], vec![0; 253]].concat());
    assert_eq!(tokens.mask[0], [true; 256]);
    assert_eq!(tokens.mask[2], [vec![true; 3], vec![false; 253]].concat());
    assert_eq!(tokens.shape().unwrap(), [3, 256]);
}

#[test]
fn a_file_that_is_no_prompt_tokenizer_is_refused() {
    let reason = |json: Option<String>| {
        let folder = tempfile::tempdir().unwrap();
        if let Some(json) = json {
            fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        }
        match prompt::Tokenizer::open(folder.path()) {
            Err(Error::Component { path, reason }) if path.ends_with("tokenizer.json") => reason,
            other => panic!("{other:?}"),
        }
    };
    reason(None);
    reason(Some("{}".into()));
    let json = fs::read_to_string(folder().join("umt5-tokenizer/tokenizer.json")).unwrap();
    let mut endless: serde_json::Value = serde_json::from_str(&json).unwrap();
    endless["post_processor"] = serde_json::Value::Null;
    assert!(reason(Some(endless.to_string())).contains("needed [1]"));
}

/// What Python's num2words and `re` make of numbers (`english-numbers.py`).
#[derive(Deserialize)]
struct EnglishNumbers {
    cardinals: Vec<(String, Option<String>)>,
    ordinals: Vec<(String, Option<String>)>,
    decimals: Vec<(String, Option<String>)>,
    amounts: Vec<(char, String, Option<String>)>,
    lines: Vec<(String, String)>,
}

fn english_numbers() -> EnglishNumbers {
    serde_json::from_slice(&fs::read(folder().join("english-numbers.json")).unwrap()).unwrap()
}

#[test]
fn english_numbers_are_those_of_num2words() {
    let cases = english_numbers();
    assert!(cases.cardinals.len() + cases.ordinals.len() + cases.decimals.len() + cases.amounts.len() > 800);
    for (digits, words) in cases.cardinals {
        assert_eq!(numbers::cardinal(&digits), words, "{digits}");
    }
    for (digits, words) in cases.ordinals {
        assert_eq!(numbers::ordinal(&digits), words, "{digits}th");
    }
    for (number, words) in cases.decimals {
        assert_eq!(numbers::decimal(number.parse().unwrap()), words, "{number}");
    }
    for (sign, amount, words) in cases.amounts {
        let currency = match sign {
            '£' => numbers::Currency::Pound,
            '$' => numbers::Currency::Dollar,
            '€' => numbers::Currency::Euro,
            other => panic!("{other}"),
        };
        assert_eq!(numbers::currency(amount.parse().unwrap(), currency), words, "{sign}{amount}");
    }
}

#[test]
fn english_lines_are_cleaned_as_python_cleans_them() {
    let lines = english_numbers().lines;
    assert!(lines.len() > 30);
    for (line, clean) in lines {
        assert_eq!(english::clean(&line), clean, "{line}");
    }
}

proptest! {
    /// Whatever is written, cleaning ends, and what it ends with is clean.
    #[test]
    fn cleaned_lines_are_in_lower_case_with_single_blanks(text in "([0-9.,$£€ ]|mr\\.|st|\\PC|\"){0,40}") {
        for language in Language::ALL {
            let clean = language.clean(&text);
            let words: Vec<&str> = clean.split_whitespace().collect();
            prop_assert_eq!(&words.join(" "), &clean);
            prop_assert!(!clean.contains(|c: char| c.is_ascii_uppercase()));
        }
        prop_assert!(!english::clean(&text).contains(['"', '&', '$', '0', '9']));
    }

    /// Numbers without end are no numbers, and every other one has words.
    #[test]
    fn every_positive_number_below_10_to_the_306_has_words(bits in any::<u64>()) {
        let number = f64::from_bits(bits).abs();
        let has_words = numbers::decimal(number).is_some();
        // Python's power of ten overflows for the decimals of the smallest ones.
        prop_assert!(has_words || !(1e-280..1e306).contains(&number), "{number}");
        prop_assert_eq!(numbers::currency(number, numbers::Currency::Euro).is_some(), number < 1e26);
    }
}

fn line(number: usize, text: &str, language: Language) -> Line {
    Line { number, text: text.into(), language }
}

#[test]
fn lyrics_are_in_the_language_that_is_named() {
    let text = "[verse]\n  Hello  \n\n[de] Guten Tag\nHello again\n[fr]\nBonjour\n[zh-cn]ni3hao3\n[hook]";
    let lyrics = Lyrics::parse(text, Language::En);
    let expected = [
        line(1, "[verse]", Language::En),
        line(2, "Hello", Language::En),
        line(3, "", Language::En),
        line(4, "Guten Tag", Language::De),
        line(5, "Hello again", Language::En),
        line(7, "Bonjour", Language::Fr),
        line(8, "ni3hao3", Language::Zh),
        line(9, "[hook]", Language::Fr),
    ];
    assert_eq!(lyrics.lines, expected);
    assert_eq!(Lyrics::parse("", Language::En), Lyrics::default());
    assert_eq!(Language::ALL.map(|language| language.code().parse()), Language::ALL.map(Ok));
    assert!("xx".parse::<Language>().is_err());
}

#[test]
fn other_languages_keep_what_needs_their_words() {
    assert_eq!(Language::De.clean(" Das \"SCHÖNE\"  Lied "), "das schöne lied");
    assert_eq!(Language::Tr.clean("İstanbul ÖÜ"), "istanbul öü");
    assert_eq!(Language::Ru.clean("Сердце  бьётся"), "сердце бьётся");
    assert_eq!(Language::Zh.clean("Ni3hao3"), "ni3hao3");
    assert_eq!(Language::De.clean("5 & 6"), "5 & 6");
}

fn lyric_tokenizer() -> Option<lyrics::Tokenizer> {
    let vocabulary = lyric_vocab();
    if vocabulary.is_none() {
        eprintln!("NOT TESTED: lyrics as ids; the vocabulary is not here (ACE_STEP_LYRIC_VOCAB names it)");
    }
    vocabulary.map(|path| lyrics::Tokenizer::open(&path).unwrap())
}

#[test]
fn without_lyrics_one_id_is_masked() {
    let Some(tokenizer) = lyric_tokenizer() else { return };
    let none = tokenizer.encode(&Lyrics::default()).unwrap();
    assert_eq!((none.ids, none.mask), (vec![0], vec![false]));
    let blank = tokenizer.encode(&Lyrics::parse(" ", Language::En)).unwrap();
    assert_eq!((blank.ids, blank.mask), (vec![lyrics::START, lyrics::SPACE], vec![true; 2]));
}

#[test]
fn tags_are_english_wherever_they_stand() {
    let Some(tokenizer) = lyric_tokenizer() else { return };
    let tags = lyrics::TAGS.map(|tag| format!("[{tag}]")).join("\n");
    let song = tokenizer.encode(&Lyrics::parse(&tags, Language::De)).unwrap();
    let expected = (6681..=6692).flat_map(|tag| [259, tag, lyrics::SPACE]);
    assert_eq!(song.ids, [lyrics::START].into_iter().chain(expected).collect::<Vec<u32>>());
    assert_eq!(song.notes, []);
}

#[test]
fn notes_say_what_to_write_otherwise() {
    let Some(tokenizer) = lyric_tokenizer() else { return };
    let notes = |text: &str, language| tokenizer.encode(&Lyrics::parse(text, language)).unwrap().notes;
    assert_eq!(notes("[verse]\nI have 5 & $2, ok?", Language::En), []);
    assert_eq!(notes("wo3 ai4 yin1yue4", Language::Zh), []);
    let unwritten = |line, language, found: &str| Note::Unwritten { line, language, found: found.into() };
    assert_eq!(notes("Hallo\n99 Luftballons & 9", Language::De), [unwritten(2, Language::De, "9&")]);
    assert_eq!(notes("[de]\n99 Luftballons", Language::En), [unwritten(2, Language::De, "9")]);
    assert_eq!(notes("ni3 5 hao3", Language::Zh), [unwritten(1, Language::Zh, "5")]);
    assert_eq!(
        notes("[Instrumental]", Language::En),
        [Note::Tag { line: 1, found: "[Instrumental]".into() }]
    );
    assert_eq!(notes("[verse 2] ♪", Language::En).len(), 2);
    assert_eq!(notes("I ♪ you {{", Language::En), [Note::Unknown { line: 1, found: "♪{".into() }]);
}

#[test]
fn other_scripts_are_refused_with_what_to_write() {
    let Some(tokenizer) = lyric_tokenizer() else { return };
    let refused = |text: &str, language| match tokenizer.encode(&Lyrics::parse(text, language)) {
        Err(Error::Lyrics { line, found, needed }) => (line, found, needed),
        other => panic!("{other:?}"),
    };
    let (line, found, needed) = refused("[verse]\n你好 world", Language::Zh);
    assert_eq!((line, found.as_str()), (2, "你好"));
    assert!(needed.contains("pinyin"));
    assert!(refused("음악", Language::Ko).2.contains("salanghae-yo"));
    assert!(refused("さくらの木", Language::Ja).2.contains("romaji"));
    assert!(refused("Hello 世界", Language::En).2.contains("pinyin"));
    assert!(refused("[副歌]", Language::Zh).2.contains("[chorus]"));
}

#[test]
fn a_file_that_is_no_lyric_vocabulary_is_refused() {
    let prompt = folder().join("umt5-tokenizer/tokenizer.json");
    for path in [prompt, folder().join("umt5/config.json"), folder().join("absent.json")] {
        match lyrics::Tokenizer::open(&path) {
            Err(Error::Component { path: refused, .. }) => assert_eq!(refused, path),
            other => panic!("{other:?}"),
        }
    }
}
