//! The distribution of the next token, in f64 on the processor.

use super::history::History;
use super::{MAX_VOCABULARY, Options, SampleError};

/// The score of a banned token: below any logit, and finite so that no device has to handle infinities.
pub(crate) const NEVER: f32 = -1e30;

/// Where no score is above this, no token is left.
pub(crate) const NOTHING: f32 = -1e20;

/// The distribution that a token is drawn from: after penalties, temperature and filters.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// Proportional to the probability; 0 for tokens that were filtered out.
    weights: Vec<f64>,
    total: f64,
    /// The model's own normalisation, where it was needed on the way.
    pub(super) model: Option<LogSumExp>,
}

impl Distribution {
    pub(super) fn new(
        options: &Options,
        history: &History,
        logits: &[f32],
    ) -> Result<Distribution, SampleError> {
        let scores = scores(options, history, logits)?;
        let (first, largest) = largest(&scores);
        if largest <= NOTHING {
            return Err(SampleError::NothingLeft);
        }
        if largest == f32::INFINITY {
            return Err(SampleError::Logit { token: first as u32, found: logits[first] });
        }
        let mut weights = vec![0.0; scores.len()];
        if options.is_greedy() {
            weights[first] = 1.0;
            return Ok(Distribution { weights, total: 1.0, model: None });
        }
        // From here on tokens are told by how far their scores are below the largest, in f32 as on the device.
        let mut below = scores;
        for score in &mut below {
            *score = largest - *score;
        }
        let inverse = options.inverse_temperature();
        for (weight, &below) in weights.iter_mut().zip(&below) {
            *weight = (-f64::from(below * inverse)).exp();
        }
        let own = options.keeps_logits() && options.temperature == 1.0;
        let model = own.then(|| LogSumExp { largest: largest.into(), sum: weights.iter().sum() });
        if let Some(k) = options.top_k_of(below.len()) {
            let (_, &mut limit, _) = below.clone().select_nth_unstable_by(k - 1, f32::total_cmp);
            keep(&mut weights, &below, limit);
        }
        if options.top_p < 1.0 {
            let limit = nucleus(&weights, &below, options.top_p.into());
            keep(&mut weights, &below, limit);
        }
        if let Some(distance) = options.min_p_distance() {
            for (weight, &below) in weights.iter_mut().zip(&below) {
                if below * inverse > distance {
                    *weight = 0.0;
                }
            }
        }
        let total = weights.iter().sum();
        Ok(Distribution { weights, total, model })
    }

    /// The probability of a token; 0 outside the vocabulary.
    pub fn probability(&self, token: u32) -> f64 {
        self.weights.get(token as usize).map_or(0.0, |weight| weight / self.total)
    }

    /// The probabilities of all tokens, in the order of their ids.
    pub fn probabilities(&self) -> impl ExactSizeIterator<Item = f64> {
        self.weights.iter().map(|weight| weight / self.total)
    }

    /// The first token at which the running sum of probabilities exceeds `u`, from [0, 1).
    pub fn token_at(&self, u: f64) -> u32 {
        let target = u * self.total;
        let mut sum = 0.0;
        let mut last = 0;
        for (token, &weight) in self.weights.iter().enumerate() {
            sum += weight;
            if weight > 0.0 {
                last = token;
                if sum > target {
                    break;
                }
            }
        }
        last as u32
    }
}

/// Drops the tokens whose scores are more than `limit` below the largest. Distances below the normal range of f32
/// count as equal, since devices may flush them to zero.
fn keep(weights: &mut [f64], below: &[f32], limit: f32) {
    let limit = limit.max(f32::MIN_POSITIVE);
    for (weight, &below) in weights.iter_mut().zip(below) {
        if below > limit {
            *weight = 0.0;
        }
    }
}

/// The distance of the last token of the smallest set of nearest tokens whose weights reach the part `p` of the total.
fn nucleus(weights: &[f64], below: &[f32], p: f64) -> f32 {
    let mut pool: Vec<(f32, f64)> =
        below.iter().copied().zip(weights.iter().copied()).filter(|(_, weight)| *weight > 0.0).collect();
    let mut target = p * pool.iter().map(|(_, weight)| weight).sum::<f64>();
    // A binary search that partitions only the half in which it goes on.
    let mut rest = &mut pool[..];
    while rest.len() > 1 {
        let middle = rest.len() / 2;
        rest.select_nth_unstable_by(middle, |a, b| a.0.total_cmp(&b.0));
        let (near, far) = rest.split_at_mut(middle);
        let mass: f64 = near.iter().map(|(_, weight)| weight).sum();
        if mass >= target {
            rest = near;
        } else {
            target -= mass;
            rest = far;
        }
    }
    rest.first().map_or(f32::INFINITY, |&(below, _)| below)
}

/// Logits after bias and penalties. Every operation is one f32 addition or multiplication, as on the device.
fn scores(options: &Options, history: &History, logits: &[f32]) -> Result<Vec<f32>, SampleError> {
    check_vocabulary(options, history, logits.len())?;
    if let Some(token) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return Err(SampleError::Logit { token: token as u32, found: logits[token] });
    }
    let mut scores = logits.to_vec();
    for (&token, &bias) in &options.logit_bias {
        scores[token as usize] += bias.max(NEVER);
    }
    if let Some((positive, negative)) = options.repetition() {
        for (token, _) in history.counts() {
            let score = &mut scores[token as usize];
            *score *= if *score > 0.0 { positive } else { negative };
        }
    }
    if options.subtracts() {
        for (token, counts) in history.counts() {
            scores[token as usize] -= options.penalty(counts.generated);
        }
    }
    Ok(scores)
}

/// Checks that there are logits, and one for every token that options and history name.
pub(super) fn check_vocabulary(
    options: &Options,
    history: &History,
    vocabulary: usize,
) -> Result<(), SampleError> {
    if vocabulary == 0 || vocabulary > MAX_VOCABULARY {
        return Err(SampleError::Vocabulary { found: vocabulary });
    }
    let outside = |token: &u32| *token as usize >= vocabulary;
    if let Some(&token) = options.logit_bias.keys().find(|token| outside(token)) {
        return Err(SampleError::Token { place: "the logit bias", token, vocabulary });
    }
    if (options.repetition().is_some() || options.subtracts())
        && let Some((token, _)) = history.counts().find(|(token, _)| outside(token))
    {
        return Err(SampleError::Token { place: "the history", token, vocabulary });
    }
    Ok(())
}

/// The largest score and the first token that has it.
fn largest(scores: &[f32]) -> (usize, f32) {
    scores.iter().enumerate().fold(
        (0, f32::NEG_INFINITY),
        |best, (token, &score)| {
            if score > best.1 { (token, score) } else { best }
        },
    )
}

/// What turns logits into log-probabilities.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogSumExp {
    /// The largest logit.
    pub largest: f64,
    /// Σ exp(logit − largest).
    pub sum: f64,
}

impl LogSumExp {
    /// Of logits that are not all −∞.
    pub fn new(logits: &[f32]) -> LogSumExp {
        let largest = f64::from(largest(logits).1);
        LogSumExp { largest, sum: logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum() }
    }

    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit) - self.largest - self.sum.ln()) as f32
    }

    /// The `count` largest logits, as log-probabilities, the lower id first among equals.
    pub fn top(&self, logits: &[f32], count: usize) -> Vec<(u32, f32)> {
        let mut top: Vec<(u32, f32)> = Vec::with_capacity(count.min(logits.len()) + 1);
        for (token, &logit) in logits.iter().enumerate() {
            let enough = top.len() >= count && top.last().is_none_or(|&(_, least)| logit <= least);
            if enough || logit == f32::NEG_INFINITY {
                continue;
            }
            let place = top.partition_point(|&(_, other)| other >= logit);
            top.insert(place, (token as u32, logit));
            top.truncate(count);
        }
        top.into_iter().map(|(token, logit)| (token, self.logprob(logit))).collect()
    }
}
