//! A dense layer for few tokens: `y = [y +] W·norm(x) [+ b]`.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read};
use super::dense::{ROWS, Shape, dot_rows};
use super::group::{F4, Group, U4, cube_number, group_sum};
use super::normalise;
use crate::error::Result;

/// Rows from which on cubes are larger.
const MANY: usize = 65_536;

/// The sizes and parts of a dense layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Outputs, an even number.
    pub rows: usize,
    /// Inputs, a multiple of 8.
    pub columns: usize,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether the result is added to what is there.
    pub residual: bool,
    /// The bits of ε where the input is normalised.
    pub epsilon: Option<u32>,
}

/// The buffers of a dense layer.
pub struct Buffers<'a> {
    /// bf16 `[rows, columns]`.
    pub weights: &'a Handle,
    /// f32 `[rows]`; any buffer where there is no bias.
    pub bias: &'a Handle,
    /// f32 `[columns]`; any buffer where there is no norm.
    pub norm: &'a Handle,
    /// f32 `[tokens, columns]`.
    pub x: &'a Handle,
    /// f32 `[tokens, rows]`.
    pub y: &'a Handle,
}

/// Computes `tokens` rows of `y`.
pub fn launch(client: &Client, linear: Linear, tokens: usize, buffers: &Buffers<'_>) {
    launch_grouped(client, linear, tokens, buffers, Group::of(client));
}

/// [`launch`] with a group of one's choice.
fn launch_grouped(client: &Client, linear: Linear, tokens: usize, buffers: &Buffers<'_>, group: Group) {
    let Linear { rows, columns, bias, residual, epsilon } = linear;
    // Small cubes spread evenly where there are few.
    let (groups, unroll) = if rows > MANY { (4, 6) } else { (1, 8) };
    let chunks = columns / 8;
    let (group, factor) = group.for_parts(chunks);
    let groups = groups * factor;
    let per_cube = ROWS * groups as usize;
    let shape = Shape { chunks, tokens, normed: epsilon.is_some(), unroll, group }.fitted();
    let cubes = rows.div_ceil(per_cube) as u32;
    let count = |present: bool, values: usize| if present { values } else { 1 };
    // SAFETY: lengths are those of the buffers by the caller's contract; rows past the end are not read or written.
    unsafe {
        linear_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes.min(65_535), cubes.div_ceil(65_535), 1),
            CubeDim::new_2d(group.lanes, groups),
            BufferArg::from_raw_parts(buffers.weights.clone(), rows * chunks),
            BufferArg::from_raw_parts(buffers.bias.clone(), count(bias, rows)),
            BufferArg::from_raw_parts(buffers.norm.clone(), count(epsilon.is_some(), chunks * 2)),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * chunks * 2),
            BufferArg::from_raw_parts(buffers.y.clone(), tokens * rows),
            rows,
            bias,
            residual,
            epsilon.unwrap_or(0),
            shape,
            groups,
        );
    }
}

#[cube(launch_unchecked)]
fn linear_kernel(
    weights: &[U4],
    bias: &[f32],
    norm: &[F4],
    x: &[F4],
    y: &mut [f32],
    #[comptime] rows: usize,
    #[comptime] with_bias: bool,
    #[comptime] residual: bool,
    #[comptime] epsilon: u32,
    #[comptime] shape: Shape,
    #[comptime] groups: u32,
) {
    let group = cube_number() * comptime!(groups as usize) + UNIT_POS_Y as usize;
    let row = group * ROWS;
    // The last groups repeat the last rows, for all units of a cube must meet.
    let row = select(row + ROWS <= rows, row, comptime!(rows - ROWS));
    let mut sums = Array::<f32>::new(comptime!(ROWS * shape.tokens));
    let mut squares = Array::<f32>::new(shape.tokens);
    dot_rows(weights, x, norm, &mut sums, &mut squares, row, shape);
    #[unroll]
    for t in 0..comptime!(shape.tokens) {
        let mut factor = 1.0f32;
        if comptime!(shape.normed) {
            factor = inverse_rms(
                group_sum(squares[t], comptime!(shape.group), groups),
                comptime!(shape.chunks * 8),
                epsilon,
            );
        }
        #[unroll]
        for r in 0..ROWS {
            let total = group_sum(sums[t * ROWS + r], comptime!(shape.group), groups);
            if UNIT_POS_X == 0 && group * ROWS + ROWS <= rows {
                let mut value = total * factor;
                if comptime!(with_bias) {
                    value += bias[row + r];
                }
                if comptime!(residual) {
                    value += y[t * rows + row + r];
                }
                y[t * rows + row + r] = value;
            }
        }
    }
}

/// `1 / sqrt(squares / width + ε)`.
#[cube]
pub(crate) fn inverse_rms(squares: f32, #[comptime] width: usize, #[comptime] epsilon: u32) -> f32 {
    let mean = squares * comptime!(1.0 / width as f32) + comptime!(f32::from_bits(epsilon));
    1.0f32 / mean.sqrt()
}

/// `W·x`.
pub(crate) fn multiplied<'a>(weights: &'a [f64], x: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
    weights.chunks(x.len()).map(move |row| row.iter().zip(x).map(|(weight, x)| weight * x).sum())
}

/// `[y +] W·norm(x) [+ b]` of one row.
fn reference(linear: Linear, weights: &[f64], bias: &[f64], norm: &[f64], x: &[f64], y: &[f64]) -> Vec<f64> {
    let x = linear.epsilon.map_or_else(|| x.to_vec(), |epsilon| normalise::reference(x, norm, epsilon));
    let value = |(row, sum)| {
        let with_bias = if linear.bias { sum + bias[row] } else { sum };
        if linear.residual { with_bias + y[row] } else { with_bias }
    };
    multiplied(weights, &x).enumerate().map(value).collect()
}

/// Every part by itself and all together, for rows shorter than a group and so many that cubes are larger.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |rows, columns, bias, residual, normed: bool| Linear {
        rows,
        columns,
        bias,
        residual,
        epsilon: normed.then_some(1e-5f32.to_bits()),
    };
    let mut found = Vec::new();
    for (linear, tokens) in [
        (of(2, 8, false, false, false), 1),
        (of(40, 360, true, false, true), 2),
        (of(94, 2880, true, true, false), 3),
        (of(72, 4096, false, true, true), 1),
        (of(MANY + 10, 32, false, false, true), 1),
    ] {
        let Linear { rows, columns, .. } = linear;
        let mut inputs = Inputs::new(client, columns as u64);
        let (weights, bias) = (inputs.bf16(rows * columns, 0.1), inputs.f32(rows, 1.0));
        let (norm, x) = (inputs.f32(columns, 2.0), inputs.f32(tokens * columns, 2.0));
        let y = inputs.f32(tokens * rows, 1.0);
        let of_rows = x.values.chunks(columns).zip(y.values.chunks(rows));
        let truth: Vec<f64> = of_rows
            .flat_map(|(x, y)| reference(linear, &weights.values, &bias.values, &norm.values, x, y))
            .collect();
        for group in Group::all(client) {
            let written = if linear.residual { inputs.again(&y) } else { poisoned(client, tokens * rows) };
            let buffers = Buffers {
                weights: &weights.handle,
                bias: &bias.handle,
                norm: &norm.handle,
                x: &x.handle,
                y: &written,
            };
            launch_grouped(client, linear, tokens, &buffers, group);
            let case = format!("{tokens} × {columns} → {rows}, {}", group.name());
            found.push(Comparison::near("linear", case, rows, &read(client, &written)?, &truth, F32));
        }
    }
    Ok(found)
}
