//! Copies within and between buffers.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::group::cube_number;

/// Units of a cube.
const UNITS: usize = 256;

/// Copies `words` 32-bit words from word `from_start` of one buffer to word `to_start` of another, or of the same one where the
/// two do not overlap.
pub fn launch(client: &Client, from: &Handle, from_start: usize, to: &Handle, to_start: usize, words: usize) {
    let cubes = words.div_ceil(UNITS) as u32;
    // SAFETY: both ranges lie in their buffers by the caller's contract; units stop at `words`.
    unsafe {
        copy_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes.min(65_535), cubes.div_ceil(65_535), 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(from.clone(), from_start + words),
            BufferArg::from_raw_parts(to.clone(), to_start + words),
            from_start as u32,
            to_start as u32,
            words as u32,
        );
    }
}

#[cube(launch_unchecked)]
fn copy_kernel(from: &[u32], to: &mut [u32], from_start: u32, to_start: u32, words: u32) {
    let at = cube_number() as u32 * comptime!(UNITS as u32) + UNIT_POS;
    if at < words {
        to[(to_start + at) as usize] = from[(from_start + at) as usize];
    }
}
