//! WAV files.

use std::io::{BufReader, BufWriter};
use std::path::Path;

use formats::output::Output;
use hound::{SampleFormat, WavReader, WavSpec, WavWriter};

use crate::error::{Error, Result};

/// Sound, channel by channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Sound {
    /// Samples of each channel, −1 to 1, equally many.
    pub channels: Vec<Vec<f32>>,
    /// Samples a second.
    pub rate: u32,
}

/// How samples are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As they are: 32-bit floats.
    #[default]
    F32,
    /// 16-bit integers; what is beyond −1 and 1 is cut.
    I16,
}

impl Sound {
    /// Samples of a channel.
    pub fn len(&self) -> usize {
        self.channels.first().map_or(0, Vec::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Seconds.
    pub fn seconds(&self) -> f64 {
        self.len() as f64 / f64::from(self.rate.max(1))
    }

    /// With two channels: one is doubled.
    ///
    /// # Errors
    /// [`Error::Argument`] for any other number.
    pub fn stereo(mut self) -> Result<Sound> {
        match self.channels.len() {
            1 => self.channels.push(self.channels[0].clone()),
            2 => {}
            other => {
                return Err(Error::Argument {
                    operation: "sound",
                    argument: "channels",
                    found: other.to_string(),
                    needed: "1 or 2".into(),
                });
            }
        }
        Ok(self)
    }

    /// At another rate.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate of zero.
    pub fn resampled(&self, rate: u32) -> Result<Sound> {
        let channels =
            self.channels.iter().map(|channel| super::resample::resample(channel, self.rate, rate));
        Ok(Sound { channels: channels.collect::<Result<_>>()?, rate })
    }

    /// Writes a file, which appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Audio`] for samples that are no numbers or channels of different lengths, [`Error::Format`] where the file
    /// cannot be written.
    pub fn write(&self, path: &Path, format: Format) -> Result<()> {
        let refuse = |reason: String| Error::Audio { path: path.into(), reason };
        let length = self.len();
        let channels = u16::try_from(self.channels.len()).ok().filter(|&channels| channels > 0);
        let Some(channels) = channels.filter(|_| self.channels.iter().all(|channel| channel.len() == length))
        else {
            let lengths: Vec<usize> = self.channels.iter().map(Vec::len).collect();
            return Err(refuse(format!("channels of {lengths:?} samples; needed equally many")));
        };
        for (channel, samples) in self.channels.iter().enumerate() {
            if let Some(index) = samples.iter().position(|sample| !sample.is_finite()) {
                let found = samples[index];
                return Err(refuse(format!("channel {channel}, sample {index} is {found}; needed numbers")));
            }
        }
        let (bits_per_sample, sample_format) = match format {
            Format::F32 => (32, SampleFormat::Float),
            Format::I16 => (16, SampleFormat::Int),
        };
        let spec = WavSpec { channels, sample_rate: self.rate, bits_per_sample, sample_format };
        let output = Output::create(path)?;
        let failed = |error: hound::Error| refuse(error.to_string());
        let mut writer = WavWriter::new(BufWriter::new(output.file()), spec).map_err(failed)?;
        for index in 0..length {
            for samples in &self.channels {
                let sample = samples[index];
                match format {
                    Format::F32 => writer.write_sample(sample),
                    Format::I16 => writer.write_sample((sample.clamp(-1.0, 1.0) * 32767.0).round() as i16),
                }
                .map_err(failed)?;
            }
        }
        writer.finalize().map_err(failed)?;
        Ok(output.finish()?)
    }

    /// Reads a file of floats or of integers of up to 32 bits.
    ///
    /// # Errors
    /// [`Error::Audio`] where it is no WAV file, ends early, or holds what is no number.
    pub fn read(path: &Path) -> Result<Sound> {
        let refuse = |reason: String| Error::Audio { path: path.into(), reason };
        let failed = |error: hound::Error| refuse(error.to_string());
        let file = std::fs::File::open(path).map_err(formats::Error::io(path))?;
        let mut reader = WavReader::new(BufReader::new(file)).map_err(failed)?;
        let spec = reader.spec();
        let samples: Vec<f32> = match spec.sample_format {
            SampleFormat::Float => reader.samples::<f32>().collect::<Result<_, _>>().map_err(failed)?,
            SampleFormat::Int => {
                let largest = (1u64 << (spec.bits_per_sample.clamp(1, 32) - 1)) as f32;
                let samples =
                    reader.samples::<i32>().map(|sample| sample.map(|sample| sample as f32 / largest));
                samples.collect::<Result<_, _>>().map_err(failed)?
            }
        };
        if let Some(index) = samples.iter().position(|sample| !sample.is_finite()) {
            return Err(refuse(format!("sample {index} is {}; needed numbers", samples[index])));
        }
        let count = usize::from(spec.channels.max(1));
        if samples.is_empty() || !samples.len().is_multiple_of(count) {
            return Err(refuse(format!("{} samples in {count} channels", samples.len())));
        }
        let channel = |channel| samples.iter().skip(channel).step_by(count).copied().collect();
        Ok(Sound { channels: (0..count).map(channel).collect(), rate: spec.sample_rate })
    }
}
