//! The rows of a bf16 table by numbers that are on the device.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::dense::{high, low};

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
