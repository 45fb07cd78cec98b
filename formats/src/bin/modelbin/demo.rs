//! `demo`: the way of a small built-in checkpoint through this command, each step as one would type it.

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use formats::command::{CheckpointOptions, Console, Outcome, Talk, Verb};
use formats::model_bin::dump::{self, Limits};
use formats::model_bin::model::Bytes;
use formats::output::TemporaryFolder;

use crate::NAME;

/// A Hugging Face checkpoint of 2 blocks, 4 experts, hidden 32 and 300 tokens, from `fixtures/checkpoints/hf`.
const CHECKPOINT: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../../../fixtures/checkpoints/hf/config.json")),
    ("model.safetensors", include_bytes!("../../../../fixtures/checkpoints/hf/model.safetensors")),
    ("vocabulary.json", include_bytes!("../../../../fixtures/checkpoints/hf/vocabulary.json")),
];

/// `modelbin demo`.
pub fn demo(dst: Option<PathBuf>) -> Result<Outcome> {
    let temporary = TemporaryFolder::create_in(&env::temp_dir())?;
    let folder = match dst {
        Some(folder) => {
            fs::create_dir_all(&folder)?;
            ensure!(fs::read_dir(&folder)?.next().is_none(), "{} is not empty", folder.display());
            folder
        }
        None => temporary.path().to_path_buf(),
    };
    let [checkpoint, model, unpacked, again, gguf] =
        ["checkpoint", "model.bin", "unpacked", "again.bin", "model.gguf"].map(|name| folder.join(name));
    fs::create_dir(&checkpoint)?;
    for (name, contents) in CHECKPOINT {
        fs::write(checkpoint.join(name), contents)?;
    }
    let mut out = io::stdout();
    writeln!(
        out,
        "A synthetic Hugging Face checkpoint of GPT-OSS's architecture is in {}.\n",
        checkpoint.display()
    )?;

    let options = CheckpointOptions::default();
    let export = |src: &Path, dst: &Path| Verb::Export {
        src: src.into(),
        dst: dst.into(),
        checkpoint: options.clone(),
    };
    let diff = |a: &Path, b: &Path| Verb::Diff { a: a.into(), b: b.into(), checkpoint: options.clone() };
    let verify = Verb::Verify {
        file: model.clone(),
        against: Some(checkpoint.clone()),
        structure: false,
        checkpoint: options.clone(),
    };
    let unpack = Verb::Unpack { file: model.clone(), dst: unpacked.clone() };
    let convert = Verb::Convert { src: model.clone(), dst: gguf.clone(), checkpoint: options.clone() };
    let mut outcome = Outcome::Fine;
    for (command, verb) in [
        ("export -s checkpoint -d model.bin", export(&checkpoint, &model)),
        ("verify model.bin --against checkpoint", verify),
        ("unpack model.bin -d unpacked", unpack),
        ("export -s unpacked -d again.bin", export(&unpacked, &again)),
        ("diff model.bin again.bin", diff(&model, &again)),
        ("convert model.bin -d model.gguf", convert),
        ("diff model.bin checkpoint", diff(&model, &checkpoint)),
        ("diff model.bin model.gguf", diff(&model, &gguf)),
    ] {
        writeln!(out, "$ {NAME} {command}")?;
        // A clock of its own for each step.
        let console = Console::new(NAME, &Talk { json: false, quiet: true });
        let found = verb.run(&console).context(command)?;
        if found != Outcome::Fine {
            outcome = found;
        }
        writeln!(out)?;
    }
    writeln!(out, "$ {NAME} dump model.bin | head -n 24")?;
    let mut text = Vec::new();
    dump::dump(&Bytes::map(&model)?, &mut text, Limits::default())?;
    for line in String::from_utf8_lossy(&text).lines().take(24) {
        writeln!(out, "{line}")?;
    }
    writeln!(out)?;
    match outcome {
        Outcome::Fine => writeln!(out, "Every step gave what it should.")?,
        Outcome::Differs => {
            writeln!(out, "A step found a difference: that is a bug of {NAME}; please report it.")?;
        }
    }
    Ok(outcome)
}
