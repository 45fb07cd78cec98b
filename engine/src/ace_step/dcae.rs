//! The autoencoder of mel spectrograms, `music_dcae_f8c8`: a deep-compression autoencoder (Chen et al. 2024,
//! arXiv:2410.10733; `AutoencoderDC` of diffusers).
//!
//! Latents are `[batch, 8, rows, frames]`, spectrograms `[batch, 2, 8 · rows, 8 · frames]`: the channels are left and right.
//! Attention is over all rows and frames, so a part of a latent is not decoded as it would be within the whole.

use burn::tensor::Tensor;
use burn::tensor::activation::{relu, silu};
use serde::Deserialize;

use super::transformer::linear_attention;
use crate::error::{Error, Result};
use crate::nn::conv::{Conv2d, Walk};
use crate::nn::hooks::Hooks;
use crate::nn::linear::Linear;
use crate::nn::norm::RmsNorm;
use crate::weights::Weights;

/// ε of all norms.
const EPSILON: f32 = 1e-5;
/// What latents are multiplied by, and moved by before: `MusicDCAE` of `acestep/music_dcae/music_dcae_pipeline.py`. The
/// `scaling_factor` of the configuration is not used.
const LATENT_SCALE: f32 = 0.1786;
const LATENT_SHIFT: f32 = -1.9091;
/// Log-mel values at the ends of the range −1 to 1.
const LOWEST_MEL: f32 = -11.0;
const HIGHEST_MEL: f32 = 3.0;

/// `config.json` of `music_dcae_f8c8`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// Channels of a spectrogram.
    pub in_channels: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Size of an attention head.
    pub attention_head_dim: usize,
    /// Kind of the encoder's blocks in each stage.
    pub encoder_block_types: Vec<BlockType>,
    /// Kind of the decoder's blocks in each stage.
    pub decoder_block_types: Vec<BlockType>,
    /// Channels of the encoder's stages.
    pub encoder_block_out_channels: Vec<usize>,
    /// Channels of the decoder's stages.
    pub decoder_block_out_channels: Vec<usize>,
    /// Blocks of the encoder's stages.
    pub encoder_layers_per_block: Vec<usize>,
    /// Blocks of the decoder's stages.
    pub decoder_layers_per_block: Vec<usize>,
    /// Kernel sizes of the further queries, keys and values in the encoder's stages with attention.
    pub encoder_qkv_multiscales: Vec<Vec<usize>>,
    /// The same of the decoder.
    pub decoder_qkv_multiscales: Vec<Vec<usize>>,
    /// How the decoder doubles sizes.
    pub upsample_block_type: String,
    /// How the encoder halves them.
    pub downsample_block_type: String,
}

/// Kinds of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum BlockType {
    /// Two convolutions beside a residual.
    ResBlock,
    /// Linear attention and a gated convolution, each beside a residual.
    EfficientViTBlock,
}

impl Config {
    /// That of the released ACE-Step v1.
    pub fn released() -> Config {
        use BlockType::{EfficientViTBlock, ResBlock};
        let blocks = vec![ResBlock, ResBlock, ResBlock, EfficientViTBlock];
        let channels = vec![128, 256, 512, 1024];
        let scales = vec![vec![], vec![], vec![5], vec![5]];
        Config {
            in_channels: 2,
            latent_channels: 8,
            attention_head_dim: 32,
            encoder_block_types: blocks.clone(),
            decoder_block_types: blocks,
            encoder_block_out_channels: channels.clone(),
            decoder_block_out_channels: channels,
            encoder_layers_per_block: vec![2, 2, 3, 3],
            decoder_layers_per_block: vec![3, 3, 3, 3],
            encoder_qkv_multiscales: scales.clone(),
            decoder_qkv_multiscales: scales,
            upsample_block_type: "interpolate".into(),
            downsample_block_type: "Conv".into(),
        }
    }

    /// Rows and frames of a spectrogram for one of a latent.
    pub fn compression(&self) -> usize {
        1 << (self.decoder_block_out_channels.len().max(1) - 1)
    }

    /// Multiply-adds of decoding so many frames of a latent of 16 rows.
    pub fn decoder_operations(&self, frames: usize) -> u64 {
        let channels = &self.decoder_block_out_channels;
        let positions = |stage: usize| ((16 * frames) as u64) << (2 * (channels.len() - 1 - stage));
        let square = |stage: usize| (channels[stage] as u64).pow(2);
        let stages = (0..channels.len()).map(|stage| {
            let of_block = match self.decoder_block_types[stage] {
                BlockType::ResBlock => 18 * square(stage),
                // Projections, grouped ones, the output, and the gated convolution.
                BlockType::EfficientViTBlock => (3 + 2 + 12) * square(stage),
            };
            let wider = channels.get(stage + 1).map_or(0, |&above| 9 * (above * channels[stage]) as u64);
            positions(stage) * (self.decoder_layers_per_block[stage] as u64 * of_block + wider)
        });
        stages.sum()
    }

    /// Bytes of the largest results that decoding so many frames has at once.
    pub fn decoder_activations(&self, frames: usize) -> u64 {
        let channels = &self.decoder_block_out_channels;
        let stages = (0..channels.len()).map(|stage| {
            let positions = ((16 * frames) as u64) << (2 * (channels.len() - 1 - stage));
            // A gated convolution is eight times as wide as its block.
            let width = match self.decoder_block_types[stage] {
                BlockType::ResBlock => 4,
                BlockType::EfficientViTBlock => 18,
            };
            positions * channels[stage] as u64 * width * 4
        });
        stages.max().unwrap_or(0)
    }

    /// Says what this code could not run.
    ///
    /// # Errors
    /// [`Error::Model`] with the field.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field: &'static str, found: String, needed: &str| {
            Err(Error::Model { field, found, needed: needed.into() })
        };
        let sides = [
            (
                "encoder_block_out_channels",
                &self.encoder_block_out_channels,
                &self.encoder_block_types,
                &self.encoder_layers_per_block,
                &self.encoder_qkv_multiscales,
            ),
            (
                "decoder_block_out_channels",
                &self.decoder_block_out_channels,
                &self.decoder_block_types,
                &self.decoder_layers_per_block,
                &self.decoder_qkv_multiscales,
            ),
        ];
        let sizes = [self.in_channels, self.latent_channels, self.attention_head_dim];
        if sizes.iter().any(|size| !(1..=1 << 16).contains(size)) {
            return wrong("in_channels", format!("{sizes:?} with latents and heads"), "1 to 65536");
        }
        for (field, channels, types, layers, scales) in sides {
            let stages = channels.len();
            if !(1..=8).contains(&stages) || [types.len(), layers.len(), scales.len()] != [stages; 3] {
                let found = format!("{stages} stages, {} types, {} counts", types.len(), layers.len());
                return wrong(field, found, "1 to 8 stages, each with its type, count and scales");
            }
            if channels.iter().any(|channels| !(1..=1 << 16).contains(channels))
                || layers.iter().any(|layers| !(1..=64).contains(layers))
            {
                return wrong(
                    field,
                    format!("{channels:?} in {layers:?} blocks"),
                    "1 to 65536 in 1 to 64 blocks",
                );
            }
            if channels.windows(2).any(|pair| !(4 * pair[0]).is_multiple_of(pair[1])) {
                return wrong(
                    field,
                    format!("{channels:?}"),
                    "each four times the one before, divided evenly",
                );
            }
            if !channels[stages - 1].is_multiple_of(self.latent_channels) {
                return wrong(field, format!("{channels:?}"), "at last a multiple of the latent's channels");
            }
            let heads_fit = types.iter().zip(channels).all(|(block, channels)| {
                *block == BlockType::ResBlock || channels.is_multiple_of(self.attention_head_dim)
            });
            if !heads_fit {
                return wrong(
                    field,
                    format!("{channels:?}"),
                    "a multiple of attention_head_dim with attention",
                );
            }
            if let Some(size) = scales.iter().flatten().find(|size| size.is_multiple_of(2) || **size > 31) {
                return wrong("qkv_multiscales", size.to_string(), "odd kernel sizes up to 31");
            }
        }
        match (self.upsample_block_type.as_str(), self.downsample_block_type.as_str()) {
            ("interpolate", "Conv") => Ok(()),
            (up, down) => wrong("upsample_block_type", format!("{up}, {down}"), "interpolate and Conv"),
        }
    }
}

/// Latents as the transformer has them → as the decoder takes them: `z / 0.1786 − 1.9091`.
pub fn of_latents(latents: Tensor<4>) -> Tensor<4> {
    latents.div_scalar(LATENT_SCALE).add_scalar(LATENT_SHIFT)
}

/// The way back.
pub fn to_latents(encoded: Tensor<4>) -> Tensor<4> {
    encoded.sub_scalar(LATENT_SHIFT).mul_scalar(LATENT_SCALE)
}

/// What the decoder yields → log-mel values: `(x · 0.5 + 0.5) · 14 − 11`.
pub fn to_log_mel(decoded: Tensor<4>) -> Tensor<4> {
    decoded.mul_scalar(0.5).add_scalar(0.5).mul_scalar(HIGHEST_MEL - LOWEST_MEL).add_scalar(LOWEST_MEL)
}

/// The way back.
pub fn of_log_mel(log_mel: Tensor<4>) -> Tensor<4> {
    log_mel.sub_scalar(LOWEST_MEL).div_scalar(HIGHEST_MEL - LOWEST_MEL).sub_scalar(0.5).div_scalar(0.5)
}

/// Encoder and decoder.
#[derive(Debug)]
pub struct Autoencoder {
    /// From spectrograms to latents.
    pub encoder: Encoder,
    /// From latents to spectrograms.
    pub decoder: Decoder,
}

impl Autoencoder {
    /// Asks for every tensor of the released file.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that this code cannot run, and those of the weights.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Autoencoder> {
        Ok(Autoencoder { encoder: Encoder::new(config, weights)?, decoder: Decoder::new(config, weights)? })
    }

    /// The decoder of a file that has both.
    ///
    /// # Errors
    /// As [`Autoencoder::new`]'s.
    pub fn decoder(config: &Config, weights: &Weights<'_>) -> Result<Decoder> {
        weights.unused_by(|weights| Encoder::new(config, weights))?;
        Decoder::new(config, weights)
    }

    /// The encoder of a file that has both.
    ///
    /// # Errors
    /// As [`Autoencoder::new`]'s.
    pub fn encoder(config: &Config, weights: &Weights<'_>) -> Result<Encoder> {
        weights.unused_by(|weights| Decoder::new(config, weights))?;
        Encoder::new(config, weights)
    }
}

/// From latents to spectrograms.
#[derive(Debug)]
pub struct Decoder {
    conv_in: Conv2d,
    /// From the last stage of the configuration to the first.
    up_blocks: Vec<UpBlock>,
    norm_out: BiasedRmsNorm,
    conv_out: Conv2d,
    latent_channels: usize,
}

#[derive(Debug)]
struct UpBlock {
    stage: usize,
    upsample: Option<Upsample>,
    blocks: Vec<Block>,
}

impl Decoder {
    /// Asks for the tensors below `decoder`.
    ///
    /// # Errors
    /// As [`Autoencoder::new`]'s.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Decoder> {
        config.validate()?;
        let weights = weights.at("decoder");
        let channels = &config.decoder_block_out_channels;
        let last = channels.len() - 1;
        let up_blocks = (0..=last).rev().map(|stage| {
            let weights = weights.at("up_blocks").at(stage);
            let upsample = (stage < last)
                .then(|| Upsample::new([channels[stage + 1], channels[stage]], &weights.at(0)))
                .transpose()?;
            let first = usize::from(upsample.is_some());
            let kind = Kind {
                block: config.decoder_block_types[stage],
                channels: channels[stage],
                head_dim: config.attention_head_dim,
                scales: &config.decoder_qkv_multiscales[stage],
            };
            let layers = first..first + config.decoder_layers_per_block[stage];
            let blocks = layers.map(|layer| Block::new(kind, &weights.at(layer))).collect::<Result<_>>()?;
            Ok(UpBlock { stage, upsample, blocks })
        });
        let same = Walk::same(3);
        Ok(Decoder {
            conv_in: Conv2d::new(
                &weights,
                "conv_in",
                [channels[last], config.latent_channels, 3],
                true,
                same,
            )?,
            up_blocks: up_blocks.collect::<Result<_>>()?,
            norm_out: norm(&weights, "norm_out", channels[0])?,
            conv_out: Conv2d::new(&weights, "conv_out", [config.in_channels, channels[0], 3], true, same)?,
            latent_channels: config.latent_channels,
        })
    }

    /// f32 `[batch, latent_channels, rows, frames]` → f32 `[batch, in_channels, 8 · rows, 8 · frames]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of channels, or nothing.
    pub fn forward(&self, latent: Tensor<4>, hooks: &Hooks<'_>) -> Result<Tensor<4>> {
        let [_, channels, rows, frames] = latent.dims();
        if channels != self.latent_channels || rows * frames == 0 {
            return Err(refused(
                "latent",
                format!("of shape {:?}", latent.dims()),
                format!("[batch, {}, rows, frames]", self.latent_channels),
            ));
        }
        let hooks = hooks.at("decoder");
        let conv = self.conv_in.forward(latent.clone());
        hooks.see("conv_in", &conv);
        let repeats = conv.dims()[1] / channels;
        let mut x = conv + repeated(latent, repeats);
        for up in &self.up_blocks {
            let hooks = hooks.at("up_blocks").at(up.stage);
            let mut index = 0;
            if let Some(upsample) = &up.upsample {
                x = upsample.forward(x);
                hooks.at(0).see("", &x);
                index = 1;
            }
            for (layer, block) in up.blocks.iter().enumerate() {
                x = block.forward(x, &hooks.at(index + layer));
            }
            hooks.see("", &x);
        }
        let x = self.norm_out.forward(x.permute([0, 2, 3, 1]));
        hooks.see("norm_out", &x);
        Ok(self.conv_out.forward(relu(x.permute([0, 3, 1, 2]))))
    }
}

/// From spectrograms to latents.
#[derive(Debug)]
pub struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    conv_out: Conv2d,
    in_channels: usize,
    compression: usize,
}

#[derive(Debug)]
struct DownBlock {
    blocks: Vec<Block>,
    downsample: Option<Downsample>,
}

impl Encoder {
    /// Asks for the tensors below `encoder`.
    ///
    /// # Errors
    /// As [`Autoencoder::new`]'s.
    pub fn new(config: &Config, weights: &Weights<'_>) -> Result<Encoder> {
        config.validate()?;
        let weights = weights.at("encoder");
        let channels = &config.encoder_block_out_channels;
        let last = channels.len() - 1;
        let down_blocks = (0..=last).map(|stage| {
            let weights = weights.at("down_blocks").at(stage);
            let kind = Kind {
                block: config.encoder_block_types[stage],
                channels: channels[stage],
                head_dim: config.attention_head_dim,
                scales: &config.encoder_qkv_multiscales[stage],
            };
            let layers = config.encoder_layers_per_block[stage];
            let blocks = (0..layers).map(|layer| Block::new(kind, &weights.at(layer)));
            let blocks = blocks.collect::<Result<_>>()?;
            let downsample = (stage < last)
                .then(|| Downsample::new([channels[stage], channels[stage + 1]], &weights.at(layers)))
                .transpose()?;
            Ok(DownBlock { blocks, downsample })
        });
        let same = Walk::same(3);
        Ok(Encoder {
            conv_in: Conv2d::new(&weights, "conv_in", [channels[0], config.in_channels, 3], true, same)?,
            down_blocks: down_blocks.collect::<Result<_>>()?,
            conv_out: Conv2d::new(
                &weights,
                "conv_out",
                [config.latent_channels, channels[last], 3],
                true,
                same,
            )?,
            in_channels: config.in_channels,
            compression: 1 << last,
        })
    }

    /// f32 `[batch, in_channels, 8 · rows, 8 · frames]` → f32 `[batch, latent_channels, rows, frames]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of channels, or sizes that cannot be halved three times.
    pub fn forward(&self, mel: Tensor<4>, hooks: &Hooks<'_>) -> Result<Tensor<4>> {
        let [_, channels, bands, frames] = mel.dims();
        let divides = |size: usize| size > 0 && size.is_multiple_of(self.compression);
        if channels != self.in_channels || !divides(bands) || !divides(frames) {
            let needed = format!("[batch, {}, …] and multiples of {}", self.in_channels, self.compression);
            return Err(refused("mel", format!("of shape {:?}", mel.dims()), needed));
        }
        let hooks = hooks.at("encoder");
        let mut x = self.conv_in.forward(mel);
        hooks.see("conv_in", &x);
        for (stage, down) in self.down_blocks.iter().enumerate() {
            let hooks = hooks.at("down_blocks").at(stage);
            for (layer, block) in down.blocks.iter().enumerate() {
                x = block.forward(x, &hooks.at(layer));
            }
            if let Some(downsample) = &down.downsample {
                x = downsample.forward(x);
            }
            hooks.see("", &x);
        }
        let conv = self.conv_out.forward(x.clone());
        let channels = conv.dims()[1];
        Ok(conv + averaged(x, channels))
    }
}

/// What kind of block, and of what sizes.
#[derive(Clone, Copy)]
struct Kind<'a> {
    block: BlockType,
    channels: usize,
    head_dim: usize,
    scales: &'a [usize],
}

#[derive(Debug)]
enum Block {
    Res(Box<ResBlock>),
    EfficientVit(Box<(Attention, GluMbConv2d)>),
}

#[derive(Debug)]
struct ResBlock {
    conv1: Conv2d,
    conv2: Conv2d,
    norm: BiasedRmsNorm,
}

impl Block {
    fn new(kind: Kind<'_>, weights: &Weights<'_>) -> Result<Block> {
        let channels = kind.channels;
        let square = [channels, channels, 3];
        Ok(match kind.block {
            BlockType::ResBlock => Block::Res(Box::new(ResBlock {
                conv1: Conv2d::new(weights, "conv1", square, true, Walk::same(3))?,
                conv2: Conv2d::new(weights, "conv2", square, false, Walk::same(3))?,
                norm: norm(weights, "norm", channels)?,
            })),
            BlockType::EfficientViTBlock => Block::EfficientVit(Box::new((
                Attention::new(kind, &weights.at("attn"))?,
                GluMbConv2d::new(channels, &weights.at("conv_out"))?,
            ))),
        })
    }

    fn forward(&self, x: Tensor<4>, hooks: &Hooks<'_>) -> Tensor<4> {
        let x = match self {
            Block::Res(block) => {
                let y = block.conv2.forward(silu(block.conv1.forward(x.clone())));
                x + normalised(y, &block.norm)
            }
            Block::EfficientVit(layers) => {
                let (attn, conv_out) = layers.as_ref();
                let x = attn.forward(x);
                hooks.see("attn", &x);
                conv_out.forward(x)
            }
        };
        hooks.see("", &x);
        x
    }
}

/// Linear attention over all positions, with further queries, keys and values that are convolutions of the first ones
/// (EfficientViT, Cai et al. 2022, arXiv:2205.14756).
#[derive(Debug)]
struct Attention {
    /// Queries, keys and values one after the other, of all heads.
    qkv: Linear,
    scales: Vec<(Conv2d, Conv2d)>,
    out: Linear,
    norm_out: BiasedRmsNorm,
    head_dim: usize,
}

impl Attention {
    fn new(kind: Kind<'_>, weights: &Weights<'_>) -> Result<Attention> {
        let Kind { channels, head_dim, .. } = kind;
        let wide = 3 * channels;
        let scales = kind.scales.iter().enumerate().map(|(index, &size)| {
            let weights = weights.at("to_qkv_multiscale").at(index);
            let depthwise = Walk::same(size).grouped(wide);
            let groups = 3 * channels / head_dim;
            Ok((
                Conv2d::new(&weights, "proj_in", [wide, 1, size], false, depthwise)?,
                Conv2d::new(&weights, "proj_out", [wide, head_dim, 1], false, Walk::same(1).grouped(groups))?,
            ))
        });
        Ok(Attention {
            qkv: weights.stacked(&["to_q", "to_k", "to_v"], [channels, channels], false)?,
            scales: scales.collect::<Result<_>>()?,
            out: weights.linear("to_out", [channels, (1 + kind.scales.len()) * channels], false)?,
            norm_out: norm(weights, "norm_out", channels)?,
            head_dim,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, rows, columns] = x.dims();
        let qkv = self.qkv.forward(x.clone().permute([0, 2, 3, 1])).permute([0, 3, 1, 2]);
        let further = self.scales.iter().map(|(depth, point)| point.forward(depth.forward(qkv.clone())));
        let all = Tensor::cat([qkv.clone()].into_iter().chain(further).collect(), 1);
        // Whatever they were computed as, a head's 96 channels are its queries, keys and values.
        let (heads, positions) = (all.dims()[1] / (3 * self.head_dim), rows * columns);
        let all = all.reshape([batch, heads, 3 * self.head_dim, positions]).swap_dims(2, 3);
        let part = |index| all.clone().narrow(3, index * self.head_dim, self.head_dim);
        let attended = linear_attention(relu(part(0)), relu(part(1)), part(2));
        let attended = attended.swap_dims(1, 2).reshape([batch, rows, columns, heads * self.head_dim]);
        let out = self.norm_out.forward(self.out.forward(attended));
        debug_assert_eq!(out.dims()[3], channels);
        x + out.permute([0, 3, 1, 2])
    }
}

/// The gated convolution of an EfficientViT block, four times as wide as the block.
#[derive(Debug)]
struct GluMbConv2d {
    inverted: Linear,
    depth: Conv2d,
    point: Linear,
    norm: BiasedRmsNorm,
}

impl GluMbConv2d {
    fn new(channels: usize, weights: &Weights<'_>) -> Result<GluMbConv2d> {
        let wide = 8 * channels;
        Ok(GluMbConv2d {
            inverted: weights.pointwise("conv_inverted", [wide, channels, 1, 1], true)?,
            depth: Conv2d::new(weights, "conv_depth", [wide, 1, 3], true, Walk::same(3).grouped(wide))?,
            point: weights.pointwise("conv_point", [channels, wide / 2, 1, 1], false)?,
            norm: norm(weights, "norm", channels)?,
        })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let wide = silu(self.inverted.forward(x.clone().permute([0, 2, 3, 1])));
        let wide = self.depth.forward(wide.permute([0, 3, 1, 2]));
        let half = wide.dims()[1] / 2;
        let (value, gate) = (wide.clone().narrow(1, 0, half), wide.narrow(1, half, half));
        let y = self.point.forward((value * silu(gate)).permute([0, 2, 3, 1]));
        x + self.norm.forward(y).permute([0, 3, 1, 2])
    }
}

/// Twice as many rows and columns: nearest neighbours and a convolution, beside channels laid out as pixels.
#[derive(Debug)]
struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    fn new([inputs, outputs]: [usize; 2], weights: &Weights<'_>) -> Result<Upsample> {
        Ok(Upsample { conv: Conv2d::new(weights, "conv", [outputs, inputs, 3], true, Walk::same(3))? })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, rows, columns] = x.dims();
        let outputs = self.conv.weight.dims()[0];
        let twice = x.clone().reshape([batch, channels, rows, 1, columns, 1]);
        let twice = twice.expand([batch, channels, rows, 2, columns, 2]);
        let conv = self.conv.forward(twice.reshape([batch, channels, 2 * rows, 2 * columns]));
        let pixels = repeated(x, 4 * outputs / channels).reshape([batch, outputs, 2, 2, rows, columns]);
        let pixels = pixels.permute([0, 1, 4, 2, 5, 3]).reshape([batch, outputs, 2 * rows, 2 * columns]);
        conv + pixels
    }
}

/// Half as many rows and columns: a convolution in steps of two, beside pixels laid out as channels.
#[derive(Debug)]
struct Downsample {
    conv: Conv2d,
}

impl Downsample {
    fn new([inputs, outputs]: [usize; 2], weights: &Weights<'_>) -> Result<Downsample> {
        let walk = Walk::same(3).strided(2);
        Ok(Downsample { conv: Conv2d::new(weights, "conv", [outputs, inputs, 3], true, walk)? })
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, rows, columns] = x.dims();
        let pixels = x.clone().reshape([batch, channels, rows / 2, 2, columns / 2, 2]);
        let pixels = pixels.permute([0, 1, 3, 5, 2, 4]);
        let pixels = pixels.reshape([batch, 4 * channels, rows / 2, columns / 2]);
        let conv = self.conv.forward(x);
        let outputs = conv.dims()[1];
        conv + averaged(pixels, outputs)
    }
}

/// Each channel several times, one after the other.
fn repeated(x: Tensor<4>, times: usize) -> Tensor<4> {
    let [batch, channels, rows, columns] = x.dims();
    let x = x.unsqueeze_dim::<5>(2).expand([batch, channels, times, rows, columns]);
    x.reshape([batch, channels * times, rows, columns])
}

/// Fewer channels, each the mean of as many neighbours.
fn averaged(x: Tensor<4>, channels: usize) -> Tensor<4> {
    let [batch, inputs, rows, columns] = x.dims();
    let groups = x.reshape([batch, channels, inputs / channels, rows, columns]);
    groups.mean_dim(2).reshape([batch, channels, rows, columns])
}

/// Normalises the channels of each position.
fn normalised(x: Tensor<4>, norm: &BiasedRmsNorm) -> Tensor<4> {
    norm.forward(x.permute([0, 2, 3, 1])).permute([0, 3, 1, 2])
}

/// RMSNorm with something added at last.
#[derive(Debug)]
struct BiasedRmsNorm {
    norm: RmsNorm,
    bias: Tensor<1>,
}

impl BiasedRmsNorm {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.norm.forward(x) + self.bias.clone().unsqueeze()
    }
}

fn norm(weights: &Weights<'_>, name: &str, channels: usize) -> Result<BiasedRmsNorm> {
    let scale = weights.tensor(&format!("{name}.weight"), [channels])?;
    let bias = weights.tensor(&format!("{name}.bias"), [channels])?;
    Ok(BiasedRmsNorm { norm: RmsNorm { scale, epsilon: EPSILON }, bias })
}

fn refused(argument: &'static str, found: String, needed: String) -> Error {
    Error::Argument { operation: "music autoencoder", argument, found, needed }
}
