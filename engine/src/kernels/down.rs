//! The second half of the selected experts: down projections in MXFP4 with their biases, weighted by the router and added to the
//! residual stream.
//!
//! The groups of a cube compute the same rows of different experts and meet in shared memory.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, read, side_by_side};
use super::gate_up::Experts;
use super::group::{F4, Group, U4, group_sum};
use super::linear::multiplied;
use super::mxfp4_dot::{Decoding, Packed, dot_packed};
use crate::error::Result;

/// Rows that a group sums at a time.
const ROWS: usize = 4;
/// Groups in a cube, at most.
const MOST_GROUPS: usize = 8;

/// The buffers of the projection.
pub struct Buffers<'a> {
    /// f32 `[tokens, active, mlp_dim]` in transposed order: the hidden units.
    pub hidden: &'a Handle,
    /// u32 `[tokens, active]`: the selected experts.
    pub ids: &'a Handle,
    /// f32 `[tokens, active]`: their weights.
    pub shares: &'a Handle,
    /// MXFP4 codes `[experts, embedding_dim, mlp_dim]`.
    pub codes: &'a Handle,
    /// Their stored scales.
    pub scales: &'a Handle,
    /// f32 `[experts, embedding_dim]`.
    pub bias: &'a Handle,
    /// f32 `[tokens, embedding_dim]`: the residual stream, which the result is added to.
    pub x: &'a Handle,
}

/// Adds the experts' outputs to `tokens` rows of `x`.
pub fn launch(client: &Client, experts: Experts, tokens: usize, buffers: &Buffers<'_>) {
    // There are fewer cubes than run at a time, so that a lane had better ask for its whole row at once: 3 % on an H100 as CUDA,
    // the only device on which both were measured.
    let ahead = if experts.decoding == Decoding::Half { 3 } else { 1 };
    launch_grouped(client, experts, tokens, buffers, Group::of(client), ahead);
}

/// [`launch`] with a group of one's choice, whose lanes read `ahead` blocks at a time.
fn launch_grouped(
    client: &Client,
    experts: Experts,
    tokens: usize,
    buffers: &Buffers<'_>,
    group: Group,
    ahead: usize,
) {
    let Experts { experts: count, active, embedding_dim, mlp_dim, .. } = experts;
    let groups = active.min(MOST_GROUPS) as u32;
    let packed = Packed { blocks: mlp_dim / 32, rows: ROWS, ahead, decoding: experts.decoding, group };
    let blocks = count * embedding_dim * packed.blocks;
    // SAFETY: lengths are those of the buffers by the caller's contract; `embedding_dim` is a multiple of 32, so that cubes
    // cover it exactly, and ids are below `experts`.
    unsafe {
        down_kernel::launch_unchecked(
            client,
            CubeCount::Static((embedding_dim / ROWS) as u32, tokens as u32, 1),
            CubeDim::new_2d(group.lanes, groups),
            BufferArg::from_raw_parts(buffers.hidden.clone(), tokens * active * mlp_dim / 4),
            BufferArg::from_raw_parts(buffers.ids.clone(), tokens * active),
            BufferArg::from_raw_parts(buffers.shares.clone(), tokens * active),
            BufferArg::from_raw_parts(buffers.codes.clone(), blocks),
            BufferArg::from_raw_parts(buffers.scales.clone(), blocks / 4),
            BufferArg::from_raw_parts(buffers.bias.clone(), count * embedding_dim),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * embedding_dim),
            experts,
            packed,
            groups,
        );
    }
}

#[cube(launch_unchecked)]
fn down_kernel(
    hidden: &[F4],
    ids: &[u32],
    shares: &[f32],
    codes: &[U4],
    scales: &[u32],
    bias: &[f32],
    x: &mut [f32],
    #[comptime] experts: Experts,
    #[comptime] packed: Packed,
    #[comptime] groups: u32,
) {
    let width = comptime!(experts.embedding_dim);
    let active = comptime!(experts.active);
    let token = CUBE_POS_Y as usize;
    let row = CUBE_POS_X as usize * ROWS;
    let mut outputs = Shared::<[f32]>::new_slice(comptime!(ROWS * groups as usize));
    let mut mixed = Array::<f32>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        mixed[r] = 0.0f32;
    }
    #[unroll]
    for round in 0..comptime!(experts.active.div_ceil(groups as usize)) {
        let place = round * comptime!(groups as usize) + UNIT_POS_Y as usize;
        // Where the last round has more groups than experts, they repeat the last one for nothing.
        let valid = place < active;
        let pair = token * active + select(valid, place, active - 1);
        let expert = ids[pair] as usize;
        let share = select(valid, shares[pair], 0.0f32);
        let mut sums = Array::<f32>::new(ROWS);
        dot_packed(
            codes,
            scales,
            hidden,
            &mut sums,
            expert * width + row,
            pair * comptime!(experts.mlp_dim / 4),
            packed,
        );
        #[unroll]
        for r in 0..ROWS {
            let total = group_sum(sums[r], comptime!(packed.group), groups);
            mixed[r] += share * (total + bias[expert * width + row + r]);
        }
    }
    if UNIT_POS_X == 0 {
        #[unroll]
        for r in 0..ROWS {
            outputs[UNIT_POS_Y as usize * ROWS + r] = mixed[r];
        }
    }
    sync_cube();
    let unit = UNIT_POS as usize;
    if unit < ROWS {
        let mut sum = x[token * width + row + unit];
        #[unroll]
        for g in 0..comptime!(groups as usize) {
            sum += outputs[g * ROWS + unit];
        }
        x[token * width + row + unit] = sum;
    }
}

/// The output of an expert: `W·hidden + b`.
pub(crate) fn reference<'a>(
    weights: &'a [f64],
    bias: &'a [f64],
    hidden: &'a [f64],
) -> impl Iterator<Item = f64> + 'a {
    multiplied(weights, hidden).zip(bias).map(|(sum, bias)| sum + bias)
}

/// One active expert and more than a cube has groups; experts that tokens share and that one token has twice.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, count, active, embedding_dim, mlp_dim) in
        [(1, 4, 1, 64, 32), (3, 4, 4, 64, 2880), (17, 8, 4, 96, 64), (2, 16, 10, 32, 96), (1, 4, 2, 2880, 32)]
    {
        let mut inputs = Inputs::new(client, mlp_dim as u64);
        let matrix = inputs.mxfp4(count * embedding_dim, mlp_dim);
        let bias = inputs.f32(count * embedding_dim, 1.0);
        let hidden = inputs.f32(tokens * active * mlp_dim, 1.0);
        let ordered: Vec<f32> = hidden.values.iter().map(|&value| value as f32).collect();
        let ids = inputs.random.numbers(tokens * active, count);
        let (shares, x) = (inputs.f32(tokens * active, 1.0), inputs.f32(tokens * embedding_dim, 1.0));
        let mut truth = x.values.clone();
        for (pair, (&id, hidden)) in ids.iter().zip(hidden.values.chunks(mlp_dim)).enumerate() {
            let rows = id as usize * embedding_dim..(id as usize + 1) * embedding_dim;
            let weights = &matrix.values[rows.start * mlp_dim..rows.end * mlp_dim];
            let row = &mut truth[pair / active * embedding_dim..][..embedding_dim];
            let outputs = reference(weights, &bias.values[rows], hidden);
            row.iter_mut().zip(outputs).for_each(|(x, output)| *x += shares.values[pair] * output);
        }
        for (group, decoding) in Decoding::with_groups(client) {
            for ahead in [1, 3] {
                let written = inputs.again(&x);
                let buffers = Buffers {
                    hidden: &inputs.upload(&side_by_side(&ordered, mlp_dim)),
                    ids: &inputs.upload(&ids),
                    shares: &shares.handle,
                    codes: &matrix.codes,
                    scales: &matrix.scales,
                    bias: &bias.handle,
                    x: &written,
                };
                let experts = Experts { experts: count, active, embedding_dim, mlp_dim, limit: 0, decoding };
                launch_grouped(client, experts, tokens, &buffers, group, ahead);
                let case = format!(
                    "{tokens} × {active} of {count} experts, {mlp_dim} → {embedding_dim}, {decoding:?}, {}, {ahead} ahead",
                    group.name()
                );
                let found_x = read(client, &written)?;
                found.push(Comparison::near("down", case, embedding_dim, &found_x, &truth, F32));
            }
        }
    }
    Ok(found)
}
