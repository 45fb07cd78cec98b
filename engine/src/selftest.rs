//! Whether the numbers of a device can be trusted.
//!
//! A small model and what OpenAI's `gpt_oss/torch/model.py` computed with it are part of this crate
//! (`fixtures/gpt-oss`, case `two-blocks`: window crossed, two groups of heads, eight experts). Running it on a device tells
//! a broken driver from a model that says strange things. Every kernel can be checked by itself too, which says where it is broken.

use std::{env, fs};

use serde::ser::{Serialize, SerializeStruct, Serializer};

use burn::tensor::Tensor;
use formats::model_bin::{Stored, StoredOptions};
use formats::output::TemporaryFolder;
use safetensors::{Dtype, SafeTensors};

use crate::backend::{Backend, Device, Float};
use crate::error::{Error, Result};
use crate::gpt_oss::model::read;
use crate::gpt_oss::{LoadOptions, Model, Sequence, Session, Trace};
use crate::kernels::check::{self, Checked};
use crate::sampling::{self, Sampler};

/// The model and its trace.
const FILES: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../fixtures/gpt-oss/checkpoints/two-blocks/config.json")),
    ("vocabulary.json", include_bytes!("../../fixtures/gpt-oss/checkpoints/two-blocks/vocabulary.json")),
    ("model.safetensors", include_bytes!("../../fixtures/gpt-oss/checkpoints/two-blocks/model.safetensors")),
];
const TRACE: &[u8] = include_bytes!("../../fixtures/gpt-oss/traces/two-blocks.safetensors");

/// Largest difference relative to the largest value that f32 results may show.
const F32_BOUND: f64 = 1e-4;
/// Half precision may err by this much more than the genuine module in bf16 (relative L2).
const HALF_BOUND: f64 = 1.2;

/// Tokens drawn in each way.
const DRAWS: usize = 32;
/// How many of them, as a fraction, may differ from the processor's.
const DRAW_BOUND: f64 = 0.02;

/// What to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Also every kernel by itself, in every variant that the device can run ([`crate::kernels::check`]). Takes a minute in
    /// software.
    pub kernels: bool,
}

/// What a device was found to compute.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// Name and backend.
    pub device: String,
    /// One line for each way of computing, and for each kernel.
    pub checks: Vec<Check>,
}

/// One way of computing the trace, or one kernel.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was computed.
    pub name: String,
    /// The tensor, or the case of a kernel, that comes closest to its bound or passes it.
    pub worst_tensor: String,
    /// Its error.
    pub error: f64,
    /// What the error may be.
    pub bound: f64,
    /// Why there is nothing to compare.
    pub failure: Option<String>,
}

/// With `passed`, as JSON has no infinite errors.
impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Check", 6)?;
        fields.serialize_field("name", &self.name)?;
        fields.serialize_field("passed", &self.passed())?;
        fields.serialize_field("worst_tensor", &self.worst_tensor)?;
        fields.serialize_field("error", &self.error)?;
        fields.serialize_field("bound", &self.bound)?;
        fields.serialize_field("failure", &self.failure)?;
        fields.end()
    }
}

impl Check {
    fn failed(name: String, failure: &Error) -> Check {
        let failure = Some(failure.to_string());
        Check { name, worst_tensor: String::new(), error: f64::INFINITY, bound: 0.0, failure }
    }

    /// Whether every tensor is within its bound.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

impl Report {
    /// Whether every check passed.
    pub fn is_trusted(&self) -> bool {
        self.checks.iter().all(Check::passed)
    }
}

/// Runs the trace on a device: in f32 with packed and with dequantised experts, by the processor's own runtime, token by
/// token, in each half precision that the device has, and as models are loaded on it by default; and draws tokens there. Then
/// the kernels, if they are wanted: one that fails is a check that fails.
///
/// # Errors
/// [`Error::Device`] where the device fails outright, [`Error::Format`] where the temporary folder cannot be written.
pub fn run(device: &Device, options: Options) -> Result<Report> {
    let mut checks = match compute_trace(device) {
        Ok(checks) => checks,
        // The kernels may tell why.
        Err(error) if options.kernels => vec![Check::failed("the model of the trace".into(), &error)],
        Err(error) => return Err(error),
    };
    if options.kernels {
        checks.extend(check::of_tensors(device.burn()).map(of_kernel));
        checks.extend(device.client().iter().flat_map(check::all).map(of_kernel));
    }
    Ok(Report { device: format!("{} ({})", device.name(), device.backend()), checks })
}

/// What became of a kernel: its worst case.
fn of_kernel((kernel, checked): Checked) -> Check {
    let name = format!("kernel {kernel}");
    match checked {
        Ok(found) => {
            let cases = found.len();
            let errors = found.into_iter().map(|found| Ok((found.case, found.error, found.bound)));
            worst(format!("{name}, {cases} comparisons"), errors)
                .unwrap_or_else(|error| Check::failed(name, &error))
        }
        Err(error) => Check::failed(name, &error),
    }
}

/// Every way of computing the trace.
fn compute_trace(device: &Device) -> Result<Vec<Check>> {
    let folder = TemporaryFolder::create_in(&env::temp_dir())?;
    for (name, bytes) in FILES {
        let path = folder.path().join(name);
        fs::write(&path, bytes).map_err(formats::Error::io(path))?;
    }
    let stored = Stored::open(folder.path(), &StoredOptions::default(), &())?;
    let trace = SafeTensors::deserialize(TRACE).map_err(damaged)?;
    let tokens: Vec<u32> = values(&trace, "tokens")?.into_iter().map(|token| token as u32).collect();
    let f32_options =
        LoadOptions { activations: Some(Float::F32), cache: Some(Float::F32), ..LoadOptions::default() };
    let mut ways = vec![
        ("plain tensors, packed experts", f32_options.clone()),
        ("plain tensors, dequantised experts", LoadOptions { dequantize: true, ..f32_options }),
    ];
    if device.backend() == Backend::Cpu {
        let native = LoadOptions { cache: Some(Float::F32), ..LoadOptions::default() };
        ways.push(("the processor's own runtime", native));
    }
    let mut checks = Vec::new();
    for (way, options) in ways {
        let model = Model::load(&stored, &options, device, &())?;
        let errors = compute(&model, &tokens)?.into_iter().map(|(name, found)| {
            let truth = values(&trace, &name)?;
            Ok((name, largest_error(&found, &truth), F32_BOUND))
        });
        checks.push(worst(format!("f32, {way}"), errors)?);
        if !options.dequantize {
            let truth = values(&trace, "logits")?;
            checks.push(token_by_token(format!("f32, {way}, token by token"), &model, &tokens, &truth)?);
        }
    }
    let genuine = values(&trace, "bf16.errors")?;
    let half = [Float::Bf16, Float::F16].into_iter().filter(|&float| device.supports(float));
    let half = half.map(|float| {
        let all = Some(float);
        let options = LoadOptions { activations: all, weights: all, cache: all, ..LoadOptions::default() };
        (float.to_string(), options)
    });
    for (name, options) in half.chain([("the default types".into(), LoadOptions::default())]) {
        let model = Model::load(&stored, &options, device, &())?;
        let errors = compute(&model, &tokens)?.into_iter().zip(&genuine).map(|((name, found), genuine)| {
            let truth = values(&trace, &name)?;
            Ok((name, l2_error(&found, &truth), HALF_BOUND * genuine + 1e-6))
        });
        checks.push(worst(format!("{name}, packed experts"), errors)?);
    }
    checks.push(drawing(device, &values(&trace, "logits")?)?);
    Ok(checks)
}

/// Every tensor of the trace in the order of the computation, by its name there.
fn compute(model: &Model, tokens: &[u32]) -> Result<Vec<(String, Vec<f32>)>> {
    let mut trace = Trace::default();
    let mut cache = model.new_cache();
    let x = model.forward(&mut [Sequence { cache: &mut cache, tokens }], Some(&mut trace))?;
    let logits = ("logits".into(), model.unembed(x)?);
    trace.into_named().chain([logits]).map(|(name, tensor)| Ok((name, read(tensor)?))).collect()
}

fn token_by_token(name: String, model: &Model, tokens: &[u32], truth: &[f64]) -> Result<Check> {
    let mut session = Session::new(model);
    let rows = truth.chunks(model.config().vocabulary);
    let errors = tokens.iter().zip(rows).map(|(&token, truth)| {
        let found = read(session.advance(&[token])?)?;
        Ok(("logits".to_string(), largest_error(&found, truth), F32_BOUND))
    });
    worst(name, errors)
}

/// How often a token drawn on the device is not the one that the processor draws with the same random number. Sums in
/// another order move the boundaries between tokens a little.
fn drawing(device: &Device, logits: &[f64]) -> Result<Check> {
    let logits: Vec<f32> = logits.iter().map(|&logit| logit as f32).collect();
    let tensor = Tensor::<1>::from_data(logits.as_slice(), device.burn());
    let ways = [
        sampling::Options::greedy(),
        sampling::Options { top_k: 40, ..Default::default() },
        sampling::Options { top_p: 0.9, temperature: 0.8, ..Default::default() },
        sampling::Options { min_p: 0.05, repetition_penalty: 1.2, ..Default::default() },
    ];
    let mut wrong = 0;
    for options in &ways {
        let [mut here, mut there] = [Sampler::new(options.clone())?, Sampler::new(options.clone())?];
        for _ in 0..DRAWS {
            let token = here.sample(&logits)?.token;
            let u = there.next_uniform();
            wrong += usize::from(there.sample_tensor_at(tensor.clone(), u)?.token != token);
            there.accept(token);
        }
    }
    let error = wrong as f64 / (DRAWS * ways.len()) as f64;
    let name = "drawing tokens".into();
    Ok(Check { name, worst_tensor: "tokens".into(), error, bound: DRAW_BOUND, failure: None })
}

/// The check whose tensor comes closest to its bound.
fn worst(name: String, errors: impl Iterator<Item = Result<(String, f64, f64)>>) -> Result<Check> {
    let mut check = Check { name, worst_tensor: String::new(), error: 0.0, bound: 1.0, failure: None };
    for found in errors {
        let (tensor, error, bound) = found?;
        if check.worst_tensor.is_empty() || badness(error, bound) > badness(check.error, check.bound) {
            check = Check { worst_tensor: tensor, error, bound, ..check };
        }
    }
    Ok(check)
}

/// An error in bounds, of which what must be exact has none.
fn badness(error: f64, bound: f64) -> f64 {
    if error == 0.0 { 0.0 } else { error / bound }
}

/// Infinite where anything is not finite.
fn largest_error(found: &[f32], truth: &[f64]) -> f64 {
    if found.len() != truth.len() || found.iter().any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let largest = truth.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
    let differences = found.iter().zip(truth).map(|(&found, truth)| (f64::from(found) - truth).abs());
    differences.fold(0.0, f64::max) / largest
}

/// ‖found − truth‖ / ‖truth‖, infinite where anything is not finite.
fn l2_error(found: &[f32], truth: &[f64]) -> f64 {
    if found.len() != truth.len() || found.iter().any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let difference: f64 = found.iter().zip(truth).map(|(&f, t)| (f64::from(f) - t).powi(2)).sum();
    (difference / truth.iter().map(|t| t * t).sum::<f64>()).sqrt()
}

fn values(trace: &SafeTensors<'_>, name: &str) -> Result<Vec<f64>> {
    let tensor = trace.tensor(name).map_err(damaged)?;
    let bytes = tensor.data();
    Ok(match tensor.dtype() {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b).into()).collect(),
        Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|&b| i32::from_le_bytes(b).into()).collect(),
        other => return Err(damaged(format!("{name} is {other:?}"))),
    })
}

/// The trace is part of this crate, so this is a fault of the build.
fn damaged(error: impl std::fmt::Display) -> Error {
    Error::Device(format!("the built-in trace is damaged: {error}"))
}
