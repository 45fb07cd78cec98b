//! Linear layers whose weights stay in MXFP4 (OCP Microscaling Formats 1.0).

use burn::tensor::{DType, FloatDType, Int, IntDType, Tensor, TensorData};
use formats::mxfp4::{MAX_SCALE, stored_scale};

use crate::kernels::mxfp4::{BLOCK, select_and_multiply};

/// The matrices of all experts of a layer, packed. One matrix is the case of one expert.
///
/// ```text
/// blocks  a byte holds two codes, the first in the low nibble; 16 bytes are a block of 32 values
/// scales  a byte s for each block: the values are code · 2^(s − 127 − 14)
/// ```
#[derive(Clone, Debug)]
pub struct Mxfp4Linear {
    /// u32 `[experts, rows, columns / 8]`.
    blocks: Tensor<3, Int>,
    /// u32 `[experts, rows · columns / 128]`.
    scales: Tensor<2, Int>,
}

/// Sizes that no packed matrix has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "MXFP4 matrices of {experts} x {rows} x {columns} with {blocks} bytes of blocks and {scales} of scales: needed rows \
     and columns in positive multiples of 32, half a byte per value and a scale per 32"
)]
pub struct Mxfp4SizeError {
    experts: usize,
    rows: usize,
    columns: usize,
    blocks: usize,
    scales: usize,
}

/// A checkpoint's matrices that cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mxfp4Error {
    /// Sizes that no packed matrix has.
    #[error(transparent)]
    Size(#[from] Mxfp4SizeError),
    /// A scale that is too large.
    #[error("an MXFP4 scale of {0}: needed {MAX_SCALE} at most")]
    Scale(u8),
}

impl Mxfp4Linear {
    /// Puts matrices on a device as `model.bin` stores them, expert after expert.
    ///
    /// - `blocks`: `[experts, rows, columns / 32, 16]` bytes;
    /// - `scales`: `[experts, rows, columns / 32]` bytes, 14 above a checkpoint's.
    ///
    /// # Errors
    /// Where rows or columns are not positive multiples of 32, or the lengths do not match them.
    pub fn from_stored(
        blocks: Vec<u8>,
        scales: Vec<u8>,
        [experts, rows, columns]: [usize; 3],
        device: &burn::tensor::Device,
    ) -> Result<Mxfp4Linear, Mxfp4SizeError> {
        let values = experts.checked_mul(rows).and_then(|rows| rows.checked_mul(columns));
        let sizes_match = values == Some(blocks.len() * 2) && values == Some(scales.len() * BLOCK);
        if !sizes_match || experts == 0 || rows == 0 || rows % 32 != 0 || columns == 0 || columns % BLOCK != 0
        {
            let (blocks, scales) = (blocks.len(), scales.len());
            return Err(Mxfp4SizeError { experts, rows, columns, blocks, scales });
        }
        let words =
            |bytes: Vec<u8>, shape: &[usize]| TensorData::from_bytes_vec(bytes, shape.to_vec(), DType::U32);
        let options = (device, DType::U32);
        Ok(Mxfp4Linear {
            blocks: Tensor::from_data(words(blocks, &[experts, rows, columns / 8]), options),
            scales: Tensor::from_data(words(scales, &[experts, rows * columns / (4 * BLOCK)]), options),
        })
    }

    /// [`Mxfp4Linear::from_stored`] for blocks and scales of a checkpoint: one expert's `…mlp1_weight.blocks` and `.scales` after
    /// the other's.
    ///
    /// # Errors
    /// As there, and where a scale exceeds 240 (2^113), which is more than kernels multiply by.
    pub fn from_checkpoint(
        blocks: Vec<u8>,
        scales: Vec<u8>,
        dims: [usize; 3],
        device: &burn::tensor::Device,
    ) -> Result<Mxfp4Linear, Mxfp4Error> {
        let stored = scales.into_iter().map(|scale| stored_scale(scale).ok_or(Mxfp4Error::Scale(scale)));
        Ok(Mxfp4Linear::from_stored(blocks, stored.collect::<Result<_, _>>()?, dims, device)?)
    }

    /// Blocks, u32 `[experts, rows, columns / 8]`, and scales, u32 `[experts, rows · columns / 128]`.
    pub fn tensors(&self) -> (Tensor<3, Int>, Tensor<2, Int>) {
        (self.blocks.clone(), self.scales.clone())
    }

    /// The device that they are on.
    pub fn device(&self) -> burn::tensor::Device {
        self.blocks.device()
    }

    /// `[experts, rows, columns]`.
    pub fn dims(&self) -> [usize; 3] {
        let [experts, rows, words] = self.blocks.dims();
        [experts, rows, words * 8]
    }

    /// One expert's matrix by itself.
    pub fn expert(&self, expert: usize) -> Mxfp4Linear {
        Mxfp4Linear {
            blocks: self.blocks.clone().narrow(0, expert, 1),
            scales: self.scales.clone().narrow(0, expert, 1),
        }
    }

    /// Row `i` of the result is the product of expert `experts[i]` with row `i / (pairs / inputs)` of `x`:
    /// f32 `[inputs, columns]` and ids `[pairs]` → f32 `[pairs, rows]`.
    pub fn forward(&self, x: Tensor<2>, experts: Tensor<1, Int>) -> Tensor<2> {
        let experts = experts.cast(IntDType::U32);
        select_and_multiply(x, self.blocks.clone(), self.scales.clone(), experts)
    }

    /// All matrices decoded by plain tensor operations, f32 `[experts, rows, columns]`: the reference of
    /// [`Mxfp4Linear::forward`] and the source of the dequantised baseline.
    pub fn decoded(&self) -> Tensor<3> {
        let [experts, rows, columns] = self.dims();
        let device = self.blocks.device();
        let lanes = |words: Tensor<1, Int>, bits: u32| {
            let mask = (1i64 << bits) - 1;
            let part = |lane: u32| {
                words.clone().bitwise_right_shift_scalar((lane * bits) as i64).bitwise_and_scalar(mask)
            };
            Tensor::stack::<2>((0..32 / bits).map(part).collect(), 1).flatten::<1>(0, 1)
        };
        let codes = lanes(self.blocks.clone().reshape([-1]), 4).cast(IntDType::I32);
        let scales = lanes(self.scales.clone().reshape([-1]), 8).cast(IntDType::I32);
        let look_up = |table: Vec<f32>, index: Tensor<1, Int>| {
            let size = table.len();
            let table = Tensor::<1>::from_data(TensorData::new(table, [size]), (&device, DType::F32));
            table.select(0, index)
        };
        let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0f32];
        let codes = look_up(values.into_iter().chain(values.map(|value| -value)).collect(), codes);
        // In two factors: GPUs flush what is below 2^−126, which the smallest scales are.
        let half = |s: i32| f64::from((s - 141).div_euclid(2)).exp2() as f32;
        let first = look_up((0..256).map(half).collect(), scales.clone());
        let second = look_up((0..256).map(|s| half(s + 1)).collect(), scales);
        let blocks = experts * rows * columns / BLOCK;
        let decoded =
            codes.reshape([blocks, BLOCK]) * first.reshape([blocks, 1]) * second.reshape([blocks, 1]);
        decoded.cast(FloatDType::F32).reshape([experts, rows, columns])
    }
}
