//! The hyper-parameters of a model, as the engine uses them.

use formats::model_bin::header::ModelHeader;
use formats::model_bin::tensors::Dims;

use crate::error::{Error, Result};
use crate::nn::rope::Yarn;

/// Hyper-parameters under the names of the `model.bin` header.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Config {
    /// The largest number of tokens of a sequence.
    pub context_length: usize,
    /// Transformer blocks.
    pub num_blocks: usize,
    /// Experts of each block.
    pub num_experts: usize,
    /// Experts that the router selects for a token.
    pub num_active_experts: usize,
    /// Width of the residual stream.
    pub embedding_dim: usize,
    /// Width of an expert.
    pub mlp_dim: usize,
    /// Clamp of the gated activation.
    pub swiglu_limit: f32,
    /// Width of an attention head.
    pub head_dim: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Tokens that the window of even blocks spans, the token itself included.
    pub attention_window: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// `1 / rope_scaling_factor`.
    pub interpolation_scale: f32,
    /// Offset of YaRN's ramp.
    pub yarn_offset: f32,
    /// Slope of YaRN's ramp.
    pub yarn_scale: f32,
    /// YaRN's concentration.
    pub yarn_multiplier: f32,
    /// ε of RMSNorm.
    pub rmsnorm_epsilon: f32,
    /// Rows of the embedding: text and special tokens.
    pub vocabulary: usize,
}

impl Config {
    /// The hyper-parameters of a verified model.
    ///
    /// # Errors
    /// [`Error::Model`] for a context of 2^31 tokens or more, which a header may state.
    pub fn new(header: &ModelHeader, dims: &Dims) -> Result<Config> {
        let size = |value: u32| value as usize;
        let config = Config {
            context_length: size(header.context_length),
            num_blocks: size(header.num_blocks),
            num_experts: size(header.num_experts),
            num_active_experts: size(header.num_active_experts),
            embedding_dim: size(header.embedding_dim),
            mlp_dim: size(header.mlp_dim),
            swiglu_limit: header.swiglu_limit,
            head_dim: size(header.head_dim),
            num_heads: size(header.num_heads),
            num_kv_heads: size(header.num_kv_heads),
            attention_window: size(header.attention_window),
            rope_theta: header.rope_theta,
            interpolation_scale: header.interpolation_scale,
            yarn_offset: header.yarn_offset,
            yarn_scale: header.yarn_scale,
            yarn_multiplier: header.yarn_multiplier,
            rmsnorm_epsilon: header.rmsnorm_epsilon,
            vocabulary: dims.vocabulary() as usize,
        };
        // Everything else that a sequence needs is a rule of the header (`HDR-…`), which verification has checked.
        // Positions are compared in i32 on the device.
        if config.context_length > i32::MAX as usize {
            return Err(Error::Model {
                field: "context_length",
                found: config.context_length.to_string(),
                needed: "less than 2^31".into(),
            });
        }
        Ok(config)
    }

    /// Refuses tokens outside the vocabulary.
    ///
    /// # Errors
    /// [`Error::Token`] with the first of them.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.vocabulary;
        match tokens.iter().position(|&token| token as usize >= vocabulary) {
            Some(position) => Err(Error::Token { token: tokens[position], position, vocabulary }),
            None => Ok(()),
        }
    }

    /// The window of a block: even blocks have one. At most the context, beyond which it hides nothing.
    pub fn window(&self, block: usize) -> Option<usize> {
        block.is_multiple_of(2).then_some(self.attention_window.min(self.context_length))
    }

    /// The fields of the rotary embedding.
    pub fn yarn(&self) -> Yarn {
        Yarn {
            rope_theta: self.rope_theta.into(),
            interpolation_scale: self.interpolation_scale.into(),
            yarn_offset: self.yarn_offset.into(),
            yarn_scale: self.yarn_scale.into(),
            yarn_multiplier: self.yarn_multiplier.into(),
        }
    }

    /// Rows of the joint projection of queries, keys and values.
    pub fn qkv_rows(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}
