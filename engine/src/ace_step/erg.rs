//! Entropy rectifying guidance: a model that attends less sharply, to be steered away from.
//!
//! The queries of some attention layers are made small, so that their softmax becomes flat (`acestep/pipeline_ace_step.py`,
//! `forward_with_temperature`).

use std::ops::Range;

/// Layers whose queries are multiplied by a factor.
#[derive(Clone, Debug, PartialEq)]
pub struct Weaken {
    /// The layers.
    pub layers: Range<usize>,
    /// The factor, as the projection's output with its bias is multiplied by it.
    pub tau: f32,
}

impl Weaken {
    /// Of the prompt's encoder: layers 8 and 9 of UMT5.
    pub const TEXT: Weaken = Weaken { layers: 8..10, tau: 0.01 };
    /// Of the lyric encoder: layers 4 and 5.
    pub const LYRICS: Weaken = Weaken { layers: 4..6, tau: 0.01 };
    /// Of the transformer: blocks 15 to 19.
    pub const DIFFUSION: Weaken = Weaken { layers: 15..20, tau: 0.01 };

    /// The factor of a layer's queries, `None` where they stay as they are.
    pub fn factor(weaken: Option<&Weaken>, layer: usize) -> Option<f32> {
        weaken.filter(|weaken| weaken.layers.contains(&layer)).map(|weaken| weaken.tau)
    }
}
