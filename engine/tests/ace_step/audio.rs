//! Decoder, encoder, vocoder and spectrograms beside the original; files, rates and lengths; what is refused.

use std::collections::BTreeMap;
use std::fs;

use burn::tensor::Tensor;
use engine::Error;
use engine::ace_step::decode::{MusicDecoder, MusicEncoder};
use engine::ace_step::{dcae, frames_of_seconds, vocoder};
use engine::audio::mel::LogMel;
use engine::audio::resample::resample;
use engine::audio::wav::{Format, Sound};
use engine::backend::{Backend, Device};
use engine::weights::{self, Component, Role, Types};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::fixture::{assert_part, folder};

#[test]
fn the_autoencoder_is_the_original_s_stage_by_stage() {
    assert_part("music_dcae_f8c8", 18);
}

#[test]
fn the_vocoder_is_the_original_s_stage_by_stage() {
    assert_part("music_vocoder", 18);
}

#[test]
fn latents_become_the_original_s_sound() {
    assert_part("music_decode", 3);
}

#[test]
fn spectrograms_and_rates_are_torchaudio_s() {
    assert_part("audio_frontend", 5);
}

#[test]
fn released_names_and_shapes_are_exactly_those_asked_for() {
    let released: BTreeMap<String, BTreeMap<String, Vec<usize>>> =
        serde_json::from_slice(&fs::read(folder().join("real_checkpoint_shapes.json")).unwrap()).unwrap();
    let (of_dcae, of_vocoder) = (dcae::Config::released(), vocoder::Config::released());
    let dcae = weights::expected(|weights| dcae::Autoencoder::new(&of_dcae, weights)).unwrap();
    let vocoder = weights::expected(|weights| vocoder::Vocoder::new(&of_vocoder, weights)).unwrap();
    for (expected, name, count) in [(&dcae, "dcae", 192), (&vocoder, "vocoder", 713)] {
        let shapes: BTreeMap<_, _> =
            expected.iter().map(|(name, wanted)| (name.clone(), wanted.shape.clone())).collect();
        assert_eq!(shapes.len(), count);
        assert_eq!(shapes, released[name]);
    }
    let used = |expected: &weights::ExpectedTensors| -> usize {
        let used = expected.values().filter(|wanted| wanted.role == Role::Used);
        used.map(|wanted| wanted.shape.iter().product::<usize>()).sum()
    };
    // As the specification counts them.
    assert_eq!(used(&dcae), 156_812_426);
    assert_eq!(used(&vocoder), 103_005_138);
    // The decoder alone leaves the encoder where it is.
    let decoder = weights::expected(|weights| dcae::Autoencoder::decoder(&of_dcae, weights)).unwrap();
    assert_eq!(decoder.keys().collect::<Vec<_>>(), dcae.keys().collect::<Vec<_>>());
    assert_eq!(decoder.values().filter(|wanted| wanted.role == Role::Used).count(), 102);
    assert_eq!(used(&decoder) / 100_000, 791);
}

fn decoder(device: &Device) -> MusicDecoder {
    let dcae = Component::open(&folder().join("music_dcae_f8c8")).unwrap();
    let vocoder = Component::open(&folder().join("music_vocoder")).unwrap();
    MusicDecoder::load(&dcae, &vocoder, device, Types::F32, &()).unwrap()
}

#[test]
fn newer_names_of_weight_normalisation_load_too() {
    let from = folder().join("music_vocoder");
    let to = tempfile::tempdir().unwrap();
    fs::copy(from.join("config.json"), to.path().join("config.json")).unwrap();
    let bytes = fs::read(from.join("diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let renamed = |name: &str| {
        let name = name.replace(".weight_g", ".parametrizations.weight.original0");
        name.replace(".weight_v", ".parametrizations.weight.original1")
    };
    let tensors: Vec<(String, TensorView<'_>)> =
        file.tensors().into_iter().map(|(name, view)| (renamed(&name), view)).collect();
    assert!(tensors.iter().filter(|(name, _)| name.contains("original0")).count() > 50);
    fs::write(
        to.path().join("diffusion_pytorch_model.safetensors"),
        safetensors::serialize(tensors, None).unwrap(),
    )
    .unwrap();
    let device = Backend::Cpu.open().unwrap();
    let load = |folder| {
        let component = Component::<vocoder::Config>::open(folder).unwrap();
        let build = |weights: &weights::Weights<'_>| vocoder::Vocoder::new(&component.config, weights);
        component.load(&device, Types::F32, &(), build).unwrap()
    };
    let mel = Tensor::<3>::ones([1, 128, 3], device.burn());
    let sound = |model: vocoder::Vocoder| -> Vec<f32> {
        let sound = model.forward(mel.clone(), &engine::nn::hooks::Hooks::none()).unwrap();
        sound.into_data().try_to_vec().unwrap()
    };
    assert_eq!(sound(load(to.path())), sound(load(&from)));
}

#[test]
fn a_song_has_the_length_that_its_frames_say() {
    // 1 s, 10 s, 30 s, 60 s and 240 s, as the specification has them.
    assert_eq!([1.0, 10.0, 30.0, 60.0, 240.0].map(frames_of_seconds), [10, 107, 322, 645, 2583]);
    let device = Backend::Cpu.open().unwrap();
    let latents = Tensor::<4>::zeros([2, 8, 16, 3], device.burn());
    let sounds = decoder(&device).decode(latents).unwrap();
    assert_eq!(sounds.len(), 2);
    for sound in sounds {
        // The tiny vocoder has 16 samples for a mel frame, of which a frame of a latent has 8.
        assert_eq!((sound.channels.len(), sound.len(), sound.rate), (2, 3 * 8 * 16, 44100));
        assert_eq!(sound.resampled(48000).unwrap().len(), (3 * 8 * 16 * 160_usize).div_ceil(147));
    }
}

#[test]
fn what_was_decoded_can_be_encoded() {
    let device = Backend::Cpu.open().unwrap();
    let dcae = Component::open(&folder().join("music_dcae_f8c8")).unwrap();
    let mut vocoder = Component::<vocoder::Config>::open(&folder().join("music_vocoder")).unwrap();
    vocoder.config.mel = LogMel::released();
    let encoder = MusicEncoder::load(&dcae, &vocoder, &device, Types::F32, &()).unwrap();
    let tone = |rate: u32, seconds: f64| -> Vec<f32> {
        let samples = 0..(f64::from(rate) * seconds) as usize;
        samples
            .map(|i| (i as f64 / f64::from(rate) * 440.0 * std::f64::consts::TAU).sin() as f32 * 0.3)
            .collect()
    };
    let at = |rate, seconds| Sound { channels: vec![tone(rate, seconds)], rate };
    let latent = encoder.encode(&at(44100, 1.0)).unwrap();
    // As the original pads: 44100 samples are 10.8 frames of 4096.
    assert_eq!(latent.dims(), [1, 8, 16, 11]);
    assert_eq!(encoder.encode(&at(44100, 0.01)).unwrap().dims(), [1, 8, 16, 1]);
    // The same tone at another rate is nearly the same latent.
    let other = encoder.encode(&at(48000, 1.0)).unwrap();
    let values = |x: Tensor<4>| -> Vec<f32> { x.into_data().try_to_vec().unwrap() };
    let (a, b) = (values(latent), values(other));
    let difference = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
    assert!(difference < 1e-2 * a.iter().map(|a| a * a).sum::<f32>(), "{difference}");
    assert!(matches!(encoder.encode(&at(44100, 0.0)), Err(Error::Argument { argument: "sound", .. })));
    let hostile = Sound { rate: 4_294_967_291, ..at(44100, 0.1) };
    assert!(matches!(encoder.encode(&hostile), Err(Error::Argument { argument: "rate", .. })));
    let many = Sound { channels: vec![tone(44100, 1.0); 3], rate: 44100 };
    assert!(matches!(encoder.encode(&many), Err(Error::Argument { argument: "channels", .. })));
}

#[test]
fn a_sine_is_the_same_sine_at_another_rate() {
    let sine = |rate: f64, index: usize| (index as f64 / rate * 1000.0 * std::f64::consts::TAU).sin();
    let samples: Vec<f32> = (0..4410).map(|index| sine(44100.0, index) as f32).collect();
    let found = resample(&samples, 44100, 48000).unwrap();
    assert_eq!(found.len(), 4800);
    for (index, &found) in found.iter().enumerate().take(4700).skip(100) {
        assert!((f64::from(found) - sine(48000.0, index)).abs() < 5e-3, "{index}: {found}");
    }
    assert_eq!(resample(&samples, 44100, 44100).unwrap(), samples);
    // Rates without a common factor have a filter for each of 44100 places.
    let odd = resample(&samples, 44101, 44100).unwrap();
    assert_eq!(odd.len(), 4410);
    for (index, &found) in odd.iter().enumerate().take(4300).skip(100) {
        let truth = (index as f64 / 44100.0 * 44101.0 / 44100.0 * 1000.0 * std::f64::consts::TAU).sin();
        assert!((f64::from(found) - truth).abs() < 5e-3, "{index}: {found}, {truth}");
    }
    for (from, to) in [(0, 1), (44100, 0), (u32::MAX, 44100), (44100, u32::MAX)] {
        assert!(matches!(resample(&samples, from, to), Err(Error::Argument { argument: "rate", .. })));
    }
}

#[test]
fn a_tone_is_loudest_in_its_band() {
    let mel = LogMel::released();
    for hertz in [220.0, 1000.0, 5000.0] {
        let tone: Vec<f32> = (0..22050)
            .map(|i| (f64::from(i) / 44100.0 * hertz * std::f64::consts::TAU).sin() as f32)
            .collect();
        let bands = mel.compute(&tone).unwrap();
        assert_eq!((bands.len(), bands[0].len()), (128, mel.frames(tone.len())));
        let loudest = (0..128).max_by(|&a, &b| bands[a][20].total_cmp(&bands[b][20])).unwrap();
        let filters = mel.filterbank();
        let bin = (hertz / 44100.0 * 2048.0_f64).round() as usize;
        let nearest = (0..128).max_by(|&a, &b| filters[bin][a].total_cmp(&filters[bin][b])).unwrap();
        assert!(loudest.abs_diff(nearest) <= 1, "{hertz} Hz: {loudest}, {nearest}");
    }
    assert!(matches!(mel.compute(&[0.0; 700]), Err(Error::Argument { argument: "samples", .. })));
    let mut samples = vec![0.0; 4000];
    samples[17] = f32::NAN;
    match mel.compute(&samples) {
        Err(Error::Argument { found, .. }) => assert_eq!(found, "NaN at 17"),
        other => panic!("{:?}", other.map(|bands| bands.len())),
    }
}

#[test]
fn files_keep_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sound.wav");
    let channel = |phase: f32| (0..1000).map(|i| (i as f32 * 0.1 + phase).sin()).collect::<Vec<f32>>();
    let sound = Sound { channels: vec![channel(0.0), channel(1.0)], rate: 48000 };
    sound.write(&path, Format::F32).unwrap();
    assert_eq!(Sound::read(&path).unwrap(), sound);
    sound.write(&path, Format::I16).unwrap();
    let read = Sound::read(&path).unwrap();
    for (a, b) in sound.channels.concat().iter().zip(read.channels.concat()) {
        assert!((a - b).abs() < 1.0 / 16384.0);
    }
    let mono = Sound { channels: vec![channel(0.0)], rate: 44100 }.stereo().unwrap();
    assert_eq!(mono.channels[0], mono.channels[1]);
    // Nothing is written of what is no sound, and what was there stays.
    let wrong = Sound { channels: vec![vec![0.0, f32::NAN]], rate: 44100 };
    assert!(matches!(wrong.write(&path, Format::F32), Err(Error::Audio { .. })));
    let uneven = Sound { channels: vec![vec![0.0], vec![]], rate: 44100 };
    assert!(matches!(uneven.write(&path, Format::F32), Err(Error::Audio { .. })));
    assert_eq!(Sound::read(&path).unwrap(), read);
    fs::write(&path, b"RIFF").unwrap();
    assert!(matches!(Sound::read(&path), Err(Error::Audio { .. })));
}

#[test]
fn configurations_that_cannot_run_are_refused_by_field() {
    let of_dcae = |change: fn(&mut dcae::Config)| {
        let mut config = dcae::Config::released();
        change(&mut config);
        match weights::expected(|weights| dcae::Autoencoder::new(&config, weights)) {
            Err(Error::Model { field, .. }) => field,
            other => panic!("{:?}", other.map(|expected| expected.len())),
        }
    };
    assert_eq!(of_dcae(|config| config.upsample_block_type = "pixel".into()), "upsample_block_type");
    assert_eq!(of_dcae(|config| config.decoder_layers_per_block = vec![3]), "decoder_block_out_channels");
    assert_eq!(of_dcae(|config| config.attention_head_dim = 48), "encoder_block_out_channels");
    assert_eq!(of_dcae(|config| config.decoder_qkv_multiscales[3] = vec![4]), "qkv_multiscales");
    let of_vocoder = |change: fn(&mut vocoder::Config)| {
        let mut config = vocoder::Config::released();
        change(&mut config);
        match weights::expected(|weights| vocoder::Vocoder::new(&config, weights)) {
            Err(Error::Model { field, .. }) => field,
            other => panic!("{:?}", other.map(|expected| expected.len())),
        }
    };
    assert_eq!(of_vocoder(|config| config.use_template = true), "use_template");
    assert_eq!(of_vocoder(|config| config.upsample_rates[0] = 3), "upsample_rates");
    assert_eq!(of_vocoder(|config| config.upsample_initial_channel = 100), "upsample_initial_channel");
    assert_eq!(of_vocoder(|config| config.mel.f_max = f64::NAN), "f_max");
    let device = Backend::Cpu.open().unwrap();
    let wrong = Tensor::<4>::zeros([1, 7, 16, 3], device.burn());
    assert!(matches!(decoder(&device).decode(wrong), Err(Error::Argument { argument: "latent", .. })));
}
