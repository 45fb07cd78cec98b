//! Full-vocabulary exports against digests of the files that the genuine exporter wrote for the same checkpoints. The
//! parity job recorded them; it compares whole files, more of them, where Python can be had.

use std::fs;

use fixtures::checkpoint::{self, Form, Layout, Spec};
use formats::model_bin::write;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{fixture, open};

#[derive(Deserialize)]
struct Record {
    files: Vec<GenuineFile>,
}

#[derive(Deserialize)]
struct GenuineFile {
    name: String,
    spec: Spec,
    shards: usize,
    size: usize,
    sections: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    name: String,
    start: usize,
    end: usize,
    sha256: String,
}

#[test]
fn exports_have_the_genuine_digests() {
    let record: Record = serde_json::from_slice(&fs::read(fixture("genuine-digests.json")).unwrap()).unwrap();
    assert!(!record.files.is_empty());
    for file in record.files {
        let folder = tempfile::tempdir().unwrap();
        checkpoint::write(&file.spec, Form::new(Layout::Original, file.shards), folder.path()).unwrap();
        let target = folder.path().join("model.bin");
        write::write(&open(folder.path(), false).unwrap(), &target, &()).unwrap();
        let bytes = fs::read(&target).unwrap();
        assert_eq!(bytes.len(), file.size, "{}", file.name);
        let mut position = 0;
        for section in file.sections {
            assert_eq!(section.start, position, "{}: the record leaves bytes out", section.name);
            position = section.end;
            let digest = Sha256::digest(&bytes[section.start..section.end]);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let place = format!("{}: {} [bytes {}..{}]", file.name, section.name, section.start, section.end);
            assert_eq!(digest, section.sha256, "{place}");
        }
        assert_eq!(position, file.size, "{}: the record leaves bytes out", file.name);
    }
}

/// The whole 20b layout, 13.7 GB of it sparse: header and vocabulary are real, the weights are a hole.
#[test]
fn a_sparse_file_of_the_released_layout_passes_structure_verification() {
    use conformance::synthetic::Synthetic;
    use formats::model_bin::header::ModelHeader;
    use formats::model_bin::{Depth, Verified};
    use formats::vocabulary::Vocabulary;

    let model = Synthetic::new(ModelHeader::GPT_OSS_20B, Vocabulary::o200k().clone(), 0).unwrap();
    let file = write::plan(&model).unwrap();
    let mut prefix = std::io::Cursor::new(Vec::new());
    let payload = write::SourcePayload::new(&model, &());
    binrw::BinWrite::write_le_args(&file.prefix, &mut prefix, &payload).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sparse.bin");
    fs::write(&path, prefix.into_inner()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(13_750_886_400).unwrap();
    let verified = Verified::open(&path, Depth::Structure, &()).unwrap();
    assert_eq!(verified.notes(), []);
    assert_eq!(verified.file().weights.tensors().count(), 1 + 24 * 9 + 2 + 24 * 32 * 6);
    assert_eq!(verified.expert(23, 31).unwrap().mlp2.columns, 2880);
    assert!(verified.expert(24, 0).is_none() && verified.expert(0, 32).is_none());
}
