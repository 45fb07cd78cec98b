//! The building blocks against float64 evaluations of their formulas, written out plainly, on every device.

use crate::devices::devices;
use burn::tensor::{DType, Int, Tensor, TensorData};
use engine::Error;
use engine::backend::{Device, Float};
use engine::gpt_oss::model::read;
use engine::kernels::product::product;
use engine::nn::attention::{Attention, Visibility, quiet_softmax};
use engine::nn::bias::{Alibi, BiasProvider, BiasRequest};
use engine::nn::cache::{CacheLayout, KvCache};
use engine::nn::embedding::TokenTable;
use engine::nn::linear::Linear;
use engine::nn::moe::{ExpertLinear, Moe, Router};
use engine::nn::mxfp4::Mxfp4Linear;
use engine::nn::norm::RmsNorm;
use engine::nn::rope::{Frequencies, Pairing, Yarn};
use engine::nn::swiglu::swiglu;
use engine::sampling::{Options, SampleError, Sampler};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0f32..2.0)).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device.burn(), DType::F32))
}

/// The largest difference relative to the largest value.
fn error(found: &[f32], truth: &[f64]) -> f64 {
    assert_eq!(found.len(), truth.len());
    let largest = truth.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
    let differences = found.iter().zip(truth).map(|(&found, truth)| (f64::from(found) - truth).abs());
    let worst = differences.fold(0.0, f64::max);
    assert!(found.iter().all(|value| value.is_finite()));
    worst / largest
}

#[track_caller]
fn assert_close<const D: usize>(found: Tensor<D>, truth: &[f64], device: &Device) {
    let error = error(&read(found).unwrap(), truth);
    assert!(error < 2e-6, "{}: relative error {error:e}", device.backend());
}

/// 10 bits of precision, those of TF32, would be a hundred times the tolerance.
#[test]
fn products_of_f32_are_f32() {
    for [batch, m, k, n] in [[1, 1, 2880, 70], [1, 33, 129, 65], [3, 5, 64, 40]] {
        let (a, b) = (random(30, batch * m * k), random(31, batch * n * k));
        let mut truth = vec![0.0; batch * m * n];
        for (index, value) in truth.iter_mut().enumerate() {
            let (batch, row, column) = (index / (m * n), index / n % m, index % n);
            let a = &a[(batch * m + row) * k..][..k];
            let b = &b[(batch * n + column) * k..][..k];
            *value = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        }
        for device in devices() {
            // As weights are stored: transposed.
            let rhs = tensor(&b, [batch, n, k], &device).swap_dims(1, 2);
            assert_close(product(tensor(&a, [batch, m, k], &device), rhs), &truth, &device);
        }
    }
}

#[test]
fn rms_norm_divides_by_the_root_of_the_mean_square() {
    let (x, scale) = (random(1, 3 * 40), random(2, 40));
    let truth: Vec<f64> = x
        .chunks(40)
        .flat_map(|row| {
            let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 40.0;
            let root = (mean + 1e-5).sqrt();
            row.iter().zip(&scale).map(move |(&v, &s)| f64::from(v) / root * f64::from(s)).collect::<Vec<_>>()
        })
        .collect();
    for device in devices() {
        let norm = RmsNorm { scale: tensor(&scale, [40], &device), epsilon: 1e-5 };
        assert_close(norm.forward(tensor(&x, [3, 40], &device)), &truth, &device);
    }
}

#[test]
fn swiglu_clamps_the_gate_above_and_the_up_part_on_both_sides() {
    let x: Vec<f32> = random(3, 200).into_iter().map(|v| v * 2.0).collect();
    let limit = 1.5;
    let truth: Vec<f64> = x
        .chunks(2)
        .map(|pair| {
            let (gate, up) = (f64::from(pair[0]).min(limit), f64::from(pair[1]).clamp(-limit, limit));
            gate / (1.0 + (-1.702f32 as f64 * gate).exp()) * (up + 1.0)
        })
        .collect();
    for device in devices() {
        assert_close(swiglu(tensor(&x, [5, 40], &device), limit as f32), &truth, &device);
    }
}

/// The defaults of the released models.
const YARN: Yarn = Yarn {
    rope_theta: 150000.0,
    interpolation_scale: 1.0 / 32.0,
    yarn_offset: -0.870_677_4,
    yarn_scale: 0.107_466_27,
    yarn_multiplier: 1.346_573_6,
};

#[test]
fn yarn_keeps_high_frequencies_and_divides_low_ones() {
    let plain = Frequencies::plain(150000.0, 64);
    let yarn = Frequencies::yarn(&YARN, 64);
    assert_eq!(yarn.inverse[0], plain.inverse[0]);
    assert_eq!(yarn.inverse[8], plain.inverse[8]);
    assert!((yarn.inverse[31] * 32.0 / plain.inverse[31] - 1.0).abs() < 1e-12);
    let middle = yarn.inverse[12] / plain.inverse[12];
    assert!(middle < 1.0 && middle > 1.0 / 32.0, "{middle}");
}

#[test]
fn rope_turns_pairs_by_position_times_frequency() {
    let (tokens, heads) = (3, 2);
    let x = random(4, tokens * heads * 64);
    let frequencies = Frequencies::yarn(&YARN, 64);
    let positions = [0usize, 1, 100_000];
    for (pairing, pair) in [
        (Pairing::Interleaved, (|i| (2 * i, 2 * i + 1)) as fn(usize) -> (usize, usize)),
        (Pairing::HalfSplit, |i| (i, i + 32)),
    ] {
        let mut truth = vec![0.0f64; x.len()];
        for (t, position) in positions.iter().enumerate() {
            for h in 0..heads {
                let start = (t * heads + h) * 64;
                for i in 0..32 {
                    let (a, b) = pair(i);
                    let angle = *position as f64 * frequencies.inverse[i];
                    let (re, im) = (f64::from(x[start + a]), f64::from(x[start + b]));
                    truth[start + a] = (re * angle.cos() - im * angle.sin()) * YARN.yarn_multiplier;
                    truth[start + b] = (im * angle.cos() + re * angle.sin()) * YARN.yarn_multiplier;
                }
            }
        }
        for device in devices() {
            let table = frequencies.table(positions, device.burn());
            assert_close(table.rotate(tensor(&x, [tokens, heads, 64], &device), pairing), &truth, &device);
        }
    }
}

/// One query head at a time, in f64, straight from the definition.
struct NaiveAttention<'a> {
    heads: usize,
    kv_heads: usize,
    width: usize,
    sinks: Option<&'a [f32]>,
    window: Option<usize>,
    slopes: Option<&'a [f32]>,
}

impl NaiveAttention<'_> {
    /// `q` `[tokens, heads, width]`, `k` and `v` `[kv_heads, keys, width]`; the last query is at the last key.
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f64> {
        let (heads, width) = (self.heads, self.width);
        let tokens = q.len() / heads / width;
        let keys = k.len() / self.kv_heads / width;
        let mut out = vec![0.0; q.len()];
        for t in 0..tokens {
            let position = keys - tokens + t;
            for h in 0..heads {
                let group = h / (heads / self.kv_heads);
                let query = &q[(t * heads + h) * width..][..width];
                let visible =
                    (0..=position).filter(|key| self.window.is_none_or(|window| position - key < window));
                let at = |values: &[f32], key: usize, i: usize| {
                    f64::from(values[(group * keys + key) * width + i])
                };
                let exponentials: Vec<(usize, f64)> = visible
                    .map(|key| {
                        let dot: f64 = (0..width).map(|i| f64::from(query[i]) * at(k, key, i)).sum();
                        let bias =
                            self.slopes.map_or(0.0, |slopes| -f64::from(slopes[h]) * (position - key) as f64);
                        (key, (0.3f32 as f64 * dot + bias).exp())
                    })
                    .collect();
                let sink = self.sinks.map_or(0.0, |sinks| f64::from(sinks[h]).exp());
                let sum = exponentials.iter().map(|(_, e)| e).sum::<f64>() + sink;
                for i in 0..width {
                    let total: f64 = exponentials.iter().map(|&(key, e)| e * at(v, key, i)).sum();
                    out[(t * heads + h) * width + i] = total / sum;
                }
            }
        }
        out
    }
}

#[test]
fn attention_with_every_option_follows_its_definition() {
    let (tokens, keys, heads, kv_heads, width) = (7, 19, 6, 2, 16);
    let (q, k, v) = (
        random(5, tokens * heads * width),
        random(6, kv_heads * keys * width),
        random(7, kv_heads * keys * width),
    );
    let sinks = random(8, heads);
    let alibi = Alibi::new(heads);
    for device in devices() {
        for (with_sinks, window, with_bias) in [
            (false, None, false),
            (true, None, false),
            (true, Some(5), false),
            (false, Some(1), true),
            (true, Some(64), true),
        ] {
            let naive = NaiveAttention {
                heads,
                kv_heads,
                width,
                sinks: with_sinks.then_some(&sinks),
                window,
                slopes: with_bias.then_some(&alibi.slopes),
            };
            let attention = Attention {
                scale: 0.3,
                sinks: with_sinks.then(|| tensor(&sinks, [heads], &device)),
                bias: with_bias.then_some(&alibi as &dyn BiasProvider),
                layer: 0,
            };
            let seen = Visibility::causal(keys - tokens..keys, (0..keys).collect(), window, device.burn());
            let out = attention.forward(
                tensor(&q, [tokens, heads, width], &device),
                tensor(&k, [kv_heads, keys, width], &device),
                tensor(&v, [kv_heads, keys, width], &device),
                &seen,
            );
            assert_close(out, &naive.forward(&q, &k, &v), &device);
        }
    }
}

/// 300 queries of 60,000 keys: 72 MB of mask, where a device's buffers may end at 128 MiB and half of that is used.
#[test]
fn masks_larger_than_a_step_equal_the_definition() {
    let (tokens, keys, heads, width, window) = (300, 60_000, 2, 4, Some(50));
    let [q, k, v] =
        [(9, tokens), (10, keys), (11, keys)].map(|(seed, rows)| random(seed, rows * heads * width));
    let naive = NaiveAttention { heads, kv_heads: heads, width, sinks: None, window, slopes: None };
    let truth = naive.forward(&q, &k, &v);
    for device in devices() {
        let attention = Attention::scaled(0.3);
        let seen = Visibility::causal(keys - tokens..keys, (0..keys).collect(), window, device.burn());
        let [k, v] = [&k, &v].map(|values| tensor(values, [heads, keys, width], &device));
        let out = attention.forward(tensor(&q, [tokens, heads, width], &device), k, v, &seen);
        assert_close(out, &truth, &device);
    }
}

#[test]
fn quiet_softmax_can_attend_to_nothing() {
    let scores = [-3.0f32, 0.5, 2.0, -40.0, -50.0, -60.0];
    let truth: Vec<f64> = scores
        .chunks(3)
        .flat_map(|row| {
            let sum: f64 = row.iter().map(|&s| f64::from(s).exp()).sum();
            row.iter().map(move |&s| f64::from(s).exp() / (sum + 1.0)).collect::<Vec<_>>()
        })
        .collect();
    for device in devices() {
        assert_close(quiet_softmax(tensor(&scores, [1, 2, 3], &device)), &truth, &device);
    }
}

#[test]
fn alibi_has_the_slopes_of_the_paper_and_parts_equal_the_whole() {
    // Press et al.: 8 heads have 1/2, 1/4, … 1/256.
    assert_eq!(Alibi::new(8).slopes, [1, 2, 3, 4, 5, 6, 7, 8].map(|i| 0.5f32.powi(i)));
    // Their code, for 12 heads: those of 8, then every other one of 16.
    let twelve = Alibi::new(12).slopes;
    assert_eq!(twelve[..8], Alibi::new(8).slopes);
    assert_eq!(twelve[8..], [0, 2, 4, 6].map(|i| Alibi::new(16).slopes[i]));
    let alibi = Alibi::new(4);
    let keys: Vec<usize> = (0..9).collect();
    for device in devices() {
        let part = |queries, keys: &[usize]| {
            let request = BiasRequest { layer: 0, batch: 1, heads: 4, queries, keys };
            alibi.bias(&request, device.burn()).unwrap().squeeze_dim::<3>(0)
        };
        let whole = part(5..9, &keys);
        let rows = Tensor::cat(vec![part(5..6, &keys), part(6..9, &keys)], 1);
        let columns = Tensor::cat(vec![part(5..9, &keys[..4]), part(5..9, &keys[4..])], 2);
        let whole = read(whole).unwrap();
        assert_eq!(whole, read(rows).unwrap());
        assert_eq!(whole, read(columns).unwrap());
        assert_eq!(whole[..9], [5, 4, 3, 2, 1, 0, -1, -2, -3].map(|behind| -0.25 * behind as f32));
    }
}

/// Feeds positions as values, in chunks of random lengths, and compares with the list of positions that a window (or
/// all of the past) holds.
#[test]
fn caches_return_the_keys_at_the_positions_they_name() {
    for device in devices() {
        for float in [Float::F32, Float::F16] {
            let windows = vec![Some(4), None, Some(7), Some(1)];
            let layout =
                CacheLayout { kv_heads: 2, head_dim: 2, float, context: 600, windows: windows.clone() };
            let mut cache = KvCache::new(layout.into(), device.burn());
            let mut rng = ChaCha8Rng::seed_from_u64(9);
            let mut snapshots = Vec::new();
            for round in 0..24 {
                let count = *[1, 1, 2, 3, 5, 9, 40].get(rng.random_range(0..7)).unwrap();
                let positions = cache.next(count).unwrap();
                for (layer, window) in windows.iter().enumerate() {
                    // Head 0 holds the position, head 1 its negative; the width repeats it.
                    let value = |sign: f32| positions.clone().flat_map(move |p| [sign * p as f32; 2]);
                    let values: Vec<f32> = value(1.0).chain(value(-1.0)).collect();
                    let given = tensor(&values, [2, count, 2], &device);
                    let (keys, values) = cache.append(layer, given.clone(), given);
                    let named = cache.key_positions(*window, count);
                    let heads = [1.0, -1.0];
                    let expected: Vec<f32> = heads
                        .iter()
                        .flat_map(|sign| named.iter().flat_map(move |&p| [sign * p as f32; 2]))
                        .collect();
                    assert_eq!(read(keys).unwrap(), expected);
                    assert_eq!(read(values).unwrap(), expected);
                    // Everything that the first and the last new token may see is there.
                    let mut sorted = named.clone();
                    sorted.sort_unstable();
                    let oldest = window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
                    assert!((oldest..positions.end).all(|p| sorted.binary_search(&p).is_ok()));
                    assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]));
                }
                cache.advance(count);
                if round % 5 == 0 {
                    snapshots.push(cache.snapshot());
                }
                if round % 7 == 6 {
                    let snapshot = &snapshots[rng.random_range(0..snapshots.len())];
                    cache.restore(snapshot);
                    assert_eq!(cache.len(), snapshot.len());
                    let len = cache.len();
                    snapshots.retain(|snapshot| snapshot.len() <= len);
                }
            }
        }
    }
}

#[test]
fn caches_of_the_released_models_take_what_their_sizes_say() {
    // 24 blocks, 8 key heads of 64, a window of 128 in every other block, in half precision.
    let windows = (0..24).map(|block| (block % 2 == 0).then_some(128)).collect();
    let layout = CacheLayout { kv_heads: 8, head_dim: 64, float: Float::F16, context: 131_072, windows };
    assert_eq!(layout.snapshot_bytes(), 3 << 20);
    assert_eq!(layout.bytes(131_072), (3 << 20) + (12 * 131_072 * 2 * 8 * 64 * 2));
    assert_eq!(layout.longest(layout.bytes(5000)), 5000);
    assert_eq!(layout.longest(layout.bytes(5000) - 1), 4999);
    assert_eq!((layout.longest(1 << 20), layout.longest(1 << 50)), (0, 131_072));
}

#[test]
fn a_cache_refuses_more_than_its_context() {
    let device = &devices()[0];
    let layout = CacheLayout { kv_heads: 1, head_dim: 2, float: Float::F32, context: 3, windows: vec![None] };
    let cache = KvCache::new(layout.into(), device.burn());
    assert!(cache.next(3).is_ok());
    assert!(matches!(cache.next(4), Err(engine::Error::Length { length: 4, context: 3 })));
    assert!(matches!(cache.next(0), Err(engine::Error::Length { .. })));
}

#[test]
fn token_tables_in_parts_equal_the_whole() {
    let values = random(10, 11 * 8);
    let x = random(11, 3 * 8);
    let tokens = [10u32, 0, 3, 4, 4, 9];
    let rows: Vec<f64> =
        tokens.iter().flat_map(|&t| values[t as usize * 8..][..8].iter().map(|&v| f64::from(v))).collect();
    let logits: Vec<f64> = x
        .chunks(8)
        .flat_map(|x| {
            values
                .chunks(8)
                .map(move |row| x.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum())
        })
        .collect();
    for device in devices() {
        for rows_of_part in [11, 4, 1] {
            let parts =
                values.chunks(rows_of_part * 8).map(|part| tensor(part, [part.len() / 8, 8], &device));
            let table = TokenTable { parts: parts.collect(), compute: Float::F32 };
            assert_eq!(table.vocabulary(), 11);
            assert_close(table.rows(&tokens), &rows, &device);
            assert_close(table.logits(tensor(&x, [3, 8], &device)), &logits, &device);
        }
    }
}

/// A part that the device has no room for must not be taken for zeros because other parts were computed.
#[test]
fn what_could_not_be_computed_is_an_error_behind_other_parts_too() {
    for device in devices() {
        // Converting all of a table to f32 at once passes the limit of a buffer; large limits would take large tables.
        let Some(limit) = device.max_buffer().filter(|&limit| limit <= 1 << 28) else { continue };
        let rows = (limit / (64 * 4)) as usize + 64;
        let table = |rows: usize| Tensor::<2>::ones([rows, 64], (device.burn(), DType::F16));
        let logits = || {
            let table = TokenTable { parts: vec![table(rows), table(64)], compute: Float::F32 };
            table.logits(Tensor::ones([1, 64], device.burn())).squeeze_dim::<1>(0)
        };
        assert!(matches!(read(logits()), Err(Error::Device(_))));
        assert!(matches!(read(logits().narrow(0, rows, 64)), Err(Error::Device(_))));
        for options in [Options::greedy(), Options::default()] {
            let sampled = Sampler::new(options).unwrap().sample_tensor(logits());
            assert!(matches!(sampled, Err(SampleError::Device(_))), "{sampled:?}");
        }
    }
}

/// Random packed matrices, and their values by the decoder of `formats`.
fn packed(
    seed: u64,
    [experts, rows, columns]: [usize; 3],
    scales: std::ops::RangeInclusive<u8>,
) -> (Vec<u8>, Vec<u8>, Vec<f64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = experts * rows * columns;
    let mut blocks = vec![0u8; count / 2];
    rng.fill_bytes(&mut blocks);
    let unbiased: Vec<u8> = (0..count / 32).map(|_| rng.random_range(scales.clone())).collect();
    let values = blocks
        .chunks(16)
        .zip(&unbiased)
        .flat_map(|(block, &scale)| {
            block.iter().flat_map(|byte| [byte & 15, byte >> 4]).map(move |code| {
                let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
                let sign = if code >= 8 { -1.0 } else { 1.0 };
                sign * magnitude * (f64::from(scale) - 127.0).exp2()
            })
        })
        .collect();
    let stored = unbiased.into_iter().map(|scale| scale + 14).collect();
    (blocks, stored, values)
}

#[test]
fn packed_products_equal_products_with_the_decoded_matrices() {
    // Widths of an odd number of blocks, of more blocks than lanes, and one block; all codes and many scales occur.
    for (experts, rows, columns, inputs, active) in
        [(3, 64, 96, 5, 2), (2, 32, 32, 1, 2), (5, 96, 2880, 2, 4)]
    {
        let (blocks, scales, weights) = packed(12, [experts, rows, columns], 118..=130);
        let x = random(13, inputs * columns);
        let mut rng = ChaCha8Rng::seed_from_u64(14);
        let pairs = inputs * active;
        let ids: Vec<i32> = (0..pairs).map(|_| rng.random_range(0..experts as i32)).collect();
        let truth: Vec<f64> = ids
            .iter()
            .enumerate()
            .flat_map(|(pair, &expert)| {
                let x = &x[pair / active * columns..][..columns];
                let matrix = &weights[expert as usize * rows * columns..][..rows * columns];
                matrix.chunks(columns).map(move |row| x.iter().zip(row).map(|(&a, b)| f64::from(a) * b).sum())
            })
            .collect();
        for device in devices() {
            let layer = Mxfp4Linear::from_stored(
                blocks.clone(),
                scales.clone(),
                [experts, rows, columns],
                device.burn(),
            )
            .unwrap();
            let experts_of_pairs = Tensor::<1, Int>::from_data(ids.as_slice(), device.burn());
            let out = layer.forward(tensor(&x, [inputs, columns], &device), experts_of_pairs);
            assert_close(out, &truth, &device);
        }
    }
}

#[test]
fn plain_tensor_decoding_is_exact() {
    let dims = [2, 32, 64];
    let (blocks, scales, values) = packed(15, dims, 0..=240);
    for device in devices() {
        let layer = Mxfp4Linear::from_stored(blocks.clone(), scales.clone(), dims, device.burn()).unwrap();
        assert_eq!(layer.dims(), dims);
        let decoded = read(layer.decoded()).unwrap();
        for (found, truth) in decoded.into_iter().zip(&values) {
            // GPUs may flush what is below the smallest normal number.
            let flushed = found == 0.0 && truth.abs() < f64::from(f32::MIN_POSITIVE);
            assert!(
                f64::from(found) == *truth || (device.backend() != engine::backend::Backend::Cpu && flushed)
            );
        }
        let second = read(layer.expert(1).decoded()).unwrap();
        assert!(
            second
                .iter()
                .zip(&values[32 * 64..])
                .all(|(&found, truth)| found == *truth as f32 || found == 0.0)
        );
    }
}

#[test]
fn extreme_scales_neither_overflow_nor_vanish() {
    // The largest and the smallest scale of the format, with inputs that bring products back to ordinary size.
    let (rows, columns) = (32, 32);
    for (scale, input) in [(240u8, 2f32.powi(-113)), (1, 2f32.powi(120))] {
        let (blocks, _, _) = packed(16, [1, rows, columns], 127..=127);
        let truth: Vec<f64> = blocks
            .chunks(16)
            .map(|block| {
                let codes = block.iter().flat_map(|byte| [byte & 15, byte >> 4]);
                let value = |code: u8| {
                    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
                    if code >= 8 { -magnitude } else { magnitude }
                };
                codes.map(value).sum::<f64>() * (f64::from(scale) - 127.0).exp2() * f64::from(input)
            })
            .collect();
        for device in devices() {
            let stored = vec![scale + 14; rows];
            let layer =
                Mxfp4Linear::from_stored(blocks.clone(), stored, [1, rows, columns], device.burn()).unwrap();
            let x = tensor(&vec![input; columns], [1, columns], &device);
            let out = layer.forward(x, Tensor::<1, Int>::from_data([0], device.burn()));
            assert_close(out, &truth, &device);
        }
    }
}

#[test]
fn packed_matrices_of_impossible_sizes_are_refused() {
    let device = &devices()[0];
    for dims in [[1, 32, 48], [1, 16, 32], [0, 32, 32], [1, 64, 32], [usize::MAX, 32, 32]] {
        let found = Mxfp4Linear::from_stored(vec![0; 512], vec![0; 32], dims, device.burn());
        assert!(found.is_err(), "{dims:?}");
    }
}

#[test]
fn experts_packed_and_dequantised_agree_with_the_definition() {
    let (tokens, experts, width, mlp, active) = (6, 5, 64, 32, 4);
    let (blocks1, scales1, weights1) = packed(17, [experts, 2 * mlp, width], 121..=124);
    let (blocks2, scales2, weights2) = packed(18, [experts, width, mlp], 121..=124);
    let (x, gate, gate_bias) = (random(19, tokens * width), random(20, experts * width), random(21, experts));
    let (bias1, bias2) = (random(22, experts * 2 * mlp), random(23, experts * width));
    let row = |x: &[f64], weights: &[f64]| x.iter().zip(weights).map(|(a, b)| a * b).sum::<f64>();
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let mut truth = Vec::new();
    for x in wide(&x).chunks(width) {
        let mut logits: Vec<(usize, f64)> = (wide(&gate).chunks(width).zip(&gate_bias))
            .map(|(gate, &bias)| row(x, gate) + f64::from(bias))
            .enumerate()
            .collect();
        logits.sort_by(|a, b| b.1.total_cmp(&a.1));
        let sum: f64 = logits[..active].iter().map(|(_, logit)| logit.exp()).sum();
        let mut out = vec![0.0; width];
        for &(expert, logit) in &logits[..active] {
            let matrix = &weights1[expert * 2 * mlp * width..][..2 * mlp * width];
            let gate_up: Vec<f64> = (matrix.chunks(width).zip(&bias1[expert * 2 * mlp..]))
                .map(|(weights, &bias)| row(x, weights) + f64::from(bias))
                .collect();
            let hidden: Vec<f64> = gate_up
                .chunks(2)
                .map(|pair| {
                    let (gate, up) = (pair[0].min(7.0), pair[1].clamp(-7.0, 7.0));
                    gate / (1.0 + (-f64::from(1.702f32) * gate).exp()) * (up + 1.0)
                })
                .collect();
            let matrix = &weights2[expert * width * mlp..][..width * mlp];
            for (i, weights) in matrix.chunks(mlp).enumerate() {
                out[i] += (row(&hidden, weights) + f64::from(bias2[expert * width + i])) * logit.exp() / sum;
            }
        }
        truth.extend(out);
    }
    for device in devices() {
        let layer = |blocks: &[u8], scales: &[u8], dims| {
            Mxfp4Linear::from_stored(blocks.to_vec(), scales.to_vec(), dims, device.burn()).unwrap()
        };
        let packed = [
            layer(&blocks1, &scales1, [experts, 2 * mlp, width]),
            layer(&blocks2, &scales2, [experts, width, mlp]),
        ];
        let dequantized = packed.clone().map(|layer| {
            let [_, rows, columns] = layer.dims();
            let matrices = (0..experts).map(|expert| layer.expert(expert).decoded().reshape([rows, columns]));
            ExpertLinear::Dequantized(matrices.collect())
        });
        for [mlp1, mlp2] in [packed.map(|layer| ExpertLinear::Packed(layer.into())), dequantized] {
            let moe = Moe {
                router: Router {
                    gate: Linear {
                        weight: tensor(&gate, [experts, width], &device),
                        bias: Some(tensor(&gate_bias, [experts], &device)),
                        compute: Float::F32,
                    },
                    active,
                },
                mlp1,
                mlp1_bias: tensor(&bias1, [experts, 2 * mlp], &device),
                mlp2,
                mlp2_bias: tensor(&bias2, [experts, width], &device),
                swiglu_limit: 7.0,
                compute: Float::F32,
            };
            assert_close(moe.forward(tensor(&x, [tokens, width], &device)), &truth, &device);
            // More pairs of tokens and experts than a kernel has cubes on an axis.
            let many = 65_536 / (tokens * active) + 1;
            let x = tensor(&x.repeat(many), [many * tokens, width], &device);
            assert_close(moe.forward(x), &truth.repeat(many), &device);
        }
    }
}
