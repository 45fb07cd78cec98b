//! The configuration of the transformer.

use serde::Deserialize;

use crate::error::{Error, Result};

/// `config.json` of `ace_step_transformer`, and sizes that the original has in its code.
///
/// `inner_dim` is not among them: the width is heads × head size, whatever the file says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// Channels of a latent.
    pub in_channels: usize,
    /// Channels of what is predicted.
    #[serde(default = "eight")]
    pub out_channels: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Size of an attention head.
    pub attention_head_dim: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Width of the feed-forward layers in widths of the model.
    pub mlp_ratio: f64,
    /// Height and width of a patch; the height is that of a latent.
    pub patch_size: [usize; 2],
    /// Rows of a latent.
    pub max_height: usize,
    /// The most frames of a latent.
    pub max_width: usize,
    /// Base of the rotary embeddings' angles.
    pub rope_theta: f64,
    /// Width of the prompt's encoder.
    pub text_embedding_dim: usize,
    /// Width of a speaker embedding.
    pub speaker_embedding_dim: usize,
    /// Tokens of the lyric tokenizer.
    pub lyric_encoder_vocab_size: usize,
    /// Width of the lyric encoder.
    pub lyric_hidden_size: usize,
    /// Widths of the encoders that training aligned the model with.
    pub ssl_latent_dims: Vec<usize>,
    /// Attention heads of the lyric encoder.
    #[serde(default = "Config::released_lyric_heads")]
    pub lyric_encoder_attention_heads: usize,
    /// Width of its feed-forward layers.
    #[serde(default = "Config::released_lyric_units")]
    pub lyric_encoder_linear_units: usize,
    /// Its blocks.
    #[serde(default = "Config::released_lyric_blocks")]
    pub lyric_encoder_num_blocks: usize,
    /// Channels between the two convolutions of the patch embedding; 256 for each input channel where it is not given.
    pub patch_embed_hidden_channels: Option<usize>,
}

/// Channels of a latent of the released autoencoder.
fn eight() -> usize {
    8
}

/// Groups of the patch embedding's normalisation.
pub(super) const GROUPS: usize = 32;

impl Config {
    const fn released_lyric_heads() -> usize {
        16
    }

    const fn released_lyric_units() -> usize {
        4096
    }

    const fn released_lyric_blocks() -> usize {
        6
    }

    /// That of the released ACE-Step v1, 3.5B.
    pub fn released() -> Config {
        Config {
            in_channels: 8,
            out_channels: 8,
            num_layers: 24,
            attention_head_dim: 128,
            num_attention_heads: 20,
            mlp_ratio: 2.5,
            patch_size: [16, 1],
            max_height: 16,
            max_width: 32768,
            rope_theta: 1e6,
            text_embedding_dim: 768,
            speaker_embedding_dim: 512,
            lyric_encoder_vocab_size: 6693,
            lyric_hidden_size: 1024,
            ssl_latent_dims: vec![1024, 768],
            lyric_encoder_attention_heads: Config::released_lyric_heads(),
            lyric_encoder_linear_units: Config::released_lyric_units(),
            lyric_encoder_num_blocks: Config::released_lyric_blocks(),
            patch_embed_hidden_channels: None,
        }
    }

    /// Width of the model.
    pub fn inner_dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Width of the gated feed-forward layers.
    pub fn mlp_dim(&self) -> usize {
        (self.inner_dim() as f64 * self.mlp_ratio) as usize
    }

    /// Channels between the two convolutions of the patch embedding.
    pub fn patch_channels(&self) -> usize {
        self.patch_embed_hidden_channels.unwrap_or(256 * self.in_channels)
    }

    /// Says what this code could not run.
    ///
    /// # Errors
    /// [`Error::Model`] with the field.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("num_layers", self.num_layers),
            ("attention_head_dim", self.attention_head_dim),
            ("num_attention_heads", self.num_attention_heads),
            ("max_width", self.max_width),
            ("text_embedding_dim", self.text_embedding_dim),
            ("speaker_embedding_dim", self.speaker_embedding_dim),
            ("lyric_encoder_vocab_size", self.lyric_encoder_vocab_size),
            ("lyric_hidden_size", self.lyric_hidden_size),
            ("lyric_encoder_attention_heads", self.lyric_encoder_attention_heads),
            ("lyric_encoder_linear_units", self.lyric_encoder_linear_units),
            ("patch_embed_hidden_channels", self.patch_channels()),
        ];
        // Larger ones would overflow where sizes are multiplied.
        let limit = 1 << 20;
        for (field, size) in sizes {
            require(field, (1..=limit).contains(&size), size, "1 to 1048576")?;
        }
        let even = self.attention_head_dim.is_multiple_of(2);
        require("attention_head_dim", even, self.attention_head_dim, "an even number")?;
        let is_ratio = self.mlp_ratio.is_finite() && self.mlp_ratio <= 1024.0 && self.mlp_dim() > 0;
        require("mlp_ratio", is_ratio, self.mlp_ratio, "a ratio that yields a width")?;
        let is_base = self.rope_theta.is_finite() && self.rope_theta > 0.0;
        require("rope_theta", is_base, self.rope_theta, "a positive number")?;
        let is_column = self.patch_size == [self.max_height, 1] && (1..=limit).contains(&self.max_height);
        let patch = format!("{:?}", self.patch_size);
        require("patch_size", is_column, patch, "[max_height, 1]: a patch is a frame")?;
        let heads = self.lyric_encoder_attention_heads;
        let divides = self.lyric_hidden_size.is_multiple_of(2 * heads);
        require("lyric_hidden_size", divides, self.lyric_hidden_size, "an even number for each head")?;
        let divides = self.patch_channels().is_multiple_of(GROUPS);
        require("patch_embed_hidden_channels", divides, self.patch_channels(), "a multiple of 32 groups")
    }
}

fn require(field: &'static str, holds: bool, found: impl ToString, needed: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::Model { field, found: found.to_string(), needed: needed.into() }),
    }
}
