//! The engine against traces of OpenAI's own `gpt_oss/torch/model.py` (see `fixtures/gpt-oss/README.md`).

use std::path::Path;

use crate::devices::devices;
use crate::trace::{CASES, Reference, fixture, l2_error, largest_error};
use engine::backend::{Backend, Device, Float, waiting};
use engine::gpt_oss::model::read;
use engine::gpt_oss::{LoadOptions, Model, Sequence, Trace};
use formats::model_bin::layout::PieceId;
use formats::model_bin::{Stored, StoredOptions, write};

fn load(path: &Path, options: &LoadOptions, device: &Device) -> Model {
    let stored = Stored::open(path, &StoredOptions::default(), &()).unwrap();
    Model::load(&stored, options, device, &()).unwrap()
}

/// Tensors by their names in the trace.
type Named = Vec<(String, Vec<f32>)>;

/// Every tensor of the trace, and the experts of each block.
fn run(model: &Model, tokens: &[u32]) -> (Named, Vec<Vec<i64>>) {
    let mut trace = Trace::default();
    let mut cache = model.new_cache();
    let x = model.forward(&mut [Sequence { cache: &mut cache, tokens }], Some(&mut trace)).unwrap();
    let experts = std::mem::take(&mut trace.experts);
    let logits = ("logits".into(), model.unembed(x).unwrap());
    let named: Named =
        trace.into_named().chain([logits]).map(|(name, tensor)| (name, read(tensor).unwrap())).collect();
    assert_eq!(named.len(), 3 + 2 * model.config().num_blocks);
    let experts = experts.into_iter().map(|ids| waiting(|| ids.into_data().iter::<i64>().collect()));
    (named, experts.collect())
}

/// Runs every case with these options and checks each tensor, in the order of the computation, so that the first
/// failure names the layer.
fn check_all(device: &Device, options: &LoadOptions, tolerance: f64) {
    for name in CASES {
        let reference = Reference::open(name);
        let model = load(&fixture(name), options, device);
        let (found, experts) = run(&model, &reference.tokens());
        for (block, found) in experts.iter().enumerate() {
            // The order among the selected is not part of the result.
            let sorted = |ids: Vec<i64>| {
                let mut rows: Vec<Vec<i64>> = ids.chunks(4).map(<[i64]>::to_vec).collect();
                rows.iter_mut().for_each(|row| row.sort_unstable());
                rows
            };
            let truth = reference.values(&format!("block.{block}.experts"));
            let truth = truth.into_iter().map(|id| id as i64).collect();
            assert_eq!(sorted(found.clone()), sorted(truth), "{name}, experts of block {block}");
        }
        for (tensor, values) in found {
            let error = largest_error(&values, &reference.values(&tensor));
            let backend = device.backend();
            assert!(error <= tolerance, "{name} on {backend}, {tensor}: {error:e} > {tolerance:e}");
        }
    }
}

/// Runs every case with these options and checks that no tensor is further from the truth than in the genuine module's bf16.
fn check_half(device: &Device, options: &LoadOptions, types: &str) {
    for name in CASES {
        let reference = Reference::open(name);
        let model = load(&fixture(name), options, device);
        let (found, _) = run(&model, &reference.tokens());
        let genuine = reference.values("bf16.errors");
        assert_eq!(genuine.len(), found.len());
        for ((tensor, values), genuine) in found.iter().zip(genuine) {
            let error = l2_error(values, &reference.values(tensor));
            let bound = 1.2 * genuine + 1e-6;
            let backend = device.backend();
            assert!(error <= bound, "{name} in {types} on {backend}, {tensor}: {error:e} > {bound:e}");
        }
    }
}

#[test]
fn f32_agrees_with_the_genuine_module_in_every_layer() {
    for device in devices() {
        let options =
            LoadOptions { activations: Some(Float::F32), cache: Some(Float::F32), ..LoadOptions::default() };
        check_all(&device, &options, 1e-4);
        check_all(&device, &LoadOptions { dequantize: true, ..options }, 1e-4);
    }
}

#[test]
fn bf16_weights_with_f32_activations_agree_too() {
    for device in devices().into_iter().filter(|device| device.supports(Float::Bf16)) {
        let options = LoadOptions {
            activations: Some(Float::F32),
            weights: Some(Float::Bf16),
            cache: Some(Float::F32),
            ..LoadOptions::default()
        };
        check_all(&device, &options, 1e-3);
    }
}

/// The runtime of GPUs, with its f16 caches, and bf16 or f16 rows in prefills: well within the same bound.
#[test]
fn the_runtime_of_gpus_stays_below_the_error_of_the_genuine_module_in_every_layer() {
    for device in devices().into_iter().filter(|device| device.backend() != Backend::Cpu) {
        check_half(&device, &LoadOptions::default(), "the default types");
    }
}

/// Half-precision weights and activations have more bits than bf16: well within the bound of the genuine bf16 error.
#[test]
fn half_precision_errors_stay_below_those_of_the_genuine_module() {
    for device in devices() {
        for float in [Float::Bf16, Float::F16].into_iter().filter(|&float| device.supports(float)) {
            for dequantize in [false, true] {
                let options = LoadOptions {
                    activations: Some(float),
                    weights: Some(float),
                    cache: Some(float),
                    dequantize,
                    ..LoadOptions::default()
                };
                check_half(&device, &options, float.name());
            }
        }
    }
}

#[test]
fn a_checkpoint_and_its_model_bin_load_the_same_tensors_and_give_the_same_logits() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Backend::Cpu.open().unwrap();
    for name in CASES {
        let checkpoint = Stored::open(&fixture(name), &StoredOptions::default(), &()).unwrap();
        let path = folder.path().join(format!("{name}.bin"));
        write::write(checkpoint.source(), &path, &()).unwrap();
        let file = Stored::open(&path, &StoredOptions::default(), &()).unwrap();
        assert_eq!(file.header(), checkpoint.header());
        let pieces: Vec<PieceId> = file.layout().weights.tensors().map(|tensor| tensor.id).collect();
        assert!(!pieces.is_empty());
        for piece in pieces {
            // The transform of Q and K is applied on the way in both cases, so nothing is left to rounding.
            assert_eq!(file.piece(piece).unwrap(), checkpoint.piece(piece).unwrap(), "{name} {piece}");
        }
        let tokens = Reference::open(name).tokens();
        let [from_checkpoint, from_file] =
            [fixture(name), path].map(|path| run(&load(&path, &LoadOptions::default(), &cpu), &tokens).0);
        assert_eq!(from_checkpoint, from_file, "{name}");
    }
}
