//! The first half of the selected experts: gate and up projections in MXFP4, their biases, and the clamped SwiGLU.
//!
//! Gate and up of a hidden unit are neighbouring rows, which one group of lanes computes. The experts' ids are chosen here, on the
//! device, from the router's logits.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read, side_by_side};
use super::group::{F4, Group, U4, group_sum};
use super::linear::multiplied;
use super::mxfp4_dot::{Decoding, Packed, dot_packed};
use super::router::{select_expert, selection, transposed};
use crate::error::Result;

/// Hidden units that a group computes at a time.
const UNITS: usize = 2;
/// α of SwiGLU's sigmoid.
const ALPHA: f32 = 1.702;

/// The sizes of a layer of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Experts {
    /// Experts of the layer.
    pub experts: usize,
    /// Experts that are selected for a token.
    pub active: usize,
    /// Width of the residual stream, a multiple of 32.
    pub embedding_dim: usize,
    /// Hidden units of an expert, a multiple of 32.
    pub mlp_dim: usize,
    /// The bits of SwiGLU's clamp.
    pub limit: u32,
    /// How the device decodes MXFP4.
    pub decoding: Decoding,
}

/// The buffers of the projections.
pub struct Buffers<'a> {
    /// f32 `[tokens, experts]`: the router's logits.
    pub logits: &'a Handle,
    /// f32 `[tokens, embedding_dim]`: the router's normalised input.
    pub normed: &'a Handle,
    /// MXFP4 codes `[experts, 2 · mlp_dim, embedding_dim]`.
    pub codes: &'a Handle,
    /// Their stored scales.
    pub scales: &'a Handle,
    /// f32 `[experts, 2 · mlp_dim]`.
    pub bias: &'a Handle,
    /// f32 `[tokens, active, mlp_dim]` in transposed order: the hidden units.
    pub hidden: &'a Handle,
    /// u32 `[tokens, active]`: the selected experts.
    pub ids: &'a Handle,
    /// f32 `[tokens, active]`: their weights.
    pub shares: &'a Handle,
}

/// Computes the hidden units of `tokens` rows.
pub fn launch(client: &Client, experts: Experts, tokens: usize, buffers: &Buffers<'_>) {
    launch_grouped(client, experts, tokens, buffers, Group::of(client));
}

/// [`launch`] with a group of one's choice.
fn launch_grouped(client: &Client, experts: Experts, tokens: usize, buffers: &Buffers<'_>, group: Group) {
    let Experts { experts: count, active, embedding_dim, mlp_dim, .. } = experts;
    let packed =
        Packed { blocks: embedding_dim / 32, rows: 2 * UNITS, ahead: 1, decoding: experts.decoding, group };
    let blocks = count * 2 * mlp_dim * packed.blocks;
    // 2 instead of 4: 2 % on an H100 as CUDA, the only device on which both were measured.
    let groups = if experts.decoding == Decoding::Half { 2 } else { 4 };
    // SAFETY: lengths are those of the buffers by the caller's contract; `mlp_dim` is a multiple of 32, so that cubes cover it
    // exactly, and ids are below `experts`.
    unsafe {
        gate_up_kernel::launch_unchecked(
            client,
            CubeCount::Static((mlp_dim / (UNITS * groups as usize)) as u32, active as u32, tokens as u32),
            CubeDim::new_2d(group.lanes, groups),
            BufferArg::from_raw_parts(buffers.logits.clone(), tokens * count),
            BufferArg::from_raw_parts(buffers.normed.clone(), tokens * embedding_dim / 4),
            BufferArg::from_raw_parts(buffers.codes.clone(), blocks),
            BufferArg::from_raw_parts(buffers.scales.clone(), blocks / 4),
            BufferArg::from_raw_parts(buffers.bias.clone(), count * 2 * mlp_dim),
            BufferArg::from_raw_parts(buffers.hidden.clone(), tokens * active * mlp_dim),
            BufferArg::from_raw_parts(buffers.ids.clone(), tokens * active),
            BufferArg::from_raw_parts(buffers.shares.clone(), tokens * active),
            experts,
            packed,
            groups,
        );
    }
}

#[cube(launch_unchecked)]
fn gate_up_kernel(
    logits: &[f32],
    x: &[F4],
    codes: &[U4],
    scales: &[u32],
    bias: &[f32],
    hidden: &mut [f32],
    ids: &mut [u32],
    shares: &mut [f32],
    #[comptime] experts: Experts,
    #[comptime] packed: Packed,
    #[comptime] groups: u32,
) {
    let mlp_dim = comptime!(experts.mlp_dim);
    let token = CUBE_POS_Z as usize;
    let place = CUBE_POS_Y as usize;
    let pair = token * comptime!(experts.active) + place;
    let first_logit = token * comptime!(experts.experts);
    let (expert, share) =
        select_expert(logits, first_logit, place, comptime!(experts.experts), comptime!(experts.active));
    if CUBE_POS_X == 0 && UNIT_POS == 0 {
        ids[pair] = expert as u32;
        shares[pair] = share;
    }
    let unit = (CUBE_POS_X as usize * comptime!(groups as usize) + UNIT_POS_Y as usize) * UNITS;
    let first_row = (expert * mlp_dim + unit) * 2;
    let mut sums = Array::<f32>::new(comptime!(2 * UNITS));
    let first_x = token * comptime!(experts.embedding_dim / 4);
    dot_packed(codes, scales, x, &mut sums, first_row, first_x, packed);
    #[unroll]
    for u in 0..UNITS {
        let gate = group_sum(sums[2 * u], comptime!(packed.group), groups);
        let up = group_sum(sums[2 * u + 1], comptime!(packed.group), groups);
        if UNIT_POS_X == 0 {
            let row = first_row + 2 * u;
            let value =
                swiglu(gate + bias[row], up + bias[row + 1], comptime!(f32::from_bits(experts.limit)));
            let at = unit + u;
            let quad = transposed(at / 4, comptime!(experts.mlp_dim / 32));
            hidden[pair * mlp_dim + quad * 4 + at % 4] = value;
        }
    }
}

/// `g · σ(α·g) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`.
#[cube]
pub(crate) fn swiglu(gate: f32, up: f32, #[comptime] limit: f32) -> f32 {
    let gate = select(gate > limit, limit, gate);
    let up = select(up > limit, limit, up);
    let up = select(up < -limit, -limit, up);
    gate / (1.0f32 + (-ALPHA * gate).exp()) * (up + 1.0f32)
}

/// The hidden units of an expert: `W·x + b`, of which each two rows are gate and up of the clamped SwiGLU.
pub(crate) fn reference(weights: &[f64], bias: &[f64], x: &[f64], limit: f64) -> Vec<f64> {
    let sums: Vec<f64> = multiplied(weights, x).zip(bias).map(|(sum, bias)| sum + bias).collect();
    let units = sums.as_chunks::<2>().0.iter().map(|[gate, up]| {
        let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
        gate / (1.0 + (-f64::from(ALPHA) * gate).exp()) * (up + 1.0)
    });
    units.collect()
}

/// Logits with ties, all experts active and few, and values that the clamp changes.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, count, active, embedding_dim, mlp_dim) in
        [(1, 4, 4, 64, 32), (3, 32, 4, 96, 64), (17, 8, 2, 32, 32), (2, 4, 2, 2880, 32), (1, 4, 2, 32, 2880)]
    {
        let mut inputs = Inputs::new(client, embedding_dim as u64);
        let matrix = inputs.mxfp4(count * 2 * mlp_dim, embedding_dim);
        let (bias, limit) = (inputs.f32(count * 2 * mlp_dim, 9.0), 7.0f32);
        let mut logits = inputs.random.values(tokens * count, 4.0);
        logits.iter_mut().skip(count).for_each(|logit| *logit = logit.round());
        let logits = inputs.of(&logits);
        let normed = inputs.f32(tokens * embedding_dim, 1.0);
        let ordered: Vec<f32> = normed.values.iter().map(|&value| value as f32).collect();
        let selected: Vec<(usize, f64)> =
            logits.values.chunks(count).flat_map(|logits| selection(logits, active)).collect();
        let true_hidden = selected.iter().enumerate().flat_map(|(pair, &(expert, _))| {
            let rows = expert * 2 * mlp_dim..(expert + 1) * 2 * mlp_dim;
            let weights = &matrix.values[rows.start * embedding_dim..rows.end * embedding_dim];
            let x = &normed.values[pair / active * embedding_dim..][..embedding_dim];
            side_by_side(&reference(weights, &bias.values[rows], x, limit.into()), mlp_dim)
        });
        let true_hidden: Vec<f64> = true_hidden.collect();
        let (true_ids, true_shares): (Vec<u32>, Vec<f64>) =
            selected.iter().map(|&(expert, share)| (expert as u32, share)).unzip();
        for (group, decoding) in Decoding::with_groups(client) {
            let pairs = tokens * active;
            let [hidden, ids, shares] = [pairs * mlp_dim, pairs, pairs].map(|words| poisoned(client, words));
            let buffers = Buffers {
                logits: &logits.handle,
                normed: &inputs.upload(&side_by_side(&ordered, embedding_dim)),
                codes: &matrix.codes,
                scales: &matrix.scales,
                bias: &bias.handle,
                hidden: &hidden,
                ids: &ids,
                shares: &shares,
            };
            let limit = limit.to_bits();
            let experts = Experts { experts: count, active, embedding_dim, mlp_dim, limit, decoding };
            launch_grouped(client, experts, tokens, &buffers, group);
            let case = |what: &str| {
                format!(
                    "{what}, {tokens} × {active} of {count} experts, {embedding_dim} → {mlp_dim}, {decoding:?}, {}",
                    group.name()
                )
            };
            let near = |what, width, found: &[f32], truth: &[f64]| {
                Comparison::near("gate_up", case(what), width, found, truth, F32)
            };
            found.push(near("hidden", mlp_dim, &read(client, &hidden)?, &true_hidden));
            found.push(near("shares", active, &read(client, &shares)?, &true_shares));
            let ids: Vec<u32> = read(client, &ids)?;
            found.push(Comparison::exact("gate_up", case("ids"), &ids, &true_ids));
        }
    }
    Ok(found)
}
