//! Products with MXFP4 matrices that stay packed.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::check::{Comparison, F32, Random};
use crate::backend::values_of_tensor;
use crate::error::Result;

/// Values that share a scale.
pub const BLOCK: usize = 32;

/// The operation as an extension of Burn's backends.
#[backend_extension(Cube, Flex)]
pub trait Mxfp4Backend: Backend {
    /// See [`select_and_multiply`].
    fn mxfp4_select_and_multiply(
        x: FloatTensor<Self>,
        blocks: IntTensor<Self>,
        scales: IntTensor<Self>,
        experts: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// `y[i] = W[experts[i]] · x[i / (pairs / inputs)]`: each row of `x` meets the experts that were selected for it.
///
/// - `x`: f32 `[inputs, columns]`, where `inputs` divides `pairs`;
/// - `blocks`: u32 `[experts, rows, columns / 8]`: eight codes a word, the first in the lowest four bits;
/// - `scales`: u32 `[experts, rows · columns / 128]`: four stored scales a word (2^(s − 141)), the first in the lowest
///   byte; needs rows in multiples of 32;
/// - `experts`: u32 `[pairs]`, ids below the number of experts (a larger one reads outside the buffer).
///
/// Result: f32 `[pairs, rows]`, summed in f32.
pub fn select_and_multiply(
    x: Tensor<2>,
    blocks: Tensor<3, Int>,
    scales: Tensor<2, Int>,
    experts: Tensor<1, Int>,
) -> Tensor<2> {
    let out = <Dispatch as Mxfp4Backend>::mxfp4_select_and_multiply(
        x.into_dispatch(),
        blocks.into_dispatch(),
        scales.into_dispatch(),
        experts.into_dispatch(),
    );
    Tensor::from_dispatch(out)
}

/// The processor: rows in parallel, each decoded once for all inputs that meet it.
impl Mxfp4Backend for Flex {
    fn mxfp4_select_and_multiply(
        x: FlexTensor,
        blocks: FlexTensor,
        scales: FlexTensor,
        experts: FlexTensor,
    ) -> FlexTensor {
        let [x, blocks, scales, experts] = [x, blocks, scales, experts].map(|tensor| tensor.to_contiguous());
        let (rows, columns) = (blocks.layout().shape()[1], blocks.layout().shape()[2] * 8);
        let inputs = x.layout().shape()[0];
        let pairs = experts.layout().shape()[0];
        let (x, experts) = (x.storage::<f32>(), experts.storage::<u32>());
        let codes: &[u8] = bytemuck::cast_slice(blocks.storage::<u32>());
        let scales: &[u8] = bytemuck::cast_slice(scales.storage::<u32>());
        let input = |pair: usize| &x[pair / (pairs / inputs) * columns..][..columns];
        let mut of_expert = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        for (pair, &expert) in experts.iter().enumerate() {
            of_expert.entry(expert as usize).or_default().push(pair);
        }
        // The result is made transposed, `[rows, pairs]`, so that each row is written by one thread.
        let mut transposed = vec![0.0f32; rows * pairs];
        transposed.par_chunks_mut(pairs).enumerate().with_min_len(16).for_each_init(
            || (vec![0.0f32; columns], vec![0u8; columns / BLOCK]),
            |(weights, unbiased), (row, out)| {
                for (&expert, pairs) in &of_expert {
                    let first = (expert * rows + row) * (columns / BLOCK);
                    let stored = &scales[first..first + columns / BLOCK];
                    for (scale, stored) in unbiased.iter_mut().zip(stored) {
                        *scale = stored.wrapping_sub(formats::mxfp4::SCALE_OFFSET);
                    }
                    let codes = &codes[first * BLOCK / 2..][..columns / 2];
                    formats::mxfp4::decode(codes, unbiased, weights).expect("lengths of one row");
                    for &pair in pairs {
                        out[pair] = dot(weights, input(pair));
                    }
                }
            },
        );
        let mut out = vec![0.0f32; pairs * rows];
        out.par_chunks_mut(rows).enumerate().for_each(|(pair, out)| {
            out.iter_mut().enumerate().for_each(|(row, value)| *value = transposed[row * pairs + pair]);
        });
        FlexTensor::from_data(TensorData::new(out, [pairs, rows]))
    }
}

/// Sum of products of slices of equal length in multiples of 16, in 16 partial sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let halves: [f32; 8] = std::array::from_fn(|lane| sums[lane] + sums[lane + 8]);
    halves.iter().sum()
}

mod cube {
    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};
    use cubecl::ir::features::Plane;
    use cubecl::prelude::*;

    use super::*;

    type U4 = Vector<u32, Const<4>>;
    type F4 = Vector<f32, Const<4>>;

    /// Rows that a group of lanes sums at the same time, sharing what it loads of `x`.
    const ROWS_PER_GROUP: usize = 2;
    /// Groups of lanes in a cube.
    const GROUPS: usize = 4;

    impl Mxfp4Backend for CubeBackend {
        fn mxfp4_select_and_multiply(
            x: CubeTensor,
            blocks: CubeTensor,
            scales: CubeTensor,
            experts: CubeTensor,
        ) -> CubeTensor {
            let [x, blocks, scales, experts] = [x, blocks, scales, experts].map(into_contiguous);
            let shape = blocks.meta.shape().clone();
            let (rows, row_blocks) = (shape[1], shape[2] * 8 / BLOCK);
            let inputs = x.meta.shape()[0];
            let pairs = experts.meta.shape()[0];
            let client = x.client.clone();
            let buffer = client.empty(pairs * rows * size_of::<f32>());
            let out = CubeTensor::new_contiguous(
                client.clone(),
                x.device.clone(),
                Shape::new([pairs, rows]),
                buffer,
                DType::F32,
            );
            let hardware = &client.properties().hardware;
            let (smallest, largest) = (hardware.plane_size_min, hardware.plane_size_max);
            // Software Vulkan has no plane operations; some GPUs choose the width of a plane as they like.
            let has_planes =
                client.properties().features.plane.contains(Plane::Ops) && smallest == largest && largest > 0;
            let lanes = if has_planes { largest as usize } else { 32 };
            let words = shape[0] * rows * row_blocks;
            // SAFETY: the kernel reads and writes within the lengths given here as long as ids are those of experts
            // (the operation's contract): `rows` is a multiple of 32, so cubes cover rows exactly, and lanes stop at
            // the last block of a row.
            unsafe {
                multiply_selected::launch_unchecked(
                    &client,
                    CubeCount::Static((rows / (ROWS_PER_GROUP * GROUPS)) as u32, pairs as u32, 1),
                    CubeDim::new_2d(lanes as u32, GROUPS as u32),
                    BufferArg::from_raw_parts(blocks.handle.clone(), words),
                    BufferArg::from_raw_parts(scales.handle.clone(), words / 4),
                    BufferArg::from_raw_parts(x.handle.clone(), inputs * row_blocks * 8),
                    BufferArg::from_raw_parts(experts.handle.clone(), pairs),
                    BufferArg::from_raw_parts(out.handle.clone(), pairs * rows),
                    rows,
                    row_blocks,
                    pairs / inputs,
                    has_planes,
                    lanes,
                );
            }
            out
        }
    }

    /// One cube: `GROUPS · ROWS_PER_GROUP` rows of one pair. Lane `l` of a group takes blocks `l`, `l + lanes`, ….
    #[cube(launch_unchecked)]
    fn multiply_selected(
        blocks: &[U4],
        scales: &[u32],
        x: &[F4],
        experts: &[u32],
        out: &mut [f32],
        #[comptime] rows: usize,
        #[comptime] row_blocks: usize,
        #[comptime] pairs_per_input: usize,
        #[comptime] has_planes: bool,
        #[comptime] lanes: usize,
    ) {
        let lane = UNIT_POS_X as usize;
        let pair = CUBE_POS_Y as usize;
        let row = (CUBE_POS_X as usize * GROUPS + UNIT_POS_Y as usize) * ROWS_PER_GROUP;
        let first_row = experts[pair] as usize * rows + row;
        let x_start = pair / pairs_per_input * row_blocks * 8;
        let mut sums = Array::<f32>::new(ROWS_PER_GROUP);
        #[unroll]
        for r in 0..ROWS_PER_GROUP {
            sums[r] = 0.0f32;
        }
        let mut block = lane;
        while block < row_blocks {
            #[unroll]
            for r in 0..ROWS_PER_GROUP {
                let at = (first_row + r) * row_blocks + block;
                let words = blocks[at];
                let mut sum = 0.0f32;
                #[unroll]
                for j in 0..4usize {
                    let word = words.extract(j);
                    let low = x[x_start + block * 8 + 2 * j];
                    let high = x[x_start + block * 8 + 2 * j + 1];
                    #[unroll]
                    for i in 0..8usize {
                        let code = (word >> comptime!(4 * i as u32)) & 15u32;
                        let value = doubled(code);
                        let input = if comptime!(i < 4) {
                            low.extract(comptime!(i % 4))
                        } else {
                            high.extract(comptime!(i % 4))
                        };
                        sum += value * input;
                    }
                }
                let packed = scales[at / 4];
                let stored = (packed >> (u32::cast_from(at % 4) * 8u32)) & 255u32;
                sums[r] += scaled(sum, stored);
            }
            block += lanes;
        }
        #[unroll]
        for r in 0..ROWS_PER_GROUP {
            let total = sum_of_group(sums[r], has_planes, lanes);
            if lane == 0 {
                out[pair * rows + row + r] = total;
            }
        }
    }

    /// A sum of doubled codes times `2^(stored − 127 − 14 − 1)`, in two factors: one alone may be too small for GPUs,
    /// which flush what is below 2^−126, or make the product too large.
    #[cube]
    fn scaled(sum: f32, stored: u32) -> f32 {
        // The biased exponents of the factors, each between 63 and 183.
        let exponents = stored + 112u32;
        let first = exponents / 2u32;
        sum * f32::reinterpret(first << 23u32) * f32::reinterpret((exponents - first) << 23u32)
    }

    /// Twice the value of an E2M1 code: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
    #[cube]
    fn doubled(code: u32) -> f32 {
        let magnitude = (0xC864_3210u32 >> ((code & 7u32) * 4u32)) & 15u32;
        let value = f32::cast_from(magnitude);
        select(code >= 8u32, -value, value)
    }

    /// The sum over the lanes of a group, valid in lane 0.
    #[cube]
    fn sum_of_group(value: f32, #[comptime] has_planes: bool, #[comptime] lanes: usize) -> f32 {
        if comptime!(has_planes) {
            plane_sum(value)
        } else {
            let mut shared = Shared::<[f32]>::new_slice(comptime!(lanes * GROUPS));
            sync_cube();
            shared[UNIT_POS as usize] = value;
            sync_cube();
            let mut total = 0.0f32;
            if UNIT_POS_X == 0 {
                for i in 0..lanes {
                    total += shared[UNIT_POS as usize + i];
                }
            }
            total
        }
    }
}

/// `W[expert] · x` of a pair.
fn reference<'a>(weights: &'a [f64], x: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
    weights.chunks(x.len()).map(move |row| row.iter().zip(x).map(|(weight, &x)| weight * f64::from(x)).sum())
}

/// An input for each pair and inputs that pairs share, experts that no one and many selected.
pub(crate) fn check(device: &burn::tensor::Device) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (inputs, pairs, experts, rows, columns) in
        [(1, 1, 1, 32, 32), (3, 12, 8, 96, 160), (130, 130, 4, 32, 64), (17, 68, 4, 64, 2880)]
    {
        let mut random = Random::new(columns as u64);
        let x = random.values(inputs * columns, 1.0);
        let matrix = random.mxfp4(experts * rows, columns);
        let ids = random.numbers(pairs, experts);
        let words = |words: &[u32], shape: Vec<usize>| TensorData::new(words.to_vec(), shape);
        let options = (device, DType::U32);
        let result = select_and_multiply(
            Tensor::from_data(TensorData::new(x.clone(), [inputs, columns]), (device, DType::F32)),
            Tensor::from_data(words(&matrix.codes, vec![experts, rows, columns / 8]), options),
            Tensor::from_data(words(&matrix.scales, vec![experts, rows * columns / (4 * BLOCK)]), options),
            Tensor::from_data(words(&ids, vec![pairs]), options),
        );
        let truth = ids.iter().enumerate().flat_map(|(pair, &id)| {
            let weights = &matrix.values[id as usize * rows * columns..][..rows * columns];
            reference(weights, &x[pair / (pairs / inputs) * columns..][..columns])
        });
        let truth: Vec<f64> = truth.collect();
        let case = format!("{inputs} × {columns} → {pairs} × {rows}, {experts} experts");
        found.push(Comparison::near("mxfp4", case, rows, &values_of_tensor(result)?, &truth, F32));
    }
    Ok(found)
}
