//! Schedulers, guidance, noise and biases beside the original, and what must hold without it.

use std::collections::BTreeSet;

use burn::tensor::Tensor;
use engine::Error;
use engine::backend::Backend;
use engine::diffusion::guidance::GuidanceInterval;
use engine::diffusion::noise::{Noise, NoiseFile, RecordedNoise, SeededNoise};
use engine::diffusion::scheduler::{FlowMatchEuler, Kind, Schedule, Scheduler, Shifting};
use engine::nn::attention::{attend, attend_from};
use engine::nn::bias::{Alibi, BiasProvider, BiasRequest, KeyPadding, NoBias, Sum, T5Buckets};
use proptest::prelude::*;

use crate::devices::devices;
use crate::fixture::assert_part;

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

#[test]
fn schedules_and_steps_are_the_original_s() {
    assert_part("schedulers", 257);
}

#[test]
fn guidance_is_the_original_s() {
    assert_part("guidance", 34);
}

#[test]
fn biases_are_pytorch_s() {
    assert_part("bias", 14);
}

#[test]
fn a_schedule_refuses_what_it_cannot_do() {
    let field = |result: Result<(), Error>| match result {
        Err(Error::Model { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let schedule = |shift, sigma| Schedule::new(shift, sigma, Shifting::Static);
    assert_eq!(field(schedule(0.0, 1.0).map(|_| ())), "shift");
    assert_eq!(field(schedule(f32::NAN, 1.0).map(|_| ())), "shift");
    assert_eq!(field(schedule(3.0, 1.5).map(|_| ())), "sigma_max");
    let mut euler = FlowMatchEuler::new(schedule(3.0, 1.0).unwrap());
    assert_eq!(field(euler.set_timesteps(0)), "steps");
    assert_eq!(field(euler.set_sigmas(&[])), "sigmas");
    assert_eq!(field(euler.set_sigmas(&[0.5, f32::NAN])), "sigmas");
    euler.set_timesteps(2).unwrap();
    let device = Backend::Cpu.open().unwrap();
    let zeros = || Tensor::<4>::zeros([1, 1, 1, 2], device.burn());
    let times = euler.timesteps().to_vec();
    let mut step = |time| euler.step(zeros(), time, zeros(), 0.0, None).map(|_| ());
    assert_eq!(field(step(123.0)), "timestep");
    step(times[0]).unwrap();
    step(times[1]).unwrap();
    assert_eq!(field(step(times[1])), "step");
    let mut pingpong = Kind::PingPong.scheduler(3.0, 1.0).unwrap();
    pingpong.set_timesteps(2).unwrap();
    let time = pingpong.timesteps()[0];
    assert_eq!(field(pingpong.step(zeros(), time, zeros(), 0.0, None).map(|_| ())), "noise");
}

#[test]
fn the_interval_is_in_the_middle_and_decays_to_its_end() {
    let interval = GuidanceInterval::new(60, 0.5).unwrap();
    assert_eq!((interval.start, interval.end), (15, 45));
    assert_eq!(interval.scale(15, 15.0, 3.0, 1.0), 15.0);
    assert_eq!(interval.scale(44, 15.0, 3.0, 1.0), 3.0);
    assert_eq!(interval.scale(44, 15.0, 3.0, 0.5), 9.0);
    // The original divides by zero.
    let single = GuidanceInterval { start: 3, end: 4 };
    assert_eq!(single.scale(3, 15.0, 3.0, 1.0), 15.0);
    for wrong in [-0.1, 1.5, f64::NAN] {
        assert!(GuidanceInterval::new(60, wrong).is_err());
    }
}

#[test]
fn seeded_noise_is_normal_and_the_same_on_every_device() {
    let shape = [2, 8, 16, 100];
    let drawn: Vec<Vec<f32>> = devices()
        .iter()
        .map(|device| values(SeededNoise::new(&[7, 8]).draw("init_noise", shape, device.burn()).unwrap()))
        .collect();
    assert!(drawn.windows(2).all(|pair| pair[0] == pair[1]));
    let moment = |power: i32| -> f64 {
        drawn[0].iter().map(|&v| f64::from(v).powi(power)).sum::<f64>() / drawn[0].len() as f64
    };
    // Within five standard errors of those of a normal distribution.
    let count = drawn[0].len() as f64;
    for (power, moment_of_normal, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
    {
        let bound = 5.0 * (variance / count).sqrt();
        assert!((moment(power) - moment_of_normal).abs() < bound, "moment {power}: {}", moment(power));
    }
    let distinct: BTreeSet<u32> = drawn[0].iter().map(|value| value.to_bits()).collect();
    assert!(distinct.len() > drawn[0].len() * 9 / 10);
    // Each sample follows from its own seed.
    let device = devices().remove(0);
    let alone = values(SeededNoise::new(&[8]).draw("init_noise", [1, 8, 16, 100], device.burn()).unwrap());
    assert_eq!(alone, drawn[0][alone.len()..]);
}

#[test]
fn recorded_noise_replays_and_a_wrong_file_is_named() {
    let device = Backend::Cpu.open().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("noise.safetensors");
    let shape = [1, 2, 3, 4];
    let mut recorded = RecordedNoise::new(SeededNoise::new(&[1]));
    let names = ["init_noise", "step_noise.0", "step_noise.1"];
    let drawn = names.map(|name| values(recorded.draw(name, shape, device.burn()).unwrap()));
    recorded.write(&file).unwrap();
    let mut replayed = NoiseFile::open(&file).unwrap();
    for (name, drawn) in names.into_iter().zip(&drawn) {
        assert_eq!(&values(replayed.draw(name, shape, device.burn()).unwrap()), drawn);
    }
    let mut refused = |name, shape| match replayed.draw(name, shape, device.burn()) {
        Err(Error::Weights { tensor, found, .. }) => (tensor, found),
        other => panic!("{:?}", other.map(|tensor| tensor.dims())),
    };
    assert_eq!(refused("retake_noise", shape), ("retake_noise".into(), "no such tensor".into()));
    assert_eq!(refused("init_noise", [1, 2, 3, 5]), ("init_noise".into(), "shape [1, 2, 3, 4]".into()));
}

/// A user's own: keys farther than a distance are hidden.
struct Near(usize);

impl BiasProvider for Near {
    fn bias(&self, request: &BiasRequest<'_>, device: &burn::tensor::Device) -> Option<Tensor<4>> {
        let hidden =
            |query: usize, key: usize| if query.abs_diff(key) > self.0 { f32::NEG_INFINITY } else { 0.0 };
        let rows = request.queries.clone();
        let biases: Vec<f32> =
            rows.flat_map(|query| request.keys.iter().map(move |&key| hidden(query, key))).collect();
        let shape = [1, 1, request.queries.len(), request.keys.len()];
        Some(Tensor::<1>::from_data(biases.as_slice(), device).reshape(shape))
    }
}

#[test]
fn a_query_that_sees_nothing_yields_zero() {
    for device in devices() {
        let ones = || Tensor::<4>::ones([2, 1, 3, 4], device.burn());
        let padding = KeyPadding { mask: vec![vec![true, false, true], vec![false; 3]] };
        let out = values(attend(ones(), ones(), ones(), 0.5, Some((&padding, 0))));
        assert_eq!(out, [[1.0; 12], [0.0; 12]].concat());
        // −∞ hides as well; the second sample and the first together see what both see.
        let sum = Sum(vec![&padding, &Near(0)]);
        let out = values(attend(ones(), ones(), ones(), 0.5, Some((&sum, 0))));
        assert_eq!(out[..12], [[1.0; 4], [0.0; 4], [1.0; 4]].concat());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any cut of the queries, and any order of the keys, is the same attention.
    #[test]
    fn chunks_of_queries_and_orders_of_keys_change_nothing(
        length in 2usize..12, cut in 1usize..11, turn in 0usize..12, seed in 0u64..1000,
    ) {
        let device = Backend::Cpu.open().unwrap();
        let cut = cut.min(length - 1);
        let shape = [2, 3, length, 4];
        let mut noise = SeededNoise::new(&[seed]);
        let mut draw = || noise.draw("", shape, device.burn()).unwrap();
        let [q, k, v] = [draw(), draw(), draw()];
        let table = noise.draw("", [1, 1, 8, 3], device.burn()).unwrap().reshape([8, 3]);
        let t5 = T5Buckets { tables: vec![table], num_buckets: 8, max_distance: 6, bidirectional: true };
        let alibi = Alibi::symmetric(3);
        let mask = (0..2).map(|sample| (0..length).map(|key| (key + sample) % 3 != 0).collect()).collect();
        let padding = KeyPadding { mask };
        let near = Near(3);
        let sum = Sum(vec![&t5, &alibi, &padding, &near]);
        let providers: [&dyn BiasProvider; 6] = [&NoBias, &t5, &alibi, &padding, &near, &sum];
        let keys: Vec<usize> = (0..length).map(|key| (key + turn) % length).collect();
        let turned = |x: &Tensor<4>| {
            let rows: Vec<i32> = keys.iter().map(|&key| key as i32).collect();
            x.clone().select(2, Tensor::from_data(rows.as_slice(), device.burn()))
        };
        for provider in providers {
            let whole = values(attend(q.clone(), k.clone(), v.clone(), 0.5, Some((provider, 0))));
            let part = |start: usize, count| {
                let q = q.clone().narrow(2, start, count);
                attend_from(start, q, turned(&k), &keys, turned(&v), 0.5, Some((provider, 0)))
            };
            let parts = values(Tensor::cat(vec![part(0, cut), part(cut, length - cut)], 2));
            for (whole, part) in whole.iter().zip(&parts) {
                prop_assert!((whole - part).abs() < 1e-5, "{whole} and {part}");
            }
        }
    }
}
