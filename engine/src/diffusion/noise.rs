//! Where noise comes from: a seed, or a file that replays a run.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use formats::output::Output;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::error::{Error, Result};
use crate::reference::Reference;

/// Draws of a run, each by its name: `init_noise`, `retake_noise`, `step_noise.K`, and `noise.K` of an edit.
pub trait Noise {
    /// Normal noise of a shape, f32.
    ///
    /// # Errors
    /// Where there is no such noise, or of another shape.
    fn draw(&mut self, name: &str, shape: [usize; 4], device: &Device) -> Result<Tensor<4>>;
}

impl<N: Noise + ?Sized> Noise for Box<N> {
    fn draw(&mut self, name: &str, shape: [usize; 4], device: &Device) -> Result<Tensor<4>> {
        (**self).draw(name, shape, device)
    }
}

/// Noise that follows from a seed for each sample: the same on every device. It is this project's own, not PyTorch's, whose
/// generators differ between devices: ChaCha8, and the method of Box and Muller in f64.
#[derive(Clone, Debug)]
pub struct SeededNoise {
    generators: Vec<ChaCha8Rng>,
}

impl SeededNoise {
    /// A generator for each sample; samples beyond the seeds go on with those after the last.
    pub fn new(seeds: &[u64]) -> SeededNoise {
        SeededNoise { generators: seeds.iter().copied().map(ChaCha8Rng::seed_from_u64).collect() }
    }

    fn sample(&mut self, index: usize, count: usize) -> Vec<f32> {
        while self.generators.len() <= index {
            let seed = self.generators.len() as u64;
            self.generators.push(ChaCha8Rng::seed_from_u64(seed));
        }
        let generator = &mut self.generators[index];
        // Above 0, as its logarithm is taken.
        let mut uniform = || ((generator.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            let radius = (-2.0 * uniform().ln()).sqrt();
            let (sin, cos) = (2.0 * std::f64::consts::PI * uniform()).sin_cos();
            values.extend([(radius * cos) as f32, (radius * sin) as f32]);
        }
        values.truncate(count);
        values
    }
}

impl Noise for SeededNoise {
    fn draw(&mut self, _: &str, shape: [usize; 4], device: &Device) -> Result<Tensor<4>> {
        let count = shape[1..].iter().product();
        let values = (0..shape[0]).flat_map(|sample| self.sample(sample, count)).collect::<Vec<f32>>();
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }
}

/// The draws of a run in a SafeTensors file.
#[derive(Debug)]
pub struct NoiseFile {
    tensors: Reference,
    prefix: String,
}

impl NoiseFile {
    /// Opens a file of draws.
    ///
    /// # Errors
    /// [`Error::Format`] where it is no SafeTensors file.
    pub fn open(path: &Path) -> Result<NoiseFile> {
        NoiseFile::with_prefix(path, "")
    }

    /// Opens a file in which a prefix stands before the names of the draws.
    ///
    /// # Errors
    /// As [`NoiseFile::open`]'s.
    pub fn with_prefix(path: &Path, prefix: &str) -> Result<NoiseFile> {
        Ok(NoiseFile { tensors: Reference::open(path)?, prefix: prefix.into() })
    }
}

impl Noise for NoiseFile {
    fn draw(&mut self, name: &str, shape: [usize; 4], device: &Device) -> Result<Tensor<4>> {
        let name = format!("{}{name}", self.prefix);
        let found = self.tensors.shape(&name)?;
        if found != shape {
            return Err(self.tensors.wrong(&name, &format!("shape {found:?}"), &format!("{shape:?}")));
        }
        let values = self.tensors.values(&name)?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("{} at element {index}", values[index]);
            return Err(self.tensors.wrong(&name, &found, "finite numbers"));
        }
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }
}

/// Noise whose draws are kept, for a file that replays the run.
pub struct RecordedNoise<N> {
    source: N,
    draws: Vec<(String, [usize; 4], Vec<u8>)>,
}

impl<N: Noise> RecordedNoise<N> {
    /// Keeps what another source draws.
    pub fn new(source: N) -> RecordedNoise<N> {
        RecordedNoise { source, draws: Vec::new() }
    }

    /// Writes a file that [`NoiseFile`] reads; it appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Format`] where it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |error: safetensors::SafeTensorError| Error::Device(error.to_string());
        let views = self.draws.iter().map(|(name, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(failed)?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let bytes = safetensors::serialize(views, None).map_err(failed)?;
        let output = Output::create(path)?;
        std::io::Write::write_all(&mut output.file(), &bytes).map_err(formats::Error::io(path))?;
        Ok(output.finish()?)
    }
}

impl<N: Noise> Noise for RecordedNoise<N> {
    fn draw(&mut self, name: &str, shape: [usize; 4], device: &Device) -> Result<Tensor<4>> {
        let noise = self.source.draw(name, shape, device)?;
        let values = crate::backend::values_of_tensor(noise.clone())?;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.draws.push((name.into(), shape, bytes));
        Ok(noise)
    }
}
