//! Hugging Face's names of the original checkpoint's tensors.

use crate::model_bin::tensors::{TensorId, TensorKind};

/// The Hugging Face tensors whose rows, one behind the other, are the original tensor; within layers, after
/// `model.layers.N.`.
fn parts(kind: TensorKind) -> &'static [&'static str] {
    match kind {
        TensorKind::Embedding => &["model.embed_tokens.weight"],
        TensorKind::AttnNorm => &["input_layernorm.weight"],
        TensorKind::QkvWeight => {
            &["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
        }
        TensorKind::QkvBias => &["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
        TensorKind::Sinks => &["self_attn.sinks"],
        TensorKind::OutWeight => &["self_attn.o_proj.weight"],
        TensorKind::OutBias => &["self_attn.o_proj.bias"],
        TensorKind::MlpNorm => &["post_attention_layernorm.weight"],
        TensorKind::GateWeight => &["mlp.router.weight"],
        TensorKind::GateBias => &["mlp.router.bias"],
        TensorKind::Norm => &["model.norm.weight"],
        TensorKind::Unembedding => &["lm_head.weight"],
        TensorKind::Mlp1Blocks => &["mlp.experts.gate_up_proj_blocks"],
        TensorKind::Mlp1Scales => &["mlp.experts.gate_up_proj_scales"],
        TensorKind::Mlp1Bias => &["mlp.experts.gate_up_proj_bias"],
        TensorKind::Mlp2Blocks => &["mlp.experts.down_proj_blocks"],
        TensorKind::Mlp2Scales => &["mlp.experts.down_proj_scales"],
        TensorKind::Mlp2Bias => &["mlp.experts.down_proj_bias"],
    }
}

const BF16_MLP1: &str = "mlp.experts.gate_up_proj";
const BF16_MLP2: &str = "mlp.experts.down_proj";

fn full(id: TensorId, name: &str) -> String {
    if id.kind.is_per_block() { format!("model.layers.{}.{name}", id.block) } else { name.into() }
}

/// The Hugging Face tensors whose rows, one behind the other, are this tensor.
pub(super) fn hugging_face(id: TensorId) -> Vec<String> {
    parts(id.kind).iter().map(|name| full(id, name)).collect()
}

/// The BF16 tensor that these blocks or scales are quantised from; `None` for any other tensor.
pub(super) fn hugging_face_bf16(id: TensorId) -> Option<String> {
    match id.kind {
        TensorKind::Mlp1Blocks | TensorKind::Mlp1Scales => Some(full(id, BF16_MLP1)),
        TensorKind::Mlp2Blocks | TensorKind::Mlp2Scales => Some(full(id, BF16_MLP2)),
        _ => None,
    }
}

/// Whether a tensor of this name belongs to the original layout.
pub(super) fn is_original(name: &str) -> bool {
    TensorId::from_name(name).is_some()
}

/// Whether a tensor of this name belongs to one of the Hugging Face layouts.
pub(super) fn is_hugging_face(name: &str) -> bool {
    if let Some((_, rest)) = layer(name) {
        return is_bf16_experts(name)
            || TensorKind::ALL.iter().any(|&kind| kind.is_per_block() && parts(kind).contains(&rest));
    }
    TensorKind::ALL.iter().any(|&kind| !kind.is_per_block() && parts(kind).contains(&name))
}

/// Whether this is the name of a BF16 expert tensor.
pub(super) fn is_bf16_experts(name: &str) -> bool {
    layer(name).is_some_and(|(_, rest)| rest == BF16_MLP1 || rest == BF16_MLP2)
}

/// The block that a tensor of this name belongs to in either layout, where it is one of the model's tensors.
pub(super) fn block_of(name: &str) -> Option<u32> {
    match TensorId::from_name(name) {
        Some(id) => id.kind.is_per_block().then_some(id.block),
        None => layer(name).filter(|_| is_hugging_face(name)).map(|(block, _)| block),
    }
}

fn layer(name: &str) -> Option<(u32, &str)> {
    let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((block.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hugging_face_name_is_recognised_with_its_block() {
        for &kind in TensorKind::ALL {
            let id = TensorId { kind, block: 7 };
            for name in hugging_face(id).into_iter().chain(hugging_face_bf16(id)) {
                assert!(is_hugging_face(&name), "{name}");
                assert!(!is_original(&name), "{name}");
                assert_eq!(block_of(&name), kind.is_per_block().then_some(7), "{name}");
            }
        }
        assert!(!is_hugging_face("model.layers.0.self_attn.rotary_emb.inv_freq"));
        assert_eq!(block_of("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
        assert_eq!(block_of("block.12.attn.sinks"), Some(12));
    }
}
