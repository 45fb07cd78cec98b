//! Parts of ACE-Step: linear attention, GLUMBConv as one kernel and as plain operations, and the vocoder.
//!
//! Eager operations of Burn, as the model runs them, so launches count.

use std::time::{Duration, Instant};

use burn::tensor::{Distribution, Tensor};
use engine::ace_step::transformer::{Config, GluMbConv, linear_attention};
use engine::ace_step::vocoder::{self, Vocoder};
use engine::backend::{Backend, Device};
use engine::nn::hooks::Hooks;
use engine::weights::{self, Types};

use crate::suite::{Case, Suite, Work};

/// Frames of a minute.
const FRAMES: usize = 645;

/// Measures them in bf16 on CUDA, in f32 elsewhere; in true shapes on a GPU of hardware.
pub fn measure(suite: &mut Suite, device: &Device) -> Result<(), Box<dyn std::error::Error>> {
    let is_large = device.backend() == Backend::Cuda && !suite.is_test();
    let types = if device.backend() == Backend::Cuda { Types::BF16 } else { Types::F32 };
    let (frames, width, mlp_dim) = if is_large { (FRAMES, 2560, 6400) } else { (64, 64, 160) };
    let head_dim = Config::released().attention_head_dim.min(width);
    let heads = width / head_dim;
    let random =
        |shape: [usize; 3]| Tensor::<3>::random(shape, Distribution::Uniform(-1.0, 1.0), device.burn());

    let operations = 4 * frames * width * head_dim;
    suite.measure(case("linear attention", frames, operations), || {
        let split = || random([1, heads, frames * head_dim]).reshape([1, heads, frames, head_dim]).abs();
        let [q, k, v] = [split(), split(), split()];
        timed(device, move || linear_attention(q.clone(), k.clone(), v.clone()))
    });

    let layer = weights::random(0, device, types, |weights| GluMbConv::new(width, mlp_dim, weights))?;
    let x = random([1, frames, width]);
    let operations = 2 * frames * (3 * width * mlp_dim + 6 * mlp_dim);
    suite.measure(case("GLUMBConv, one kernel in its middle", frames, operations), || {
        timed(device, || layer.forward(x.clone(), &Hooks::none()))
    });
    suite.measure(case("GLUMBConv, plain operations", frames, operations), || {
        timed(device, || layer.forward_plain(x.clone()))
    });

    let config = if is_large {
        vocoder::Config::released()
    } else {
        engine::ace_step::preset::Configs::tiny().vocoder
    };
    let mel_frames = if is_large { 8 * FRAMES } else { 16 };
    let vocoder = weights::random(0, device, types, |weights| Vocoder::new(&config, weights))?;
    let mel = random([1, config.input_channels, mel_frames]);
    let operations = 2 * config.operations(mel_frames) as usize;
    suite.measure(case("vocoder, a channel", mel_frames, operations), || {
        timed(device, || vocoder.forward(mel.clone(), &Hooks::none()).expect("shapes fit"))
    });
    Ok(())
}

fn case(name: &str, frames: usize, operations: usize) -> Case {
    let work = Work::Operations(operations as u64);
    Case { group: "ace-step", name: format!("{name}, {frames} frames"), stored: None, work }
}

/// Runs some iterations one after the other and waits for the last.
fn timed<const D: usize>(device: &Device, mut run: impl FnMut() -> Tensor<D>) -> impl FnMut(u64) -> Duration {
    move |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            drop(run());
        }
        device.sync().expect("the device works");
        start.elapsed()
    }
}
