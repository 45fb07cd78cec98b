//! The values of stored tensors.

use formats::checkpoint::{TensorFile, TensorInfo};
use half::{bf16, f16};
use safetensors::Dtype;

use super::wrong;
use crate::backend::Float;
use crate::error::Result;

/// f32 values of a tensor, exact for BF16, F16 and F32.
pub(super) fn read(file: &TensorFile, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let (stored, info) = find(file, name, shape)?;
    let bytes = file.read(stored)?;
    decode(file, stored, info.dtype, &bytes)
}

/// f32 values of some of a tensor's elements.
pub(super) fn decode(file: &TensorFile, stored: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    let values: Vec<f32> = match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Dtype::BF16 => pairs().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => pairs().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
        other => return Err(wrong(file, stored, format!("{other:?}"), "BF16, F16, F32 or F64".into())),
    };
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        let found = format!("{} at element {index}", values[index]);
        return Err(wrong(file, stored, found, "finite numbers".into()));
    }
    Ok(values)
}

/// The bytes of a tensor that is stored in the type it is wanted in.
pub(super) fn as_stored(
    file: &TensorFile,
    name: &str,
    shape: &[usize],
    float: Float,
) -> Result<Option<Vec<u8>>> {
    let (stored, info) = find(file, name, shape)?;
    if (info.dtype, float) != (Dtype::BF16, Float::Bf16) {
        return Ok(None);
    }
    let bytes = file.read(stored)?;
    let is_finite = |&pair: &[u8; 2]| bf16::from_le_bytes(pair).is_finite();
    if let Some(index) = bytes.as_chunks::<2>().0.iter().position(|pair| !is_finite(pair)) {
        return Err(wrong(file, stored, format!("no number at element {index}"), "finite numbers".into()));
    }
    Ok(Some(bytes))
}

/// The bytes that a tensor takes in the file.
pub(super) fn stored_bytes(file: &TensorFile, name: &str) -> u64 {
    stored(file, name).map_or(0, |(_, info)| info.range.end - info.range.start)
}

/// A tensor under the name that it has in the file.
fn stored<'f>(file: &'f TensorFile, name: &str) -> Option<(&'f str, &'f TensorInfo)> {
    let found = |name: &str| file.tensors().get_key_value(name).map(|(name, info)| (name.as_str(), info));
    found(name).or_else(|| newer_name(name).and_then(|name| found(&name)))
}

pub(super) fn find<'f>(
    file: &'f TensorFile,
    name: &str,
    shape: &[usize],
) -> Result<(&'f str, &'f TensorInfo)> {
    let Some((stored, info)) = stored(file, name) else {
        return Err(wrong(file, name, "no such tensor".into(), format!("one of shape {shape:?}")));
    };
    if info.shape != shape {
        return Err(wrong(file, stored, format!("shape {:?}", info.shape), format!("{shape:?}")));
    }
    Ok((stored, info))
}

/// What PyTorch 2 calls the two factors of weight normalisation.
const FACTORS: [(&str, &str); 2] = [
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
];

fn newer_name(name: &str) -> Option<String> {
    FACTORS.iter().find_map(|(old, new)| Some(name.strip_suffix(old)?.to_owned() + new))
}

/// The name of the released files for one of a file.
pub(super) fn released_name(name: &str) -> String {
    let older = FACTORS.iter().find_map(|(old, new)| Some(name.strip_suffix(new)?.to_owned() + old));
    older.unwrap_or_else(|| name.into())
}
