//! The reference codec: what a code and a scale mean, one value at a time.

/// Values of a block.
pub const BLOCK: usize = 32;
/// Bytes of a block without its scale.
pub const BLOCK_BYTES: usize = BLOCK / 2;
/// What a `model.bin` adds to the scales of the checkpoint (`WR-SCALE`).
pub const SCALE_OFFSET: u8 = 14;
/// The largest scale of a checkpoint that a `model.bin` can hold (`SRC-SCALE`): 254 is the largest stored scale that
/// the kernels do not read as infinity.
pub const MAX_SCALE: u8 = 254 - SCALE_OFFSET;

/// The value of each code: sign, two exponent bits, one mantissa bit.
pub const CODES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// `CODES[code] × 2^(scale − 127)` in f32; only the low four bits of `code` count.
///
/// - Scales 0 to 252 are exact, those of 0 and 1 by subnormals; the sign of zero is kept.
/// - Of scale 253 magnitudes 4 and 6, of 254 those from 2 on exceed f32 and become infinite.
/// - Scale 255 is NaN whatever the code, as OCP MX says (the positive quiet NaN without payload).
///
/// A `model.bin` only holds scales up to [`MAX_SCALE`].
pub fn value(code: u8, scale: u8) -> f32 {
    CODES[usize::from(code & 15)] * unit(scale)
}

/// `2^(scale − 127)`, the value of code 2; NaN for 255. Exact.
pub(super) fn unit(scale: u8) -> f32 {
    match scale {
        0 => f32::from_bits(1 << 22), // 2^-127 is subnormal
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(scale) << 23),
    }
}

/// The scale that a `model.bin` stores for a checkpoint's; `None` above [`MAX_SCALE`].
pub fn stored_scale(checkpoint: u8) -> Option<u8> {
    (checkpoint <= MAX_SCALE).then(|| checkpoint + SCALE_OFFSET)
}

/// The checkpoint's scale for one that a `model.bin` stores; `None` outside 14 to 254 (`VAL-SCALE`).
pub fn checkpoint_scale(stored: u8) -> Option<u8> {
    stored.checked_sub(SCALE_OFFSET).filter(|&scale| scale <= MAX_SCALE)
}
