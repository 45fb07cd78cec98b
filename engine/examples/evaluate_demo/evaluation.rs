//! How often the demo model answers exactly.
//!
//! An answer is exact if each of its tokens is the one that is right, given the right ones before it. So one pass over
//! prompt and answer tells what generating token by token would: greedily, the answer is exact if every choice is the
//! right one; at temperature 1 it is exact with the product of the right tokens' probabilities.

use std::ops::ControlFlow;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};
use engine::Result;
use engine::gpt_oss::model::read;
use engine::gpt_oss::{Model, Request, Sequence, Session, generate};
use engine::harmony::token;
use engine::sampling::Options;
use fixtures::conversations::{Example, Turn};

/// Tokens of a pass.
const CHUNK: usize = 512;
/// Rows of logits at a time: 200,014 each.
const ROWS: usize = 32;

/// What was measured of some examples.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// Examples.
    pub examples: usize,
    /// Those whose every turn is exact when decoded greedily.
    pub greedy: usize,
    /// Sum of the probabilities that every turn is exact at temperature 1.
    pub probability: f64,
}

impl Score {
    /// The part that is exact, greedily and at temperature 1.
    pub fn rates(&self) -> [f64; 2] {
        [self.greedy as f64, self.probability].map(|sum| sum / self.examples.max(1) as f64)
    }

    /// Counts an example.
    pub fn add(&mut self, model: &Model, example: &Example) -> Result<()> {
        let mut exact = true;
        let mut logprob = 0.0;
        for turn in &example.turns {
            let (greedy, turn_logprob) = measure(model, turn)?;
            exact &= greedy;
            logprob += turn_logprob;
        }
        self.examples += 1;
        self.greedy += usize::from(exact);
        self.probability += logprob.exp();
        Ok(())
    }
}

/// What the model generates token by token, up to and including the stop token.
pub fn answer(model: &Model, prompt: &[u32], sampling: Options, max_tokens: usize) -> Result<Vec<u32>> {
    let mut session = Session::new(model);
    let logits = session.advance(prompt)?;
    let request = Request { sampling, max_tokens, stop: token::STOP.to_vec() };
    Ok(generate(&mut session, logits, &request, &mut |_| ControlFlow::Continue(()))?.tokens)
}

/// Whether greedy decoding gives the expected turn, and the turn's log-probability.
fn measure(model: &Model, turn: &Turn) -> Result<(bool, f64)> {
    let mut tokens = turn.prompt_tokens.clone();
    tokens.extend(&turn.expected);
    // Nothing follows the last token.
    tokens.pop();
    let first = turn.prompt_tokens.len() - 1;
    let mut cache = model.new_cache();
    let mut rows = Vec::new();
    for (index, chunk) in tokens.chunks(CHUNK).enumerate() {
        let x = model.forward(&mut [Sequence { cache: &mut cache, tokens: chunk }], None)?;
        // Rows from the last token of the prompt on.
        let skipped = first.saturating_sub(index * CHUNK).min(chunk.len());
        if skipped < chunk.len() {
            rows.push(x.narrow(0, skipped, chunk.len() - skipped));
        }
    }
    let rows = Tensor::cat(rows, 0);
    let mut exact = true;
    let mut logprob = 0.0;
    for (index, expected) in turn.expected.chunks(ROWS).enumerate() {
        let logits = model.unembed(rows.clone().narrow(0, index * ROWS, expected.len()))?;
        let best = logits.clone().argmax(1).into_data().iter::<i64>().collect::<Vec<_>>();
        exact &= best.iter().zip(expected).all(|(&best, &expected)| best == i64::from(expected));
        let ids: Vec<i32> = expected.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<1, Int>::from_data(ids.as_slice(), &logits.device()).unsqueeze_dim::<2>(1);
        logprob += read(log_softmax(logits, 1).gather(1, ids))?.into_iter().map(f64::from).sum::<f64>();
    }
    Ok((exact, logprob))
}
