//! Matrix products in f32 that are f32.
//!
//! Burn's own product of f32 tensors runs on the tensor cores of NVIDIA GPUs, in TF32: 10 bits of precision, 1.8e-3 of
//! the largest value in the logits of a two-block model. Asking for f32 is asking for the other 13.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::FlexTensor;

use super::check::{Comparison, F32, Random};
use crate::backend::values_of_tensor;
use crate::error::Result;

/// The operation as an extension of Burn's backends.
#[backend_extension(Cube, Flex)]
pub trait ProductBackend: Backend {
    /// See [`product`].
    fn f32_product(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// `lhs · rhs` of two matrices, or of equally many: `[…, m, k]` and `[…, k, n]` → `[…, m, n]`, the leading axes equal.
/// Both have one dtype, and so has the result. f32 is multiplied and summed in f32 on every device; other dtypes are left
/// to Burn.
pub fn product<const D: usize>(lhs: Tensor<D>, rhs: Tensor<D>) -> Tensor<D> {
    if lhs.dtype() != DType::F32 {
        return lhs.matmul(rhs);
    }
    Tensor::from_dispatch(<Dispatch as ProductBackend>::f32_product(lhs.into_dispatch(), rhs.into_dispatch()))
}

/// The processor has no shortened f32.
impl ProductBackend for Flex {
    fn f32_product(lhs: FlexTensor, rhs: FlexTensor) -> FlexTensor {
        use burn::backend::ops::FloatTensorOps;
        Flex::float_matmul(lhs, rhs)
    }
}

mod cube {
    use burn::backend::ops::FloatTensorOps;
    use burn_cubecl::{CubeBackend, tensor::CubeTensor};
    use cubecl::prelude::*;
    use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
    use cubek::matmul::{launch::launch_ref, multi_level, strategy::Strategy};
    use cubek::std::InputBinding;

    use super::*;

    impl ProductBackend for CubeBackend {
        /// By units instead of tensor cores: what CubeK does itself where there are none.
        fn f32_product(lhs: CubeTensor, rhs: CubeTensor) -> CubeTensor {
            let f32 = f32::elem_type_native();
            let mut shape = lhs.meta.shape().clone();
            let last = shape.num_dims() - 1;
            shape[last] = rhs.meta.shape()[last];
            let client = lhs.client.clone();
            let buffer = client.empty(shape.num_elements() * size_of::<f32>());
            let out =
                CubeTensor::new_contiguous(client.clone(), lhs.device.clone(), shape, buffer, DType::F32);
            let mut types = MatmulElems::from_globals(&MatmulGlobalElems { lhs: f32, rhs: f32, out: f32 });
            let launched = launch_ref(
                &Strategy::MultiLevel(multi_level::Strategy::SimpleUnit(Default::default())),
                &client,
                InputBinding::new(lhs.clone().binding(), f32),
                InputBinding::new(rhs.clone().binding(), f32),
                out.clone().binding(),
                &mut types,
            );
            match launched {
                Ok(()) => out,
                // A device on which units cannot multiply this has another way to do it.
                Err(_) => CubeBackend::float_matmul(lhs, rhs),
            }
        }
    }
}

/// `lhs · rhs`, both as rows: of the left matrix and, transposed, of the right one.
fn reference(lhs: &[f32], rhs: &[f32], k: usize) -> Vec<f64> {
    let dot = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    lhs.chunks(k).flat_map(|a| rhs.chunks(k).map(move |b| dot((a, b)))).collect()
}

/// A row, odd sizes, several matrices; the right factor transposed, as weights are stored. 10 bits of precision, those of TF32, would be
/// many times the bound.
pub(crate) fn check(device: &burn::tensor::Device) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for [batch, m, k, n] in [[1, 1, 2880, 70], [1, 130, 129, 65], [3, 17, 64, 40]] {
        let mut random = Random::new(k as u64);
        let (lhs, rhs) = (random.values(batch * m * k, 1.0), random.values(batch * n * k, 1.0));
        let tensor = |values: &[f32], shape| {
            Tensor::<3>::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32))
        };
        let matrices = lhs.chunks(m * k).zip(rhs.chunks(n * k));
        let truth: Vec<f64> = matrices.flat_map(|(lhs, rhs)| reference(lhs, rhs, k)).collect();
        let result = product(tensor(&lhs, [batch, m, k]), tensor(&rhs, [batch, n, k]).swap_dims(1, 2));
        let case = format!("{batch} of {m} × {k} × {n}");
        found.push(Comparison::near("product", case, n, &values_of_tensor(result)?, &truth, F32));
    }
    Ok(found)
}
