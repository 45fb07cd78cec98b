//! One generation, watched: a turn of a conversation or a piece of plain text.

use std::io;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use engine::command::interrupt::Cancellable;
use engine::gpt_oss::{Request, Session, Step, Stop, generate};
use engine::harmony::{Chat, Encoding, Event, StreamParser, ToolCall, Turn, token};
use formats::model_bin::Stored;
use formats::tokenizer::{TextDecoder, Tokenizer};

use crate::options::{SamplingOptions, Stops};
use crate::view::{Stats, View};

/// The Harmony encoding of a model, or what to do without one.
pub fn encoding(stored: &Stored) -> Result<Encoding> {
    Encoding::new(stored.vocabulary()).with_context(|| {
        format!(
            "{} cannot chat; `gptoss generate --plain` continues text with any vocabulary",
            stored.path().display()
        )
    })
}

/// New tokens of a prompt from which on its progress is shown.
const LONG_PROMPT: usize = 2048;

/// Turns that can be taken back without computing the conversation anew.
const MOST_SNAPSHOTS: usize = 32;

/// Calls in a row that an answer may take.
const MOST_CALLS: usize = 32;

/// What a conversation goes on with.
pub struct Talk<'a, 'm> {
    /// Where the tokens are.
    pub session: &'a mut Session<'m>,
    /// What was said.
    pub chat: &'a mut Chat,
    /// Its encoding.
    pub encoding: &'a Encoding,
    /// How tokens are chosen.
    pub sampling: &'a SamplingOptions,
    /// What else ends a text.
    pub stops: &'a Stops,
    /// Generations so far: each has random numbers of its own.
    pub turns: &'a mut u64,
}

/// An answer, tool calls on the way to it included.
#[derive(Debug, Default)]
pub struct Answer {
    /// The calls with their results.
    pub calls: Vec<(ToolCall, String)>,
    /// The content of the final channel.
    pub text: String,
    /// Numbers of each generation.
    pub stats: Vec<Stats>,
    /// Whether an interrupt, or a call without a result, ended it before there was an answer.
    pub is_abandoned: bool,
}

/// Runs a tool and shows what it says; nothing if there is no result.
pub type RunTool<'a> = dyn FnMut(&ToolCall, &mut dyn View) -> Result<Option<String>> + 'a;

impl Talk<'_, '_> {
    /// Generates until the model has given its final answer. Without the result of a call, it is over.
    pub fn answer(&mut self, view: &mut dyn View, run_tool: &mut RunTool<'_>) -> Result<Answer> {
        let mut answer = Answer::default();
        while self.go_on(&mut answer, view, run_tool)? {
            ensure!(answer.calls.len() <= MOST_CALLS, "{MOST_CALLS} tool calls and no answer");
        }
        view.answered(&answer.stats)?;
        Ok(answer)
    }

    /// One generation of an answer; whether another one has to follow.
    fn go_on(
        &mut self,
        answer: &mut Answer,
        view: &mut dyn View,
        run_tool: &mut RunTool<'_>,
    ) -> Result<bool> {
        let prompt = self.chat.prompt()?;
        let ends = token::STOP.into_iter().chain(self.stops.tokens.iter().copied()).collect();
        let request = self.sampling.request(*self.turns, usize::MAX, ends)?;
        *self.turns += 1;
        let (parser, tokenizer) = (self.chat.parser(), self.encoding.tokenizer());
        let (turn, stats) = run(self.session, &prompt, &request, &self.stops.texts, parser, tokenizer, view)?;
        answer.text = turn.text("final");
        let is_complete = matches!(stats.stop, Some(Stop::Token(_)));
        answer.is_abandoned = stats.is_cancelled() && answer.text.is_empty();
        answer.stats.push(stats);
        if answer.is_abandoned {
            return Ok(false);
        }
        let calls = self.chat.apply(turn)?.calls;
        if !is_complete {
            return Ok(false);
        }
        for call in &calls {
            let Some(output) = run_tool(call, view)? else {
                answer.is_abandoned = true;
                return Ok(false);
            };
            self.chat.add_tool_result(call, output.as_str())?;
            answer.calls.push((call.clone(), output));
        }
        Ok(!calls.is_empty())
    }
}

/// Goes on from a prompt: brings the session to it, then generates, shows and parses.
fn run(
    session: &mut Session<'_>,
    prompt: &[u32],
    request: &Request,
    stop_texts: &[String],
    mut parser: StreamParser,
    tokenizer: &Tokenizer,
    view: &mut dyn View,
) -> Result<(Turn, Stats)> {
    let mut stop = StopTexts::new(stop_texts);
    // Bytes of the present message before the text that ends it all.
    let mut shown = 0;
    let mut is_over = false;
    let stats = watch(session, prompt, request, tokenizer, view, |step, view| {
        for event in parser.push(step.token) {
            match event {
                _ if is_over => {}
                Event::Delta { text } => {
                    let (text, found) = stop.push(&text);
                    is_over = found;
                    shown += text.len();
                    delta(text, view)?;
                }
                event => {
                    let held = stop.take();
                    shown = if matches!(event, Event::Start(_)) { 0 } else { shown + held.len() };
                    delta(held, view)?;
                    view.event(&event)?;
                }
            }
        }
        Ok(is_over)
    })?;
    delta(stop.take(), view)?;
    for event in parser.finish() {
        match event {
            Event::Delta { .. } if is_over => {}
            event => view.event(&event)?,
        }
    }
    view.generated(&stats)?;
    let mut turn = parser.into_turn();
    if is_over {
        turn.shorten_last(shown);
    }
    Ok((turn, stats))
}

/// Goes on from a prompt that is no conversation.
pub fn run_plain(
    session: &mut Session<'_>,
    prompt: &[u32],
    request: &Request,
    stop_texts: &[String],
    tokenizer: &Tokenizer,
    view: &mut dyn View,
) -> Result<Stats> {
    let mut stop = StopTexts::new(stop_texts);
    let mut text = TextStream::new(tokenizer);
    let stats = watch(session, prompt, request, tokenizer, view, |step, view| {
        let (text, is_over) = stop.push(&text.push(step.token));
        view.plain(&text)?;
        Ok(is_over)
    })?;
    view.plain(&stop.take())?;
    view.generated(&stats)?;
    view.answered(std::slice::from_ref(&stats))?;
    Ok(stats)
}

fn delta(text: String, view: &mut dyn View) -> io::Result<()> {
    if text.is_empty() { Ok(()) } else { view.event(&Event::Delta { text }) }
}

/// Generates; `each` is asked for every token whether the text is over.
fn watch(
    session: &mut Session<'_>,
    prompt: &[u32],
    request: &Request,
    tokenizer: &Tokenizer,
    view: &mut dyn View,
    mut each: impl FnMut(&Step, &mut dyn View) -> io::Result<bool>,
) -> Result<Stats> {
    let cancellable = Cancellable::begin();
    let start = Instant::now();
    let mut stats =
        Stats { generations: 1, prompt: prompt.len(), stop: Some(Stop::Cancelled), ..Stats::default() };
    let mut is_long = false;
    let mut shown = Ok(());
    let advance = session.advance_to_watched(prompt, &mut |done| {
        is_long |= prompt.len() - done > LONG_PROMPT;
        if is_long {
            shown = view.prefill(done, prompt.len());
        }
        match shown.is_err() || cancellable.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    shown?;
    let advance = advance.map_err(|error| match error {
        error @ engine::Error::Length { .. } => anyhow::Error::from(error)
            .context("the conversation is too long; --context allows more, /undo and /reset shorten a chat"),
        error => error.into(),
    })?;
    stats.prefill_seconds = start.elapsed().as_secs_f64();
    let Some(advance) = advance else { return Ok(stats) };
    // The next prompt is likely to begin like this one.
    session.snapshot();
    session.keep_snapshots(MOST_SNAPSHOTS);
    stats.reused = advance.reused;
    stats.recomputed = advance.recomputed;
    stats.prefilled = advance.prefilled;
    if cancellable.is_cancelled() {
        return Ok(stats);
    }
    let mut first = None;
    let mut last = start;
    let mut text = TextStream::new(tokenizer);
    let mut stopped_by_text = false;
    let mut failure = Ok(());
    let outcome = generate(session, advance.logits, request, &mut |step| {
        last = Instant::now();
        first.get_or_insert(last);
        let shown = view.token(step, &text.push(step.token)).and_then(|()| each(step, view));
        match shown {
            Ok(true) => {
                stopped_by_text = true;
                ControlFlow::Break(())
            }
            Ok(false) if cancellable.is_cancelled() => ControlFlow::Break(()),
            Ok(false) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Err(error);
                ControlFlow::Break(())
            }
        }
    })?;
    failure?;
    let first = first.unwrap_or(start);
    stats.generated = outcome.tokens.len();
    stats.decoded = stats.generated.saturating_sub(1);
    stats.stop = if stopped_by_text && outcome.stop == Stop::Cancelled { None } else { Some(outcome.stop) };
    stats.prefill_seconds = (first - start).as_secs_f64();
    stats.decode_seconds = (last - first).as_secs_f64();
    Ok(stats)
}

/// Tokens to text, whole characters at a time.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    decoder: TextDecoder,
}

impl<'t> TextStream<'t> {
    /// Nothing yet.
    pub fn new(tokenizer: &'t Tokenizer) -> TextStream<'t> {
        TextStream { tokenizer, decoder: TextDecoder::default() }
    }

    /// What a token adds. Bytes of a character that is not complete wait for the next one; U+FFFD is shown for bytes
    /// that are none.
    pub fn push(&mut self, token: u32) -> String {
        let decoded = match self.tokenizer.token(token) {
            Some(bytes) => self.decoder.push(bytes),
            None => self.decoder.push(format!("<|{token}|>").as_bytes()),
        };
        decoded.text
    }
}

/// Looks for texts that end a generation, and holds back what may be the beginning of one.
struct StopTexts<'s> {
    texts: &'s [String],
    held: String,
}

impl<'s> StopTexts<'s> {
    fn new(texts: &'s [String]) -> StopTexts<'s> {
        StopTexts { texts, held: String::new() }
    }

    /// What can be shown now, and whether one of the texts was found behind it.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.texts.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (self.take(), true);
        }
        let is_beginning = |tail: &str| self.texts.iter().any(|stop| stop.starts_with(tail));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let safe = starts.find(|&at| is_beginning(&self.held[at..])).unwrap_or(self.held.len());
        let rest = self.held.split_off(safe);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back.
    fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use formats::vocabulary::Vocabulary;

    use super::*;

    #[test]
    fn stop_texts_are_found_across_deltas() {
        let texts = ["\n\n".to_string(), "STOP".to_string()];
        let mut stop = StopTexts::new(&texts);
        assert_eq!(stop.push("one ST"), ("one ".into(), false));
        assert_eq!(stop.push("ART\n"), ("START".into(), false));
        assert_eq!(stop.push("two\nS"), ("\ntwo\n".into(), false));
        assert_eq!(stop.push("TO"), (String::new(), false));
        assert_eq!(stop.push("P three"), (String::new(), true));
        let mut stop = StopTexts::new(&texts);
        assert_eq!(stop.push("é ST"), ("é ".into(), false));
        assert_eq!(stop.take(), "ST");
    }

    #[test]
    fn characters_are_shown_whole() {
        let tokenizer = Tokenizer::new(Vocabulary::o200k()).unwrap();
        let text = "naïve 🦀 ok";
        let tokens = tokenizer.encode(text).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let parts: Vec<String> = tokens.iter().map(|&token| stream.push(token)).collect();
        assert_eq!(parts.concat(), text);
        assert!(!parts.iter().any(|part| part.contains(char::REPLACEMENT_CHARACTER)));
        // A lone continuation byte, and an id that is no token.
        let lone = tokenizer.id(&[0x80]).unwrap();
        assert_eq!(TextStream::new(&tokenizer).push(lone), "\u{fffd}");
        assert_eq!(TextStream::new(&tokenizer).push(u32::MAX), "<|4294967295|>");
    }
}
