//! The angles by which rotary position embeddings turn: plain RoPE's, and YaRN's (Peng et al. 2023, arXiv:2309.00071).

/// Angles per position for each pair, and the factor by which YaRN lengthens what it rotates.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians per position, one for each of the `head_dim / 2` pairs.
    pub inverse: Vec<f64>,
    /// YaRN's concentration, 1 without it.
    pub concentration: f64,
}

/// The YaRN fields of a `model.bin` header, under its names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// `1 / scaling_factor`.
    pub interpolation_scale: f64,
    /// `−low / (high − low)` of the ramp over pair indices.
    pub yarn_offset: f64,
    /// `1 / (high − low)` of the ramp.
    pub yarn_scale: f64,
    /// The concentration.
    pub yarn_multiplier: f64,
}

impl Frequencies {
    /// Plain RoPE: `θ^(−2i / head_dim)`.
    pub fn plain(rope_theta: f64, head_dim: usize) -> Frequencies {
        let inverse = (0..head_dim / 2).map(|i| rope_theta.powf(-2.0 * i as f64 / head_dim as f64));
        Frequencies { inverse: inverse.collect(), concentration: 1.0 }
    }

    /// YaRN: interpolated below the ramp's wavelengths, extrapolated above (`RotaryEmbedding` of
    /// `gpt_oss/torch/model.py`).
    pub fn yarn(yarn: &Yarn, head_dim: usize) -> Frequencies {
        let plain = Frequencies::plain(yarn.rope_theta, head_dim);
        let blend = |(i, extrapolated): (usize, f64)| {
            let ramp = (i as f64 * yarn.yarn_scale + yarn.yarn_offset).clamp(0.0, 1.0);
            extrapolated * (yarn.interpolation_scale * ramp + (1.0 - ramp))
        };
        let inverse = plain.inverse.into_iter().enumerate().map(blend).collect();
        Frequencies { inverse, concentration: yarn.yarn_multiplier }
    }
}
