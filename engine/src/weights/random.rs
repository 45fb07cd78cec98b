//! Weights that follow from seed and name.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

/// Values that one stream of random numbers fills.
const STRETCH: usize = 1 << 20;

/// Uniform values: kernels of variance `1 / inputs`, so that a layer keeps the size of what it is given; scales of norms
/// around 1; biases around 0.
pub(super) fn values(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let scales = name.ends_with("weight") || name.ends_with("weight_g");
    let inputs: usize = shape.iter().skip(1).product();
    let is_vector = inputs <= 1;
    let (centre, width) = match () {
        () if is_vector && scales => (1.0, 0.1),
        () if is_vector => (0.0, 0.02),
        () => (0.0, (3.0 / inputs as f32).sqrt()),
    };
    let key = blake3::Hasher::new().update(&seed.to_le_bytes()).update(name.as_bytes()).finalize();
    let mut values = vec![0.0; shape.iter().product()];
    values.par_chunks_mut(STRETCH).enumerate().for_each(|(stretch, values)| {
        let mut random = ChaCha8Rng::from_seed(*key.as_bytes());
        random.set_stream(stretch as u64);
        for value in values {
            let unit = (random.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
            *value = centre + width * unit;
        }
    });
    values
}
