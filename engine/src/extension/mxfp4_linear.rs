//! A dense layer whose one matrix stays packed.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Dispatch, Flex};
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::FlexTensor;

use super::{Arguments, GptOssBackend, Mxfp4Linear, in_steps};
use crate::error::Result;
use crate::kernels::mxfp4::Mxfp4Backend;

/// Values of a step, at most: kernels count them in 32 bits.
const MOST_VALUES: usize = 1 << 31;

/// `x · Wᵀ + bias` with a matrix of MXFP4 values that are decoded as they are multiplied.
///
/// - `x`: f32 `[tokens, columns]`, at least one row;
/// - `weight`: one matrix, `[1, rows, columns]`;
/// - `bias`: f32 `[rows]`, zeros where there is none.
///
/// Result: f32 `[tokens, rows]`, summed in f32. Values of `x` are not rounded for up to four tokens; for more, tensor cores take
/// them as bf16 (NVIDIA) or f16 (cooperative matrices), the weights exactly as long as scales lie between 2^−33 and 2^3.
///
/// The values are those that `Checkpoint._get_mxfp4_tensor` of OpenAI's `gpt_oss/torch/weights.py` 0.0.9 decodes, times `x` as in
/// `torch.nn.Linear`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) where a shape, a type or a device is another one.
pub fn mxfp4_linear(x: Tensor<2>, weight: &Mxfp4Linear, bias: Option<Tensor<1>>) -> Result<Tensor<2>> {
    let arguments = Arguments::new("mxfp4_linear", x.device())?;
    let ([tokens, _], [_, rows, columns]) = (x.dims(), weight.dims());
    arguments.packed("weight", weight, [1, rows, columns])?;
    arguments.positive("x", x.dims())?;
    arguments.f32("x", &x, [tokens, columns])?;
    let bias = bias.unwrap_or_else(|| Tensor::zeros([rows], (&x.device(), DType::F32)));
    arguments.f32("bias", &bias, [rows])?;
    let (blocks, scales) = weight.tensors();
    Ok(in_steps(tokens, MOST_VALUES / rows.max(columns), |first, count| {
        Tensor::from_dispatch(<Dispatch as GptOssBackend>::mxfp4_linear(
            x.clone().narrow(0, first, count).into_dispatch(),
            blocks.clone().into_dispatch(),
            scales.clone().into_dispatch(),
            bias.clone().into_dispatch(),
        ))
    }))
}

/// Every row of `x` selects the only expert.
pub(super) fn on_processor(
    x: FlexTensor,
    blocks: FlexTensor,
    scales: FlexTensor,
    bias: FlexTensor,
) -> FlexTensor {
    let (tokens, rows) = (x.layout().shape()[0], blocks.layout().shape()[1]);
    let experts = FlexTensor::from_data(TensorData::new(vec![0u32; tokens], [tokens]));
    let y = Flex::mxfp4_select_and_multiply(x, blocks, scales, experts);
    Flex::float_add(y, Flex::float_reshape(bias, [1, rows].into()))
}

pub(super) use cube::on_gpu;

mod cube {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex, PoisonError};

    use burn_cubecl::kernel::into_contiguous;
    use burn_cubecl::{CubeDevice, tensor::CubeTensor};

    use crate::extension::cube::f32_beside;
    use crate::kernels::mxfp4_dot::Decoding;
    use crate::kernels::mxfp4_linear::{Buffers, Mxfp4Linear, launch};

    /// `x`, blocks, scales and bias.
    pub(in crate::extension) fn on_gpu(tensors: [CubeTensor; 4]) -> CubeTensor {
        let [x, blocks, scales, bias] = tensors.map(into_contiguous);
        let (tokens, columns) = (x.meta.shape()[0], x.meta.shape()[1]);
        let rows = blocks.meta.shape()[1];
        let client = &x.client;
        let y = client.empty(tokens * rows * size_of::<f32>());
        let linear = Mxfp4Linear { rows, columns, decoding: decoding(&x) };
        let buffers = Buffers {
            codes: &blocks.handle,
            scales: &scales.handle,
            bias: &bias.handle,
            x: &x.handle,
            y: &y,
        };
        launch(client, linear, tokens, &buffers);
        f32_beside(&x, [tokens, rows], y)
    }

    /// [`Decoding::of`] reads an answer back from the device: it is asked once.
    fn decoding(tensor: &CubeTensor) -> Decoding {
        static KNOWN: LazyLock<Mutex<HashMap<CubeDevice, Decoding>>> = LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(tensor.device.clone()).or_insert_with(|| Decoding::of(&tensor.client))
    }
}
