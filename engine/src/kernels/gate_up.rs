//! The first half of the selected experts: gate and up projections in MXFP4, their biases, and the clamped SwiGLU.
//!
//! Gate and up of a hidden unit are neighbouring rows, which one group of lanes computes. The experts' ids are chosen here, on the
//! device, from the router's logits.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::group::{F4, Group, U4, group_sum};
use super::mxfp4_dot::{Decoding, Packed, dot_packed};
use super::router::{select_expert, transposed};

/// Hidden units that a group computes at a time.
const UNITS: usize = 2;
/// Groups in a cube.
const GROUPS: u32 = 4;
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
    let Experts { experts: count, active, embedding_dim, mlp_dim, .. } = experts;
    let group = Group::of(client);
    let packed = Packed { blocks: embedding_dim / 32, rows: 2 * UNITS, decoding: experts.decoding, group };
    let blocks = count * 2 * mlp_dim * packed.blocks;
    // SAFETY: lengths are those of the buffers by the caller's contract; `mlp_dim` is a multiple of 32, so that cubes cover it
    // exactly, and ids are below `experts`.
    unsafe {
        gate_up_kernel::launch_unchecked(
            client,
            CubeCount::Static((mlp_dim / (UNITS * GROUPS as usize)) as u32, active as u32, tokens as u32),
            CubeDim::new_2d(group.lanes, GROUPS),
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
    let unit = (CUBE_POS_X as usize * comptime!(GROUPS as usize) + UNIT_POS_Y as usize) * UNITS;
    let first_row = (expert * mlp_dim + unit) * 2;
    let mut sums = Array::<f32>::new(comptime!(2 * UNITS));
    let first_x = token * comptime!(experts.embedding_dim / 4);
    dot_packed(codes, scales, x, &mut sums, first_row, first_x, packed);
    #[unroll]
    for u in 0..UNITS {
        let gate = group_sum(sums[2 * u], comptime!(packed.group), GROUPS);
        let up = group_sum(sums[2 * u + 1], comptime!(packed.group), GROUPS);
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
