//! The tests of the suite. All of them live below a module called `conformance`, so that `cargo test conformance`
//! finds every one.

#[path = "."]
mod conformance {
    mod extremes;
    mod genuine;
    mod golden;
    mod invalid;
    mod layout;
    mod properties;
    mod roundtrip;
    mod spec;
    mod truncation;

    use std::path::{Path, PathBuf};

    use formats::checkpoint::{Folder, Options};
    use formats::container::vocabulary_for;

    /// A path below the folder of fixtures.
    fn fixture(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
    }

    /// Opens a checkpoint folder with its own vocabulary.
    fn open(folder: &Path, quantize: bool) -> formats::Result<Folder> {
        let vocabulary = vocabulary_for(folder, None)?;
        Folder::open(folder, Options { vocabulary, quantize })
    }
}
