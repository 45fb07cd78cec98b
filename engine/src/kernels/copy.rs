//! Copies within and between buffers, and how fast the device copies.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, Inputs, read};
use super::group::U4;
use super::rows::{UNITS, cubes, item};
use crate::backend::sync;
use crate::error::Result;

/// Copies `words` 32-bit words from word `from_start` of one buffer to word `to_start` of another, or of the same one where the
/// two do not overlap.
pub fn launch(client: &Client, from: &Handle, from_start: usize, to: &Handle, to_start: usize, words: usize) {
    // SAFETY: both ranges lie in their buffers by the caller's contract; units stop at `words`.
    unsafe {
        copy_kernel::launch_unchecked(
            client,
            cubes(words),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(from.clone(), from_start + words),
            BufferArg::from_raw_parts(to.clone(), to_start + words),
            from_start as u32,
            to_start as u32,
            words as u32,
        );
    }
}

/// Bytes per second that a copy of 16 bytes a unit reads and writes, the median of five: the roofline of kernels that read weights.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) where the device fails.
pub fn rate(client: &Client) -> Result<f64> {
    // Far more than caches hold; software devices are slow.
    let is_small = client.properties().memory.max_memory().is_none_or(|bytes| bytes < 8 << 30);
    let bytes: usize = if is_small { 32 << 20 } else { 512 << 20 };
    let [from, to] = [client.empty(bytes), client.empty(bytes)];
    let (quads, repeats) = (bytes / 16, 10);
    let copy = || {
        // SAFETY: both buffers have so many quads; units stop at their end.
        unsafe {
            stream_kernel::launch_unchecked(
                client,
                cubes(quads),
                CubeDim::new_1d(UNITS as u32),
                BufferArg::from_raw_parts(from.clone(), quads),
                BufferArg::from_raw_parts(to.clone(), quads),
                quads,
            );
        }
    };
    copy();
    let mut rates = Vec::new();
    for _ in 0..5 {
        sync(client)?;
        let start = std::time::Instant::now();
        (0..repeats).for_each(|_| copy());
        sync(client)?;
        rates.push((2 * bytes * repeats) as f64 / start.elapsed().as_secs_f64());
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[2])
}

#[cube(launch_unchecked)]
fn stream_kernel(from: &[U4], to: &mut [U4], quads: usize) {
    let at = item();
    if at < quads {
        to[at] = from[at];
    }
}

#[cube(launch_unchecked)]
fn copy_kernel(from: &[u32], to: &mut [u32], from_start: u32, to_start: u32, words: u32) {
    let at = item() as u32;
    if at < words {
        to[(to_start + at) as usize] = from[(from_start + at) as usize];
    }
}

/// What `to` is afterwards.
fn reference(from: &[u32], from_start: usize, to: &[u32], to_start: usize, words: usize) -> Vec<u32> {
    let mut to = to.to_vec();
    to[to_start..to_start + words].copy_from_slice(&from[from_start..from_start + words]);
    to
}

/// From and to the middle of buffers, within one, and more than one axis of cubes can count.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (words, from_start, to_start) in [(1, 0, 0), (257, 3, 5), (65_535 * UNITS + 300, 1, 0)] {
        let inputs = Inputs::new(client, 0);
        let from: Vec<u32> = (0..(from_start + words + 7) as u32).map(|at| at.wrapping_mul(40_503)).collect();
        let to: Vec<u32> = (0..(to_start + words + 9) as u32).map(|at| !at).collect();
        let written = inputs.upload(&to);
        launch(client, &inputs.upload(&from), from_start, &written, to_start, words);
        let truth = reference(&from, from_start, &to, to_start, words);
        let case = format!("{words} words from {from_start} to {to_start}");
        found.push(Comparison::exact("copy", case, &read(client, &written)?, &truth));
    }
    let words: Vec<u32> = (0..1000).collect();
    let written = Inputs::new(client, 0).upload(&words);
    launch(client, &written, 600, &written, 100, 300);
    let truth = reference(&words, 600, &words, 100, 300);
    found.push(Comparison::exact("copy", "within a buffer".into(), &read(client, &written)?, &truth));
    Ok(found)
}
