//! The vocoder, `music_vocoder`: from log-mel spectrograms to sound at 44.1 kHz (`ADaMoSHiFiGANV1` of `acestep/music_dcae/`).
//!
//! A ConvNeXt backbone (Liu et al. 2022, arXiv:2201.03545) and a HiFi-GAN generator (Kong et al. 2020, arXiv:2010.05646) whose
//! weight normalisation is fused while loading.

use burn::tensor::Tensor;
use burn::tensor::activation::{gelu, silu};
use serde::Deserialize;

use crate::audio::mel::LogMel;
use crate::error::{Error, Result};
use crate::nn::conv::{Conv1d, ConvTranspose1d, Walk, replicate_pad};
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::nn::norm::LayerNorm;
use crate::weights::Weights;

/// ε of all norms.
const EPSILON: f32 = 1e-6;

/// `config.json` of `music_vocoder`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// Bands of a spectrogram.
    pub input_channels: usize,
    /// Blocks of the backbone's stages.
    pub depths: Vec<usize>,
    /// Channels of the backbone's stages.
    pub dims: Vec<usize>,
    /// Kernel size of the backbone.
    pub kernel_sizes: Vec<usize>,
    /// By how much each stage of the generator lengthens.
    pub upsample_rates: Vec<usize>,
    /// Kernel sizes of the lengthening.
    pub upsample_kernel_sizes: Vec<usize>,
    /// Kernel sizes of a stage's residual blocks.
    pub resblock_kernel_sizes: Vec<usize>,
    /// Dilations within each of them.
    pub resblock_dilation_sizes: Vec<Vec<usize>>,
    /// Channels between backbone and generator.
    pub num_mels: usize,
    /// Channels before the first stage of the generator; each stage halves them.
    pub upsample_initial_channel: usize,
    /// Whether there is a template, which this code does not have.
    #[serde(default)]
    pub use_template: bool,
    /// Kernel size of the first convolution of the generator.
    pub pre_conv_kernel_size: usize,
    /// Kernel size of its last.
    pub post_conv_kernel_size: usize,
    /// The spectrograms it was trained on.
    #[serde(flatten)]
    pub mel: LogMel,
}

impl Config {
    /// That of the released ACE-Step v1.
    pub fn released() -> Config {
        Config {
            input_channels: 128,
            depths: vec![3, 3, 9, 3],
            dims: vec![128, 256, 384, 512],
            kernel_sizes: vec![7],
            upsample_rates: vec![4, 4, 2, 2, 2, 2, 2],
            upsample_kernel_sizes: vec![8, 8, 4, 4, 4, 4, 4],
            resblock_kernel_sizes: vec![3, 7, 11, 13],
            resblock_dilation_sizes: vec![vec![1, 3, 5]; 4],
            num_mels: 512,
            upsample_initial_channel: 1024,
            use_template: false,
            pre_conv_kernel_size: 13,
            post_conv_kernel_size: 13,
            mel: LogMel::released(),
        }
    }

    /// Samples of a mel frame.
    pub fn hop(&self) -> usize {
        self.upsample_rates.iter().product()
    }

    /// Channels behind a stage of the generator.
    fn channels(&self, stage: usize) -> usize {
        self.upsample_initial_channel >> (stage + 1)
    }

    /// Multiply-adds for so many mel frames of one channel of sound.
    pub fn operations(&self, mel_frames: usize) -> u64 {
        let backbone: u64 = (0..self.dims.len())
            .map(|stage| {
                let dim = self.dims[stage] as u64;
                let before = if stage > 0 { self.dims[stage - 1] } else { self.input_channels };
                let kernel = if stage > 0 { 1 } else { self.kernel_sizes.first().copied().unwrap_or(1) };
                before as u64 * dim * kernel as u64 + self.depths[stage] as u64 * 8 * dim * dim
            })
            .sum();
        let before = (self.num_mels * self.upsample_initial_channel * self.pre_conv_kernel_size) as u64;
        let taps: usize = (self.resblock_kernel_sizes.iter().zip(&self.resblock_dilation_sizes))
            .map(|(kernel, dilations)| 2 * kernel * dilations.len())
            .sum();
        let mut longer = 1;
        let stages = self.upsample_rates.iter().zip(&self.upsample_kernel_sizes).enumerate();
        let generator: u64 = stages
            .map(|(stage, (rate, kernel))| {
                let channels = self.channels(stage);
                let up = longer * (2 * channels * channels * kernel) as u64;
                longer *= *rate as u64;
                up + longer * (channels * channels * taps) as u64
            })
            .sum();
        mel_frames as u64 * (backbone + before + generator)
    }

    /// Bytes of the largest results for so many mel frames of one channel of sound: those of a residual block at the stage where
    /// channels and length are most.
    pub fn activations(&self, mel_frames: usize) -> u64 {
        let mut longer = 1;
        let stages = self.upsample_rates.iter().enumerate().map(|(stage, rate)| {
            longer *= rate;
            (self.channels(stage) * longer) as u64
        });
        6 * 4 * mel_frames as u64 * stages.max().unwrap_or(0)
    }

    /// Says what this code could not run.
    ///
    /// # Errors
    /// [`Error::Model`] with the field.
    pub fn validate(&self) -> Result<()> {
        let checks = [
            ("use_template", !self.use_template, self.use_template.to_string(), "false"),
            (
                "dims",
                !self.dims.is_empty()
                    && self.dims.len() == self.depths.len()
                    && self.dims.iter().all(|dim| (1..=1 << 16).contains(dim))
                    && self.depths.iter().all(|depth| (1..=64).contains(depth)),
                format!("{:?} in {:?} blocks", self.dims, self.depths),
                "1 to 65536 channels in 1 to 64 blocks",
            ),
            (
                "kernel_sizes",
                matches!(self.kernel_sizes[..], [size] if size % 2 == 1 && size < 64),
                format!("{:?}", self.kernel_sizes),
                "one odd size",
            ),
            (
                "num_mels",
                self.dims.last() == Some(&self.num_mels),
                self.num_mels.to_string(),
                "the channels of the last stage",
            ),
            (
                "upsample_rates",
                (1..=16).contains(&self.upsample_rates.len())
                    && self.upsample_rates.len() == self.upsample_kernel_sizes.len()
                    && (self.upsample_rates.iter().zip(&self.upsample_kernel_sizes)).all(|(rate, kernel)| {
                        (1..=64).contains(rate) && (*rate..=256).contains(kernel) && (kernel - rate) % 2 == 0
                    }),
                format!("{:?} with kernels {:?}", self.upsample_rates, self.upsample_kernel_sizes),
                "rates with kernels that are longer by an even number",
            ),
            (
                "upsample_initial_channel",
                self.upsample_initial_channel <= 1 << 16
                    && self.upsample_rates.len() < 32
                    && self.upsample_initial_channel.is_multiple_of(1 << self.upsample_rates.len())
                    && self.upsample_initial_channel > 0,
                self.upsample_initial_channel.to_string(),
                "what each stage can halve",
            ),
            (
                "resblock_kernel_sizes",
                !self.resblock_kernel_sizes.is_empty()
                    && self.resblock_kernel_sizes.len() == self.resblock_dilation_sizes.len()
                    && self.resblock_kernel_sizes.iter().all(|size| size % 2 == 1 && *size < 256)
                    && self.resblock_dilation_sizes.iter().flatten().all(|size| (1..=64).contains(size)),
                format!("{:?}, {:?}", self.resblock_kernel_sizes, self.resblock_dilation_sizes),
                "odd sizes, dilations from 1 for each",
            ),
            (
                "pre_conv_kernel_size",
                [self.pre_conv_kernel_size, self.post_conv_kernel_size]
                    .iter()
                    .all(|size| size % 2 == 1 && *size < 256),
                format!("{}, {}", self.pre_conv_kernel_size, self.post_conv_kernel_size),
                "odd sizes",
            ),
            (
                "input_channels",
                (1..=1 << 16).contains(&self.input_channels),
                self.input_channels.to_string(),
                "1 to 65536",
            ),
        ];
        for (field, holds, found, needed) in checks {
            if !holds {
                return Err(Error::Model { field, found, needed: needed.into() });
            }
        }
        self.mel.validate()
    }
}

/// The vocoder.
#[derive(Debug)]
pub struct Vocoder {
    stem: Conv1d,
    stem_norm: LayerNorm,
    /// Norm and convolution before each stage but the first.
    between: Vec<(LayerNorm, Conv1d)>,
    stages: Vec<Vec<ConvNeXt>>,
    norm: LayerNorm,
    conv_pre: Conv1d,
    ups: Vec<Up>,
    conv_post: Conv1d,
    bands: usize,
}

#[derive(Debug)]
struct Up {
    up: ConvTranspose1d,
    resblocks: Vec<Vec<(Conv1d, Conv1d)>>,
}

impl Vocoder {
    /// Asks for every tensor of the released file. Its window and filterbank are not read: they follow from the configuration.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that this code cannot run, and those of the weights.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Vocoder> {
        config.validate()?;
        let mel = &config.mel;
        weights.optional("mel_transform.spectrogram.window", &[mel.win_length]);
        weights.optional("mel_transform.mel_scale.fb", &[mel.n_fft / 2 + 1, mel.n_mels]);
        let backbone = weights.at("backbone");
        let dims = &config.dims;
        let kernel = config.kernel_sizes[0];
        let layers = backbone.at("channel_layers");
        let between = (1..dims.len()).map(|stage| {
            let layer = layers.at(stage);
            let shape = [dims[stage], dims[stage - 1], 1];
            Ok((norm(&layer, 0, dims[stage - 1])?, Conv1d::new(&layer, 1, shape, true, Walk::same(1))?))
        });
        let stages = (0..dims.len()).map(|stage| {
            let blocks = 0..config.depths[stage];
            let stage_weights = backbone.at("stages").at(stage);
            blocks.map(|block| ConvNeXt::new(dims[stage], kernel, &stage_weights.at(block))).collect()
        });
        let head = weights.at("head");
        let initial = config.upsample_initial_channel;
        let ups = (0..config.upsample_rates.len()).map(|stage| {
            let (rate, taps) = (config.upsample_rates[stage], config.upsample_kernel_sizes[stage]);
            let channels = config.channels(stage);
            let name = format!("ups.{stage}");
            let shape = [2 * channels, channels, taps];
            let kernels = config.resblock_kernel_sizes.len();
            let resblocks =
                config.resblock_kernel_sizes.iter().zip(&config.resblock_dilation_sizes).enumerate();
            let resblocks = resblocks.map(|(index, (&taps, dilations))| {
                let block = head.at("resblocks").at(stage * kernels + index);
                let shape = [channels, channels, taps];
                let pair = |(index, &dilation): (usize, &usize)| {
                    Ok((
                        Conv1d::normalised(
                            &block,
                            format_args!("convs1.{index}"),
                            shape,
                            Walk::dilated(taps, dilation),
                        )?,
                        Conv1d::normalised(&block, format_args!("convs2.{index}"), shape, Walk::same(taps))?,
                    ))
                };
                dilations.iter().enumerate().map(pair).collect::<Result<_>>()
            });
            Ok(Up {
                up: ConvTranspose1d::normalised(&head, name, shape, rate, (taps - rate) / 2)?,
                resblocks: resblocks.collect::<Result<_>>()?,
            })
        });
        let (pre, post) = (config.pre_conv_kernel_size, config.post_conv_kernel_size);
        let last = initial >> config.upsample_rates.len();
        let stem = Conv1d::new(
            &layers.at(0),
            0,
            [dims[0], config.input_channels, kernel],
            true,
            Walk::same(kernel).unpadded(),
        )?;
        Ok(Vocoder {
            stem,
            stem_norm: norm(&layers.at(0), 1, dims[0])?,
            between: between.collect::<Result<_>>()?,
            stages: stages.collect::<Result<_>>()?,
            norm: norm(&backbone, "norm", config.num_mels)?,
            conv_pre: Conv1d::normalised(
                &head,
                "conv_pre",
                [initial, config.num_mels, pre],
                Walk::same(pre),
            )?,
            ups: ups.collect::<Result<_>>()?,
            conv_post: Conv1d::normalised(&head, "conv_post", [1, last, post], Walk::same(post))?,
            bands: config.input_channels,
        })
    }

    /// f32 log-mel `[batch, bands, frames]` → f32 sound `[batch, 1, frames · hop]` from −1 to 1. Left and right are two samples of
    /// a batch.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of bands, or nothing.
    pub fn forward(&self, mel: Tensor<3>, hooks: &Hooks<'_>) -> Result<Tensor<3>> {
        let [_, bands, frames] = mel.dims();
        if bands != self.bands || frames == 0 {
            return Err(Error::Argument {
                operation: "vocoder",
                argument: "mel",
                found: format!("of shape {:?}", mel.dims()),
                needed: format!("[batch, {}, frames]", self.bands),
            });
        }
        Ok(self.generate(self.features(mel, &hooks.at("backbone")), &hooks.at("head")))
    }

    /// The backbone.
    fn features(&self, mel: Tensor<3>, hooks: &Hooks<'_>) -> Tensor<3> {
        let taps = self.stem.weight.dims()[2];
        let x = self.stem.forward(replicate_pad(mel, taps / 2));
        let mut x = of_channels(x, &self.stem_norm);
        let layers = hooks.at("channel_layers");
        layers.at(0).see("", &x);
        for (stage, blocks) in self.stages.iter().enumerate() {
            if let Some((norm, conv)) = stage.checked_sub(1).map(|index| &self.between[index]) {
                x = conv.forward(of_channels(x, norm));
                layers.at(stage).see("", &x);
            }
            for block in blocks {
                x = block.forward(x);
            }
            hooks.at("stages").at(stage).see("", &x);
        }
        let x = of_channels(x, &self.norm);
        hooks.see("", &x);
        x
    }

    /// The generator.
    fn generate(&self, features: Tensor<3>, hooks: &Hooks<'_>) -> Tensor<3> {
        let mut x = self.conv_pre.forward(features);
        hooks.see("conv_pre", &x);
        for (stage, Up { up, resblocks }) in self.ups.iter().enumerate() {
            x = up.forward(silu(x));
            hooks.at("ups").at(stage).see("", &x);
            let kernels = resblocks.len();
            let results = resblocks.iter().enumerate().map(|(index, block)| {
                let y = residual(x.clone(), block);
                hooks.at("resblocks").at(stage * kernels + index).see("", &y);
                y
            });
            let sum = results.reduce(|a, b| a + b);
            x = sum.map_or(x.clone(), |sum| sum.div_scalar(kernels as f32));
        }
        let x = self.conv_post.forward(silu(x));
        hooks.see("conv_post", &x);
        x.tanh()
    }

    /// The fused kernel of a layer of the generator, by its name in the file.
    pub(super) fn effective_weight(&self, name: &str) -> Option<Tensor<3>> {
        if name == "head.conv_pre" {
            return Some(self.conv_pre.weight.clone());
        }
        let numbers: Vec<usize> = name.split('.').filter_map(|part| part.parse().ok()).collect();
        match numbers[..] {
            [stage] => self.ups.get(stage).map(|up| up.up.weight.clone()),
            [block, layer] => {
                let blocks: Vec<_> = self.ups.iter().flat_map(|up| &up.resblocks).collect();
                let (first, second) = blocks.get(block)?.get(layer)?;
                Some(if name.contains("convs1") { &first.weight } else { &second.weight }.clone())
            }
            _ => None,
        }
    }
}

/// Convolutions with growing and with no distance between their taps, each pair beside a residual.
fn residual(mut x: Tensor<3>, block: &[(Conv1d, Conv1d)]) -> Tensor<3> {
    for (dilated, dense) in block {
        x = x.clone() + dense.forward(silu(dilated.forward(silu(x))));
    }
    x
}

/// A block of the backbone.
#[derive(Debug)]
struct ConvNeXt {
    dwconv: Conv1d,
    norm: LayerNorm,
    pwconv1: Linear,
    pwconv2: Linear,
    gamma: Tensor<1>,
}

impl ConvNeXt {
    fn new(dim: usize, kernel: usize, weights: &Weights<'_>) -> Result<ConvNeXt> {
        let depthwise = Walk::same(kernel).grouped(dim);
        Ok(ConvNeXt {
            dwconv: Conv1d::new(weights, "dwconv", [dim, 1, kernel], true, depthwise)?,
            norm: norm(weights, "norm", dim)?,
            pwconv1: weights.linear("pwconv1", [4 * dim, dim], true)?,
            pwconv2: weights.linear("pwconv2", [dim, 4 * dim], true)?,
            gamma: weights.tensor("gamma", [dim])?,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.norm.forward(self.dwconv.forward(x.clone()).swap_dims(1, 2));
        let y = self.pwconv2.forward(gelu(self.pwconv1.forward(y))) * self.gamma.clone().unsqueeze();
        x + y.swap_dims(1, 2)
    }
}

/// Normalises the channels of each position.
fn of_channels(x: Tensor<3>, norm: &LayerNorm) -> Tensor<3> {
    norm.forward(x.swap_dims(1, 2)).swap_dims(1, 2)
}

fn norm(weights: &Weights<'_>, name: impl std::fmt::Display, dim: usize) -> Result<LayerNorm> {
    Ok(LayerNorm {
        weight: weights.tensor(&format!("{name}.weight"), [dim])?,
        bias: weights.tensor(&format!("{name}.bias"), [dim])?,
        epsilon: EPSILON,
    })
}
