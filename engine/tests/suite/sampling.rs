//! Sampling against an independent computation in f64, and the device against the processor.

use std::collections::BTreeMap;

use burn::tensor::{DType, Device, Tensor, TensorData};
use engine::backend::Backend;
use engine::sampling::{
    Distribution, Options, OptionsError, SampleError, Sampled, Sampler, sample_batch, uniform,
};

/// SplitMix64 (Steele, Lea, Flood 2014): numbers for the tests that owe nothing to the code under test.
struct Numbers(u64);

impl Numbers {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From [0, 1).
    fn fraction(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, end: usize) -> usize {
        (self.word() % end as u64) as usize
    }

    /// Standard normal (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.fraction()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.fraction()).cos()
    }

    fn logits(&mut self, vocabulary: usize, spread: f64) -> Vec<f32> {
        (0..vocabulary).map(|_| (spread * self.normal()) as f32).collect()
    }

    /// A number that the sampler itself could draw.
    fn draw(&mut self) -> f32 {
        (2 * (self.word() >> 41) + 1) as f32 / (1 << 24) as f32
    }
}

fn sampler(options: Options) -> Sampler {
    Sampler::new(options).unwrap()
}

fn with(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options::default();
    change(&mut options);
    options
}

/// The definition, straight from the documentation: f64, one sort, nothing shared with the crate.
fn reference(options: &Options, prompt: &[u32], generated: &[u32], logits: &[f32]) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
    for (token, score) in scores.iter_mut().enumerate() {
        let token = token as u32;
        *score += options.logit_bias.get(&token).map_or(0.0, |&bias| f64::from(bias));
        if prompt.contains(&token) || generated.contains(&token) {
            let penalty = f64::from(options.repetition_penalty);
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
        let count = generated.iter().filter(|&&other| other == token).count();
        if count > 0 {
            *score -=
                f64::from(options.frequency_penalty) * count as f64 + f64::from(options.presence_penalty);
        }
    }
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if options.temperature == 0.0 {
        let first = scores.iter().position(|&score| score == largest).unwrap();
        return (0..scores.len()).map(|token| f64::from(u8::from(token == first))).collect();
    }
    let weight = |score: f64| ((score - largest) / f64::from(options.temperature)).exp();
    let mut sorted = scores.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    if options.top_k > 0 && options.top_k < sorted.len() {
        let least = sorted[options.top_k - 1];
        sorted.retain(|&score| score >= least);
    }
    if options.top_p < 1.0 {
        let needed = f64::from(options.top_p) * sorted.iter().map(|&score| weight(score)).sum::<f64>();
        let mut sum = 0.0;
        let last = sorted.iter().copied().find(|&score| {
            sum += weight(score);
            sum >= needed
        });
        sorted.retain(|&score| score >= last.unwrap());
    }
    sorted.retain(|&score| weight(score) >= f64::from(options.min_p));
    let least = *sorted.last().unwrap();
    let kept: Vec<f64> =
        scores.iter().map(|&score| if score >= least { weight(score) } else { 0.0 }).collect();
    let total: f64 = kept.iter().sum();
    kept.into_iter().map(|weight| weight / total).collect()
}

/// Options that exercise every filter and penalty, alone and together.
fn combinations(vocabulary: usize) -> Vec<(&'static str, Options)> {
    let last = vocabulary as u32 - 1;
    let bias: BTreeMap<u32, f32> = [(0, 2.5), (last / 2, -1.5), (last, f32::NEG_INFINITY)].into();
    let bias = if vocabulary < 4 { BTreeMap::new() } else { bias };
    vec![
        ("default", Options::default()),
        ("greedy", Options::greedy()),
        ("cold", with(|o| o.temperature = 0.3)),
        ("hot", with(|o| o.temperature = 3.0)),
        ("top-k 1", with(|o| o.top_k = 1)),
        ("top-k", with(|o| o.top_k = 5)),
        ("top-k all", with(|o| o.top_k = vocabulary + 3)),
        ("top-p", with(|o| o.top_p = 0.9)),
        ("top-p tiny", with(|o| o.top_p = 1e-9)),
        ("top-p almost 1", with(|o| o.top_p = 0.999)),
        ("min-p", with(|o| o.min_p = 0.05)),
        ("min-p 1", with(|o| o.min_p = 1.0)),
        ("bias", with(|o| o.logit_bias = bias.clone())),
        ("repetition", with(|o| o.repetition_penalty = 1.3)),
        ("repetition wanted", with(|o| o.repetition_penalty = 0.7)),
        ("frequency", with(|o| o.frequency_penalty = 0.6)),
        ("presence", with(|o| o.presence_penalty = -0.8)),
        (
            "all",
            Options {
                temperature: 0.8,
                top_k: 40,
                top_p: 0.95,
                min_p: 0.02,
                repetition_penalty: 1.1,
                frequency_penalty: 0.2,
                presence_penalty: 0.1,
                logit_bias: bias,
                seed: 11,
                top_logprobs: 3,
            },
        ),
    ]
}

#[test]
fn options_outside_their_ranges_are_refused_by_name() {
    use OptionsError::*;
    assert_eq!(Options::default().validate(), Ok(()));
    assert_eq!(Options::greedy().validate(), Ok(()));
    type Case = (fn(&mut Options, f32), fn(f32) -> OptionsError, &'static [f32], &'static [f32]);
    let cases: [Case; 7] = [
        (|o, x| o.temperature = x, Temperature, &[-1.0, 1e-7, 1e7, -0.1], &[0.0, -0.0, 1e-6, 1e6]),
        (|o, x| o.top_p = x, TopP, &[0.0, -0.5, 1.1], &[1e-20, 1.0]),
        (|o, x| o.min_p = x, MinP, &[-0.1, 1.5], &[0.0, 1.0]),
        (|o, x| o.repetition_penalty = x, RepetitionPenalty, &[0.0, -1.0, 1e7], &[0.5, 2.0]),
        (|o, x| o.frequency_penalty = x, FrequencyPenalty, &[1e7, -1e7], &[-2.0, 2.0]),
        (|o, x| o.presence_penalty = x, PresencePenalty, &[1e7, -1e7], &[-2.0, 2.0]),
        (
            |o, x| o.logit_bias = [(7, x)].into(),
            |found| LogitBias { token: 7, found },
            &[1e7, -1e7],
            &[f32::NEG_INFINITY, -100.0, 100.0],
        ),
    ];
    for (set, error, bad, good) in cases {
        for &value in bad.iter().chain(&[f32::INFINITY]) {
            assert_eq!(with(|o| set(o, value)).validate(), Err(error(value)));
            assert_eq!(Sampler::new(with(|o| set(o, value))).err(), Some(error(value)));
        }
        let nan = with(|o| set(o, f32::NAN)).validate().unwrap_err();
        assert_eq!(std::mem::discriminant(&nan), std::mem::discriminant(&error(0.0)), "{nan}");
        assert!(nan.to_string().contains("NaN"), "{nan}");
        for &value in good {
            assert_eq!(with(|o| set(o, value)).validate(), Ok(()));
        }
    }
}

#[test]
fn options_survive_json() {
    let options = Options {
        logit_bias: [(3, f32::NEG_INFINITY), (9, 0.25)].into(),
        seed: u64::MAX,
        top_k: 7,
        ..Options::greedy()
    };
    let json = serde_json::to_string(&options).unwrap();
    assert_eq!(serde_json::from_str::<Options>(&json).unwrap(), options);
    assert_eq!(serde_json::from_str::<Options>("{}").unwrap(), Options::default());
    let partial: Options = serde_json::from_str(r#"{"top_p": 0.5, "logit_bias": {"4": null}}"#).unwrap();
    assert_eq!((partial.top_p, partial.logit_bias), (0.5, [(4, f32::NEG_INFINITY)].into()));
    assert!(serde_json::from_str::<Options>(r#"{"topp": 0.5}"#).is_err());
}

/// draft-strombergson-chacha-test-vectors-01, TC1: 256-bit key of zeros, IV of zeros, 8 rounds, block 0.
#[test]
fn the_random_stream_is_chacha8() {
    let keystream = [
        0x3e, 0x00, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6, 0x7f, 0x5b, 0xb8, 0xe8, 0x1f, 0x09, 0xa5, 0xa1, 0x2c,
        0x84, 0x0e, 0xc3, 0xce, 0x9a, 0x7f, 0x3b, 0x18, 0x1b, 0xe1, 0x88, 0xef, 0x71, 0x1a, 0x1e,
    ];
    for (n, word) in keystream.chunks_exact(4).enumerate() {
        let word = u32::from_le_bytes(word.try_into().unwrap());
        let expected = (f64::from(word / 512) + 0.5) / 8_388_608.0;
        assert_eq!(f64::from(uniform(0, n as u64)), expected);
    }
    let numbers: Vec<f32> = (0..10_000).map(|n| uniform(1, n)).collect();
    assert!(numbers.iter().all(|&u| u > 0.0 && u < 1.0));
    let mean = numbers.iter().map(|&u| f64::from(u)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 5.0 * (1.0f64 / 12.0 / 10_000.0).sqrt(), "{mean}");
    assert_ne!(uniform(1, 0), uniform(2, 0));
    assert_ne!(uniform(1, 1 << 40), uniform(1, 0));
}

#[test]
fn the_distribution_is_that_of_the_definition() {
    let mut numbers = Numbers(1);
    for vocabulary in [1, 2, 5, 50, 1000] {
        for spread in [0.01, 1.0, 6.0] {
            let logits = numbers.logits(vocabulary, spread);
            let prompt: Vec<u32> = (0..30).map(|_| numbers.below(vocabulary) as u32).collect();
            let generated: Vec<u32> = (0..20).map(|_| numbers.below(vocabulary.div_ceil(2)) as u32).collect();
            for (name, options) in combinations(vocabulary) {
                let expected = reference(&options, &prompt, &generated, &logits);
                let mut sampler = sampler(options);
                sampler.extend_prompt(&prompt);
                generated.iter().for_each(|&token| sampler.accept(token));
                let found: Vec<f64> = sampler.distribution(&logits).unwrap().probabilities().collect();
                for (token, (&found, &expected)) in found.iter().zip(&expected).enumerate() {
                    // Scores are f32: their rounding grows with their distance from the largest.
                    let close = match expected {
                        0.0 => found == 0.0,
                        _ => (found / expected - 1.0).abs() <= 1e-6 * (1.0 - expected.ln()),
                    };
                    assert!(
                        close,
                        "{name}, {vocabulary} tokens, token {token}: {found:e}, expected {expected:e}"
                    );
                }
            }
        }
    }
}

fn probabilities(sampler: &Sampler, logits: &[f32]) -> Vec<f64> {
    sampler.distribution(logits).unwrap().probabilities().collect()
}

fn kept(sampler: &Sampler, logits: &[f32]) -> Vec<usize> {
    let probabilities = probabilities(sampler, logits);
    (0..logits.len()).filter(|&token| probabilities[token] > 0.0).collect()
}

#[test]
fn ties_at_a_threshold_are_all_kept() {
    let logits = [1.0, 3.0, 2.0, 2.0, 0.0, 2.0];
    assert_eq!(kept(&sampler(with(|o| o.top_k = 1)), &logits), [1]);
    for k in [2, 3, 4] {
        assert_eq!(kept(&sampler(with(|o| o.top_k = k)), &logits), [1, 2, 3, 5]);
    }
    assert_eq!(kept(&sampler(with(|o| o.top_k = 5)), &logits), [0, 1, 2, 3, 5]);
    // Probabilities 1/2, 1/8 three times, 1/16 twice.
    let logits = [8f32, 2.0, 2.0, 2.0, 1.0, 1.0].map(f32::ln);
    for (p, expected) in [(0.1, 1), (0.49, 1), (0.51, 4), (0.87, 4), (0.88, 6)] {
        assert_eq!(kept(&sampler(with(|o| o.top_p = p)), &logits).len(), expected, "{p}");
    }
    // Renormalised after top-k, the first has 8/14 = 0.571 and not 0.5.
    assert_eq!(kept(&sampler(with(|o| (o.top_k, o.top_p) = (2, 0.56))), &logits), [0]);
    for (p, expected) in [(0.2, 4), (0.3, 1), (0.1, 6), (0.126, 4)] {
        assert_eq!(kept(&sampler(with(|o| o.min_p = p)), &logits).len(), expected, "{p}");
    }
    let mut flat = sampler(Options::greedy());
    assert_eq!(flat.sample(&[1.0, 7.0, 7.0]).unwrap().token, 1);
}

#[test]
fn penalties_follow_their_formulas() {
    let logits = [2.0, -2.0, 1.0, 0.0];
    let odds = |sampler: &Sampler| {
        let p = probabilities(sampler, &logits);
        [0, 1, 2].map(|token| (p[token] / p[3]).ln())
    };
    let close = |found: [f64; 3], expected: [f64; 3]| {
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} {expected:?}");
    };
    let mut repetition = sampler(with(|o| o.repetition_penalty = 2.0));
    close(odds(&repetition), [2.0, -2.0, 1.0]);
    repetition.extend_prompt(&[0, 0]);
    close(odds(&repetition), [1.0, -2.0, 1.0]);
    repetition.accept(1);
    close(odds(&repetition), [1.0, -4.0, 1.0]);
    let mut frequency = sampler(with(|o| (o.frequency_penalty, o.presence_penalty) = (0.5, 0.25)));
    frequency.extend_prompt(&[0, 1, 2]);
    close(odds(&frequency), [2.0, -2.0, 1.0]);
    [0, 0, 1].iter().for_each(|&token| frequency.accept(token));
    close(odds(&frequency), [2.0 - 1.25, -2.75, 1.0]);
    // Bias first: 2 − 3 = −1 is multiplied, not divided.
    let mut both = sampler(with(|o| (o.repetition_penalty, o.logit_bias) = (2.0, [(0, -3.0)].into())));
    both.accept(0);
    close(odds(&both), [-2.0, -2.0, 1.0]);
}

/// Pearson's χ² of drawn tokens. The seeds are fixed; the limit is the 1 − 10⁻⁶ quantile for 7 degrees of freedom.
#[test]
fn tokens_are_drawn_as_often_as_they_are_probable() {
    let logits = [0.5, -1.0, 2.0, 0.0, 1.5, -2.0, 0.25, 1.0];
    let draws = 20_000;
    let chi_squared = |probabilities: &[f64], counts: &[usize]| -> f64 {
        let terms = probabilities.iter().zip(counts).filter(|(p, _)| **p > 0.0);
        terms.map(|(p, &n)| (n as f64 - p * draws as f64).powi(2) / (p * draws as f64)).sum()
    };
    for options in [with(|o| o.seed = 5), with(|o| (o.temperature, o.top_k, o.seed) = (1.7, 6, 6))] {
        let expected = reference(&options, &[], &[], &logits);
        let mut sampler = sampler(options);
        let mut counts = [0; 8];
        for _ in 0..draws {
            counts[sampler.sample(&logits).unwrap().token as usize] += 1;
        }
        assert_eq!(sampler.generated(), draws);
        assert!(expected.iter().zip(&counts).all(|(p, &n)| *p > 0.0 || n == 0), "{counts:?}");
        let found = chi_squared(&expected, &counts);
        assert!(found < 40.5, "{found}: {counts:?} for {expected:?}");
    }
    // The test can fail: these counts are those of a slightly wrong distribution.
    let exact = reference(&Options::default(), &[], &[], &logits);
    let wrong = reference(&with(|o| o.temperature = 1.1), &[], &[], &logits);
    let counts: Vec<usize> = wrong.iter().map(|p| (p * draws as f64) as usize).collect();
    assert!(chi_squared(&exact, &counts) > 40.5);
}

#[test]
fn log_probabilities_are_the_models_own() {
    let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0, -1.0];
    let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let logprob = |logit: f64| (logit - sum.ln()) as f32;
    let mut sampler =
        sampler(with(|o| (o.temperature, o.logit_bias, o.top_logprobs) = (0.1, [(4, 100.0)].into(), 9)));
    let sampled = sampler.sample(&logits).unwrap();
    assert_eq!(sampled.token, 4);
    assert!((sampled.logprob - logprob(-1.0)).abs() < 1e-6);
    let tokens: Vec<u32> = sampled.top_logprobs.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens, [1, 3, 0, 4]);
    for (token, found) in sampled.top_logprobs {
        assert!((found - logprob(logits[token as usize].into())).abs() < 1e-6);
    }
}

#[test]
fn rolling_back_and_forking_repeat_the_same_tokens() {
    let mut numbers = Numbers(3);
    let steps: Vec<Vec<f32>> = (0..40).map(|_| numbers.logits(60, 2.0)).collect();
    let options = with(|o| (o.repetition_penalty, o.frequency_penalty, o.seed) = (1.5, 0.5, 9));
    let mut sampler = sampler(options);
    sampler.extend_prompt(&[1, 2, 3, 59]);
    let run = |sampler: &mut Sampler, steps: &[Vec<f32>]| -> Vec<u32> {
        steps.iter().map(|logits| sampler.sample(logits).unwrap().token).collect()
    };
    let first = run(&mut sampler, &steps[..20]);
    let mut fork = sampler.clone();
    let rest = run(&mut sampler, &steps[20..]);
    assert_eq!(run(&mut fork, &steps[20..]), rest);
    sampler.truncate(4 + 7);
    assert_eq!((sampler.len(), sampler.generated()), (11, 7));
    assert_eq!(run(&mut sampler, &steps[7..]), [&first[7..], &rest].concat());
    sampler.truncate(100);
    assert_eq!(sampler.len(), 44);
    // Without its penalties the same stream chooses otherwise, so the history did matter.
    let mut plain = Sampler::new(with(|o| o.seed = 9)).unwrap();
    assert_ne!(run(&mut plain, &steps), [&first[..], &rest].concat());
}

fn tensor(logits: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::from(logits), device)
}

/// Burn's handles of the devices, by backend.
fn devices() -> Vec<(Backend, Device)> {
    crate::devices::devices().iter().map(|device| (device.backend(), device.burn().clone())).collect()
}

/// A bound of the relative error of a device's sums: two sums of at most three square roots of the vocabulary's size in
/// all, in any order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and 64 units in the last
/// place for exponentials (Vulkan allows 3 + 2|x|).
fn rounding(vocabulary: usize) -> f64 {
    (3.0 * (vocabulary as f64).sqrt() + 64.0) * 2f64.powi(-24)
}

/// Whether `u` is in the interval of the running sum of probabilities that belongs to `token`, but for rounding.
fn explains(distribution: &Distribution, token: u32, u: f32, tolerance: f64) -> bool {
    let end: f64 = distribution.probabilities().take(token as usize + 1).sum();
    let start = end - distribution.probability(token);
    let u = f64::from(u);
    distribution.probability(token) > 0.0 && start - tolerance <= u && u <= end + tolerance
}

/// Asserts that the device draws the token that the processor draws, or one whose boundary is within rounding of `u`.
/// True if it is the same token.
fn compare(what: &str, sampler: &mut Sampler, logits: &[f32], device: &Device, u: f32) -> bool {
    let expected = sampler.sample_at(logits, u).unwrap();
    let found = sampler.sample_tensor_at(tensor(logits, device), u).unwrap();
    let tolerance = rounding(logits.len());
    let logprob = |token: u32| {
        let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
        f64::from(logits[token as usize]) - largest - sum.ln()
    };
    let close = |token: u32, found: f32| {
        let expected = logprob(token);
        (f64::from(found) - expected).abs() <= tolerance + 1e-6 * expected.abs()
    };
    assert!(close(found.token, found.logprob), "{what}: {found:?}, expected {}", logprob(found.token));
    let tops = |sampled: &Sampled| sampled.top_logprobs.iter().map(|(token, _)| *token).collect::<Vec<_>>();
    assert_eq!(tops(&found), tops(&expected), "{what}");
    assert!(found.top_logprobs.iter().all(|&(token, logprob)| close(token, logprob)), "{what}: {found:?}");
    if found.token == expected.token {
        return true;
    }
    // The set of top-p may end at either side of a boundary that is as close to p as rounding.
    let p = sampler.options().top_p;
    let explained = [1.0, 1.0 - 2.0 * tolerance, 1.0 + 2.0 * tolerance].iter().any(|factor| {
        let other = with_top_p(sampler, if p < 1.0 { (f64::from(p) * factor).min(1.0) as f32 } else { 1.0 });
        explains(&other.distribution(logits).unwrap(), found.token, u, 3.0 * tolerance)
    });
    let probability = sampler.distribution(logits).unwrap().probability(found.token);
    assert!(
        explained,
        "{what}, u {u}: token {} of probability {probability}, not {}",
        found.token, expected.token
    );
    false
}

/// A sampler without history, for the options that `compare` is used with.
fn with_top_p(sampler: &Sampler, top_p: f32) -> Sampler {
    let mut other = Sampler::new(Options { top_p, ..sampler.options().clone() }).unwrap();
    other.extend_prompt(PROMPT);
    GENERATED.iter().for_each(|&token| other.accept(token));
    other
}

const PROMPT: &[u32] = &[0, 0];
const GENERATED: &[u32] = &[0];

fn shapes_of_logits(numbers: &mut Numbers, vocabulary: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut dominant = numbers.logits(vocabulary, 1.0);
    dominant[vocabulary / 2] = 60.0;
    let mut infinite = numbers.logits(vocabulary, 1.0);
    infinite.iter_mut().skip(1).step_by(3).for_each(|logit| *logit = f32::NEG_INFINITY);
    vec![
        ("normal", numbers.logits(vocabulary, 3.0)),
        ("narrow", numbers.logits(vocabulary, 1e-3)),
        ("wide", numbers.logits(vocabulary, 300.0)),
        ("flat", vec![-3.25; vocabulary]),
        ("ties", (0..vocabulary).map(|_| numbers.below(4) as f32).collect()),
        ("one dominant", dominant),
        ("some impossible", infinite),
        (
            "bfloat16",
            numbers.logits(vocabulary, 4.0).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
        ),
    ]
}

#[test]
fn the_device_draws_the_same_tokens_as_the_processor() {
    for (name, device) in devices() {
        let mut numbers = Numbers(7);
        let (mut same, mut all) = (0, 0);
        for vocabulary in [1, 7, 64, 97, 1000] {
            for (shape, logits) in shapes_of_logits(&mut numbers, vocabulary) {
                for (label, options) in combinations(vocabulary) {
                    let mut sampler = sampler(options);
                    sampler.extend_prompt(PROMPT);
                    GENERATED.iter().for_each(|&token| sampler.accept(token));
                    let what = format!("{name}, {vocabulary} tokens, {shape}, {label}");
                    for u in [numbers.draw(), 0.0, 1.0] {
                        same += usize::from(compare(&what, &mut sampler, &logits, &device, u));
                        all += 1;
                    }
                }
            }
        }
        eprintln!("{name}: {same} of {all} draws chose the same token");
        assert!(same as f64 >= 0.995 * all as f64, "{name}: {same} of {all}");
    }
}

/// As many tokens as gpt-oss has.
#[test]
fn the_device_samples_a_real_vocabulary() {
    for (name, device) in devices() {
        let mut numbers = Numbers(8);
        let logits = numbers.logits(201_088, 2.5);
        for options in [
            Options::greedy(),
            with(|o| o.top_logprobs = 5),
            with(|o| (o.temperature, o.top_k) = (0.7, 50)),
            with(|o| (o.temperature, o.top_p) = (0.5, 0.9)),
        ] {
            let mut sampler = sampler(options);
            sampler.extend_prompt(PROMPT);
            GENERATED.iter().for_each(|&token| sampler.accept(token));
            for _ in 0..2 {
                compare(&name.to_string(), &mut sampler, &logits, &device, numbers.draw());
            }
        }
    }
}

/// The search for thresholds, at distances of every magnitude and at neighbouring numbers. A high temperature makes all
/// kept tokens about as probable, so that a walk through `u` meets each of them.
#[test]
fn top_k_on_the_device_is_exact() {
    for (name, device) in devices() {
        let mut logits: Vec<f32> = (-12..5).map(|exponent| -(10f32.powi(exponent))).collect();
        logits.extend([0.0, -1e-35, -1.0, -f32::from_bits(1f32.to_bits() + 1), -10.0]);
        logits.extend([-f32::from_bits(10f32.to_bits() - 1), -0.1, -1e-20, 0.0]);
        let vocabulary = logits.len();
        for k in 1..=vocabulary {
            let mut sampler = sampler(with(|o| (o.temperature, o.top_k) = (1e6, k)));
            let expected = kept(&sampler, &logits);
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let least = sorted[k - 1];
            let definition: Vec<usize> = (0..vocabulary).filter(|&token| logits[token] >= least).collect();
            assert_eq!(expected, definition, "{name}, k {k}");
            let found: Vec<usize> = (0..expected.len())
                .map(|n| {
                    let u = (n as f32 + 0.5) / expected.len() as f32;
                    sampler.sample_tensor_at(tensor(&logits, &device), u).unwrap().token as usize
                })
                .collect();
            assert_eq!(found, expected, "{name}, k {k}");
        }
    }
}

#[test]
fn the_device_follows_the_history() {
    for (name, device) in devices() {
        let mut numbers = Numbers(12);
        let vocabulary = 203;
        let options = Options {
            repetition_penalty: 1.4,
            frequency_penalty: 0.7,
            presence_penalty: 0.3,
            logit_bias: [(0, 1.0), (5, f32::NEG_INFINITY)].into(),
            seed: 4,
            ..Options::default()
        };
        let (mut here, mut there) = (sampler(options.clone()), sampler(options));
        let (mut same, mut all) = (0, 0);
        for round in 0..6 {
            // Few tokens change the tables, many make new ones.
            let read: Vec<u32> =
                (0..if round % 2 == 0 { 150 } else { 3 }).map(|_| numbers.below(vocabulary) as u32).collect();
            here.extend_prompt(&read);
            there.extend_prompt(&read);
            let mark = here.len();
            for step in 0..12 {
                let logits = numbers.logits(vocabulary, 2.0);
                let u = here.next_uniform();
                let expected = here.sample_at(&logits, u).unwrap();
                let found = there.sample_tensor_at(tensor(&logits, &device), u).unwrap();
                let distribution = here.distribution(&logits).unwrap();
                let what = format!("{name}, round {round}, step {step}");
                assert!(explains(&distribution, found.token, u, rounding(vocabulary)), "{what}");
                same += usize::from(expected.token == found.token);
                all += 1;
                here.accept(expected.token);
                there.accept(expected.token);
            }
            if round == 3 {
                here.truncate(mark + 5);
                there.truncate(mark + 5);
                // A fork must not change the tables of its origin.
                let mut fork = there.clone();
                let logits = numbers.logits(vocabulary, 2.0);
                for _ in 0..3 {
                    fork.sample_tensor(tensor(&logits, &device)).unwrap();
                }
            }
        }
        assert!(same + 1 >= all, "{name}: {same} of {all}");
    }
}

#[test]
fn greedy_takes_the_first_of_equals_on_the_device() {
    for (name, device) in devices() {
        for vocabulary in [9, 300, 5000] {
            let mut logits = vec![-1.0; vocabulary];
            for first in [vocabulary - 1, vocabulary / 2, 3, 0] {
                logits[first] = 2.0;
                let sampled = sampler(Options::greedy()).sample_tensor(tensor(&logits, &device)).unwrap();
                assert_eq!(sampled.token as usize, first, "{name}, {vocabulary}");
            }
        }
    }
}

#[test]
fn half_precision_logits_are_widened() {
    for (name, device) in devices() {
        let mut numbers = Numbers(21);
        let logits: Vec<f32> =
            numbers.logits(300, 3.0).iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
        if !device.supports_dtype(DType::F16) {
            eprintln!("SKIPPED: f16 logits on {name}: not supported");
            continue;
        }
        let mut sampler = sampler(with(|o| o.top_k = 20));
        let half = tensor(&logits, &device).cast(DType::F16);
        for _ in 0..5 {
            let u = numbers.draw();
            let found = sampler.sample_tensor_at(half.clone(), u).unwrap();
            assert!(
                explains(&sampler.distribution(&logits).unwrap(), found.token, u, rounding(300)),
                "{name}"
            );
        }
    }
}

#[test]
fn a_batch_draws_what_its_sequences_draw_alone() {
    for (name, device) in devices() {
        let mut numbers = Numbers(31);
        let rows: Vec<Vec<f32>> = (0..3).map(|_| numbers.logits(120, 2.0)).collect();
        let logits = |rows: &[Vec<f32>]| {
            Tensor::<2>::from_data(TensorData::new(rows.concat(), [rows.len(), rows[0].len()]), &device)
        };
        let options = [
            with(|o| o.seed = 1),
            with(|o| (o.seed, o.top_p, o.top_logprobs) = (2, 0.8, 4)),
            with(|o| o.temperature = 0.0),
        ];
        let mut alone: Vec<Sampler> = options.clone().map(sampler).into();
        let mut batch = alone.clone();
        for _ in 0..4 {
            let mut references: Vec<&mut Sampler> = batch.iter_mut().collect();
            let found = sample_batch(&mut references, logits(&rows)).unwrap();
            for ((sampler, row), found) in alone.iter_mut().zip(&rows).zip(found) {
                assert_eq!(found, sampler.sample_tensor(tensor(row, &device)), "{name}");
            }
        }
        // One broken row leaves the others alone.
        let mut broken = rows.clone();
        broken[1][7] = f32::NAN;
        let mut references: Vec<&mut Sampler> = batch.iter_mut().collect();
        let found = sample_batch(&mut references, logits(&broken)).unwrap();
        assert!(matches!(found[1], Err(SampleError::Logit { token: 7, .. })), "{name}: {:?}", found[1]);
        assert!(found[0].is_ok() && found[2].is_ok());
        assert_eq!(batch.iter().map(Sampler::generated).collect::<Vec<_>>(), [5, 4, 5]);
        let mut references: Vec<&mut Sampler> = batch.iter_mut().take(2).collect();
        let error = sample_batch(&mut references, logits(&rows)).unwrap_err();
        assert_eq!(error, SampleError::Batch { samplers: 2, sequences: 3 });
    }
}

/// The error of the processor and of every device for the same logits.
fn errors(options: &Options, history: &[u32], logits: &[f32]) -> Vec<SampleError> {
    let mut sampler = sampler(options.clone());
    sampler.extend_prompt(history);
    let mut errors = vec![sampler.sample(logits).unwrap_err()];
    for (_, device) in devices() {
        errors.push(sampler.sample_tensor(tensor(logits, &device)).unwrap_err());
    }
    assert_eq!(sampler.generated(), 0);
    errors
}

#[test]
fn what_cannot_be_sampled_is_an_error() {
    let filtered = with(|o| (o.top_k, o.top_p) = (3, 0.5));
    for options in [Options::default(), Options::greedy(), filtered] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 70];
            logits[60] = bad;
            for error in errors(&options, &[], &logits) {
                assert!(matches!(error, SampleError::Logit { token: 60, .. }), "{error}");
            }
        }
        for error in errors(&options, &[], &[f32::NEG_INFINITY; 12]) {
            assert_eq!(error, SampleError::NothingLeft);
        }
        let banned =
            Options { logit_bias: (0..12).map(|token| (token, f32::NEG_INFINITY)).collect(), ..options };
        for error in errors(&banned, &[], &[1.0; 12]) {
            assert_eq!(error, SampleError::NothingLeft);
        }
        for error in errors(&banned, &[], &[1.0; 10]) {
            assert_eq!(error, SampleError::Token { place: "the logit bias", token: 10, vocabulary: 10 });
        }
    }
    let penalised = with(|o| o.repetition_penalty = 1.2);
    for error in errors(&penalised, &[3, 99], &[1.0; 10]) {
        assert_eq!(error, SampleError::Token { place: "the history", token: 99, vocabulary: 10 });
    }
    // Without penalties nobody looks at the history.
    let mut free = sampler(Options::default());
    free.extend_prompt(&[99]);
    assert!(free.sample(&[1.0; 10]).is_ok());
    assert_eq!(free.sample(&[]).unwrap_err(), SampleError::Vocabulary { found: 0 });
    assert!(Backend::Cpu.open().is_ok());
    let empty = Tensor::<1>::zeros([0], &Device::flex());
    assert_eq!(free.sample_tensor(empty).unwrap_err(), SampleError::Vocabulary { found: 0 });
}
