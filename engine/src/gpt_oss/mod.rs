//! GPT-OSS: from a verified file to text.
//!
//! ```text
//! formats::model_bin::Stored          a verified model.bin (mapped), or a checkpoint read through the same plan
//!   │  residency::Residency           what will reside where, refused with the numbers where it cannot fit
//!   │  load                           pieces go to the device as they are stored
//!   ▼
//! model::Model                        plain tensors, or the processor's own runtime: embedding → blocks → unembedding
//!   │  ▲ cache::Cache                 one for each sequence
//!   ▼  │
//! session::Session                    tokens so far, snapshots, going back, forks
//!   │  sampling::Sampler
//!   ▼
//! generate::generate                  tokens, one at a time, to a callback
//! ```
//!
//! The numerics are those of `gpt_oss/torch/model.py` 0.0.9, OpenAI's reference.

pub mod cache;
pub mod config;
pub mod generate;
mod load;
pub mod model;
mod plain;
pub mod residency;
pub mod session;

pub use cache::Cache;
pub use config::Config;
pub use generate::{Outcome, Request, Step, Stop, generate};
pub use load::LoadOptions;
pub use model::{Model, Sequence, Stream, Trace};
pub use residency::Residency;
pub use session::{Advance, Session};
