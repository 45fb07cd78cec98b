//! Rows by number, and parts end to end.

use burn::tensor::{Device, Int, Tensor};

/// Positions or row numbers (below 2^31) on a device, i32 `[indices]`.
pub(crate) fn indices(indices: impl IntoIterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let indices: Vec<i32> = indices.into_iter().map(|index| index as i32).collect();
    Tensor::from_data(indices.as_slice(), device)
}

/// Parts along an axis, at least one. A single part is not copied, as `Tensor::cat` does.
pub(crate) fn concatenated<const D: usize>(mut parts: Vec<Tensor<D>>, axis: usize) -> Tensor<D> {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, axis) }
}
