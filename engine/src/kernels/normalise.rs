//! RMSNorm of many rows, written in the precision of the products that follow ([`super::method`]).

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read, values_of};
use super::group::F4;
use super::linear::inverse_rms;
use super::method::{Method, write_pair};
use crate::error::Result;

/// Units of a cube.
const UNITS: usize = 256;

/// The sizes of the norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Normalise {
    /// Width of a row, a multiple of 4.
    pub columns: usize,
    /// The bits of ε.
    pub epsilon: u32,
}

/// Normalises `tokens` rows of `x` (f32 `[tokens, columns]`), times `norm` (f32 `[columns]`), into `y`
/// ([`Method::words`] of `[tokens, columns]`).
pub fn launch(client: &Client, normalise: Normalise, tokens: usize, x: &Handle, norm: &Handle, y: &Handle) {
    launch_for(client, normalise, tokens, x, norm, y, Method::of(client));
}

/// [`launch`] for a method of one's choice.
pub(crate) fn launch_for(
    client: &Client,
    normalise: Normalise,
    tokens: usize,
    x: &Handle,
    norm: &Handle,
    y: &Handle,
    method: Method,
) {
    let quads = normalise.columns / 4;
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at the end of a row.
    unsafe {
        normalise_kernel::launch_unchecked(
            client,
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(x.clone(), tokens * quads),
            BufferArg::from_raw_parts(norm.clone(), quads),
            BufferArg::from_raw_parts(y.clone(), tokens * method.words(normalise.columns)),
            normalise,
            method,
        );
    }
}

#[cube(launch_unchecked)]
fn normalise_kernel(
    x: &[F4],
    norm: &[F4],
    y: &mut [u32],
    #[comptime] normalise: Normalise,
    #[comptime] method: Method,
) {
    let unit = UNIT_POS as usize;
    let quads = comptime!(normalise.columns / 4);
    let first = CUBE_POS_X as usize * quads;
    let mut sum = 0.0f32;
    let mut quad = unit;
    while quad < quads {
        let value = x[first + quad];
        #[unroll]
        for i in 0..4usize {
            sum += value.extract(i) * value.extract(i);
        }
        quad += UNITS;
    }
    let mut squares = Shared::<[f32]>::new_slice(UNITS);
    squares[unit] = sum;
    let mut step = comptime!(UNITS / 2).runtime();
    while step > 0 {
        sync_cube();
        if unit < step {
            squares[unit] += squares[unit + step];
        }
        step /= 2;
    }
    sync_cube();
    let inverse = inverse_rms(squares[0], comptime!(normalise.columns), comptime!(normalise.epsilon));
    let mut quad = unit;
    while quad < quads {
        let value = x[first + quad] * norm[quad] * F4::new(inverse);
        #[unroll]
        for i in 0..2usize {
            let (one, other) = (value.extract(comptime!(2 * i)), value.extract(comptime!(2 * i + 1)));
            write_pair(y, (first + quad) * 2 + i, one, other, method);
        }
        quad += UNITS;
    }
}

/// `x / sqrt(mean(x²) + ε) · norm` of one row.
pub(crate) fn reference(x: &[f64], norm: &[f64], epsilon: u32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let root = (mean + f64::from(f32::from_bits(epsilon))).sqrt();
    x.iter().zip(norm).map(|(x, scale)| x / root * scale).collect()
}

/// Rows narrower and wider than a cube, large values, and values so small that ε matters.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, columns, scale) in [(1, 4, 1.0), (3, 64, 1e-2), (17, 2880, 2.0), (130, 96, 1e4)] {
        let mut inputs = Inputs::new(client, columns as u64);
        let (x, norm) = (inputs.f32(tokens * columns, scale), inputs.f32(columns, 2.0));
        let epsilon = 1e-5f32.to_bits();
        let rows = x.values.chunks(columns);
        let truth: Vec<f64> = rows.flat_map(|x| reference(x, &norm.values, epsilon)).collect();
        for method in Method::all(client) {
            let y = poisoned(client, method.words(tokens * columns));
            let normalise = Normalise { columns, epsilon };
            launch_for(client, normalise, tokens, &x.handle, &norm.handle, &y, method);
            let y = values_of(&read(client, &y)?, method);
            let case = format!("{tokens} × {columns}, up to {scale}, rows for {method:?}");
            found.push(Comparison::near("normalise", case, columns, &y, &truth, method.rounding() + F32));
        }
    }
    Ok(found)
}
