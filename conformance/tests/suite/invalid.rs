//! Every rule has an invalid case, and each case is rejected for its rule, at its bytes.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use conformance::cases::{self, Case, Input};
use conformance::checkpoint::Checkpoint;
use formats::model_bin::verify::verify;
use formats::model_bin::{Depth, Verified, write};
use formats::rules::{Level, Rule};
use formats::{Violation, compare};

use super::open;

/// What `formats` has against the input of a case.
fn violations(case: &Case) -> Vec<Violation> {
    let folder = tempfile::tempdir().unwrap();
    match &case.input {
        Input::File(bytes) => {
            let report = verify(bytes, Depth::Full, &());
            assert_eq!(report.is_valid(), case.rule.level() == Level::Note, "{}", case.name);
            report.violations
        }
        Input::Against(bytes) => {
            Checkpoint::base().unwrap().write(folder.path()).unwrap();
            let source = open(folder.path(), false).unwrap();
            let model = Verified::from_bytes(Path::new(&case.name), bytes.clone(), Depth::Full).unwrap();
            compare::against(&model, &source, &()).unwrap()
        }
        Input::Checkpoint(change) => {
            let mut checkpoint = Checkpoint::base().unwrap();
            change(&mut checkpoint);
            checkpoint.write(folder.path()).unwrap();
            let target = folder.path().join("model.bin");
            let error = open(folder.path(), false)
                .and_then(|source| write::write(&source, &target, &()))
                .expect_err(&case.name);
            let left: Vec<_> =
                std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            let left =
                left.iter().map(|name| name.to_string_lossy()).filter(|name| !name.ends_with(".safetensors"));
            let strange: Vec<_> = left.filter(|name| !name.ends_with(".json")).collect();
            assert!(strange.is_empty(), "{}: left {strange:?} behind", case.name);
            error.violations().to_vec()
        }
    }
}

#[test]
fn every_case_is_rejected_for_its_rule_at_its_bytes() {
    for case in cases::all() {
        let found = violations(&case);
        let names = |violation: &&Violation| {
            violation.rule == case.rule
                && match case.input {
                    Input::Checkpoint(_) => {
                        violation.field.contains(&case.field) || violation.section.contains(&case.field)
                    }
                    _ => violation.range == case.range && violation.field == case.field,
                }
        };
        let list: String = found.iter().map(|violation| format!("\n  {violation}")).collect();
        assert!(
            found.iter().any(|violation| names(&violation)),
            "{}: needed {} on {} {:?}, found:{list}",
            case.name,
            case.rule,
            case.field,
            case.range
        );
    }
}

#[test]
fn every_rule_has_a_case_and_every_case_its_own_name() {
    let cases = cases::all();
    let covered: HashSet<Rule> = cases.iter().map(|case| case.rule).collect();
    let missing: Vec<_> = Rule::ALL.iter().filter(|rule| !covered.contains(rule)).collect();
    assert!(missing.is_empty(), "no case for {missing:?}");
    let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases share a name");
}

#[test]
fn a_case_breaks_nothing_but_what_its_change_touches() {
    // A change of one value outside the counts that positions follow from must not be reported as anything else.
    let derived = [Rule::O200k];
    for case in cases::all() {
        let Input::File(_) = case.input else { continue };
        let single = matches!(case.rule.level(), Level::Value)
            || matches!(case.rule, Rule::PaddingPage | Rule::PaddingTensor);
        if !single && !case.rule.id().starts_with("FILE-M") {
            continue;
        }
        let others: Vec<_> = violations(&case)
            .into_iter()
            .filter(|violation| violation.rule != case.rule && !derived.contains(&violation.rule))
            .collect();
        assert!(others.is_empty(), "{}: {others:?}", case.name);
    }
}

#[test]
fn diagnostics_read_well() {
    let mut text = String::new();
    for case in cases::all() {
        writeln!(text, "{}: {}", case.name, case.rationale).unwrap();
        // The base file's vocabulary is noted in every report of a file.
        for violation in
            violations(&case).iter().filter(|found| found.rule != Rule::O200k || found.rule == case.rule)
        {
            writeln!(text, "  {violation}").unwrap();
        }
    }
    insta::assert_snapshot!(text);
}
