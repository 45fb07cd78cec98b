//! `demo`: the way of a checkpoint through this command.
use std::path::PathBuf;

use anyhow::Result;

use crate::terminal::{Console, Outcome};

/// `modelbin demo`.
pub fn demo(_console: &Console, _dst: Option<PathBuf>) -> Result<Outcome> {
    todo!()
}
