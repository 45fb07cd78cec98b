//! A dense layer whose one matrix is MXFP4: `y = W·x + b`.
//!
//! Few rows of `x` meet the packed rows one by one, in f32, and every weight is read once for each of them. Many are the case of
//! [`super::grouped`] with a single expert, in the precision of [`Method`].

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read};
use super::group::{F4, Group, U4, group_sum};
use super::grouped::{self, Grouped};
use super::linear::multiplied;
use super::method::Method;
use super::mxfp4_dot::{Decoding, Packed, dot_packed};
use super::rows;
use crate::error::Result;

/// Rows of `x` that are few: beyond them tiles read fewer weights than they pad rows.
pub const FEW: usize = 4;
/// Rows of the matrix that a group sums at a time.
const ROWS: usize = 4;
/// Groups in a cube.
const GROUPS: u32 = 4;

/// The sizes of the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mxfp4Linear {
    /// Outputs, a multiple of 32.
    pub rows: usize,
    /// Inputs, a multiple of 32.
    pub columns: usize,
    /// How the device decodes MXFP4.
    pub decoding: Decoding,
}

/// The buffers of the layer.
pub struct Buffers<'a> {
    /// MXFP4 codes `[rows, columns]`.
    pub codes: &'a Handle,
    /// Their stored scales.
    pub scales: &'a Handle,
    /// f32 `[rows]`.
    pub bias: &'a Handle,
    /// f32 `[tokens, columns]`.
    pub x: &'a Handle,
    /// f32 `[tokens, rows]`.
    pub y: &'a Handle,
}

/// Computes `tokens` rows of `y`.
pub fn launch(client: &Client, linear: Mxfp4Linear, tokens: usize, buffers: &Buffers<'_>) {
    // There is a cube for each of so many rows, and devices allow 65535 on an axis.
    if tokens <= FEW && linear.rows <= 65_535 * ROWS * GROUPS as usize {
        few(client, linear, tokens, buffers);
    } else {
        many(client, linear, tokens, buffers);
    }
}

fn few(client: &Client, linear: Mxfp4Linear, tokens: usize, buffers: &Buffers<'_>) {
    let Mxfp4Linear { rows, columns, decoding } = linear;
    let x = rows::transpose(client, tokens, columns, buffers.x);
    let group = Group::of(client);
    let packed = Packed { blocks: columns / 32, rows: ROWS, ahead: 1, decoding, group };
    let blocks = rows * packed.blocks;
    // SAFETY: lengths are those of the buffers by the caller's contract; `rows` is a multiple of 32, so that cubes cover them
    // exactly.
    unsafe {
        few_kernel::launch_unchecked(
            client,
            CubeCount::Static((rows / (ROWS * GROUPS as usize)) as u32, tokens as u32, 1),
            CubeDim::new_2d(group.lanes, GROUPS),
            BufferArg::from_raw_parts(buffers.codes.clone(), blocks),
            BufferArg::from_raw_parts(buffers.scales.clone(), blocks / 4),
            BufferArg::from_raw_parts(x, tokens * columns / 4),
            BufferArg::from_raw_parts(buffers.bias.clone(), rows),
            BufferArg::from_raw_parts(buffers.y.clone(), tokens * rows),
            rows,
            packed,
        );
    }
}

#[cube(launch_unchecked)]
fn few_kernel(
    codes: &[U4],
    scales: &[u32],
    x: &[F4],
    bias: &[f32],
    y: &mut [f32],
    rows: usize,
    #[comptime] packed: Packed,
) {
    let token = CUBE_POS_Y as usize;
    let row = (CUBE_POS_X as usize * comptime!(GROUPS as usize) + UNIT_POS_Y as usize) * ROWS;
    let mut sums = Array::<f32>::new(ROWS);
    dot_packed(codes, scales, x, &mut sums, row, token * comptime!(packed.blocks * 8), packed);
    #[unroll]
    for r in 0..ROWS {
        let total = group_sum(sums[r], comptime!(packed.group), GROUPS);
        if UNIT_POS_X == 0 {
            y[token * rows + row + r] = total + bias[row + r];
        }
    }
}

fn many(client: &Client, linear: Mxfp4Linear, tokens: usize, buffers: &Buffers<'_>) {
    let Mxfp4Linear { rows, columns, .. } = linear;
    let words = rows::to_words(client, Method::of(client), tokens * columns, buffers.x);
    // An expert that every token selects: each pair is a token, and their order is that of tokens.
    let grouped = Grouped { experts: 1, active: 1, embedding_dim: rows, mlp_dim: columns, limit: 0 };
    let of_tile = grouped.pairs_of_tile(client, tokens);
    let order: Vec<u32> = (0..tokens as u32).collect();
    let tile = |first: usize| [0, first as u32, of_tile.min(tokens - first) as u32, 0];
    let tiles: Vec<u32> = (0..tokens).step_by(of_tile).flat_map(tile).collect();
    let [order, uploaded] =
        [&order, &tiles].map(|values| client.create_from_slice(bytemuck::cast_slice(values)));
    let buffers = grouped::Buffers {
        x: &words,
        order: &order,
        tiles: &uploaded,
        codes: buffers.codes,
        scales: buffers.scales,
        bias: buffers.bias,
        y: buffers.y,
    };
    grouped::down(client, grouped, tokens, tiles.len() / 4, &buffers);
}

/// Rows of `x` one by one and in tiles, of which the last is not full.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, rows, columns) in [(1, 64, 2880), (FEW, 96, 32), (FEW + 1, 32, 64), (70, 160, 96)] {
        let mut inputs = Inputs::new(client, tokens as u64);
        let matrix = inputs.mxfp4(rows, columns);
        let (x, bias) = (inputs.f32(tokens * columns, 1.0), inputs.f32(rows, 1.0));
        let y = poisoned(client, tokens * rows);
        let buffers =
            Buffers { codes: &matrix.codes, scales: &matrix.scales, bias: &bias.handle, x: &x.handle, y: &y };
        launch(client, Mxfp4Linear { rows, columns, decoding: Decoding::of(client) }, tokens, &buffers);
        let truth: Vec<f64> = x
            .values
            .chunks(columns)
            .flat_map(|x| multiplied(&matrix.values, x).zip(&bias.values).map(|(sum, bias)| sum + bias))
            .collect();
        let bound = if tokens <= FEW { F32 } else { F32 + Method::of(client).rounding() };
        let case = format!("{tokens} × {columns} × {rows}");
        found.push(Comparison::near("mxfp4_linear", case, rows, &read(client, &y)?, &truth, bound));
    }
    Ok(found)
}
