//! Token after token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use super::session::Session;
use crate::error::Result;
use crate::sampling::{self, Sampled, Sampler};

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// How tokens are chosen.
    pub sampling: sampling::Options,
    /// The largest number of tokens.
    pub max_tokens: usize,
    /// Tokens that end the text; the one that does is the last of the outcome.
    pub stop: Vec<u32>,
}

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its id.
    pub token: u32,
    /// How probable it was, and what else was.
    pub sampled: Sampled,
    /// Its place among the generated tokens, from 0.
    pub index: usize,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// A stop token came.
    Token(u32),
    /// [`Request::max_tokens`] were generated.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// The callback said so.
    Cancelled,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The tokens, the stop token included. All but the last are in the session.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// From the first choice to the last.
    pub elapsed: Duration,
}

/// Generates tokens after those of a session, whose `logits` (f32 `[vocabulary]`) its last advance gave. Each token is
/// shown to `each` as soon as it is chosen, which can end it all.
///
/// The same request on the same session gives the same tokens on one backend: the numbers that decide depend on the
/// seed and the place among the generated tokens only. A later request with the same seed draws the same numbers again.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) where the device fails, [`Error::SamplingOptions`](crate::Error::SamplingOptions)
/// for options that make no sense, [`Error::Sampling`](crate::Error::Sampling) where no token can be drawn.
pub fn generate(
    session: &mut Session<'_>,
    logits: Tensor<1>,
    request: &Request,
    each: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> Result<Outcome> {
    let start = Instant::now();
    let mut sampler = Sampler::new(request.sampling.clone())?;
    sampler.extend_prompt(session.tokens());
    let mut tokens = Vec::new();
    if request.max_tokens == 0 {
        return Ok(Outcome { tokens, stop: Stop::MaxTokens, elapsed: start.elapsed() });
    }
    // What ends it all after a token, if anything does.
    let mut show = |sampled: Sampled| {
        let step = Step { token: sampled.token, sampled, index: tokens.len() };
        tokens.push(step.token);
        let goes_on = each(&step);
        match goes_on {
            _ if request.stop.contains(&step.token) => Some(Stop::Token(step.token)),
            ControlFlow::Break(()) => Some(Stop::Cancelled),
            ControlFlow::Continue(()) => None,
        }
    };
    let first = session.model().draw(&mut [&mut sampler], logits.unsqueeze())?.remove(0);
    let token = first.token;
    let mut stop = show(first);
    let (wanted, room) = (request.max_tokens - 1, session.room());
    if stop.is_none() {
        session.decode(&mut sampler, token, wanted.min(room), &mut |sampled| {
            stop = show(sampled);
            if stop.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
    }
    let stop = stop.unwrap_or(if wanted <= room { Stop::MaxTokens } else { Stop::ContextFull });
    Ok(Outcome { tokens, stop, elapsed: start.elapsed() })
}
