//! The rows of a bf16 table by numbers that are on the device.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, Inputs, poisoned, read};
use super::dense::{high, low};
use crate::error::Result;

/// Units of a cube.
const UNITS: usize = 256;

/// Reads the rows of `tokens` (u32 `[count]`, each less than `vocabulary`) of `table` (bf16 `[vocabulary, width]`, `width` even)
/// into `x` (f32 `[count, width]`).
pub fn launch(
    client: &Client,
    table: &Handle,
    tokens: &Handle,
    x: &Handle,
    vocabulary: usize,
    width: usize,
    count: usize,
) {
    // SAFETY: lengths are those of the buffers and ids are below `vocabulary` by the caller's contract.
    unsafe {
        embedding_kernel::launch_unchecked(
            client,
            CubeCount::Static((width / 2).div_ceil(UNITS) as u32, count as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(table.clone(), vocabulary * width / 2),
            BufferArg::from_raw_parts(tokens.clone(), count),
            BufferArg::from_raw_parts(x.clone(), count * width),
            width / 2,
        );
    }
}

#[cube(launch_unchecked)]
fn embedding_kernel(table: &[u32], tokens: &[u32], x: &mut [f32], #[comptime] pairs: usize) {
    let at = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let row = CUBE_POS_Y as usize;
    if at < pairs {
        let word = table[tokens[row] as usize * pairs + at];
        x[(row * pairs + at) * 2] = low(word);
        x[(row * pairs + at) * 2 + 1] = high(word);
    }
}

/// The rows of `tokens`.
fn reference(table: &[f64], tokens: &[u32], width: usize) -> Vec<f32> {
    let row = |&token: &u32| &table[token as usize * width..][..width];
    tokens.iter().flat_map(row).map(|&value| value as f32).collect()
}

/// Rows narrower and wider than a cube, the first and the last among them.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (vocabulary, width, count) in [(2, 2, 1), (300, 64, 130), (1000, 2880, 17)] {
        let mut inputs = Inputs::new(client, width as u64);
        let table = inputs.bf16(vocabulary * width, 1.0);
        let mut tokens = inputs.random.numbers(count, vocabulary);
        tokens[0] = 0;
        tokens[count - 1] = vocabulary as u32 - 1;
        let x = poisoned(client, count * width);
        launch(client, &table.handle, &inputs.upload(&tokens), &x, vocabulary, width, count);
        let truth = reference(&table.values, &tokens, width);
        let case = format!("{count} of {vocabulary} × {width}");
        found.push(Comparison::exact("embedding", case, &read(client, &x)?, &truth));
    }
    Ok(found)
}
