//! The most probable token, chosen where the logits are, and how probable it is.
//!
//! Two kernels: cubes find the largest of a part of the vocabulary and sum the exponentials below it, then one cube joins them,
//! writes the token where the next step reads it, and counts the position on.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Units of a cube.
const UNITS: usize = 256;
/// Parts of the vocabulary.
const PARTS: usize = 128;

/// f32 elements of `partial` that `tokens` rows need.
pub fn partial_len(tokens: usize) -> usize {
    tokens * PARTS * 3
}

/// The buffers of the choice.
pub struct Buffers<'a> {
    /// f32 `[tokens, vocabulary]`.
    pub logits: &'a Handle,
    /// f32, [`partial_len`].
    pub partial: &'a Handle,
    /// u32 `[tokens]`: the chosen tokens.
    pub tokens: &'a Handle,
    /// u32 `[tokens]`: grows by one each.
    pub positions: &'a Handle,
    /// f32 `[tokens, 2]`: the bits of the token, and its log-probability.
    pub chosen: &'a Handle,
}

/// Chooses the next token of `tokens` rows: the largest logit, the lowest id among equals.
pub fn launch(client: &Client, vocabulary: usize, tokens: usize, buffers: &Buffers<'_>) {
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at the end of their part.
    unsafe {
        parts_kernel::launch_unchecked(
            client,
            CubeCount::Static(PARTS as u32, tokens as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(buffers.logits.clone(), tokens * vocabulary),
            BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(tokens)),
            vocabulary,
        );
        join_kernel::launch_unchecked(
            client,
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(PARTS as u32),
            BufferArg::from_raw_parts(buffers.partial.clone(), partial_len(tokens)),
            BufferArg::from_raw_parts(buffers.tokens.clone(), tokens),
            BufferArg::from_raw_parts(buffers.positions.clone(), tokens),
            BufferArg::from_raw_parts(buffers.chosen.clone(), tokens * 2),
            vocabulary,
        );
    }
}

#[cube(launch_unchecked)]
fn parts_kernel(logits: &[f32], partial: &mut [f32], #[comptime] vocabulary: usize) {
    let part = CUBE_POS_X as usize;
    let token = CUBE_POS_Y as usize;
    let unit = UNIT_POS as usize;
    let of_part = comptime!(vocabulary.div_ceil(PARTS));
    let start = part * of_part;
    let end = select(start + of_part < vocabulary, start + of_part, vocabulary);
    let mut best = f32::MIN.runtime();
    let mut id = u32::MAX.runtime();
    let mut sum = 0.0f32;
    let mut at = start + unit;
    while at < end {
        let logit = logits[token * vocabulary + at];
        if logit > best {
            sum = sum * (best - logit).exp() + 1.0f32;
            best = logit;
            id = at as u32;
        } else {
            sum += (logit - best).exp();
        }
        at += UNITS;
    }
    let (best, id, sum) = join(best, id, sum, UNITS);
    if unit == 0 {
        let at = (token * PARTS + part) * 3;
        partial[at] = best;
        partial[at + 1] = f32::reinterpret(id);
        partial[at + 2] = sum;
    }
}

#[cube(launch_unchecked)]
fn join_kernel(
    partial: &[f32],
    tokens: &mut [u32],
    positions: &mut [u32],
    chosen: &mut [f32],
    #[comptime] vocabulary: usize,
) {
    let token = CUBE_POS_X as usize;
    let at = (token * PARTS + UNIT_POS as usize) * 3;
    let (_, id, sum) = join(partial[at], u32::reinterpret(partial[at + 1]), partial[at + 2], PARTS);
    if UNIT_POS == 0 {
        // Logits that are not numbers choose nothing, which the host is told; what the next step reads must be a token.
        tokens[token] = select(id < comptime!(vocabulary as u32), id, 0u32);
        positions[token] += 1;
        chosen[token * 2] = f32::reinterpret(id);
        // The largest logit is that of the token itself.
        chosen[token * 2 + 1] = -sum.ln();
    }
}

/// The largest of all units' logits, the lowest id that has it, and the sum of exponentials relative to it; in unit 0.
#[cube]
fn join(best: f32, id: u32, sum: f32, #[comptime] units: usize) -> (f32, u32, f32) {
    let unit = UNIT_POS as usize;
    let mut bests = Shared::<[f32]>::new_slice(units);
    let mut ids = Shared::<[u32]>::new_slice(units);
    let mut sums = Shared::<[f32]>::new_slice(units);
    bests[unit] = best;
    ids[unit] = id;
    sums[unit] = sum;
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            let other = unit + half;
            let a = bests[unit];
            let b = bests[other];
            let takes = b > a || (b == a && ids[other] < ids[unit]);
            let largest = select(takes, b, a);
            sums[unit] = sums[unit] * (a - largest).exp() + sums[other] * (b - largest).exp();
            bests[unit] = largest;
            ids[unit] = select(takes, ids[other], ids[unit]);
        }
        half /= 2;
    }
    sync_cube();
    (bests[0], ids[0], sums[0])
}
