//! RMSNorm of many rows, written in the precision of the products that follow ([`super::method`]).

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::group::F4;
use super::linear::inverse_rms;
use super::method::{Method, write_pair};

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
    let (quads, method) = (normalise.columns / 4, Method::of(client));
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
