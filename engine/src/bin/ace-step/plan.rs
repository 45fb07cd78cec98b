//! `plan`: what a song takes.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::ValueHint;
use engine::ace_step::checkpoint::Checkpoint;
use engine::ace_step::frames_of_seconds;
use engine::ace_step::plan::{Plan, Request};
use engine::ace_step::preset::Configs;
use engine::backend::Float;
use engine::command::floats;
use engine::weights::Types;
use formats::command::{Console, Outcome};
use serde_json::json;

use crate::options::SamplingOptions;

#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of a checkpoint whose sizes count, in place of the released ones.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    checkpoint: Option<PathBuf>,
    /// Length of the song.
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    seconds: f64,
    /// Tokens of the prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 40)]
    text_tokens: usize,
    /// Tokens of the lyrics.
    #[arg(long, value_name = "TOKENS", default_value_t = 400)]
    lyric_tokens: usize,
    /// Type of matrices and of the factors of products.
    #[arg(long, value_parser = floats(), value_name = "TYPE", default_value_t = Float::Bf16)]
    float: Float,
    #[command(flatten)]
    sampling: SamplingOptions,
}

/// `ace-step plan`.
pub fn plan(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    let frames = frames_of_seconds(arguments.seconds);
    ensure!(frames > 0, "--seconds: found {}, needed 0.1 at least", arguments.seconds);
    let configs = match &arguments.checkpoint {
        Some(folder) => {
            let Checkpoint { transformer, dcae, vocoder, umt5, .. } = Checkpoint::open(folder)?;
            Configs {
                transformer: transformer.config,
                dcae: dcae.config,
                vocoder: vocoder.config,
                umt5: umt5.config,
            }
        }
        None => Configs::released(),
    };
    let request = Request {
        frames,
        batch: 1,
        text_tokens: arguments.text_tokens,
        lyric_tokens: arguments.lyric_tokens,
        types: Types::all(arguments.float),
    };
    let plan = Plan::new(&configs, &arguments.sampling.options()?, &request)?;
    let mut out = std::io::stdout().lock();
    match console.json {
        true => console.document(&mut out, &json!({ "plan": plan, "peak": plan.peak() }))?,
        false => write!(out, "{plan}")?,
    }
    Ok(Outcome::Fine)
}
