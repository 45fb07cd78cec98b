//! Every part beside the original: a folder laid out like `fixtures/ace-step`, whose files the original code wrote.
//!
//! All sizes are those of the folder's configurations and headers, so a folder of another size will do as well.

mod audio_frontend;
mod bias;
mod guidance;
mod lyric_tokenizer;
mod music_dcae;
mod music_decode;
mod music_vocoder;
mod pipeline;
mod schedulers;
mod transformer;
mod umt5;

use std::path::{Path, PathBuf};

use crate::backend::Device;
use crate::error::Result;
use crate::reference::Comparison;

/// What is verified, and with what.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The lyric tokenizer's vocabulary, which is not part of this project.
    pub lyric_vocab: Option<PathBuf>,
    /// Names of the parts; all where there are none.
    pub parts: Vec<String>,
}

/// A part and how it compares.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Part {
    /// Folder of the part.
    pub name: &'static str,
    /// How it went.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How the comparison of a part went.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// Not in the folder, or not to be had without a file that was not given.
    Absent {
        /// What is missing.
        missing: String,
    },
    /// It could not be computed.
    Failed {
        /// Why.
        error: String,
    },
    /// Computed and compared.
    Compared {
        /// Tensor by tensor, in the order of their computation.
        comparisons: Vec<Comparison>,
    },
}

impl Part {
    /// Whether everything that was compared passed, and something was.
    pub fn passed(&self) -> bool {
        match &self.outcome {
            Outcome::Compared { comparisons } => {
                !comparisons.is_empty() && comparisons.iter().all(Comparison::passed)
            }
            Outcome::Absent { .. } | Outcome::Failed { .. } => false,
        }
    }

    /// Whether the folder does not have it.
    pub fn is_absent(&self) -> bool {
        matches!(self.outcome, Outcome::Absent { .. })
    }

    /// The comparison that comes closest to what is allowed, or passes it furthest.
    pub fn worst(&self) -> Option<&Comparison> {
        let Outcome::Compared { comparisons } = &self.outcome else { return None };
        comparisons.iter().max_by(|a, b| a.share.total_cmp(&b.share))
    }

    /// The first comparison that failed: where computation went wrong.
    pub fn first_failure(&self) -> Option<&Comparison> {
        let Outcome::Compared { comparisons } = &self.outcome else { return None };
        comparisons.iter().find(|comparison| !comparison.passed())
    }
}

/// What a check is given.
struct Context<'a> {
    /// The folder of all parts.
    folder: &'a Path,
    options: &'a Options,
    device: &'a Device,
}

impl Context<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

struct Check {
    name: &'static str,
    /// Files without which there is nothing to compare.
    needs: &'static [&'static str],
    run: fn(&Context<'_>) -> Result<Vec<Comparison>>,
}

const CHECKS: &[Check] = &[
    Check {
        name: "schedulers",
        needs: &["schedulers/schedules.json", "schedulers/steps.safetensors"],
        run: schedulers::check,
    },
    Check {
        name: "guidance",
        needs: &["guidance/guidance.json", "guidance/guidance.safetensors"],
        run: guidance::check,
    },
    Check { name: "bias", needs: &["bias/bias.json", "bias/bias.safetensors"], run: bias::check },
    Check {
        name: "transformer",
        needs: &["transformer/config.json", "transformer/io.safetensors"],
        run: transformer::check,
    },
    Check {
        name: "music_dcae_f8c8",
        needs: &["music_dcae_f8c8/config.json", "music_dcae_f8c8/io.safetensors"],
        run: music_dcae::check,
    },
    Check {
        name: "music_vocoder",
        needs: &["music_vocoder/config.json", "music_vocoder/io.safetensors"],
        run: music_vocoder::check,
    },
    Check {
        name: "music_decode",
        needs: &["music_decode/io.safetensors", "music_dcae_f8c8/config.json", "music_vocoder/config.json"],
        run: music_decode::check,
    },
    Check { name: "audio_frontend", needs: &["audio_frontend/io.safetensors"], run: audio_frontend::check },
    Check { name: "umt5", needs: &["umt5/config.json", "umt5/io.safetensors"], run: umt5::check },
    Check { name: "lyric_tokenizer", needs: &["lyric_tokenizer/cases.json"], run: lyric_tokenizer::check },
    Check {
        name: "pipeline",
        needs: &[
            "pipeline/cases.json",
            "pipeline/io.safetensors",
            "pipeline/ace_step_transformer/config.json",
        ],
        run: pipeline::check,
    },
];

/// The parts that can be verified, in the order of their use.
pub fn names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|check| check.name)
}

/// Computes every part of the folder on a device, one after the other as they are asked for.
pub fn verify<'a>(
    folder: &'a Path,
    options: &'a Options,
    device: &'a Device,
) -> impl Iterator<Item = Part> + 'a {
    let context = Context { folder, options, device };
    let wanted =
        |check: &&Check| options.parts.is_empty() || options.parts.iter().any(|part| part == check.name);
    CHECKS.iter().filter(wanted).map(move |check| {
        let missing: Vec<&str> =
            check.needs.iter().copied().filter(|file| !context.path(file).is_file()).collect();
        let outcome = if check.name == "lyric_tokenizer" && options.lyric_vocab.is_none() {
            Outcome::Absent { missing: "the lyric tokenizer's vocabulary (--lyric-vocab FILE)".into() }
        } else if !missing.is_empty() {
            Outcome::Absent { missing: missing.join(", ") }
        } else {
            match (check.run)(&context) {
                Ok(comparisons) => Outcome::Compared { comparisons },
                Err(error) => Outcome::Failed { error: error.to_string() },
            }
        };
        Part { name: check.name, outcome }
    })
}
