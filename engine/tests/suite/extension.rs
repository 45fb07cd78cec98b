//! The extension of Burn against float64 evaluations of the operations' definitions, written out plainly, and against traces of the
//! genuine module, on every device.

use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorData};
use engine::Error;
use engine::backend::{Backend, Device, Float, waiting};
use engine::extension::{MoeWeights, Mxfp4Linear, moe, mxfp4_linear, sink_attention};
use engine::gpt_oss::Config;
use engine::gpt_oss::model::read;
use engine::kernels::method::Method;
use engine::nn::linear::Linear;
use engine::nn::norm::RmsNorm;
use engine::nn::rope::{Frequencies, Pairing};
use formats::model_bin::layout::PieceId;
use formats::model_bin::tensors::{TensorId, TensorKind};
use formats::model_bin::{Stored, StoredOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::devices::devices;
use crate::trace::{CASES, Reference, fixture, largest_error};

/// What rounding the factors of a product may do, relative to the largest value of the result.
fn tolerance(device: &Device) -> f64 {
    match device.client().map_or(Method::Units, |client| Method::of(&client)) {
        Method::Units => 4e-6,
        Method::Fragments => 1e-3,
        Method::TensorCores => 8e-3,
    }
}

#[track_caller]
fn assert_close<const D: usize>(
    case: &str,
    found: Tensor<D>,
    truth: &[f64],
    tolerance: f64,
    device: &Device,
) {
    let error = largest_error(&read(found).unwrap(), truth);
    assert!(error <= tolerance, "{}, {case}: {error:e}", device.backend());
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0f32..2.0)).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device.burn(), DType::F32))
}

/// Matrices as a checkpoint has them: codes, scales and what they mean.
struct Matrices {
    dims: [usize; 3],
    blocks: Vec<u8>,
    scales: Vec<u8>,
    values: Vec<f64>,
}

impl Matrices {
    fn random(seed: u64, dims: [usize; 3]) -> Matrices {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let count: usize = dims.iter().product();
        let blocks: Vec<u8> = (0..count / 2).map(|_| rng.random()).collect();
        let scales: Vec<u8> = (0..count / 32).map(|_| rng.random_range(119..=125)).collect();
        let value = |i: usize| {
            let code = blocks[i / 2] >> (4 * (i % 2)) & 15;
            let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
            let sign = if code >= 8 { -1.0 } else { 1.0 };
            sign * magnitude * (f64::from(scales[i / 32]) - 127.0).exp2()
        };
        let values = (0..count).map(value).collect();
        Matrices { dims, blocks, scales, values }
    }

    fn on(&self, device: &Device) -> Mxfp4Linear {
        Mxfp4Linear::from_checkpoint(self.blocks.clone(), self.scales.clone(), self.dims, device.burn())
            .unwrap()
    }

    /// `W[expert] · x + bias`.
    fn multiply(&self, expert: usize, x: &[f64], bias: &[f32]) -> Vec<f64> {
        let [_, rows, columns] = self.dims;
        let row = |row: usize| {
            let weights = &self.values[(expert * rows + row) * columns..][..columns];
            x.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>() + f64::from(bias[row])
        };
        (0..rows).map(row).collect()
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[test]
fn packed_layers_multiply_few_and_many_rows() {
    for [rows, columns] in [[96, 160], [32, 32], [160, 2880]] {
        let matrix = Matrices::random(1, [1, rows, columns]);
        let bias = random(2, rows);
        for tokens in [1, 4, 5, 70] {
            let x = random(3, tokens * columns);
            let truth = |bias: &[f32]| -> Vec<f64> {
                x.chunks(columns).flat_map(|x| matrix.multiply(0, &wide(x), bias)).collect()
            };
            for device in devices() {
                let rounded = if tokens <= 4 { 1e-6 } else { tolerance(&device) };
                let weight = matrix.on(&device);
                let x = tensor(&x, [tokens, columns], &device);
                let y = mxfp4_linear(x.clone(), &weight, Some(tensor(&bias, [rows], &device))).unwrap();
                let case = format!("linear {rows} x {columns}, {tokens} tokens");
                assert_close(&case, y, &truth(&bias), rounded, &device);
                let y = mxfp4_linear(x, &weight, None).unwrap();
                assert_close(&case, y, &truth(&vec![0.0; rows]), rounded, &device);
            }
        }
    }
}

/// Rows of larger tensors, and columns of one that lies transposed in memory.
#[test]
fn operands_may_be_views() {
    let (rows, columns, tokens) = (64, 32, 7);
    let matrices = Matrices::random(4, [3, rows, columns]);
    let x = random(5, 9 * columns);
    let row = |token: usize| matrices.multiply(1, &wide(&x[token * columns..][..columns]), &[0.0; 64]);
    let truth: Vec<f64> = (1..1 + tokens).flat_map(row).collect();
    for device in devices() {
        let weight = matrices.on(&device).expert(1);
        let part = tensor(&x, [9, columns], &device).narrow(0, 1, tokens);
        let y = mxfp4_linear(part.clone(), &weight, None).unwrap();
        assert_close("part of the rows", y, &truth, tolerance(&device), &device);
        let transposed: Vec<f32> = (0..9 * columns).map(|i| x[i % 9 * columns + i / 9]).collect();
        let transposed = tensor(&transposed, [columns, 9], &device).transpose().narrow(0, 1, tokens);
        let y = mxfp4_linear(transposed, &weight, None).unwrap();
        assert_close("transposed", y, &truth, tolerance(&device), &device);
    }
}

/// A mixture of experts on the host.
struct Experts {
    router: Vec<f32>,
    router_bias: Vec<f32>,
    gate_up: Matrices,
    gate_up_bias: Vec<f32>,
    down: Matrices,
    down_bias: Vec<f32>,
}

impl Experts {
    fn random(experts: usize, embedding_dim: usize, mlp_dim: usize) -> Experts {
        Experts {
            router: random(10, experts * embedding_dim),
            router_bias: random(11, experts),
            gate_up: Matrices::random(12, [experts, 2 * mlp_dim, embedding_dim]),
            gate_up_bias: random(13, experts * 2 * mlp_dim),
            down: Matrices::random(14, [experts, embedding_dim, mlp_dim]),
            down_bias: random(15, experts * embedding_dim),
        }
    }

    fn on(&self, device: &Device) -> MoeWeights {
        let [experts, embedding_dim, mlp_dim] = self.down.dims;
        MoeWeights {
            router: tensor(&self.router, [experts, embedding_dim], device),
            router_bias: tensor(&self.router_bias, [experts], device),
            gate_up: self.gate_up.on(device),
            gate_up_bias: tensor(&self.gate_up_bias, [experts, 2 * mlp_dim], device),
            down: self.down.on(device),
            down_bias: tensor(&self.down_bias, [experts, embedding_dim], device),
        }
    }

    fn forward(&self, x: &[f32], active: usize, limit: f64) -> Vec<f64> {
        let [_, embedding_dim, mlp_dim] = self.down.dims;
        x.chunks(embedding_dim)
            .flat_map(|x| self.token(&wide(x), active, limit, embedding_dim, mlp_dim))
            .collect()
    }

    fn token(&self, x: &[f64], active: usize, limit: f64, embedding_dim: usize, mlp_dim: usize) -> Vec<f64> {
        let mut logits: Vec<(usize, f64)> = (self.router.chunks(embedding_dim).zip(&self.router_bias))
            .map(|(row, &bias)| wide(row).iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + f64::from(bias))
            .enumerate()
            .collect();
        logits.sort_by(|a, b| b.1.total_cmp(&a.1));
        logits.truncate(active);
        let sum: f64 = logits.iter().map(|(_, logit)| (logit - logits[0].1).exp()).sum();
        let mut y = vec![0.0; embedding_dim];
        for &(expert, logit) in &logits {
            let bias = &self.gate_up_bias[expert * 2 * mlp_dim..][..2 * mlp_dim];
            let gate_up = self.gate_up.multiply(expert, x, bias);
            let unit = |pair: &[f64]| {
                let (gate, up) = (pair[0].min(limit), pair[1].clamp(-limit, limit));
                gate / (1.0 + (-1.702 * gate).exp()) * (up + 1.0)
            };
            let hidden: Vec<f64> = gate_up.chunks(2).map(unit).collect();
            let bias = &self.down_bias[expert * embedding_dim..][..embedding_dim];
            let down = self.down.multiply(expert, &hidden, bias);
            let share = (logit - logits[0].1).exp() / sum;
            y.iter_mut().zip(down).for_each(|(y, down)| *y += share * down);
        }
        y
    }
}

#[test]
fn experts_are_selected_and_mixed() {
    for (experts, embedding_dim, mlp_dim, active, limit) in
        [(5, 96, 64, 4, 7.0), (3, 32, 96, 3, 0.5), (40, 64, 32, 1, 7.0)]
    {
        let host = Experts::random(experts, embedding_dim, mlp_dim);
        for tokens in [1, 5, 70] {
            let x = random(16, tokens * embedding_dim);
            let truth = host.forward(&x, active, limit);
            for device in devices() {
                let x = tensor(&x, [tokens, embedding_dim], &device);
                let y = moe(x, &host.on(&device), active, limit as f32).unwrap();
                let case = format!("{active} of {experts} experts, limit {limit}, {tokens} tokens");
                assert_close(&case, y, &truth, 2.0 * tolerance(&device), &device);
            }
        }
    }
}

/// 600 tokens with 32 experts of 512 hidden units each: what is computed at a time are 512.
#[test]
fn more_tokens_than_a_step_are_computed_in_parts() {
    let (experts, active, tokens, distinct) = (33, 32, 600, 3);
    let host = Experts::random(experts, 32, 512);
    let x = random(17, distinct * 32);
    let truth = host.forward(&x, active, 7.0).repeat(tokens / distinct);
    for device in devices() {
        let x = tensor(&x.repeat(tokens / distinct), [tokens, 32], &device);
        let y = moe(x, &host.on(&device), active, 7.0).unwrap();
        assert_close("parts", y, &truth, 2.0 * tolerance(&device), &device);
    }
}

/// Equal logits select the lower ids, as sorting stably does.
#[test]
fn the_lower_expert_comes_first_among_equals() {
    let mut host = Experts::random(6, 32, 32);
    host.router.fill(0.0);
    host.router_bias = vec![1.0, 3.0, 2.0, 3.0, 3.0, 2.0];
    let x = random(18, 3 * 32);
    for (active, chosen) in [(2, vec![1, 3]), (4, vec![1, 3, 4, 2])] {
        // The same with logits that differ by next to nothing.
        let mut apart = Experts::random(6, 32, 32);
        apart.router.fill(0.0);
        apart.router_bias = host.router_bias.clone();
        for (place, &expert) in chosen.iter().enumerate() {
            apart.router_bias[expert] += 1e-6 * (4 - place) as f32;
        }
        let truth = apart.forward(&x, active, 7.0);
        for device in devices() {
            let y = moe(tensor(&x, [3, 32], &device), &host.on(&device), active, 7.0).unwrap();
            assert_close("equals", y, &truth, 2.0 * tolerance(&device).max(1e-5), &device);
        }
    }
}

/// Sizes of attention.
#[derive(Clone, Copy, Debug)]
struct Attention {
    tokens: usize,
    positions: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

impl Attention {
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], sinks: Option<&[f32]>, scale: f64) -> Vec<f64> {
        let mut out = Vec::new();
        for token in 0..self.tokens {
            let position = self.positions - self.tokens + token;
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..self.heads {
                out.extend(self.query(first..position + 1, token, head, [q, k, v], sinks, scale));
            }
        }
        out
    }

    fn query(
        &self,
        seen: Range<usize>,
        token: usize,
        head: usize,
        [q, k, v]: [&[f32]; 3],
        sinks: Option<&[f32]>,
        scale: f64,
    ) -> Vec<f64> {
        let width = self.head_dim;
        let kv_head = head * self.kv_heads / self.heads;
        let query = wide(&q[(token * self.heads + head) * width..][..width]);
        let row = |rows: &[f32], position: usize| {
            wide(&rows[(position * self.kv_heads + kv_head) * width..][..width])
        };
        let weight =
            |position| (scale * row(k, position).iter().zip(&query).map(|(k, q)| k * q).sum::<f64>()).exp();
        let weights: Vec<f64> = seen.clone().map(weight).collect();
        let sum = weights.iter().sum::<f64>() + sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
        let mut out = vec![0.0; width];
        for (weight, position) in weights.iter().zip(seen) {
            out.iter_mut().zip(row(v, position)).for_each(|(out, v)| *out += weight / sum * v);
        }
        out
    }
}

#[test]
fn attention_sees_the_sink_the_window_and_the_past() {
    let case = |[tokens, positions, heads, kv_heads, head_dim]: [usize; 5], window| Attention {
        tokens,
        positions,
        heads,
        kv_heads,
        head_dim,
        window,
    };
    for attention in [
        case([1, 1, 2, 2, 64], None),
        case([1, 70, 8, 1, 64], None),
        case([5, 70, 8, 1, 64], Some(16)),
        case([70, 70, 6, 2, 64], Some(1)),
        case([70, 150, 6, 2, 64], Some(100)),
        case([70, 150, 4, 4, 16], None),
        case([5, 130, 3, 1, 24], Some(129)),
        case([5, 130, 3, 1, 24], Some(usize::MAX)),
        // Heads that kernels of GPUs do not take: an odd width, and one that exceeds shared memory.
        case([5, 9, 4, 2, 5], Some(4)),
        case([5, 9, 4, 2, 5], Some(usize::MAX)),
        case([3, 9, 2, 1, 1024], None),
    ] {
        let Attention { tokens, positions, heads, kv_heads, head_dim, window } = attention;
        let q = random(20, tokens * heads * head_dim);
        let [k, v] = [21, 22].map(|seed| random(seed, positions * kv_heads * head_dim));
        let sinks = random(23, heads);
        for (sinks, scale) in [(Some(&sinks), 1.0 / (head_dim as f32).sqrt()), (None, 0.25)] {
            // Scores of wide heads would leave one weight of 1.
            let scale = scale.min(4.0 / (head_dim as f32).sqrt());
            let truth = attention.forward(&q, &k, &v, sinks.map(Vec::as_slice), scale.into());
            for device in devices() {
                let of_sequence = |rows: &[f32]| tensor(rows, [positions, kv_heads, head_dim], &device);
                let found = sink_attention(
                    tensor(&q, [tokens, heads, head_dim], &device),
                    of_sequence(&k),
                    of_sequence(&v),
                    sinks.map(|sinks| tensor(sinks, [heads], &device)),
                    window,
                    scale,
                );
                let case = format!("{attention:?}, sinks {}", sinks.is_some());
                assert_close(&case, found.unwrap(), &truth, tolerance(&device), &device);
            }
        }
    }
}

/// A checkpoint's tensors.
struct Weights<'a> {
    stored: &'a Stored,
    config: &'a Config,
    device: &'a Device,
}

impl Weights<'_> {
    fn bytes(&self, kind: TensorKind, block: usize) -> Vec<u8> {
        let tensor = TensorId { kind, block: block as u32 };
        let experts = if kind.is_expert() { self.config.num_experts } else { 1 };
        let piece =
            |expert| self.stored.piece(PieceId { tensor, expert: expert as u32 }).unwrap().into_owned();
        (0..experts).flat_map(piece).collect()
    }

    /// A bf16 tensor.
    fn tensor<const D: usize>(&self, kind: TensorKind, block: usize, shape: [usize; D]) -> Tensor<D> {
        let bytes = self.bytes(kind, block);
        let halves = bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = halves.map(|&pair| half::bf16::from_le_bytes(pair).to_f32()).collect();
        tensor(&values, shape, self.device)
    }

    fn linear(&self, [weight, bias]: [TensorKind; 2], block: usize, shape: [usize; 2]) -> Linear {
        let bias = Some(self.tensor(bias, block, [shape[0]]));
        Linear { weight: self.tensor(weight, block, shape), bias, compute: Float::F32 }
    }

    fn norm(&self, kind: TensorKind, block: usize, x: &Tensor<2>) -> Tensor<2> {
        let Config { embedding_dim, rmsnorm_epsilon, .. } = *self.config;
        let scale = self.tensor(kind, block, [embedding_dim]);
        RmsNorm { scale, epsilon: rmsnorm_epsilon }.forward(x.clone())
    }

    fn attention(&self, block: usize, x: Tensor<2>) -> Tensor<2> {
        let Config { embedding_dim, head_dim, num_heads, num_kv_heads, .. } = *self.config;
        let tokens = x.dims()[0];
        let projection = [(num_heads + 2 * num_kv_heads) * head_dim, embedding_dim];
        let qkv = self.linear([TensorKind::QkvWeight, TensorKind::QkvBias], block, projection);
        let qkv = qkv.forward(self.norm(TensorKind::AttnNorm, block, &x));
        let qkv = qkv.reshape([tokens, num_heads + 2 * num_kv_heads, head_dim]);
        let rope = Frequencies::yarn(&self.config.yarn(), head_dim).table(0..tokens, self.device.burn());
        let rotated = |first, heads| rope.rotate(qkv.clone().narrow(1, first, heads), Pairing::Interleaved);
        let (q, k) = (rotated(0, num_heads), rotated(num_heads, num_kv_heads));
        let v = qkv.clone().narrow(1, num_heads + num_kv_heads, num_kv_heads);
        let sinks = self.tensor(TensorKind::Sinks, block, [num_heads]);
        // A model.bin has the scale of the scores in the weights.
        let attended = sink_attention(q, k, v, Some(sinks), self.config.window(block), 1.0).unwrap();
        let out = [TensorKind::OutWeight, TensorKind::OutBias];
        let out = self.linear(out, block, [embedding_dim, num_heads * head_dim]);
        x + out.forward(attended.reshape([tokens, num_heads * head_dim]))
    }

    fn experts(&self, block: usize, x: Tensor<2>) -> Tensor<2> {
        let Config { embedding_dim, num_experts, num_active_experts, mlp_dim, swiglu_limit, .. } =
            *self.config;
        let packed = |[blocks, scales]: [TensorKind; 2], rows, columns| {
            let [blocks, scales] = [blocks, scales].map(|kind| self.bytes(kind, block));
            Mxfp4Linear::from_stored(blocks, scales, [num_experts, rows, columns], self.device.burn())
                .unwrap()
        };
        let weights = MoeWeights {
            router: self.tensor(TensorKind::GateWeight, block, [num_experts, embedding_dim]),
            router_bias: self.tensor(TensorKind::GateBias, block, [num_experts]),
            gate_up: packed([TensorKind::Mlp1Blocks, TensorKind::Mlp1Scales], 2 * mlp_dim, embedding_dim),
            gate_up_bias: self.tensor(TensorKind::Mlp1Bias, block, [num_experts, 2 * mlp_dim]),
            down: packed([TensorKind::Mlp2Blocks, TensorKind::Mlp2Scales], embedding_dim, mlp_dim),
            down_bias: self.tensor(TensorKind::Mlp2Bias, block, [num_experts, embedding_dim]),
        };
        let normed = self.norm(TensorKind::MlpNorm, block, &x);
        x + moe(normed, &weights, num_active_experts, swiglu_limit).unwrap()
    }
}

/// Every block from what the genuine module had before it, in f32.
#[test]
fn blocks_of_the_operations_agree_with_the_genuine_module() {
    for device in devices() {
        for name in CASES {
            let stored = Stored::open(&fixture(name), &StoredOptions::default(), &()).unwrap();
            let config = Config::new(stored.header(), stored.dims()).unwrap();
            let weights = Weights { stored: &stored, config: &config, device: &device };
            let reference = Reference::open(name);
            let tokens = reference.tokens().len();
            let residual = |stage: &str| {
                let values: Vec<f32> =
                    reference.values(stage).into_iter().map(|value| value as f32).collect();
                tensor(&values, [tokens, config.embedding_dim], &device)
            };
            let mut before = "embedding".to_owned();
            for block in 0..config.num_blocks {
                let [attention, experts] = ["attn", "mlp"].map(|stage| format!("block.{block}.{stage}"));
                let allowed = tolerance(&device).max(5e-6);
                let found = weights.attention(block, residual(&before));
                let case = format!("{name} {attention}");
                assert_close(&case, found, &reference.values(&attention), allowed, &device);
                let found = weights.experts(block, residual(&attention));
                let case = format!("{name} {experts}");
                assert_close(&case, found, &reference.values(&experts), allowed, &device);
                before = experts;
            }
        }
    }
}

/// The argument that an error names.
#[track_caller]
fn refused<T>(result: Result<T, Error>) -> &'static str {
    match result {
        Err(Error::Argument { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn what_an_operation_does_not_take_is_an_error_that_names_it() {
    for device in devices() {
        let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, (device.burn(), DType::F32));
        let vector = |len: usize| Tensor::<1>::zeros([len], (device.burn(), DType::F32));
        let layer = |dims: [usize; 3]| Matrices::random(30, dims).on(&device);
        let weight = layer([1, 64, 32]);
        assert_eq!(refused(mxfp4_linear(zeros([2, 64]), &weight, None)), "x");
        assert_eq!(refused(mxfp4_linear(zeros([0, 32]), &weight, None)), "x");
        assert_eq!(refused(mxfp4_linear(zeros([2, 32]).cast(DType::F16), &weight, None)), "x");
        assert_eq!(refused(mxfp4_linear(zeros([2, 32]), &weight, Some(vector(32)))), "bias");
        assert_eq!(refused(mxfp4_linear(zeros([2, 32]), &layer([2, 64, 32]), None)), "weight");
        let error = mxfp4_linear(zeros([2, 64]), &weight, None).unwrap_err().to_string();
        assert_eq!(error, "mxfp4_linear: x is F32 [2, 64], needed F32 [2, 32]");

        let host = Experts::random(4, 32, 64);
        let weights = host.on(&device);
        let x = || zeros([3, 32]);
        assert_eq!(refused(moe(zeros([3, 64]), &weights, 2, 7.0)), "x");
        assert_eq!(refused(moe(x(), &weights, 0, 7.0)), "num_active_experts");
        assert_eq!(refused(moe(x(), &weights, 5, 7.0)), "num_active_experts");
        for limit in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(moe(x(), &weights, 2, limit)), "swiglu_limit");
        }
        let other = MoeWeights { gate_up: layer([4, 64, 32]), ..weights.clone() };
        assert_eq!(refused(moe(x(), &other, 2, 7.0)), "gate_up");
        let other = MoeWeights { router: zeros([5, 32]), ..weights.clone() };
        assert_eq!(refused(moe(x(), &other, 2, 7.0)), "router");
        let other = MoeWeights { down_bias: zeros([4, 64]), ..weights };
        assert_eq!(refused(moe(x(), &other, 2, 7.0)), "down_bias");

        let rows = |shape: [usize; 3]| Tensor::<3>::zeros(shape, (device.burn(), DType::F32));
        let attend = |q, k, v, sinks, window, scale| {
            refused(sink_attention(rows(q), rows(k), rows(v), sinks, window, scale))
        };
        let (q, k) = ([2, 4, 8], [5, 2, 8]);
        assert_eq!(attend([6, 4, 8], k, k, None, None, 1.0), "q");
        assert_eq!(attend([2, 3, 8], k, k, None, None, 1.0), "q");
        assert_eq!(attend(q, [5, 2, 16], k, None, None, 1.0), "k");
        assert_eq!(attend(q, [5, 0, 8], k, None, None, 1.0), "k");
        assert_eq!(attend(q, k, [4, 2, 8], None, None, 1.0), "v");
        assert_eq!(attend(q, k, k, Some(vector(2)), None, 1.0), "sinks");
        assert_eq!(attend(q, k, k, None, Some(0), 1.0), "window");
        assert_eq!(attend(q, k, k, None, None, f32::NAN), "scale");
        if device.backend() != Backend::Cpu {
            let x = Tensor::zeros([2, 32], &burn::tensor::Device::flex());
            assert_eq!(refused(mxfp4_linear(x, &weight, None)), "weight");
        }
    }
}

#[test]
fn scales_that_no_model_bin_holds_are_refused() {
    let device = burn::tensor::Device::flex();
    let checkpoint =
        |scale| Mxfp4Linear::from_checkpoint(vec![0; 512], vec![scale; 32], [1, 32, 32], &device);
    assert!(checkpoint(240).is_ok());
    assert_eq!(checkpoint(241).unwrap_err().to_string(), "an MXFP4 scale of 241: needed 240 at most");
}

/// What devices with tensor cores take: rows in half precision, which they alone have, and caches of f16.
#[test]
fn rows_become_halves_and_pages() {
    use engine::kernels::method::Method;
    use engine::kernels::pages::{self, Pages};
    use engine::kernels::qkv::PAGE;
    use engine::kernels::rows::{from_words, to_words};
    use half::f16;

    for client in devices().iter().filter_map(Device::client) {
        let (positions, kv_heads, head_dim) = (PAGE + 7, 3, 10);
        let rows = random(40, positions * kv_heads * head_dim);
        let halves: Vec<f16> = rows.iter().map(|&value| f16::from_f32(value)).collect();
        let buffer = client.create_from_slice(bytemuck::cast_slice(&rows));
        let method = Method::of(&client);
        let words = to_words(&client, method, rows.len(), &buffer);
        let back = waiting(|| client.read_one(from_words(&client, method, rows.len(), &words))).unwrap();
        let rounded = rows.iter().map(|&value| match method {
            Method::TensorCores => half::bf16::from_f32(value).to_f32(),
            Method::Fragments => f16::from_f32(value).to_f32(),
            Method::Units => value,
        });
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&back), rounded.collect::<Vec<_>>());

        let of_cache = Pages { kv_heads, head_dim };
        assert_eq!(of_cache.elements(positions), 2 * PAGE * kv_heads * head_dim);
        let cache = client.create_from_slice(&vec![0; of_cache.elements(positions) * size_of::<f16>()]);
        pages::launch::<f16>(&client, of_cache, positions, &buffer, &cache);
        let cache = waiting(|| client.read_one(cache)).unwrap();
        let cache: &[f16] = bytemuck::cast_slice(&cache);
        for position in 0..2 * PAGE {
            for head in 0..kv_heads {
                let slot = ((position / PAGE * kv_heads + head) * PAGE + position % PAGE) * head_dim;
                let expected = match position < positions {
                    true => &halves[(position * kv_heads + head) * head_dim..][..head_dim],
                    false => &[f16::ZERO; 10],
                };
                assert_eq!(cache[slot..slot + head_dim], *expected, "position {position}, head {head}");
            }
        }
    }
}
