//! Tables of one row for each token, cut where a device limits the size of a buffer.

use burn::tensor::Tensor;

use super::linear::{as_type, product};
use super::rows::{concatenated, indices};
use crate::backend::Float;

/// A `[vocabulary, width]` matrix in parts of rows.
///
/// GPUs limit the bytes of one buffer: 128 MiB on Mesa's software Vulkan, where 201088 rows of 2880 f32 are 2.2 GiB.
#[derive(Clone, Debug)]
pub struct TokenTable {
    /// The parts in order, `[rows, width]` each; all but the last have equally many rows.
    pub parts: Vec<Tensor<2>>,
    /// The type of the factors of [`TokenTable::logits`].
    pub compute: Float,
}

impl TokenTable {
    /// Number of rows.
    pub fn vocabulary(&self) -> usize {
        self.parts.iter().map(|part| part.dims()[0]).sum()
    }

    /// The rows of `tokens` (ids below [`TokenTable::vocabulary`]): f32 `[tokens, width]`.
    pub fn rows(&self, tokens: &[u32]) -> Tensor<2> {
        let rows_of_part = self.parts[0].dims()[0];
        let device = self.parts[0].device();
        // Runs of tokens of one part are looked up together and put one after the other, so nothing is masked.
        let runs = tokens.chunk_by(|a, b| *a as usize / rows_of_part == *b as usize / rows_of_part);
        let found = runs.map(|run| {
            let part = run[0] as usize / rows_of_part;
            let ids = indices(run.iter().map(|&id| id as usize % rows_of_part), &device);
            as_type(self.parts[part].clone().select(0, ids), Float::F32)
        });
        concatenated(found.collect(), 0)
    }

    /// `x · tableᵀ`: f32 `[tokens, width]` → f32 `[tokens, vocabulary]`.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        let parts = self.parts.iter().map(|part| product(x.clone(), part.clone(), self.compute));
        concatenated(parts.collect(), 1)
    }
}
