//! Other sample rates, by the windowed sinc of torchaudio (`torchaudio.functional.resample` with its defaults).

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Zero crossings of the filter on each side.
const LOWPASS_WIDTH: f64 = 6.0;
/// The part of the lower rate's band that is kept.
const ROLLOFF: f64 = 0.99;

/// The most samples a second that a rate may have: far above any recording's.
const HIGHEST_RATE: u32 = 1 << 20;
/// The most taps of all filters together. Rates that share no factor have a filter for each sample of a second.
const MOST_TAPS: usize = 1 << 24;

/// Samples at another rate: `⌈samples · to / from⌉` of them.
///
/// # Errors
/// [`Error::Argument`] for a rate of zero or above 1,048,576, and for one so far from the other that its filters would be
/// millions of samples wide.
pub fn resample(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>> {
    let refuse = |needed: &str| {
        Err(Error::Argument {
            operation: "resampling",
            argument: "rate",
            found: format!("{from} and {to} samples a second"),
            needed: needed.into(),
        })
    };
    let is_rate = |rate: u32| (1..=HIGHEST_RATE).contains(&rate);
    if !is_rate(from) || !is_rate(to) {
        return refuse("1 to 1048576");
    }
    if from == to || samples.is_empty() {
        return Ok(samples.to_vec());
    }
    let common = greatest_common_divisor(from, to);
    let (from, to) = ((from / common) as usize, (to / common) as usize);
    let width = Filters::width(from, to);
    // The window is zero from `width` samples on at both sides.
    if to.saturating_mul(2 * width + 1) > MOST_TAPS {
        return refuse("rates nearer to each other");
    }
    let filters = Filters::new(from, to);
    let length = (samples.len() * to).div_ceil(from);
    let sample = |index: usize| {
        let (frame, phase) = (index / to * from, index % to);
        let (first, taps) = &filters.taps[phase];
        // Of the filters' taps, the first lies `width` samples before the frame.
        let products = taps.iter().enumerate().filter_map(|(tap, filter)| {
            let at = (frame + first + tap).checked_sub(filters.width)?;
            Some(samples.get(at)? * filter)
        });
        products.sum::<f32>()
    };
    Ok((0..length).into_par_iter().map(sample).collect())
}

/// The filter at each place of a result between two frames.
struct Filters {
    /// Of each filter, the number of its first tap within the window, and its taps there.
    taps: Vec<(usize, Vec<f32>)>,
    width: usize,
}

impl Filters {
    fn width(from: usize, to: usize) -> usize {
        (LOWPASS_WIDTH * from as f64 / (from.min(to) as f64 * ROLLOFF)).ceil() as usize
    }

    fn new(from: usize, to: usize) -> Filters {
        let cutoff = from.min(to) as f64 * ROLLOFF;
        let width = Filters::width(from, to);
        let scale = cutoff / from as f64;
        let taps = (0..to).map(|phase| {
            let tap = |tap: usize| {
                let place = (tap as f64 - width as f64) / from as f64 - phase as f64 / to as f64;
                let time = (place * cutoff).clamp(-LOWPASS_WIDTH, LOWPASS_WIDTH);
                let window = (time * std::f64::consts::PI / LOWPASS_WIDTH / 2.0).cos().powi(2);
                let angle = time * std::f64::consts::PI;
                let sinc = if angle == 0.0 { 1.0 } else { angle.sin() / angle };
                (sinc * window * scale) as f32
            };
            // The middle lies this far behind the frame.
            let first = phase * from / to;
            let end = (first + 2 * width + 2).min(2 * width + from);
            (first, (first..end).map(tap).collect())
        });
        Filters { taps: taps.collect(), width }
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
