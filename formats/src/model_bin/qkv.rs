//! The QKV transform: how Q and K rows of a checkpoint are reordered and scaled for the Metal kernels, and back.
//!
//! Within each Q and K head of 64 rows the two rotary halves are interleaved: stored row 2i + j is checkpoint row
//! 32j + i (`WR-QKV-ORDER`). Q is multiplied by 0.5 and K by 0.25 in BF16, to nearest even, subnormals and −0 kept
//! (`WR-QKV-SCALE`). V is untouched. Weight and bias are treated alike.

use half::bf16;

use super::header::HEAD_DIM;
use super::tensors::Dims;

const HEAD_ROWS: u64 = HEAD_DIM as u64;
const HALF: u64 = HEAD_ROWS / 2;

/// What happens to a row of the fused projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Interleaved and multiplied by 0.5.
    Query,
    /// Interleaved and multiplied by 0.25.
    Key,
    /// Copied.
    Value,
}

impl Part {
    /// The part that row `row` belongs to; rows are q, then k, then v, in checkpoint and file alike.
    pub fn of_row(row: u64, dims: &Dims) -> Part {
        let queries = dims.num_heads() * HEAD_ROWS;
        if row < queries {
            Part::Query
        } else if row < queries + dims.num_kv_heads() * HEAD_ROWS {
            Part::Key
        } else {
            Part::Value
        }
    }

    fn factor(self) -> f32 {
        match self {
            Part::Query => 0.5,
            Part::Key => 0.25,
            Part::Value => 1.0,
        }
    }

    /// The stored bits of a checkpoint value.
    pub fn scale(self, bits: u16) -> u16 {
        match self {
            Part::Value => bits,
            // The product is exact in f32: bf16 has f32's exponents and 16 bits of significand fewer.
            part => bf16::from_f32(bf16::from_bits(bits).to_f32() * part.factor()).to_bits(),
        }
    }

    /// The checkpoint value that [`Part::scale`] makes these bits from; of several, the one of even significand.
    /// Where there is none (a stored value that no finite checkpoint value gives), infinity of the same sign.
    pub fn unscale(self, bits: u16) -> u16 {
        match self {
            Part::Value => bits,
            part => bf16::from_f32(bf16::from_bits(bits).to_f32() / part.factor()).to_bits(),
        }
    }

    /// Whether exactly one checkpoint value gives these stored bits, so that [`Part::unscale`] recovers it.
    pub fn is_invertible(self, bits: u16) -> bool {
        let magnitude = bits & 0x7fff;
        if self == Part::Value || magnitude == 0x7f80 {
            return true;
        }
        let original = self.unscale(bits);
        // Bit patterns of one sign are ordered as their values are, so rivals are neighbours.
        original & 0x7fff < 0x7f80
            && self.scale(original) == bits
            && self.scale(original + 1) != bits
            && (magnitude == 0 && original & 0x7fff == 0 || self.scale(original - 1) != bits)
    }
}

/// The checkpoint row that becomes stored row `stored`.
pub fn checkpoint_row(stored: u64, dims: &Dims) -> u64 {
    if Part::of_row(stored, dims) == Part::Value {
        return stored;
    }
    let (head, within) = (stored / HEAD_ROWS, stored % HEAD_ROWS);
    head * HEAD_ROWS + (within % 2) * HALF + within / 2
}

/// The stored row that checkpoint row `checkpoint` becomes.
pub fn stored_row(checkpoint: u64, dims: &Dims) -> u64 {
    if Part::of_row(checkpoint, dims) == Part::Value {
        return checkpoint;
    }
    let (head, within) = (checkpoint / HEAD_ROWS, checkpoint % HEAD_ROWS);
    head * HEAD_ROWS + (within % HALF) * 2 + within / HALF
}

/// Stores whole heads: `rows` are checkpoint rows from `first_row` on (a multiple of 64), `stored` receives them in
/// the file's order and scaling. Both hold the same number of bytes, a multiple of 64 rows of `row_bytes`.
pub fn store(first_row: u64, rows: &[u8], stored: &mut [u8], row_bytes: usize, dims: &Dims) {
    for (index, out) in stored.chunks_exact_mut(row_bytes).enumerate() {
        let row = first_row + index as u64;
        let part = Part::of_row(row, dims);
        let from = (checkpoint_row(row, dims) - first_row) as usize * row_bytes;
        let Some(row) = rows.get(from..from + row_bytes) else { continue };
        map_bits(row, out, |bits| part.scale(bits));
    }
}

/// Undoes the scaling of one stored row, in place.
pub fn unscale_row(stored_row: u64, row: &mut [u8], dims: &Dims) {
    let part = Part::of_row(stored_row, dims);
    for pair in row.chunks_exact_mut(2) {
        let bits = part.unscale(u16::from_le_bytes([pair[0], pair[1]]));
        pair.copy_from_slice(&bits.to_le_bytes());
    }
}

/// Scales and unscales checkpoint rows in place: the canonical form that digests are taken of (`spec/digest.md`), which
/// survives the way through a file although that way may round.
pub fn canonicalise(first_row: u64, rows: &mut [u8], row_bytes: usize, dims: &Dims) {
    for (index, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
        let part = Part::of_row(first_row + index as u64, dims);
        for pair in row.chunks_exact_mut(2) {
            let bits = part.unscale(part.scale(u16::from_le_bytes([pair[0], pair[1]])));
            pair.copy_from_slice(&bits.to_le_bytes());
        }
    }
}

fn map_bits(from: &[u8], to: &mut [u8], map: impl Fn(u16) -> u16) {
    for (from, to) in from.chunks_exact(2).zip(to.chunks_exact_mut(2)) {
        to.copy_from_slice(&map(u16::from_le_bytes([from[0], from[1]])).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scaling in f64 and rounding to nearest even on the grid of bf16, without the `half` crate.
    fn scale_in_f64(bits: u16, factor: f64) -> u16 {
        let value = f64::from(f32::from_bits(u32::from(bits) << 16)) * factor;
        let magnitude = value.abs();
        // Neighbouring patterns of a positive bf16 are consecutive integers: search the nearest.
        let at = |pattern: u16| f64::from(f32::from_bits(u32::from(pattern) << 16));
        let mut below = 0u16;
        for bit in (0..15).rev() {
            let candidate = below | 1 << bit;
            if candidate <= 0x7f80 && at(candidate) <= magnitude {
                below = candidate;
            }
        }
        let (down, up) = (magnitude - at(below), at(below + 1) - magnitude);
        let nearest = if down < up || (down == up && below.is_multiple_of(2)) { below } else { below + 1 };
        nearest | bits & 0x8000
    }

    #[test]
    fn scaling_rounds_to_nearest_even_on_every_finite_pattern() {
        let mut rounded = [0, 0];
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7fff < 0x7f80) {
            for (index, (part, factor)) in [(Part::Query, 0.5), (Part::Key, 0.25)].into_iter().enumerate() {
                let scaled = part.scale(bits);
                assert_eq!(scaled, scale_in_f64(bits, factor), "{part:?} {bits:#06x}");
                let exact = f64::from(f32::from_bits(u32::from(bits) << 16)) * factor;
                rounded[index] += i32::from(f64::from(f32::from_bits(u32::from(scaled) << 16)) != exact);
            }
        }
        // The counts and examples that were established with the genuine exporter.
        assert_eq!(rounded, [256, 512]);
        assert_eq!(Part::Query.scale(0x0003), 0x0002);
        assert_eq!(Part::Query.scale(0x0081), 0x0040);
        assert_eq!(Part::Query.scale(0x8000), 0x8000);
    }

    #[test]
    fn invertible_means_one_preimage_and_unscale_finds_it() {
        for part in [Part::Query, Part::Key] {
            let mut preimages = vec![Vec::new(); 1 << 16];
            for bits in (0..=u16::MAX).filter(|bits| bits & 0x7fff <= 0x7f80) {
                preimages[usize::from(part.scale(bits))].push(bits);
            }
            for stored in (0..=u16::MAX).filter(|bits| bits & 0x7fff <= 0x7f80) {
                let originals = &preimages[usize::from(stored)];
                assert_eq!(
                    part.is_invertible(stored),
                    originals.len() == 1,
                    "{part:?} {stored:#06x} {originals:x?}"
                );
                if !originals.is_empty() {
                    assert!(originals.contains(&part.unscale(stored)), "{part:?} {stored:#06x}");
                }
            }
        }
    }
}
