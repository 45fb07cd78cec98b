//! The processor's own runtime against traces of the genuine module (fixtures/gpt-oss), on every level of instructions.

use std::ops::ControlFlow;
use std::path::Path as FilePath;
use std::sync::Arc;

use crate::trace::{CASES, Reference, fixture, l2_error, largest_error};
use engine::backend::Float;
use engine::gpt_oss::Config;
use engine::native::{Level, Model, Options, Path, Sequence, Trace};
use formats::model_bin::{Stored, StoredOptions, write};

fn load(path: &FilePath, options: &Options) -> Model {
    let stored = Stored::open(path, &StoredOptions::default(), &()).unwrap();
    let config = Config::new(stored.header(), stored.dims()).unwrap();
    Model::new(Arc::new(stored), config, options).unwrap()
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_supported())
}

fn options(level: Level, threads: usize) -> Options {
    Options { level: Some(level), threads: Some(threads), cache: Some(Float::F32), ..Options::default() }
}

#[track_caller]
fn check(name: &str, what: &str, found: &[f32], truth: &[f64], tolerance: f64) {
    let error = largest_error(found, truth);
    assert!(error <= tolerance, "{name} {what}: {error:e}");
}

fn compare(name: &str, what: &str, trace: &Trace, logits: &[f32], tolerance: f64) {
    let reference = Reference::open(name);
    let truth = |tensor: &str| reference.values(tensor);
    check(name, what, &trace.embedding, &truth("embedding"), 0.0);
    for (block, (attention, output)) in trace.attention.iter().zip(&trace.blocks).enumerate() {
        check(
            name,
            &format!("{what} attn {block}"),
            attention,
            &truth(&format!("block.{block}.attn")),
            tolerance,
        );
        let mut rows: Vec<Vec<u32>> = trace.experts[block].chunks(4).map(<[u32]>::to_vec).collect();
        rows.iter_mut().for_each(|row| row.sort_unstable());
        let experts: Vec<f64> = rows.concat().into_iter().map(f64::from).collect();
        assert_eq!(experts, truth(&format!("block.{block}.experts")), "{name} {what} {block}");
        check(name, &format!("{what} mlp {block}"), output, &truth(&format!("block.{block}.mlp")), tolerance);
    }
    check(name, &format!("{what} norm"), &trace.norm, &truth("norm"), tolerance);
    check(name, &format!("{what} logits"), logits, &truth("logits"), tolerance);
}

fn join(parts: Vec<Trace>) -> Trace {
    let mut parts = parts.into_iter();
    let mut all = parts.next().unwrap();
    for part in parts {
        all.embedding.extend(part.embedding);
        all.norm.extend(part.norm);
        all.attention.iter_mut().zip(part.attention).for_each(|(all, part)| all.extend(part));
        all.blocks.iter_mut().zip(part.blocks).for_each(|(all, part)| all.extend(part));
        all.experts.iter_mut().zip(part.experts).for_each(|(all, part)| all.extend(part));
    }
    all
}

/// Chunks of so many tokens on a path.
fn run(model: &Model, tokens: &[u32], chunk: usize, path: Path) -> (Trace, Vec<f32>) {
    let mut cache = model.new_cache();
    let (mut traces, mut logits) = (Vec::new(), Vec::new());
    for tokens in tokens.chunks(chunk) {
        let mut trace = Trace::default();
        let x = model.forward(&mut [Sequence { cache: &mut cache, tokens }], path, Some(&mut trace)).unwrap();
        logits.extend(model.unembed(&x).unwrap());
        traces.push(trace);
    }
    assert_eq!(cache.len(), tokens.len());
    (join(traces), logits)
}

#[test]
fn every_layer_agrees_with_the_genuine_module() {
    for level in levels() {
        for threads in [1, 3] {
            for name in CASES {
                let model = load(&fixture(name), &options(level, threads));
                let tokens = Reference::open(name).tokens();
                for (path, chunk) in
                    [(Path::Prefill, 1000), (Path::Prefill, 7), (Path::Decode, 1), (Path::Decode, 5)]
                {
                    let (trace, logits) = run(&model, &tokens, chunk, path);
                    compare(name, &format!("{level} {threads} {path:?} {chunk}"), &trace, &logits, 1e-4);
                }
            }
        }
    }
}

#[test]
fn half_precision_caches_stay_below_the_error_of_the_genuine_bf16_module() {
    for name in CASES {
        for element in [Float::F16, Float::Bf16] {
            let model = load(&fixture(name), &Options { cache: Some(element), ..Options::default() });
            let reference = Reference::open(name);
            let (_, logits) = run(&model, &reference.tokens(), 1, Path::Decode);
            let truth = reference.values("logits");
            let error = l2_error(&logits, &truth);
            let genuine = *reference.values("bf16.errors").last().unwrap();
            assert!(error <= 1.2 * genuine, "{name} {element:?}: {error:e}, genuine {genuine:e}");
        }
    }
}

#[test]
fn batches_prefills_and_snapshots_give_the_logits_of_a_single_sequence() {
    let folder = tempfile::tempdir().unwrap();
    for name in CASES {
        let tokens = Reference::open(name).tokens();
        let source = Stored::open(&fixture(name), &StoredOptions::default(), &()).unwrap();
        let path = folder.path().join(name);
        write::write(source.source(), &path, &()).unwrap();
        let model = load(&path, &Options::default());
        let vocabulary = model.config().vocabulary;
        // One by one.
        let mut cache = model.new_cache();
        let single: Vec<Vec<f32>> =
            tokens.iter().map(|&token| model.decode(&mut [(&mut cache, token)]).unwrap()).collect();
        // Three sequences of different lengths at once.
        let mut caches = [0, 3, 9].map(|_| model.new_cache());
        for (cache, skip) in caches.iter_mut().zip([0, 3, 9]) {
            for &token in &tokens[..skip] {
                model.decode(&mut [(&mut *cache, token)]).unwrap();
            }
        }
        for step in 0..tokens.len() - 9 {
            let mut batch: Vec<_> =
                caches.iter_mut().zip([0, 3, 9]).map(|(cache, skip)| (cache, tokens[skip + step])).collect();
            let logits = model.decode(&mut batch).unwrap();
            for (logits, skip) in logits.chunks_exact(vocabulary).zip([0, 3, 9]) {
                assert!(logits == single[skip + step], "{name}, {skip} + {step}");
            }
        }
        // A prefill, and going back to a snapshot.
        let go = &mut |_| ControlFlow::Continue(());
        let mut cache = model.new_cache();
        model.prefill(&mut cache, &tokens[..10], go).unwrap();
        let snapshot = cache.clone();
        let mut last = Vec::new();
        for _ in 0..2 {
            cache = snapshot.clone();
            let logits = model.prefill(&mut cache, &tokens[10..], go).unwrap().unwrap();
            let truth: Vec<f64> = single[tokens.len() - 1].iter().map(|&v| v.into()).collect();
            check(name, "prefill", &logits, &truth, 1e-3);
            assert!(last.is_empty() || last == logits);
            last = logits;
        }
        assert!(model.prefill(&mut cache, &[vocabulary as u32], go).is_err());
        assert!(model.decode(&mut []).is_err());
        let mut seen = Vec::new();
        let mut cache = model.new_cache();
        let stopped = model.prefill(&mut cache, &tokens, &mut |len| {
            seen.push(len);
            ControlFlow::Break(())
        });
        assert!(stopped.unwrap().is_none() && seen == [0] && cache.is_empty());
    }
}
