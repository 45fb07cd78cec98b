//! f32 → MXFP4 with the scale of least squared error.
//!
//! # Definition
//! Given a scale, each value becomes the nearest code, ties going to the even code (IEEE 754 round-to-nearest-even for
//! E2M1); magnitudes beyond 6 units become 6 units; the sign is kept, also that of zero. Of the scales 0 to
//! [`MAX_SCALE`] the block gets the one with the least sum of squared errors, the sum being taken in f64; among equals
//! the plain one. *Plain* rounding, OCP MX v1.0, section 6.3, takes `2^(floor(log2 max|x|) − 2)`, here clamped to the
//! range of scales. A block of zeros gets scale 0.
//!
//! Magnitudes above `6 × 2^113`, which no scale reaches, saturate.
//!
//! # Why two candidates suffice
//! Let m be the largest magnitude in units of the plain scale, so that 4 ≤ m < 8 (clamping aside), and G the grid
//! {0, ½, 1, 1½, 2, 3, 4, 6} of the plain scale; the scale k steps away has the grid 2^k G.
//!
//! - *Two or more above*: below 8, the grid 4G has {0, 2, 4, 6, 8}, a subset of 2G = {0, 1, 2, 3, 4, 6, 8, 12}; higher
//!   ones have a subset of 4G. No value gets nearer than with the next scale above.
//! - *One above*: up to 6, 2G is a subset of G, and a value between 6 and 7 is nearest to 6 in both. It can only win if
//!   m > 7.
//! - *One below*, ½G = {0, ¼, ½, ¾, 1, 1½, 2, 3}, improves on G for magnitudes below 1 only, each by at most 1/16,
//!   31/16 in all. The largest value gets worse by 2m − 7 up to m = 5, by 6m − 27 ≥ 3 from there. It can only win if
//!   m < 4 + 15/32.
//! - *Two or more below*: the grid ends at 1½ or earlier. It improves on ½G for magnitudes up to 1½ only, each by at
//!   most 1/16. The largest value gets worse by at least (m − 1½)² − (m − 3)² ≥ 21/4.
//!
//! Clamping at 0 leaves m < 4 and no scale below; the first two arguments hold. Clamping at [`MAX_SCALE`] leaves
//! m ≥ 8 and no scale above; the last two hold, since then even one step below costs 6m − 27.

use super::codec::{BLOCK, BLOCK_BYTES, CODES, MAX_SCALE};

/// A value that MXFP4 cannot express.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("value {value} at index {index} is not finite")]
pub struct NotFinite {
    /// Its position in the row.
    pub index: usize,
    /// The infinity or NaN.
    pub value: f32,
}

/// Quantises a row: `values` (32·n) → `blocks` (16·n bytes) and `scales` (n bytes, those of a checkpoint).
///
/// Lengths that do not fit together are a programming error: asserted in debug builds, otherwise only the whole
/// blocks that all three hold are written.
///
/// # Errors
/// The first infinity or NaN of the row; blocks before it have been written.
pub fn quantize_row(values: &[f32], blocks: &mut [u8], scales: &mut [u8]) -> Result<(), NotFinite> {
    debug_assert_eq!(values.len(), scales.len() * BLOCK);
    debug_assert_eq!(blocks.len(), scales.len() * BLOCK_BYTES);
    let (values, _) = values.as_chunks::<BLOCK>();
    let (blocks, _) = blocks.as_chunks_mut::<BLOCK_BYTES>();
    for (n, ((values, block), scale)) in values.iter().zip(blocks).zip(scales).enumerate() {
        let Some(plain) = plain_scale(values) else {
            let index = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
            return Err(NotFinite { index: n * BLOCK + index, value: values[index] });
        };
        let codes;
        (*scale, codes) = best(values, plain);
        for (byte, pair) in block.iter_mut().zip(codes.as_chunks::<2>().0) {
            *byte = pair[0] | pair[1] << 4;
        }
    }
    Ok(())
}

/// The scale of plain rounding and the largest magnitude of the block in its units.
#[derive(Clone, Copy)]
struct Plain {
    scale: u8,
    max: f64,
}

/// `None` if a value is not finite.
fn plain_scale(values: &[f32; BLOCK]) -> Option<Plain> {
    let max = values.iter().fold(0, |max, value| max.max(value.abs().to_bits()));
    let exponent = (max >> 23) as u8;
    if exponent == 255 {
        return None;
    }
    let scale = exponent.saturating_sub(2).min(MAX_SCALE);
    Some(Plain { scale, max: f64::from(f32::from_bits(max)) / unit(scale) })
}

fn best(values: &[f32; BLOCK], plain: Plain) -> (u8, [u8; BLOCK]) {
    let codes = round(values, plain.scale);
    let rival = if plain.max > 7.0 && plain.scale < MAX_SCALE {
        plain.scale + 1
    } else if (4.0..4.0 + 15.0 / 32.0).contains(&plain.max) && plain.scale > 0 {
        plain.scale - 1
    } else {
        return (plain.scale, codes);
    };
    let rival_codes = round(values, rival);
    if squared_error(values, rival, &rival_codes) < squared_error(values, plain.scale, &codes) {
        (rival, rival_codes)
    } else {
        (plain.scale, codes)
    }
}

/// The nearest codes.
fn round(values: &[f32; BLOCK], scale: u8) -> [u8; BLOCK] {
    // 2^(127 − scale). Exact but for quotients below 2^-126, which become code 0 anyway.
    let inverse = f32::from_bits(u32::from(254 - scale) << 23);
    let mut codes = [0; BLOCK];
    for (code, value) in codes.iter_mut().zip(values) {
        let magnitude = value.abs() * inverse;
        // The midpoint below an even code belongs to it, the one above it too.
        let code_of_magnitude = u8::from(magnitude > 0.25)
            + u8::from(magnitude >= 0.75)
            + u8::from(magnitude > 1.25)
            + u8::from(magnitude >= 1.75)
            + u8::from(magnitude > 2.5)
            + u8::from(magnitude >= 3.5)
            + u8::from(magnitude > 5.0);
        *code = code_of_magnitude | u8::from(value.is_sign_negative()) << 3;
    }
    codes
}

/// The sum of squared errors. Each square is exact: an error has at most 25 significant bits.
fn squared_error(values: &[f32; BLOCK], scale: u8, codes: &[u8; BLOCK]) -> f64 {
    let unit = unit(scale);
    let errors = values.iter().zip(codes).map(|(&value, &code)| {
        let error = f64::from(value) - f64::from(CODES[usize::from(code & 15)]) * unit;
        error * error
    });
    errors.sum()
}

/// `2^(scale − 127)`.
fn unit(scale: u8) -> f64 {
    f64::from(super::codec::unit(scale))
}
