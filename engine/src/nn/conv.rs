//! Convolutions as PyTorch stores them.
//!
//! Inputs and results are f32, channels before positions; factors are of the type `compute`.

use std::fmt::Display;

use burn::tensor::Tensor;
use burn::tensor::module::{conv_transpose1d, conv1d, conv2d};
use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};

use super::linear::as_type;
use crate::backend::Float;
use crate::error::Result;
use crate::weights::Weights;

/// How a convolution walks over its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Positions from one result to the next.
    pub stride: usize,
    /// Zeros at both ends.
    pub padding: usize,
    /// Positions from one tap to the next.
    pub dilation: usize,
    /// Groups of channels that do not meet.
    pub groups: usize,
}

impl Walk {
    /// A result for each position: so much padding that a kernel of an odd size has its middle there.
    pub const fn same(kernel: usize) -> Walk {
        Walk { stride: 1, padding: kernel / 2, dilation: 1, groups: 1 }
    }

    /// The same with taps apart.
    pub const fn dilated(kernel: usize, dilation: usize) -> Walk {
        Walk { stride: 1, padding: dilation * (kernel - 1) / 2, dilation, groups: 1 }
    }

    /// The same with channels in groups.
    pub const fn grouped(self, groups: usize) -> Walk {
        Walk { groups, ..self }
    }

    /// The same with steps.
    pub const fn strided(self, stride: usize) -> Walk {
        Walk { stride, ..self }
    }

    /// The same without zeros at the ends.
    pub const fn unpadded(self) -> Walk {
        Walk { padding: 0, ..self }
    }
}

/// A convolution along one axis.
#[derive(Clone, Debug)]
pub struct Conv1d {
    /// `[outputs, inputs / groups, taps]`.
    pub weight: Tensor<3>,
    /// f32 `[outputs]`.
    pub bias: Option<Tensor<1>>,
    /// How it walks.
    pub walk: Walk,
    /// The type of the factors.
    pub compute: Float,
}

impl Conv1d {
    /// Loads `name.weight` `[outputs, inputs / groups, taps]` and `name.bias`.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn new(
        weights: &Weights<'_>,
        name: impl Display,
        shape: [usize; 3],
        bias: bool,
        walk: Walk,
    ) -> Result<Conv1d> {
        let weight = weights.kernel(&format!("{name}.weight"), shape)?;
        let bias = bias.then(|| weights.tensor(&format!("{name}.bias"), [shape[0]])).transpose()?;
        Ok(Conv1d { weight, bias, walk, compute: weights.compute() })
    }

    /// The same under weight normalisation.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn normalised(
        weights: &Weights<'_>,
        name: impl Display,
        shape: [usize; 3],
        walk: Walk,
    ) -> Result<Conv1d> {
        let weight = weights.weight_norm(&name.to_string(), shape)?;
        let bias = Some(weights.tensor(&format!("{name}.bias"), [shape[0]])?);
        Ok(Conv1d { weight, bias, walk, compute: weights.compute() })
    }

    /// f32 `[batch, inputs, length]` → f32 `[batch, outputs, results]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let Walk { stride, padding, dilation, groups } = self.walk;
        let options = ConvOptions::new([stride], [padding], [dilation], groups);
        let [x, weight] = [x, self.weight.clone()].map(|factor| as_type(factor, self.compute));
        with_bias(as_type(conv1d(x, weight, None, options), Float::F32), self.bias.as_ref())
    }
}

/// A transposed convolution along one axis, which makes it longer.
#[derive(Clone, Debug)]
pub struct ConvTranspose1d {
    /// `[inputs, outputs, taps]`.
    pub weight: Tensor<3>,
    /// f32 `[outputs]`.
    pub bias: Option<Tensor<1>>,
    /// Results for each position.
    pub stride: usize,
    /// Results that are left out at both ends.
    pub padding: usize,
    /// The type of the factors.
    pub compute: Float,
}

impl ConvTranspose1d {
    /// Loads `[inputs, outputs, taps]` under weight normalisation, and `name.bias`.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn normalised(
        weights: &Weights<'_>,
        name: impl Display,
        shape: [usize; 3],
        stride: usize,
        padding: usize,
    ) -> Result<ConvTranspose1d> {
        let weight = weights.weight_norm(&name.to_string(), shape)?;
        let bias = Some(weights.tensor(&format!("{name}.bias"), [shape[1]])?);
        Ok(ConvTranspose1d { weight, bias, stride, padding, compute: weights.compute() })
    }

    /// f32 `[batch, inputs, length]` → f32 `[batch, outputs, (length − 1) · stride − 2 · padding + taps]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let options = ConvTransposeOptions::new([self.stride], [self.padding], [0], [1], 1);
        let [x, weight] = [x, self.weight.clone()].map(|factor| as_type(factor, self.compute));
        with_bias(as_type(conv_transpose1d(x, weight, None, options), Float::F32), self.bias.as_ref())
    }
}

/// A convolution along two axes.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// `[outputs, inputs / groups, taps, taps]`.
    pub weight: Tensor<4>,
    /// f32 `[outputs]`.
    pub bias: Option<Tensor<1>>,
    /// How it walks, along both axes.
    pub walk: Walk,
    /// The type of the factors.
    pub compute: Float,
}

impl Conv2d {
    /// Loads `name.weight` `[outputs, inputs / groups, taps, taps]` and `name.bias`.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn new(
        weights: &Weights<'_>,
        name: impl Display,
        [outputs, inputs, taps]: [usize; 3],
        bias: bool,
        walk: Walk,
    ) -> Result<Conv2d> {
        let weight = weights.kernel(&format!("{name}.weight"), [outputs, inputs, taps, taps])?;
        let bias = bias.then(|| weights.tensor(&format!("{name}.bias"), [outputs])).transpose()?;
        Ok(Conv2d { weight, bias, walk, compute: weights.compute() })
    }

    /// f32 `[batch, inputs, height, width]` → f32 `[batch, outputs, …]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let Walk { stride, padding, dilation, groups } = self.walk;
        let options = ConvOptions::new([stride; 2], [padding; 2], [dilation; 2], groups);
        let [x, weight] = [x, self.weight.clone()].map(|factor| as_type(factor, self.compute));
        with_bias(as_type(conv2d(x, weight, None, options), Float::F32), self.bias.as_ref())
    }
}

/// Each channel with its bias, in f32.
fn with_bias<const D: usize>(x: Tensor<D>, bias: Option<&Tensor<1>>) -> Tensor<D> {
    match bias {
        Some(bias) => {
            let mut shape = [1; D];
            shape[1] = bias.dims()[0];
            x + bias.clone().reshape(shape)
        }
        None => x,
    }
}

/// Repeats the first and the last value along the last axis.
pub fn replicate_pad(x: Tensor<3>, padding: usize) -> Tensor<3> {
    let [batch, channels, length] = x.dims();
    let edge = |at| x.clone().narrow(2, at, 1).expand([batch, channels, padding]);
    Tensor::cat(vec![edge(0), x.clone(), edge(length - 1)], 2)
}
