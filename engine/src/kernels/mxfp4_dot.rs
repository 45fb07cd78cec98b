//! Products of MXFP4 rows that stay packed, the core of [`super::gate_up`] and [`super::down`].
//!
//! A lane takes whole blocks of 32 codes. A code `s e e m` put into the bits of an f16, `s 000ee m000000000`, is its value
//! times 2^−14, subnormal 0.5 included; a `model.bin` stores scales 14 too large for this very reason, so that the exponent of
//! the product is the stored scale's. Two codes are decoded at a time. Devices without f16 look the values up.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use half::f16;

use super::group::{F4, Group, U4};

/// How codes are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decoding {
    /// As pairs of f16.
    Half,
    /// By shifting a table of doubled values.
    Table,
}

impl Decoding {
    /// The faster one that a device computes rightly: some take subnormal numbers for zero, and where kernels are WGSL, naga 30 takes
    /// a pair of f16 for one f32 (wgpu#8896).
    pub fn of(client: &Client) -> Decoding {
        let has_f16 = client.properties().supports_type(ElemType::Float(FloatKind::F16));
        if has_f16 && decodes_halves(client) { Decoding::Half } else { Decoding::Table }
    }

    /// All that a device computes rightly, with every group that it can have.
    pub(crate) fn with_groups(client: &Client) -> impl Iterator<Item = (Group, Decoding)> {
        let best = Decoding::of(client);
        let decodings = [Decoding::Half, Decoding::Table].into_iter();
        let decodings = decodings.filter(move |&decoding| decoding == best || decoding == Decoding::Table);
        Group::all(client).into_iter().flat_map(move |group| decodings.clone().map(move |d| (group, d)))
    }
}

/// Decodes all sixteen codes on the device as [`Decoding::Half`] and compares.
fn decodes_halves(client: &Client) -> bool {
    let words = client.create_from_slice(bytemuck::cast_slice(&[0x7654_3210u32, 0xfedc_ba98]));
    let units: Vec<f32> = (0..64).map(|i| if i / 8 == i % 8 { 16384.0 } else { 0.0 }).collect();
    let units = client.create_from_slice(bytemuck::cast_slice(&units));
    let out = client.empty(16 * size_of::<f32>());
    // SAFETY: sixteen units, and buffers of two words, sixteen quads and sixteen values.
    unsafe {
        probe_kernel::launch_unchecked(
            client,
            CubeCount::new_single(),
            CubeDim::new_1d(16),
            BufferArg::from_raw_parts(words, 2),
            BufferArg::from_raw_parts(units, 16),
            BufferArg::from_raw_parts(out.clone(), 16),
        );
    }
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0f32];
    let expected: Vec<f32> = values.into_iter().chain(values.map(|value| -value)).collect();
    // The device's own thread waits, for which no graph is recorded meanwhile: this may be part of an operation that another
    // thread waits for, holding what `backend::waiting` holds.
    let decoded = client.exclusive(|| client.read_one(out)).flatten();
    decoded.is_ok_and(|bytes| bytemuck::cast_slice::<u8, f32>(&bytes) == expected)
}

#[cube(launch_unchecked)]
fn probe_kernel(words: &[u32], units: &[F4], out: &mut [f32]) {
    let code = UNIT_POS as usize;
    let (low, high) = (units[code % 8 * 2], units[code % 8 * 2 + 1]);
    out[code] = dot_word(words[code / 8], low, high, Decoding::Half);
}

/// What [`dot_packed`] is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Packed {
    /// Blocks of a row.
    pub blocks: usize,
    /// Rows that a group sums at a time.
    pub rows: usize,
    /// Blocks of each of these rows that a lane reads before it decodes the first.
    pub ahead: usize,
    /// How codes are decoded.
    pub decoding: Decoding,
    /// Who sums a row.
    pub group: Group,
}

/// A lane's share of `packed.rows` rows times one row of `x`, into `sums`.
///
/// `codes` is `[rows, blocks]` of 32 codes, `scales` four stored scales a word; `x` begins at quad `first_x`, in the order of
/// [`super::router::transposed`].
#[cube]
pub(crate) fn dot_packed(
    codes: &[U4],
    scales: &[u32],
    x: &[F4],
    sums: &mut Array<f32>,
    first_row: usize,
    first_x: usize,
    #[comptime] packed: Packed,
) {
    let blocks = comptime!(packed.blocks);
    let rows = comptime!(packed.rows);
    #[unroll]
    for r in 0..rows {
        sums[r] = 0.0f32;
    }
    let ahead = comptime!(packed.ahead);
    let lanes = comptime!(packed.group.lanes as usize);
    let mut first = UNIT_POS_X as usize;
    while first < blocks {
        let mut words = Array::<U4>::new(comptime!(ahead * rows));
        let mut exponents = Array::<u32>::new(comptime!(ahead * rows));
        #[unroll]
        for a in 0..ahead {
            // Beyond the row the last block is read again, with a scale of zero.
            let block = first + a * lanes;
            let inside = select(block < blocks, block, blocks - 1);
            #[unroll]
            for r in 0..rows {
                let at = (first_row + r) * blocks + inside;
                words[a * rows + r] = codes[at];
                let exponent = (scales[at / 4] >> (u32::cast_from(at % 4) * 8u32)) & 255u32;
                exponents[a * rows + r] = select(block < blocks, exponent, 0u32);
            }
        }
        #[unroll]
        for a in 0..ahead {
            let block = first + a * lanes;
            let inside = select(block < blocks, block, blocks - 1);
            let mut parts = Array::<f32>::new(rows);
            #[unroll]
            for r in 0..rows {
                parts[r] = 0.0f32;
            }
            #[unroll]
            for j in 0..4usize {
                let low = x[first_x + comptime!(2 * j) * blocks + inside];
                let high = x[first_x + comptime!(2 * j + 1) * blocks + inside];
                #[unroll]
                for r in 0..rows {
                    parts[r] +=
                        dot_word(words[a * rows + r].extract(j), low, high, comptime!(packed.decoding));
                }
            }
            #[unroll]
            for r in 0..rows {
                sums[r] += scaled(parts[r], exponents[a * rows + r], comptime!(packed.decoding));
            }
        }
        first += comptime!(ahead * lanes);
    }
}

/// Eight codes times eight values; the codes' unit depends on the decoding.
#[cube]
fn dot_word(word: u32, low: F4, high: F4, #[comptime] decoding: Decoding) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..4usize {
        if comptime!(decoding == Decoding::Half) {
            // Codes 3 − i and 7 − i.
            let moved = word << comptime!(4 * i as u32);
            let bits = (moved & 0x8000_8000u32) | ((moved >> 3u32) & 0x0e00_0e00u32);
            let pair = Vector::<f32, Const<2>>::cast_from(Vector::<f16, Const<2>>::reinterpret(bits));
            sum += pair.extract(0usize) * low.extract(comptime!(3 - i));
            sum += pair.extract(1usize) * high.extract(comptime!(3 - i));
        } else {
            sum += doubled(word >> comptime!(4 * i as u32)) * low.extract(i);
            sum += doubled(word >> comptime!(4 * i as u32 + 16)) * high.extract(i);
        }
    }
    sum
}

/// Twice the value of an E2M1 code in the lowest four bits: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
#[cube]
fn doubled(code: u32) -> f32 {
    let magnitude = (0xc864_3210u32 >> ((code & 7u32) * 4u32)) & 15u32;
    let value = f32::cast_from(magnitude);
    select(code & 8u32 != 0u32, -value, value)
}

/// A sum of decoded codes with the scale that is stored for them.
#[cube]
fn scaled(sum: f32, stored: u32, #[comptime] decoding: Decoding) -> f32 {
    if comptime!(decoding == Decoding::Half) {
        sum * f32::reinterpret(stored << 23u32)
    } else {
        // 2^(stored − 127 − 14 − 1) in two factors: GPUs flush what is below 2^−126.
        let exponents = stored + 112u32;
        let first = exponents / 2u32;
        sum * f32::reinterpret(first << 23u32) * f32::reinterpret((exponents - first) << 23u32)
    }
}
