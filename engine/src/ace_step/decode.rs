//! From latents to sound and back (`MusicDCAE` of `acestep/music_dcae/music_dcae_pipeline.py`).

use burn::tensor::{Tensor, TensorData};
use formats::progress::Progress;

use super::{MEL_FRAMES, SAMPLE_RATE, dcae, vocoder};
use crate::audio::mel::LogMel;
use crate::audio::wav::Sound;
use crate::backend::{Device, values_of_tensor};
use crate::error::{Error, Result};
use crate::nn::hooks::Hooks;
use crate::weights::{Component, Types};

/// Latents to sound: the decoder of mel spectrograms, then the vocoder for each channel.
#[derive(Debug)]
pub struct MusicDecoder {
    /// To spectrograms.
    pub decoder: dcae::Decoder,
    /// To sound.
    pub vocoder: vocoder::Vocoder,
}

impl MusicDecoder {
    /// Loads both from their files.
    ///
    /// # Errors
    /// As [`Component::load`]'s.
    pub fn load(
        dcae: &Component<dcae::Config>,
        vocoder: &Component<vocoder::Config>,
        device: &Device,
        types: Types,
        progress: &dyn Progress,
    ) -> Result<MusicDecoder> {
        Ok(MusicDecoder {
            decoder: dcae
                .load(device, types, progress, |weights| dcae::Autoencoder::decoder(&dcae.config, weights))?,
            vocoder: vocoder
                .load(device, types, progress, |weights| vocoder::Vocoder::new(&vocoder.config, weights))?,
        })
    }

    /// f32 latents `[batch, 8, rows, frames]` → f32 log-mel `[batch, 2, bands, 8 · frames]`.
    ///
    /// # Errors
    /// Those of the decoder.
    pub fn log_mel(&self, latents: Tensor<4>) -> Result<Tensor<4>> {
        Ok(dcae::to_log_mel(self.decoder.forward(dcae::of_latents(latents), &Hooks::none())?))
    }

    /// f32 log-mel `[batch, channels, bands, frames]` → sound at 44.1 kHz, one for each sample of the batch.
    ///
    /// The channels go through the vocoder one after the other: its results are the largest of a song.
    ///
    /// # Errors
    /// Those of the vocoder and of reading the result, which may hold what is no number.
    pub fn sound(&self, log_mel: Tensor<4>) -> Result<Vec<Sound>> {
        let [batch, channels, bands, frames] = log_mel.dims();
        let channel = |sample: usize, channel: usize| {
            let mel = log_mel.clone().narrow(0, sample, 1).narrow(1, channel, 1);
            let mel = mel.reshape([1, bands, frames]);
            let samples = values_of_tensor(self.vocoder.forward(mel, &Hooks::none())?)?;
            match samples.iter().position(|sample| !sample.is_finite()) {
                None => Ok(samples),
                Some(index) => Err(Error::Argument {
                    operation: "vocoder",
                    argument: "mel",
                    found: format!("what makes {} of sample {index} of channel {channel}", samples[index]),
                    needed: "numbers from a sound latent".into(),
                }),
            }
        };
        let sounds = (0..batch).map(|sample| {
            let channels = (0..channels).map(|index| channel(sample, index)).collect::<Result<_>>()?;
            Ok(Sound { channels, rate: SAMPLE_RATE })
        });
        sounds.collect()
    }

    /// Latents to sound at 44.1 kHz: `4096 · frames` samples of each channel.
    ///
    /// # Errors
    /// As [`MusicDecoder::log_mel`]'s and [`MusicDecoder::sound`]'s.
    pub fn decode(&self, latents: Tensor<4>) -> Result<Vec<Sound>> {
        self.sound(self.log_mel(latents)?)
    }
}

/// Sound to latents: a log-mel spectrogram, then the encoder.
#[derive(Debug)]
pub struct MusicEncoder {
    encoder: dcae::Encoder,
    mel: LogMel,
    device: burn::tensor::Device,
}

impl MusicEncoder {
    /// Loads the encoder; of the vocoder, its configuration of spectrograms is needed.
    ///
    /// # Errors
    /// As [`Component::load`]'s.
    pub fn load(
        dcae: &Component<dcae::Config>,
        vocoder: &Component<vocoder::Config>,
        device: &Device,
        types: Types,
        progress: &dyn Progress,
    ) -> Result<MusicEncoder> {
        let encoder =
            dcae.load(device, types, progress, |weights| dcae::Autoencoder::encoder(&dcae.config, weights))?;
        Ok(MusicEncoder { encoder, mel: vocoder.config.mel.clone(), device: device.burn().clone() })
    }

    /// Sound of one or two channels at any rate → f32 latents `[1, 8, rows, frames]`. Silence at the end makes its frames whole,
    /// so that latents are up to 93 ms longer.
    ///
    /// # Errors
    /// [`Error::Argument`] for no sound at all, with more channels, at a rate that is none, or with what is no number.
    pub fn encode(&self, sound: &Sound) -> Result<Tensor<4>> {
        if sound.is_empty() {
            return Err(Error::Argument {
                operation: "encoding sound",
                argument: "sound",
                found: "no samples".into(),
                needed: "one at least".into(),
            });
        }
        let mut sound = sound.clone().stereo()?.resampled(self.mel.sampling_rate)?;
        let length = sound.len().next_multiple_of(self.mel.hop_length * MEL_FRAMES);
        let frames = self.mel.frames(length);
        let mut values = Vec::new();
        for channel in &mut sound.channels {
            channel.resize(length, 0.0);
            values.extend(self.mel.compute(channel)?.concat());
        }
        let shape = [1, sound.channels.len(), self.mel.n_mels, frames];
        let log_mel = Tensor::<4>::from_data(TensorData::new(values, shape), &self.device);
        Ok(dcae::to_latents(self.encoder.forward(dcae::of_log_mel(log_mel), &Hooks::none())?))
    }
}
