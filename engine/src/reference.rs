//! Results of original code in files, and how far ours are from them.

use std::fmt;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use formats::checkpoint::TensorFile;
use safetensors::Dtype;

use crate::backend::values_of_tensor;
use crate::error::{Error, Result};
use crate::nn::hooks::Seen;

/// Inputs and results that original code wrote.
#[derive(Debug)]
pub struct Reference {
    file: TensorFile,
}

/// How far a result may be from the original's: `|a − b| ≤ absolute + relative · |b|`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Tolerance {
    /// The part that does not depend on the value.
    pub absolute: f64,
    /// The part of the value's size.
    pub relative: f64,
}

impl Tolerance {
    /// An absolute tolerance with the 1e-5 of the value's size that f32 needs.
    pub const fn of(absolute: f64) -> Tolerance {
        Tolerance { absolute, relative: 1e-5 }
    }

    /// Not at all.
    pub const EXACT: Tolerance = Tolerance { absolute: 0.0, relative: 0.0 };
}

/// One tensor beside the original's.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Comparison {
    /// The original's name for it.
    pub tensor: String,
    /// The largest difference; infinite where the lengths differ or where a value is no number.
    pub error: f64,
    /// What is allowed.
    pub tolerance: Tolerance,
    /// The largest difference as a part of what is allowed there: at most 1 passes.
    pub share: f64,
}

impl Comparison {
    /// Whether every value is as near as it has to be.
    pub fn passed(&self) -> bool {
        self.share <= 1.0
    }

    /// Compares values.
    pub fn of(tensor: &str, found: &[f32], truth: &[f32], tolerance: Tolerance) -> Comparison {
        let mut comparison = Comparison { tensor: tensor.into(), error: 0.0, tolerance, share: 0.0 };
        if found.len() != truth.len() || truth.is_empty() {
            comparison.error = f64::INFINITY;
            comparison.share = f64::INFINITY;
        }
        for (&found, &truth) in found.iter().zip(truth) {
            let (found, truth) = (f64::from(found), f64::from(truth));
            // What both call infinite is the same.
            if found == truth {
                continue;
            }
            let error = (found - truth).abs();
            let share = error / (tolerance.absolute + tolerance.relative * truth.abs());
            // `max` would swallow what is no number.
            let known = |value: f64| if value.is_nan() { f64::INFINITY } else { value };
            comparison.error = comparison.error.max(known(error));
            comparison.share = comparison.share.max(known(share));
        }
        comparison
    }

    /// The same comparison where another absolute error is allowed, of values no larger than 1.
    pub fn within(self, tolerance: Tolerance) -> Comparison {
        let share = self.error / tolerance.absolute;
        Comparison { tolerance, share, ..self }
    }

    /// Whether two things are the same, as an error of 0 or 1.
    pub fn same<T: PartialEq>(tensor: &str, found: &T, truth: &T) -> Comparison {
        let error = if found == truth { 0.0 } else { 1.0 };
        let share = if found == truth { 0.0 } else { f64::INFINITY };
        Comparison { tensor: tensor.into(), error, tolerance: Tolerance::EXACT, share }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: error {:.2e}, {:.3} of what is allowed", self.tensor, self.error, self.share)
    }
}

impl Reference {
    /// Opens a file of results.
    ///
    /// # Errors
    /// [`Error::Format`] where it is no SafeTensors file.
    pub fn open(path: &Path) -> Result<Reference> {
        Ok(Reference { file: TensorFile::open(path)? })
    }

    /// The names of its tensors that begin with `prefix`.
    pub fn names(&self, prefix: &str) -> impl Iterator<Item = &str> {
        self.file.tensors().keys().map(String::as_str).filter(move |name| name.starts_with(prefix))
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.file.tensors().contains_key(name)
    }

    /// The sizes of a tensor.
    ///
    /// # Errors
    /// [`Error::Weights`] where there is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        match self.file.tensors().get(name) {
            Some(info) => Ok(&info.shape),
            None => Err(self.wrong(name, "no such tensor", "one of this name")),
        }
    }

    /// The values of a tensor of floats, or of whole numbers that f32 holds.
    ///
    /// # Errors
    /// [`Error::Weights`] where there is no such tensor or it is of another type.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.shape(name)?;
        let bytes = self.file.read(name)?;
        let pairs = bytes.as_chunks::<2>().0.iter();
        let quads = bytes.as_chunks::<4>().0.iter();
        Ok(match self.file.tensors()[name].dtype {
            Dtype::F32 => quads.map(|&b| f32::from_le_bytes(b)).collect(),
            Dtype::BF16 => pairs.map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as f32).collect(),
            other => return Err(self.wrong(name, &format!("{other:?}"), "F32, BF16 or I64")),
        })
    }

    /// The values of a tensor of whole numbers.
    ///
    /// # Errors
    /// [`Error::Weights`] where there is no such tensor or it is of another type.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>> {
        self.shape(name)?;
        match self.file.tensors()[name].dtype {
            Dtype::I64 => {
                let bytes = self.file.read(name)?;
                Ok(bytes.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect())
            }
            other => Err(self.wrong(name, &format!("{other:?}"), "I64")),
        }
    }

    /// A tensor on a device, f32.
    ///
    /// # Errors
    /// [`Error::Weights`] where there is no such tensor or it has another number of axes.
    pub fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D>> {
        let shape = self.axes::<D>(name)?;
        Ok(Tensor::from_data(TensorData::new(self.values(name)?, shape), device))
    }

    /// A tensor of whole numbers on a device.
    ///
    /// # Errors
    /// As [`Reference::tensor`]'s.
    pub fn integer_tensor<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D, Int>> {
        let shape = self.axes::<D>(name)?;
        let values: Vec<i32> = self.integers(name)?.into_iter().map(|value| value as i32).collect();
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }

    /// A result of ours beside the tensor `name`.
    ///
    /// # Errors
    /// [`Error::Weights`] where there is no such tensor, [`Error::Device`] where ours cannot be read.
    pub fn compare<const D: usize>(
        &self,
        name: &str,
        found: Tensor<D>,
        tolerance: Tolerance,
    ) -> Result<Comparison> {
        let shape = found.dims();
        if self.shape(name)? != shape {
            let found = format!("{:?}", self.shape(name)?);
            return Err(self.wrong(name, &found, &format!("{shape:?}, the shape of what was computed")));
        }
        Ok(Comparison::of(name, &values_of_tensor(found)?, &self.values(name)?, tolerance))
    }

    /// Everything that was seen and is here as `prefix` and its name, in the order of its computation. What is here and was
    /// not seen has failed.
    ///
    /// # Errors
    /// As [`Reference::values`]'s.
    pub fn compare_seen(&self, prefix: &str, seen: &[Seen], tolerance: Tolerance) -> Result<Vec<Comparison>> {
        let mut found = Vec::new();
        for seen in seen {
            let name = format!("{prefix}{}", seen.name);
            if self.has(&name) {
                let same_shape = self.shape(&name)? == seen.shape;
                let values: &[f32] = if same_shape { &seen.values } else { &[] };
                found.push(Comparison::of(&name, values, &self.values(&name)?, tolerance));
            }
        }
        let is_missing = |name: &&str| !found.iter().any(|comparison| comparison.tensor == **name);
        let missing: Vec<&str> = self.names(prefix).filter(is_missing).collect();
        found.extend(missing.into_iter().map(|name| Comparison::of(name, &[], &[], tolerance)));
        Ok(found)
    }

    fn axes<const D: usize>(&self, name: &str) -> Result<[usize; D]> {
        let shape = self.shape(name)?;
        shape.try_into().map_err(|_| self.wrong(name, &format!("shape {shape:?}"), &format!("{D} axes")))
    }

    /// An error of a tensor of this file.
    pub(crate) fn wrong(&self, tensor: &str, found: &str, needed: &str) -> Error {
        Error::Weights {
            path: self.file.path().into(),
            tensor: tensor.into(),
            found: found.into(),
            needed: needed.into(),
        }
    }
}
