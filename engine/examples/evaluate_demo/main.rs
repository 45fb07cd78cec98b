//! Measures the demo model on held-out conversations: a row for each skill, exit status 1 where one is below 99 %.
//!
//! ```text
//! cargo run --release -p engine --example evaluate_demo                  # 500 of each skill on the processor: an hour
//! cargo run --release -p engine --features cuda --example evaluate_demo -- --backend cuda
//! cargo run --release -p engine --example evaluate_demo -- --per-skill 20 --skill addition
//! ```

mod evaluation;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use engine::backend::Backend;
use engine::demo;
use engine::gpt_oss::{LoadOptions, Model};
use engine::sampling::Options;
use evaluation::{Score, answer};
use fixtures::conversations::{Skill, held_out};
use formats::model_bin::{Stored, StoredOptions};

/// The part of the examples that must be exact.
const NEEDED: f64 = 0.99;

/// Measures the demo model on held-out conversations.
#[derive(Parser)]
struct Arguments {
    /// Where to compute: cpu, wgpu or cuda
    #[arg(long, default_value = "cpu")]
    backend: Backend,
    /// Held-out examples of each skill
    #[arg(long, default_value_t = 500)]
    per_skill: u64,
    /// One skill only
    #[arg(long)]
    skill: Option<Skill>,
    /// A model.bin or a checkpoint in place of the demo model
    #[arg(long)]
    model: Option<PathBuf>,
    /// Measure nothing; write what `fixtures/demo/genuine.sh` compares with OpenAI's module: the expanded checkpoint,
    /// prompts, and the tokens that this engine generates
    #[arg(long, value_name = "DIR")]
    for_genuine: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let device = arguments.backend.open()?;
    let stored = match &arguments.model {
        Some(path) => Stored::open(path, &StoredOptions::default(), &())?,
        None => demo::open_cached(&())?,
    };
    let model = Model::load(&stored, &LoadOptions::default(), &device, &())?;
    if let Some(folder) = &arguments.for_genuine {
        for_genuine(&model, folder, arguments.per_skill)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:<16}{:>10}{:>10}{:>16}{:>10}",
        device.name(),
        "examples",
        "greedy",
        "temperature 1",
        "seconds"
    );
    let mut passed = true;
    for skill in Skill::ALL.into_iter().filter(|skill| arguments.skill.is_none_or(|only| only == *skill)) {
        let start = Instant::now();
        let mut score = Score::default();
        for index in 0..arguments.per_skill {
            score.add(&model, &held_out(skill, index)?)?;
        }
        let [greedy, warm] = score.rates();
        passed &= greedy >= NEEDED && warm >= NEEDED;
        let seconds = start.elapsed().as_secs_f64();
        let name = skill.name();
        println!("{name:<16}{:>10}{greedy:>10.4}{warm:>16.4}{seconds:>10.1}", score.examples);
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn for_genuine(model: &Model, folder: &Path, per_skill: u64) -> anyhow::Result<()> {
    demo::expand(&folder.join("checkpoint"))?;
    let (mut prompts, mut generated) = (Vec::new(), Vec::new());
    for skill in Skill::ALL {
        for index in 0..per_skill {
            for (turn, content) in held_out(skill, index)?.turns.into_iter().enumerate() {
                generated.push(answer(model, &content.prompt_tokens, Options::greedy(), 256)?);
                let tokens = content.prompt_tokens;
                let skill = skill.name();
                prompts.push(
                    serde_json::json!({"skill": skill, "index": index, "turn": turn, "tokens": tokens}),
                );
            }
        }
    }
    fs::write(folder.join("prompts.json"), serde_json::to_string(&prompts)?)?;
    fs::write(folder.join("generated.json"), serde_json::to_string(&generated)?)?;
    Ok(())
}
