//! The `modelbin` command as a person or a program meets it: exit status, output, what is left on disk.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fixtures::checkpoint::{self, Form, Layout, Spec};
use fixtures::regenerate;
use serde_json::Value;
use tempfile::TempDir;

fn modelbin(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_modelbin")).args(arguments).output().unwrap()
}

/// Runs and expects an exit status; standard output.
fn expect(status: i32, arguments: &[&str]) -> String {
    let output = modelbin(arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(
        output.status.code(),
        Some(status),
        "{arguments:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn json(status: i32, arguments: &[&str]) -> Value {
    let text = expect(status, arguments);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error} in {text}"))
}

fn fixture(path: &str) -> String {
    regenerate::folder().join(path).display().to_string()
}

struct Workplace(TempDir);

impl Workplace {
    fn new() -> Workplace {
        Workplace(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// The names of everything in it, hidden files included.
    fn entries(&self) -> Vec<String> {
        let mut entries: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        entries.sort();
        entries
    }
}

#[test]
fn export_takes_the_genuine_flags_in_both_spellings() {
    let place = Workplace::new();
    let (a, b) = (place.path("a.bin"), place.path("b.bin"));
    let text = expect(0, &["export", "-s", &fixture("checkpoints/original"), "-d", &a]);
    for section in
        ["file header", "embedding", "block 1 attention and router", "block 0 experts", "original layout"]
    {
        assert!(text.contains(section), "{section} in {text}");
    }
    let document = json(0, &["export", "--src", &fixture("checkpoints/hf"), "--dst", &b, "--json"]);
    assert_eq!(document["bytes"], fs::metadata(&b).unwrap().len());
    assert!(fs::read(&a).unwrap() == fs::read(fixture("model-bin/ordinary.bin")).unwrap());
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    assert_eq!(place.entries(), ["a.bin", "b.bin"]);
}

#[test]
fn bf16_experts_are_quantised_only_when_asked() {
    let place = Workplace::new();
    let file = place.path("model.bin");
    let document = json(1, &["export", "-s", &fixture("checkpoints/hf-bf16"), "-d", &file, "--json"]);
    assert_eq!(document["violations"][0]["rule"], "SRC-BF16-EXPERTS");
    assert!(place.entries().is_empty());
    expect(0, &["export", "-s", &fixture("checkpoints/hf-bf16"), "-d", &file, "--quantize"]);
    expect(0, &["verify", &file, "--against", &fixture("checkpoints/hf-bf16"), "--quantize"]);
}

#[test]
fn verify_says_what_is_wrong_and_exits_with_1() {
    let place = Workplace::new();
    let file = place.path("bad.bin");
    let mut bytes = fs::read(fixture("model-bin/ordinary.bin")).unwrap();
    bytes[48..52].copy_from_slice(&33u32.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let document = json(1, &["verify", &file, "--json"]);
    assert_eq!(document["valid"], false);
    let violation = &document["violations"][0];
    assert_eq!(violation["rule"], "HDR-EMBEDDING-DIM");
    assert_eq!(violation["range"], serde_json::json!([48, 52]));
    assert_eq!(violation["found"], "33");
    let text = expect(1, &["verify", &file]);
    assert!(text.contains("HDR-EMBEDDING-DIM") && text.contains("[bytes 48..52]"), "{text}");
}

#[test]
fn verify_against_another_checkpoint_names_what_differs() {
    let file = fixture("model-bin/ordinary.bin");
    expect(0, &["verify", &file, "--against", &fixture("checkpoints/original-3-shards")]);
    let document = json(1, &["verify", &file, "--against", &fixture("checkpoints/extreme"), "--json"]);
    let rules: Vec<&str> = document["violations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["rule"].as_str().unwrap())
        .collect();
    assert!(rules.contains(&"WR-HEADER"), "{rules:?}");
}

#[test]
fn what_cannot_run_exits_with_2() {
    let place = Workplace::new();
    expect(2, &["verify", &place.path("absent.bin")]);
    expect(2, &["export", "-s", &place.path("absent"), "-d", &place.path("model.bin")]);
    expect(2, &["verify"]);
    expect(2, &["no-such-verb"]);
    let document = json(2, &["inspect", &place.path("absent.bin"), "--json"]);
    assert!(document["error"].as_str().unwrap().contains("absent.bin"));
    // A folder that has something in it is not overwritten.
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/file"), "mine").unwrap();
    expect(2, &["unpack", &fixture("model-bin/ordinary.bin"), "-d", &place.path("full")]);
    assert_eq!(fs::read_to_string(place.path("full/file")).unwrap(), "mine");
}

#[cfg(unix)]
#[test]
fn outputs_never_go_through_a_symbolic_link() {
    let place = Workplace::new();
    let (kept, link) = (place.path("kept"), place.path("link"));
    fs::write(&kept, "mine").unwrap();
    std::os::unix::fs::symlink(&kept, &link).unwrap();
    expect(2, &["export", "-s", &fixture("checkpoints/original"), "-d", &link]);
    assert_eq!(fs::read_to_string(&kept).unwrap(), "mine");
    assert_eq!(place.entries(), ["kept", "link"]);
}

#[test]
fn a_refused_checkpoint_leaves_the_old_file_alone() {
    let place = Workplace::new();
    let target = place.path("model.bin");
    fs::write(&target, "an earlier file").unwrap();
    let spec = Spec { experts: 3, vocab_rows: 300, ..Spec::default() };
    let folder = PathBuf::from(place.path("checkpoint"));
    checkpoint::write(&spec, Form::new(Layout::Original, 1), &folder).unwrap();
    fixtures::vocabulary::write(&folder).unwrap();
    expect(1, &["export", "-s", &folder.display().to_string(), "-d", &target]);
    assert_eq!(fs::read_to_string(&target).unwrap(), "an earlier file");
    assert_eq!(place.entries(), ["checkpoint", "model.bin"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_export_leaves_nothing() {
    let place = Workplace::new();
    let folder = PathBuf::from(place.path("checkpoint"));
    let spec = Spec { layers: 3, experts: 8, hidden: 768, intermediate: 768, ..Spec::default() };
    checkpoint::write(&spec, Form::new(Layout::Original, 1), &folder).unwrap();
    let target = place.path("model.bin");
    let mut child = Command::new(env!("CARGO_BIN_EXE_modelbin"))
        .args(["export", "-s", &folder.display().to_string(), "-d", &target])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Interrupt it while the temporary file is there.
    let partial = |entry: &String| entry.ends_with(".partial");
    while !place.entries().iter().any(partial) {
        assert!(child.try_wait().unwrap().is_none(), "ended before it could be interrupted");
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(place.entries(), ["checkpoint"]);
}

#[test]
fn dump_accounts_for_every_byte() {
    let file = fixture("model-bin/ordinary.bin");
    let len = fs::metadata(&file).unwrap().len();
    for arguments in [&["dump", &file][..], &["dump", &file, "--full"]] {
        let text = expect(0, arguments);
        let mut position = 0;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let start = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
            assert_eq!(start, position, "{line}");
            let rest = &line[12..];
            position += match rest.strip_prefix("… ") {
                Some(more) => more.split(' ').next().unwrap().parse().unwrap(),
                None if rest.starts_with("end:") => 0,
                None => rest[..48].split_whitespace().count() as u64,
            };
        }
        assert_eq!(position, len);
        assert!(text.ends_with(&format!("end: {len} bytes, each attributed once\n")));
    }
}

#[test]
fn inspect_lists_sections_that_cover_the_file() {
    let file = fixture("model-bin/extreme.bin");
    let document = json(0, &["inspect", &file, "--json"]);
    let mut position = 0;
    for section in document["sections"].as_array().unwrap() {
        for part in section["parts"].as_array().unwrap() {
            assert_eq!(part["range"][0], position, "{part}");
            position = part["range"][1].as_u64().unwrap();
        }
    }
    assert_eq!(document["bytes"], position);
    let text = expect(0, &["inspect", &file]);
    assert!(text.contains("yarn_multiplier") && text.contains("<|start|>"), "{text}");
}

#[test]
fn diff_names_the_first_differing_element() {
    let place = Workplace::new();
    let (a, b) = (fixture("model-bin/ordinary.bin"), place.path("b.bin"));
    let mut bytes = fs::read(&a).unwrap();
    // Elements 3 and 5 of norm.scale, which starts at 86720.
    bytes[86720 + 6] ^= 1;
    bytes[86720 + 10] ^= 1;
    fs::write(&b, bytes).unwrap();
    expect(0, &["diff", &a, &a]);
    let document = json(1, &["diff", &a, &b, "--json"]);
    let differences = document["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1);
    assert_eq!(differences[0]["field"], "norm.scale");
    assert_eq!((&differences[0]["element"], &differences[0]["count"]), (&3.into(), &2.into()));
    expect(0, &["diff", &a, &fixture("checkpoints/hf")]);
    expect(1, &["diff", &b, &fixture("checkpoints/hf")]);
}

#[test]
fn unpack_convert_and_digest_agree() {
    let place = Workplace::new();
    let file = fixture("model-bin/ordinary.bin");
    let (folder, again, gguf, back) =
        (place.path("unpacked"), place.path("again.bin"), place.path("model.gguf"), place.path("back.bin"));
    let document = json(0, &["unpack", &file, "-d", &folder, "--json"]);
    assert_eq!(document["lost_fields"], serde_json::json!([]));
    expect(0, &["export", "-s", &folder, "-d", &again]);
    expect(0, &["convert", &file, "-d", &gguf]);
    expect(0, &["convert", &gguf, "-d", &back]);
    let wanted = fs::read(&file).unwrap();
    assert!(fs::read(&again).unwrap() == wanted && fs::read(&back).unwrap() == wanted);
    let digests: Vec<Value> = [&file, &folder, &gguf, &fixture("checkpoints/hf")]
        .map(|path| json(0, &["digest", path, "--json"])["model"].clone())
        .into();
    assert!(digests.iter().all(|digest| digest == &digests[0] && digest.is_string()), "{digests:?}");
}

#[test]
fn tokenize_goes_there_and_back() {
    let text = "Hello  world, 12345 naïve café\n\t🦀";
    let wanted = tiktoken_rs::o200k_base().unwrap().encode_ordinary(text);
    let document = json(0, &["tokenize", text, "--json"]);
    assert_eq!(document["ids"], serde_json::json!(wanted));
    let ids = expect(0, &["tokenize", text]);
    assert_eq!(expect(0, &["tokenize", "--decode", &ids]), text);
    // A model.bin's own vocabulary.
    let small = fixture("model-bin/ordinary.bin");
    let ids = expect(0, &["tokenize", "--model", &small, text]);
    assert_eq!(expect(0, &["tokenize", "--model", &small, "--decode", &ids]), text);
    expect(2, &["tokenize", "--decode", "1 two 3"]);
}

#[test]
fn completions_and_manual_name_every_verb() {
    let verbs =
        ["export", "verify", "inspect", "dump", "diff", "unpack", "convert", "digest", "tokenize", "demo"];
    for text in [expect(0, &["completions", "bash"]), expect(0, &["man"]), expect(0, &["--help"])] {
        for verb in verbs {
            assert!(text.contains(verb), "{verb}");
        }
    }
}

#[test]
fn a_reader_that_stops_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_modelbin"))
        .args(["dump", "--full", &fixture("model-bin/ordinary.bin")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_demo_ends_well_and_keeps_its_files_where_asked() {
    let place = Workplace::new();
    let text = expect(0, &["demo", "-d", &place.path("demo")]);
    assert!(text.ends_with("Every step gave what it should.\n"), "{text}");
    assert!(Path::new(&place.path("demo/model.gguf")).exists());
}
