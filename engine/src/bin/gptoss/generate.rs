//! `generate`: one generation from a prompt or a conversation.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{ArgGroup, ValueHint};
use engine::command::interrupt;
use engine::gpt_oss::Session;
use engine::harmony::Chat;
use formats::command::{Console, Outcome};
use formats::tokenizer::Tokenizer;

use crate::conversation::{self, Opening};
use crate::options::{DeviceOptions, ModelOptions, SamplingOptions, read_text};
use crate::tools::{self, Tools};
use crate::turn;
use crate::view::{Stats, Text};

/// Tokens of a plain text where --max-tokens says nothing: such a text has no end of its own.
const PLAIN_TOKENS: usize = 256;

#[derive(clap::Args)]
#[command(group(ArgGroup::new("input").args(["prompt", "conversation"]).required(true)))]
pub struct Arguments {
    /// What the user says, or with --plain the text to go on from; `-` reads standard input.
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A Harmony conversation as JSON that the model goes on from; `-` reads standard input.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = ["plain", "Opening"])]
    conversation: Option<PathBuf>,
    /// The prompt is text and no message: no Harmony, any vocabulary.
    #[arg(long, conflicts_with = "Opening")]
    plain: bool,
    /// Recognise special tokens such as <|start|> in a plain prompt.
    #[arg(long, requires = "plain")]
    special: bool,
    /// Print the final answer alone.
    #[arg(long, conflicts_with_all = ["plain", "json"])]
    final_only: bool,
    #[command(flatten)]
    opening: Opening,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    device: DeviceOptions,
}

/// `gptoss generate`.
pub fn generate(console: &Console, arguments: &Arguments) -> Result<Outcome> {
    // What is wrong with the input shall show before anything is loaded.
    let prompt = match arguments.prompt.as_deref() {
        Some("-") => Some(read_text("-".as_ref())?),
        prompt => prompt.map(str::to_owned),
    };
    let given = arguments.conversation.as_deref().map(conversation::read).transpose()?;
    arguments.sampling.options(0)?;
    let stored = arguments.model.open(console)?;
    let mut text = Text::new();
    text.final_only = arguments.final_only;
    text.with_stats = !console.quiet;
    let mut view = text.or_lines(console.json);
    if arguments.plain {
        let tokenizer = Tokenizer::new(stored.vocabulary())?;
        let text = prompt.unwrap_or_default();
        let tokens = if arguments.special {
            tokenizer.encode_with_special(&text)?
        } else {
            tokenizer.encode(&text)?
        };
        ensure!(!tokens.is_empty(), "--prompt: found no text, needed one token at least");
        let stops = arguments.sampling.stops(&tokenizer)?;
        let ends = ["<|return|>", "<|call|>"].into_iter().filter_map(|name| tokenizer.special_id(name));
        let request = arguments.sampling.request(0, PLAIN_TOKENS, ends.chain(stops.tokens).collect())?;
        let model = arguments.device.load(&stored, console)?;
        let mut session = Session::new(&model);
        let stats = turn::run_plain(&mut session, &tokens, &request, &stops.texts, &tokenizer, &mut *view)?;
        return finish(&stats);
    }
    let encoding = turn::encoding(&stored)?;
    let (mut chat, tools) = match given {
        Some(conversation) => (Chat::from_conversation(&encoding, conversation)?, Tools::default()),
        None => {
            let (mut chat, tools) = arguments.opening.chat(&encoding)?;
            chat.add_user(prompt.unwrap_or_default());
            (chat, tools)
        }
    };
    let stops = arguments.sampling.stops(encoding.tokenizer())?;
    let model = arguments.device.load(&stored, console)?;
    let mut talk = turn::Talk {
        session: &mut Session::new(&model),
        chat: &mut chat,
        encoding: &encoding,
        sampling: &arguments.sampling,
        stops: &stops,
        turns: &mut 0,
    };
    let mut not_run = None;
    let answer = talk.answer(&mut *view, &mut |call, view| {
        // The call of another tool is the answer: whoever reads it can run the tool.
        let output = tools.built_in.then(|| tools::run(call));
        match &output {
            Some(output) => view.result(call, output)?,
            None => not_run = Some(call.recipient.clone()),
        }
        Ok(output)
    })?;
    if let Some(recipient) = not_run.filter(|_| arguments.final_only) {
        bail!(
            "there is no final answer: {recipient} was called, which does not run here; --json shows the call"
        );
    }
    answer.stats.last().map_or(Ok(Outcome::Fine), finish)
}

/// What was generated until an interrupt was shown; the status says that there was one.
fn finish(stats: &Stats) -> Result<Outcome> {
    if stats.is_cancelled() {
        interrupt::exit();
    }
    Ok(Outcome::Fine)
}
