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
    /// f32 `[…, inputs]` → f32 `[…, outputs]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let [outputs, inputs] = self.weight.dims();
        let mut shape = x.dims();
        let rows = shape[..D - 1].iter().product::<usize>();
        shape[D - 1] = outputs;
        let y = product(x.reshape([rows, inputs]), self.weight.clone(), self.compute);
        let y = match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        };
        y.reshape(shape)
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
