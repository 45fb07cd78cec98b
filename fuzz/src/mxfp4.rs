//! Target `mxfp4`.

use arbitrary::Arbitrary;
use formats::mxfp4::{
    self, BLOCK, BLOCK_BYTES, CODES, MAX_SCALE, checkpoint_scale, quantize_row, stored_scale, value,
};

#[derive(Arbitrary, Debug)]
struct Input {
    /// Lengths that may not fit together.
    blocks: Vec<u8>,
    scales: Vec<u8>,
    out: u8,
    /// A row to quantise: each value's bits, and how far its exponent is moved towards that of 1.
    near: u8,
    values: Vec<u32>,
}

/// The fast decoder gives the reference's bits or, for lengths that do not fit, an error and untouched output. The
/// quantiser names the first value that is not finite; otherwise no scale at all has a smaller squared error.
pub fn mxfp4(data: &[u8]) {
    let Some(input) = crate::instructions::<Input>(data) else { return };
    decode(&input.blocks, &input.scales, usize::from(input.out));
    // The blocks that are whole, so that not only mismatches are tried.
    let whole = input.blocks.as_chunks::<BLOCK_BYTES>().0.len().min(input.scales.len());
    decode(&input.blocks[..whole * BLOCK_BYTES], &input.scales[..whole], whole * BLOCK);
    for &scale in &input.scales {
        assert_eq!(stored_scale(scale).and_then(checkpoint_scale), (scale <= MAX_SCALE).then_some(scale));
    }

    // Half of the rows have values of one magnitude, as models do; any exponent leaves most of a block at zero.
    let exponent = |bits: u32| match input.near {
        0..128 => bits,
        near => bits & 0x83ff_ffff | u32::from(near) << 24 & 0x7c00_0000,
    };
    let mut values: Vec<f32> = input.values.iter().map(|&bits| f32::from_bits(exponent(bits))).collect();
    values.resize(values.len().next_multiple_of(BLOCK), 0.0);
    quantize(&values);
}

fn decode(blocks: &[u8], scales: &[u8], len: usize) {
    const UNTOUCHED: f32 = 1234.5;
    let mut out = vec![UNTOUCHED; len];
    let fits = blocks.len() == scales.len() * BLOCK_BYTES && len == scales.len() * BLOCK;
    let decoded = mxfp4::decode(blocks, scales, &mut out);
    assert_eq!(decoded.is_ok(), fits);
    for (index, found) in out.into_iter().enumerate() {
        let expected = if fits {
            let code = blocks[index / 2] >> (index % 2 * 4);
            value(code, scales[index / BLOCK])
        } else {
            UNTOUCHED
        };
        assert_eq!(found.to_bits(), expected.to_bits(), "value {index}");
    }
}

fn quantize(values: &[f32]) {
    let mut blocks = vec![0; values.len() / 2];
    let mut scales = vec![0; values.len() / BLOCK];
    let quantised = quantize_row(values, &mut blocks, &mut scales);
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        let error = quantised.expect_err("a row that is not finite");
        assert_eq!((error.index, error.value.to_bits()), (index, values[index].to_bits()));
        return;
    }
    quantised.expect("a finite row");
    for ((values, block), &scale) in values.chunks(BLOCK).zip(blocks.chunks(BLOCK_BYTES)).zip(&scales) {
        assert!(scale <= MAX_SCALE);
        let codes = block.iter().flat_map(|byte| [byte & 15, byte >> 4]);
        let chosen = codes.zip(values).map(|(code, &value)| {
            assert_eq!(code >> 3 == 1, value.is_sign_negative(), "the sign of {value}");
            square(f64::from(value) - f64::from(CODES[usize::from(code)]) * unit(scale))
        });
        let chosen: f64 = chosen.sum();
        for other in 0..=MAX_SCALE {
            let error: f64 = values.iter().map(|&value| nearest(value, other)).sum();
            // Sums of squares may differ by their rounding.
            assert!(
                chosen <= error * (1.0 + 1e-12),
                "scale {scale} has {chosen}, {other} has {error}: {values:?}"
            );
        }
    }
}

/// The least squared error that any code has.
fn nearest(value: f32, scale: u8) -> f64 {
    let magnitude = f64::from(value.abs()) / unit(scale);
    let errors = CODES[..8].iter().map(|&code| square((magnitude - f64::from(code)) * unit(scale)));
    errors.fold(f64::INFINITY, f64::min)
}

fn unit(scale: u8) -> f64 {
    (f64::from(scale) - 127.0).exp2()
}

fn square(value: f64) -> f64 {
    value * value
}
