//! A valid model that is as small as the format allows, as source and as files.

use std::io::Cursor;
use std::ops::Range;

use formats::Result;
use formats::canonical::Source;
use formats::model_bin::header::{ModelHeader, Uuid};
use formats::model_bin::tensors::{Dims, Dtype, TensorId};
use formats::model_bin::write::write_to;
use formats::progress::Progress;
use formats::vocabulary::{SPECIAL_TOKENS, Vocabulary};

/// Splits into words with a leading blank, runs of digits, and whatever else there is.
const REGEX: &str = r" ?\p{L}+|\p{N}{1,3}|\s+(?!\S)|[^\p{L}\p{N}]";

/// 4 experts, width 32, one head, 264 tokens.
#[derive(Clone, Debug)]
pub(crate) struct Tiny {
    header: ModelHeader,
    dims: Dims,
    vocabulary: Vocabulary,
}

impl Tiny {
    /// A model of so many blocks.
    pub(crate) fn new(blocks: u32) -> Tiny {
        let header = ModelHeader {
            context_length: 131_072,
            num_blocks: blocks,
            num_experts: 4,
            num_active_experts: 4,
            embedding_dim: 32,
            mlp_dim: 32,
            swiglu_limit: 7.0,
            head_dim: 64,
            num_heads: 1,
            num_kv_heads: 1,
            attention_window: 128,
            rope_theta: 150_000.0,
            interpolation_scale: f32::from_bits(0x3d00_0000),
            yarn_offset: f32::from_bits(0xbf5e_a4b6),
            yarn_scale: f32::from_bits(0x3ddc_1746),
            yarn_multiplier: f32::from_bits(0x3fac_5c86),
            rmsnorm_epsilon: 1e-5,
        };
        let vocabulary = vocabulary();
        let dims = Dims::new(&header, vocabulary.len()).expect("sizes that have a layout");
        Tiny { header, dims, vocabulary }
    }
}

/// Every single byte, four longer tokens, four special ones.
pub(crate) fn vocabulary() -> Vocabulary {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let longer = ["th", "the", " t", " the"].map(|token| token.as_bytes().to_vec());
    let uuid = |id: u32| SPECIAL_TOKENS.iter().find(|token| token.id == id).map(|token| token.uuid);
    Vocabulary {
        special_uuids: [uuid(200_006), uuid(200_007), uuid(200_008)]
            .into_iter()
            .flatten()
            .chain([Uuid::default()])
            .collect(),
        regex: REGEX.into(),
        records: records(bytes.chain(longer)),
        num_text_tokens: 260,
    }
}

/// Tokens as a file stores them.
pub(crate) fn records(tokens: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let record = |token: Vec<u8>| [&(token.len() as u16).to_le_bytes()[..], &token].concat();
    tokens.into_iter().flat_map(record).collect()
}

impl Source for Tiny {
    fn header(&self) -> &ModelHeader {
        &self.header
    }

    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    fn read_rows(&self, tensor: TensorId, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
        let start = rows.start * tensor.kind.row_bytes(&self.dims);
        for (byte, position) in out.iter_mut().zip(start..) {
            let noise = (position * 0x9e37_79b9 + tensor.kind as u64 * 31 + u64::from(tensor.block) * 7) >> 8;
            *byte = match (tensor.kind.dtype(), position % 2) {
                _ if tensor.kind.is_scales() => 120 + (noise % 16) as u8,
                // The upper half of a BF16: an exponent around that of 1, either sign.
                (Dtype::Bf16, 1) => 0x3c | (noise & 0x83) as u8,
                _ => noise as u8,
            };
        }
        Ok(())
    }

    fn check_values(&self, _: &dyn Progress) -> Result<()> {
        Ok(())
    }
}

/// The `model.bin` of a source.
pub(crate) fn model_bin(source: &dyn Source) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    write_to(source, &mut bytes, &())?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use formats::model_bin::Depth;
    use formats::model_bin::verify::verify;

    use super::*;

    /// What the targets change must be valid before.
    #[test]
    fn the_file_of_the_small_model_is_valid() {
        for blocks in 0..3 {
            let bytes = model_bin(&Tiny::new(blocks)).expect("an export");
            let report = verify(&bytes, Depth::Full, &());
            assert!(report.is_valid(), "{:?}", report.violations);
        }
    }
}
