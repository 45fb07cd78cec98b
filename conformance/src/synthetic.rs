//! Models that exist only as a formula: any size, no files, nothing stored.

use std::ops::Range;

use formats::canonical::{Source, check_values};
use formats::model_bin::header::ModelHeader;
use formats::model_bin::tensors::{Dims, TensorId};
use formats::progress::Progress;
use formats::vocabulary::Vocabulary;
use formats::{Error, Result};

/// A model whose every byte is a hash of its place.
#[derive(Debug)]
pub struct Synthetic {
    header: ModelHeader,
    dims: Dims,
    vocabulary: Vocabulary,
    seed: u64,
}

impl Synthetic {
    /// A model with this header and vocabulary.
    ///
    /// # Errors
    /// Where the header allows no layout.
    pub fn new(header: ModelHeader, vocabulary: Vocabulary, seed: u64) -> Result<Synthetic> {
        let dims = Dims::new(&header, vocabulary.len())
            .map_err(|unlayable| Error::Unsupported(format!("{}: {}", unlayable.rule, unlayable.found)))?;
        Ok(Synthetic { header, dims, vocabulary, seed })
    }

    /// Eight bytes that depend on the seed, the tensor and the position.
    fn word(&self, tensor: TensorId, index: u64) -> [u8; 8] {
        // splitmix64
        let place = (tensor.kind as u64) << 56 ^ u64::from(tensor.block) << 40 ^ index;
        let mut z = self.seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31).to_le_bytes()
    }
}

/// BF16 values are finite and of any magnitude up to 2, subnormals and zeros of both signs included; scales are 0 to
/// 240; blocks are anything.
impl Source for Synthetic {
    fn header(&self) -> &ModelHeader {
        &self.header
    }

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn check_values(&self, progress: &dyn Progress) -> Result<()> {
        check_values(self, "synthetic model", progress)
    }

    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let mut position = rows.start * tensor.kind.row_bytes(&self.dims);
        let mut left = out;
        while !left.is_empty() {
            let (index, within) = (position / 8, (position % 8) as usize);
            let word = &self.word(tensor, index)[within..];
            let (now, later) = left.split_at_mut(word.len().min(left.len()));
            for (at, (out, byte)) in (position..).zip(now.iter_mut().zip(word)) {
                *out = if tensor.kind.is_scales() {
                    byte % 241
                } else if tensor.kind.dtype().size() == 2 && at % 2 == 1 {
                    // The high byte: sign and upper exponent bits, at most 0x3f for values below 2.
                    byte & 0xbf
                } else {
                    *byte
                };
            }
            position += now.len() as u64;
            left = later;
        }
        Ok(())
    }
}
