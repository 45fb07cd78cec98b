//! The configurations of a whole checkpoint: the released one, and a tiny one that runs anywhere.

use super::{dcae, transformer, umt5, vocoder};

/// The configurations of a checkpoint's components.
#[derive(Clone, Debug)]
pub struct Configs {
    /// The transformer's.
    pub transformer: transformer::Config,
    /// The autoencoder's.
    pub dcae: dcae::Config,
    /// The vocoder's.
    pub vocoder: vocoder::Config,
    /// The prompt encoder's.
    pub umt5: umt5::Config,
}

impl Configs {
    /// Those of the released ACE-Step v1.
    pub fn released() -> Configs {
        Configs {
            transformer: transformer::Config::released(),
            dcae: dcae::Config::released(),
            vocoder: vocoder::Config::released(),
            umt5: umt5::Config::released(),
        }
    }

    /// A model of the same architecture, and of the same lengths and rates, that is narrow and shallow: for demonstrations and
    /// tests with random weights.
    pub fn tiny() -> Configs {
        let umt5 = umt5::Config {
            vocab_size: 256,
            d_model: 24,
            d_kv: 8,
            d_ff: 40,
            // As many as the weakened ones need.
            num_layers: 10,
            num_heads: 3,
            ..umt5::Config::released()
        };
        let channels = vec![8, 16, 32, 32];
        let dcae = dcae::Config {
            attention_head_dim: 8,
            encoder_block_out_channels: channels.clone(),
            decoder_block_out_channels: channels,
            encoder_layers_per_block: vec![1; 4],
            decoder_layers_per_block: vec![1; 4],
            ..dcae::Config::released()
        };
        let vocoder = vocoder::Config {
            depths: vec![1, 1],
            dims: vec![16, 32],
            resblock_kernel_sizes: vec![3, 7],
            resblock_dilation_sizes: vec![vec![1, 3]; 2],
            num_mels: 32,
            upsample_initial_channel: 128,
            ..vocoder::Config::released()
        };
        let transformer = transformer::Config {
            num_layers: 4,
            attention_head_dim: 16,
            num_attention_heads: 4,
            text_embedding_dim: umt5.d_model,
            speaker_embedding_dim: 16,
            lyric_encoder_vocab_size: 256,
            lyric_hidden_size: 32,
            ssl_latent_dims: Vec::new(),
            lyric_encoder_attention_heads: 4,
            lyric_encoder_linear_units: 64,
            patch_embed_hidden_channels: Some(64),
            ..transformer::Config::released()
        };
        Configs { transformer, dcae, vocoder, umt5 }
    }
}
