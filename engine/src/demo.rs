//! The demo model: a GPT-OSS of a few million parameters, trained by us, part of this crate.
//!
//! `fixtures/demo` has the model, the script that trained it and what it was measured to do. Its embeddings hold the
//! rows of the tokens it was trained on, and one more that stands for every other token. Here it becomes what a
//! released model is: a checkpoint with all 201088 rows, which is exported to a `model.bin`, which is verified.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use formats::checkpoint::{Folder, Options};
use formats::model_bin::{Depth, Stored, StoredOptions, write};
use formats::output::{OutputFolder, TemporaryFolder};
use formats::progress::Progress;
use formats::vocabulary::Vocabulary;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::user_cache;

/// As `fixtures/demo/train.py` writes it.
const MODEL: &[u8] = include_bytes!("../../fixtures/demo/model.safetensors");
/// Its configuration, in the keys of the original checkpoints.
const CONFIG: &[u8] = include_bytes!("../../fixtures/demo/config.json");
/// What it is called in its folder.
const FILE: &str = "model.bin";
/// Embedding rows of the released checkpoints.
const ROWS: usize = 201_088;
/// The tensors with a row for each token.
const TABLES: [&str; 2] = ["embedding.weight", "unembedding.weight"];

/// Opens the demo model in the user's cache; what an earlier version of this crate left there is removed.
///
/// # Errors
/// As [`open`]'s.
pub fn open_cached(progress: &dyn Progress) -> Result<Stored> {
    let caches = user_cache::folder().unwrap_or_else(|| std::env::temp_dir().join("burn-extended"));
    let versions = caches.join("demo");
    let folder = versions.join(&blake3::Hasher::new().update(MODEL).update(CONFIG).finalize().to_hex()[..16]);
    let there = folder.is_dir();
    let stored = match open(&folder, progress) {
        // Somebody else's bytes, or half of ours after a full disk: the file can be made again.
        Err(Error::Format(formats::Error::Invalid { .. })) if there => {
            let file = folder.join(FILE);
            fs::remove_file(&file).map_err(formats::Error::io(file))?;
            open(&folder, progress)?
        }
        opened => opened?,
    };
    if !there {
        // A model that another process still has mapped may not be removable; then the next version removes it.
        for entry in fs::read_dir(&versions).into_iter().flatten().flatten() {
            if entry.path() != folder {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
    Ok(stored)
}

/// Opens the demo model as a verified `model.bin` in `folder`, which is made first where it is not there.
///
/// # Errors
/// [`Error::Format`] where the folder cannot be written, or where what is in it is not a valid model.
pub fn open(folder: &Path, progress: &dyn Progress) -> Result<Stored> {
    let file = folder.join(FILE);
    if !file.is_file() {
        fs::create_dir_all(folder).map_err(formats::Error::io(folder))?;
        let temporary = TemporaryFolder::create_in(folder)?;
        let checkpoint = temporary.path().join("checkpoint");
        expand(&checkpoint)?;
        export(&checkpoint, &file, progress)?;
    }
    let options = StoredOptions { depth: Depth::Full, ..StoredOptions::default() };
    Ok(Stored::open(&file, &options, progress)?)
}

/// Writes the demo model as a checkpoint of the original layout with all rows: about 106 MB.
///
/// # Errors
/// [`Error::Format`] where the folder is there and not empty, or cannot be written.
pub fn expand(folder: &Path) -> Result<()> {
    let compact = SafeTensors::deserialize(MODEL).map_err(damaged)?;
    let ids = compact.tensor("token_ids").map_err(damaged)?;
    let ids: Vec<usize> =
        ids.data().as_chunks::<4>().0.iter().map(|&id| i32::from_le_bytes(id) as usize).collect();
    let mut tables = HashMap::new();
    for name in TABLES {
        let table = compact.tensor(name).map_err(damaged)?;
        tables.insert(name, expanded(&table, &ids).ok_or_else(|| damaged("rows and ids disagree"))?);
    }
    let mut views = Vec::new();
    for (name, view) in compact.tensors().into_iter().filter(|(name, _)| name != "token_ids") {
        let view = match tables.get(name.as_str()) {
            Some((shape, bytes)) => TensorView::new(Dtype::BF16, shape.to_vec(), bytes).map_err(damaged)?,
            None => view,
        };
        views.push((name, view));
    }
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).map_err(formats::Error::io(parent))?;
    }
    let output = OutputFolder::create(folder)?;
    let model = output.path().join("model.safetensors");
    // `serialize_to_file` makes a file that nobody else may read.
    let bytes = safetensors::serialize(views, None).map_err(damaged)?;
    fs::write(&model, bytes).map_err(formats::Error::io(model))?;
    let config = output.path().join("config.json");
    fs::write(&config, CONFIG).map_err(formats::Error::io(config))?;
    Ok(output.finish()?)
}

/// Writes the `model.bin` of a checkpoint with the o200k vocabulary.
fn export(checkpoint: &Path, file: &Path, progress: &dyn Progress) -> Result<()> {
    let options = Options { vocabulary: Vocabulary::o200k().clone(), quantize: false };
    write::write(&Folder::open(checkpoint, options)?, file, progress)?;
    Ok(())
}

/// All rows of a table whose rows belong to `ids`, but for the last, which belongs to all others.
fn expanded(table: &TensorView<'_>, ids: &[usize]) -> Option<([usize; 2], Vec<u8>)> {
    let &[rows, width] = table.shape() else { return None };
    if rows != ids.len() + 1 || table.dtype() != Dtype::BF16 {
        return None;
    }
    let row = |index: usize| table.data().get(index * width * 2..(index + 1) * width * 2);
    let mut all = row(ids.len())?.repeat(ROWS);
    for (index, &id) in ids.iter().enumerate() {
        all.get_mut(id * width * 2..(id + 1) * width * 2)?.copy_from_slice(row(index)?);
    }
    Some(([ROWS, width], all))
}

/// The model is part of this crate, so this is a fault of the build.
fn damaged(error: impl std::fmt::Display) -> Error {
    Error::Device(format!("the built-in demo model is damaged: {error}"))
}
