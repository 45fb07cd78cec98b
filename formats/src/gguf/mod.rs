//! GGUF files of architecture `gpt-oss` with MXFP4 experts, as llama.cpp reads and its converter writes them.
//!
//! [`Model`] reads one as a [`crate::canonical::Source`], [`write()`] writes one from any source. A file that [`write()`]
//! made gives back the same header, vocabulary and tensors, bit for bit. Three keys of our own make that so where
//! GGUF's keys cannot; other programs ignore them:
//!
//! | key | value |
//! |---|---|
//! | `burn_extended.model_header` | the 68 bytes of the model header (array of u8) |
//! | `burn_extended.tokenizer.regex` | the splitting pattern (string) |
//! | `burn_extended.tokenizer.special_uuids` | UUID of each special token by id (array of strings) |
//!
//! Where a tensor is in which file:
//!
//! | canonical | GGUF | written as |
//! |---|---|---|
//! | embedding.weight, unembedding.weight | token_embd.weight, output.weight | BF16 |
//! | norm.scale | output_norm.weight | F32 |
//! | attn.norm.scale, mlp.norm.scale | attn_norm.weight, post_attention_norm.weight | F32 |
//! | attn.qkv.weight: rows q, k, v | attn_q.weight, attn_k.weight, attn_v.weight | BF16 |
//! | attn.qkv.bias | attn_q.bias, attn_k.bias, attn_v.bias | F32 |
//! | attn.out.weight | attn_output.weight | BF16 |
//! | attn.out.bias, attn.sinks | attn_output.bias, attn_sinks.weight | F32 |
//! | mlp.gate.weight, mlp.gate.bias | ffn_gate_inp.weight, ffn_gate_inp.bias | F32 |
//! | mlp.mlp1_weight: even rows, odd rows | ffn_gate_exps.weight, ffn_up_exps.weight | MXFP4 |
//! | mlp.mlp1_bias: even, odd elements | ffn_gate_exps.bias, ffn_up_exps.bias | F32 |
//! | mlp.mlp2_weight, mlp.mlp2_bias | ffn_down_exps.weight, ffn_down_exps.bias | MXFP4, F32 |
//!
//! Read are BF16, F32 and F16 for everything but the expert weights, which must be MXFP4. F32 and F16 values that are
//! no BF16 are rounded to nearest even, and [`Source::changed`](crate::canonical::Source::changed) names their tensors.
//!
//! What llama.cpp does otherwise than the model header says: it clamps the gated activation at 7.0 whatever
//! `swiglu_limit` is, ignores the YaRN betas of this architecture (1 and 32 are built in), and splits text by patterns
//! that it knows only, so that a vocabulary with another regex than o200k's is tokenised otherwise there.

pub mod container;
mod merges;
mod metadata;
mod model;
mod tensors;
mod vocabulary;
mod write;

pub use model::Model;
pub use write::write;
