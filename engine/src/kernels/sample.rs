//! The next token of each sequence, drawn where the logits are: [`crate::sampling`] as kernels that read nothing but buffers,
//! so that a recorded graph draws whatever the host asks for by writing [`Parameters`].
//!
//! ```text
//! logits ─► score    bias, penalties; largest score and Σ exp of each part of the vocabulary
//!       ─► search ×3 the score of the k-th token     (top-k)
//!       ─► search ×3 the score of the nucleus's last (top-p)
//!       ─► keep     Σ of what is left of each part   (top-k, top-p, min-p)
//!       ─► pick     part, then token; its log-probability ─► tokens, positions + 1, counts + 1
//! ```
//!
//! [`Ways`] says which of these a graph has; a greedy choice is `score` and `pick` alone. Each kernel begins with what the one
//! before it left for the whole sequence, because no cube can wait for the others.
//!
//! A search finds a threshold among the distances of the scores from the largest, as f32 whose order is that of their bits: 11 of
//! the 31 bits at a time, then 10, then 10, by a histogram of the tokens that agree in the bits before. Top-k counts tokens and is
//! exact. Top-p sums weights in units of 2⁻³¹ of all, integers, so that the order of the additions does not matter; it is off by at
//! most half a unit a token. Distances below the normal range count as equal, as on the processor.
//!
//! The draw descends two trees of sums, over the parts and over a part, with a number that the host wrote: the first token, in
//! the order of ids, at which the running sum exceeds `u` of the whole. Where a sum's rounding leaves nothing on the right, it
//! stays with the last token that has weight. Sums are made in the same order each time: the same numbers give the same text.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, read};
use crate::backend::failed;
use crate::error::Result;
use crate::gpu::choice::{Choice, OfStep};
use crate::sampling::{Distribution, LogSumExp, NOTHING, Options, Sampler, uniform};

/// Units of a cube.
const UNITS: usize = 256;
/// Parts of a vocabulary, at most.
const PARTS: usize = 128;
/// Tokens of a part, at least, where there are as many.
const OF_PART: usize = 1024;
/// Bins of a histogram.
const BINS: usize = 2048;
/// Bits of a distance that each pass of a search finds, from the top.
const DIGITS: [u32; 3] = [11, 10, 10];
/// Words of `partial` for a part: largest score, its token, Σ exp of the scores, largest logit, Σ exp of the logits, what is kept.
const PARTIAL: usize = 6;
/// Words of `found` for a kernel: see [`Found`].
const FOUND: usize = 5;
/// Words of [`Parameters`].
pub const WORDS: usize = 12;
/// Random numbers of a row.
pub const RING: usize = 256;
/// The bit of a count that says that the prompt has the token.
pub const PROMPT: u32 = 1 << 31;

/// What the kernels of a graph can do. Sequences that ask for less are served too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ways {
    /// Biases and penalties.
    pub changes: bool,
    /// Temperatures above 0.
    pub draws: bool,
    /// Top-k, where it draws.
    pub top_k: bool,
    /// Top-p, where it draws.
    pub top_p: bool,
    /// Min-p, where it draws.
    pub min_p: bool,
}

impl Ways {
    /// What the options of a sequence need.
    pub fn of(options: &Options) -> Ways {
        let draws = !options.is_greedy();
        Ways {
            changes: !options.keeps_logits(),
            draws,
            top_k: draws && options.top_k > 0,
            top_p: draws && options.top_p < 1.0,
            min_p: draws && options.min_p > 0.0,
        }
    }

    /// What two sequences need.
    pub fn or(self, other: Ways) -> Ways {
        Ways {
            changes: self.changes || other.changes,
            draws: self.draws || other.draws,
            top_k: self.top_k || other.top_k,
            top_p: self.top_p || other.top_p,
            min_p: self.min_p || other.min_p,
        }
    }

    fn filters(self) -> bool {
        self.top_k || self.top_p || self.min_p
    }

    /// Passes of all searches.
    fn passes(self) -> usize {
        DIGITS.len() * (usize::from(self.top_k) + usize::from(self.top_p))
    }

    fn pass(self, index: usize) -> Pass {
        Pass { by_mass: !self.top_k || index >= DIGITS.len(), digit: index % DIGITS.len() }
    }
}

/// A pass of a search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pass {
    /// Top-p's, not top-k's.
    by_mass: bool,
    /// Which of [`DIGITS`].
    digit: usize,
}

impl Pass {
    /// Bits below the digit.
    fn shift(self) -> u32 {
        DIGITS[self.digit + 1..].iter().sum()
    }

    fn mask(self) -> u32 {
        (1 << DIGITS[self.digit]) - 1
    }

    fn is_last(self) -> bool {
        self.digit + 1 == DIGITS.len()
    }
}

/// What a sequence asks for, as the host writes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameters {
    /// What scores are multiplied by; 0 takes the largest.
    pub inverse_temperature: f32,
    /// Tokens that top-k keeps; 0 keeps all.
    pub top_k: u32,
    /// The part of the weights that top-p keeps; 1 keeps all.
    pub top_p: f32,
    /// What min-p allows a score, after the temperature, to be below the largest.
    pub min_p_distance: f32,
    /// The factors of positive and of other logits of tokens that occurred.
    pub repetition: (f32, f32),
    /// Subtracted for each time that a token was generated.
    pub frequency: f32,
    /// Subtracted if a token was generated.
    pub presence: f32,
    /// The sequence's row of `uniforms`, `counts` and `biases`.
    pub row: u32,
    /// Whether the row of `counts` holds: it is used and carried on.
    pub counted: bool,
    /// Whether the row of `biases` holds.
    pub biased: bool,
}

impl Parameters {
    /// The most probable token. Changes no row, so that a graph can be recorded with it.
    pub const GREEDY: Parameters = Parameters {
        inverse_temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p_distance: f32::MAX,
        repetition: (1.0, 1.0),
        frequency: 0.0,
        presence: 0.0,
        row: 0,
        counted: false,
        biased: false,
    };

    /// What the options of a sequence mean for a vocabulary.
    pub fn new(options: &Options, vocabulary: usize, row: u32) -> Parameters {
        let repetition = options.repetition();
        Parameters {
            inverse_temperature: if options.is_greedy() { 0.0 } else { options.inverse_temperature() },
            top_k: options.top_k_of(vocabulary).map_or(0, |k| k as u32),
            top_p: options.top_p,
            min_p_distance: options.min_p_distance().unwrap_or(f32::MAX),
            repetition: repetition.unwrap_or((1.0, 1.0)),
            frequency: options.frequency_penalty,
            presence: options.presence_penalty,
            row,
            counted: repetition.is_some() || options.subtracts(),
            biased: !options.logit_bias.is_empty(),
        }
    }

    /// In the order of the fields; the last word is 0.
    pub fn to_words(&self) -> [u32; WORDS] {
        [
            self.inverse_temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p_distance.to_bits(),
            self.repetition.0.to_bits(),
            self.repetition.1.to_bits(),
            self.frequency.to_bits(),
            self.presence.to_bits(),
            self.row,
            self.counted.into(),
            self.biased.into(),
            0,
        ]
    }
}

/// Parts of a vocabulary.
fn parts(vocabulary: usize) -> usize {
    vocabulary.div_ceil(OF_PART).clamp(1, PARTS)
}

/// Words of `partial` for a number of sequences.
pub fn partial_len(vocabulary: usize, sequences: usize) -> usize {
    sequences * parts(vocabulary) * PARTIAL
}

/// Words of `histograms` for a number of sequences.
pub fn histograms_len(ways: Ways, sequences: usize) -> usize {
    sequences * ways.passes() * BINS
}

/// Words of `found` for a number of sequences.
pub fn found_len(ways: Ways, sequences: usize) -> usize {
    sequences * (ways.passes() + 1) * FOUND
}

/// The buffers of the choice. Those that the [`Ways`] do not need may be any.
pub struct Buffers<'a> {
    /// f32 `[sequences, vocabulary]`.
    pub logits: &'a Handle,
    /// u32 `[sequences, WORDS]`: [`Parameters`].
    pub parameters: &'a Handle,
    /// f32 `[rows, RING]`: the number for the token after position p stands at p modulo [`RING`]. If it draws.
    pub uniforms: &'a Handle,
    /// u32 `[rows, vocabulary]`: how often each token was generated, and [`PROMPT`]. If it changes.
    pub counts: &'a Handle,
    /// f32 `[rows, vocabulary]`: what is added to the logits, −10³⁰ for a banned token. If it changes.
    pub biases: &'a Handle,
    /// f32 `[sequences, vocabulary]`: the scores. If it changes.
    pub scores: &'a Handle,
    /// f32, [`partial_len`].
    pub partial: &'a Handle,
    /// u32, [`histograms_len`]. With top-k or top-p.
    pub histograms: &'a Handle,
    /// u32, [`found_len`]. With a filter.
    pub found: &'a Handle,
    /// u32 `[sequences]`: the chosen tokens.
    pub tokens: &'a Handle,
    /// u32 `[sequences]`: grows by one each.
    pub positions: &'a Handle,
    /// u32 `[sequences, 2]`: the token, `u32::MAX` where none is left, and the bits of its log-probability under the model
    /// itself, which is not a number where a logit is not.
    pub chosen: &'a Handle,
    /// Rows of `uniforms`, `counts` and `biases`.
    pub rows: usize,
}

/// Chooses the next token of each of some sequences.
pub fn launch(client: &Client, ways: Ways, vocabulary: usize, sequences: usize, buffers: &Buffers<'_>) {
    let all = sequences * vocabulary;
    let whole = CubeCount::Static(parts(vocabulary) as u32, sequences as u32, 1);
    let dim = CubeDim::new_1d(UNITS as u32);
    // What is not there is stood in for by what is bound in the same way.
    let read = |there: bool, buffer: &Handle, len: usize| match there {
        true => (buffer.clone(), len),
        false => (buffers.parameters.clone(), 1),
    };
    let written = |there: bool, buffer: &Handle, len: usize| match there {
        true => (buffer.clone(), len),
        false => (buffers.partial.clone(), 1),
    };
    let table = buffers.rows * vocabulary;
    let (uniforms, uniforms_len) = read(ways.draws, buffers.uniforms, buffers.rows * RING);
    let (biases, biases_len) = read(ways.changes, buffers.biases, table);
    let (histograms, histograms_len) =
        written(ways.passes() > 0, buffers.histograms, histograms_len(ways, sequences));
    let (found, found_len) = written(ways.filters(), buffers.found, found_len(ways, sequences));
    let scores = if ways.changes { buffers.scores } else { buffers.logits };
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at the end of their part, bins are below
    // `BINS` and leaves below `UNITS` whatever the logits are, and a chosen token is made to be one.
    unsafe {
        let (counts, counts_len) = read(ways.changes, buffers.counts, table);
        let (written_scores, written_len) = written(ways.changes, buffers.scores, all);
        score_kernel::launch_unchecked(
            client,
            whole.clone(),
            dim,
            BufferArg::from_raw_parts(buffers.logits.clone(), all),
            BufferArg::from_raw_parts(buffers.parameters.clone(), sequences * WORDS),
            BufferArg::from_raw_parts(counts, counts_len),
            BufferArg::from_raw_parts(biases, biases_len),
            BufferArg::from_raw_parts(written_scores, written_len),
            BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(vocabulary, sequences)),
            BufferArg::from_raw_parts(histograms.clone(), histograms_len),
            vocabulary,
            ways,
        );
        for index in 0..ways.passes() {
            search_kernel::launch_unchecked(
                client,
                whole.clone(),
                dim,
                BufferArg::from_raw_parts(scores.clone(), all),
                BufferArg::from_raw_parts(buffers.parameters.clone(), sequences * WORDS),
                BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(vocabulary, sequences)),
                BufferArg::from_raw_parts(histograms.clone(), histograms_len),
                BufferArg::from_raw_parts(found.clone(), found_len),
                vocabulary,
                ways,
                index,
            );
        }
        if ways.filters() {
            keep_kernel::launch_unchecked(
                client,
                whole,
                dim,
                BufferArg::from_raw_parts(scores.clone(), all),
                BufferArg::from_raw_parts(buffers.parameters.clone(), sequences * WORDS),
                BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(vocabulary, sequences)),
                BufferArg::from_raw_parts(histograms, histograms_len),
                BufferArg::from_raw_parts(found.clone(), found_len),
                vocabulary,
                ways,
            );
        }
        let (found, found_len) = read(ways.filters(), buffers.found, found_len);
        let (counts, counts_len) = written(ways.changes, buffers.counts, table);
        pick_kernel::launch_unchecked(
            client,
            CubeCount::Static(sequences as u32, 1, 1),
            dim,
            BufferArg::from_raw_parts(buffers.logits.clone(), all),
            BufferArg::from_raw_parts(scores.clone(), all),
            BufferArg::from_raw_parts(buffers.parameters.clone(), sequences * WORDS),
            BufferArg::from_raw_parts(uniforms, uniforms_len),
            BufferArg::from_raw_parts(found, found_len),
            BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(vocabulary, sequences)),
            BufferArg::from_raw_parts(counts, counts_len),
            BufferArg::from_raw_parts(buffers.tokens.clone(), sequences),
            BufferArg::from_raw_parts(buffers.positions.clone(), sequences),
            BufferArg::from_raw_parts(buffers.chosen.clone(), sequences * 2),
            vocabulary,
            ways,
        );
    }
}

/// What an earlier kernel found out about a sequence.
#[derive(CubeType)]
struct Found {
    /// The largest score.
    best: f32,
    /// No less than the sum of the weights that the searches so far have kept.
    mass: f32,
    /// The bits of the distance up to which they have kept tokens.
    limit: u32,
    /// Bits of the threshold that is being searched.
    digits: u32,
    /// What the tokens that have them must reach.
    target: u32,
}

/// The part of the vocabulary that the cube has.
#[cube]
fn part(#[comptime] vocabulary: usize) -> (usize, usize) {
    range(CUBE_POS_X as usize, vocabulary)
}

#[cube]
fn range(part: usize, #[comptime] vocabulary: usize) -> (usize, usize) {
    let of_part = comptime!(vocabulary.div_ceil(parts(vocabulary)));
    let start = part * of_part;
    (start, select(start + of_part < vocabulary, start + of_part, vocabulary))
}

#[cube]
fn float(parameters: &[u32], at: usize) -> f32 {
    f32::reinterpret(parameters[at])
}

#[cube(launch_unchecked)]
fn score_kernel(
    logits: &[f32],
    parameters: &[u32],
    counts: &[u32],
    biases: &[f32],
    scores: &mut [f32],
    partial: &mut [f32],
    histograms: &mut [u32],
    #[comptime] vocabulary: usize,
    #[comptime] ways: Ways,
) {
    let sequence = CUBE_POS_Y as usize;
    let unit = UNIT_POS as usize;
    let (start, end) = part(vocabulary);
    let words = sequence * WORDS;
    let inverse = float(parameters, words);
    let row = parameters[words + 8] as usize * vocabulary;
    let counted = parameters[words + 9] != 0;
    let biased = parameters[words + 10] != 0;
    let mut logit_best = f32::MIN.runtime();
    let mut logit_id = u32::MAX.runtime();
    let mut logit_sum = 0.0f32;
    let mut best = f32::MIN.runtime();
    let mut id = u32::MAX.runtime();
    let mut sum = 0.0f32;
    let mut at = start + unit;
    while at < end {
        let logit = logits[sequence * vocabulary + at];
        let (b, i, s) = tally(logit_best, logit_id, logit_sum, logit, at as u32, 1.0f32);
        logit_best = b;
        logit_id = i;
        logit_sum = s;
        let mut score = logit;
        if comptime!(ways.changes) {
            if biased {
                score += biases[row + at];
            }
            if counted {
                let count = counts[row + at];
                if count != 0 {
                    // With a zero that only the host knows, a product is rounded by itself, as on the processor: compilers
                    // would contract it with the addition that follows.
                    let zero = float(parameters, words + 11);
                    let positive = float(parameters, words + 4);
                    let negative = float(parameters, words + 5);
                    score = fma(score, select(score > 0.0f32, positive, negative), zero);
                    let generated = count & comptime!(!PROMPT);
                    if generated != 0 {
                        let frequency = float(parameters, words + 6);
                        let presence = float(parameters, words + 7);
                        score -= fma(frequency, f32::cast_from(generated), zero) + presence;
                    }
                }
            }
            scores[sequence * vocabulary + at] = score;
        }
        if comptime!(ways.changes || ways.draws) {
            let (b, i, s) = tally(best, id, sum, score, at as u32, inverse);
            best = b;
            id = i;
            sum = s;
        }
        at += UNITS;
    }
    let to = (sequence * comptime!(parts(vocabulary)) + CUBE_POS_X as usize) * PARTIAL;
    let (logit_best, logit_id, logit_sum) = join(logit_best, logit_id, logit_sum, 1.0f32);
    if unit == 0 {
        partial[to] = logit_best;
        partial[to + 1] = f32::reinterpret(logit_id);
        partial[to + 3] = logit_best;
        partial[to + 4] = logit_sum;
    }
    if comptime!(ways.changes || ways.draws) {
        let (best, id, sum) = join(best, id, sum, inverse);
        if unit == 0 {
            partial[to] = best;
            partial[to + 1] = f32::reinterpret(id);
            partial[to + 2] = sum;
        }
    }
    let bins = comptime!(ways.passes() * BINS);
    let mut bin = CUBE_POS_X as usize * UNITS + unit;
    while bin < bins {
        histograms[sequence * bins + bin] = 0u32;
        bin += comptime!(parts(vocabulary) * UNITS);
    }
}

/// One more value: the largest, its token, and the sum of exponentials relative to it.
#[cube]
fn tally(best: f32, id: u32, sum: f32, value: f32, at: u32, scale: f32) -> (f32, u32, f32) {
    let takes = value > best;
    let ratio = ((value - best).abs() * -scale).exp();
    let sum = select(takes, sum * ratio + 1.0f32, sum + ratio);
    (select(takes, value, best), select(takes, at, id), sum)
}

/// The largest of all units' values, the lowest token that has it, and the sum of exponentials relative to it.
#[cube]
fn join(best: f32, id: u32, sum: f32, scale: f32) -> (f32, u32, f32) {
    let unit = UNIT_POS as usize;
    let mut bests = Shared::<[f32]>::new_slice(UNITS);
    let mut ids = Shared::<[u32]>::new_slice(UNITS);
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    bests[unit] = best;
    ids[unit] = id;
    sums[unit] = sum;
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            let other = unit + half;
            let a = bests[unit];
            let b = bests[other];
            let takes = b > a || (b == a && ids[other] < ids[unit]);
            let largest = select(takes, b, a);
            let ratio = ((a - b).abs() * -scale).exp();
            sums[unit] = select(takes, sums[unit] * ratio + sums[other], sums[unit] + sums[other] * ratio);
            bests[unit] = largest;
            ids[unit] = select(takes, ids[other], ids[unit]);
        }
        half /= 2;
    }
    sync_cube();
    (bests[0], ids[0], sums[0])
}

/// The largest score of a sequence, its token, and the sum of weights.
#[cube]
fn whole(partial: &[f32], sequence: usize, inverse: f32, #[comptime] vocabulary: usize) -> (f32, u32, f32) {
    let parts = comptime!(parts(vocabulary));
    let unit = UNIT_POS as usize;
    let mut best = f32::MIN.runtime();
    let mut id = u32::MAX.runtime();
    let mut sum = 0.0f32;
    if unit < parts {
        let at = (sequence * parts + unit) * PARTIAL;
        best = partial[at];
        id = u32::reinterpret(partial[at + 1]);
        sum = partial[at + 2];
    }
    join(best, id, sum, inverse)
}

/// The sums of all units' values, of halves of them, and so on: node `n` is the sum of nodes `2n` and `2n + 1`, unit `i` is node
/// `UNITS + i`.
#[cube]
fn tree_of<N: Numeric>(value: N) -> Shared<[N]> {
    let unit = UNIT_POS as usize;
    let mut tree = Shared::<[N]>::new_slice(comptime!(2 * UNITS));
    tree[UNITS + unit] = value;
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            let node = half + unit;
            tree[node] = tree[2 * node] + tree[2 * node + 1];
        }
        half /= 2;
    }
    sync_cube();
    tree
}

/// The first unit at which the running sum exceeds `target`, or the last that has anything, and what is left of `target` there.
#[cube]
fn descend<N: Numeric>(tree: &Shared<[N]>, target: N) -> (usize, N) {
    let mut node = 1usize.runtime();
    let mut rest = target;
    while node < UNITS {
        let left = tree[2 * node];
        let right = rest >= left && tree[2 * node + 1] > N::from_int(0);
        rest = select(right, rest - left, rest);
        node = 2 * node + select(right, 1usize, 0usize);
    }
    (node - UNITS, rest)
}

/// What is found once the pass before kernel `index` is done; all cubes of a sequence compute it, one leaves it to the next
/// kernel.
#[cube]
fn find(
    parameters: &[u32],
    partial: &[f32],
    histograms: &[Atomic<u32>],
    found: &mut [u32],
    #[comptime] vocabulary: usize,
    #[comptime] ways: Ways,
    #[comptime] index: usize,
) -> Found {
    let sequence = CUBE_POS_Y as usize;
    let words = sequence * WORDS;
    let slots = comptime!(ways.passes() + 1);
    let to = (sequence * slots + index) * FOUND;
    let result = if comptime!(index == 0) {
        let (best, _, mass) = whole(partial, sequence, float(parameters, words), vocabulary);
        Found { best, mass, limit: u32::MAX.runtime(), digits: 0u32.runtime(), target: 0u32.runtime() }
    } else {
        let pass = comptime!(ways.pass(index - 1));
        let from = to - FOUND;
        let mut mass = f32::reinterpret(found[from + 1]);
        let mut limit = found[from + 2];
        let mut target = found[from + 4];
        let each = comptime!((pass.mask() as usize + 1) / UNITS);
        let first =
            (sequence * comptime!(ways.passes()) + comptime!(index - 1)) * BINS + UNIT_POS as usize * each;
        let mut own = 0u32;
        #[unroll]
        for bin in 0..each {
            own += histograms[first + bin].load();
        }
        let tree = tree_of::<u32>(own);
        let total = tree[1];
        let top_k = parameters[words + 1];
        let top_p = float(parameters, words + 2);
        if comptime!(pass.digit == 0) {
            // The running sum reaches a number where it exceeds one less.
            if comptime!(pass.by_mass) {
                let wanted = u32::cast_from((top_p * f32::cast_from(total)).ceil());
                target = clamp(wanted, 1u32, total) - 1;
            } else {
                target = clamp(top_k, 1u32, total) - 1;
            }
        }
        let (unit, rest) = descend::<u32>(&tree, target);
        target = rest;
        let first = first - UNIT_POS as usize * each + unit * each;
        let mut bin = unit * each;
        let mut content = histograms[first].load();
        let mut next = 1usize.runtime();
        while next < each && target >= content {
            target -= content;
            bin = unit * each + next;
            content = histograms[first + next].load();
            next += 1;
        }
        let mut digits = (found[from + 3] << comptime!(DIGITS[pass.digit])) | bin as u32;
        if comptime!(pass.is_last()) {
            if comptime!(pass.by_mass) {
                limit = select(top_p < 1.0f32, min(limit, digits), limit);
            } else if top_k > 0 {
                limit = digits;
                // As many as there are before the last bin, and the bin: no weight is above 1.
                mass = min(mass, f32::cast_from(top_k - 1 - target + content));
            }
            digits = 0u32;
        }
        Found { best: f32::reinterpret(found[from]), mass, limit, digits, target }
    };
    if CUBE_POS_X == 0 && UNIT_POS == 0 {
        found[to] = u32::reinterpret(result.best);
        found[to + 1] = u32::reinterpret(result.mass);
        found[to + 2] = result.limit;
        found[to + 3] = result.digits;
        found[to + 4] = result.target;
    }
    result
}

/// How far a score is below the largest, as bits in the order of the distances.
#[cube]
fn bits_of(below: f32) -> u32 {
    u32::reinterpret(max(below, f32::MIN_POSITIVE))
}

/// The weight of a score, 0 if it is filtered out.
#[cube]
fn weight(below: f32, inverse: f32, limit: u32, distance: f32) -> f32 {
    let scaled = below * inverse;
    let kept = bits_of(below) <= limit && scaled <= distance;
    select(kept, (-scaled).exp(), 0.0f32)
}

#[cube(launch_unchecked)]
fn search_kernel(
    scores: &[f32],
    parameters: &[u32],
    partial: &[f32],
    histograms: &mut [Atomic<u32>],
    found: &mut [u32],
    #[comptime] vocabulary: usize,
    #[comptime] ways: Ways,
    #[comptime] index: usize,
) {
    let pass = comptime!(ways.pass(index));
    let sequence = CUBE_POS_Y as usize;
    let unit = UNIT_POS as usize;
    let (start, end) = part(vocabulary);
    let bins = comptime!(pass.mask() as usize + 1);
    let histogram = Shared::<[Atomic<u32>]>::new_slice(bins);
    let mut bin = unit;
    while bin < bins {
        histogram[bin].store(0u32);
        bin += UNITS;
    }
    let found = find(parameters, partial, &*histograms, found, vocabulary, ways, index);
    let inverse = float(parameters, sequence * WORDS);
    let units_of_mass = 2147483648.0f32 / found.mass;
    sync_cube();
    let mut at = start + unit;
    while at < end {
        let below = found.best - scores[sequence * vocabulary + at];
        let bits = bits_of(below);
        let mut counts = bits <= found.limit;
        if comptime!(pass.digit > 0) {
            let shift = comptime!(pass.shift() + DIGITS[pass.digit]);
            counts = counts && bits >> shift == found.digits;
        }
        if counts {
            let bin = bits >> comptime!(pass.shift()) & comptime!(pass.mask());
            let mut content = 1u32.runtime();
            if comptime!(pass.by_mass) {
                content = u32::cast_from((below * -inverse).exp() * units_of_mass + 0.5f32);
            }
            histogram[bin as usize].fetch_add(content);
        }
        at += UNITS;
    }
    sync_cube();
    let to = (sequence * comptime!(ways.passes()) + index) * BINS;
    let mut bin = unit;
    while bin < bins {
        let content = histogram[bin].load();
        if content != 0 {
            histograms[to + bin].fetch_add(content);
        }
        bin += UNITS;
    }
}

#[cube(launch_unchecked)]
fn keep_kernel(
    scores: &[f32],
    parameters: &[u32],
    partial: &mut [f32],
    histograms: &mut [Atomic<u32>],
    found: &mut [u32],
    #[comptime] vocabulary: usize,
    #[comptime] ways: Ways,
) {
    let sequence = CUBE_POS_Y as usize;
    let (start, end) = part(vocabulary);
    let found = find(parameters, &*partial, &*histograms, found, vocabulary, ways, comptime!(ways.passes()));
    let words = sequence * WORDS;
    let inverse = float(parameters, words);
    let distance = float(parameters, words + 3);
    let mut sum = 0.0f32;
    let mut at = start + UNIT_POS as usize;
    while at < end {
        sum += weight(found.best - scores[sequence * vocabulary + at], inverse, found.limit, distance);
        at += UNITS;
    }
    let tree = tree_of::<f32>(sum);
    if UNIT_POS == 0 {
        partial[(sequence * comptime!(parts(vocabulary)) + CUBE_POS_X as usize) * PARTIAL + 5] = tree[1];
    }
}

#[cube(launch_unchecked)]
fn pick_kernel(
    logits: &[f32],
    scores: &[f32],
    parameters: &[u32],
    uniforms: &[f32],
    found: &[u32],
    partial: &[f32],
    counts: &mut [u32],
    tokens: &mut [u32],
    positions: &mut [u32],
    chosen: &mut [u32],
    #[comptime] vocabulary: usize,
    #[comptime] ways: Ways,
) {
    let sequence = CUBE_POS_X as usize;
    let unit = UNIT_POS as usize;
    let words = sequence * WORDS;
    let row = parameters[words + 8] as usize;
    let parts = comptime!(parts(vocabulary));
    let at = (sequence * parts + unit) * PARTIAL;
    let mut logit_best = f32::MIN.runtime();
    let mut logit_id = u32::MAX.runtime();
    let mut logit_sum = 0.0f32;
    if unit < parts {
        logit_best = partial[at + 3];
        logit_id = u32::reinterpret(partial[at + 1]);
        logit_sum = partial[at + 4];
    }
    let (logit_best, logit_id, logit_sum) = join(logit_best, logit_id, logit_sum, 1.0f32);
    let mut best = logit_best;
    let mut token = logit_id;
    if comptime!(ways.changes || ways.draws) {
        let inverse = float(parameters, words);
        let (b, t, _) = whole(partial, sequence, inverse, vocabulary);
        best = b;
        token = t;
        if comptime!(ways.draws) {
            let mut limit = u32::MAX.runtime();
            let mut distance = f32::MAX.runtime();
            let mut mass = 0.0f32;
            if comptime!(ways.filters()) {
                let passes = comptime!(ways.passes());
                limit = found[(sequence * (passes + 1) + passes) * FOUND + 2];
                distance = float(parameters, words + 3);
                if unit < parts {
                    mass = partial[at + 5];
                }
            } else if unit < parts {
                mass = partial[at + 2] * ((partial[at] - best) * inverse).exp();
            }
            let tree = tree_of::<f32>(mass);
            let u = uniforms[row * RING + positions[sequence] as usize % RING];
            let (part, target) = descend::<f32>(&tree, tree[1] * u);
            let (start, end) = range(part, vocabulary);
            let each = comptime!(vocabulary.div_ceil(parts).div_ceil(UNITS));
            let first = start + unit * each;
            let mut sum = 0.0f32;
            #[unroll]
            for i in 0..each {
                if first + i < end {
                    let below = best - scores[sequence * vocabulary + first + i];
                    sum += weight(below, inverse, limit, distance);
                }
            }
            let units = tree_of::<f32>(sum);
            let (leaf, target) = descend::<f32>(&units, target);
            let mut rest = target;
            let mut drawn = token;
            let mut i = start + leaf * each;
            let last = select(i + each < end, i + each, end);
            while i < last {
                let weight = weight(best - scores[sequence * vocabulary + i], inverse, limit, distance);
                if weight > 0.0f32 {
                    drawn = i as u32;
                    if rest < weight {
                        i = last;
                    }
                    rest -= weight;
                }
                i += 1;
            }
            token = select(inverse > 0.0f32, drawn, token);
        }
    }
    // All units have read the position.
    sync_cube();
    if unit == 0 {
        let is_left = best > NOTHING && token < comptime!(vocabulary as u32);
        // What the next step reads must be a token.
        let next = select(is_left, token, 0u32);
        tokens[sequence] = next;
        positions[sequence] += 1;
        chosen[sequence * 2] = select(is_left, token, u32::MAX);
        let logit = logits[sequence * vocabulary + next as usize];
        chosen[sequence * 2 + 1] = u32::reinterpret(logit - logit_best - logit_sum.ln());
        if comptime!(ways.changes) {
            let at = row * vocabulary + next as usize;
            if parameters[words + 9] != 0 && is_left {
                counts[at] += 1;
            }
        }
    }
}

/// How far a running sum of probabilities may be from the truth: f32 sums, and exponentials of WGSL, which are wrong by 3 + 2 x
/// units of 2⁻²⁴ at −x, with x up to the entropy, about 12, in the mean.
const DRAW: f64 = 1.0 / (1 << 18) as f64;
/// How far the sum that top-p compares with its target may be from the truth.
const NUCLEUS: f32 = 1e-5;

/// A step's options and logits, for [`check`].
struct Case {
    name: &'static str,
    vocabulary: usize,
    steps: usize,
    /// Of each sequence.
    options: Vec<Options>,
    logits: fn(f64, usize) -> f32,
}

/// Compares draws with those of the processor, one by one, from the same random numbers.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) where the device fails.
pub fn check(client: &Client) -> Result<Vec<Comparison>> {
    let normal: fn(f64, usize) -> f32 = |normal, _| (3.0 * normal) as f32;
    let tied: fn(f64, usize) -> f32 = |normal, _| (2.0 * normal).round() as f32 / 2.0;
    let flat: fn(f64, usize) -> f32 = |_, _| -1.5;
    let banned: fn(f64, usize) -> f32 =
        |normal, token| if token % 3 == 0 { f32::NEG_INFINITY } else { 4.0 * normal as f32 };
    let each = |name, options: Options| Case {
        name,
        vocabulary: 5003,
        steps: 24,
        options: vec![options; 3],
        logits: normal,
    };
    let all = alternatives();
    let many: Vec<Options> = (0..32).map(|index| all[index % all.len()].clone()).collect();
    let with = |change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        options
    };
    let cases = [
        each("greedy", Options::greedy()),
        each("greedy with penalties", Options { frequency_penalty: 0.7, ..Options::greedy() }),
        each("temperature 1", Options::default()),
        each("temperature 2", with(|o| o.temperature = 2.0)),
        each("top-k", with(|o| o.top_k = 40)),
        Case {
            logits: |normal, _| (1e-39 * normal) as f32,
            ..each("top-k, distances below the normal range", with(|o| o.top_k = 40))
        },
        each("top-p", with(|o| o.top_p = 0.9)),
        each("min-p", with(|o| o.min_p = 0.02)),
        Case { name: "mixed", vocabulary: 1009, steps: 40, options: many.clone(), logits: normal },
        Case {
            name: "mixed, equal scores",
            vocabulary: 1009,
            steps: 20,
            options: many.clone(),
            logits: tied,
        },
        Case {
            name: "mixed, all scores equal",
            vocabulary: 1009,
            steps: 8,
            options: many.clone(),
            logits: flat,
        },
        Case { name: "mixed, −∞", vocabulary: 1009, steps: 16, options: many.clone(), logits: banned },
        Case {
            name: "all at once",
            vocabulary: 201_088,
            steps: 6,
            options: vec![everything()],
            logits: normal,
        },
        Case {
            name: "GPT-OSS",
            vocabulary: 201_088,
            steps: 2,
            options: many.into_iter().step_by(3).take(8).collect(),
            logits: normal,
        },
    ];
    let mut comparisons = Vec::new();
    for case in &cases {
        case.run(client, &mut comparisons)?;
    }
    comparisons.push(unsound(client)?);
    Ok(comparisons)
}

/// Every option.
fn everything() -> Options {
    Options {
        temperature: 1.3,
        top_k: 3000,
        top_p: 0.97,
        min_p: 0.001,
        repetition_penalty: 1.2,
        frequency_penalty: 0.3,
        presence_penalty: 0.5,
        logit_bias: [(0, 6.0), (2, f32::NEG_INFINITY), (250, 5.5), (100, -1.0)].into(),
        seed: 11,
        top_logprobs: 0,
    }
}

/// Options alone and together.
fn alternatives() -> Vec<Options> {
    let changes: [fn(&mut Options); 17] = [
        |_| {},
        |o| o.temperature = 0.0,
        |o| o.temperature = 0.3,
        |o| o.temperature = 4.0,
        |o| o.top_k = 1,
        |o| o.top_k = 50,
        |o| o.top_k = 1_000_000,
        |o| o.top_p = 0.5,
        |o| o.top_p = 1e-9,
        |o| o.top_p = 0.999,
        |o| o.min_p = 0.05,
        |o| o.min_p = 1.0,
        |o| (o.top_k, o.top_p, o.temperature) = (100, 0.9, 1.5),
        |o| o.repetition_penalty = 0.8,
        |o| (o.frequency_penalty, o.presence_penalty) = (-0.2, 0.4),
        |o| o.logit_bias = everything().logit_bias,
        |o| *o = everything(),
    ];
    let alternative = |(seed, change): (usize, &fn(&mut Options))| {
        let mut options = Options { seed: seed as u64, ..Options::default() };
        change(&mut options);
        options
    };
    changes.iter().enumerate().map(alternative).collect()
}

impl Case {
    fn run(&self, client: &Client, comparisons: &mut Vec<Comparison>) -> Result<()> {
        let &Case { name, vocabulary, steps, ref options, .. } = self;
        let sequences = options.len();
        let logits: Vec<Vec<f32>> = (0..sequences).map(|sequence| self.logits_of(sequence)).collect();
        let mut samplers: Vec<Sampler> = options
            .iter()
            .map(|options| {
                let mut sampler = Sampler::new(options.clone()).map_err(failed)?;
                sampler.extend_prompt(&[3, 100, 3, vocabulary as u32 - 1]);
                [7, 100, 7].into_iter().for_each(|token| sampler.accept(token));
                Ok(sampler)
            })
            .collect::<Result<_>>()?;
        let first: Vec<u32> = (0..sequences as u32).map(|sequence| 250 + 3 * sequence).collect();
        // Rows stand in another order than sequences.
        let row = |sequence: usize| (sequences - 1 - sequence) as u32;
        let ways = options.iter().map(Ways::of).fold(Ways::default(), Ways::or);
        let mut choice = Choice::new(client, sequences, vocabulary);
        choice.reserve(client, ways);
        let mut parameters = Vec::new();
        for (sequence, sampler) in samplers.iter().enumerate() {
            choice.write_row(client, row(sequence), sampler, first[sequence] as usize);
            parameters.push(choice.parameters_of(&options[sequence], row(sequence)));
        }
        choice.write_parameters(client, &parameters);
        let upload = |words: &[u32]| client.create_from_slice(bytemuck::cast_slice(words));
        let device_logits = client.create_from_slice(bytemuck::cast_slice(&logits.concat()));
        let (tokens, positions) = (upload(&vec![u32::MAX; sequences]), upload(&first));
        let chosen = upload(&vec![0; 2 * sequences]);
        let step_buffers =
            OfStep { logits: &device_logits, tokens: &tokens, positions: &positions, chosen: &chosen };
        let mut judge = Judge::default();
        let mut wrong = 0;
        let mut truths: Vec<Option<Truth>> = (0..sequences).map(|_| None).collect();
        for step in 1..=steps {
            choice.enqueue(client, ways, sequences, &step_buffers);
            let drawn = read::<u32>(client, &chosen)?;
            wrong += usize::from(
                read::<u32>(client, &tokens)? != drawn.iter().copied().step_by(2).collect::<Vec<_>>(),
            );
            wrong += usize::from(
                !read::<u32>(client, &positions)?
                    .iter()
                    .zip(&first)
                    .all(|(now, then)| *now == then + step as u32),
            );
            for (sequence, [token, logprob]) in drawn.as_chunks::<2>().0.iter().enumerate() {
                let (sampler, truth) = (&mut samplers[sequence], &mut truths[sequence]);
                if truth.is_none() || parameters[sequence].counted {
                    *truth = Some(Truth::of(sampler, &logits[sequence])?);
                }
                if let Some(truth) = truth {
                    let u = f64::from(sampler.next_uniform());
                    judge.see(truth, &logits[sequence], *token, f32::from_bits(*logprob), u);
                }
                sampler.accept(*token);
            }
        }
        for (sequence, sampler) in samplers.iter().enumerate() {
            if let Some(counts) = choice.counts(row(sequence))
                && parameters[sequence].counted
            {
                let counts = read::<u32>(client, &counts)?;
                let generated: u32 = counts.iter().map(|count| count & !PROMPT).sum();
                let right = |(token, generated, in_prompt): (u32, u32, bool)| {
                    counts[token as usize] == generated | if in_prompt { PROMPT } else { 0 }
                };
                wrong +=
                    usize::from(generated as usize != sampler.generated() || !sampler.counts().all(right));
            }
        }
        let draws = (steps * sequences) as f64;
        let mut push = |what: &str, error: f64, bound: f64| {
            let case = format!("{name}, {sequences} × {vocabulary}: {what}");
            comparisons.push(Comparison { kernel: "sample", case, error, bound });
        };
        push("distance of u from the token", judge.distance, DRAW);
        push("part of other tokens", judge.others / draws, judge.close / draws);
        push("log-probability", judge.logprob, DRAW);
        push("states that are wrong", wrong as f64, 0.0);
        Ok(())
    }

    fn logits_of(&self, sequence: usize) -> Vec<f32> {
        let number = |n: usize| f64::from(uniform(1000 + sequence as u64, n as u64));
        let normal = |token: usize| {
            (-2.0 * number(2 * token).ln()).sqrt() * (std::f64::consts::TAU * number(2 * token + 1)).cos()
        };
        (0..self.vocabulary).map(|token| (self.logits)(normal(token), token)).collect()
    }
}

/// What may be drawn: by the options, and by those with a little less and a little more of top-p.
struct Truth(Vec<Distribution>);

impl Truth {
    fn of(sampler: &Sampler, logits: &[f32]) -> Result<Truth> {
        let mut distributions = vec![sampler.distribution(logits).map_err(failed)?];
        let top_p = sampler.options().top_p;
        if top_p < 1.0 {
            for top_p in [top_p * (1.0 - NUCLEUS), top_p * (1.0 + NUCLEUS)] {
                let other = sampler.with_top_p(top_p.min(1.0));
                distributions.push(other.distribution(logits).map_err(failed)?);
            }
        }
        Ok(Truth(distributions))
    }
}

/// How draws went.
#[derive(Default)]
struct Judge {
    /// The farthest that a random number was from those which choose the token.
    distance: f64,
    /// Tokens that the processor would not have chosen.
    others: f64,
    /// Random numbers so close to the next token's that it may be chosen.
    close: f64,
    /// The largest error of a log-probability, to what it is and 1.
    logprob: f64,
}

impl Judge {
    fn see(&mut self, truth: &Truth, logits: &[f32], token: u32, logprob: f32, u: f64) {
        let right = truth.0[0].token_at(u);
        let distance = |distribution: &Distribution, token: u32| {
            let own = distribution.probability(token);
            let before: f64 = distribution.probabilities().take(token as usize).sum();
            let inside = (u - before).min(before + own - u);
            if own > 0.0 { -inside } else { f64::INFINITY }
        };
        let found =
            truth.0.iter().map(|distribution| distance(distribution, token)).fold(f64::INFINITY, f64::min);
        self.distance = self.distance.max(found);
        let is_close = truth
            .0
            .iter()
            .any(|distribution| distribution.token_at(u) != right || distance(distribution, right) > -DRAW);
        self.close += f64::from(u8::from(is_close));
        self.others += f64::from(u8::from(token != right));
        let exact =
            logits.get(token as usize).map_or(f32::NAN, |logit| LogSumExp::new(logits).logprob(*logit));
        let error = f64::from((logprob - exact).abs()) / (1.0 + f64::from(exact.abs()));
        self.logprob = if error.is_nan() { f64::INFINITY } else { self.logprob.max(error) };
    }
}

/// Logits that nothing can be chosen from: what the host is told, and that the next step reads a token.
fn unsound(client: &Client) -> Result<Comparison> {
    let vocabulary = 300;
    let mut logits = vec![0f32; 3 * vocabulary];
    logits[7] = f32::NAN;
    logits[vocabulary + 9] = f32::INFINITY;
    logits[2 * vocabulary..].fill(f32::NEG_INFINITY);
    let mut wrong = 0;
    for options in [Options::greedy(), Options { top_k: 3, top_p: 0.5, ..Options::default() }] {
        let sampler = Sampler::new(options.clone()).map_err(failed)?;
        let choice = Choice::new(client, 3, vocabulary);
        for row in 0..3 {
            choice.write_row(client, row, &sampler, 0);
        }
        let parameters: Vec<_> = (0..3).map(|row| choice.parameters_of(&options, row)).collect();
        choice.write_parameters(client, &parameters);
        let upload = |words: &[u32]| client.create_from_slice(bytemuck::cast_slice(words));
        let logits = client.create_from_slice(bytemuck::cast_slice(&logits));
        let [tokens, positions] = [(); 2].map(|()| upload(&[0; 3]));
        let chosen = upload(&[0; 6]);
        let step_buffers =
            OfStep { logits: &logits, tokens: &tokens, positions: &positions, chosen: &chosen };
        choice.enqueue(client, Ways::of(&options), 3, &step_buffers);
        let (tokens, chosen) = (read::<u32>(client, &tokens)?, read::<u32>(client, &chosen)?);
        wrong += tokens.iter().filter(|&&token| token as usize >= vocabulary).count();
        wrong +=
            chosen[..4].iter().skip(1).step_by(2).filter(|&&bits| f32::from_bits(bits).is_finite()).count();
        wrong += usize::from(chosen[4] != u32::MAX);
    }
    let case = "logits that are not finite: what is not told".into();
    Ok(Comparison { kernel: "sample", case, error: wrong as f64, bound: 0.0 })
}
