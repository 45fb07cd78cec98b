//! Sequences in pieces, batches, going back and forking give what one pass over the whole sequence gives.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::devices::devices;
use crate::gpu::Tolerance;
use engine::Error;
use engine::backend::{Backend, Device, Float};
use engine::gpt_oss::model::read;
use engine::gpt_oss::{LoadOptions, Model, Sequence, Session};
use engine::kernels::method::Method;
use formats::model_bin::{Stored, StoredOptions};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gpt-oss/checkpoints").join(name)
}

fn load(name: &str, options: &LoadOptions, device: &Device) -> Model {
    let stored = Stored::open(&fixture(name), &StoredOptions::default(), &()).unwrap();
    Model::load(&stored, options, device, &()).unwrap()
}

fn f32_caches() -> LoadOptions {
    LoadOptions { activations: Some(Float::F32), cache: Some(Float::F32), ..LoadOptions::default() }
}

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + i * 31 + seed * 101) % 256).collect()
}

/// All logits in one pass, `[positions][vocabulary]`.
fn whole(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = model.new_cache();
    let x = model.forward(&mut [Sequence { cache: &mut cache, tokens }], None).unwrap();
    let vocabulary = model.config().vocabulary;
    read(model.unembed(x).unwrap()).unwrap().chunks(vocabulary).map(<[f32]>::to_vec).collect()
}

/// A way of computing a model.
struct Way {
    device: Device,
    options: LoadOptions,
    /// Tokens that a prefill processes at a time.
    chunk: usize,
    /// The tolerance of results against each other.
    tolerance: f32,
    /// Whether the router may choose another expert than it does in one pass, for what it sees is rounded to bf16 in one of the two.
    /// Such a choice changes logits by far more than the tolerance, for as long as the token is seen; so half of the results must be
    /// within it, and all must be alike.
    chooses: bool,
    errors: RefCell<Vec<f32>>,
}

impl Drop for Way {
    fn drop(&mut self) {
        let mut errors = self.errors.take();
        errors.sort_by(f32::total_cmp);
        if let Some(&median) = errors.get(errors.len() / 2)
            && !std::thread::panicking()
        {
            assert!(median <= self.tolerance, "half of these are above {:e}: {errors:?}", self.tolerance);
        }
    }
}

/// Plain tensors on every device; the processor's own runtime, whose decoding takes inputs of experts as 16-bit numbers; and
/// that of GPUs, whose caches are f16.
fn ways() -> Vec<Way> {
    let plain = |device| Way::new(device, f32_caches(), 512, 2e-5);
    let f32_cache = LoadOptions { cache: Some(Float::F32), ..LoadOptions::default() };
    let native = Way::new(Backend::Cpu.open().unwrap(), f32_cache, 256, 1e-4);
    let gpus = devices().into_iter().filter(|device| device.backend() != Backend::Cpu);
    let gpu = |device: Device| {
        let client = device.client().unwrap();
        let tolerance = Tolerance::of_rows(&client).of_largest as f32;
        let mut way = Way::new(device, LoadOptions::default(), 2048, tolerance);
        way.chooses = Method::of(&client) == Method::TensorCores;
        way
    };
    devices().into_iter().map(plain).chain([native]).chain(gpus.map(gpu)).collect()
}

impl Way {
    fn load(&self, name: &str) -> Model {
        load(name, &self.options, &self.device)
    }

    fn new(device: Device, options: LoadOptions, chunk: usize, tolerance: f32) -> Way {
        Way { device, options, chunk, tolerance, chooses: false, errors: RefCell::default() }
    }

    #[track_caller]
    fn assert_close(&self, found: &[f32], truth: &[f32], what: &str) {
        assert_eq!(found.len(), truth.len());
        assert!(found.iter().all(|value| value.is_finite()));
        let largest = truth.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let error = found.iter().zip(truth).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
        let tolerance = if self.chooses { 0.5 } else { self.tolerance };
        assert!(error <= tolerance, "{what}: {error:e} of the largest on {}", self.device.backend());
        self.errors.borrow_mut().push(error);
    }
}

#[test]
fn chunks_and_single_tokens_equal_one_pass() {
    for way in ways() {
        for name in ["two-blocks", "three-blocks"] {
            let model = way.load(name);
            let tokens = tokens(70, 1);
            let truth = whole(&model, &tokens);
            // Pieces shorter and longer than the window of 16 or 8, and ones that wrap the ring twice.
            for pieces in [vec![1; 70], vec![1, 15, 1, 16, 17, 20], vec![3, 67], vec![40, 1, 1, 28]] {
                let mut session = Session::new(&model);
                for piece in pieces {
                    let start = session.tokens().len();
                    let logits = session.advance(&tokens[start..start + piece]).unwrap();
                    let end = session.tokens().len();
                    way.assert_close(&read(logits).unwrap(), &truth[end - 1], &format!("{name} after {end}"));
                }
            }
        }
    }
}

#[test]
fn a_batch_of_sequences_of_different_length_equals_each_alone() {
    for way in ways() {
        let model = way.load("two-blocks");
        let sequences = [tokens(33, 2), tokens(1, 3), tokens(20, 4)];
        let mut caches: Vec<_> = sequences.iter().map(|_| model.new_cache()).collect();
        // A first pass over most of each, a second over the rest, in one batch each time.
        for part in 0..2 {
            let cut = |tokens: &[u32]| tokens.len() * 2 / 3;
            let parts: Vec<&[u32]> = sequences
                .iter()
                .map(|tokens| if part == 0 { &tokens[..cut(tokens)] } else { &tokens[cut(tokens)..] })
                .collect();
            let mut batch: Vec<Sequence<'_>> = caches
                .iter_mut()
                .zip(&parts)
                .filter(|(_, tokens)| !tokens.is_empty())
                .map(|(cache, tokens)| Sequence { cache, tokens })
                .collect();
            let x = model.forward(&mut batch, None).unwrap();
            let logits = read(model.unembed(x).unwrap()).unwrap();
            let mut rows = logits.chunks(model.config().vocabulary);
            for (tokens, new) in sequences.iter().zip(&parts) {
                let truth = whole(&model, tokens);
                let start = if part == 0 { 0 } else { cut(tokens) };
                for truth in &truth[start..start + new.len()] {
                    way.assert_close(rows.next().unwrap(), truth, "a row of the batch");
                }
            }
            assert!(rows.next().is_none());
        }
    }
}

#[test]
fn going_back_to_a_snapshot_is_free_and_elsewhere_recomputes() {
    for way in ways() {
        let model = way.load("two-blocks");
        let first = tokens(50, 5);
        let mut session = Session::new(&model);
        session.advance(&first[..30]).unwrap();
        session.snapshot();
        session.advance(&first[30..]).unwrap();
        assert_eq!(session.snapshots().collect::<Vec<_>>(), [0, 30]);

        // A turn whose analysis is dropped: the common prefix ends at the snapshot.
        let mut second = first[..30].to_vec();
        second.extend(tokens(25, 6));
        assert_ne!(first[30], second[30]);
        let mut fork = session.fork();
        let mut again = session.fork();
        let advance = session.advance_to(&second).unwrap();
        assert_eq!((advance.reused, advance.recomputed, advance.prefilled), (30, 0, 25));
        way.assert_close(&read(advance.logits).unwrap(), &whole(&model, &second)[54], "after the snapshot");

        // Elsewhere: back to the snapshot, and on from there.
        let rollback = fork.rollback(41).unwrap();
        assert_eq!((rollback.len, rollback.recomputed), (41, 11));
        let logits = fork.advance(&first[41..45]).unwrap();
        way.assert_close(&read(logits).unwrap(), &whole(&model, &first)[44], "after a rollback");
        assert_eq!(fork.tokens(), &first[..45]);

        // Before the snapshot: from the start.
        let rollback = fork.rollback(7).unwrap();
        assert_eq!((rollback.len, rollback.recomputed), (7, 7));
        let advance = fork.advance_to(&first[..7]).unwrap();
        assert_eq!((advance.reused, advance.recomputed, advance.prefilled), (7, 0, 0));
        way.assert_close(&read(advance.logits).unwrap(), &whole(&model, &first)[6], "the same again");
        assert!(matches!(fork.rollback(8), Err(Error::Rollback { length: 8, tokens: 7 })));

        // Back to where the session itself was marked: its logits are there, too.
        let truth = whole(&model, &first);
        let advance = again.advance_to(&first[..30]).unwrap();
        assert_eq!((advance.reused, advance.recomputed, advance.prefilled), (30, 0, 0));
        way.assert_close(&read(advance.logits).unwrap(), &truth[29], "a snapshot's logits");
        assert_eq!(again.tokens(), &first[..30]);

        // What the fork did has not touched the session.
        let logits = session.advance(&[9]).unwrap();
        second.push(9);
        way.assert_close(&read(logits).unwrap(), &whole(&model, &second)[55], "the session beside its fork");
    }
}

#[test]
fn forks_share_the_past_and_go_their_own_ways() {
    for way in ways() {
        let model = way.load("four-blocks");
        let past = tokens(40, 7);
        let mut session = Session::new(&model);
        session.advance(&past).unwrap();
        let mut forks: Vec<_> = (0..3).map(|_| session.fork()).collect();
        // Interleaved, so that one that wrote into another's buffers would be seen.
        for step in 0..20 {
            for (index, fork) in forks.iter_mut().enumerate() {
                let logits = fork.advance(&[(step * 7 + index as u32 * 50) % 256]).unwrap();
                let truth = whole(&model, fork.tokens());
                way.assert_close(&read(logits).unwrap(), truth.last().unwrap(), "a fork");
            }
        }
    }
}

#[test]
fn a_session_states_its_limits() {
    for way in ways() {
        let options = LoadOptions { context: Some(20), ..way.options.clone() };
        let model = load("two-blocks", &options, &way.device);
        let mut session = Session::new(&model);
        assert!(matches!(session.advance(&[]), Err(engine::Error::Length { length: 0, .. })));
        assert!(matches!(
            session.advance(&tokens(21, 8)),
            Err(engine::Error::Length { length: 21, context: 20 })
        ));
        let outside = model.config().vocabulary as u32;
        assert!(matches!(session.advance(&[1, outside]), Err(engine::Error::Token { position: 1, .. })));
        assert!(session.tokens().is_empty());
        session.advance(&tokens(20, 8)).unwrap();
        assert_eq!(session.room(), 0);
        assert!(session.advance(&[1]).is_err());
        assert!(matches!(model.forward(&mut [], None), Err(Error::Length { length: 0, .. })));
        assert!(session.advance_to(&tokens(20, 8)).is_ok());
    }
}

#[test]
fn a_prefill_that_is_ended_goes_on_where_it_was() {
    for way in ways() {
        let model = way.load("two-blocks");
        let end = way.chunk.max(1024);
        let tokens = tokens(end + 76, 3);
        let truth = read(model.prefill(&mut model.new_cache(), &tokens).unwrap()).unwrap();
        let mut session = Session::new(&model);
        let mut seen = Vec::new();
        let ended = session.advance_to_watched(&tokens, &mut |done| {
            seen.push(done);
            if done < end { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        assert!(ended.unwrap().is_none());
        let chunks: Vec<usize> = (0..=end).step_by(way.chunk).collect();
        assert_eq!((seen, session.tokens()), (chunks, &tokens[..end]));
        // What was ended has no logits; the last token is computed again, from the only snapshot that there is.
        let advance = session.fork().advance_to(&tokens[..end]).unwrap();
        assert_eq!((advance.reused, advance.recomputed, advance.prefilled), (0, end - 1, 1));
        let advance = session.advance_to(&tokens).unwrap();
        assert_eq!((advance.reused, advance.recomputed, advance.prefilled), (end, 0, 76));
        way.assert_close(&read(advance.logits).unwrap(), &truth, "in two goes");
    }
}

#[test]
fn old_snapshots_can_be_dropped() {
    for way in ways() {
        let model = way.load("two-blocks");
        let tokens = tokens(60, 4);
        let mut session = Session::new(&model);
        for piece in tokens.chunks(10) {
            session.advance(piece).unwrap();
            session.snapshot();
        }
        session.keep_snapshots(2);
        assert_eq!(session.snapshots().collect::<Vec<_>>(), [0, 50, 60]);
        assert_eq!(session.fork().rollback(55).unwrap().recomputed, 5);
        assert_eq!(session.rollback(30).unwrap().recomputed, 30);
        session.keep_snapshots(0);
        assert_eq!(session.snapshots().collect::<Vec<_>>(), [0]);
    }
}

#[test]
fn half_precision_caches_stay_close() {
    for way in ways().into_iter().filter(|way| way.options.cache == Some(Float::F32)) {
        let device = &way.device;
        let model = way.load("two-blocks");
        let tokens = tokens(48, 9);
        let truth = whole(&model, &tokens);
        let types = [(Float::F16, 3e-3f32), (Float::Bf16, 3e-2)];
        for (cache, tolerance) in types.into_iter().filter(|(float, _)| device.supports(*float)) {
            let options = LoadOptions { cache: Some(cache), ..way.options.clone() };
            let model = load("two-blocks", &options, device);
            let mut session = Session::new(&model);
            session.advance(&tokens[..20]).unwrap();
            let logits = read(session.advance(&tokens[20..]).unwrap()).unwrap();
            let largest = truth[47].iter().fold(0.0f32, |max, value| max.max(value.abs()));
            let worst = logits.iter().zip(&truth[47]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance * largest, "{cache}: {worst:e} of {largest}");
            assert!(worst > 0.0, "{cache} must round somewhere");
        }
    }
}
