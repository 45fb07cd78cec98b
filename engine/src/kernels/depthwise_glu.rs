//! The middle of GLUMBConv ([`crate::ace_step::transformer::GluMbConv`]) in one pass: SiLU, a convolution of each channel over
//! three frames, and the second half of the channels as the gate of the first.
//!
//! As plain operations that is a dozen launches over the widest rows of a block.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::check::{Comparison, F32, Random};
use crate::backend::values_of_tensor;
use crate::error::Result;

/// Frames that a unit computes one after the other: each needs the SiLU of three, of which it has two already.
const RUN: usize = 8;

/// The operation as an extension of Burn's backends.
#[backend_extension(Cube, Flex)]
pub trait DepthwiseGluBackend: Backend {
    /// See [`depthwise_glu`].
    fn depthwise_glu(
        u: FloatTensor<Self>,
        taps: FloatTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// f32 `u` `[batch, frames, 2 · width]`, `taps` `[3, 2 · width]` of the frame before, the frame and the one behind, and `bias`
/// `[2 · width]` → f32 `[batch, frames, width]`: with `y = taps ∗ silu(u) + bias` along the frames and zeros beyond their ends,
/// `y[…, i] · silu(y[…, width + i])`.
pub fn depthwise_glu(u: Tensor<3>, taps: Tensor<2>, bias: Tensor<1>) -> Tensor<3> {
    let result = <Dispatch as DepthwiseGluBackend>::depthwise_glu(
        u.into_dispatch(),
        taps.into_dispatch(),
        bias.into_dispatch(),
    );
    Tensor::from_dispatch(result)
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

impl DepthwiseGluBackend for Flex {
    fn depthwise_glu(u: FlexTensor, taps: FlexTensor, bias: FlexTensor) -> FlexTensor {
        let [u, taps, bias] = [u, taps, bias].map(|tensor| tensor.to_contiguous());
        let [batch, frames, channels] = [0, 1, 2].map(|axis| u.layout().shape()[axis]);
        let width = channels / 2;
        let (taps, bias) = (taps.storage::<f32>(), bias.storage::<f32>());
        let active: Vec<f32> = u.storage::<f32>().par_iter().map(|&u| silu(u)).collect();
        let mut out = vec![0.0; batch * frames * width];
        out.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, out)| {
            let frame = row % frames;
            let at = |channel: usize| {
                let tap = |index: usize| {
                    taps[index * channels + channel] * active[(row + index - 1) * channels + channel]
                };
                let mut sum = bias[channel] + tap(1);
                if frame > 0 {
                    sum += tap(0);
                }
                if frame + 1 < frames {
                    sum += tap(2);
                }
                sum
            };
            for (channel, out) in out.iter_mut().enumerate() {
                *out = at(channel) * silu(at(width + channel));
            }
        });
        FlexTensor::from_data(TensorData::new(out, [batch, frames, width]))
    }
}

mod cube {
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};
    use cubecl::prelude::*;

    use super::*;
    use crate::kernels::exponential::exponential;
    use crate::kernels::rows::{UNITS, cubes, item};

    impl DepthwiseGluBackend for CubeBackend {
        fn depthwise_glu(u: CubeTensor, taps: CubeTensor, bias: CubeTensor) -> CubeTensor {
            let [u, taps, bias] = [u, taps, bias].map(into_contiguous);
            let [batch, frames, channels] = [0, 1, 2].map(|axis| u.meta.shape()[axis]);
            let width = channels / 2;
            let runs = frames.div_ceil(RUN);
            let client = u.client.clone();
            let out = client.empty(batch * frames * width * size_of::<f32>());
            let items = batch * runs * width;
            // SAFETY: lengths are those of the tensors; units stop at `items`, and at the last frame of their sample.
            unsafe {
                depthwise_glu_kernel::launch_unchecked(
                    &client,
                    cubes(items),
                    CubeDim::new_1d(UNITS as u32),
                    BufferArg::from_raw_parts(u.handle.clone(), batch * frames * channels),
                    BufferArg::from_raw_parts(taps.handle, 3 * channels),
                    BufferArg::from_raw_parts(bias.handle, channels),
                    BufferArg::from_raw_parts(out.clone(), batch * frames * width),
                    items,
                    frames,
                    width,
                );
            }
            let shape = burn::tensor::Shape::new([batch, frames, width]);
            CubeTensor::new_contiguous(client, u.device, shape, out, DType::F32)
        }
    }

    #[cube(launch_unchecked)]
    fn depthwise_glu_kernel(
        u: &[f32],
        taps: &[f32],
        bias: &[f32],
        out: &mut [f32],
        items: usize,
        frames: usize,
        width: usize,
    ) {
        let item = item();
        if item < items {
            let channels = 2 * width;
            let channel = item % width;
            let gate = width + channel;
            let runs = (frames + comptime!(RUN - 1)) / RUN;
            let sample = item / width / runs;
            let first = item / width % runs * RUN;
            let end = u32::min((first + RUN) as u32, frames as u32) as usize;
            let start = sample * frames;

            let mut before = 0.0f32;
            let mut gate_before = 0.0f32;
            if first > 0 {
                before = silu(u[(start + first - 1) * channels + channel]);
                gate_before = silu(u[(start + first - 1) * channels + gate]);
            }
            let mut own = silu(u[(start + first) * channels + channel]);
            let mut gate_own = silu(u[(start + first) * channels + gate]);
            let mut frame = first;
            while frame < end {
                let mut behind = 0.0f32;
                let mut gate_behind = 0.0f32;
                if frame + 1 < frames {
                    behind = silu(u[(start + frame + 1) * channels + channel]);
                    gate_behind = silu(u[(start + frame + 1) * channels + gate]);
                }
                let value = bias[channel]
                    + taps[channel] * before
                    + taps[channels + channel] * own
                    + taps[2 * channels + channel] * behind;
                let opening = bias[gate]
                    + taps[gate] * gate_before
                    + taps[channels + gate] * gate_own
                    + taps[2 * channels + gate] * gate_behind;
                out[(start + frame) * width + channel] = value * silu(opening);
                before = own;
                own = behind;
                gate_before = gate_own;
                gate_own = gate_behind;
                frame += 1;
            }
        }
    }

    #[cube]
    fn silu(x: f32) -> f32 {
        x / (1.0f32 + exponential(-x))
    }
}

/// The definition in float64.
fn reference(u: &[f32], taps: &[f32], bias: &[f32], frames: usize, width: usize) -> Vec<f64> {
    let channels = 2 * width;
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let rows = u.len() / channels;
    let at = |row: usize, channel: usize| {
        let tap = |index: usize, row: usize| {
            f64::from(taps[index * channels + channel]) * silu(f64::from(u[row * channels + channel]))
        };
        let before = if row.is_multiple_of(frames) { 0.0 } else { tap(0, row - 1) };
        let behind = if row % frames + 1 < frames { tap(2, row + 1) } else { 0.0 };
        f64::from(bias[channel]) + before + tap(1, row) + behind
    };
    let of_row = |row| (0..width).map(move |channel| (row, channel));
    (0..rows).flat_map(of_row).map(|(row, i)| at(row, i) * silu(at(row, width + i))).collect()
}

/// One frame, runs that end within and at the end, several samples; values up to 20, where the SiLU is flat or zero.
pub(crate) fn check(device: &burn::tensor::Device) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for [batch, frames, width] in [[1, 1, 5], [2, 8, 33], [3, 19, 64], [1, 645, 40]] {
        let mut random = Random::new((frames * width) as u64);
        let u = random.values(batch * frames * 2 * width, 20.0);
        let (taps, bias) = (random.values(6 * width, 1.0), random.values(2 * width, 1.0));
        let data = |values: &[f32]| Tensor::<1>::from_data(values, (device, DType::F32));
        let result = depthwise_glu(
            data(&u).reshape([batch, frames, 2 * width]),
            data(&taps).reshape([3, 2 * width]),
            data(&bias),
        );
        let truth = reference(&u, &taps, &bias, frames, width);
        let case = format!("{batch} of {frames} × {width}");
        found.push(Comparison::near("depthwise_glu", case, width, &values_of_tensor(result)?, &truth, F32));
    }
    Ok(found)
}
