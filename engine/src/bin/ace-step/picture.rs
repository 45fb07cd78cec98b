//! A mel spectrogram as a picture.

use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use formats::output::Output;

/// Picture rows for each band.
const SCALE: usize = 2;

/// Dark violet over red to pale yellow: brightness grows with the value, so it reads without colours, too.
const COLOURS: [[f32; 3]; 6] = [
    [0.0, 0.0, 4.0],
    [66.0, 10.0, 104.0],
    [147.0, 38.0, 103.0],
    [221.0, 81.0, 58.0],
    [252.0, 165.0, 10.0],
    [252.0, 255.0, 164.0],
];

/// Writes channels of log-mel bands, `[channel][band][frame]`, one above the other, low bands below.
///
/// The scale runs from the smallest to the largest value.
pub fn write(path: &Path, channels: &[Vec<Vec<f32>>]) -> Result<()> {
    let frames = channels.first().and_then(|bands| bands.first()).map_or(0, Vec::len);
    let rows: usize = channels.iter().map(Vec::len).sum();
    ensure!(frames > 0 && rows > 0, "no spectrogram to draw");
    let values = || channels.iter().flatten().flatten().copied().filter(|value| value.is_finite());
    let (low, high) = values().fold((f32::MAX, f32::MIN), |(low, high), v| (low.min(v), high.max(v)));
    let mut pixels = Vec::with_capacity(frames * rows * SCALE * 3);
    for bands in channels {
        for band in bands.iter().rev() {
            let row: Vec<u8> =
                band.iter().flat_map(|&v| colour((v - low) / (high - low).max(1e-9))).collect();
            (0..SCALE).for_each(|_| pixels.extend_from_slice(&row));
        }
    }
    let output = Output::create(path)?;
    let (width, height) = (u32::try_from(frames)?, u32::try_from(rows * SCALE)?);
    let mut encoder = png::Encoder::new(BufWriter::new(output.file()), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| {
        writer.write_image_data(&pixels)?;
        writer.finish()
    });
    written.with_context(|| path.display().to_string())?;
    Ok(output.finish()?)
}

/// The colour of a value from 0 to 1.
fn colour(value: f32) -> [u8; 3] {
    let place = value.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f32;
    let below = (place as usize).min(COLOURS.len() - 2);
    let part = place - below as f32;
    std::array::from_fn(|i| (COLOURS[below][i] * (1.0 - part) + COLOURS[below + 1][i] * part).round() as u8)
}
