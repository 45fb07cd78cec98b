//! The runtime of GPUs against traces of the genuine module (fixtures/gpt-oss) and against itself.

use std::borrow::Cow;
use std::ops::ControlFlow;

use engine::backend::{Backend, Device};
use engine::gpt_oss::model::read;
use engine::gpt_oss::{Config, LoadOptions, Sequence, Trace};
use engine::gpu::{Cache, Model, Stream};
use engine::kernels::method::Method;
use engine::sampling::{Options, Sampler};
use engine::{Error, synthetic};
use formats::model_bin::header::ModelHeader;
use formats::model_bin::{Stored, StoredOptions};

use crate::devices::devices;
use crate::trace::{CASES, Reference, fixture, l2_error, largest_error};

/// A GPU, in software where there is none; with CI=true it must be there.
fn clients() -> Vec<cubecl::client::Client> {
    let devices = [Backend::Wgpu, Backend::Cuda].map(Backend::open);
    let found: Vec<_> = devices.into_iter().flatten().filter_map(|device| device.client()).collect();
    assert!(!found.is_empty() || std::env::var_os("CI").is_none(), "no device");
    found
}

fn load(name: &str, client: &cubecl::client::Client) -> Model {
    load_for(name, 4096, client)
}

fn load_for(name: &str, context: usize, client: &cubecl::client::Client) -> Model {
    let stored = Stored::open(&fixture(name), &StoredOptions::default(), &()).unwrap();
    let config = Config::new(stored.header(), stored.dims()).unwrap();
    let context = config.context_length.min(context);
    Model::load(&stored, &config, context, client.clone(), &()).unwrap()
}

/// Errors that the types of a runtime allow.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Relative L2, as a part of that of the genuine module in bf16.
    of_genuine: f64,
    /// Relative to the largest logit: four roundings.
    pub of_largest: f64,
}

impl Tolerance {
    /// Keys and values are f16, everything else is f32.
    const F16_CACHES: Tolerance = Tolerance { of_genuine: 0.2, of_largest: 4.0 / (1 << 11) as f64 };

    /// Prefills and steps with tiles: rows enter products as f32, f16 or, for NVIDIA's tensor cores, bf16.
    pub fn of_rows(client: &cubecl::client::Client) -> Tolerance {
        match Method::of(client) {
            Method::TensorCores => Tolerance { of_genuine: 1.0, of_largest: 4.0 / (1 << 8) as f64 },
            Method::Fragments | Method::Units => Tolerance::F16_CACHES,
        }
    }

    #[track_caller]
    fn assert_close(self, name: &str, what: &str, found: &[f32], truth: &[f64]) {
        let genuine = *Reference::open(name).values("bf16.errors").last().unwrap();
        let error = l2_error(found, truth);
        assert!(error <= self.of_genuine * genuine, "{name}, {what}: {error:e}, genuine {genuine:e}");
        let largest = largest_error(found, truth);
        assert!(largest <= self.of_largest, "{name}, {what}: {largest:e}");
    }
}

#[test]
fn steps_and_prefills_agree_with_the_genuine_module() {
    for client in clients() {
        let of_rows = Tolerance::of_rows(&client);
        for name in CASES {
            let model = load(name, &client);
            let reference = Reference::open(name);
            let (tokens, truth) = (reference.tokens(), reference.values("logits"));
            let rows: Vec<&[f64]> = truth.chunks(truth.len() / tokens.len()).collect();
            let token_by_token = |model: &Model| -> Vec<f32> {
                let mut cache = model.new_cache();
                let step = |&token| model.step(&mut [(&mut cache, token)]).unwrap();
                tokens.iter().flat_map(step).collect()
            };
            Tolerance::F16_CACHES.assert_close(name, "token by token", &token_by_token(&model), &truth);
            let model = model.tiled_from(1);
            of_rows.assert_close(name, "token by token, with tiles", &token_by_token(&model), &truth);
            for chunk in [tokens.len(), 7] {
                let mut cache = model.new_cache();
                for (index, part) in tokens.chunks(chunk).enumerate() {
                    let logits = model.prefill(&mut cache, part).unwrap();
                    let last = (index * chunk + part.len()).min(tokens.len()) - 1;
                    of_rows.assert_close(
                        name,
                        &format!("chunks of {chunk}, token {last}"),
                        &logits,
                        rows[last],
                    );
                }
                assert_eq!(cache.len(), tokens.len());
            }
        }
    }
}

/// More sequences and longer ones than the first pages hold; snapshots that go their own ways. With tiles and without.
#[test]
fn sequences_share_pages_and_do_not_disturb_each_other() {
    for client in clients() {
        for tiled_from in [usize::MAX, 1] {
            sequences_share_pages(load("long", &client).tiled_from(tiled_from), Tolerance::of_rows(&client));
        }
    }
}

fn sequences_share_pages(model: Model, tolerance: Tolerance) {
    let tokens = |seed: u32, count: u32| -> Vec<u32> {
        (0..count).map(|i| (i * i * 7 + i * 31 + seed * 101) % 256).collect()
    };
    let alone = |tokens: &[u32]| model.prefill(&mut model.new_cache(), tokens).unwrap();
    let mut caches: Vec<Cache> = (0..6).map(|_| model.new_cache()).collect();
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| tokens(seed, 90 + 20 * seed)).collect();
    for (cache, prompt) in caches.iter_mut().zip(&prompts) {
        model.prefill(cache, prompt).unwrap();
    }
    let snapshots = caches.clone();
    let mut texts = prompts.clone();
    for round in 0..3 {
        // The second and third rounds go on from the snapshots, other tokens each time.
        caches.clone_from_slice(&snapshots);
        texts.clone_from_slice(&prompts);
        for step in 0..40 {
            let next: Vec<u32> = (0..6).map(|index| (step * 13 + index * 29 + round * 7) % 256).collect();
            let mut batch: Vec<_> = caches.iter_mut().zip(next.iter().copied()).collect();
            let logits = model.step(&mut batch).unwrap();
            texts.iter_mut().zip(&next).for_each(|(text, token)| text.push(*token));
            if step % 13 == 0 {
                for (logits, text) in logits.chunks(model.config().vocabulary).zip(&texts) {
                    let truth: Vec<f64> = alone(text).into_iter().map(f64::from).collect();
                    let error = largest_error(logits, &truth);
                    let of_largest = tolerance.of_largest;
                    assert!(
                        error <= of_largest,
                        "round {round}, step {step}, {} tokens: {error:e}",
                        text.len()
                    );
                }
            }
        }
    }
}

#[test]
fn the_graph_chooses_the_largest_logit() {
    for client in clients() {
        for name in ["three-blocks", "four-blocks"] {
            let model = load(name, &client);
            let tokens = Reference::open(name).tokens();
            let mut cache = model.new_cache();
            model.prefill(&mut cache, &tokens[..8]).unwrap();
            let mut other = cache.clone();
            let mut last = tokens[8];
            let mut sampler = Sampler::new(Options::greedy()).unwrap();
            let mut stream = [Stream { cache: &mut cache, token: last, sampler: &mut sampler }];
            let mut chosen = Vec::new();
            model
                .decode(&mut stream, 150, &mut |drawn| {
                    chosen.push(drawn[0].token);
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!((chosen.len(), cache.len(), sampler.generated()), (150, 158, 150));
            for token in chosen {
                let logits = model.step(&mut [(&mut other, last)]).unwrap();
                let largest = logits.iter().copied().fold(f32::MIN, f32::max);
                // The first of equals.
                last = logits.iter().position(|&logit| logit == largest).unwrap() as u32;
                assert_eq!(token, last, "{name}");
            }
        }
    }
}

/// Sizes that kernels of ours may not be made for: an odd vocabulary, many queries of a key head, an odd number of experts, a window
/// beyond any position.
#[test]
fn unusual_sizes_are_computed_by_whoever_can() {
    let even = fixtures::vocabulary::small();
    let last = fixtures::vocabulary::tokens().pop().unwrap().len() + size_of::<u16>();
    let mut odd = even.clone();
    odd.records.truncate(odd.records.len() - last);
    odd.num_text_tokens -= 1;
    let header = ModelHeader {
        context_length: 256,
        num_blocks: 2,
        num_experts: 5,
        embedding_dim: 96,
        mlp_dim: 32,
        num_heads: 8,
        num_kv_heads: 4,
        ..ModelHeader::GPT_OSS_20B
    };
    let many_queries = ModelHeader { num_heads: 96, num_kv_heads: 1, ..header };
    let no_window = ModelHeader { attention_window: u32::MAX, ..header };
    let tokens: Vec<u32> = (0..70u32).map(|i| (i * i * 7 + i * 31) % 256).collect();
    let (last, prompt) = tokens.split_last().unwrap();
    for (header, vocabulary) in
        [(header, &odd), (header, &even), (many_queries, &even), (no_window, &even), (no_window, &odd)]
    {
        let stored = synthetic::with_vocabulary(header, Cow::Owned(vocabulary.clone())).unwrap();
        let logits = |device: &Device, options: &LoadOptions| {
            let model = engine::gpt_oss::Model::load(&stored, options, device, &()).unwrap();
            let mut cache = model.new_cache();
            let filled = read(model.prefill(&mut cache, prompt).unwrap()).unwrap();
            let stepped = read(model.step(&mut [(&mut cache, *last)]).unwrap()).unwrap();
            [filled, stepped]
        };
        let plain = LoadOptions { plain_tensors: true, ..LoadOptions::default() };
        let truth = logits(&Backend::Cpu.open().unwrap(), &plain);
        assert_eq!(truth[0].len() as u64, vocabulary.len());
        for device in devices() {
            let found = logits(&device, &LoadOptions::default());
            for (found, truth) in found.iter().zip(&truth) {
                let truth: Vec<f64> = truth.iter().map(|&logit| logit.into()).collect();
                let error = largest_error(found, &truth);
                let sizes = (vocabulary.len(), header.num_heads);
                assert!(error <= 2e-2, "{sizes:?} on {}: {error:e}", device.backend());
            }
        }
    }
}

#[test]
fn caches_of_another_model_are_refused() {
    for client in clients() {
        let [own, other] = [(); 2].map(|()| load_for("three-blocks", 64, &client));
        let mut cache = own.new_cache();
        own.prefill(&mut cache, &[1, 2, 3]).unwrap();
        assert!(matches!(other.step(&mut [(&mut cache, 4)]), Err(Error::Cache)));
        assert!(matches!(other.prefill(&mut cache, &[4, 5]), Err(Error::Cache)));
        assert!(own.step(&mut [(&mut cache, 4)]).is_ok());
        assert_eq!(cache.len(), 4);
    }
    let path = fixture("three-blocks");
    let stored = Stored::open(&path, &StoredOptions::default(), &()).unwrap();
    for device in devices().into_iter().filter(|device| device.backend() == Backend::Cpu) {
        let [own, other] = [64, 128].map(|context| {
            let options = LoadOptions { context: Some(context), ..LoadOptions::default() };
            engine::gpt_oss::Model::load(&stored, &options, &device, &()).unwrap()
        });
        let mut cache = own.new_cache();
        assert!(matches!(other.step(&mut [(&mut cache, 4)]), Err(Error::Cache)));
    }
}

/// Two sequences in a pass: everything is traced of both.
#[test]
fn a_trace_has_the_rows_of_all_sequences() {
    let stored = Stored::open(&fixture("three-blocks"), &StoredOptions::default(), &()).unwrap();
    for device in devices() {
        let model = engine::gpt_oss::Model::load(&stored, &LoadOptions::default(), &device, &()).unwrap();
        let mut caches = [model.new_cache(), model.new_cache()];
        let mut batch: Vec<_> = (caches.iter_mut().zip([&[1, 2, 3][..], &[4, 5]]))
            .map(|(cache, tokens)| Sequence { cache, tokens })
            .collect();
        let mut trace = Trace::default();
        let rows = model.forward(&mut batch, Some(&mut trace)).unwrap();
        for (name, tensor) in trace.into_named() {
            assert_eq!(tensor.dims(), rows.dims(), "{name} on {}", device.backend());
        }
    }
}

/// Asked for more tokens than there is room for, a decoding draws as many as there is room for, loses none, and says so.
#[test]
fn a_full_context_ends_a_decoding() {
    for client in clients() {
        let decode = |context: usize, most: usize| {
            let model = load_for("three-blocks", context, &client);
            let mut cache = model.new_cache();
            model.prefill(&mut cache, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
            let mut sampler = Sampler::new(Options::greedy()).unwrap();
            let mut stream = [Stream { cache: &mut cache, token: 9, sampler: &mut sampler }];
            let mut drawn = Vec::new();
            let decoded = model.decode(&mut stream, most, &mut |sampled| {
                drawn.push(sampled[0].token);
                ControlFlow::Continue(())
            });
            assert_eq!(Some(&stream[0].token), drawn.last());
            (decoded, drawn, cache.len())
        };
        let (decoded, drawn, len) = decode(12, 10);
        assert!(matches!(decoded, Err(Error::Length { length: 18, context: 12 })), "{decoded:?}");
        let (enough, truth, _) = decode(4096, 4);
        assert!(enough.is_ok());
        assert_eq!((drawn, len), (truth, 12));
    }
}

/// A decoding that was ended has made room for a token that nobody wanted: snapshots at every length around the ends of pages are
/// independent all the same.
#[test]
fn a_decoding_that_was_ended_leaves_independent_snapshots() {
    for client in clients() {
        let Tolerance { of_largest, .. } = Tolerance::of_rows(&client);
        let model = load("long", &client);
        let tokens: Vec<u32> = (0..62u32).map(|i| (i * i * 7 + i * 31) % 256).collect();
        let mut cache = model.new_cache();
        model.prefill(&mut cache, &tokens).unwrap();
        let mut text = tokens.clone();
        let mut token = 17;
        for _ in 0..4 {
            let mut sampler = Sampler::new(Options::greedy()).unwrap();
            let mut stream = [Stream { cache: &mut cache, token, sampler: &mut sampler }];
            model.decode(&mut stream, 100, &mut |_| ControlFlow::Break(())).unwrap();
            text.push(std::mem::replace(&mut token, stream[0].token));
            assert_eq!(cache.len(), text.len());
            let mut forks = [cache.clone(), cache.clone()];
            for (fork, next) in forks.iter_mut().zip([3, 200]) {
                model.step(&mut [(fork, next)]).unwrap();
            }
            for (fork, next) in forks.iter_mut().zip([3, 200]) {
                let logits = model.step(&mut [(fork, 5)]).unwrap();
                let alone = [&text[..], &[next, 5]].concat();
                let truth = model.prefill(&mut model.new_cache(), &alone).unwrap();
                let truth: Vec<f64> = truth.into_iter().map(f64::from).collect();
                let error = largest_error(&logits, &truth);
                assert!(error <= of_largest, "{} tokens and {next}: {error:e}", text.len());
            }
        }
    }
}
