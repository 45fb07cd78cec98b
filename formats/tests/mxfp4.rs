//! MXFP4: the codec against binary64, fast decoding against the codec, the quantiser against a search of all scales.

use formats::mxfp4::{
    BLOCK, BLOCK_BYTES, LengthMismatch, MAX_SCALE, NotFinite, checkpoint_scale, decode, quantize_row,
    stored_scale, value,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// A code's value by the definition of E2M1: sign, two exponent bits with bias 1, one mantissa bit.
fn e2m1(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    let magnitude =
        if exponent == 0 { mantissa / 2.0 } else { (1.0 + mantissa / 2.0) * 2f64.powi(exponent - 1) };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The scale's value by the definition of UE8M0.
fn ue8m0(scale: u8) -> f64 {
    2f64.powi(i32::from(scale) - 127)
}

/// 2^exponent, also where it is subnormal (`f32::powi` divides 1 by an infinity then).
fn power(exponent: i32) -> f32 {
    2f64.powi(exponent) as f32
}

fn assert_same(found: f32, expected: f32, what: std::fmt::Arguments) {
    assert!(
        found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(),
        "{what}: {found} ≠ {expected}"
    );
}

#[test]
fn every_code_and_scale_is_the_binary64_product() {
    for scale in 0..255 {
        for code in 0..16 {
            let exact = e2m1(code) * ue8m0(scale);
            assert_same(value(code, scale), exact as f32, format_args!("code {code}, scale {scale}"));
            if scale <= 252 {
                assert_eq!(f64::from(value(code, scale)), exact, "inexact: code {code}, scale {scale}");
            }
        }
    }
    assert!((0..16).all(|code| value(code, 255).is_nan()));
    assert_eq!(value(1, 0), f32::from_bits(1 << 21), "2^-128, subnormal");
    assert_eq!(value(8, 3).to_bits(), (-0.0f32).to_bits());
    assert_eq!(
        [value(5, 253), value(6, 253), value(12, 254)],
        [3.0 * power(126), f32::INFINITY, f32::NEG_INFINITY]
    );
}

#[test]
fn stored_scales_are_14_higher_and_limited() {
    assert_eq!([stored_scale(0), stored_scale(240), stored_scale(241)], [Some(14), Some(254), None]);
    assert_eq!([13, 14, 254, 255].map(checkpoint_scale), [None, Some(0), Some(240), None]);
    for scale in 0..=MAX_SCALE {
        assert_eq!(stored_scale(scale).and_then(checkpoint_scale), Some(scale));
    }
}

#[test]
fn decoding_is_the_codec_for_every_byte_and_scale() {
    // All 256 bytes, as 16 blocks, and once more in reverse: every byte in two places of a block.
    let blocks: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
    let mut out = vec![f32::NAN; blocks.len() * 2];
    for scale in 0..=255 {
        decode(&blocks, &[scale; 32], &mut out).unwrap();
        for (pair, &byte) in out.chunks(2).zip(&blocks) {
            assert_same(
                pair[0],
                value(byte & 15, scale),
                format_args!("low nibble of {byte:#04x}, scale {scale}"),
            );
            assert_same(
                pair[1],
                value(byte >> 4, scale),
                format_args!("high nibble of {byte:#04x}, scale {scale}"),
            );
        }
    }
}

#[test]
fn decoding_uses_the_scale_of_each_block() {
    let mut out = [0.0; 64];
    decode(&[[0x21; 16], [0xf7; 16]].concat(), &[127, 129], &mut out).unwrap();
    let expected: Vec<f32> = [[0.5, 1.0].repeat(16), [24.0, -24.0].repeat(16)].concat();
    assert_eq!(out, expected[..]);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    for (blocks, scales, out) in
        [(16, 1, 31), (16, 1, 64), (15, 1, 32), (32, 1, 32), (16, 2, 32), (0, 1, 0), (17, 1, 32)]
    {
        let error = decode(&vec![0; blocks], &vec![0; scales], &mut vec![0.0; out]).unwrap_err();
        assert_eq!(error, LengthMismatch { blocks, scales, out });
    }
    decode(&[], &[], &mut []).unwrap();
}

/// A quantised block: scale and codes.
fn quantize(values: &[f32; BLOCK]) -> (u8, [u8; BLOCK]) {
    let (mut bytes, mut scale) = ([0; BLOCK_BYTES], [0]);
    quantize_row(values, &mut bytes, &mut scale).unwrap();
    (scale[0], std::array::from_fn(|index| bytes[index / 2] >> (4 * (index % 2)) & 15))
}

fn block(values: &[f32]) -> [f32; BLOCK] {
    std::array::from_fn(|index| values.get(index).copied().unwrap_or(0.0))
}

/// The nearest code by trying all, ties to the even one.
fn nearest(value: f32, scale: u8) -> u8 {
    let distance = |code: u8| (f64::from(value) - e2m1(code) * ue8m0(scale)).abs();
    let codes = if value.is_sign_negative() { 8..16 } else { 0..8 };
    codes.min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))).unwrap()
}

fn squared_error(values: &[f32; BLOCK], scale: u8, codes: &[u8; BLOCK]) -> f64 {
    values
        .iter()
        .zip(codes)
        .map(|(&value, &code)| (f64::from(value) - e2m1(code) * ue8m0(scale)).powi(2))
        .sum()
}

/// The error of nearest codes at a scale.
fn error_at(values: &[f32; BLOCK], scale: u8) -> f64 {
    squared_error(values, scale, &values.map(|value| nearest(value, scale)))
}

/// The scale of OCP MX v1.0, section 6.3, within the format's range.
fn plain_scale(values: &[f32; BLOCK]) -> u8 {
    let max = values.iter().fold(0f64, |max, &value| max.max(f64::from(value).abs()));
    let exponent = (0..=MAX_SCALE).rev().find(|&scale| max >= 4.0 * ue8m0(scale));
    exponent.unwrap_or(0)
}

#[test]
fn values_at_the_midpoints_go_to_even_codes() {
    // 4 fixes the scale at 127: it is exact, and so is everything else but the values under test.
    for (value, code) in [
        (0.25, 0),
        (0.25f32.next_up(), 1),
        (0.75, 2),
        (0.75f32.next_down(), 1),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (-0.25, 8),
        (-0.75, 10),
        (-2.5, 12),
        (-3.5, 14),
        (-0.0, 8),
    ] {
        let (scale, codes) = quantize(&block(&[4.0, value, 6.0]));
        assert_eq!((scale, codes[1]), (127, code), "{value}");
    }
    let (scale, codes) = quantize(&block(&[5.0, 3.0]));
    assert_eq!((scale, codes[0], codes[1]), (127, 6, 5), "5 lies between 4 (code 6) and 6 (code 7)");
}

#[test]
fn a_scale_up_or_down_is_taken_where_it_is_better() {
    // 7.9 is plainly 6 at scale 127, but 8 at 128; small values beside it lose less.
    assert_eq!(quantize(&block(&[7.9, 1.0])).0, 128);
    // At 127 each ¼ becomes 0; at 126 they are exact and 4 becomes 3.
    assert_eq!(quantize(&block(&[&[4.0][..], &[0.25; 31]].concat())).0, 126);
    assert_eq!(quantize(&block(&[4.0, 0.25])).0, 127);
    // On either side of the bounds that the quantiser proves: 7, and 4 + 15/32 = 4.46875.
    for (max, small, scale) in [(6.99, 0.0, 127), (7.01, 0.0, 128), (4.46, 0.25, 126), (4.48, 0.25, 127)] {
        assert_eq!(quantize(&block(&[&[max][..], &[small; 31]].concat())).0, scale, "{max}");
    }
}

#[test]
fn extremes() {
    assert_eq!(quantize(&[0.0; BLOCK]), (0, [0; BLOCK]));
    assert_eq!(quantize(&[-0.0; BLOCK]), (0, [8; BLOCK]));
    // The smallest subnormal is 2^-149, far below half of 2^-128.
    assert_eq!(quantize(&block(&[f32::from_bits(1)])), (0, [0; BLOCK]));
    let (scale, codes) = quantize(&block(&[3.0 * power(-127), power(-128)]));
    assert_eq!((scale, codes[0], codes[1]), (0, 5, 1));
    // Nothing beyond 6 × 2^113 can be stored.
    let (scale, codes) = quantize(&block(&[f32::MAX, f32::MIN, 1.0, power(112)]));
    assert_eq!((scale, codes[..4].to_vec()), (240, vec![7, 15, 0, 1]));
    assert_eq!(quantize(&block(&[6.0 * power(113)])).0, 240);
}

#[test]
fn the_first_infinity_or_nan_of_a_row_is_refused() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut values = [1.0; 96];
        values[45] = bad;
        values[70] = f32::NAN;
        let NotFinite { index, value } = quantize_row(&values, &mut [0; 48], &mut [0; 3]).unwrap_err();
        assert_eq!((index, value.to_bits()), (45, bad.to_bits()));
    }
}

#[test]
fn rows_are_quantised_block_by_block() {
    let values: Vec<f32> =
        (0..64).map(|index| if index < 32 { index as f32 } else { 1e-3 * index as f32 }).collect();
    let (mut blocks, mut scales) = ([0; 32], [0; 2]);
    quantize_row(&values, &mut blocks, &mut scales).unwrap();
    for n in 0..2 {
        let (scale, codes) = quantize(&block(&values[n * 32..][..32]));
        let bytes: Vec<u8> = codes.chunks(2).map(|pair| pair[0] | pair[1] << 4).collect();
        assert_eq!((scales[n], &blocks[n * 16..][..16]), (scale, &bytes[..]));
    }
}

/// Blocks of several kinds: like weights, on a grid that is full of ties, with magnitudes near where a scale changes,
/// and any finite bits.
fn blocks() -> impl Strategy<Value = [f32; BLOCK]> {
    let weights = (-126..110i32, vec(-1.0f32..1.0, BLOCK))
        .prop_map(|(exponent, values)| values.iter().map(|value| value.powi(3) * power(exponent)).collect());
    let ties = (-140..120i32, vec(-64..=64i32, BLOCK)).prop_map(|(exponent, values)| {
        values.iter().map(|&value| value as f32 / 8.0 * power(exponent)).collect()
    });
    let edges =
        (-120..110i32, 3.9f32..8.1, vec(-1.5f32..1.5, BLOCK - 1)).prop_map(|(exponent, max, values)| {
            values.iter().chain([&max]).map(|value| value * power(exponent)).collect::<Vec<f32>>()
        });
    let bits =
        vec(any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite()), BLOCK);
    prop_oneof![weights, ties, edges, bits].prop_map(|values: Vec<f32>| values.try_into().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn codes_are_the_nearest(values in blocks()) {
        let (scale, codes) = quantize(&values);
        prop_assert_eq!(codes, values.map(|value| nearest(value, scale)));
    }

    #[test]
    fn no_scale_has_less_error_and_plain_rounding_never_has(values in blocks()) {
        let (scale, codes) = quantize(&values);
        prop_assert!(scale <= MAX_SCALE);
        let error = squared_error(&values, scale, &codes);
        let plain = error_at(&values, plain_scale(&values));
        prop_assert!(error <= plain, "scale {scale}: {error:e}, plain {plain:e}");
        for other in 0..=MAX_SCALE {
            let least = error_at(&values, other);
            // Sums of 32 squares, each rounded.
            prop_assert!(error <= least * (1.0 + 1e-14), "scale {scale}: {error:e}, scale {other}: {least:e}");
        }
    }

    #[test]
    fn decoded_blocks_are_quantised_without_loss(bytes in any::<[u8; BLOCK_BYTES]>(), scale in 0..=MAX_SCALE) {
        let (mut once, mut again) = ([0.0; BLOCK], [0.0; BLOCK]);
        decode(&bytes, &[scale], &mut once).unwrap();
        let (mut blocks, mut scales) = ([0; BLOCK_BYTES], [0]);
        quantize_row(&once, &mut blocks, &mut scales).unwrap();
        decode(&blocks, &scales, &mut again).unwrap();
        prop_assert_eq!(once.map(f32::to_bits), again.map(f32::to_bits));
    }
}
