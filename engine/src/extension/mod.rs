//! The operations of GPT-OSS for any program on Burn: functions of ordinary tensors, and the extension of backends behind
//! them.
//!
//! ```text
//! mxfp4_linear, moe, sink_attention     tensors ─► checks of shapes, types and devices, or an Error
//!          │
//!    GptOssBackend                      #[backend_extension]: Burn's dispatch chooses by the tensors' device
//!     ┌────┴─────┐
//!   Flex     CubeBackend                rayon, sums in f32 │ the kernels of `crate::kernels`: CUDA, Vulkan, Metal, WebGPU
//! ```
//!
//! | operation | what | in `gpt_oss/torch/model.py` 0.0.9 | plain-tensor reference |
//! |---|---|---|---|
//! | [`mxfp4_linear()`] | a dense layer whose matrix stays packed | `torch.nn.Linear` over `Checkpoint._get_mxfp4_tensor` | [`crate::nn::mxfp4`] |
//! | [`moe()`] | router, experts and their weighted sum | `MLPBlock.forward` without norm and residual | [`crate::nn::moe`] |
//! | [`sink_attention()`] | causal attention with sinks, a window and grouped queries | `sdpa` | [`crate::nn::attention`] |
//!
//! Tensors are f32, packed weights are [`Mxfp4Linear`], and everything that an operation takes lives on one device. What its
//! factors are rounded to stands with each operation: nothing on the processor and on GPUs without tensor cores (matrix units).
//! There are no gradients.
//!
//! A device that runs out of memory says so when a result is read, as with Burn's own operations.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use engine::extension::{Mxfp4Linear, mxfp4_linear, sink_attention};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Or Device::wgpu(..), Device::cuda(0).
//! let device = Device::flex();
//!
//! // A matrix of 64 x 32 as a checkpoint stores it: all codes are 2 (the value 1), all scales 128 (2^1).
//! let (blocks, scales) = (vec![0x22; 64 * 32 / 2], vec![128; 64]);
//! let weight = Mxfp4Linear::from_checkpoint(blocks, scales, [1, 64, 32], &device)?;
//! let y = mxfp4_linear(Tensor::ones([3, 32], &device), &weight, None)?;
//! assert_eq!(y.into_data().to_vec::<f32>()?, vec![64.0; 3 * 64]);
//!
//! // Two queries, the last of nine positions; eight query heads read two key heads, four positions back.
//! let random = |shape: [usize; 3]| Tensor::<3>::random(shape, Distribution::Default, &device);
//! let (q, k, v) = (random([2, 8, 64]), random([9, 2, 64]), random([9, 2, 64]));
//! let attended = sink_attention(q, k, v, Some(Tensor::zeros([8], &device)), Some(4), 0.125)?;
//! assert_eq!(attended.dims(), [2, 8, 64]);
//! # Ok(())
//! # }
//! ```

mod moe;
mod mxfp4_linear;
mod sink_attention;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, DispatchDevice, ExtensionType, Flex, backend_extension};
use burn::tensor::{DType, Device, Tensor};
use burn_flex::FlexTensor;

pub use self::moe::{MOST_ACTIVE_EXPERTS, MOST_EXPERTS, MoeWeights, moe};
pub use self::mxfp4_linear::mxfp4_linear;
pub use self::sink_attention::sink_attention;
pub use crate::nn::mxfp4::Mxfp4Linear;

use crate::error::{Error, Result};
use crate::nn::rows::concatenated;

/// Rows of a step, at most: kernels have a cube for each or for some, and devices allow 65535 on an axis.
const MOST_ROWS: usize = 65_535;

/// The operations as an extension of Burn's backends, of primitives whose shapes and types the functions of this module
/// have checked.
#[backend_extension(Cube, Flex)]
pub trait GptOssBackend: Backend {
    /// See [`mxfp4_linear()`]; `blocks` `[1, rows, columns / 8]`, `scales` `[1, rows · columns / 128]`.
    fn mxfp4_linear(
        x: FloatTensor<Self>,
        blocks: IntTensor<Self>,
        scales: IntTensor<Self>,
        bias: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// See [`moe()`].
    fn moe(
        x: FloatTensor<Self>,
        #[extension_type] weights: MoePrimitives<Self>,
        num_active_experts: usize,
        swiglu_limit: f32,
    ) -> FloatTensor<Self>;

    /// See [`sink_attention()`].
    fn sink_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        window: Option<usize>,
        scale: f32,
    ) -> FloatTensor<Self>;
}

/// [`MoeWeights`] as primitives of a backend.
#[derive(ExtensionType)]
pub struct MoePrimitives<B: Backend> {
    /// f32 `[experts, embedding_dim]`.
    pub router: FloatTensor<B>,
    /// f32 `[experts]`.
    pub router_bias: FloatTensor<B>,
    /// u32 `[experts, 2 · mlp_dim, embedding_dim / 8]`.
    pub gate_up_blocks: IntTensor<B>,
    /// u32 `[experts, 2 · mlp_dim · embedding_dim / 128]`.
    pub gate_up_scales: IntTensor<B>,
    /// f32 `[experts, 2 · mlp_dim]`.
    pub gate_up_bias: FloatTensor<B>,
    /// u32 `[experts, embedding_dim, mlp_dim / 8]`.
    pub down_blocks: IntTensor<B>,
    /// u32 `[experts, embedding_dim · mlp_dim / 128]`.
    pub down_scales: IntTensor<B>,
    /// f32 `[experts, embedding_dim]`.
    pub down_bias: FloatTensor<B>,
}

/// The processor.
impl GptOssBackend for Flex {
    fn mxfp4_linear(x: FlexTensor, blocks: FlexTensor, scales: FlexTensor, bias: FlexTensor) -> FlexTensor {
        mxfp4_linear::on_processor(x, blocks, scales, bias)
    }

    fn moe(
        x: FlexTensor,
        weights: MoePrimitives<Flex>,
        num_active_experts: usize,
        swiglu_limit: f32,
    ) -> FlexTensor {
        moe::on_processor(x, weights, num_active_experts, swiglu_limit)
    }

    fn sink_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        sinks: FlexTensor,
        window: Option<usize>,
        scale: f32,
    ) -> FlexTensor {
        sink_attention::on_processor([q, k, v, sinks], window, scale)
    }
}

mod cube {
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};

    use super::*;

    /// Every GPU.
    impl GptOssBackend for CubeBackend {
        fn mxfp4_linear(
            x: CubeTensor,
            blocks: CubeTensor,
            scales: CubeTensor,
            bias: CubeTensor,
        ) -> CubeTensor {
            mxfp4_linear::on_gpu([x, blocks, scales, bias])
        }

        fn moe(
            x: CubeTensor,
            weights: MoePrimitives<CubeBackend>,
            num_active_experts: usize,
            swiglu_limit: f32,
        ) -> CubeTensor {
            moe::on_gpu(x, weights, num_active_experts, swiglu_limit)
        }

        fn sink_attention(
            q: CubeTensor,
            k: CubeTensor,
            v: CubeTensor,
            sinks: CubeTensor,
            window: Option<usize>,
            scale: f32,
        ) -> CubeTensor {
            sink_attention::on_gpu([q, k, v, sinks], window, scale)
        }
    }

    /// A buffer as an f32 tensor beside another one.
    pub(super) fn f32_beside<const D: usize>(
        tensor: &CubeTensor,
        shape: [usize; D],
        buffer: cubecl::server::Handle,
    ) -> CubeTensor {
        let (client, device) = (tensor.client.clone(), tensor.device.clone());
        CubeTensor::new_contiguous(client, device, burn::tensor::Shape::new(shape), buffer, DType::F32)
    }
}

/// `rows` rows (at least one) in steps, of which `part` computes one from its first row and their number.
fn in_steps<const D: usize>(rows: usize, step: usize, part: impl Fn(usize, usize) -> Tensor<D>) -> Tensor<D> {
    let step = step.clamp(1, MOST_ROWS);
    concatenated((0..rows).step_by(step).map(|first| part(first, step.min(rows - first))).collect(), 0)
}

/// Compares the arguments of an operation with what it takes.
struct Arguments {
    operation: &'static str,
    device: Device,
}

impl Arguments {
    /// Everything has to be on this device, which has to be one that the operations are written for.
    fn new(operation: &'static str, device: Device) -> Result<Arguments> {
        let known = matches!(device.as_dispatch(), DispatchDevice::Flex(_) | DispatchDevice::Cube(_));
        let arguments = Arguments { operation, device };
        arguments.check(known, "the device", || {
            (format!("{:?}", arguments.device), "Flex or a GPU of this build".into())
        })?;
        Ok(arguments)
    }

    /// [`Error::Argument`] with what was found and what is needed, unless it holds.
    fn check(
        &self,
        holds: bool,
        argument: &'static str,
        message: impl FnOnce() -> (String, String),
    ) -> Result<()> {
        if holds {
            return Ok(());
        }
        let (found, needed) = message();
        Err(Error::Argument { operation: self.operation, argument, found, needed })
    }

    /// An f32 tensor of a shape.
    fn f32<const D: usize>(
        &self,
        argument: &'static str,
        tensor: &Tensor<D>,
        shape: [usize; D],
    ) -> Result<()> {
        let found = (tensor.dtype(), tensor.dims());
        self.check(found == (DType::F32, shape), argument, || {
            (format!("{:?} {:?}", found.0, found.1), format!("{:?} {shape:?}", DType::F32))
        })?;
        self.here(argument, tensor.device())
    }

    /// MXFP4 matrices `[experts, rows, columns]`.
    fn packed(&self, argument: &'static str, weights: &Mxfp4Linear, dims: [usize; 3]) -> Result<()> {
        let found = weights.dims();
        self.check(found == dims, argument, || (format!("{found:?}"), format!("{dims:?}")))?;
        self.here(argument, weights.device())
    }

    /// At least one row, head or position of each kind.
    fn positive<const D: usize>(&self, argument: &'static str, dims: [usize; D]) -> Result<()> {
        self.check(!dims.contains(&0), argument, || (format!("{dims:?}"), "no size of 0".into()))
    }

    fn here(&self, argument: &'static str, device: Device) -> Result<()> {
        self.check(device == self.device, argument, || {
            (format!("on {device:?}"), format!("on {:?}", self.device))
        })
    }
}
