//! The demo model, expanded, exported, verified and loaded, answers held-out questions exactly. A fixed sample; the
//! example `evaluate_demo` measures all of them.

#[path = "suite/devices.rs"]
mod devices;
#[path = "../examples/evaluate_demo/evaluation.rs"]
mod evaluation;

use std::fs;
use std::path::Path;
use std::sync::Once;

use engine::backend::{Backend, Device};
use engine::demo;
use engine::gpt_oss::{LoadOptions, Model};
use engine::sampling::Options;
use evaluation::{Score, answer};
use fixtures::conversations::{Skill, held_out};

fn load(device: &Device, options: &LoadOptions) -> Model {
    static FRESH: Once = Once::new();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("demo");
    // What is there may be an earlier version's.
    FRESH.call_once(|| drop(fs::remove_dir_all(&folder)));
    let stored = demo::open(&folder, &()).unwrap();
    assert!(stored.path().ends_with("model.bin"));
    Model::load(&stored, options, device, &()).unwrap()
}

#[test]
fn held_out_questions_are_answered_exactly() {
    let model = load(&Backend::Cpu.open().unwrap(), &LoadOptions::default());
    let mut total = Score::default();
    for skill in Skill::ALL {
        let mut score = Score::default();
        for index in 0..12 {
            score.add(&model, &held_out(skill, index).unwrap()).unwrap();
        }
        let [greedy, warm] = score.rates();
        println!("{:<16}{greedy:>8.3}{warm:>8.3}", skill.name());
        // A skill at 99 % misses two of twelve once in 150 times.
        assert!(score.greedy >= 11, "{}: {} of 12", skill.name(), score.greedy);
        total.examples += score.examples;
        total.greedy += score.greedy;
        total.probability += score.probability;
    }
    let [greedy, warm] = total.rates();
    assert!(greedy >= 0.99 && warm >= 0.99, "in all {greedy} greedily, {warm} at temperature 1");
}

/// What the measurement in one pass stands for: turns generated token by token, from a cache, by both samplers.
#[test]
fn generated_turns_are_the_expected_ones() {
    let model = load(&Backend::Cpu.open().unwrap(), &LoadOptions::default());
    let (mut right, mut all) = (0, 0);
    for skill in Skill::ALL {
        for (index, sampling) in [(20, Options::greedy()), (21, Options { seed: 1, ..Options::default() })] {
            for turn in held_out(skill, index).unwrap().turns {
                let found =
                    answer(&model, &turn.prompt_tokens, sampling.clone(), turn.expected.len() + 8).unwrap();
                all += 1;
                if found == turn.expected {
                    right += 1;
                } else {
                    println!("{} {index}: {:?} instead of {:?}", skill.name(), found, turn.expected);
                }
            }
        }
    }
    assert!(right + 1 >= all, "{right} of {all}");
}

/// `fixtures/demo/genuine.sh` made the file with OpenAI's own module.
#[test]
fn greedy_turns_are_those_of_the_genuine_module() {
    #[derive(serde::Deserialize)]
    struct Genuine {
        skill: String,
        index: u64,
        turn: usize,
        tokens: Vec<u32>,
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/demo/genuine-greedy.json");
    let genuine: Vec<Genuine> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(genuine.len() >= Skill::ALL.len());
    let model = load(&Backend::Cpu.open().unwrap(), &LoadOptions::default());
    for Genuine { skill, index, turn, tokens } in genuine {
        let kind = Skill::ALL.into_iter().find(|kind| kind.name() == skill).unwrap();
        let prompt = &held_out(kind, index).unwrap().turns[turn].prompt_tokens;
        assert_eq!(
            answer(&model, prompt, Options::greedy(), 256).unwrap(),
            tokens,
            "{skill} {index}, turn {turn}"
        );
    }
}

/// Greedy turns of 256 tokens together: every device writes what plain tensors on the processor write.
#[test]
fn greedy_turns_are_the_same_on_every_device() {
    let turns: Vec<_> = Skill::ALL.into_iter().flat_map(|skill| held_out(skill, 3).unwrap().turns).collect();
    let write = |device: &Device, options: &LoadOptions| {
        let model = load(device, options);
        let mut texts: Vec<Vec<u32>> = Vec::new();
        for turn in &turns {
            if texts.iter().map(Vec::len).sum::<usize>() < 256 {
                texts.push(answer(&model, &turn.prompt_tokens, Options::greedy(), 256).unwrap());
            }
        }
        texts
    };
    let plain = LoadOptions { plain_tensors: true, ..LoadOptions::default() };
    let texts = write(&Backend::Cpu.open().unwrap(), &plain);
    assert!(texts.iter().map(Vec::len).sum::<usize>() >= 256);
    for device in devices::devices() {
        assert_eq!(write(&device, &LoadOptions::default()), texts, "{}", device.backend());
    }
}
