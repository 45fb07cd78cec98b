//! The generation loop: what ends it, what it reports, what repeats.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::devices::devices;
use burn::tensor::Tensor;
use engine::backend::{Device, Float, waiting};
use engine::gpt_oss::model::read;
use engine::gpt_oss::{LoadOptions, Model, Outcome, Request, Session, Stop, Stream, generate};
use engine::sampling::{Options, Sampler};
use formats::model_bin::{Stored, StoredOptions};

fn load(options: LoadOptions, device: &Device) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gpt-oss/checkpoints/two-blocks");
    let stored = Stored::open(&path, &StoredOptions::default(), &()).unwrap();
    Model::load(&stored, &options, device, &()).unwrap()
}

const PROMPT: [u32; 5] = [17, 250, 3, 99, 42];

fn run(model: &Model, request: &Request) -> Outcome {
    let mut session = Session::new(model);
    let logits = session.advance(&PROMPT).unwrap();
    generate(&mut session, logits, request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn request(sampling: Options, max_tokens: usize) -> Request {
    Request { sampling, max_tokens, stop: vec![] }
}

/// The largest logit at each step, each time from the whole sequence.
fn greedy_by_hand(model: &Model, count: usize) -> Vec<u32> {
    let mut tokens = PROMPT.to_vec();
    for _ in 0..count {
        let mut cache = model.new_cache();
        let logits = read(model.prefill(&mut cache, &tokens).unwrap()).unwrap();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(PROMPT.len())
}

#[test]
fn greedy_text_is_that_of_the_largest_logits_on_every_device() {
    let mut texts = Vec::new();
    for device in devices() {
        let options =
            LoadOptions { activations: Some(Float::F32), cache: Some(Float::F32), ..LoadOptions::default() };
        let model = load(options, &device);
        let text = run(&model, &request(Options::greedy(), 40)).tokens;
        assert_eq!(text, greedy_by_hand(&model, 40));
        texts.push(text);
    }
    assert!(texts.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_seed_repeats_and_another_does_not() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let with_seed = |seed| {
            let options = Options { seed, temperature: 1.5, ..Options::default() };
            run(&model, &request(options, 30)).tokens
        };
        let first = with_seed(1);
        assert_eq!(first, with_seed(1));
        assert_ne!(first, with_seed(2));
    }
}

#[test]
fn a_stop_token_ends_the_text_and_is_part_of_it() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let text = run(&model, &request(Options::greedy(), 20)).tokens;
        let stop = text[7];
        let first = text.iter().position(|&token| token == stop).unwrap();
        let outcome = run(&model, &Request { stop: vec![stop], ..request(Options::greedy(), 20) });
        assert_eq!(outcome.tokens, text[..=first]);
        assert_eq!(outcome.stop, Stop::Token(stop));
    }
}

#[test]
fn the_callback_sees_every_token_at_once_and_can_cancel() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let whole = run(&model, &request(Options::greedy(), 20));
        assert_eq!(whole.stop, Stop::MaxTokens);
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        generate(&mut session, logits, &request(Options::greedy(), 20), &mut |_| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(session.tokens()[PROMPT.len()..], whole.tokens[..19]);
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        let mut seen = Vec::new();
        let outcome = generate(&mut session, logits, &request(Options::greedy(), 20), &mut |step| {
            assert_eq!(step.index, seen.len());
            seen.push(step.token);
            if seen.len() == 6 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert_eq!(outcome.stop, Stop::Cancelled);
        assert_eq!(seen, whole.tokens[..6]);
        assert_eq!(outcome.tokens, seen);
        // The last token is not in the session: nothing was computed for it.
        assert_eq!(session.tokens()[PROMPT.len()..], seen[..5]);
    }
}

#[test]
fn a_full_context_ends_the_text() {
    for device in devices() {
        let model = load(LoadOptions { context: Some(12), ..LoadOptions::default() }, &device);
        let outcome = run(&model, &request(Options::greedy(), 100));
        assert_eq!(outcome.stop, Stop::ContextFull);
        // Seven more fit; the eighth was chosen from the logits of the last one.
        assert_eq!(outcome.tokens.len(), 8);
    }
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    for device in devices() {
        let f32 = Some(Float::F32);
        let model = load(LoadOptions { activations: f32, cache: f32, ..LoadOptions::default() }, &device);
        let options = Options { temperature: 0.7, top_k: 20, top_logprobs: 3, seed: 5, ..Options::default() };
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        let mut steps = Vec::new();
        generate(&mut session, logits, &request(options, 8), &mut |step| {
            steps.push(step.clone());
            ControlFlow::Continue(())
        })
        .unwrap();
        let mut tokens = PROMPT.to_vec();
        for step in steps {
            let mut cache = model.new_cache();
            let logits = read(model.prefill(&mut cache, &tokens).unwrap()).unwrap();
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            let logprob = |token: u32| f64::from(logits[token as usize]) - sum.ln();
            assert!((f64::from(step.sampled.logprob) - logprob(step.token)).abs() < 1e-3);
            assert_eq!(step.sampled.top_logprobs.len(), 3);
            for &(token, found) in &step.sampled.top_logprobs {
                assert!((f64::from(found) - logprob(token)).abs() < 1e-3);
            }
            let best = step.sampled.top_logprobs[0].1;
            assert!(logits.iter().all(|&logit| f64::from(logit) - sum.ln() <= f64::from(best) + 1e-3));
            tokens.push(step.token);
        }
    }
}

#[test]
fn options_that_make_no_sense_are_errors() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        let options = Options { top_p: f32::NAN, ..Options::default() };
        let result = generate(&mut session, logits, &request(options, 1), &mut |_| ControlFlow::Continue(()));
        assert!(matches!(result, Err(engine::Error::SamplingOptions(_))));
    }
}

/// A callback that generates with another session, after each token.
#[test]
fn the_model_may_be_used_while_a_token_is_shown() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let whole = run(&model, &request(Options { seed: 3, ..Options::default() }, 20));
        let other = run(&model, &request(Options::greedy(), 5));
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        let options = Options { seed: 3, ..Options::default() };
        let outcome = generate(&mut session, logits, &request(options, 20), &mut |step| {
            if step.index % 7 == 2 {
                assert_eq!(run(&model, &request(Options::greedy(), 5)).tokens, other.tokens);
            }
            ControlFlow::Continue(())
        });
        assert_eq!(outcome.unwrap().tokens, whole.tokens, "{}", device.backend());
    }
}

#[test]
fn threads_share_a_model() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let text = |seed| run(&model, &request(Options { seed, ..Options::default() }, 20)).tokens;
        let alone = [1, 2, 3].map(text);
        let together = std::thread::scope(|scope| {
            [1, 2, 3].map(|seed| scope.spawn(move || text(seed))).map(|thread| thread.join().unwrap())
        });
        assert_eq!(together, alone, "{}", device.backend());
    }
}

/// What was drawn for one sequence counts only where all have drawn.
#[test]
fn a_sequence_without_tokens_to_draw_changes_no_sampler() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let nothing = (0..model.config().vocabulary as u32).map(|token| (token, f32::NEG_INFINITY)).collect();
        let banned = Options { logit_bias: nothing, ..Options::default() };
        let mut samplers = [Options::greedy(), banned].map(|options| Sampler::new(options).unwrap());
        let mut caches = [model.new_cache(), model.new_cache()];
        let mut streams: Vec<_> = (caches.iter_mut().zip(&mut samplers))
            .map(|(cache, sampler)| Stream { cache, token: 1, sampler })
            .collect();
        let decoded = model.decode(&mut streams, 3, &mut |_| panic!("nothing is to be shown"));
        assert!(matches!(decoded, Err(engine::Error::Sampling(_))), "{decoded:?}");
        assert!(streams.iter().all(|stream| stream.token == 1));
        assert_eq!(samplers.map(|sampler| sampler.generated()), [0, 0], "{}", device.backend());
    }
}

/// A prompt whose only token was drawn is there with its logits.
#[test]
fn drawing_a_single_token_keeps_the_prompt_ready() {
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let mut session = Session::new(&model);
        let logits = session.advance(&PROMPT).unwrap();
        generate(&mut session, logits, &request(Options::greedy(), 1), &mut |_| ControlFlow::Continue(()))
            .unwrap();
        let again = session.advance_to(&PROMPT).unwrap();
        assert_eq!((again.reused, again.recomputed, again.prefilled), (PROMPT.len(), 0, 0));
    }
}

/// Models record graphs while other threads read tensors of their own, load models, and wait for their tokens.
#[test]
fn models_of_several_threads_do_not_disturb_each_other() {
    for device in devices() {
        let text = |count: usize| {
            run(&load(LoadOptions::default(), &device), &request(Options::greedy(), count)).tokens
        };
        let truth = text(30);
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut sums = 0;
                while !is_done.load(Ordering::Relaxed) {
                    let sum = Tensor::<1>::ones([1000], device.burn()).sum();
                    let sum = waiting(|| sum.try_into_data().unwrap().try_to_vec::<f32>()).unwrap();
                    assert_eq!(sum, [1000.0]);
                    sums += 1;
                }
                sums
            });
            let writers =
                [30, 12, 30].map(|count| scope.spawn(move || (0..3).map(|_| text(count)).collect()));
            let texts: Vec<Vec<Vec<u32>>> = writers.map(|writer| writer.join().unwrap()).into();
            is_done.store(true, Ordering::Relaxed);
            assert!(reader.join().unwrap() > 0);
            for text in texts.into_iter().flatten() {
                assert_eq!(text, truth[..text.len()], "{}", device.backend());
            }
        });
    }
}

#[test]
fn sequences_that_are_decoded_together_write_what_each_writes_alone() {
    let prompts = [&PROMPT[..], &[1, 2], &[200, 100, 50, 25, 12, 6, 3]];
    for device in devices() {
        let model = load(LoadOptions::default(), &device);
        let decode = |prompts: &[&[u32]]| -> Vec<Vec<u32>> {
            let mut caches: Vec<_> = prompts.iter().map(|_| model.new_cache()).collect();
            let mut samplers = vec![Sampler::new(Options::greedy()).unwrap(); prompts.len()];
            let mut texts: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
            let mut streams = Vec::new();
            for ((cache, sampler), prompt) in caches.iter_mut().zip(&mut samplers).zip(prompts) {
                let (token, rest) = prompt.split_last().unwrap();
                model.prefill(cache, rest).unwrap();
                streams.push(Stream { cache, token: *token, sampler });
            }
            model
                .decode(&mut streams, 25, &mut |drawn| {
                    texts.iter_mut().zip(drawn).for_each(|(text, sampled)| text.push(sampled.token));
                    ControlFlow::Continue(())
                })
                .unwrap();
            for (stream, text) in streams.iter().zip(&texts) {
                assert_eq!((stream.token, stream.sampler.generated()), (text[24], 25));
            }
            texts
        };
        let alone: Vec<Vec<u32>> = prompts.iter().map(|prompt| decode(&[prompt]).remove(0)).collect();
        assert_eq!(decode(&prompts), alone, "{}", device.backend());
    }
}
