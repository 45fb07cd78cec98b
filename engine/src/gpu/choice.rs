//! What the host tells [`sample`] about the sequences of a batch.
//!
//! A sequence has a row of random numbers and, where its options need them, of counts and biases, written when it begins
//! ([`Choice::write_row`]). Which sequences a step has, their rows and options, is [`Choice::write_parameters`]. The random numbers
//! are for [`RING`] tokens; then come the next ([`Choice::write_uniforms`]). Writes and steps stand in one queue, so each step
//! reads what was written before it, and the host need not wait for any.

use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::Handle;

use crate::kernels::sample::{self, PROMPT, Parameters, RING, WORDS, Ways};
use crate::sampling::{NEVER, Options, Sampler, uniform};

/// The buffers of [`sample`] that belong to no other stage.
pub(crate) struct Choice {
    vocabulary: usize,
    rows: usize,
    parameters: Handle,
    uniforms: Handle,
    partial: Handle,
    histograms: Handle,
    found: Handle,
    tables: Option<Tables>,
}

/// A word per token and row: 77 MB for 32 rows of GPT-OSS.
struct Tables {
    counts: Handle,
    biases: Handle,
    scores: Handle,
}

/// The buffers of a step that the choice reads and writes; each for as many sequences as the step has.
pub(crate) struct OfStep<'a> {
    /// f32 `[sequences, vocabulary]`.
    pub logits: &'a Handle,
    /// u32 `[sequences]`.
    pub tokens: &'a Handle,
    /// u32 `[sequences]`.
    pub positions: &'a Handle,
    /// u32 `[sequences, 2]`.
    pub chosen: &'a Handle,
}

impl Choice {
    /// For batches of up to `rows` sequences.
    pub fn new(client: &Client, rows: usize, vocabulary: usize) -> Choice {
        let words = |count: usize| client.empty(count * size_of::<u32>());
        let most = Ways { changes: true, draws: true, top_k: true, top_p: true, min_p: true };
        Choice {
            parameters: words(rows * WORDS),
            uniforms: words(rows * RING),
            partial: words(sample::partial_len(vocabulary, rows)),
            histograms: words(sample::histograms_len(most, rows)),
            found: words(sample::found_len(most, rows)),
            tables: None,
            vocabulary,
            rows,
        }
    }

    /// Makes the buffers that a graph of these ways needs, before it is recorded. Those of other graphs stay where they are.
    pub fn reserve(&mut self, client: &Client, ways: Ways) {
        if ways.changes && self.tables.is_none() {
            let table = || client.empty(self.rows * self.vocabulary * size_of::<u32>());
            self.tables = Some(Tables { counts: table(), biases: table(), scores: table() });
        }
    }

    /// Gives a row to a sequence, for whose options there is room ([`Choice::reserve`]). `position` is that of the token which the
    /// next step reads; what follows it is drawn with the sampler's next random number.
    pub fn write_row(&self, client: &Client, row: u32, sampler: &Sampler, position: usize) {
        let options = sampler.options();
        let parameters = self.parameters_of(options, row);
        self.write_uniforms(client, row, options, sampler.generated(), position);
        let Some(tables) = &self.tables else { return };
        if parameters.counted {
            let mut counts = vec![0u32; self.vocabulary];
            for (token, generated, in_prompt) in sampler.counts() {
                if let Some(count) = counts.get_mut(token as usize) {
                    *count = generated | if in_prompt { PROMPT } else { 0 };
                }
            }
            write(client, &tables.counts, row, counts);
        }
        if parameters.biased {
            let mut biases = vec![0f32; self.vocabulary];
            for (&token, bias) in &options.logit_bias {
                if let Some(place) = biases.get_mut(token as usize) {
                    *place = bias.max(NEVER);
                }
            }
            write(client, &tables.biases, row, biases);
        }
    }

    /// The random numbers of the next [`RING`] tokens of a sequence that has `generated` tokens, the last of them, which the next
    /// step reads, at `position`.
    pub fn write_uniforms(
        &self,
        client: &Client,
        row: u32,
        options: &Options,
        generated: usize,
        position: usize,
    ) {
        if !options.is_greedy() {
            let mut numbers = vec![0f32; RING];
            for next in 0..RING {
                numbers[(position + next) % RING] = uniform(options.seed, (generated + next) as u64);
            }
            write(client, &self.uniforms, row, numbers);
        }
    }

    /// What the options of a sequence with a row mean here.
    pub fn parameters_of(&self, options: &Options, row: u32) -> Parameters {
        Parameters::new(options, self.vocabulary, row)
    }

    /// The sequences of the next steps, in their order.
    pub fn write_parameters(&self, client: &Client, sequences: &[Parameters]) {
        let words: Vec<u32> = sequences.iter().flat_map(Parameters::to_words).collect();
        write(client, &self.parameters, 0, words);
    }

    /// The kernels of the choice for the first `sequences` of the parameters. Each run changes the counts of those that are counted;
    /// a run that only warms up is one with [`Parameters::GREEDY`].
    pub fn enqueue(&self, client: &Client, ways: Ways, sequences: usize, step: &OfStep<'_>) {
        // Without tables there is a graph that changes nothing, and does not read them.
        let [counts, biases, scores] = match &self.tables {
            Some(tables) => [&tables.counts, &tables.biases, &tables.scores],
            None => [step.logits; 3],
        };
        let buffers = sample::Buffers {
            logits: step.logits,
            parameters: &self.parameters,
            uniforms: &self.uniforms,
            counts,
            biases,
            scores,
            partial: &self.partial,
            histograms: &self.histograms,
            found: &self.found,
            tokens: step.tokens,
            positions: step.positions,
            chosen: step.chosen,
            rows: self.rows,
        };
        let ways = Ways { changes: ways.changes && self.tables.is_some(), ..ways };
        sample::launch(client, ways, self.vocabulary, sequences, &buffers);
    }

    /// u32 `[vocabulary]`: the counts of a row, where any sequence has some.
    pub fn counts(&self, row: u32) -> Option<Handle> {
        self.tables.as_ref().map(|tables| part(&tables.counts, row, self.vocabulary))
    }
}

/// Writes a row of as many words.
fn write<T: bytemuck::NoUninit + Send + Sync>(client: &Client, table: &Handle, row: u32, words: Vec<T>) {
    client.write(&part(table, row, words.len()), Bytes::from_elems(words));
}

/// A row of `words` words.
fn part(table: &Handle, row: u32, words: usize) -> Handle {
    let bytes = (words * size_of::<u32>()) as u64;
    let start = u64::from(row) * bytes;
    table.clone().offset_start(start).offset_end(table.size_in_used() - start - bytes)
}
