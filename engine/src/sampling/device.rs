//! Sampling where the logits are, with Burn's tensor operations.
//!
//! The vocabulary becomes a grid of about as many rows as columns: a reduction along rows and then along their results
//! runs in parallel on devices where one thread makes one output, keeps the rounding of sums small, and gives the draw
//! its two steps (first the row, then the column). There is no sort: Burn sorts on the host. Top-k and top-p search for
//! their threshold instead ([`Ladder`]).

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData, Transaction};

use super::distribution::{LogSumExp, NEVER, NOTHING, check_vocabulary};
use super::history::History;
use super::{Options, SampleError, Sampled, Sampler};
use crate::backend::waiting;

/// What a sampler keeps on a device. It follows from options and history, and is made when it is needed.
#[derive(Clone, Default)]
pub(super) struct State {
    tables: Option<Tables>,
    /// Tokens whose counts changed since `Tables::history` was made.
    stale: Vec<u32>,
}

/// From how many changed tokens on the tables are made anew instead of being changed.
const MANY: usize = 64;

impl State {
    /// The counts of a token changed.
    pub fn touch(&mut self, token: u32) {
        let Some(history) = self.tables.as_mut().map(|tables| &mut tables.history) else { return };
        if history.is_some() {
            self.stale.push(token);
        }
        if self.stale.len() > MANY {
            self.stale.clear();
            *history = None;
        }
    }

    /// Starts the computation of a token for the random number `u`.
    pub fn launch(
        &mut self,
        options: &Options,
        history: &History,
        logits: Tensor<1>,
        u: f32,
    ) -> Result<Pending, SampleError> {
        let [vocabulary] = logits.dims();
        check_vocabulary(options, history, vocabulary)?;
        let logits = if logits.dtype() == DType::F32 { logits } else { logits.cast(DType::F32) };
        let device = logits.device();
        let fitting = self.tables.take().filter(|tables| tables.grid.fits(vocabulary, &device));
        if fitting.is_none() {
            self.stale.clear();
        }
        let tables = self.tables.insert(fitting.unwrap_or_else(|| Tables::new(options, vocabulary, device)));
        tables.update(options, history, &mut self.stale);
        Ok(tables.launch(options, logits, u))
    }
}

/// How a vocabulary is laid out.
#[derive(Clone)]
struct Grid {
    device: Device,
    vocabulary: usize,
    rows: usize,
    columns: usize,
}

impl Grid {
    fn new(vocabulary: usize, device: Device) -> Grid {
        let root = vocabulary.isqrt().max(1);
        // A divisor saves the padding.
        let divisor = (root / 2..=root).rev().find(|&rows| rows > 0 && vocabulary.is_multiple_of(rows));
        let rows = divisor.unwrap_or(root);
        Grid { columns: vocabulary.div_ceil(rows), rows, vocabulary, device }
    }

    fn fits(&self, vocabulary: usize, device: &Device) -> bool {
        self.vocabulary == vocabulary && self.device == *device
    }

    /// A table with a value for each token; `filler` elsewhere.
    fn table(&self, values: impl IntoIterator<Item = (u32, f32)>, filler: f32) -> Tensor<1> {
        let mut table = vec![filler; self.rows * self.columns];
        for (token, value) in values {
            table[token as usize] = value;
        }
        Tensor::from_data(TensorData::from(table.as_slice()), &self.device)
    }
}

/// Tensors that outlive a token.
#[derive(Clone)]
struct Tables {
    grid: Grid,
    /// f32 `[rows · columns]`: logits of no token, where there are more places than tokens.
    blank: Option<Tensor<1>>,
    /// f32 `[rows, columns]`.
    bias: Option<Tensor<2>>,
    history: Option<HistoryTables>,
    ladder: Option<Ladder>,
}

/// What the history does to scores; each f32 `[rows · columns]`.
#[derive(Clone)]
struct HistoryTables {
    /// The repetition penalty's two factors: the reciprocal of the penalty, and the penalty.
    factors: Option<[Tensor<1>; 2]>,
    /// What is subtracted.
    penalty: Option<Tensor<1>>,
}

impl HistoryTables {
    fn new(options: &Options, history: &History, grid: &Grid) -> HistoryTables {
        let factors = options.repetition().map(|(positive, negative)| {
            [positive, negative]
                .map(|factor| grid.table(history.counts().map(|(token, _)| (token, factor)), 1.0))
        });
        let penalty = options.subtracts().then(|| {
            let penalties =
                history.counts().map(|(token, counts)| (token, options.penalty(counts.generated)));
            grid.table(penalties, 0.0)
        });
        HistoryTables { factors, penalty }
    }

    fn change(&mut self, options: &Options, history: &History, tokens: &[u32]) {
        let Some(first) = [self.factors.as_ref().map(|factors| &factors[0]), self.penalty.as_ref()]
            .into_iter()
            .flatten()
            .next()
        else {
            return;
        };
        let device = first.device();
        let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
        let ids = Tensor::<1, Int>::from_data(ids.as_slice(), &device);
        let assign = |table: &mut Tensor<1>, value: &dyn Fn(u32) -> f32| {
            let values: Vec<f32> = tokens.iter().map(|&token| value(token)).collect();
            let values = Tensor::from_data(values.as_slice(), &device);
            let ids = ids.clone();
            table.inplace(|table| table.select_assign(0, ids, values, IndexingUpdateOp::Assign));
        };
        if let (Some((positive, negative)), Some([first, second])) = (options.repetition(), &mut self.factors)
        {
            let factor = |token, factor| if history.count(token).all > 0 { factor } else { 1.0 };
            assign(first, &|token| factor(token, positive));
            assign(second, &|token| factor(token, negative));
        }
        if let Some(penalty) = &mut self.penalty {
            assign(penalty, &|token| options.penalty(history.count(token).generated));
        }
    }
}

impl Tables {
    fn new(options: &Options, vocabulary: usize, device: Device) -> Tables {
        let grid = Grid::new(vocabulary, device);
        let places = grid.rows * grid.columns;
        let biases = options.logit_bias.iter().map(|(&token, &bias)| (token, bias.max(NEVER)));
        let shape = [grid.rows, grid.columns];
        Tables {
            blank: (places > grid.vocabulary)
                .then(|| Tensor::full([places], NEVER, (&grid.device, DType::F32))),
            bias: (!options.logit_bias.is_empty()).then(|| grid.table(biases, 0.0).reshape(shape)),
            ladder: (!options.is_greedy() && (options.top_k > 0 || options.top_p < 1.0))
                .then(|| Ladder::new(&grid.device)),
            history: None,
            grid,
        }
    }

    fn update(&mut self, options: &Options, history: &History, stale: &mut Vec<u32>) {
        if options.repetition().is_none() && !options.subtracts() {
            return;
        }
        match &mut self.history {
            None => self.history = Some(HistoryTables::new(options, history, &self.grid)),
            Some(tables) if !stale.is_empty() => {
                stale.sort_unstable();
                stale.dedup();
                tables.change(options, history, stale);
            }
            Some(_) => {}
        }
        stale.clear();
    }

    fn launch(&self, options: &Options, logits: Tensor<1>, u: f32) -> Pending {
        let shape = [self.grid.rows, self.grid.columns];
        let returned = (options.top_logprobs > 0).then(|| logits.clone());
        let padded = match &self.blank {
            // The logits are written last: were they never computed, this cannot be read either (see `concatenated`).
            Some(blank) => {
                let tokens = 0..self.grid.vocabulary;
                blank.clone().slice_assign([tokens], logits.clone())
            }
            None => logits.clone(),
        };
        let raw: Tensor<2> = padded.reshape(shape);
        let changed = !options.keeps_logits();
        let scores = self.scores(options, raw.clone());

        let (row, column, largest, weights) = if options.is_greedy() {
            let (values, columns) = scores.max_dim_with_indices(1);
            let row = values.clone().argmax(0);
            let column = columns.select(0, row.clone().reshape([1]));
            (row, column, values.max_dim(0), None)
        } else {
            let largest = scores.clone().max_dim(1).max_dim(0);
            let below = largest.clone() - scores;
            let weights = below.clone().mul_scalar(-options.inverse_temperature()).exp();
            let kept = self.filter(options, below, weights.clone());
            let (row, column) = draw(kept, u);
            (row, column, largest, Some(weights))
        };
        let raw_largest = if changed { raw.clone().max_dim(1).max_dim(0) } else { largest.clone() };
        let raw_weights = match weights {
            Some(weights) if !changed && options.temperature == 1.0 => weights,
            _ => (raw.clone() - raw_largest.clone()).exp(),
        };
        let raw_sum = sum(raw_weights);
        let raw_logit = raw.select(0, row.clone().reshape([1])).select(1, column.clone().reshape([1]));
        Pending {
            vocabulary: self.grid.vocabulary,
            columns: self.grid.columns,
            row,
            column,
            numbers: [raw_logit, raw_largest, raw_sum, largest],
            returned,
            logits,
        }
    }

    /// Logits after bias and penalties. The same operations as on the processor.
    fn scores(&self, options: &Options, raw: Tensor<2>) -> Tensor<2> {
        let shape = raw.dims();
        let mut scores = raw;
        if let Some(bias) = &self.bias {
            scores = scores + bias.clone();
        }
        let Some(history) = &self.history else { return scores };
        if let Some([positive, negative]) = &history.factors {
            let divided = scores.clone() * positive.clone().reshape(shape);
            let multiplied = scores * negative.clone().reshape(shape);
            // Of x / r and x · r, dividing where x > 0 gives the lesser if r > 1 and the larger if r < 1; so does
            // multiplying where x < 0.
            scores = match options.repetition_penalty > 1.0 {
                true => divided.min_pair(multiplied),
                false => divided.max_pair(multiplied),
            };
        }
        if let Some(penalty) = &history.penalty {
            scores = scores - penalty.clone().reshape(shape);
        }
        scores
    }

    /// Weights after top-k, top-p and min-p; `below` is the distance of the scores from the largest.
    fn filter(&self, options: &Options, below: Tensor<2>, mut weights: Tensor<2>) -> Tensor<2> {
        let [rows, columns] = below.dims();
        let shape = [1, rows, columns];
        if let Some(ladder) = &self.ladder {
            let distances = below.clone().mul_scalar(DISTANCE_UNITS);
            let keep = |weights: Tensor<2>, limit: Tensor<3>| {
                weights.mask_fill(distances.clone().greater(limit.reshape([1, 1])), 0.0)
            };
            if let Some(k) = options.top_k_of(self.grid.vocabulary) {
                let target = Tensor::full([1, 1, 1], k as f32, (&self.grid.device, DType::F32));
                let limit = ladder.search(distances.clone().reshape(shape), ladder.one.clone(), target);
                weights = keep(weights, limit);
            }
            if options.top_p < 1.0 {
                let target = sum(weights.clone()).mul_scalar(options.top_p).reshape([1, 1, 1]);
                let limit =
                    ladder.search(distances.clone().reshape(shape), weights.clone().reshape(shape), target);
                weights = keep(weights, limit);
            }
        }
        if let Some(distance) = options.min_p_distance() {
            let below = below.mul_scalar(options.inverse_temperature());
            weights = weights.mask_fill(below.greater_elem(distance), 0.0);
        }
        weights
    }
}

/// f32 `[rows, columns]` to `[1, 1]`, always in the same order: `Tensor::sum` adds atomically where a device can, so
/// that the same seed could give another text.
fn sum(weights: Tensor<2>) -> Tensor<2> {
    weights.sum_dim(1).sum_dim(0)
}

/// The row and the column, each int `[1, 1]`, at which the running sum of weights exceeds `u` times their total.
fn draw(weights: Tensor<2>, u: f32) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let [rows, columns] = weights.dims();
    // Burn's running sum adds one after another on every backend, so that it never decreases and grows only where
    // there is weight: no token of weight zero can be chosen.
    let running = weights.clone().sum_dim(1).cumsum(0);
    // Below the total, since u is.
    let target = running.clone().narrow(0, rows - 1, 1).mul_scalar(u);
    let passed = running.clone().lower_equal(target.clone());
    let row = passed.clone().int().sum_dim(0);
    let before = running.mask_fill(passed.bool_not(), 0.0).max_dim(0);

    let running = weights.select(0, row.clone().reshape([1])).cumsum(1);
    // The sum of the row has been rounded differently: what is left must stay below it.
    let end = running.clone().narrow(1, columns - 1, 1).mul_scalar(1.0 - f32::EPSILON / 2.0);
    let target = (target - before).min_pair(end);
    (row, running.lower_equal(target).int().sum_dim(1))
}

/// 2²⁴: see [`Ladder`].
const DISTANCE_UNITS: f32 = 16_777_216.0;

/// Finds thresholds among f32 numbers by their digits.
///
/// The wanted threshold is the least distance `t` for which the tokens at distances up to `t` have a mass of at least
/// `target`. The search fixes four bits of `t` at a time from the top, first the exponent, then the mantissa, by
/// computing the mass below each of up to 15 candidates, which is one pass over the vocabulary. The result is exact:
/// one of the distances, or that of the least normal number, below which distances count as equal.
///
/// Distances are in units of 1 / [`DISTANCE_UNITS`], so that every candidate, down to the last bit of its mantissa, is
/// made of normal numbers: many GPUs take smaller ones for zero. (Distances above 2¹⁰⁴ become infinite: equal, too.)
#[derive(Clone)]
struct Ladder {
    /// f32 `[1, 1, 1]`: 1.
    one: Tensor<3>,
    /// f32 `[1, 1, 1]`: 2⁻¹⁰², the least normal number in our units.
    least: Tensor<3>,
    /// f32 `[14, 1, 1]`: 2⁻⁸⁶, 2⁻⁷⁰, … 2¹²².
    exponents: Tensor<3>,
    /// f32 `[15, 1, 1]`: 2, 4, … 2¹⁵.
    doublings: Tensor<3>,
    /// Six of f32 `[15, 1, 1]` (the last `[7, 1, 1]`): the multiples of 2⁻⁴, 2⁻⁸, … 2⁻²⁰ and 2⁻²³.
    fractions: Vec<Tensor<3>>,
}

impl Ladder {
    fn new(device: &Device) -> Ladder {
        let column = |values: Vec<f32>| {
            Tensor::<1>::from_data(values.as_slice(), device).reshape([values.len(), 1, 1])
        };
        let powers =
            |exponents: &mut dyn Iterator<Item = i32>| column(exponents.map(|e| 2f32.powi(e)).collect());
        let multiples =
            |bits: i32, count: i32| column((1..=count).map(|n| n as f32 * 2f32.powi(-bits)).collect());
        Ladder {
            one: column(vec![1.0]),
            least: column(vec![f32::MIN_POSITIVE * DISTANCE_UNITS]),
            exponents: powers(&mut (1..15).map(|n| 16 * n - 102)),
            doublings: powers(&mut (1..16)),
            fractions: [4, 8, 12, 16, 20]
                .map(|bits| multiples(bits, 15))
                .into_iter()
                .chain([multiples(23, 7)])
                .collect(),
        }
    }

    /// The threshold, f32 `[1, 1, 1]`, of distances f32 `[1, rows, columns]` with masses of a shape that broadcasts to
    /// theirs, for a target f32 `[1, 1, 1]`.
    fn search(&self, below: Tensor<3>, masses: Tensor<3>, target: Tensor<3>) -> Tensor<3> {
        // The largest of the candidates, and of what was found before, that has too little mass below it.
        let step = |found: Tensor<3>, candidates: Tensor<3>| {
            let outside = below.clone().greater_equal(candidates.clone());
            let mass = masses.clone().mask_fill(outside, 0.0).sum_dim(2).sum_dim(1);
            let enough = mass.greater_equal(target.clone());
            candidates.mask_where(enough, found).max_dim(0)
        };
        let found = step(self.least.clone(), self.exponents.clone());
        let found = step(found.clone(), self.doublings.clone() * found);
        let power = found.clone();
        self.fractions.iter().fold(found, |found, fractions| {
            let candidates = fractions.clone() * power.clone() + found.clone();
            step(found, candidates)
        })
    }
}

/// A token that the device is still computing.
pub(super) struct Pending {
    vocabulary: usize,
    columns: usize,
    /// int `[1, 1]`.
    row: Tensor<2, Int>,
    /// int `[1, 1]`.
    column: Tensor<2, Int>,
    /// Each f32 `[1, 1]`: the token's logit, the largest logit, Σ exp(logit − largest), and the largest score.
    numbers: [Tensor<2>; 4],
    /// The logits, where the host needs them.
    returned: Option<Tensor<1>>,
    /// The logits, to explain a failure.
    logits: Tensor<1>,
}

/// Waits for the tokens, in one read.
///
/// # Errors
/// [`SampleError::Device`] where nothing could be read.
pub(super) fn read(
    launched: Vec<(Pending, &Sampler)>,
) -> Result<Vec<Result<Sampled, SampleError>>, SampleError> {
    let mut transaction = Transaction::default();
    for (pending, _) in &launched {
        transaction = transaction.register(pending.row.clone()).register(pending.column.clone());
        for number in &pending.numbers {
            transaction = transaction.register(number.clone());
        }
        if let Some(logits) = &pending.returned {
            transaction = transaction.register(logits.clone());
        }
    }
    // Down to the values, which come when they are first looked at.
    waiting(|| {
        let data = transaction.try_execute().map_err(|error| SampleError::Device(error.to_string()))?;
        let mut data = data.into_iter();
        Ok(launched.into_iter().map(|(pending, sampler)| pending.finish(sampler, &mut data)).collect())
    })
}

impl Pending {
    fn finish(
        self,
        sampler: &Sampler,
        data: &mut impl Iterator<Item = TensorData>,
    ) -> Result<Sampled, SampleError> {
        let mut next = || data.next().ok_or_else(|| SampleError::Device("too little was read".into()));
        let mut index = || Ok(next()?.iter::<i64>().next().unwrap_or(-1));
        let (row, column): (i64, i64) = (index()?, index()?);
        let mut numbers = [f32::NAN; 4];
        for number in &mut numbers {
            *number = next()?.iter::<f32>().next().unwrap_or(f32::NAN);
        }
        let returned: Vec<f32> =
            if self.returned.is_some() { next()?.iter::<f32>().collect() } else { vec![] };
        let [logit, raw_largest, raw_sum, largest] = numbers;
        let token = row * self.columns as i64 + column;
        let sound = numbers.iter().all(|number| number.is_finite())
            && largest > NOTHING
            && (0..self.columns as i64).contains(&column)
            && (0..self.vocabulary as i64).contains(&token);
        if !sound {
            return Err(self.explain(sampler, token, numbers));
        }
        let model = LogSumExp { largest: raw_largest.into(), sum: raw_sum.into() };
        Ok(Sampled {
            token: token as u32,
            logprob: model.logprob(logit),
            top_logprobs: model.top(&returned, sampler.options.top_logprobs),
        })
    }

    /// What the processor finds wrong with the logits; if nothing, it is the device.
    fn explain(self, sampler: &Sampler, token: i64, numbers: [f32; 4]) -> SampleError {
        let logits = match self.logits.try_into_vec_as::<f32>() {
            Ok(logits) => logits,
            Err(error) => return SampleError::Device(error.to_string()),
        };
        sampler.distribution(&logits).err().unwrap_or_else(|| {
            SampleError::Device(format!(
                "token {token} with the numbers {numbers:?} does not follow from its logits"
            ))
        })
    }
}
