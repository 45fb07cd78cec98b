//! Target `config`.

use arbitrary::Arbitrary;
pub(crate) use formats::checkpoint::config::FILE;
use formats::checkpoint::config::{Config, recover};
use formats::model_bin::header::{HEAD_DIM, ModelHeader, NUM_ACTIVE_EXPERTS};
use formats::model_bin::verify::check_model_header;
use formats::rules::Level;

use crate::bounded;
use crate::json::{Edit, Object};

/// Every key that is read, in both layouts' spelling.
pub(crate) const KEYS: [&str; 36] = [
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "experts_per_token",
    "num_experts_per_tok",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "swiglu_limit",
    "initial_context_length",
    "rope_theta",
    "rope_scaling_factor",
    "rope_ntk_alpha",
    "rope_ntk_beta",
    "rope_scaling",
    "rope_scaling.factor",
    "rope_scaling.beta_fast",
    "rope_scaling.beta_slow",
    "rope_scaling.original_max_position_embeddings",
    "rope_scaling.rope_type",
    "rope_scaling.truncate",
    "rope_parameters.factor",
    "rope_parameters.rope_theta",
    "rope_parameters.beta_fast",
    "rope_parameters.beta_slow",
    "rope_parameters.original_max_position_embeddings",
    "rope_parameters.rope_type",
    "layer_types",
    "attention_bias",
    "tie_word_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "model_type",
];

/// The config of [`crate::tiny::Tiny`] with so many blocks.
pub(crate) fn tiny(blocks: u32) -> Object {
    let entries = [
        ("num_hidden_layers", ["0", "1", "2"][blocks as usize % 3]),
        ("num_experts", "4"),
        ("experts_per_token", "4"),
        ("hidden_size", "32"),
        ("intermediate_size", "32"),
        ("swiglu_limit", "7.0"),
        ("head_dim", "64"),
        ("num_attention_heads", "1"),
        ("num_key_value_heads", "1"),
        ("sliding_window", "128"),
        ("initial_context_length", "4096"),
        ("rope_theta", "150000"),
        ("rope_scaling_factor", "32.0"),
        ("rope_ntk_alpha", "1.0"),
        ("rope_ntk_beta", "32.0"),
    ];
    Object::new(entries)
}

#[derive(Arbitrary, Debug)]
struct Input {
    edits: Vec<Edit>,
    /// A header that no config need have.
    words: [u32; 17],
}

/// A config that is accepted gives a header without a broken rule, from which a config is recovered that gives it
/// again (unless α and β hardly differ). From any header a config is recovered which gives every field again but those that it lists as lost.
pub fn config(data: &[u8]) {
    check(data);
    let Some(input) = crate::instructions::<Input>(data) else { return };
    let mut config = tiny(1);
    config.edit(&KEYS, &input.edits);
    check(config.text().as_bytes());
    let float = f32::from_bits;
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q] = input.words;
    check_recovered(&ModelHeader {
        context_length: a,
        num_blocks: b,
        num_experts: c,
        num_active_experts: d,
        embedding_dim: e,
        mlp_dim: f,
        swiglu_limit: float(g),
        head_dim: h,
        num_heads: i,
        num_kv_heads: j,
        attention_window: k,
        rope_theta: float(l),
        interpolation_scale: float(m),
        yarn_offset: float(n),
        yarn_scale: float(o),
        yarn_multiplier: float(p),
        rmsnorm_epsilon: float(q),
    });
}

fn check(json: &[u8]) {
    match bounded(json.len(), || Config::parse(json)) {
        Ok(config) => match config.header() {
            Ok(header) => {
                assert_eq!(check_model_header(&header), []);
                assert_eq!((header.head_dim, header.num_active_experts), (HEAD_DIM, NUM_ACTIVE_EXPERTS));
                // Beyond that, α and β agree in all the digits that their difference would need.
                if (1e-5..1e5).contains(&header.yarn_scale) {
                    assert_eq!(
                        recover(&header).lost,
                        [""; 0],
                        "of a header that the exporter may have written"
                    );
                }
                check_recovered(&header);
            }
            Err(violations) => assert!(!violations.is_empty()),
        },
        Err(violations) => {
            assert!(!violations.is_empty());
            assert!(violations.iter().all(|violation| violation.rule.level() == Level::Source));
        }
    }
}

fn check_recovered(header: &ModelHeader) {
    let recovered = recover(header);
    let json = serde_json::to_vec(&recovered.json).expect("JSON");
    let Ok(again) = Config::parse(&json).and_then(|config| config.header()) else {
        // Only of a header that is no valid file's.
        assert!(
            !recovered.lost.is_empty() || !check_model_header(header).is_empty(),
            "{header:?} gives {recovered:?}"
        );
        return;
    };
    for (name, old, new) in fields(header).zip(fields(&again)).map(|((name, old), (_, new))| (name, old, new))
    {
        assert_eq!(
            old != new,
            recovered.lost.contains(&name),
            "{name} is {old:#x} and {new:#x} in {recovered:?}"
        );
    }
}

fn fields(header: &ModelHeader) -> impl Iterator<Item = (&'static str, u32)> {
    [
        ("context_length", header.context_length),
        ("num_blocks", header.num_blocks),
        ("num_experts", header.num_experts),
        ("num_active_experts", header.num_active_experts),
        ("embedding_dim", header.embedding_dim),
        ("mlp_dim", header.mlp_dim),
        ("swiglu_limit", header.swiglu_limit.to_bits()),
        ("head_dim", header.head_dim),
        ("num_heads", header.num_heads),
        ("num_kv_heads", header.num_kv_heads),
        ("attention_window", header.attention_window),
        ("rope_theta", header.rope_theta.to_bits()),
        ("interpolation_scale", header.interpolation_scale.to_bits()),
        ("yarn_offset", header.yarn_offset.to_bits()),
        ("yarn_scale", header.yarn_scale.to_bits()),
        ("yarn_multiplier", header.yarn_multiplier.to_bits()),
        ("rmsnorm_epsilon", header.rmsnorm_epsilon.to_bits()),
    ]
    .into_iter()
}

#[cfg(test)]
mod tests {
    use crate::tiny::Tiny;
    use formats::canonical::Source;

    use super::*;

    #[test]
    fn the_config_of_the_small_model_has_its_header() {
        for blocks in 0..3 {
            let config = Config::parse(tiny(blocks).text().as_bytes()).expect("a sound config");
            assert_eq!(config.header().as_ref(), Ok(Tiny::new(blocks).header()));
        }
    }
}
