//! A file that ends early, at every byte, and one whose bytes are damaged one at a time.

use conformance::cases::BASE;
use formats::model_bin::Depth;
use formats::model_bin::section::{SectionMap, head_fields};
use formats::model_bin::verify::verify;
use formats::rules::Rule;
use rayon::prelude::*;

#[test]
fn truncation_at_every_byte_is_named() {
    (0..BASE.len()).into_par_iter().for_each(|len| {
        let bytes = &BASE[..len];
        let report = verify(bytes, Depth::Structure, &());
        let truncated: Vec<_> =
            report.violations.iter().filter(|found| found.rule == Rule::Truncated).collect();
        let [found] = truncated[..] else { panic!("{len} bytes: {:?}", report.violations) };
        // What is reported as missing starts before the end and does not end before it.
        let len = len as u64;
        assert!(found.range.start <= len && found.range.end > len, "{len} bytes: {found}");
        assert!(
            report
                .violations
                .iter()
                .all(|found| matches!(found.rule, Rule::Truncated | Rule::O200k | Rule::Magic))
        );
        let map = SectionMap::read(bytes);
        assert_eq!(map.spans.last().map_or(0, |span| span.range.end), len);
    });
}

#[test]
fn every_byte_of_the_headers_and_paddings_matters() {
    // Flipping any bit of a UUID, of the magic or of padding is noticed; elsewhere it may give another valid file.
    let must_notice: Vec<u64> = head_fields()
        .filter(|field| {
            ["magic", "zero", "model_uuid", "layout_uuid", "tokenizer_uuid"].contains(&field.name)
        })
        .flat_map(|field| field.range)
        .chain(conformance::oracle::oracle(BASE).paddings.into_values().flatten())
        .collect();
    must_notice.par_iter().for_each(|&position| {
        for bit in 0..8 {
            let mut bytes = BASE.to_vec();
            bytes[position as usize] ^= 1 << bit;
            assert!(!verify(&bytes, Depth::Structure, &()).is_valid(), "bit {bit} of byte {position}");
        }
    });
}
