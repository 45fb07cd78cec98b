//! The weights of a component: a folder with a `config.json` and a SafeTensors file, as the diffusers library lays them
//! out.
//!
//! A model has one constructor, which asks a [`Weights`] for each tensor by its released name and its shape. What stands
//! behind it differs:
//!
//! ```text
//!                    ┌ Weights::of_file     a checked file: every name and shape first, then tensor by tensor to the device
//! Model::new(config) ┼ Weights::random      values that follow from seed and name, for demos and benchmarks of true sizes
//!                    └ expected             nothing: the names and shapes that the constructor asks for
//! ```
//!
//! So the list of names that [`Component::check`] holds a file to is the constructor itself.

mod component;
mod random;
mod table;
mod values;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;

use burn::tensor::{Tensor, TensorData};
use formats::checkpoint::TensorFile;
use formats::progress::Progress;

pub(crate) use component::read_json;
pub use component::{Component, Mismatch};
pub use table::Table;

use crate::backend::{Backend, Device, Float};
use crate::error::{Error, Result};
use crate::nn::linear::Linear;

/// A tensor that a model's constructor asks for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Expected {
    /// Its shape.
    pub shape: Vec<usize>,
    /// What becomes of it.
    pub role: Role,
}

/// What becomes of a tensor of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It is brought to the device.
    Used,
    /// It is part of the released file, and inference does not need it.
    Unused,
    /// It may be there or not, and is not read.
    Optional,
}

/// The names and shapes that a constructor asks for.
pub type ExpectedTensors = BTreeMap<String, Expected>;

/// How weights reside and take part in products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Types {
    /// The type of matrices and kernels. Biases, norms and tables are f32.
    pub weights: Float,
    /// The type of the factors of products; sums are f32.
    pub compute: Float,
}

impl Types {
    /// All in f32.
    pub const F32: Types = Types { weights: Float::F32, compute: Float::F32 };
    /// Matrices and factors in bf16.
    pub const BF16: Types = Types { weights: Float::Bf16, compute: Float::Bf16 };

    /// The same type for both.
    pub const fn all(float: Float) -> Types {
        Types { weights: float, compute: float }
    }
}

enum Source<'a> {
    File { file: &'a TensorFile, progress: &'a dyn Progress },
    Random { seed: u64 },
    Names(&'a RefCell<ExpectedTensors>),
}

/// Tensors by name, below a prefix.
pub struct Weights<'a> {
    source: &'a Source<'a>,
    device: &'a Device,
    types: Types,
    prefix: String,
}

/// Builds a model from a file that [`Component::check`] found right.
pub(crate) fn of_file<M>(
    file: &TensorFile,
    device: &Device,
    types: Types,
    progress: &dyn Progress,
    build: impl FnOnce(&Weights<'_>) -> Result<M>,
) -> Result<M> {
    build(&Weights { source: &Source::File { file, progress }, device, types, prefix: String::new() })
}

/// Builds a model whose weights follow from a seed: the same values on every device. They are of ordinary size, so that
/// activations stay ordinary, and mean nothing.
///
/// # Errors
/// Those of the constructor.
pub fn random<M>(
    seed: u64,
    device: &Device,
    types: Types,
    build: impl FnOnce(&Weights<'_>) -> Result<M>,
) -> Result<M> {
    build(&Weights { source: &Source::Random { seed }, device, types, prefix: String::new() })
}

/// What a constructor asks for. Nothing of any size is allocated.
///
/// # Errors
/// Those of the constructor.
pub fn expected<M>(build: impl FnOnce(&Weights<'_>) -> Result<M>) -> Result<ExpectedTensors> {
    let device = Backend::Cpu.open()?;
    let names = RefCell::default();
    let source = Source::Names(&names);
    build(&Weights { source: &source, device: &device, types: Types::F32, prefix: String::new() })?;
    // The model, and with it what borrowed, is gone.
    Ok(names.take())
}

impl<'a> Weights<'a> {
    /// The tensors below `name`: `at("blocks").at(0)` asks for `blocks.0.…`.
    pub fn at(&self, name: impl Display) -> Weights<'a> {
        Weights { prefix: format!("{}{name}.", self.prefix), ..*self }
    }

    /// Where the tensors go.
    pub fn device(&self) -> &Device {
        self.device
    }

    /// The type of the factors of products.
    pub fn compute(&self) -> Float {
        self.types.compute
    }

    /// A bias, the scale of a norm, a table: f32.
    ///
    /// # Errors
    /// [`Error::Weights`] where the file's tensor cannot be had or holds what is no number.
    pub fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        self.upload(name, &shape, shape, Float::F32)
    }

    /// A matrix or the kernel of a convolution, in the type of weights.
    ///
    /// # Errors
    /// As [`Weights::tensor`]'s.
    pub fn kernel<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        self.upload(name, &shape, shape, self.types.weights)
    }

    /// A kernel of a convolution over single positions, `[outputs, inputs, 1, …]` in the file, as the matrix that it is.
    ///
    /// # Errors
    /// As [`Weights::tensor`]'s.
    pub fn pointwise<const D: usize>(
        &self,
        name: impl Display,
        stored: [usize; D],
        bias: bool,
    ) -> Result<Linear> {
        let (outputs, inputs) = (stored[0], stored[1..].iter().product());
        let weight =
            self.upload(&format!("{name}.weight"), &stored, [outputs, inputs], self.types.weights)?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), [outputs])).transpose()?;
        Ok(Linear { weight, bias, compute: self.types.compute })
    }

    /// Linear layers of the same input, `[outputs, inputs]` each, as one layer whose outputs are theirs one after the other.
    ///
    /// # Errors
    /// As [`Weights::tensor`]'s.
    pub fn stacked(&self, names: &[&str], [outputs, inputs]: [usize; 2], bias: bool) -> Result<Linear> {
        let layers = names.iter().map(|name| self.linear(name, [outputs, inputs], bias));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        if matches!(self.source, Source::Names(_)) {
            let all = outputs * names.len();
            let bias = bias.then(|| self.placeholder([all]));
            return Ok(Linear { weight: self.placeholder([all, inputs]), bias, compute: self.types.compute });
        }
        let (weights, biases): (Vec<_>, Vec<_>) =
            layers.into_iter().map(|layer| (layer.weight, layer.bias)).unzip();
        let bias = biases.into_iter().collect::<Option<Vec<_>>>().map(|biases| Tensor::cat(biases, 0));
        Ok(Linear { weight: Tensor::cat(weights, 0), bias, compute: self.types.compute })
    }

    /// `name.weight` `[outputs, inputs]` and, where there is one, `name.bias` `[outputs]`.
    ///
    /// # Errors
    /// As [`Weights::tensor`]'s.
    pub fn linear(&self, name: impl Display, [outputs, inputs]: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = self.kernel(&format!("{name}.weight"), [outputs, inputs])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), [outputs])).transpose()?;
        Ok(Linear { weight, bias, compute: self.types.compute })
    }

    /// A table `[rows, width]` of which a few rows at a time are looked up: it stays in its file and comes to no device.
    ///
    /// # Errors
    /// [`Error::Weights`] where the file has no such tensor. What its rows hold is seen when they are read.
    pub fn table(&self, name: &str, [rows, width]: [usize; 2]) -> Result<Table> {
        self.expect(name, &[rows, width], Role::Used);
        let name = format!("{}{name}", self.prefix);
        Ok(match self.source {
            Source::Names(_) => Table::empty([rows, width]),
            Source::Random { seed } => Table::random(*seed, name, [rows, width]),
            Source::File { file, progress } => {
                let table = Table::of_file(file, &name, [rows, width])?;
                progress.advance(values::stored_bytes(file, &name));
                table
            }
        })
    }

    /// A kernel under weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868): `g · v / ‖v‖` with the norm over
    /// all axes but the first, from `name.weight_g` and `name.weight_v`, or from `name.parametrizations.weight.original0`
    /// and `original1` as newer PyTorch names them. Fused on the host in f32.
    ///
    /// # Errors
    /// As [`Weights::tensor`]'s.
    pub fn weight_norm<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let mut gain_shape = [1; D];
        gain_shape[0] = shape[0];
        let gain = self.values(&format!("{name}.weight_g"), &gain_shape)?;
        let direction = self.values(&format!("{name}.weight_v"), &shape)?;
        let Some((gain, mut values)) = gain.zip(direction) else {
            return Ok(self.placeholder(shape));
        };
        let row = (values.len() / gain.len().max(1)).max(1);
        for (row, gain) in values.chunks_mut(row).zip(gain) {
            let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v = (f64::from(gain) * f64::from(*v) / norm) as f32);
        }
        Ok(self.to_device(values, shape, self.types.weights))
    }

    /// A tensor that the released file has and inference does not need.
    pub fn unused(&self, name: &str, shape: &[usize]) {
        self.expect(name, shape, Role::Unused);
    }

    /// `name.weight` and `name.bias` of a layer that inference does not need.
    pub fn unused_linear(&self, name: impl Display, [outputs, inputs]: [usize; 2]) {
        self.unused(&format!("{name}.weight"), &[outputs, inputs]);
        self.unused(&format!("{name}.bias"), &[outputs]);
    }

    /// The tensors that another constructor asks for, which are not needed this time.
    ///
    /// # Errors
    /// Those of the constructor.
    pub fn unused_by<M>(&self, build: impl FnOnce(&Weights<'_>) -> Result<M>) -> Result<()> {
        if let Source::Names(names) = self.source {
            let of_other = RefCell::default();
            let source = &Source::Names(&of_other);
            build(&Weights { source, device: self.device, types: self.types, prefix: self.prefix.clone() })?;
            let unused = of_other.take().into_iter();
            names
                .borrow_mut()
                .extend(unused.map(|(name, wanted)| (name, Expected { role: Role::Unused, ..wanted })));
        }
        Ok(())
    }

    /// A tensor that files may have and inference does not need.
    pub fn optional(&self, name: &str, shape: &[usize]) {
        self.expect(name, shape, Role::Optional);
    }

    fn expect(&self, name: &str, shape: &[usize], role: Role) {
        if let Source::Names(names) = self.source {
            let expected = Expected { shape: shape.into(), role };
            names.borrow_mut().insert(format!("{}{name}", self.prefix), expected);
        }
    }

    /// A tensor that the file has in the shape `stored`, in another shape of as many elements.
    fn upload<const D: usize>(
        &self,
        name: &str,
        stored: &[usize],
        shape: [usize; D],
        float: Float,
    ) -> Result<Tensor<D>> {
        if let Source::File { file, progress } = self.source {
            let name = format!("{}{name}", self.prefix);
            // Without a detour over f32, which matters where there are gigabytes of it.
            if let Some(bytes) = values::as_stored(file, &name, stored, float)? {
                progress.advance(values::stored_bytes(file, &name));
                let data = TensorData::from_bytes_vec(bytes, shape.to_vec(), float.into());
                return Ok(Tensor::from_data(data, (self.device.burn(), float.into())));
            }
        }
        Ok(match self.values(name, stored)? {
            Some(values) => self.to_device(values, shape, float),
            None => self.placeholder(shape),
        })
    }

    /// f32 values in row-major order; `None` where only names are wanted.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        self.expect(name, shape, Role::Used);
        let name = format!("{}{name}", self.prefix);
        Ok(match self.source {
            Source::Names(_) => None,
            Source::Random { seed } => Some(random::values(*seed, &name, shape)),
            Source::File { file, progress } => {
                let values = values::read(file, &name, shape)?;
                progress.advance(values::stored_bytes(file, &name));
                Some(values)
            }
        })
    }

    fn to_device<const D: usize>(&self, values: Vec<f32>, shape: [usize; D], float: Float) -> Tensor<D> {
        let data = TensorData::new(values, shape).convert_dtype(float.into());
        Tensor::from_data(data, (self.device.burn(), float.into()))
    }

    /// Of the shape, a single number in memory.
    fn placeholder<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        Tensor::<D>::zeros([1; D], self.device.burn()).expand(shape)
    }
}

/// An error of a tensor of a file.
fn wrong(file: &TensorFile, tensor: &str, found: String, needed: String) -> Error {
    Error::Weights { path: file.path().into(), tensor: tensor.into(), found, needed }
}
