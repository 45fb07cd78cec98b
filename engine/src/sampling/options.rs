//! How tokens are chosen.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// How the next token is chosen. What each option does, and in which order, is told in
/// [the module's documentation](super).
///
/// The default draws from the model's own distribution: temperature 1, no filter, no penalty, seed 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Scores are divided by it; 0 takes the most probable token, otherwise 10⁻⁶ to 10⁶.
    pub temperature: f32,
    /// How many of the most probable tokens are kept; 0 keeps all.
    pub top_k: usize,
    /// The probability that the most probable tokens must reach together; above 0, up to 1, which keeps all.
    pub top_p: f32,
    /// The least probability of a kept token as a part of the largest one; 0 to 1, 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred; 1 does nothing, above 1 makes them
    /// less probable. 10⁻⁶ to 10⁶.
    pub repetition_penalty: f32,
    /// Subtracted for each time that the token was generated; −10⁶ to 10⁶, 0 does nothing.
    pub frequency_penalty: f32,
    /// Subtracted if the token was generated; −10⁶ to 10⁶, 0 does nothing.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens: −10⁶ to 10⁶, or −∞, which bans the token. In JSON, which has no
    /// infinities, −∞ is `null`.
    #[serde(deserialize_with = "null_is_never")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Chooses the stream of random numbers.
    pub seed: u64,
    /// How many of the most probable tokens are reported with each token.
    pub top_logprobs: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            top_logprobs: 0,
        }
    }
}

/// An option outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// [`Options::temperature`].
    #[error("temperature: found {0}, needed 0 (greedy) or 1e-6 to 1e6")]
    Temperature(f32),
    /// [`Options::top_p`].
    #[error("top_p: found {0}, needed more than 0 and at most 1 (off)")]
    TopP(f32),
    /// [`Options::min_p`].
    #[error("min_p: found {0}, needed 0 (off) to 1")]
    MinP(f32),
    /// [`Options::repetition_penalty`].
    #[error("repetition_penalty: found {0}, needed 1e-6 to 1e6 (1 is off)")]
    RepetitionPenalty(f32),
    /// [`Options::frequency_penalty`].
    #[error("frequency_penalty: found {0}, needed -1e6 to 1e6 (0 is off)")]
    FrequencyPenalty(f32),
    /// [`Options::presence_penalty`].
    #[error("presence_penalty: found {0}, needed -1e6 to 1e6 (0 is off)")]
    PresencePenalty(f32),
    /// A value of [`Options::logit_bias`].
    #[error("logit_bias of token {token}: found {found}, needed -1e6 to 1e6, or -inf to ban the token")]
    LogitBias {
        /// The token.
        token: u32,
        /// Its bias.
        found: f32,
    },
}

/// Options stay within this and its reciprocal, so that no product of them leaves the range of f32.
const LIMIT: f32 = 1e6;

impl Options {
    /// The most probable token each time, the lowest id among equals.
    pub fn greedy() -> Options {
        Options { temperature: 0.0, ..Options::default() }
    }

    /// Whether the most probable token is taken without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks every option's range.
    ///
    /// # Errors
    /// The first option, in the order of the fields, that is NaN or outside its range.
    pub fn validate(&self) -> Result<(), OptionsError> {
        use OptionsError::*;
        // Ranges contain no NaN.
        let factor = 1.0 / LIMIT..=LIMIT;
        let term = -LIMIT..=LIMIT;
        let check = |fits: bool, error: OptionsError| if fits { Ok(()) } else { Err(error) };
        check(self.is_greedy() || factor.contains(&self.temperature), Temperature(self.temperature))?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, TopP(self.top_p))?;
        check((0.0..=1.0).contains(&self.min_p), MinP(self.min_p))?;
        check(factor.contains(&self.repetition_penalty), RepetitionPenalty(self.repetition_penalty))?;
        check(term.contains(&self.frequency_penalty), FrequencyPenalty(self.frequency_penalty))?;
        check(term.contains(&self.presence_penalty), PresencePenalty(self.presence_penalty))?;
        for (&token, &found) in &self.logit_bias {
            check(term.contains(&found) || found == f32::NEG_INFINITY, LogitBias { token, found })?;
        }
        Ok(())
    }

    /// What scores are multiplied by.
    pub(crate) fn inverse_temperature(&self) -> f32 {
        1.0 / self.temperature
    }

    /// The factors of positive and of other logits of tokens that occurred; `None` where they are 1.
    pub(crate) fn repetition(&self) -> Option<(f32, f32)> {
        (self.repetition_penalty != 1.0).then(|| (1.0 / self.repetition_penalty, self.repetition_penalty))
    }

    /// Whether generated tokens are penalised.
    pub(crate) fn subtracts(&self) -> bool {
        self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Whether scores are the logits.
    pub(crate) fn keeps_logits(&self) -> bool {
        self.logit_bias.is_empty() && self.repetition().is_none() && !self.subtracts()
    }

    /// What is subtracted from the logit of a token that was generated `count` times.
    pub(super) fn penalty(&self, count: u32) -> f32 {
        if count == 0 { 0.0 } else { self.frequency_penalty * count as f32 + self.presence_penalty }
    }

    /// What min-p allows a score, after the temperature, to be below the largest; `None` where it is off.
    pub(crate) fn min_p_distance(&self) -> Option<f32> {
        (self.min_p > 0.0).then(|| -f64::from(self.min_p).ln() as f32)
    }

    /// How many tokens top-k keeps of a vocabulary; `None` where it keeps all.
    pub(crate) fn top_k_of(&self, vocabulary: usize) -> Option<usize> {
        (self.top_k > 0 && self.top_k < vocabulary).then_some(self.top_k)
    }
}

fn null_is_never<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, f32>, D::Error> {
    let biases = BTreeMap::<u32, Option<f32>>::deserialize(deserializer)?;
    Ok(biases.into_iter().map(|(token, bias)| (token, bias.unwrap_or(f32::NEG_INFINITY))).collect())
}
