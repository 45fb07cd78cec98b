//! Every u32 of the headers at 0, 1, 2^31 and 2^32 − 1.

use conformance::cases::BASE;
use formats::model_bin::Depth;
use formats::model_bin::section::{FieldType, head_fields};
use formats::model_bin::verify::verify;
use formats::rules::Rule;

/// The rules of which at least one must be named; `None` where the file stays valid.
type Wanted = Option<&'static [Rule]>;

/// What each field's values 0, 1, 2^31 and 2^32 − 1 must lead to. Where only sizes disagree, the file is too short or
/// too long, or padding is not where it should be.
const TABLE: [(&str, [Wanted; 4]); 15] = {
    use Rule::*;
    const SIZES: Wanted = Some(&[Truncated, Trailing, PaddingPage, PaddingTensor]);
    const HUGE: Wanted = Some(&[Truncated, Overflow]);
    [
        ("zero", [None, Some(&[MagicZero]), Some(&[MagicZero]), Some(&[MagicZero])]),
        ("context_length", [Some(&[ContextLength]), None, None, None]),
        ("num_blocks", [SIZES, SIZES, HUGE, HUGE]),
        ("num_experts", [Some(&[NumExperts]), Some(&[NumExperts]), HUGE, HUGE]),
        (
            "num_active_experts",
            [
                Some(&[NumActiveExperts]),
                Some(&[NumActiveExperts]),
                Some(&[NumActiveExperts]),
                Some(&[NumActiveExperts]),
            ],
        ),
        ("embedding_dim", [Some(&[EmbeddingDim]), Some(&[EmbeddingDim]), HUGE, Some(&[EmbeddingDim])]),
        ("mlp_dim", [Some(&[MlpDim]), Some(&[MlpDim]), HUGE, Some(&[MlpDim])]),
        ("head_dim", [Some(&[HeadDim]), Some(&[HeadDim]), Some(&[HeadDim]), Some(&[HeadDim])]),
        ("num_heads", [Some(&[NumHeads]), SIZES, HUGE, HUGE]),
        ("num_kv_heads", [Some(&[NumKvHeads]), None, Some(&[NumKvHeads]), Some(&[NumKvHeads])]),
        ("attention_window", [Some(&[AttentionWindow]), None, None, None]),
        (
            "num_special_tokens",
            [
                Some(&[RegexNul, TokenRecords]),
                Some(&[RegexNul, TokenRecords]),
                Some(&[Truncated]),
                Some(&[Truncated]),
            ],
        ),
        (
            "num_text_tokens",
            [Some(&[TokenCount]), Some(&[TokenRecords]), Some(&[TokenCount]), Some(&[TokenCount])],
        ),
        ("regex_size", [Some(&[RegexSize]), Some(&[RegexSize]), Some(&[Truncated]), Some(&[Truncated])]),
        (
            "tokens_size",
            [Some(&[TokenRecords]), Some(&[TokenRecords]), Some(&[Truncated]), Some(&[Truncated])],
        ),
    ]
};

#[test]
fn every_u32_at_its_extremes() {
    let mut seen = 0;
    for field in head_fields().filter(|field| field.ty == FieldType::U32) {
        let (_, wanted) = TABLE.iter().find(|(name, _)| *name == field.name).expect(field.name);
        seen += 1;
        for (value, wanted) in [0u32, 1, 1 << 31, u32::MAX].into_iter().zip(wanted) {
            let mut bytes = BASE.to_vec();
            bytes[field.range.start as usize..field.range.end as usize].copy_from_slice(&value.to_le_bytes());
            let report = verify(&bytes, Depth::Full, &());
            let found: Vec<Rule> = report.violations.iter().map(|violation| violation.rule).collect();
            match wanted {
                None => assert!(report.is_valid(), "{} = {value}: {:?}", field.name, report.violations),
                Some(rules) => {
                    assert!(
                        rules.iter().any(|rule| found.contains(rule)),
                        "{} = {value}: {found:?}",
                        field.name
                    );
                    assert!(!report.is_valid());
                }
            }
        }
    }
    assert_eq!(seen, TABLE.len(), "a u32 field is missing from the table");
}
