//! The fixed part of the file: its first 148 bytes.

use std::fmt;

use binrw::binrw;

/// The first twelve bytes of every file (`FILE-MAGIC`).
pub const MAGIC: [u8; 12] = *b"GPT-OSS v1.0";
/// GPT-OSS, the kind of model (`FILE-MODEL-UUID`).
pub const MODEL_UUID: Uuid = Uuid(0xdf52dc86_1789_4ed0_a295_66f10508145b_u128.to_be_bytes());
/// The weight layout for Apple GPUs, the only one there is (`FILE-LAYOUT-UUID`).
pub const LAYOUT_UUID: Uuid = Uuid(0x229177a8_5775_4268_bfd8_d588b351c56d_u128.to_be_bytes());
/// The tokenizer layout of tiktoken vocabularies (`FILE-TOKENIZER-UUID`).
pub const TOKENIZER_UUID: Uuid = Uuid(0x7401aded_2a95_40cb_b782_9ccebaafe72b_u128.to_be_bytes());
/// `num_active_experts` of every file (`HDR-NUM-ACTIVE-EXPERTS`).
pub const NUM_ACTIVE_EXPERTS: u32 = 4;
/// `head_dim` of every file (`HDR-HEAD-DIM`).
pub const HEAD_DIM: u32 = 64;
/// Length of [`Head`] in bytes.
pub const HEAD_LEN: u64 = 148;

/// A UUID, stored in the order in which it is printed (Python's `uuid.bytes`).
#[binrw]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Uuid {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The fixed-size start of the file, before the first section whose length varies.
#[binrw]
#[brw(little)]
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// `GPT-OSS v1.0`.
    pub magic: [u8; 12],
    /// Zero.
    pub magic_zero: u32,
    /// [`MODEL_UUID`].
    pub model_uuid: Uuid,
    /// Hyper-parameters.
    pub model: ModelHeader,
    /// [`LAYOUT_UUID`].
    pub layout_uuid: Uuid,
    /// [`TOKENIZER_UUID`].
    pub tokenizer_uuid: Uuid,
    /// Sizes of the tokenizer's variable parts.
    pub tokenizer: TokenizerHeader,
}

impl Head {
    /// The head of a well-formed file.
    pub fn new(model: ModelHeader, tokenizer: TokenizerHeader) -> Head {
        Head {
            magic: MAGIC,
            magic_zero: 0,
            model_uuid: MODEL_UUID,
            model,
            layout_uuid: LAYOUT_UUID,
            tokenizer_uuid: TOKENIZER_UUID,
            tokenizer,
        }
    }
}

/// The model header, 68 bytes: hyper-parameters under the names of upstream's `gptoss_gptoss_model_header`.
#[binrw]
#[brw(little)]
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ModelHeader {
    /// Tokens: `int(initial_context_length × rope_scaling_factor)`.
    pub context_length: u32,
    /// Transformer blocks.
    pub num_blocks: u32,
    /// Experts of each block.
    pub num_experts: u32,
    /// Experts that the router selects for a token; always 4.
    pub num_active_experts: u32,
    /// Width of the residual stream, `hidden_size`.
    pub embedding_dim: u32,
    /// Width of an expert, `intermediate_size`.
    pub mlp_dim: u32,
    /// Clamp of the gated activation.
    pub swiglu_limit: f32,
    /// Width of an attention head; always 64.
    pub head_dim: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key and value heads.
    pub num_kv_heads: u32,
    /// Tokens that the sliding window of even blocks spans, the token itself included.
    pub attention_window: u32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// `1 / rope_scaling_factor`.
    pub interpolation_scale: f32,
    /// `−low / (high − low)` of YaRN's ramp over frequency indices.
    pub yarn_offset: f32,
    /// `1 / (high − low)` of YaRN's ramp.
    pub yarn_scale: f32,
    /// YaRN's concentration, `0.1 · ln(rope_scaling_factor) + 1`.
    pub yarn_multiplier: f32,
    /// ε of RMSNorm; the exporter writes 1e-5.
    pub rmsnorm_epsilon: f32,
}

impl ModelHeader {
    /// The header of the released gpt-oss-20b.
    pub const GPT_OSS_20B: ModelHeader = ModelHeader {
        context_length: 131_072,
        num_blocks: 24,
        num_experts: 32,
        num_active_experts: 4,
        embedding_dim: 2880,
        mlp_dim: 2880,
        swiglu_limit: 7.0,
        head_dim: 64,
        num_heads: 64,
        num_kv_heads: 8,
        attention_window: 128,
        rope_theta: 150_000.0,
        interpolation_scale: 1.0 / 32.0,
        yarn_offset: f32::from_bits(0xbf5e_a4b6),
        yarn_scale: f32::from_bits(0x3ddc_1746),
        yarn_multiplier: f32::from_bits(0x3fac_5c86),
        rmsnorm_epsilon: 1e-5,
    };
}

/// The tokenizer header, 16 bytes.
#[binrw]
#[brw(little)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TokenizerHeader {
    /// Special tokens; their ids follow those of the text tokens.
    pub num_special_tokens: u32,
    /// Text tokens, ids 0 to `num_text_tokens` − 1.
    pub num_text_tokens: u32,
    /// Bytes of the regex with its terminating NUL.
    pub regex_size: u32,
    /// Bytes of the text token records.
    pub tokens_size: u32,
}
