//! A mixture of experts whose matrices stay packed.
//!
//! ```text
//! x ─ router ─ top k ─ softmax over the k ──────────────────────┐ weights
//! └────────── experts' ids ─ gate_up ─ clamped SwiGLU ─ down ─ weighted sum
//! ```

use burn::backend::tensor::FloatTensor;
use burn::backend::{Dispatch, Flex};
use burn::tensor::{Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Arguments, GptOssBackend, MoePrimitives, Mxfp4Linear, in_steps};
use crate::error::Result;
use crate::kernels::mxfp4::Mxfp4Backend;
use crate::kernels::product::ProductBackend;
use crate::nn::rows::rows_of_step;
use crate::nn::swiglu::ALPHA;

/// Experts of a layer, at most.
pub const MOST_EXPERTS: usize = 256;
/// Experts that are selected for a token, at most.
pub const MOST_ACTIVE_EXPERTS: usize = 32;

/// The weights of a mixture of experts, all on one device.
#[derive(Clone, Debug)]
pub struct MoeWeights {
    /// f32 `[experts, embedding_dim]`.
    pub router: Tensor<2>,
    /// f32 `[experts]`.
    pub router_bias: Tensor<1>,
    /// `[experts, 2 · mlp_dim, embedding_dim]`: row `2i` is the gate of hidden unit `i`, row `2i + 1` its up part.
    pub gate_up: Mxfp4Linear,
    /// f32 `[experts, 2 · mlp_dim]`.
    pub gate_up_bias: Tensor<2>,
    /// `[experts, embedding_dim, mlp_dim]`.
    pub down: Mxfp4Linear,
    /// f32 `[experts, embedding_dim]`.
    pub down_bias: Tensor<2>,
}

/// The feed-forward part of a GPT-OSS block: for each token the experts of the largest `num_active_experts` logits of the router
/// (the lower id first among equals), summed with the softmax over these logits. An expert is
/// `down · (g · σ(1.702 g) · (u + 1)) + bias` with `g = min(gate, swiglu_limit)` and `u = clamp(up, −swiglu_limit, swiglu_limit)`.
///
/// - `x`: f32 `[tokens, embedding_dim]`, normalised already, at least one row;
/// - `num_active_experts`: 1 to [`MOST_ACTIVE_EXPERTS`], not more than there are experts, of which [`MOST_EXPERTS`] are most;
/// - `swiglu_limit`: positive and finite.
///
/// Result: f32 `[tokens, embedding_dim]`, without the residual. The router is computed in f32 on every device: its choice is a
/// step function, of logits that have to be numbers. Sums are f32. Tensor cores take `x` and the hidden units as bf16 (NVIDIA) or f16 (cooperative matrices), and
/// weights exactly as long as scales lie between 2^−33 and 2^3.
///
/// This is `MLPBlock.forward` of OpenAI's `gpt_oss/torch/model.py` 0.0.9 without its norm and residual.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where a shape, a type, a device or an option is another one.
pub fn moe(
    x: Tensor<2>,
    weights: &MoeWeights,
    num_active_experts: usize,
    swiglu_limit: f32,
) -> Result<Tensor<2>> {
    check(&x, weights, num_active_experts, swiglu_limit)?;
    let ([tokens, embedding_dim], [_, hidden, _]) = (x.dims(), weights.gate_up.dims());
    // What lies between the two products has to fit in a buffer of the device.
    let step = rows_of_step(num_active_experts * embedding_dim.max(hidden));
    Ok(in_steps(tokens, step, |first, count| {
        Tensor::from_dispatch(<Dispatch as GptOssBackend>::moe(
            x.clone().narrow(0, first, count).into_dispatch(),
            weights.primitives(),
            num_active_experts,
            swiglu_limit,
        ))
    }))
}

fn check(x: &Tensor<2>, weights: &MoeWeights, num_active_experts: usize, swiglu_limit: f32) -> Result<()> {
    let arguments = Arguments::new("moe", x.device())?;
    let ([tokens, _], [experts, embedding_dim, mlp_dim]) = (x.dims(), weights.down.dims());
    arguments.check(experts <= MOST_EXPERTS, "down", || {
        (format!("{experts} experts"), format!("{MOST_EXPERTS} at most"))
    })?;
    arguments.packed("down", &weights.down, weights.down.dims())?;
    arguments.packed("gate_up", &weights.gate_up, [experts, 2 * mlp_dim, embedding_dim])?;
    arguments.f32("down_bias", &weights.down_bias, [experts, embedding_dim])?;
    arguments.f32("gate_up_bias", &weights.gate_up_bias, [experts, 2 * mlp_dim])?;
    arguments.f32("router", &weights.router, [experts, embedding_dim])?;
    arguments.f32("router_bias", &weights.router_bias, [experts])?;
    arguments.positive("x", x.dims())?;
    arguments.f32("x", x, [tokens, embedding_dim])?;
    let most = experts.min(MOST_ACTIVE_EXPERTS);
    arguments.check((1..=most).contains(&num_active_experts), "num_active_experts", || {
        (num_active_experts.to_string(), format!("1 to {most}"))
    })?;
    arguments.check(swiglu_limit.is_finite() && swiglu_limit > 0.0, "swiglu_limit", || {
        (swiglu_limit.to_string(), "a positive, finite number".into())
    })
}

impl MoeWeights {
    fn primitives(&self) -> MoePrimitives<Dispatch> {
        let (gate_up_blocks, gate_up_scales) = self.gate_up.tensors();
        let (down_blocks, down_scales) = self.down.tensors();
        MoePrimitives {
            router: self.router.clone().into_dispatch(),
            router_bias: self.router_bias.clone().into_dispatch(),
            gate_up_blocks: gate_up_blocks.into_dispatch(),
            gate_up_scales: gate_up_scales.into_dispatch(),
            gate_up_bias: self.gate_up_bias.clone().into_dispatch(),
            down_blocks: down_blocks.into_dispatch(),
            down_scales: down_scales.into_dispatch(),
            down_bias: self.down_bias.clone().into_dispatch(),
        }
    }
}

/// f32 `[tokens, experts]`.
fn router_logits<B: ProductBackend>(
    x: FloatTensor<B>,
    router: FloatTensor<B>,
    bias: FloatTensor<B>,
    experts: usize,
) -> FloatTensor<B> {
    let logits = B::f32_product(x, B::float_transpose(router));
    B::float_add(logits, B::float_reshape(bias, [1, experts].into()))
}

pub(super) fn on_processor(
    x: FlexTensor,
    weights: MoePrimitives<Flex>,
    num_active_experts: usize,
    swiglu_limit: f32,
) -> FlexTensor {
    let (tokens, embedding_dim) = (x.layout().shape()[0], x.layout().shape()[1]);
    let (experts, rows) =
        (weights.gate_up_blocks.layout().shape()[0], weights.gate_up_blocks.layout().shape()[1]);
    let logits =
        router_logits::<Flex>(x.clone(), weights.router, weights.router_bias, experts).to_contiguous();
    let selected =
        logits.storage::<f32>().chunks(experts).flat_map(|logits| select(logits, num_active_experts));
    let (ids, shares): (Vec<u32>, Vec<f32>) = selected.unzip();
    let experts = FlexTensor::from_data(TensorData::new(ids.clone(), [ids.len()]));
    let gate_up =
        Flex::mxfp4_select_and_multiply(x, weights.gate_up_blocks, weights.gate_up_scales, experts.clone());
    let bias = weights.gate_up_bias.to_contiguous();
    let mut hidden = vec![0.0; ids.len() * rows / 2];
    hidden.par_chunks_mut(rows / 2).zip(gate_up.storage::<f32>().par_chunks(rows)).zip(&ids).for_each(
        |((hidden, gate_up), &expert)| {
            let bias = &bias.storage::<f32>()[expert as usize * rows..][..rows];
            let pairs = gate_up.as_chunks::<2>().0.iter().zip(bias.as_chunks::<2>().0);
            for (hidden, ([gate, up], [gate_bias, up_bias])) in hidden.iter_mut().zip(pairs) {
                *hidden = swiglu(gate + gate_bias, up + up_bias, swiglu_limit);
            }
        },
    );
    let hidden = FlexTensor::from_data(TensorData::new(hidden, [ids.len(), rows / 2]));
    let down = Flex::mxfp4_select_and_multiply(hidden, weights.down_blocks, weights.down_scales, experts);
    let bias = weights.down_bias.to_contiguous();
    let mut y = vec![0.0; tokens * embedding_dim];
    y.par_chunks_mut(embedding_dim).enumerate().for_each(|(token, y)| {
        for pair in token * num_active_experts..(token + 1) * num_active_experts {
            let down = &down.storage::<f32>()[pair * embedding_dim..][..embedding_dim];
            let bias = &bias.storage::<f32>()[ids[pair] as usize * embedding_dim..][..embedding_dim];
            for ((y, down), bias) in y.iter_mut().zip(down).zip(bias) {
                *y += shares[pair] * (down + bias);
            }
        }
    });
    FlexTensor::from_data(TensorData::new(y, [tokens, embedding_dim]))
}

/// The ids of the `count` largest logits, those that are not numbers last, and their softmax.
fn select(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |id: u32| logits[id as usize];
    // Stable: the lower id stays first among equals.
    ids.sort_by(|&a, &b| {
        let numbers = logit(b).partial_cmp(&logit(a));
        numbers.unwrap_or_else(|| logit(a).is_nan().cmp(&logit(b).is_nan()))
    });
    ids.truncate(count);
    let exponential = |id: u32| (logit(id) - logit(ids[0])).exp();
    let sum: f32 = ids.iter().map(|&id| exponential(id)).sum();
    ids.iter().map(|&id| (id, exponential(id) / sum)).collect()
}

fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    // `min` would make a number of what is none.
    let (gate, up) = (if gate > limit { limit } else { gate }, up.clamp(-limit, limit));
    gate / (1.0 + (-ALPHA * gate).exp()) * (up + 1.0)
}

pub(super) use cube::on_gpu;

mod cube {
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::FloatDType;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};

    use super::*;
    use crate::extension::cube::f32_beside;
    use crate::kernels::dispatch::{self, Dispatch};
    use crate::kernels::grouped::{self, Grouped};
    use crate::kernels::method::Method;
    use crate::kernels::rows::to_words;

    pub(in crate::extension) fn on_gpu(
        x: CubeTensor,
        weights: MoePrimitives<CubeBackend>,
        num_active_experts: usize,
        swiglu_limit: f32,
    ) -> CubeTensor {
        let x = into_contiguous(x);
        let shape = weights.down_blocks.meta.shape();
        let (experts, embedding_dim, mlp_dim) = (shape[0], shape[1], shape[2] * 8);
        let tokens = x.meta.shape()[0];
        let logits = router_logits::<CubeBackend>(x.clone(), weights.router, weights.router_bias, experts);
        let logits = into_contiguous(logits);
        let client = &x.client;
        let method = Method::of(client);
        let grouped = Grouped {
            experts,
            active: num_active_experts,
            embedding_dim,
            mlp_dim,
            limit: swiglu_limit.to_bits(),
        };
        let sorted =
            Dispatch { experts, active: num_active_experts, tile: grouped.pairs_of_tile(client, tokens) };
        let tiles = sorted.tiles(tokens);
        let pairs = tokens * num_active_experts;
        let words = |count: usize| client.empty(count * size_of::<u32>());
        let selection = dispatch::Buffers {
            logits: &logits.handle,
            ids: &words(pairs),
            shares: &words(pairs),
            order: &words(pairs),
            starts: &words(experts + 1),
            tiles: &words(4 * tiles),
        };
        dispatch::launch(client, sorted, tokens, &selection);
        let [codes, scales, bias] =
            [weights.gate_up_blocks, weights.gate_up_scales, weights.gate_up_bias].map(into_contiguous);
        let hidden = words(method.words(pairs * mlp_dim));
        let gate_up = grouped::Buffers {
            x: &to_words(client, method, tokens * embedding_dim, &x.handle),
            order: selection.order,
            tiles: selection.tiles,
            codes: &codes.handle,
            scales: &scales.handle,
            bias: &bias.handle,
            y: &hidden,
        };
        grouped::gate_up(client, grouped, tokens, tiles, &gate_up);
        let [codes, scales, bias] =
            [weights.down_blocks, weights.down_scales, weights.down_bias].map(into_contiguous);
        let outputs = words(pairs * embedding_dim);
        let down = grouped::Buffers {
            x: &hidden,
            codes: &codes.handle,
            scales: &scales.handle,
            bias: &bias.handle,
            y: &outputs,
            ..gate_up
        };
        grouped::down(client, grouped, tokens, tiles, &down);
        // The sum is added to what is there.
        let y = CubeBackend::float_zeros([tokens, embedding_dim].into(), &x.device, FloatDType::F32);
        let y = into_contiguous(y);
        grouped::combine(client, grouped, tokens, &outputs, selection.shares, &y.handle);
        f32_beside(&x, [tokens, embedding_dim], y.handle)
    }
}
