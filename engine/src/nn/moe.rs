//! Mixture of experts: a router selects a few feed-forward networks for each token.
//!
//! ```text
//! x ─ router ─ top k ─ softmax over the k ─────────────────┐ weights
//! └────────── experts' ids ─ mlp1 ─ SwiGLU ─ mlp2 ─ weighted sum
//! ```

use std::collections::BTreeMap;

use burn::tensor::{Int, Tensor, activation::softmax};

use super::linear::{Linear, as_type, product};
use super::mxfp4::Mxfp4Linear;
use super::rows::{concatenated, indices, rows_of_step};
use super::swiglu::swiglu;
use crate::backend::{Float, waiting};

/// Pairs of a token and an expert in one step: a kernel has a cube for each, and devices allow 65535 on an axis.
const MOST_PAIRS: usize = 65_535;

/// Selects experts.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[experts, width]` with bias.
    pub gate: Linear,
    /// Experts for each token.
    pub active: usize,
}

/// The experts of some tokens.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Ids, `[tokens, active]`, the largest logit first.
    pub experts: Tensor<2, Int>,
    /// f32 `[tokens, active]`: softmax over the selected logits.
    pub weights: Tensor<2>,
}

impl Router {
    /// f32 `[tokens, width]` → the experts of each token.
    pub fn forward(&self, x: Tensor<2>) -> Selection {
        let (logits, experts) = self.gate.forward(x).topk_with_indices(self.active, 1);
        Selection { experts, weights: softmax(logits, 1) }
    }
}

/// A matrix for each expert.
#[derive(Clone, Debug)]
pub enum ExpertLinear {
    /// As the file stores them.
    Packed(Box<Mxfp4Linear>),
    /// Decoded, `[rows, columns]` each: the baseline that packed weights are measured against.
    Dequantized(Vec<Tensor<2>>),
}

impl ExpertLinear {
    /// As [`Mxfp4Linear::forward`]. Dequantised experts are multiplied one by one with the rows that selected them,
    /// for which the ids are read back from the device.
    fn forward(&self, x: Tensor<2>, experts: Tensor<1, Int>, compute: Float) -> Tensor<2> {
        match self {
            ExpertLinear::Packed(weights) => {
                let rounded = as_type(as_type(x, compute), Float::F32);
                weights.forward(rounded, experts)
            }
            ExpertLinear::Dequantized(weights) => {
                let device = x.device();
                let ids: Vec<i64> = waiting(|| experts.into_data().iter::<i64>().collect());
                let pairs_per_input = ids.len() / x.dims()[0];
                let mut pairs_of = BTreeMap::<usize, Vec<usize>>::new();
                for (pair, &expert) in ids.iter().enumerate() {
                    pairs_of.entry(expert as usize).or_default().push(pair);
                }
                let products = pairs_of.iter().map(|(&expert, pairs)| {
                    let rows = indices(pairs.iter().map(|pair| pair / pairs_per_input), &device);
                    product(x.clone().select(0, rows), weights[expert].clone(), compute)
                });
                // Products stand in the order of experts; this puts them into that of pairs.
                let mut place = vec![0; ids.len()];
                for (at, &pair) in pairs_of.values().flatten().enumerate() {
                    place[pair] = at;
                }
                concatenated(products.collect(), 0).select(0, indices(place, &device))
            }
        }
    }
}

/// The feed-forward part of a GPT-OSS block.
#[derive(Clone, Debug)]
pub struct Moe {
    /// Selects the experts.
    pub router: Router,
    /// Gate (even rows) and up (odd rows): `[experts, 2·mlp_dim, width]`.
    pub mlp1: ExpertLinear,
    /// f32 `[experts, 2·mlp_dim]`.
    pub mlp1_bias: Tensor<2>,
    /// Down: `[experts, width, mlp_dim]`.
    pub mlp2: ExpertLinear,
    /// f32 `[experts, width]`.
    pub mlp2_bias: Tensor<2>,
    /// Clamp of [`swiglu`].
    pub swiglu_limit: f32,
    /// The type to which inputs of products are rounded.
    pub compute: Float,
}

impl Moe {
    /// f32 `[tokens, width]` → f32 `[tokens, width]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let selection = self.router.forward(x.clone());
        self.forward_selected(x, selection)
    }

    /// [`Moe::forward`] with experts selected by the caller.
    pub fn forward_selected(&self, x: Tensor<2>, selection: Selection) -> Tensor<2> {
        let [tokens, active] = selection.experts.dims();
        let step = rows_of_step(active * self.mlp1_bias.dims()[1]).min(MOST_PAIRS / active.max(1)).max(1);
        if tokens <= step {
            return self.rows(x, selection);
        }
        let parts = (0..tokens).step_by(step).map(|start| {
            let rows = tokens.min(start + step) - start;
            let experts = selection.experts.clone().narrow(0, start, rows);
            let weights = selection.weights.clone().narrow(0, start, rows);
            self.rows(x.clone().narrow(0, start, rows), Selection { experts, weights })
        });
        concatenated(parts.collect(), 0)
    }

    fn rows(&self, x: Tensor<2>, selection: Selection) -> Tensor<2> {
        let [tokens, active] = selection.experts.dims();
        let width = x.dims()[1];
        let experts: Tensor<1, Int> = selection.experts.reshape([tokens * active]);
        let gate_up = self.mlp1.forward(x, experts.clone(), self.compute);
        let hidden = swiglu(gate_up + self.mlp1_bias.clone().select(0, experts.clone()), self.swiglu_limit);
        let down = self.mlp2.forward(hidden, experts.clone(), self.compute);
        let outputs = (down + self.mlp2_bias.clone().select(0, experts)).reshape([tokens, active, width]);
        (outputs * selection.weights.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1)
    }
}
