//! Traces of OpenAI's own `gpt_oss/torch/model.py` (see `fixtures/gpt-oss/README.md`).

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

pub const CASES: [&str; 5] = ["one-block", "two-blocks", "three-blocks", "four-blocks", "long"];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/gpt-oss/checkpoints").join(name)
}

/// What the genuine module computed.
pub struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    pub fn open(name: &str) -> Reference {
        Reference { bytes: std::fs::read(fixture("../traces").join(format!("{name}.safetensors"))).unwrap() }
    }

    pub fn values(&self, name: &str) -> Vec<f64> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
        let bytes = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect(),
            Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect(),
            other => panic!("{name}: {other:?}"),
        }
    }

    pub fn tokens(&self) -> Vec<u32> {
        self.values("tokens").into_iter().map(|token| token as u32).collect()
    }
}

/// The largest difference, relative to the largest value of the truth.
pub fn largest_error(found: &[f32], truth: &[f64]) -> f64 {
    assert_eq!(found.len(), truth.len());
    let largest = truth.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
    let differences = found.iter().zip(truth).map(|(&found, truth)| (f64::from(found) - truth).abs());
    // `max` would swallow a NaN.
    differences.fold(0.0, |max: f64, d| if d.is_nan() { f64::INFINITY } else { max.max(d) }) / largest
}

/// ‖found − truth‖ / ‖truth‖.
pub fn l2_error(found: &[f32], truth: &[f64]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let difference = square(&mut found.iter().zip(truth).map(|(&found, truth)| f64::from(found) - truth));
    (difference / square(&mut truth.iter().copied())).sqrt()
}
