//! Rows by number, and parts end to end.

use burn::tensor::{Device, Int, Tensor};

/// Positions or row numbers (below 2^31) on a device, i32 `[indices]`.
pub(crate) fn indices(indices: impl IntoIterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let indices: Vec<i32> = indices.into_iter().map(|index| index as i32).collect();
    Tensor::from_data(indices.as_slice(), device)
}

/// Bytes that the rows of one step may take. Below the 128 MiB of the smallest devices' buffers.
const STEP: usize = 64 << 20;

/// Rows of a step, at least one, for so many f32 in each.
pub(crate) fn rows_of_step(floats: usize) -> usize {
    (STEP / (4 * floats).max(1)).max(1)
}

/// Parts along an axis, at least one. A single part is not copied, as `Tensor::cat` does.
///
/// Where an allocation fails, CubeCL computes nothing that depends on it, and reading any of it is an error. But a tensor
/// that is written part by part counts as sound again as soon as one part was written. So the result depends on every
/// part once more.
pub(crate) fn concatenated<const D: usize>(mut parts: Vec<Tensor<D>>, axis: usize) -> Tensor<D> {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let first = std::array::from_fn::<_, D, _>(|_| 0..1);
    let first_values = parts.iter().map(|part| part.clone().slice(first.clone()).equal_elem(0.0).float());
    let zero = first_values.reduce(|a, b| a + b).map(|sum| sum.mul_scalar(0.0));
    let all = Tensor::cat(parts, axis);
    match zero {
        Some(zero) => {
            let zero = zero.cast(all.dtype());
            all + zero
        }
        None => all,
    }
}
