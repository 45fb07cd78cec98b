//! Where the original's results are, and each part beside them.

use std::path::{Path, PathBuf};

use engine::ace_step::verify::{Options, Outcome, verify};

use crate::devices::devices;

/// Where `fixtures/ace-step` is.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/ace-step")
}

/// A part on every device: every comparison passes, and there are as many as `at_least`.
pub fn assert_part(name: &str, at_least: usize) {
    for device in devices() {
        let options = Options { lyric_vocab: lyric_vocab(), parts: vec![name.into()] };
        let part = verify(&folder(), &options, &device).next().unwrap();
        let backend = device.backend();
        match &part.outcome {
            Outcome::Compared { comparisons } => {
                let count = comparisons.len();
                println!("{name} on {backend}: {count} compared, worst {}", part.worst().unwrap());
                assert!(count >= at_least, "{name} on {backend}: {count} compared");
                assert!(part.passed(), "{name} on {backend}: {}", part.first_failure().unwrap());
            }
            other => panic!("{name} on {backend}: {other:?}"),
        }
    }
}

/// The lyric tokenizer's vocabulary, which belongs to the original repository and is not part of this one.
pub fn lyric_vocab() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/ace-step/lyric_vocab.json");
    let file = std::env::var_os("ACE_STEP_LYRIC_VOCAB").map_or(beside, PathBuf::from);
    file.is_file().then_some(file)
}
