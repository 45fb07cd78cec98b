use proptest::prelude::*;
use serde_json::json;

use super::*;

fn original() -> Value {
    json!({
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32
    })
}

fn hugging_face() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 4, "num_key_value_heads": 8, "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": false,
        "vocab_size": 201088
    })
}

fn parse(config: &Value) -> Result<Config, Vec<Violation>> {
    Config::parse(config.to_string().as_bytes())
}

fn header(config: &Value) -> Result<ModelHeader, Vec<Violation>> {
    parse(config).and_then(|config| config.header())
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    match key.split_once('.') {
        Some((object, key)) => config[object][key] = value,
        None => config[key] = value,
    }
    config
}

fn without(mut config: Value, key: &str) -> Value {
    match key.split_once('.') {
        Some((object, key)) => config[object].as_object_mut().unwrap().remove(key),
        None => config.as_object_mut().unwrap().remove(key),
    };
    config
}

/// The words of facts.md, seen in the genuine exporter's output.
#[test]
fn released_values_give_the_genuine_words() {
    for config in [original(), hugging_face()] {
        let header = header(&config).unwrap();
        let words = [
            header.rope_theta,
            header.interpolation_scale,
            header.yarn_offset,
            header.yarn_scale,
            header.yarn_multiplier,
            header.rmsnorm_epsilon,
        ];
        let hex = words.map(|word| u32::from_be_bytes(word.to_le_bytes()));
        assert_eq!(hex, [0x007c1248, 0x0000003d, 0xb6a45ebf, 0x4617dc3d, 0x865cac3f, 0xacc52737]);
        assert_eq!((header.context_length, header.swiglu_limit, header.num_active_experts), (131072, 7.0, 4));
        assert_eq!((header.num_experts, header.num_heads, header.num_kv_heads), (32, 64, 8));
        assert_eq!((header.embedding_dim, header.mlp_dim, header.attention_window), (2880, 2880, 128));
    }
}

/// Truncation of the binary64 product, integers exactly: values computed with Python 3.
#[test]
fn context_length_is_pythons_int_of_the_product() {
    for (context, factor, expected) in [
        (json!(4096), json!(1.7), 6963),
        (json!(4096), json!(1), 4096),
        (json!(4096.5), json!(2), 8193),
        (json!(10), json!(0.7), 7),
        (json!(100), json!(1.1), 110),
        (json!(3), json!(0.1), 0),
        (json!(4294967295u32), json!(1), 4294967295u32),
    ] {
        let config = with(with(original(), "initial_context_length", context), "rope_scaling_factor", factor);
        match header(&config) {
            Ok(header) => assert_eq!(header.context_length, expected),
            Err(violations) => {
                assert_eq!(expected, 0);
                assert_eq!(violations[0].field, "initial_context_length");
            }
        }
    }
}

#[test]
fn keys_of_both_transformers_generations_are_read() {
    let mut newer = without(without(hugging_face(), "rope_scaling"), "rope_theta");
    newer["rope_parameters"] = hugging_face()["rope_scaling"].clone();
    newer["rope_parameters"]["rope_theta"] = json!(150000.0);
    assert_eq!(header(&newer).unwrap(), header(&hugging_face()).unwrap());
    // 4096 where neither place has it.
    let absent =
        without(without(newer, "initial_context_length"), "rope_parameters.original_max_position_embeddings");
    assert_eq!(header(&absent).unwrap(), header(&hugging_face()).unwrap());
}

#[test]
fn swiglu_limit_has_the_exporters_default_and_experts_per_token_is_optional() {
    let config = without(without(original(), "swiglu_limit"), "experts_per_token");
    assert_eq!(header(&config).unwrap(), header(&original()).unwrap());
}

#[test]
fn unfit_values_are_refused_under_their_key() {
    let mut cases: Vec<(Value, &str, Value, Rule)> = vec![
        (original(), "rope_theta", json!(1), Rule::SourceConfig),
        (original(), "rope_theta", json!(1.00000001), Rule::SourceConfig), // 1 in f32
        (original(), "rope_theta", json!(1e39), Rule::SourceConfig),
        (original(), "rope_scaling_factor", json!(0), Rule::SourceConfig),
        (original(), "rope_scaling_factor", json!(1e-5), Rule::SourceConfig),
        (original(), "rope_scaling_factor", json!(1e300), Rule::SourceConfig),
        (original(), "rope_ntk_alpha", json!(32), Rule::SourceConfig),
        (original(), "rope_ntk_alpha", json!(33), Rule::SourceConfig),
        (original(), "initial_context_length", json!(1e300), Rule::SourceConfig),
        (original(), "initial_context_length", json!(u64::MAX), Rule::SourceConfig),
        (original(), "num_experts", json!(3), Rule::SourceExperts),
        (original(), "experts_per_token", json!(2), Rule::SourceActiveExperts),
        (original(), "hidden_size", json!(2881), Rule::SourceMultiple),
        (original(), "intermediate_size", json!(0), Rule::SourceMultiple),
        (original(), "head_dim", json!(128), Rule::SourceConfig),
        (original(), "num_attention_heads", json!(0), Rule::SourceConfig),
        (original(), "num_key_value_heads", json!(0), Rule::SourceConfig),
        (original(), "num_key_value_heads", json!(7), Rule::SourceConfig),
        (original(), "sliding_window", json!(0), Rule::SourceConfig),
        (original(), "swiglu_limit", json!(1e39), Rule::SourceConfig),
        (hugging_face(), "num_local_experts", json!(3), Rule::SourceExperts),
        (hugging_face(), "num_experts_per_tok", json!(8), Rule::SourceActiveExperts),
        (hugging_face(), "rms_norm_eps", json!(1e-6), Rule::SourceConfig),
        (hugging_face(), "attention_bias", json!(false), Rule::SourceConfig),
        (hugging_face(), "tie_word_embeddings", json!(true), Rule::SourceConfig),
        (hugging_face(), "hidden_act", json!("gelu"), Rule::SourceConfig),
        (hugging_face(), "rope_scaling.rope_type", json!("linear"), Rule::SourceConfig),
        (hugging_face(), "rope_scaling.truncate", json!(true), Rule::SourceConfig),
        (hugging_face(), "rope_scaling.factor", json!(0), Rule::SourceConfig),
        (hugging_face(), "rope_scaling.beta_slow", json!(32), Rule::SourceConfig),
        (hugging_face(), "rope_scaling.original_max_position_embeddings", json!(8192), Rule::SourceConfig),
        (hugging_face(), "layer_types", json!(["full_attention", "sliding_attention"]), Rule::SourceConfig),
        (hugging_face(), "layer_types", json!(["sliding_attention"]), Rule::SourceConfig),
        (hugging_face(), "layer_types", json!(7), Rule::SourceConfig),
    ];
    let values = [Value::Null, json!(-1), json!("7"), json!(true), json!([1]), json!({})];
    let base = original();
    for key in base.as_object().unwrap().keys().filter(|key| *key != "vocab_size") {
        cases
            .extend(values.iter().map(|value| (original(), key.as_str(), value.clone(), Rule::SourceConfig)));
    }
    for (base, key, value, rule) in cases {
        let violations = header(&with(base, key, value.clone())).unwrap_err();
        let violation = violations.iter().find(|violation| violation.rule == rule && violation.field == key);
        assert!(violation.is_some(), "{key} = {value}: {violations:?}");
        assert_eq!(violation.unwrap().section, "config.json");
    }
}

#[test]
fn fractional_sizes_are_refused() {
    let violations = parse(&with(original(), "num_hidden_layers", json!(2.0))).unwrap_err();
    assert_eq!((violations[0].rule, violations[0].field.as_str()), (Rule::SourceConfig, "num_hidden_layers"));
}

#[test]
fn each_missing_key_is_named() {
    let optional = ["vocab_size", "swiglu_limit", "experts_per_token"];
    for key in original().as_object().unwrap().keys().filter(|key| !optional.contains(&key.as_str())) {
        let violations = parse(&without(original(), key)).unwrap_err();
        let found: Vec<_> =
            violations.iter().map(|violation| (violation.rule, violation.field.as_str())).collect();
        assert_eq!(found, [(Rule::SourceConfig, key.as_str())]);
        assert_eq!(violations[0].found, "no such key");
    }
    for key in ["num_local_experts", "rope_scaling.factor"] {
        assert_eq!(parse(&without(hugging_face(), key)).unwrap_err()[0].field, key);
    }
}

#[test]
fn every_violation_of_a_config_is_listed() {
    let config =
        with(with(without(original(), "rope_ntk_beta"), "num_experts", json!(2)), "hidden_size", json!(33));
    let rules: Vec<_> = parse(&config).unwrap_err().iter().map(|violation| violation.rule).collect();
    assert_eq!(rules, [Rule::SourceMultiple, Rule::SourceExperts, Rule::SourceConfig]);
}

/// Python's `json` reads and writes these words; they are no JSON.
#[test]
fn text_that_is_no_json_names_the_key_before_the_error() {
    for word in ["NaN", "Infinity", "1e999", "-Infinity"] {
        let text = format!("{{\n  \"head_dim\": 64,\n  \"rope_theta\": {word},\n  \"rope_ntk_beta\": 32\n}}");
        let violations = Config::parse(text.as_bytes()).unwrap_err();
        assert_eq!(
            (violations[0].rule, violations[0].field.as_str()),
            (Rule::SourceConfig, "rope_theta"),
            "{word}"
        );
    }
    for text in ["", "[]", "{", "7", "{\"a\"", "\u{feff}{}", "{\"head_dim\"\n:\n\n"] {
        assert_eq!(Config::parse(text.as_bytes()).unwrap_err()[0].rule, Rule::SourceConfig, "{text}");
    }
    assert!(Config::parse(&[0xff, 0xfe]).is_err());
    assert!(Config::parse("[".repeat(100_000).as_bytes()).is_err());
}

fn recovered(config: &Value) -> (ModelHeader, Recovered) {
    let header = header(config).unwrap();
    (header, recover(&header))
}

#[test]
fn the_released_config_is_recovered_exactly() {
    let (_, recovered) = recovered(&original());
    assert_eq!(recovered.lost, [""; 0]);
    assert_eq!(Value::Object(recovered.json), without(original(), "vocab_size"));
}

#[test]
fn round_configs_are_recovered_exactly() {
    for (context, factor, alpha, beta, theta) in [
        (4096, 1.7, json!(1), json!(32), json!(150000)),
        (8192, 40.0, json!(1), json!(32), json!(10000)),
        (4096, 2.5, json!(0.5), json!(16), json!(500000)),
        (2048, 16.0, json!(2), json!(64), json!(1000000)),
        (4097, 1.0, json!(1), json!(32), json!(150000.5)),
    ] {
        let mut config = original();
        config["initial_context_length"] = json!(context);
        config["rope_scaling_factor"] = json!(factor);
        config["rope_ntk_alpha"] = alpha;
        config["rope_ntk_beta"] = beta;
        config["rope_theta"] = theta;
        let (_, recovered) = recovered(&config);
        assert_eq!(recovered.lost, [""; 0]);
        assert_eq!(Value::Object(recovered.json), without(config, "vocab_size"));
    }
}

#[test]
fn what_no_config_gives_is_named() {
    let base = header(&original()).unwrap();
    let lost = |header: ModelHeader| recover(&header).lost;
    assert_eq!(lost(ModelHeader { rmsnorm_epsilon: 1e-6, ..base }), ["rmsnorm_epsilon"]);
    assert_eq!(lost(ModelHeader { num_active_experts: 5, ..base }), ["num_active_experts"]);
    assert_eq!(lost(ModelHeader { yarn_multiplier: 2.0, ..base }), ["yarn_multiplier"]);
    assert_eq!(lost(ModelHeader { context_length: 0, ..base }), ["context_length"]);
    assert_eq!(lost(ModelHeader { rope_theta: f32::NAN, ..base }), ["rope_theta"]);
    assert_eq!(lost(ModelHeader { embedding_dim: 31, ..base }), ["embedding_dim"]);
    assert_eq!(lost(ModelHeader { swiglu_limit: f32::INFINITY, ..base }), ["swiglu_limit"]);
}

fn any_float() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits)
}

proptest! {
    /// Configs as people write them, and configs of arbitrary digits.
    #[test]
    fn plausible_configs_are_recovered(
        context in prop_oneof![256u32..1 << 20, (8u32..20).prop_map(|power| 1 << power)],
        factor in prop_oneof![1.0..200.0, (2u32..2000).prop_map(|tenths| f64::from(tenths) / 10.0)],
        alpha in prop_oneof![0.25..8.0, (1u32..9).prop_map(f64::from)],
        beta in prop_oneof![9.0..128.0, (9u32..129).prop_map(f64::from)],
        theta in prop_oneof![100.0..1e7, (1u32..1000).prop_map(|thousands| f64::from(thousands) * 1000.0)],
        limit in 0.5..100.0,
    ) {
        let mut config = original();
        config["initial_context_length"] = json!(context);
        config["rope_scaling_factor"] = json!(factor);
        config["rope_ntk_alpha"] = json!(alpha);
        config["rope_ntk_beta"] = json!(beta);
        config["rope_theta"] = json!(theta);
        config["swiglu_limit"] = json!(limit);
        let (expected, recovered) = recovered(&config);
        prop_assert!(recovered.lost.is_empty(), "{:?} of {config}", recovered.lost);
        prop_assert_eq!(header(&Value::Object(recovered.json)).unwrap(), expected);
    }

    /// `lost` is right for headers that no exporter wrote: a field that is not named is given again.
    #[test]
    fn recover_is_consistent_for_any_header(
        sizes in any::<[u32; 4]>(),
        width in 1u32..1000,
        swiglu_limit in any_float(),
        rope_theta in any_float(),
        interpolation_scale in any_float(),
        yarn_offset in any_float(),
        yarn_scale in any_float(),
        yarn_multiplier in any_float(),
        rmsnorm_epsilon in any_float(),
    ) {
        let [context_length, num_active_experts, num_heads, attention_window] = sizes;
        let arbitrary = ModelHeader {
            context_length, num_active_experts, num_heads, attention_window, swiglu_limit, rope_theta,
            interpolation_scale, yarn_offset, yarn_scale, yarn_multiplier, rmsnorm_epsilon,
            embedding_dim: width * 32,
            ..header(&original()).unwrap()
        };
        let recovered = recover(&arbitrary);
        let text = Value::Object(recovered.json).to_string();
        let again = Config::read(text.as_bytes()).0.unwrap().unchecked_header();
        let bits = |header: &ModelHeader| [
            ("context_length", header.context_length),
            ("num_active_experts", header.num_active_experts),
            ("num_heads", header.num_heads),
            ("attention_window", header.attention_window),
            ("embedding_dim", header.embedding_dim),
            ("swiglu_limit", header.swiglu_limit.to_bits()),
            ("rope_theta", header.rope_theta.to_bits()),
            ("interpolation_scale", header.interpolation_scale.to_bits()),
            ("yarn_offset", header.yarn_offset.to_bits()),
            ("yarn_scale", header.yarn_scale.to_bits()),
            ("yarn_multiplier", header.yarn_multiplier.to_bits()),
            ("rmsnorm_epsilon", header.rmsnorm_epsilon.to_bits()),
        ];
        for (expected, found) in bits(&arbitrary).into_iter().zip(bits(&again)) {
            prop_assert_eq!(expected == found, !recovered.lost.contains(&expected.0), "{}", expected.0);
        }
    }
}
