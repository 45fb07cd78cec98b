//! TODO

use super::Context;
use crate::error::Result;
use crate::reference::Comparison;

pub(super) fn check(_: &Context<'_>) -> Result<Vec<Comparison>> {
    Ok(Vec::new())
}
