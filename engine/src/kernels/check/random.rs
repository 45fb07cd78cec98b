//! Inputs that look random and are the same every time.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::kernels::mxfp4::BLOCK;

/// The values of the sixteen codes of MXFP4 (E2M1).
const CODES: [f64; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Where inputs come from.
pub(crate) struct Random(ChaCha8Rng);

/// A random MXFP4 matrix.
pub(crate) struct Packed {
    /// Eight codes a word, the first in the lowest four bits.
    pub codes: Vec<u32>,
    /// Four stored scales a word, 2^(s − 141) each, the first in the lowest byte.
    pub scales: Vec<u32>,
    /// What that is.
    pub values: Vec<f64>,
}

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Values between `−scale` and `scale`.
    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.0.random_range(-scale..scale)).collect()
    }

    /// Numbers below `end`.
    pub fn numbers(&mut self, count: usize, end: usize) -> Vec<u32> {
        (0..count).map(|_| self.0.random_range(0..end as u32)).collect()
    }

    /// A matrix whose products with values of about 1 are of about 1, and whose scales differ by up to 2^7.
    pub fn mxfp4(&mut self, rows: usize, columns: usize) -> Packed {
        let blocks = rows * columns / BLOCK;
        let codes: Vec<u32> = (0..blocks * BLOCK / 8).map(|_| self.0.random()).collect();
        let largest = 141 - (columns as f64).log2() as i32 / 2;
        let scales: Vec<u8> = (0..blocks).map(|_| (largest - self.0.random_range(0..8)) as u8).collect();
        let value = |at: usize| {
            let code = codes[at / 8] >> (4 * (at % 8)) & 15;
            CODES[code as usize] * f64::from(scales[at / BLOCK]).exp2() * (-141f64).exp2()
        };
        let values = (0..rows * columns).map(value).collect();
        let words = scales
            .chunks(4)
            .map(|of_word| of_word.iter().rev().fold(0, |word, &scale| word << 8 | u32::from(scale)));
        Packed { scales: words.collect(), codes, values }
    }
}
