//! Where it runs, and in which types.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use engine::backend::{Backend, Device, Float};
use engine::command::{backends, floats};
use engine::weights::Types;

/// Flags of the device.
#[derive(Args, Clone, Debug)]
pub struct DeviceOptions {
    /// Who computes.
    #[arg(long, value_parser = backends(), default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// Type of matrices and of the factors of products [default: bf16 with cuda, otherwise f32].
    #[arg(long, value_parser = floats(), value_name = "TYPE")]
    pub float: Option<Float>,
}

impl DeviceOptions {
    /// The device, and the types of what runs there.
    pub fn open(&self) -> Result<(Device, Types)> {
        let device = self.backend.open()?;
        let float = self.float.unwrap_or(match self.backend {
            Backend::Cuda => Float::Bf16,
            Backend::Cpu | Backend::Wgpu => Float::F32,
        });
        ensure!(
            device.supports(float),
            "--float: found {float}, needed a type that {} has; f32 always works",
            device.name()
        );
        Ok((device, Types::all(float)))
    }
}

/// Where the lyric tokenizer's vocabulary may be in a checkpoint folder.
pub const LYRIC_VOCABS: [&str; 3] = ["lyric_vocab.json", "vocab.json", "lyric_tokenizer/vocab.json"];

/// The flag's file, or the one of the checkpoint.
pub fn lyric_vocab(flag: Option<&PathBuf>, checkpoint: &std::path::Path) -> Option<PathBuf> {
    let beside = LYRIC_VOCABS.iter().map(|name| checkpoint.join(name)).find(|file| file.is_file());
    flag.cloned().or(beside)
}
