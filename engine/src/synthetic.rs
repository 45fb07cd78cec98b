//! Models of true shapes whose weights are random: what is measured where there is no file.
//!
//! Values are of the size that trained ones have, so that activations stay ordinary; what such a model writes means nothing.

use std::borrow::Cow;
use std::ops::Range;

use formats::canonical::Source;
use formats::model_bin::Stored;
use formats::model_bin::header::ModelHeader;
use formats::model_bin::tensors::{Dims, TensorId, TensorKind};
use formats::progress::Progress;
use formats::vocabulary::Vocabulary;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use crate::error::Result;

/// A model of this header with the vocabulary of gpt-oss.
///
/// # Errors
/// Where the header allows no layout.
pub fn stored(header: ModelHeader) -> Result<Stored> {
    with_vocabulary(header, Cow::Borrowed(Vocabulary::o200k()))
}

/// A model of this header with a vocabulary of one's choice.
///
/// # Errors
/// Where the header allows no layout, or the vocabulary is no valid one.
pub fn with_vocabulary(header: ModelHeader, vocabulary: Cow<'static, Vocabulary>) -> Result<Stored> {
    let dims = Dims::new(&header, vocabulary.len()).map_err(|unlayable| {
        formats::Error::Unsupported(format!("{}: {}", unlayable.rule, unlayable.found))
    })?;
    Ok(Stored::of_source(Box::new(Synthetic { header, dims, vocabulary }), "random weights")?)
}

/// Weights that follow from their place.
struct Synthetic {
    header: ModelHeader,
    dims: Dims,
    vocabulary: Cow<'static, Vocabulary>,
}

/// Bytes that one stream of random numbers fills.
const STRETCH: u64 = 1 << 20;

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

    fn check_values(&self, _: &dyn Progress) -> formats::Result<()> {
        Ok(())
    }

    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> formats::Result<()> {
        let start = rows.start * tensor.kind.row_bytes(&self.dims);
        out.par_chunks_mut(STRETCH as usize).enumerate().for_each(|(part, out)| {
            let mut seed = [0; 32];
            let place = [tensor.kind as u64, tensor.block.into(), start, part as u64];
            for (bytes, number) in seed.chunks_mut(8).zip(place) {
                bytes.copy_from_slice(&number.to_le_bytes());
            }
            ChaCha8Rng::from_seed(seed).fill_bytes(out);
            shape(tensor.kind, out);
        });
        Ok(())
    }
}

/// Makes random bytes values of a tensor.
fn shape(kind: TensorKind, bytes: &mut [u8]) {
    match kind {
        TensorKind::Mlp1Blocks | TensorKind::Mlp2Blocks => {}
        // 2^-8 to 2^-5.
        TensorKind::Mlp1Scales | TensorKind::Mlp2Scales => {
            bytes.iter_mut().for_each(|byte| *byte = 119 + (*byte & 3));
        }
        // bf16 of either sign, in 1/64 to 1/32; scales of norms in 1/2 to 1.
        _ => {
            let norm = matches!(kind, TensorKind::AttnNorm | TensorKind::MlpNorm | TensorKind::Norm);
            let (low, high) = if norm { (0x00, 0x3f) } else { (0x80, 0x3c) };
            for [first, second] in bytes.as_chunks_mut::<2>().0 {
                *first = *first & 0x7f | low;
                *second = if norm { high } else { *second & 0x80 | high };
            }
        }
    }
}
