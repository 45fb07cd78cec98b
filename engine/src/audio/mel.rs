//! Log-mel spectrograms (`acestep/music_dcae/music_log_mel.py`), computed on the host.

use realfft::RealFftPlanner;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Added to the squared magnitudes.
const POWER_FLOOR: f32 = 1e-6;
/// The smallest band that a logarithm is taken of.
const BAND_FLOOR: f32 = 1e-5;

/// What a spectrogram is made of.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LogMel {
    /// Samples a second.
    pub sampling_rate: u32,
    /// Samples of a transform.
    pub n_fft: usize,
    /// Samples of the window.
    pub win_length: usize,
    /// Samples from one frame to the next.
    pub hop_length: usize,
    /// Lowest frequency of a band, in Hz.
    pub f_min: f64,
    /// Highest frequency of a band, in Hz.
    pub f_max: f64,
    /// Bands.
    pub n_mels: usize,
}

impl LogMel {
    /// That of the released vocoder.
    pub fn released() -> LogMel {
        LogMel {
            sampling_rate: 44100,
            n_fft: 2048,
            win_length: 2048,
            hop_length: 512,
            f_min: 40.0,
            f_max: 16000.0,
            n_mels: 128,
        }
    }

    /// Says what this code could not compute.
    ///
    /// # Errors
    /// [`Error::Model`] with the field.
    pub fn validate(&self) -> Result<()> {
        let checks = [
            ("n_fft", (2..=1 << 20).contains(&self.n_fft), self.n_fft.to_string(), "2 to 1048576"),
            ("win_length", self.win_length == self.n_fft, self.win_length.to_string(), "that of n_fft"),
            (
                "hop_length",
                (1..=self.n_fft).contains(&self.hop_length)
                    && (self.n_fft - self.hop_length).is_multiple_of(2),
                self.hop_length.to_string(),
                "at most n_fft, and even as it is",
            ),
            ("n_mels", (1..=4096).contains(&self.n_mels), self.n_mels.to_string(), "1 to 4096"),
            (
                "f_max",
                self.f_min >= 0.0 && self.f_min < self.f_max && self.f_max <= f64::from(self.sampling_rate),
                format!("{} to {}", self.f_min, self.f_max),
                "frequencies in order, below the rate",
            ),
        ];
        match checks.into_iter().find(|check| !check.1) {
            Some((field, _, found, needed)) => Err(Error::Model { field, found, needed: needed.into() }),
            None => Ok(()),
        }
    }

    /// Samples that are mirrored at both ends.
    fn padding(&self) -> usize {
        (self.n_fft - self.hop_length) / 2
    }

    /// Frames of so many samples.
    pub fn frames(&self, samples: usize) -> usize {
        (samples + 2 * self.padding()).checked_sub(self.n_fft).map_or(0, |rest| rest / self.hop_length + 1)
    }

    /// The triangular filters of Slaney's Auditory Toolbox (1998), each of area 1: f32 `[n_fft / 2 + 1][n_mels]`.
    pub fn filterbank(&self) -> Vec<Vec<f32>> {
        let bins = self.n_fft / 2 + 1;
        let (low, high) = (mel_of(self.f_min), mel_of(self.f_max));
        let edges: Vec<f64> = (0..self.n_mels + 2)
            .map(|edge| hertz_of(low + (high - low) * edge as f64 / (self.n_mels + 1) as f64))
            .collect();
        let nyquist = f64::from(self.sampling_rate / 2);
        let filters = |bin: usize| {
            let frequency = nyquist * bin as f64 / (bins - 1) as f64;
            let filter = |edges: &[f64]| {
                let rising = (frequency - edges[0]) / (edges[1] - edges[0]);
                let falling = (edges[2] - frequency) / (edges[2] - edges[1]);
                (rising.min(falling).max(0.0) * 2.0 / (edges[2] - edges[0])) as f32
            };
            edges.windows(3).map(filter).collect()
        };
        (0..bins).map(filters).collect()
    }

    /// Logarithms of the bands of each frame: `[n_mels][frames]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for fewer samples than are mirrored at the ends, or for what is no number.
    pub fn compute(&self, samples: &[f32]) -> Result<Vec<Vec<f32>>> {
        self.validate()?;
        let refuse = |found: String, needed: String| {
            Err(Error::Argument { operation: "log-mel spectrogram", argument: "samples", found, needed })
        };
        let padding = self.padding();
        if samples.len() <= padding || self.frames(samples.len()) == 0 {
            return refuse(format!("{} of them", samples.len()), format!("{} at least", padding + 1));
        }
        if let Some(index) = samples.iter().position(|sample| !sample.is_finite()) {
            return refuse(format!("{} at {index}", samples[index]), "finite numbers".into());
        }
        let before = (1..=padding).rev().map(|index| samples[index]);
        let behind = (2..padding + 2).map(|index| samples[samples.len() - index]);
        let padded: Vec<f32> = before.chain(samples.iter().copied()).chain(behind).collect();

        let window: Vec<f32> = (0..self.n_fft)
            .map(|index| 0.5 - 0.5 * (2.0 * std::f64::consts::PI * index as f64 / self.n_fft as f64).cos())
            .map(|value| value as f32)
            .collect();
        let filters = self.filterbank();
        let transform = RealFftPlanner::<f32>::new().plan_fft_forward(self.n_fft);
        let (mut input, mut spectrum) = (transform.make_input_vec(), transform.make_output_vec());
        let frames = self.frames(samples.len());
        let mut bands = vec![Vec::with_capacity(frames); self.n_mels];
        for frame in 0..frames {
            let start = frame * self.hop_length;
            for (value, (sample, window)) in input.iter_mut().zip(padded[start..].iter().zip(&window)) {
                *value = sample * window;
            }
            if let Err(error) = transform.process(&mut input, &mut spectrum) {
                return refuse(error.to_string(), "as many as a transform takes".into());
            }
            let mut sums = vec![0.0f32; self.n_mels];
            for (bin, filters) in spectrum.iter().zip(&filters) {
                let magnitude = (bin.norm_sqr() + POWER_FLOOR).sqrt();
                sums.iter_mut().zip(filters).for_each(|(sum, filter)| *sum += magnitude * filter);
            }
            for (band, sum) in bands.iter_mut().zip(sums) {
                band.push(sum.max(BAND_FLOOR).ln());
            }
        }
        Ok(bands)
    }
}

/// Below 1000 Hz, mels of Slaney's scale are linear.
const LINEAR_HERTZ: f64 = 200.0 / 3.0;
const BREAK_HERTZ: f64 = 1000.0;

/// Octaves of a mel above 1000 Hz.
fn log_step() -> f64 {
    6.4f64.ln() / 27.0
}

fn mel_of(hertz: f64) -> f64 {
    match hertz < BREAK_HERTZ {
        true => hertz / LINEAR_HERTZ,
        false => BREAK_HERTZ / LINEAR_HERTZ + (hertz / BREAK_HERTZ).ln() / log_step(),
    }
}

fn hertz_of(mel: f64) -> f64 {
    let at_break = BREAK_HERTZ / LINEAR_HERTZ;
    match mel < at_break {
        true => mel * LINEAR_HERTZ,
        false => BREAK_HERTZ * ((mel - at_break) * log_step()).exp(),
    }
}
