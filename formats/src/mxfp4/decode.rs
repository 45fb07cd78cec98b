//! MXFP4 → f32, fast.

use super::codec::{BLOCK, BLOCK_BYTES, CODES, unit};

/// Blocks, scales and output of [`decode`] do not belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{blocks} bytes of blocks, {scales} scales and {out} values do not fit together: a scale belongs to 16 bytes and 32 values"
)]
pub struct LengthMismatch {
    /// Bytes of blocks.
    pub blocks: usize,
    /// Scales.
    pub scales: usize,
    /// Values of the output.
    pub out: usize,
}

/// The two values of each byte, in units of the scale.
const PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODES[byte & 15], CODES[byte >> 4]];
        byte += 1;
    }
    pairs
};

/// Decodes `blocks` (16·n bytes) with the checkpoint's `scales` (n bytes) into `out` (32·n values).
///
/// Bit-identical to [`codec::value`](super::codec::value) for every code and scale, up to the payload of NaN.
///
/// Safe code is enough: on an x86-64 core it keeps up with copying the output (`examples/decode_speed.rs`). Only
/// products that are subnormal (scales 0 and 1) take such a processor a hundred times as long.
///
/// # Errors
/// Lengths that do not fit together; then `out` is untouched.
pub fn decode(blocks: &[u8], scales: &[u8], out: &mut [f32]) -> Result<(), LengthMismatch> {
    let mismatch = LengthMismatch { blocks: blocks.len(), scales: scales.len(), out: out.len() };
    let (blocks, no_bytes) = blocks.as_chunks::<BLOCK_BYTES>();
    let (out, no_values) = out.as_chunks_mut::<BLOCK>();
    if !no_bytes.is_empty()
        || !no_values.is_empty()
        || blocks.len() != scales.len()
        || out.len() != scales.len()
    {
        return Err(mismatch);
    }
    for ((block, &scale), out) in blocks.iter().zip(scales).zip(out) {
        let unit = unit(scale);
        for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
            let [low, high] = PAIRS[usize::from(byte)];
            *pair = [low * unit, high * unit];
        }
    }
    Ok(())
}
