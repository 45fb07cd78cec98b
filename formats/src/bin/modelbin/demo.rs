//! `demo`: the way of a small built-in checkpoint through this command, each step as one would type it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::terminal::{Console, Outcome};
use crate::{CheckpointOptions, compare, convert, inspect};

/// A Hugging Face checkpoint of 2 blocks, 4 experts, hidden 32 and 300 tokens, from `fixtures/checkpoints/hf`.
const CHECKPOINT: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../../../fixtures/checkpoints/hf/config.json")),
    ("model.safetensors", include_bytes!("../../../../fixtures/checkpoints/hf/model.safetensors")),
    ("vocabulary.json", include_bytes!("../../../../fixtures/checkpoints/hf/vocabulary.json")),
];

/// `modelbin demo`.
pub fn demo(console: &Console, dst: Option<PathBuf>) -> Result<Outcome> {
    let temporary = tempfile::tempdir()?;
    let folder = match dst {
        Some(folder) => {
            fs::create_dir_all(&folder)?;
            ensure!(fs::read_dir(&folder)?.next().is_none(), "{} is not empty", folder.display());
            folder
        }
        None => temporary.path().to_path_buf(),
    };
    let checkpoint = folder.join("checkpoint");
    fs::create_dir(&checkpoint)?;
    for (name, contents) in CHECKPOINT {
        fs::write(checkpoint.join(name), contents)?;
    }
    println!(
        "A synthetic Hugging Face checkpoint of GPT-OSS's architecture is in {}.\n",
        checkpoint.display()
    );

    let options = CheckpointOptions { vocab: None, quantize: false };
    let [model, unpacked, again, gguf] =
        ["model.bin", "unpacked", "again.bin", "model.gguf"].map(|name| folder.join(name));
    let mut outcome = Outcome::Fine;
    let mut step = |command: String, run: &dyn Fn() -> Result<Outcome>| -> Result<()> {
        println!("$ modelbin {command}");
        let found = run().with_context(|| command)?;
        if found != Outcome::Fine {
            outcome = found;
        }
        println!();
        Ok(())
    };
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    step("export -s checkpoint -d model.bin".into(), &|| {
        convert::export(console, &checkpoint, &model, &options)
    })?;
    step("verify model.bin --against checkpoint".into(), &|| {
        compare::verify(console, &model, Some(&checkpoint), false, &options)
    })?;
    step("unpack model.bin -d unpacked".into(), &|| convert::unpack(console, &model, &unpacked))?;
    step("export -s unpacked -d again.bin".into(), &|| {
        convert::export(console, &unpacked, &again, &options)
    })?;
    step("diff model.bin again.bin".into(), &|| compare::diff(console, &model, &again, &options))?;
    step("convert model.bin -d model.gguf".into(), &|| convert::convert(console, &model, &gguf, &options))?;
    for other in [&checkpoint, &gguf] {
        step(format!("diff model.bin {}", name(other)), &|| compare::diff(console, &model, other, &options))?;
    }
    step("dump model.bin | head -n 24".into(), &|| inspect::head(&model, 24))?;
    match outcome {
        Outcome::Fine => println!("Every step gave what it should."),
        Outcome::Differs => {
            println!("A step found a difference: that is a bug of modelbin; please report it.")
        }
    }
    Ok(outcome)
}
