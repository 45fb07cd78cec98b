//! `demo`: from the checkpoint of the built-in model to a conversation that one can see is right.

use std::env;
use std::io::{self, Write};
use std::path::{self, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueHint;
use engine::command::{Styles, interrupt};
use engine::gpt_oss::Session;
use engine::harmony::{Chat, DeveloperContent, Encoding, SystemContent};
use formats::command::{CheckpointOptions, Console, Outcome, Talk, Verb};
use formats::model_bin::{Stored, StoredOptions};
use formats::output::{OutputFolder, TemporaryFolder};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::NAME;
use crate::conversation::{self, Effort};
use crate::options::{DeviceOptions, SamplingOptions, Stops};
use crate::tools::{self, Tools};
use crate::turn::{self, Answer};
use crate::view::{Lines, Stats, Text, View};

/// What the demo model is, wherever it speaks.
pub const INTRODUCTION: &str = "This is a tiny demo model that this project trained: GPT-OSS's architecture with a few million \
     parameters.\nIt knows a handful of skills and nothing of the world. It is no model of OpenAI's.";

#[derive(clap::Args)]
pub struct Arguments {
    /// Keep checkpoint and model.bin in this folder instead of a temporary one.
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    dst: Option<PathBuf>,
    /// Chooses the numbers and words of the questions.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceOptions,
}

/// Things for lists, from the words that the model knows.
const NOUNS: &[&str] = &include!("../../../../fixtures/demo/nouns.in");
const NAMES: [&str; 8] = ["Anna", "Daniel", "Emma", "Henry", "Laura", "Oscar", "Sarah", "Victor"];
const CITIES: [&str; 8] = ["Berlin", "Boston", "London", "Madrid", "Paris", "Rome", "Tokyo", "Toronto"];
const GOODS: [&str; 8] = ["book", "bread", "coat", "coffee", "lamp", "milk", "shirt", "tea"];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// A question, and what makes an answer to it right.
struct Question {
    text: String,
    /// What the answer has to contain, computed here.
    expected: String,
    /// The calls that it takes: names and arguments.
    calls: Vec<(&'static str, Value)>,
}

impl Question {
    fn new(text: String, expected: String) -> Question {
        Question { text, expected, calls: Vec::new() }
    }
}

/// Questions to one chat.
struct Script {
    title: &'static str,
    effort: Effort,
    tools: Tools,
    questions: Vec<Question>,
}

/// Where the demo shows itself: text, or an event on each line.
struct Stage {
    json: bool,
    styles: Styles,
    view: Box<dyn View>,
}

impl Stage {
    fn new(json: bool) -> Stage {
        let mut text = Text::new();
        text.with_stats = false;
        Stage { json, styles: Styles::of_stdout(), view: text.or_lines(json) }
    }

    /// A line for people.
    fn say(&self, text: &str) -> io::Result<()> {
        if self.json { Ok(()) } else { writeln!(io::stdout(), "{text}") }
    }

    /// An event for programs.
    fn tell(&self, event: &Value) -> io::Result<()> {
        if self.json { Lines::write(event) } else { Ok(()) }
    }

    /// A step as one would type it.
    fn step(&self, command: &str) -> io::Result<()> {
        self.tell(&json!({ "event": "step", "command": format!("{NAME} {command}") }))?;
        self.say(&format!("$ {NAME} {command}"))
    }
}

/// `gptoss demo`.
pub fn demo(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let stage = Stage::new(console.json);
    stage.say(&format!("{INTRODUCTION}\n"))?;
    let start = env::current_dir()?;
    match &arguments.dst {
        Some(target) => {
            let folder = OutputFolder::create(&path::absolute(target)?).context("--dst")?;
            env::set_current_dir(folder.path())?;
            let outcome = converse(console, arguments, stage);
            env::set_current_dir(start)?;
            folder.finish()?;
            outcome
        }
        None => {
            let folder = TemporaryFolder::create_in(&env::temp_dir())?;
            env::set_current_dir(folder.path())?;
            let outcome = converse(console, arguments, stage);
            env::set_current_dir(start)?;
            outcome
        }
    }
}

/// Makes the model in the current folder and talks to it.
fn converse(console: &Console, arguments: &Arguments, mut stage: Stage) -> Result<Outcome> {
    let stored = prepare(&stage)?;
    stage.step("chat --model model.bin --greedy")?;
    let model = arguments.device.load(&stored, console)?;
    stage.say(&format!("loaded, {:.1} s since the start\n", console.seconds()))?;
    let encoding = turn::encoding(&stored)?;
    let mut session = Session::new(&model);
    let mut tally = Tally::default();
    for script in scripts(arguments.seed) {
        script.hold(&mut session, &encoding, &mut stage, &mut tally)?;
    }
    let Tally { right, wrong, stats } = tally;
    stage.tell(&json!({
        "event": "summary", "right": right, "wrong": wrong, "stats": stats, "seconds": console.seconds(),
        "device": model.device().name(), "backend": model.device().backend(),
    }))?;
    stage.say(&format!(
        "{right} of {} answers are right. {} tokens at {:.0} tokens/s on {} ({}); of the prompts' {} tokens, {} were in \
         the cache. {:.1} s in all.",
        right + wrong,
        stats.generated,
        stats.decode_rate(),
        model.device().name(),
        model.device().backend(),
        stats.prompt,
        stats.reused,
        console.seconds(),
    ))?;
    stage.say(&if wrong > 0 {
        format!("{wrong} wrong: that is a bug; `{NAME} selftest` tells whether it is the device's. Please report it.")
    } else {
        format!("`{NAME} chat` talks to it.")
    })?;
    Ok(Outcome::of(wrong == 0))
}

/// Checkpoint, export, verification, each step as one would type it.
fn prepare(stage: &Stage) -> Result<Stored> {
    let [checkpoint, model] = ["checkpoint", "model.bin"].map(Path::new);
    engine::demo::expand(checkpoint)?;
    stage.say("It is a checkpoint now, all 201088 rows of the embeddings filled in.\n")?;
    let options = CheckpointOptions::default;
    let export = Verb::Export { src: checkpoint.into(), dst: model.into(), checkpoint: options() };
    let verify = Verb::Verify {
        file: model.into(),
        against: Some(checkpoint.into()),
        structure: false,
        checkpoint: options(),
    };
    for (command, verb) in
        [("export -s checkpoint -d model.bin", export), ("verify model.bin --against checkpoint", verify)]
    {
        stage.step(command)?;
        // A clock of its own for each step.
        let mut console = Console::new(NAME, &Talk { json: stage.json, quiet: true });
        console.json_lines = true;
        let outcome = verb.run(&console).context(command)?;
        ensure!(outcome == Outcome::Fine, "{command} found a difference: that is a bug; please report it");
        stage.say("")?;
    }
    // Every byte was verified just now.
    Ok(Stored::open(model, &StoredOptions::default(), &())?)
}

/// Counts of the whole demo.
#[derive(Default)]
struct Tally {
    right: usize,
    wrong: usize,
    stats: Stats,
}

impl Script {
    /// Asks everything in a new chat and checks the answers.
    fn hold(
        self,
        session: &mut Session<'_>,
        encoding: &Encoding,
        stage: &mut Stage,
        tally: &mut Tally,
    ) -> Result<()> {
        stage.say(&format!("── {}", self.title))?;
        stage.tell(&json!({ "event": "chat", "about": self.title }))?;
        let mut chat = Chat::new(encoding);
        chat.set_system(SystemContent::new().with_reasoning_effort(self.effort.into()))?;
        if !self.tools.descriptions.is_empty() {
            chat.set_developer(conversation::developer(DeveloperContent::new(), None, &self.tools))?;
        }
        let sampling = SamplingOptions::greedy();
        let mut turns = 0;
        for question in self.questions {
            stage.say(&format!("› {}", shortened(&question.text)))?;
            stage.tell(&json!({ "event": "question", "text": question.text }))?;
            chat.add_user(question.text.as_str());
            let mut talk = turn::Talk {
                session: &mut *session,
                chat: &mut chat,
                encoding,
                sampling: &sampling,
                stops: &Stops::default(),
                turns: &mut turns,
            };
            let answer = talk.answer(stage.view.as_mut(), &mut |call, view| {
                let output = tools::run(call);
                view.result(call, &output)?;
                Ok(Some(output))
            })?;
            if answer.is_abandoned {
                interrupt::exit();
            }
            answer.stats.iter().for_each(|stats| tally.stats.add(stats));
            let cached: Vec<String> =
                answer.stats.iter().map(|it| format!("{} of {}", it.reused, it.prompt)).collect();
            let cache = format!("{} tokens of the prompt were cached", cached.join(", then "));
            let fault = question.fault(&answer);
            stage.tell(&json!({
                "event": "verdict", "right": fault.is_none(), "expected": question.expected, "fault": fault,
            }))?;
            let Styles { good, warning, .. } = stage.styles;
            match fault {
                None => {
                    tally.right += 1;
                    stage.say(&format!("{good}  ✓ {}{good:#}; {cache}\n", question.expected))?;
                }
                Some(fault) => {
                    tally.wrong += 1;
                    stage.say(&format!("{warning}  ✗ {fault}{warning:#}; {cache}\n"))?;
                }
            }
        }
        Ok(())
    }
}

impl Question {
    /// What is wrong with an answer.
    fn fault(&self, answer: &Answer) -> Option<String> {
        let found: Vec<_> = answer.calls.iter().map(|(call, _)| (call.name(), call.json().ok())).collect();
        let needed: Vec<_> =
            self.calls.iter().map(|(name, arguments)| (*name, Some(arguments.clone()))).collect();
        if found != needed {
            return Some(format!("needed the calls {needed:?}"));
        }
        (!answer.text.contains(&self.expected)).then(|| format!("needed {:?}", self.expected))
    }
}

/// A long text's beginning and end.
fn shortened(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= 160 {
        return text.into();
    }
    let part = |characters: &[char]| characters.iter().collect::<String>();
    format!("{} […] {}", part(&characters[..70]), part(&characters[characters.len() - 70..]))
}

/// The questions of a seed.
fn scripts(seed: u64) -> Vec<Script> {
    let mut draw = Draw(ChaCha8Rng::seed_from_u64(seed));
    let name = draw.one(&NAMES);
    let plain = |title, effort, questions| Script { title, effort, tools: Tools::default(), questions };
    let conversation = vec![
        Question::new(format!("Hello, my name is {name}."), name.into()),
        draw.sum(),
        draw.product(),
        draw.sorted(),
        draw.weekday(),
        draw.minutes(),
        Question::new("What is my name?".into(), format!("Your name is {name}.")),
    ];
    let with_tools = |title, question| Script {
        title,
        effort: Effort::Medium,
        tools: Tools::demo(),
        questions: vec![question],
    };
    let sum = draw.sum();
    let again = Question::new(sum.text.clone(), sum.expected.clone());
    vec![
        plain(
            "one conversation; the analysis of each turn is dropped from the next prompt",
            Effort::Medium,
            conversation,
        ),
        plain("a list of more than 600 tokens", Effort::Medium, vec![draw.looked_up()]),
        with_tools("a tool, which runs here", draw.weather()),
        with_tools("a tool with two arguments", draw.distance()),
        with_tools("two calls in a row", draw.prices()),
        plain("low reasoning effort", Effort::Low, vec![sum]),
        plain("high reasoning effort", Effort::High, vec![again]),
        plain(
            "what it cannot do",
            Effort::Medium,
            vec![Question::new("Who won the world cup in 1990?".into(), "tiny demo model".into())],
        ),
    ]
}

struct Draw(ChaCha8Rng);

impl Draw {
    /// A number from `least` to `most`.
    fn number(&mut self, least: u32, most: u32) -> u32 {
        least + self.0.next_u32() % (most - least + 1)
    }

    fn one(&mut self, list: &[&'static str]) -> &'static str {
        list[self.number(0, list.len() as u32 - 1) as usize]
    }

    /// Different ones, in any order.
    fn several(&mut self, list: &[&'static str], count: usize) -> Vec<&'static str> {
        let mut left = list.to_vec();
        (0..count.min(list.len()))
            .map(|_| left.swap_remove(self.number(0, left.len() as u32 - 1) as usize))
            .collect()
    }

    fn sum(&mut self) -> Question {
        let (a, b) = (self.number(100, 99_999), self.number(100, 99_999));
        Question::new(format!("What is {a} + {b}?"), format!("{a} + {b} = {}", a + b))
    }

    fn product(&mut self) -> Question {
        let (a, b) = (self.number(11, 99), self.number(11, 99));
        Question::new(format!("Multiply {a} by {b}."), (a * b).to_string())
    }

    fn sorted(&mut self) -> Question {
        let mut words = self.several(NOUNS, 6);
        let text = format!("Sort this list: {}.", words.join(", "));
        words.sort_unstable();
        Question::new(text, words.join(", "))
    }

    /// Two words of a long list, and one that is not in it.
    fn looked_up(&mut self) -> Question {
        let words = self.several(NOUNS, NOUNS.len());
        let entries: Vec<String> =
            words[1..].iter().map(|word| format!("{word} {}", self.one(&NAMES))).collect();
        let [first, second] = [20, entries.len() - 20].map(|index| (words[index + 1], &entries[index]));
        let text = format!(
            "Here is a list: {}. Look up {}, {} and {}.",
            entries.join(", "),
            first.0,
            words[0],
            second.0
        );
        Question::new(text, format!("{}, {} none, {}", first.1, words[0], second.1))
    }

    fn weekday(&mut self) -> Question {
        let (days, start) = (self.number(8, 365), self.number(0, 6));
        let end = DAYS[((start + days) % 7) as usize];
        let start = DAYS[start as usize];
        Question::new(
            format!("What day is {days} days after {start}?"),
            format!("{days} days after {start} is {end}."),
        )
    }

    fn minutes(&mut self) -> Question {
        let (hours, minutes) = (self.number(2, 15), self.number(2, 59));
        let expected = format!("{hours} hours and {minutes} minutes");
        Question::new(format!("How many hours are {} minutes?", hours * 60 + minutes), expected)
    }

    fn weather(&mut self) -> Question {
        let city = self.one(&CITIES);
        let call = ("get_weather", json!({ "city": city }));
        let expected = format!("{} degrees", told(&call, "temperature"));
        Question { text: format!("What is the weather in {city}?"), expected, calls: vec![call] }
    }

    fn distance(&mut self) -> Question {
        let cities = self.several(&["Berlin", "London", "Madrid", "Paris", "Rome"], 2);
        let (from, to) = (cities[0], cities[1]);
        let call = ("get_distance", json!({ "from": from, "to": to }));
        let expected = format!("{} kilometers", told(&call, "kilometers"));
        Question { text: format!("How far is it from {from} to {to}?"), expected, calls: vec![call] }
    }

    fn prices(&mut self) -> Question {
        let goods = self.several(&GOODS, 2);
        let calls: Vec<_> = goods.iter().map(|item| ("get_price", json!({ "item": item }))).collect();
        let total: i64 = calls.iter().map(|call| told(call, "price")).sum();
        let text = format!("What do {} and {} cost together?", goods[0], goods[1]);
        Question { text, expected: format!("{total} euros"), calls }
    }
}

/// A number of a tool's result.
fn told((function, arguments): &(&str, Value), key: &str) -> i64 {
    let result = tools::evaluate(function, arguments).unwrap_or_default();
    let result: Value = serde_json::from_str(&result).unwrap_or_default();
    result[key].as_i64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_asks_the_same_questions() {
        let texts = |seed| -> Vec<String> {
            scripts(seed).into_iter().flat_map(|script| script.questions).map(|it| it.text).collect()
        };
        assert_eq!(texts(3), texts(3));
        assert_ne!(texts(3), texts(4));
    }

    #[test]
    fn an_answer_without_the_number_is_wrong() {
        let question = Question::new("What is 1 + 1?".into(), "1 + 1 = 2".into());
        let answer = |text: &str| Answer { text: text.into(), ..Answer::default() };
        assert_eq!(question.fault(&answer("1 + 1 = 2.")), None);
        assert!(question.fault(&answer("1 + 1 = 3.")).is_some());
        let question = Question { calls: vec![("get_price", json!({ "item": "tea" }))], ..question };
        assert!(question.fault(&answer("1 + 1 = 2.")).is_some());
    }
}
