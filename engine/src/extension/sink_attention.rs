//! Causal attention with sinks, a sliding window and grouped queries.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::{Arguments, GptOssBackend, in_steps};
use crate::error::Result;

/// Attention of the last `tokens` of `positions`: the query of position `p` sees the keys of positions
/// `p − window + 1 ..= p`, or all up to its own without a window. A head's sink is a logit that takes part in the softmax and has no
/// value: `Σ exp(s) · v / (Σ exp(s) + exp(sink))` with the scores `s = scale · q·k`.
///
/// - `q`: f32 `[tokens, heads, head_dim]`, 1 to `positions` tokens;
/// - `k`, `v`: f32 `[positions, kv_heads, head_dim]`; query head `h` reads key head `h / (heads / kv_heads)`;
/// - `sinks`: f32 `[heads]`; without them this is the ordinary softmax;
/// - `window`: positions that a query sees, its own included, at least 1;
/// - `scale`: a finite number, `1 / √head_dim` in GPT-OSS.
///
/// Result: f32 `[tokens, heads, head_dim]`. Softmax and sums are f32. On GPUs with NVIDIA's tensor cores keys and values pass
/// through f16, for heads of 64 the scaled queries as well (so all have to lie within ±65504), and the result through bf16; on
/// those with other cooperative matrices the result passes through f16. Keys and values have to be finite on GPUs, those that no
/// query sees, too. Everything else is f32. GPUs have a kernel for heads
/// in multiples of 8 that fit in shared memory; other widths are computed by [`crate::nn::attention`].
///
/// This is `sdpa` of OpenAI's `gpt_oss/torch/model.py` 0.0.9, for the last of the queries.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where a shape, a type, a device or an option is another one.
pub fn sink_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    sinks: Option<Tensor<1>>,
    window: Option<usize>,
    scale: f32,
) -> Result<Tensor<3>> {
    let arguments = Arguments::new("sink_attention", q.device())?;
    let ([tokens, heads, head_dim], [positions, kv_heads, _]) = (q.dims(), k.dims());
    arguments.positive("q", q.dims())?;
    arguments.positive("k", k.dims())?;
    arguments.check(tokens <= positions && heads.is_multiple_of(kv_heads), "q", || {
        let needed = format!("{positions} tokens at most, heads in multiples of {kv_heads}: those of k");
        (format!("{:?}", q.dims()), needed)
    })?;
    arguments.f32("q", &q, [tokens, heads, head_dim])?;
    arguments.f32("k", &k, [positions, kv_heads, head_dim])?;
    arguments.f32("v", &v, [positions, kv_heads, head_dim])?;
    // The weight of such a sink is 0.
    let sinks = sinks.unwrap_or_else(|| Tensor::full([heads], f32::MIN, (&q.device(), DType::F32)));
    arguments.f32("sinks", &sinks, [heads])?;
    arguments.check(window != Some(0), "window", || ("0".into(), "1 or more".into()))?;
    arguments.check(scale.is_finite(), "scale", || (scale.to_string(), "a finite number".into()))?;
    // What reaches further than the positions is no window.
    let window = window.filter(|&window| window < positions);
    Ok(in_steps(tokens, tokens, |first, count| {
        let seen = positions - tokens + first + count;
        Tensor::from_dispatch(<Dispatch as GptOssBackend>::sink_attention(
            q.clone().narrow(0, first, count).into_dispatch(),
            k.clone().narrow(0, 0, seen).into_dispatch(),
            v.clone().narrow(0, 0, seen).into_dispatch(),
            sinks.clone().into_dispatch(),
            window,
            scale,
        ))
    }))
}

/// `q`, `k`, `v` and sinks. A thread has some of the pairs of a token and a head.
pub(super) fn on_processor(tensors: [FlexTensor; 4], window: Option<usize>, scale: f32) -> FlexTensor {
    let [q, k, v, sinks] = tensors.map(|tensor| tensor.to_contiguous());
    let [tokens, heads, head_dim] = [0, 1, 2].map(|axis| q.layout().shape()[axis]);
    let [positions, kv_heads] = [0, 1].map(|axis| k.layout().shape()[axis]);
    let (keys, values, sinks) = (k.storage::<f32>(), v.storage::<f32>(), sinks.storage::<f32>());
    let mut out = vec![0.0; tokens * heads * head_dim];
    out.par_chunks_mut(head_dim).zip(q.storage::<f32>().par_chunks(head_dim)).enumerate().for_each_init(
        Vec::new,
        |weights, (row, (out, query))| {
            let (position, head) = (positions - tokens + row / heads, row % heads);
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            let start = |seen: usize| (seen * kv_heads + head / (heads / kv_heads)) * head_dim;
            weights.clear();
            weights
                .extend((first..=position).map(|seen| scale * dot(query, &keys[start(seen)..][..head_dim])));
            let largest = weights.iter().copied().fold(sinks[head], f32::max);
            let mut sum = (sinks[head] - largest).exp();
            for (seen, score) in (first..).zip(weights.iter()) {
                let weight = (score - largest).exp();
                sum += weight;
                for (out, value) in out.iter_mut().zip(&values[start(seen)..]) {
                    *out += weight * value;
                }
            }
            out.iter_mut().for_each(|value| *value /= sum);
        },
    );
    FlexTensor::from_data(TensorData::new(out, [tokens, heads, head_dim]))
}

/// Sum of products, in eight partial sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

pub(super) use cube::on_gpu;

mod cube {
    use burn::backend::ops::FloatTensorOps;
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};
    use cubecl::prelude::Float;
    use half::f16;

    use super::*;
    use crate::extension::cube::f32_beside;
    use crate::kernels::method::Method;
    use crate::kernels::pages::{self, Pages};
    use crate::kernels::prefill_attention::{self, PrefillAttention};
    use crate::kernels::qkv::PAGE;
    use crate::kernels::rows::from_words;
    use crate::nn::attention::{Attention, Visibility};

    /// `q`, `k`, `v` and sinks.
    pub(in crate::extension) fn on_gpu(
        tensors: [CubeTensor; 4],
        window: Option<usize>,
        scale: f32,
    ) -> CubeTensor {
        let [q, k, v, sinks] = tensors;
        let [heads, head_dim] = [1, 2].map(|axis| q.meta.shape()[axis]);
        let [positions, kv_heads] = [0, 1].map(|axis| k.meta.shape()[axis]);
        let attention = PrefillAttention {
            heads,
            kv_heads,
            head_dim,
            window: window.unwrap_or(0),
            // Kernels are compiled for a length of the table: a power of two, so that there are few.
            table: positions.div_ceil(PAGE).next_power_of_two(),
        };
        let shared_memory = q.client.properties().hardware.max_shared_memory_size;
        if !head_dim.is_multiple_of(8) || attention.shared_bytes() > shared_memory {
            return with_plain_tensors([q, k, v, sinks], window, scale);
        }
        let [k, v, sinks] = [k, v, sinks].map(into_contiguous);
        // The kernel's scores have no factor.
        let q =
            into_contiguous(if scale == 1.0 { q } else { CubeBackend::float_mul_scalar(q, scale.into()) });
        // Tensor cores take f16; what they would round is not kept in f32.
        if Method::of(&q.client) == Method::TensorCores {
            attend::<f16>([q, k, v, sinks], attention)
        } else {
            attend::<f32>([q, k, v, sinks], attention)
        }
    }

    /// Over a cache of the type `C` that is made for it.
    fn attend<C: Float>([q, k, v, sinks]: [CubeTensor; 4], attention: PrefillAttention) -> CubeTensor {
        let PrefillAttention { heads, kv_heads, head_dim, table, .. } = attention;
        let (tokens, positions) = (q.meta.shape()[0], k.meta.shape()[0]);
        let client = &q.client;
        let of_cache = Pages { kv_heads, head_dim };
        let cache_len = of_cache.elements(positions);
        let [keys, values] = [&k, &v].map(|rows| {
            let cache = client.empty(cache_len * size_of::<C>());
            pages::launch::<C>(client, of_cache, positions, &rows.handle, &cache);
            cache
        });
        let numbers: Vec<u32> = (0..table as u32).collect();
        let method = Method::of(client);
        let out = client.empty(method.words(tokens * heads * head_dim) * size_of::<u32>());
        let buffers = prefill_attention::Buffers {
            q: &q.handle,
            keys: &keys,
            values: &values,
            cache_len,
            pages: &client.create_from_slice(bytemuck::cast_slice(&numbers)),
            sinks: &sinks.handle,
            out: &out,
        };
        prefill_attention::launch::<C>(client, attention, positions - tokens, tokens, &buffers);
        let shape = [tokens, heads, head_dim];
        f32_beside(&q, shape, from_words(client, method, shape.iter().product(), &out))
    }

    fn with_plain_tensors(
        [q, k, v, sinks]: [CubeTensor; 4],
        window: Option<usize>,
        scale: f32,
    ) -> CubeTensor {
        let [q, k, v] = [q, k, v].map(Tensor::<3>::from_primitive::<CubeBackend>);
        let sinks = Tensor::<1>::from_primitive::<CubeBackend>(sinks);
        let (tokens, positions) = (q.dims()[0], k.dims()[0]);
        let queries = positions - tokens..positions;
        let seen = Visibility::causal(queries, (0..positions).collect(), window, &q.device());
        let attention = Attention { sinks: Some(sinks), ..Attention::scaled(scale) };
        let out = attention.forward(q, k.swap_dims(0, 1), v.swap_dims(0, 1), &seen);
        match out.try_into_primitive::<CubeBackend>() {
            Ok(out) => out,
            Err(error) => unreachable!("tensors of a backend make tensors of it: {error:?}"),
        }
    }
}
