//! The transformer beside the original, its names, and what it refuses.

use std::collections::BTreeMap;
use std::fs;

use burn::tensor::Tensor;
use engine::Error;
use engine::ace_step::transformer::{
    Conditions, Config, DecodeOptions, Prompt, Transformer, linear_attention,
};
use engine::backend::Backend;
use engine::nn::hooks::Hooks;
use engine::weights::{self, Component, Role, Types};

use crate::fixture::{assert_part, folder};

#[test]
fn every_module_computes_what_the_original_does() {
    // And one in bf16 where a device has it.
    assert_part("transformer", 50);
}

#[test]
fn released_names_and_shapes_are_exactly_those_asked_for() {
    let released: BTreeMap<String, BTreeMap<String, Vec<usize>>> =
        serde_json::from_slice(&fs::read(folder().join("real_checkpoint_shapes.json")).unwrap()).unwrap();
    let expected = weights::expected(|weights| Transformer::new(&Config::released(), weights)).unwrap();
    let shapes: BTreeMap<_, _> =
        expected.iter().map(|(name, wanted)| (name.clone(), wanted.shape.clone())).collect();
    assert_eq!(shapes.len(), 874);
    assert_eq!(shapes, released["transformer"]);
    let elements = |role| -> usize {
        let of_role = expected.values().filter(|wanted| wanted.role == role);
        of_role.map(|wanted| wanted.shape.iter().product::<usize>()).sum()
    };
    // As the specification counts them.
    assert_eq!(elements(Role::Used) + elements(Role::Unused), 3_305_659_264);
    assert_eq!((elements(Role::Unused) + 50_000) / 100_000, 7172);
}

/// The fixture's model, and inputs for it.
fn model() -> (Transformer, Prompt) {
    let device = Backend::Cpu.open().unwrap();
    let component = Component::<Config>::open(&folder().join("transformer")).unwrap();
    let build = |weights: &weights::Weights<'_>| Transformer::new(&component.config, weights);
    let model = component.load(&device, Types::F32, &(), build).unwrap();
    let config = model.config();
    let prompt = Prompt {
        text: Tensor::ones([1, 4, config.text_embedding_dim], device.burn()),
        text_mask: vec![vec![true; 4]],
        speaker: Tensor::zeros([1, config.speaker_embedding_dim], device.burn()),
        lyrics: vec![vec![1, 2, 3]],
        lyric_mask: vec![vec![true; 3]],
    };
    (model, prompt)
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let (model, prompt) = model();
    let refused = |prompt: &Prompt| match model.encode(prompt, None, &Hooks::none()) {
        Err(Error::Argument { argument, found, needed, .. }) => (argument, found, needed),
        other => panic!("{:?}", other.map(|conditions| conditions.mask)),
    };
    let (argument, found, needed) = refused(&Prompt { lyrics: vec![vec![1, 40, 3]], ..prompt.clone() });
    assert_eq!((argument, found.as_str(), needed.as_str()), ("lyrics", "token 40", "ids below 40"));
    assert_eq!(refused(&Prompt { lyric_mask: vec![vec![true; 2]], ..prompt.clone() }).0, "lyric_mask");
    assert_eq!(refused(&Prompt { text_mask: vec![vec![true; 3]], ..prompt.clone() }).0, "text_mask");
    assert_eq!(refused(&Prompt { lyrics: Vec::new(), ..prompt.clone() }).0, "lyrics");
    assert_eq!(refused(&Prompt { text: prompt.text.clone().narrow(2, 0, 3), ..prompt.clone() }).0, "text");

    let conditions = model.encode(&prompt, None, &Hooks::none()).unwrap();
    let wrong = Conditions { mask: vec![vec![true]], ..conditions.clone() };
    assert!(matches!(model.prepare(&wrong), Err(Error::Argument { argument: "mask", .. })));
    let context = model.prepare(&conditions).unwrap();
    let device = model.device();
    let rope = model.rope(6);
    let decode = |latent: Tensor<4>, times: &[f32]| match model.decode(
        latent,
        times,
        &context,
        &rope,
        &DecodeOptions::default(),
        &Hooks::none(),
    ) {
        Err(Error::Argument { argument, .. }) => argument,
        other => panic!("{:?}", other.map(|x| x.dims())),
    };
    assert_eq!(decode(Tensor::zeros([1, 8, 15, 6], device), &[1.0]), "latent");
    assert_eq!(decode(Tensor::zeros([1, 8, 16, 7], device), &[1.0]), "latent");
    assert_eq!(decode(Tensor::zeros([1, 8, 16, 6], device), &[1.0, 2.0]), "timestep");
    assert_eq!(decode(Tensor::zeros([1, 8, 16, 6], device), &[f32::NAN]), "timestep");
    assert_eq!(decode(Tensor::zeros([2, 8, 16, 6], device), &[1.0, 2.0]), "context");
}

#[test]
fn configurations_that_cannot_run_are_refused_by_field() {
    let field = |change: fn(&mut Config)| {
        let mut config = Config::released();
        change(&mut config);
        match weights::expected(|weights| Transformer::new(&config, weights)) {
            Err(Error::Model { field, .. }) => field,
            other => panic!("{:?}", other.map(|expected| expected.len())),
        }
    };
    assert_eq!(field(|config| config.num_layers = 0), "num_layers");
    assert_eq!(field(|config| config.attention_head_dim = 7), "attention_head_dim");
    assert_eq!(field(|config| config.attention_head_dim = usize::MAX), "attention_head_dim");
    assert_eq!(field(|config| config.mlp_ratio = f64::NAN), "mlp_ratio");
    assert_eq!(field(|config| config.patch_size = [8, 1]), "patch_size");
    assert_eq!(field(|config| config.rope_theta = -1.0), "rope_theta");
    assert_eq!(field(|config| config.lyric_encoder_attention_heads = 3), "lyric_hidden_size");
}

/// Every pair of query and key, in float64.
#[test]
fn linear_attention_is_what_its_formula_says() {
    for device in crate::devices::devices() {
        let (batch, heads, length, head_dim) = (2, 3, 37, 8);
        let values = |seed: usize| -> Vec<f32> {
            let count = batch * heads * length * head_dim;
            (0..count).map(|i| (((i * 7919 + seed * 104729) % 1000) as f32 / 500.0 - 1.0).max(0.0)).collect()
        };
        let [q, k, v] = [values(1), values(2), values(3)];
        let tensor = |values: &[f32]| {
            Tensor::<1>::from_data(values, device.burn()).reshape([batch, heads, length, head_dim])
        };
        let found = linear_attention(tensor(&q), tensor(&k), tensor(&v));
        let found: Vec<f32> = found.into_data().try_to_vec().unwrap();
        for head in 0..batch * heads {
            let row = |values: &[f32], at: usize| -> Vec<f64> {
                let start = (head * length + at) * head_dim;
                values[start..start + head_dim].iter().map(|&value| f64::from(value)).collect()
            };
            for s in 0..length {
                let query = row(&q, s);
                let weight = |t: usize| -> f64 { row(&k, t).iter().zip(&query).map(|(k, q)| k * q).sum() };
                let total: f64 = (0..length).map(weight).sum();
                for d in 0..head_dim {
                    let sum: f64 = (0..length).map(|t| weight(t) * row(&v, t)[d]).sum();
                    let error = (f64::from(found[(head * length + s) * head_dim + d]) - sum / total).abs();
                    assert!(error < 1e-5, "{}: head {head}, query {s}: {error}", device.backend());
                }
            }
        }
    }
}
