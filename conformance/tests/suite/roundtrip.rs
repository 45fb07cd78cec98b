//! There and back again.

use std::fs;

use formats::canonical::Source;
use formats::model_bin::qkv::Part;
use formats::model_bin::{Depth, Verified, write};
use formats::unpack::unpack;

use super::{fixture, open};

#[test]
fn unpacking_and_exporting_again_gives_the_identical_file() {
    for name in ["ordinary", "extreme"] {
        let folder = tempfile::tempdir().unwrap();
        let [checkpoint, again] = ["checkpoint", "again.bin"].map(|file| folder.path().join(file));
        let path = fixture(&format!("model-bin/{name}.bin"));
        let model = Verified::open(&path, Depth::Full, &()).unwrap();
        let unpacked = unpack(&model, &checkpoint, &()).unwrap();
        assert!(unpacked.lost_fields.is_empty(), "{name}: {unpacked:?}");
        assert!(unpacked.vocabulary_written);
        write::write(&open(&checkpoint, false).unwrap(), &again, &()).unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "{name}");
    }
}

#[test]
fn unpacked_tensors_are_the_checkpoints_where_the_transform_is_invertible() {
    for (name, checkpoint) in [("ordinary", "original"), ("extreme", "extreme")] {
        let model = Verified::open(&fixture(&format!("model-bin/{name}.bin")), Depth::Full, &()).unwrap();
        let original = open(&fixture(&format!("checkpoints/{checkpoint}")), false).unwrap();
        let ambiguous = model.ambiguous_qkv();
        for id in model.dims().tensors() {
            let rows = id.kind.rows(model.dims());
            let row_bytes = id.kind.row_bytes(model.dims());
            let [mut found, mut wanted] = [0, 1].map(|_| vec![0; (rows * row_bytes) as usize]);
            model.read_rows(id, 0..rows, &mut found).unwrap();
            original.read_rows(id, 0..rows, &mut wanted).unwrap();
            if found == wanted {
                continue;
            }
            assert!(id.kind.is_qkv(), "{name}: {id}");
            // Counted by hand: values that another value scales to as well.
            let mut not_invertible = 0;
            for (element, (found, wanted)) in found.chunks(2).zip(wanted.chunks(2)).enumerate() {
                let part = Part::of_row(element as u64 * 2 / row_bytes, model.dims());
                let [found, wanted] = [found, wanted].map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
                let factor = match part {
                    Part::Query => 0.5,
                    Part::Key => 0.25,
                    Part::Value => 1.0,
                };
                let scaled =
                    |bits: u16| half::bf16::from_f32(half::bf16::from_bits(bits).to_f32() * factor).to_bits();
                assert_eq!(scaled(found), scaled(wanted), "{name}: {id} element {element}");
                let rivals = [wanted.wrapping_sub(1), wanted.wrapping_add(1)];
                let rival =
                    rivals.iter().any(|&rival| (rival ^ wanted) < 0x8000 && scaled(rival) == scaled(wanted));
                not_invertible += u64::from(rival);
                if found != wanted {
                    assert!(rival, "{name}: {id} element {element}: {wanted:#06x} came back as {found:#06x}");
                }
            }
            assert!(
                ambiguous.contains(&(id, not_invertible)),
                "{name}: {id}: {not_invertible} of {ambiguous:?}"
            );
        }
    }
}

#[test]
fn gguf_and_back_gives_the_identical_file() {
    for name in ["ordinary", "extreme"] {
        let folder = tempfile::tempdir().unwrap();
        let [gguf, again] = ["model.gguf", "again.bin"].map(|file| folder.path().join(file));
        let path = fixture(&format!("model-bin/{name}.bin"));
        let model = Verified::open(&path, Depth::Full, &()).unwrap();
        formats::gguf::write(&model, &gguf, None, &()).unwrap();
        write::write(&formats::gguf::Model::open(&gguf).unwrap(), &again, &()).unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "{name}");
    }
}
