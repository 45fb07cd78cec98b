//! Target `verify`.

use std::path::Path;

use formats::canonical::Source;
use formats::model_bin::verify::{self as verifier, Report};
use formats::model_bin::{Depth, Verified};
use formats::rules::{Level, Rule};

use crate::parts::Parts;
use crate::{accepted, bounded, edits};

/// A report names places inside the file; its full form begins with its structural one. Exactly the files without a
/// broken MUST become [`Verified`], and those can be read to the last row and exported again.
pub fn verify(data: &[u8]) {
    for bytes in edits::files(data) {
        let len = bytes.len();
        let report = bounded(len, || verifier::verify(&bytes, Depth::Full, &()));
        let structure = bounded(len, || verifier::verify(&bytes, Depth::Structure, &()));
        check_report(&report, &structure);
        let path = Path::new("fuzzed.bin");
        match bounded(len, || Verified::from_bytes(path, bytes, Depth::Full)) {
            Ok(verified) => {
                assert!(report.is_valid());
                check_views(&verified);
                verified.check_values(&()).expect("values that were verified");
                accepted::check(&verified);
            }
            Err(error) => {
                assert!(!report.is_valid(), "{error}");
                assert_eq!(error.violations(), report.violations);
            }
        }
    }
}

fn check_report(report: &Report, structure: &Report) {
    assert!(report.violations.starts_with(&structure.violations));
    assert_eq!(report.file.clone().map(Parts::from), structure.file.clone().map(Parts::from));
    assert!(report.file.is_some() || !report.is_valid());
    for violation in &report.violations {
        assert!(matches!(violation.rule.level(), Level::Structure | Level::Value | Level::Note));
        assert!(violation.range.start <= violation.range.end, "{violation}");
        // What is missing lies behind the end; so does, of an empty file, the magic.
        let missing = matches!(violation.rule, Rule::Truncated | Rule::Magic);
        assert!(missing || violation.range.end <= report.len, "{violation}");
        assert!(!violation.to_string().is_empty());
    }
}

fn check_views(verified: &Verified) {
    let dims = *verified.dims();
    for id in dims.tensors() {
        if id.kind.is_expert() {
            assert!(verified.dense(id).is_none());
            continue;
        }
        let view = verified.dense(id).expect("a tensor of the model");
        assert_eq!(view.bytes.len() as u64, view.shape.elements() * 2, "{id}");
        assert_eq!(view.iter().len() as u64, view.shape.elements(), "{id}");
        assert!(view.iter().all(|value| !value.is_nan()), "{id}");
    }
    for block in 0..dims.num_blocks() as u32 {
        for expert in 0..dims.num_experts() as u32 {
            let expert = verified.expert(block, expert).expect("an expert of the model");
            for (matrix, bias) in [(expert.mlp1, expert.mlp1_bias), (expert.mlp2, expert.mlp2_bias)] {
                assert_eq!(matrix.blocks.len() as u64, matrix.rows * matrix.columns / 2);
                assert_eq!(matrix.scales.len() as u64, matrix.rows * matrix.columns / 32);
                assert_eq!(bias.bytes.len() as u64, matrix.rows * 2);
                assert!(matrix.scales.iter().all(|scale| (14..=254).contains(scale)));
            }
        }
        assert!(verified.expert(block, dims.num_experts() as u32).is_none());
    }
}
