//! Every target on its committed inputs: the corpus, and whatever once broke it.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

/// The targets measure what the process holds, so they run one after the other.
static ALONE: Mutex<()> = Mutex::new(());

/// The targets for which a `model.bin` is an input as it stands.
const READ_MODEL_BIN: [&str; 4] = ["reader", "verify", "roundtrip", "granularity"];

fn run(target: &str) {
    let (_, body) =
        fuzz::TARGETS.into_iter().find(|(name, _)| *name == target).expect("a target of that name");
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    body(&[]);
    let mut inputs = 0;
    let mut folders = ["corpus", "regressions"].map(|folder| format!("{folder}/{target}")).to_vec();
    if READ_MODEL_BIN.contains(&target) {
        folders.push("../fixtures/model-bin".into());
    }
    for folder in folders {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("an entry of the folder").path();
            println!("{}", path.display()); // shown should it fail
            body(&fs::read(&path).expect("an input"));
            inputs += 1;
        }
    }
    assert!(inputs > 0, "{target} has no committed input");
}

macro_rules! targets {
    ($($target:ident)+) => {
        $(
            #[test]
            fn $target() {
                run(stringify!($target));
            }
        )+

        #[test]
        fn every_target_has_a_test_and_a_binary() {
            let tested = [$(stringify!($target)),+];
            assert_eq!(fuzz::TARGETS.map(|(name, _)| name), tested);
            let sources = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets")).expect("the folder");
            let mut sources: Vec<String> = sources
                .map(|entry| entry.expect("an entry of the folder").file_name().to_string_lossy().into_owned())
                .collect();
            sources.sort();
            let mut wanted = tested.map(|name| format!("{name}.rs"));
            wanted.sort();
            assert_eq!(sources, wanted);
        }
    };
}

targets! { reader verify tokenizer_section roundtrip granularity mxfp4 checkpoint gguf config }
