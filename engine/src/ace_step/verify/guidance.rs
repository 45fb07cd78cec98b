//! `guidance/`: what guidance makes of two predictions.

use burn::tensor::Tensor;
use serde::Deserialize;

use super::Context;
use crate::diffusion::guidance::{Momentum, apg, cfg, cfg_double, cfg_zero_star, optimized_scale, project};
use crate::error::Result;
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::read_json;

const TOLERANCE: Tolerance = Tolerance::of(3e-5);

/// A call by the original's names of its arguments.
#[derive(Deserialize)]
struct Call {
    out: String,
    #[serde(rename = "fn")]
    function: String,
    cond: Option<String>,
    uncond: Option<String>,
    #[serde(default)]
    guidance_scale: f32,
    #[serde(default)]
    guidance_scale_text: f32,
    #[serde(default)]
    guidance_scale_lyric: f32,
    #[serde(default)]
    eta: f32,
    #[serde(default)]
    norm_threshold: f32,
    momentum: Option<f32>,
    call_index: Option<usize>,
    #[serde(default)]
    i: usize,
    #[serde(default)]
    zero_steps: usize,
    #[serde(default)]
    use_zero_init: bool,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("guidance");
    let calls: Vec<Call> = read_json(&folder.join("guidance.json"))?;
    let io = Reference::open(&folder.join("guidance.safetensors"))?;
    let device = context.device.burn();
    let tensor = |name: &str| io.tensor::<4>(name, device);
    let (conditioned, unconditioned) = (tensor("cond")?, tensor("uncond")?);
    let mut momentum: Option<Momentum> = None;
    let mut found = Vec::new();
    for call in &calls {
        let of_call = |name: Option<&String>, part: &str, otherwise: &Tensor<4>| match (name, call.call_index)
        {
            (Some(name), _) if name == "zeros" => Ok(otherwise.zeros_like()),
            (Some(name), _) => tensor(name),
            (None, Some(index)) => tensor(&format!("apgm.{part}.{index}")),
            (None, None) => Ok(otherwise.clone()),
        };
        let c = of_call(call.cond.as_ref(), "cond", &conditioned)?;
        let u = of_call(call.uncond.as_ref(), "uncond", &unconditioned)?;
        let scale = call.guidance_scale;
        let guided = match call.function.as_str() {
            "cfg" => cfg(c, u, scale),
            "cfg_double" => {
                let (of_text, of_lyrics) = (call.guidance_scale_text, call.guidance_scale_lyric);
                cfg_double(c, u, tensor("only_text")?, of_text, of_lyrics)
            }
            "apg" => {
                if call.call_index.is_none_or(|index| index == 0) {
                    momentum = call.momentum.map(Momentum::new);
                }
                apg(c, u, scale, momentum.as_mut(), call.eta, call.norm_threshold)
            }
            "cfg_zero_star" => cfg_zero_star(c, u, scale, call.i, call.zero_steps, call.use_zero_init),
            "project" => {
                let (parallel, orthogonal) = project(u, c);
                found.push(io.compare("project.parallel", parallel, TOLERANCE)?);
                found.push(io.compare("project.orthogonal", orthogonal, TOLERANCE)?);
                continue;
            }
            "optimized_scale" => {
                let alpha = optimized_scale(c, u);
                let alpha = alpha.clone().reshape([alpha.dims()[0], 1]);
                found.push(io.compare("optimized_scale", alpha, TOLERANCE)?);
                continue;
            }
            other => {
                found.push(Comparison::of(
                    &format!("{}: no function {other}", call.out),
                    &[],
                    &[],
                    TOLERANCE,
                ));
                continue;
            }
        };
        found.push(io.compare(&call.out, guided, TOLERANCE)?);
        let average = call.call_index.map(|index| format!("apgm.running_average.{index}"));
        if let Some((name, momentum)) =
            average.filter(|_| call.out.starts_with("apgm.")).zip(momentum.as_ref())
            && let Some(average) = momentum.average()
        {
            found.push(io.compare(&name, average.clone(), TOLERANCE)?);
        }
    }
    Ok(found)
}
