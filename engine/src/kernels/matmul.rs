//! A dense layer for many tokens: `y = [y +] W·x [+ b]`, with the tiles of `tile`.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read};
use super::group::U4;
use super::linear::multiplied;
use super::tile::{Format, Tile, place, product};
use crate::error::Result;

/// The sizes and parts of a dense layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matmul {
    /// Outputs, an even number.
    pub rows: usize,
    /// Inputs, a multiple of 32.
    pub columns: usize,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether the result is added to what is there.
    pub residual: bool,
}

/// The buffers of a dense layer.
pub struct Buffers<'a> {
    /// bf16 `[rows, columns]`.
    pub weights: &'a Handle,
    /// f32 `[rows]`; any buffer where there is no bias.
    pub bias: &'a Handle,
    /// `[tokens, columns]` in the words of [`super::method::Method`].
    pub x: &'a Handle,
    /// f32 `[tokens, rows]`.
    pub y: &'a Handle,
}

/// Computes `tokens` rows of `y`.
pub fn launch(client: &Client, matmul: Matmul, tokens: usize, buffers: &Buffers<'_>) {
    let tile = Tile::dense(client, matmul.columns, matmul.rows, tokens);
    launch_tiled(client, matmul, tokens, buffers, tile);
}

/// [`launch`] with a tile of one's choice.
pub(crate) fn launch_tiled(
    client: &Client,
    matmul: Matmul,
    tokens: usize,
    buffers: &Buffers<'_>,
    tile: Tile,
) {
    let Matmul { rows, columns, bias, .. } = matmul;
    // SAFETY: lengths are those of the buffers by the caller's contract; what lies past the last token or row is read from
    // those and not written.
    unsafe {
        matmul_kernel::launch_unchecked(
            client,
            CubeCount::Static(rows.div_ceil(tile.rows()) as u32, tokens.div_ceil(tile.tokens) as u32, 1),
            tile.cube_dim(),
            BufferArg::from_raw_parts(buffers.weights.clone(), rows * columns / 8),
            BufferArg::from_raw_parts(buffers.bias.clone(), if bias { rows } else { 1 }),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * tile.method.words(columns) / 4),
            BufferArg::from_raw_parts(buffers.y.clone(), tokens * rows / 2),
            tokens,
            tile.chunks(),
            matmul,
            tile,
        );
    }
}

#[cube(launch_unchecked)]
pub(crate) fn matmul_kernel(
    weights: &[U4],
    bias: &[f32],
    x: &[U4],
    y: &mut [Vector<f32, Const<2>>],
    tokens: usize,
    chunks: usize,
    #[comptime] matmul: Matmul,
    #[comptime] tile: Tile,
) {
    let first_row = CUBE_POS_X as usize * comptime!(tile.rows());
    let first_token = CUBE_POS_Y as usize * comptime!(tile.tokens);
    let mut sources = Shared::<[u32]>::new_slice(comptime!(tile.tokens));
    let mut row = UNIT_POS as usize;
    while row < comptime!(tile.tokens) {
        let token = first_token + row;
        sources[row] = select(token < tokens, token, tokens - 1) as u32;
        row += comptime!(tile.units());
    }
    sync_cube();
    let mut sums = Array::<f32>::new(comptime!(2 * tile.pairs()));
    // There are no scales: any words do.
    product(weights, &sources, x, &sources, &mut sums, 0usize, first_row, chunks, tile);
    #[unroll]
    for pair in 0..comptime!(tile.pairs()) {
        let (token, row) = place(pair, tile);
        let (token, row) = (first_token + token, first_row + row);
        if token < tokens && row < comptime!(matmul.rows) {
            let mut both = Vector::<f32, Const<2>>::empty();
            both.insert(0usize, sums[2 * pair]);
            both.insert(1usize, sums[2 * pair + 1]);
            if comptime!(matmul.bias) {
                both.insert(0usize, both.extract(0usize) + bias[row]);
                both.insert(1usize, both.extract(1usize) + bias[row + 1]);
            }
            let at = token * comptime!(matmul.rows / 2) + row / 2;
            if comptime!(matmul.residual) {
                both += y[at];
            }
            y[at] = both;
        }
    }
}

/// `[y +] W·x [+ b]` of one row.
fn reference(matmul: Matmul, weights: &[f64], bias: &[f64], x: &[f64], y: &[f64]) -> Vec<f64> {
    let value = |(row, sum)| {
        let with_bias = if matmul.bias { sum + bias[row] } else { sum };
        if matmul.residual { with_bias + y[row] } else { with_bias }
    };
    multiplied(weights, x).enumerate().map(value).collect()
}

/// Shapes that fill no tile, with every tile that is ever chosen.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |rows, columns, bias, residual| Matmul { rows, columns, bias, residual };
    let mut found = Vec::new();
    for (matmul, tokens) in [
        (of(2, 64, false, false), 1),
        (of(40, 96, true, false), 3),
        (of(134, 160, false, true), 17),
        (of(264, 2880, true, true), 130),
    ] {
        let Matmul { rows, columns, .. } = matmul;
        let mut inputs = Inputs::new(client, columns as u64);
        let (weights, bias) = (inputs.bf16(rows * columns, 0.1), inputs.f32(rows, 1.0));
        let y = inputs.f32(tokens * rows, 1.0);
        for tile in Tile::all(client, Format::Bf16, columns, rows) {
            let x = inputs.rows(tokens * columns, 1.0, tile.method);
            let written = if matmul.residual { inputs.again(&y) } else { poisoned(client, tokens * rows) };
            let buffers = Buffers { weights: &weights.handle, bias: &bias.handle, x: &x.handle, y: &written };
            launch_tiled(client, matmul, tokens, &buffers, tile);
            let of_rows = x.values.chunks(columns).zip(y.values.chunks(rows));
            let truth: Vec<f64> =
                of_rows.flat_map(|(x, y)| reference(matmul, &weights.values, &bias.values, x, y)).collect();
            let case = format!("{tokens} × {columns} → {rows}, {}", tile.name());
            found.push(Comparison::near("matmul", case, rows, &read(client, &written)?, &truth, F32));
        }
    }
    Ok(found)
}
