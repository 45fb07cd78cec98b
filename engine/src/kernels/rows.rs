//! Rows of f32 in the forms that products take them in: words ([`super::method`]) for many rows, transposed blocks for few.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

use super::check::{Comparison, F32, Inputs, read, side_by_side, values_of};
use super::group::{F4, cube_number};
use super::method::{Method, write_pair};
use super::router::transposed;
use crate::error::Result;

/// Units of a cube.
pub(crate) const UNITS: usize = 256;

/// Two f32.
type F2 = Vector<f32, Const<2>>;

/// `values` f32 (an even number) as words, [`Method::words`] of them. f32 words are the rows themselves.
pub fn to_words(client: &Client, method: Method, values: usize, rows: &Handle) -> Handle {
    if method == Method::Units {
        return rows.clone();
    }
    let (pairs, words) = (values / 2, client.empty(values / 2 * size_of::<u32>()));
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at `pairs`.
    unsafe {
        to_words_kernel::launch_unchecked(
            client,
            cubes(pairs),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(rows.clone(), pairs),
            BufferArg::from_raw_parts(words.clone(), pairs),
            pairs,
            method,
        );
    }
    words
}

/// The way back from [`to_words`].
pub fn from_words(client: &Client, method: Method, values: usize, words: &Handle) -> Handle {
    if method == Method::Units {
        return words.clone();
    }
    let (pairs, rows) = (values / 2, client.empty(values * size_of::<f32>()));
    // SAFETY: as for `to_words_kernel`.
    unsafe {
        from_words_kernel::launch_unchecked(
            client,
            cubes(pairs),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(words.clone(), pairs),
            BufferArg::from_raw_parts(rows.clone(), pairs),
            pairs,
            method,
        );
    }
    rows
}

/// `tokens` rows of `columns` f32 (a multiple of 32) in the order in which products with packed rows read them: the blocks of
/// 32 side by side.
pub fn transpose(client: &Client, tokens: usize, columns: usize, rows: &Handle) -> Handle {
    let (quads, to) = (tokens * columns / 4, client.empty(tokens * columns * size_of::<f32>()));
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at `quads`.
    unsafe {
        transpose_kernel::launch_unchecked(
            client,
            cubes(quads),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(rows.clone(), quads),
            BufferArg::from_raw_parts(to.clone(), quads),
            quads,
            columns / 32,
        );
    }
    to
}

/// Cubes with a unit for each item.
pub(crate) fn cubes(items: usize) -> CubeCount {
    let cubes = items.div_ceil(UNITS) as u32;
    CubeCount::Static(cubes.min(65_535), cubes.div_ceil(65_535), 1)
}

/// The item of this unit.
#[cube]
pub(crate) fn item() -> usize {
    cube_number() * UNITS + UNIT_POS as usize
}

#[cube(launch_unchecked)]
fn to_words_kernel(rows: &[F2], words: &mut [u32], pairs: usize, #[comptime] method: Method) {
    let pair = item();
    if pair < pairs {
        let both = rows[pair];
        write_pair(words, pair, both.extract(0usize), both.extract(1usize), method);
    }
}

#[cube(launch_unchecked)]
fn from_words_kernel(words: &[u32], rows: &mut [F2], pairs: usize, #[comptime] method: Method) {
    let pair = item();
    if pair < pairs {
        if comptime!(method == Method::TensorCores) {
            rows[pair] = F2::cast_from(Vector::<bf16, Const<2>>::reinterpret(words[pair]));
        } else {
            rows[pair] = F2::cast_from(Vector::<f16, Const<2>>::reinterpret(words[pair]));
        }
    }
}

#[cube(launch_unchecked)]
fn transpose_kernel(from: &[F4], to: &mut [F4], quads: usize, #[comptime] blocks: usize) {
    let quad = item();
    if quad < quads {
        let of_row = comptime!(blocks * 8);
        to[quad / of_row * of_row + transposed(quad % of_row, blocks)] = from[quad];
    }
}

/// There, back, and transposed.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, columns) in [(1, 32), (17, 96), (3, 2880)] {
        let mut inputs = Inputs::new(client, columns as u64);
        let values = tokens * columns;
        let x = inputs.f32(values, 2.0);
        for method in Method::all(client) {
            let near = |what: &str, found: &[f32]| {
                let case = format!("{what} of {method:?}, {tokens} × {columns}");
                Comparison::near("rows", case, columns, found, &x.values, F32 + method.rounding())
            };
            let words = to_words(client, method, values, &x.handle);
            found.push(near("to words", &values_of(&read(client, &words)?, method)));
            found.push(near("and back", &read(client, &from_words(client, method, values, &words))?));
        }
        let truth: Vec<f32> =
            side_by_side(&x.values, columns).into_iter().map(|value| value as f32).collect();
        let transposed: Vec<f32> = read(client, &transpose(client, tokens, columns, &x.handle))?;
        let case = format!("transposed, {tokens} × {columns}");
        found.push(Comparison::exact("rows", case, &transposed, &truth));
    }
    Ok(found)
}
