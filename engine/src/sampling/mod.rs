//! From logits to the next token.
//!
//! # Order of operations
//!
//! The order is that of Hugging Face's `GenerationMixin` (and, but for the place of min-p, of vLLM). With `l` the
//! logit that the model gave a token:
//!
//! 1. **Logit bias**: `l + bias`. A bias of −∞ bans the token.
//! 2. **Repetition penalty** `r` (CTRL, <https://arxiv.org/abs/1909.05858>, as Hugging Face and vLLM apply it): a
//!    token that occurs in the prompt *or* in what was generated has a positive logit divided by `r`, any other logit
//!    multiplied by it.
//! 3. **Frequency and presence penalties** (OpenAI's API): `l − frequency · count − presence`, for tokens that were
//!    *generated*, `count` times. The prompt does not count (as in vLLM).
//! 4. **Temperature** `t`: the result, the token's *score*, is divided by `t`. A temperature of 0 takes the largest
//!    score, the lowest id among equals, and skips what follows.
//! 5. **Top-k** keeps every token whose score is at least the k-th largest score: more than `k` where scores are equal.
//! 6. **Top-p** keeps the smallest set of most probable tokens whose probabilities, renormalised after top-k, sum to at
//!    least `p`, and every token that is as probable as the last of them.
//! 7. **Min-p** (<https://arxiv.org/abs/2407.01082>) keeps tokens at least `min_p` times as probable as the most
//!    probable one.
//! 8. **Draw**: the first token, in the order of ids, at which the running sum of the kept weights exceeds `u` times
//!    their total. `u` is one uniform number per token.
//!
//! Scores are compared before the division by the temperature, which does not change their order but could make two
//! of them equal.
//!
//! # The device and the processor
//!
//! [`Sampler::sample_tensor`] computes all this where the logits are and reads back a few numbers at once;
//! [`Sampler::sample`] computes it in f64 from logits on the host. Both follow one definition. Scores are f32 and made
//! of additions and multiplications only, which round alike everywhere (the divisions above are multiplications by
//! a reciprocal that the host rounds), so top-k and greedy decoding choose from the same tokens exactly. Weights
//! differ by the rounding of f32 sums: where `u` times the total, or `p` times the total, comes closer to a boundary
//! between two tokens than that, the two paths may take different sides.
//!
//! # Random numbers
//!
//! The number for the n-th token is a function of the seed and n ([`uniform`]), so that rolling a sampler back
//! ([`Sampler::truncate`]) or cloning it needs no saved generator.

mod device;
mod distribution;
mod history;
mod options;

use std::fmt;

use burn::tensor::Tensor;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub use distribution::Distribution;
pub use options::{Options, OptionsError};

pub(crate) use distribution::LogSumExp;
pub(crate) use distribution::{NEVER, NOTHING};
use history::History;

/// Why no token could be drawn.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The logits have no elements, or more than f32 can count.
    #[error("{found} logits: needed 1 to {max}", max = MAX_VOCABULARY)]
    Vocabulary {
        /// How many there are.
        found: usize,
    },
    /// A logit is NaN or +∞.
    #[error(
        "the logit of token {token} is {found}: the numbers of this model on this device cannot be trusted"
    )]
    Logit {
        /// The first such token.
        token: u32,
        /// Its logit.
        found: f32,
    },
    /// A token of the options or of the history is not in the vocabulary.
    #[error("{place} has token {token}: the vocabulary has {vocabulary} tokens")]
    Token {
        /// "the logit bias" or "the history".
        place: &'static str,
        /// The id.
        token: u32,
        /// The number of logits.
        vocabulary: usize,
    },
    /// Every token is banned: no score is above −10²⁰.
    #[error("no token is left: all are banned by logit biases of -inf or have a logit of -inf")]
    NothingLeft,
    /// The number of samplers is not that of the sequences.
    #[error("{samplers} samplers for {sequences} sequences: needed one for each")]
    Batch {
        /// Samplers given.
        samplers: usize,
        /// Rows of the logits.
        sequences: usize,
    },
    /// The device failed, or returned numbers that the logits do not explain.
    #[error("the device failed while sampling: {0}")]
    Device(String),
}

/// Ids and counts pass through f32, exact up to here.
const MAX_VOCABULARY: usize = 1 << 24;

/// A token and how probable it was.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// The natural logarithm of its probability under the model itself: a log-softmax of the logits before any of the
    /// options is applied (vLLM's `raw_logprobs`).
    pub logprob: f32,
    /// The [`Options::top_logprobs`] most probable tokens under the model itself and their log-probabilities, the most
    /// probable first, the lower id first among equals. Tokens of probability zero are left out.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Draws the tokens of one sequence. Clone it to fork the sequence.
#[derive(Clone)]
pub struct Sampler {
    options: Options,
    history: History,
    device: device::State,
}

impl Sampler {
    /// A sampler with an empty history.
    ///
    /// # Errors
    /// What [`Options::validate`] finds.
    pub fn new(options: Options) -> Result<Sampler, OptionsError> {
        options.validate()?;
        Ok(Sampler { options, history: History::default(), device: device::State::default() })
    }

    /// The options it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Tells it tokens that the model reads but did not generate. They count for the repetition penalty only.
    pub fn extend_prompt(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.history.push(token, false);
            self.device.touch(token);
        }
    }

    /// Tells it a token that was generated without it, as though [`sample`](Sampler::sample) had returned it: the
    /// random stream moves on.
    pub fn accept(&mut self, token: u32) {
        self.history.push(token, true);
        self.device.touch(token);
    }

    /// Tokens of the history, prompt and generated.
    pub fn len(&self) -> usize {
        self.history.len()
    }

    /// Whether the history has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of the history that were generated.
    pub fn generated(&self) -> usize {
        self.history.generated()
    }

    /// Refuses options and a history that a vocabulary does not fit.
    pub(crate) fn check_vocabulary(&self, vocabulary: usize) -> Result<(), SampleError> {
        distribution::check_vocabulary(&self.options, &self.history, vocabulary)
    }

    /// Every token of the history: how often it was generated, and whether the prompt has it. In no order.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (u32, u32, bool)> {
        self.history.counts().map(|(token, counts)| (token, counts.generated, counts.all > counts.generated))
    }

    /// The same history with another top-p.
    pub(crate) fn with_top_p(&self, top_p: f32) -> Sampler {
        let options = Options { top_p, ..self.options.clone() };
        Sampler { options, history: self.history.clone(), device: device::State::default() }
    }

    /// Forgets all but the first `len` tokens of the history, and rewinds the random stream with them. Does nothing
    /// where there are no more than that.
    pub fn truncate(&mut self, len: usize) {
        while self.len() > len {
            let Some(token) = self.history.pop() else { return };
            self.device.touch(token);
        }
    }

    /// The random number of the next token: [`uniform`] of the seed and [`generated`](Sampler::generated).
    pub fn next_uniform(&self) -> f32 {
        uniform(self.options.seed, self.generated() as u64)
    }

    /// What the next token is drawn from, in f64.
    ///
    /// # Errors
    /// As for [`sample`](Sampler::sample).
    pub fn distribution(&self, logits: &[f32]) -> Result<Distribution, SampleError> {
        Distribution::new(&self.options, &self.history, logits)
    }

    /// Draws the next token on the processor, in f64, and appends it to the history. `logits` has one element per
    /// token of the vocabulary.
    ///
    /// # Errors
    /// [`SampleError::Vocabulary`], [`SampleError::Logit`], [`SampleError::Token`] and [`SampleError::NothingLeft`].
    /// The history is unchanged then.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, SampleError> {
        let sampled = self.sample_at(logits, self.next_uniform())?;
        self.accept(sampled.token);
        Ok(sampled)
    }

    /// What [`sample`](Sampler::sample) would draw if the random number were `u`, which is moved into the range of
    /// [`uniform`]. Changes nothing.
    ///
    /// # Errors
    /// As for [`sample`](Sampler::sample).
    pub fn sample_at(&self, logits: &[f32], u: f32) -> Result<Sampled, SampleError> {
        let distribution = self.distribution(logits)?;
        let token = distribution.token_at(in_range(u).into());
        let model = distribution.model.unwrap_or_else(|| LogSumExp::new(logits));
        Ok(Sampled {
            token,
            logprob: model.logprob(logits[token as usize]),
            top_logprobs: model.top(logits, self.options.top_logprobs),
        })
    }

    /// Draws the next token where the logits are and appends it to the history. `logits` is a float tensor
    /// `[vocabulary]`; types other than f32 are converted first.
    ///
    /// The id and four numbers come back in one read. With [`Options::top_logprobs`] the logits themselves come with
    /// them. Top-k and top-p take eight passes over the vocabulary each, with 15 comparisons per token: where the device
    /// is the processor, [`sample`](Sampler::sample) is many times faster.
    ///
    /// # Errors
    /// As for [`sample`](Sampler::sample), and [`SampleError::Device`].
    pub fn sample_tensor(&mut self, logits: Tensor<1>) -> Result<Sampled, SampleError> {
        let sampled = self.sample_tensor_at(logits, self.next_uniform())?;
        self.accept(sampled.token);
        Ok(sampled)
    }

    /// What [`sample_tensor`](Sampler::sample_tensor) would draw if the random number were `u`, which is moved into the
    /// range of [`uniform`]. The history is unchanged; tables on the device may be made.
    ///
    /// # Errors
    /// As for [`sample_tensor`](Sampler::sample_tensor).
    pub fn sample_tensor_at(&mut self, logits: Tensor<1>, u: f32) -> Result<Sampled, SampleError> {
        let pending = self.device.launch(&self.options, &self.history, logits, in_range(u))?;
        let mut results = device::read(vec![(pending, &*self)])?;
        results.pop().unwrap_or_else(|| Err(SampleError::Device("nothing was read".into())))
    }
}

impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = (self.len(), self.generated());
        f.debug_struct("Sampler")
            .field("options", &self.options)
            .field("len, generated", &counts)
            .finish_non_exhaustive()
    }
}

/// Draws the next token of several sequences with one read. `logits` is a float tensor `[sequences, vocabulary]`.
///
/// A sequence that cannot be sampled does not disturb the others: its result is its error, its history is unchanged.
///
/// # Errors
/// [`SampleError::Batch`] where there is not one sampler per sequence, [`SampleError::Device`] where nothing could be
/// read.
pub fn sample_batch(
    samplers: &mut [&mut Sampler],
    logits: Tensor<2>,
) -> Result<Vec<Result<Sampled, SampleError>>, SampleError> {
    let [sequences, vocabulary] = logits.dims();
    if samplers.len() != sequences {
        return Err(SampleError::Batch { samplers: samplers.len(), sequences });
    }
    let mut results = Vec::with_capacity(sequences);
    let mut launched = Vec::new();
    for (row, sampler) in samplers.iter_mut().enumerate() {
        let u = sampler.next_uniform();
        let logits = logits.clone().narrow(0, row, 1).reshape([vocabulary]);
        match sampler.device.launch(&sampler.options, &sampler.history, logits, u) {
            Ok(pending) => {
                launched.push((pending, &**sampler));
                results.push(None);
            }
            Err(error) => results.push(Some(Err(error))),
        }
    }
    let mut read = if launched.is_empty() { vec![] } else { device::read(launched)? }.into_iter();
    let missing = || Err(SampleError::Device("too little was read".into()));
    let results: Vec<_> =
        results.into_iter().map(|result| result.or_else(|| read.next()).unwrap_or_else(missing)).collect();
    for (sampler, result) in samplers.iter_mut().zip(&results) {
        if let Ok(sampled) = result {
            sampler.accept(sampled.token);
        }
    }
    Ok(results)
}

/// The random number of the `n`-th token: an odd multiple of 2⁻²⁴ between 0 and 1, so that f32 holds it exactly and it
/// is never 0 or 1.
///
/// It is `(2 ⌊w / 2⁹⌋ + 1) / 2²⁴`, where `w` is the `n`-th 32-bit word of the ChaCha8 key stream whose key is the seed
/// in little-endian order followed by 24 zero bytes, with a zero nonce.
pub fn uniform(seed: u64, n: u64) -> f32 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut stream = ChaCha8Rng::from_seed(key);
    stream.set_word_pos(n.into());
    (2 * (stream.next_u32() >> 9) + 1) as f32 / (1 << 24) as f32
}

/// The nearest number that [`uniform`] can return; its least for NaN. Outside (0, 1) the draw would leave the vocabulary.
fn in_range(u: f32) -> f32 {
    let least = 0.5f32.powi(24);
    u.max(least).min(1.0 - least)
}
