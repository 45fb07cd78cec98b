//! Speed of MXFP4 → f32 decoding and of quantising on one core, beside filling and copying the same memory.
//!
//! `cargo run --release -p formats --example decode_speed`

use std::hint::black_box;
use std::time::Instant;

use formats::mxfp4;

/// 1 MiB of f32, so that input and output stay in the cache.
const VALUES: usize = 1 << 18;

fn main() -> anyhow::Result<()> {
    let blocks: Vec<u8> = random().map(|word| word as u8).take(VALUES / 2).collect();
    let scales: Vec<u8> = random().map(|word| 110 + (word % 16) as u8).take(VALUES / 32).collect();
    // Roughly normal, as weights are.
    let weights: Vec<f32> = random()
        .take(VALUES)
        .map(|word| word.to_le_bytes().map(|byte| f32::from(byte) - 127.5).iter().sum())
        .collect();
    let mut out = vec![0.0; VALUES];
    let mut packed = vec![0; VALUES / 2];
    let mut packed_scales = vec![0; VALUES / 32];

    let fill = speed(|round| out.fill(black_box(round as f32)));
    let copy = speed(|_| out.copy_from_slice(black_box(&weights)));
    let decode = speed(|_| {
        black_box(mxfp4::decode(black_box(&blocks), black_box(&scales), black_box(&mut out))).ok();
    });
    let quantize = speed(|_| {
        black_box(mxfp4::quantize_row(black_box(&weights), &mut packed, &mut packed_scales)).ok();
    });

    println!("one core, GB/s of f32 (1 MiB buffers):");
    println!("  fill      {fill:6.2}");
    println!("  copy      {copy:6.2}");
    println!("  decode    {decode:6.2}  ({:.2} of fill, {:.2} of copy)", decode / fill, decode / copy);
    println!("  quantise  {quantize:6.2}");
    Ok(())
}

/// GB/s of the best of several rounds of `work`, which handles `VALUES` f32.
fn speed(mut work: impl FnMut(usize)) -> f64 {
    const REPEATS: usize = 64;
    let best = (0..9)
        .map(|_| {
            let start = Instant::now();
            (0..REPEATS).for_each(&mut work);
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    (REPEATS * VALUES * size_of::<f32>()) as f64 / best / 1e9
}

/// xorshift64.
fn random() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(0x9e37_79b9_7f4a_7c15_u64), |&state| {
        let state = state ^ state << 13;
        let state = state ^ state >> 7;
        Some(state ^ state << 17)
    })
}
