//! The specification says what the code does.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use formats::Rule;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/model-bin.md")
}

fn text() -> String {
    fs::read_to_string(path()).unwrap()
}

/// The text without the blocks that are generated from the code.
fn prose() -> String {
    let mut prose = String::new();
    let mut generated = false;
    for line in text().lines() {
        generated |= line.starts_with("<!-- generated:");
        if !generated {
            prose += line;
            prose.push('\n');
        }
        generated &= !line.starts_with("<!-- end generated");
    }
    prose
}

#[test]
fn generated_tables_are_fresh() {
    let text = text();
    let fresh = conformance::spec_tables::update(&text).unwrap();
    assert!(text == fresh, "spec/model-bin.md is stale: run `cargo run -p conformance -- bless`");
}

#[test]
fn every_rule_is_defined_once_and_every_definition_is_a_rule() {
    let mut defined: HashMap<&str, usize> = HashMap::new();
    let prose = prose();
    for part in prose.split("**[").skip(1) {
        let id = part.split("]**").next().unwrap();
        *defined.entry(id).or_default() += 1;
        assert!(Rule::from_id(id).is_some(), "{id} is not a rule of the code");
    }
    for rule in Rule::ALL {
        assert_eq!(defined.get(rule.id()), Some(&1), "definitions of {rule}");
    }
}

#[test]
fn every_must_has_a_rule() {
    // A paragraph, list item or table row with a MUST names at least as many rules as it has such words.
    let prose = prose();
    let mut block = String::new();
    for line in prose.lines().chain([""]) {
        let starts_item =
            line.trim_start().starts_with(['-', '|']) || line.trim().is_empty() || line.starts_with('#');
        if starts_item {
            let words = block.split(|c: char| !c.is_ascii_uppercase());
            let musts = words.filter(|word| *word == "MUST" || *word == "SHOULD").count();
            let rules = block.matches("**[").count();
            let defines_words = block.contains("RFC 2119");
            assert!(defines_words || musts <= rules, "{musts} requirements and {rules} rules in: {block}");
            block.clear();
        }
        block += line;
        block.push('\n');
    }
}
