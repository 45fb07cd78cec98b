//! Other sample rates, by the windowed sinc of torchaudio (`torchaudio.functional.resample` with its defaults).

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Zero crossings of the filter on each side.
const LOWPASS_WIDTH: f64 = 6.0;
/// The part of the lower rate's band that is kept.
const ROLLOFF: f64 = 0.99;

/// Samples at another rate: `⌈samples · to / from⌉` of them.
///
/// # Errors
/// [`Error::Argument`] for a rate of zero.
pub fn resample(samples: &[f32], from: u32, to: u32) -> Result<Vec<f32>> {
    if from == 0 || to == 0 {
        return Err(Error::Argument {
            operation: "resampling",
            argument: "rate",
            found: format!("{from} and {to} samples a second"),
            needed: "1 at least".into(),
        });
    }
    if from == to || samples.is_empty() {
        return Ok(samples.to_vec());
    }
    let common = greatest_common_divisor(from, to);
    let (from, to) = ((from / common) as usize, (to / common) as usize);
    let filters = Filters::new(from, to);
    let length = (samples.len() * to).div_ceil(from);
    let sample = |index: usize| {
        // Of the filters' taps, the first lies `width` samples before the frame.
        let (frame, phase) = (index / to * from, index % to);
        let taps = filters.taps[phase].iter().enumerate();
        let products = taps.filter_map(|(tap, filter)| {
            let at = (frame + tap).checked_sub(filters.width)?;
            Some(samples.get(at)? * filter)
        });
        products.sum::<f32>()
    };
    Ok((0..length).into_par_iter().map(sample).collect())
}

/// The filter at each place of a result between two frames.
struct Filters {
    taps: Vec<Vec<f32>>,
    width: usize,
}

impl Filters {
    fn new(from: usize, to: usize) -> Filters {
        let cutoff = from.min(to) as f64 * ROLLOFF;
        let width = (LOWPASS_WIDTH * from as f64 / cutoff).ceil() as usize;
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
            (0..2 * width + from).map(tap).collect()
        });
        Filters { taps: taps.collect(), width }
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
