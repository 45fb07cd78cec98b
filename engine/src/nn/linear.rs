//! Dense linear layers.

use burn::tensor::{DType, Tensor};

use crate::backend::Float;
use crate::kernels;

/// `x · Wᵀ + b` for weights as PyTorch stores them.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[outputs, inputs]` in the type in which it resides.
    pub weight: Tensor<2>,
    /// `[outputs]`, f32.
    pub bias: Option<Tensor<1>>,
    /// The type of the factors of the product. Weights of another type are converted each time.
    pub compute: Float,
}

impl Linear {
    /// f32 `[tokens, inputs]` → f32 `[tokens, outputs]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = product(x, self.weight.clone(), self.compute);
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// `x · Wᵀ` with both factors in the type `compute`; the result is f32.
pub fn product(x: Tensor<2>, weight: Tensor<2>, compute: Float) -> Tensor<2> {
    as_type(kernels::product::product(as_type(x, compute), as_type(weight, compute).transpose()), Float::F32)
}

/// Converts where the type differs.
pub fn as_type<const D: usize>(x: Tensor<D>, float: Float) -> Tensor<D> {
    if x.dtype() == DType::from(float) { x } else { x.cast(float.dtype()) }
}
