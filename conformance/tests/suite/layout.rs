//! The declarative description against the oracle: two independent computations of every position.

use binrw::BinRead;
use conformance::cases::BASE;
use conformance::oracle::oracle;
use conformance::synthetic::Synthetic;
use formats::model_bin::header::{HEAD_LEN, Head, ModelHeader, TokenizerHeader, Uuid};
use formats::model_bin::layout::{File, Tensor};
use formats::model_bin::section::{SectionMap, head_fields};
use formats::model_bin::write::plan;
use formats::vocabulary::Vocabulary;
use proptest::prelude::*;

fn assert_as_oracle(bytes: &[u8], tensors: &[&Tensor], len: u64) {
    let oracle = oracle(bytes);
    assert_eq!(len, oracle.len);
    assert_eq!(tensors.len(), oracle.tensors.len());
    for tensor in tensors {
        let name = tensor.id.to_string();
        assert_eq!(Some(&tensor.range), oracle.tensors.get(&name), "{name}");
        let padding = oracle.paddings.get(&name).cloned();
        assert_eq!(
            (!tensor.padding.range.is_empty()).then_some(tensor.padding.range.clone()),
            padding,
            "{name}"
        );
    }
}

#[test]
fn the_base_file_lies_as_the_oracle_says() {
    let file =
        File::read_args(&mut std::io::Cursor::new(BASE), binrw::args! { len: BASE.len() as u64 }).unwrap();
    assert_as_oracle(BASE, &file.weights.tensors().collect::<Vec<_>>(), BASE.len() as u64);
}

#[test]
fn established_offsets_of_a_genuine_file() {
    // Seen in a file that the genuine exporter wrote: 2 blocks, 4 experts, heads 2/1, hidden and intermediate 64.
    let header = ModelHeader {
        num_blocks: 2,
        num_experts: 4,
        embedding_dim: 64,
        mlp_dim: 64,
        num_heads: 2,
        num_kv_heads: 1,
        ..ModelHeader::GPT_OSS_20B
    };
    let file = plan(&Synthetic::new(header, Vocabulary::o200k().clone(), 0).unwrap()).unwrap();
    let starts: Vec<u64> = file.weights.tensors().map(|tensor| tensor.range.start).collect();
    let dense = [
        1802240, 27404032, 27404160, 27436928, 27437440, 27437456, 27453840, 27453968, 27454096, 27454608,
        27454624,
    ];
    assert_eq!(starts[..dense.len()], dense);
    assert_eq!(file.weights.norm.range.start, 27505216);
    assert_eq!(file.weights.unembedding.range.start, 27505344);
    let experts: Vec<u64> =
        file.weights.experts.iter().map(|block| block.experts[0].mlp1_blocks.range.start).collect();
    assert_eq!(experts, [53116928, 53149696]);
    assert_eq!(file.weights.end(), 53177344);
}

#[test]
fn established_sizes_of_the_released_models() {
    for (blocks, experts, len, first_experts, stride) in [
        (24, 32, 13_750_886_400, 3_585_081_344, 423_575_552),
        (36, 128, 65_238_253_568, 4_244_553_728, 1_694_269_440),
    ] {
        let header = ModelHeader { num_blocks: blocks, num_experts: experts, ..ModelHeader::GPT_OSS_20B };
        let file = plan(&Synthetic::new(header, Vocabulary::o200k().clone(), 0).unwrap()).unwrap();
        assert_eq!(file.weights.end(), len);
        let starts: Vec<u64> =
            file.weights.experts.iter().map(|block| block.experts[0].mlp1_blocks.range.start).collect();
        assert_eq!(starts[0], first_experts);
        assert_eq!(starts[1] - starts[0], stride);
    }
}

#[test]
fn the_field_table_is_where_the_description_reads() {
    // A head whose byte n has value n: each field's value tells its position.
    let bytes: Vec<u8> = (0..HEAD_LEN as u8).collect();
    let head = Head::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    let Head { magic, magic_zero, model_uuid, model, layout_uuid, tokenizer_uuid, tokenizer } = head;
    let ModelHeader {
        context_length,
        num_blocks,
        num_experts,
        num_active_experts,
        embedding_dim,
        mlp_dim,
        swiglu_limit,
        head_dim,
        num_heads,
        num_kv_heads,
        attention_window,
        rope_theta,
        interpolation_scale,
        yarn_offset,
        yarn_scale,
        yarn_multiplier,
        rmsnorm_epsilon,
    } = model;
    let TokenizerHeader { num_special_tokens, num_text_tokens, regex_size, tokens_size } = tokenizer;
    let word = |value: u32| value.to_le_bytes().to_vec();
    let float = |value: f32| value.to_bits().to_le_bytes().to_vec();
    let uuid = |Uuid(bytes): Uuid| bytes.to_vec();
    let values = [
        ("magic", magic.to_vec()),
        ("zero", word(magic_zero)),
        ("model_uuid", uuid(model_uuid)),
        ("context_length", word(context_length)),
        ("num_blocks", word(num_blocks)),
        ("num_experts", word(num_experts)),
        ("num_active_experts", word(num_active_experts)),
        ("embedding_dim", word(embedding_dim)),
        ("mlp_dim", word(mlp_dim)),
        ("swiglu_limit", float(swiglu_limit)),
        ("head_dim", word(head_dim)),
        ("num_heads", word(num_heads)),
        ("num_kv_heads", word(num_kv_heads)),
        ("attention_window", word(attention_window)),
        ("rope_theta", float(rope_theta)),
        ("interpolation_scale", float(interpolation_scale)),
        ("yarn_offset", float(yarn_offset)),
        ("yarn_scale", float(yarn_scale)),
        ("yarn_multiplier", float(yarn_multiplier)),
        ("rmsnorm_epsilon", float(rmsnorm_epsilon)),
        ("layout_uuid", uuid(layout_uuid)),
        ("tokenizer_uuid", uuid(tokenizer_uuid)),
        ("num_special_tokens", word(num_special_tokens)),
        ("num_text_tokens", word(num_text_tokens)),
        ("regex_size", word(regex_size)),
        ("tokens_size", word(tokens_size)),
    ];
    let fields: Vec<_> = head_fields().collect();
    assert_eq!(fields.len(), values.len());
    for (field, (name, value)) in fields.iter().zip(values) {
        assert_eq!(field.name, name);
        assert_eq!(bytes[field.range.start as usize..field.range.end as usize], value, "{name}");
    }
    assert_eq!(fields.last().unwrap().range.end, HEAD_LEN);
}

#[test]
fn section_map_of_the_base_file() {
    let map = SectionMap::read(BASE);
    let lines: Vec<String> = map
        .spans
        .iter()
        .map(|span| {
            format!("{:>7}..{:<7} {} | {}", span.range.start, span.range.end, span.section, span.name)
        })
        .collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn dump_of_the_base_file() {
    let mut dump = Vec::new();
    formats::model_bin::dump::dump(BASE, &mut dump, Default::default()).unwrap();
    insta::assert_snapshot!(String::from_utf8(dump).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_plan_lies_as_the_oracle_says(
        num_blocks in 0u32..5,
        num_experts in 4u32..40,
        embedding_dim in (1u32..100).prop_map(|n| n * 32),
        mlp_dim in (1u32..100).prop_map(|n| n * 32),
        num_kv_heads in 1u32..9,
        group in 1u32..9,
    ) {
        let header = ModelHeader {
            num_blocks, num_experts, embedding_dim, mlp_dim, num_kv_heads, num_heads: num_kv_heads * group, ..ModelHeader::GPT_OSS_20B
        };
        let file = plan(&Synthetic::new(header, fixtures::vocabulary::small(), 0).unwrap()).unwrap();
        let mut bytes = std::io::Cursor::new(Vec::new());
        binrw::BinWrite::write(&file.prefix.head, &mut bytes).unwrap();
        assert_as_oracle(bytes.get_ref(), &file.weights.tensors().collect::<Vec<_>>(), file.weights.end());
    }
}
