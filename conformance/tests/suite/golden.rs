//! The committed files, byte for byte, from every layout of the checkpoint they were made of.

use std::fs;

use formats::digest::digest;
use formats::model_bin::{Depth, Verified, write};
use formats::{canonical::Source, compare};

use super::{fixture, open};

#[test]
fn every_layout_of_a_checkpoint_exports_to_the_golden_file() {
    let folder = tempfile::tempdir().unwrap();
    for (checkpoint, golden) in [
        ("original", "ordinary"),
        ("original-3-shards", "ordinary"),
        ("hf", "ordinary"),
        ("extreme", "extreme"),
    ] {
        let target = folder.path().join("model.bin");
        let source = open(&fixture(&format!("checkpoints/{checkpoint}")), false).unwrap();
        write::write(&source, &target, &()).unwrap();
        let wanted = fs::read(fixture(&format!("model-bin/{golden}.bin"))).unwrap();
        let differences = compare::files(&fs::read(&target).unwrap(), &wanted);
        assert!(differences.is_empty(), "{checkpoint}: {differences:?}");
        assert!(fs::read(&target).unwrap() == wanted, "{checkpoint}");
    }
}

#[test]
fn golden_files_are_valid_and_equal_their_checkpoints() {
    for (checkpoint, golden) in [("original", "ordinary"), ("hf", "ordinary"), ("extreme", "extreme")] {
        let model = Verified::open(&fixture(&format!("model-bin/{golden}.bin")), Depth::Full, &()).unwrap();
        let source = open(&fixture(&format!("checkpoints/{checkpoint}")), false).unwrap();
        assert_eq!(compare::against(&model, &source, &()).unwrap(), []);
        assert_eq!(compare::models(&model, &source, &()).unwrap(), []);
    }
}

#[test]
fn bf16_experts_export_when_asked_and_keep_every_other_tensor() {
    let source = open(&fixture("checkpoints/hf-bf16"), true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model.bin");
    write::write(&source, &target, &()).unwrap();
    let model = Verified::open(&target, Depth::Full, &()).unwrap();
    assert_eq!(compare::against(&model, &source, &()).unwrap(), []);
    // The BF16 experts of this fixture are the dequantised MXFP4 of the others: values are equal, codes may not be.
    let original = open(&fixture("checkpoints/original"), false).unwrap();
    let differing = compare::models(&model, &original, &()).unwrap();
    let outside: Vec<_> =
        differing.iter().filter(|difference| !difference.field.contains("_weight.")).collect();
    assert!(outside.is_empty(), "{outside:?}");
}

#[test]
fn digests_are_the_same_in_every_container() {
    let folder = tempfile::tempdir().unwrap();
    for (name, checkpoints) in
        [("ordinary", &["original", "original-3-shards", "hf"][..]), ("extreme", &["extreme"])]
    {
        let model =
            Verified::open(&fixture(&format!("model-bin/{name}.bin")), Depth::Structure, &()).unwrap();
        let wanted = digest(&model, &()).unwrap();
        for checkpoint in checkpoints {
            let source = open(&fixture(&format!("checkpoints/{checkpoint}")), false).unwrap();
            assert_eq!(digest(&source, &()).unwrap(), wanted, "{checkpoint}");
        }
        let gguf = folder.path().join(format!("{name}.gguf"));
        formats::gguf::write(&model, &gguf, Some(name), &()).unwrap();
        let gguf = formats::gguf::Model::open(&gguf).unwrap();
        assert_eq!(gguf.changed(), []);
        assert_eq!(digest(&gguf, &()).unwrap(), wanted, "GGUF of {name}");
    }
}

#[test]
fn a_digest_is_blake3_of_the_tensor_as_safetensors_holds_it() {
    // `norm.scale` goes through no transform: its digest is that of its bytes in the checkpoint.
    let bytes = fs::read(fixture("checkpoints/original/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let wanted = blake3::hash(file.tensor("norm.scale").unwrap().data()).to_hex();
    let model = Verified::open(&fixture("model-bin/ordinary.bin"), Depth::Structure, &()).unwrap();
    let manifest = digest(&model, &()).unwrap();
    let norm = manifest.tensors.iter().find(|tensor| tensor.name == "norm.scale").unwrap();
    assert_eq!(norm.blake3, wanted.as_str());
}
