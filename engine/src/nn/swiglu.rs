//! The gated activation of GPT-OSS.

use burn::tensor::{Tensor, activation::sigmoid};

/// `swiglu` of `gpt_oss/torch/model.py`: α of the sigmoid.
pub const ALPHA: f32 = 1.702;

/// Clamped SwiGLU on interleaved columns: `g · σ(α·g) · (u + 1)` with `g = min(x[2i], limit)` and
/// `u = clamp(x[2i + 1], −limit, limit)`.
///
/// f32 `[rows, 2·width]` → f32 `[rows, width]`.
pub fn swiglu(x: Tensor<2>, limit: f32) -> Tensor<2> {
    let [rows, columns] = x.dims();
    let pairs = x.reshape([rows, columns / 2, 2]);
    let gate = pairs.clone().narrow(2, 0, 1).squeeze_dim::<2>(2).clamp_max(limit);
    let up = pairs.narrow(2, 1, 1).squeeze_dim::<2>(2).clamp(-limit, limit);
    gate.clone() * sigmoid(gate.mul_scalar(ALPHA)) * up.add_scalar(1.0)
}
