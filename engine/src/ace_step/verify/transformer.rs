//! `transformer/`: the transformer, module by module.

use burn::tensor::activation::silu;
use burn::tensor::{Tensor, TensorData};

use super::Context;
use crate::ace_step::erg::Weaken;
use crate::ace_step::transformer::{
    self, Config, DecodeOptions, Prompt, Surroundings, Transformer, positions,
};
use crate::backend::Float;
use crate::error::Result;
use crate::nn::hooks::{Hooks, Recording};
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types, of_file, read_json};

const F32: Tolerance = Tolerance::of(2e-5);
/// What bf16 factors may change; the original's own bf16 run is 0.06 away from its f32 run.
const BF16: Tolerance = Tolerance::of(0.15);

/// PyTorch's exponential is an ulp beside the nearest f32 at one of the 128 frequencies, and the time multiplies that by 999.
const TIME: Tolerance = Tolerance::of(4e-5);

/// The run that `config.json` of the fixture describes.
#[derive(serde::Deserialize)]
struct Described {
    _fixture: Fixture,
}

#[derive(serde::Deserialize)]
struct Fixture {
    erg: Erg,
}

#[derive(serde::Deserialize)]
struct Erg {
    lyric_layers: [usize; 2],
    diffusion_layers: [usize; 2],
    tau: f32,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("transformer");
    let component = Component::<Config>::open(&folder)?;
    let load = |types| {
        component.load(context.device, types, &(), |weights| Transformer::new(&component.config, weights))
    };
    let model = load(Types::F32)?;
    let io = Reference::open(&folder.join("io.safetensors"))?;
    let device = context.device.burn();
    let timestep = io.values("in.timestep")?;
    let latent = io.tensor::<4>("in.hidden_states", device)?;
    let frames = latent.dims()[3];
    let mut found = Vec::new();

    // The main path with everything in between.
    let prompt = Prompt {
        text: io.tensor("in.encoder_text_hidden_states", device)?,
        text_mask: mask(&io, "in.text_attention_mask")?,
        speaker: io.tensor("in.speaker_embeds", device)?,
        lyrics: ids(&io, "in.lyric_token_idx")?,
        lyric_mask: mask(&io, "in.lyric_mask")?,
    };
    let recording = Recording::default();
    let conditions = model.encode(&prompt, None, &recording.hooks())?;
    let prepared = model.prepare(&conditions)?;
    let rope = model.rope(frames);
    let frame_mask = Some(io.tensor("in.attention_mask", device)?);
    let options = DecodeOptions { frame_mask, ..DecodeOptions::default() };
    let sample = model.decode(latent.clone(), &timestep, &prepared, &rope, &options, &recording.hooks())?;
    let seen = recording.finish()?;
    let after_block = seen.iter().find(|seen| seen.name == "transformer_blocks.1").cloned();
    found.extend(io.compare_seen("hook.", &seen, F32)?.into_iter().map(|comparison| {
        match comparison.tensor == "hook.time_proj" {
            true => comparison.within(TIME),
            false => comparison,
        }
    }));
    let longest = conditions.hidden.dims()[1].max(frames);
    let table = model.rope(longest);
    found.push(io.compare("rope.cos", table.cos, F32)?);
    found.push(io.compare("rope.sin", table.sin, F32)?);
    let tokens = prompt.lyric_mask[0].len();
    let table = positions(tokens, component.config.lyric_hidden_size, device);
    found.push(io.compare("lyric.pos_emb", table.unsqueeze::<3>(), F32)?);
    found.push(io.compare("out.encoder_hidden_states", conditions.hidden.clone(), F32)?);
    found.push(compare_mask(&io, "out.encoder_hidden_mask", &conditions.mask)?);
    found.push(io.compare("out.sample", sample, F32)?);

    // Other lengths of the result, and a control input.
    let run = |prepared: &transformer::Context, options: &DecodeOptions<'_>| {
        model.decode(latent.clone(), &timestep, prepared, &rope, options, &Hooks::none())
    };
    for name in ["len_short.sample", "len_long.sample"] {
        let options = DecodeOptions { output_length: Some(io.shape(name)?[3]), ..options.clone() };
        found.push(io.compare(name, run(&prepared, &options)?, F32)?);
    }
    let control = io.tensor("controlnet.block_controlnet_hidden_states", device)?;
    let controlled = DecodeOptions { control: Some((control, 0.7)), ..options.clone() };
    found.push(io.compare("controlnet.sample", run(&prepared, &controlled)?, F32)?);

    // Without prompt, without lyrics.
    let batch = prompt.text.dims()[0];
    let null = Prompt {
        text: prompt.text.zeros_like(),
        speaker: prompt.speaker.zeros_like(),
        lyrics: vec![vec![0; tokens]; batch],
        ..prompt.clone()
    };
    let nolyric =
        Prompt { lyrics: vec![vec![0]; batch], lyric_mask: vec![vec![false]; batch], ..prompt.clone() };
    for (name, prompt) in [("null", &null), ("nolyric", &nolyric)] {
        let conditions = model.encode(prompt, None, &Hooks::none())?;
        let states = format!("{name}.encoder_hidden_states");
        found.push(io.compare(&states, conditions.hidden.clone(), F32)?);
        found.push(io.compare(
            &format!("{name}.sample"),
            run(&model.prepare(&conditions)?, &options)?,
            F32,
        )?);
        if name == "nolyric" {
            found.push(compare_mask(&io, "nolyric.encoder_hidden_mask", &conditions.mask)?);
        }
    }

    // Attention made less sharp.
    let Described { _fixture: Fixture { erg } } = read_json(&folder.join("config.json"))?;
    let weaken = |[start, end]: [usize; 2]| Weaken { layers: start..end, tau: erg.tau };
    let (lyrics, diffusion) = (weaken(erg.lyric_layers), weaken(erg.diffusion_layers));
    let silent = Prompt { speaker: prompt.speaker.zeros_like(), ..prompt.clone() };
    let conditions = model.encode(&silent, Some(&lyrics), &Hooks::none())?;
    found.push(io.compare("erg.encoder_hidden_states", conditions.hidden.clone(), F32)?);
    let weakened = DecodeOptions { weaken: Some(&diffusion), ..options.clone() };
    found.push(io.compare("erg.sample", run(&model.prepare(&conditions)?, &weakened)?, F32)?);

    // Frames that are padding.
    let frame_mask = io.tensor::<2>("masked.attention_mask", device)?;
    let input = io.tensor::<3>("masked.attn_in", device)?;
    let attended =
        model.blocks[0].attn.forward(input.clone(), &rope, Some(&frame_mask), None, &Hooks::none());
    found.push(io.compare("masked.attn_out", attended, F32)?);
    let around = Surroundings {
        context: &prepared.states[0],
        bias: (&prepared.padding, 0),
        rope: &rope,
        frame_mask: Some(&frame_mask),
        tau: None,
    };
    let crossed = model.blocks[0].cross_attn.forward(input, &around, &Hooks::none());
    // Of frames that are padding, the file has zeros.
    let valid = crossed * frame_mask.unsqueeze_dim::<3>(2);
    found.push(io.compare("masked.cross_out_valid_rows", valid, F32)?);

    // The projectors that training aligned block 1 with, which no model loads.
    if let Some(seen) = after_block {
        let [_, _, width] = *io.shape("hook.transformer_blocks.1")? else { return Ok(found) };
        let x = Tensor::<3>::from_data(TensorData::new(seen.values, seen.shape), device);
        for (index, &dim) in component.config.ssl_latent_dims.iter().enumerate() {
            let projected = of_file(&component.file, context.device, Types::F32, &(), |weights| {
                let layers = weights.at("projectors").at(index);
                let x = silu(layers.linear(0, [2 * width, width], true)?.forward(x.clone()));
                let x = silu(layers.linear(2, [2 * width, 2 * width], true)?.forward(x));
                Ok(layers.linear(4, [dim, 2 * width], true)?.forward(x))
            })?;
            found.push(io.compare(&format!("proj.{index}"), projected, F32)?);
        }
    }

    if context.device.supports(Float::Bf16) {
        let model = load(Types::BF16)?;
        let prepared = model.prepare(&model.encode(&prompt, None, &Hooks::none())?)?;
        let sample = model.decode(latent, &timestep, &prepared, &rope, &options, &Hooks::none())?;
        found.push(io.compare("bf16.sample", sample, BF16)?);
    }
    Ok(found)
}

/// Rows of zeros and ones.
pub(super) fn mask(io: &Reference, name: &str) -> Result<Vec<Vec<bool>>> {
    let rows = io.shape(name)?.last().copied().unwrap_or(1).max(1);
    Ok(io.integers(name)?.chunks(rows).map(|row| row.iter().map(|&is| is != 0).collect()).collect())
}

/// Rows of token ids.
pub(super) fn ids(io: &Reference, name: &str) -> Result<Vec<Vec<u32>>> {
    let rows = io.shape(name)?.last().copied().unwrap_or(1).max(1);
    Ok(io.integers(name)?.chunks(rows).map(|row| row.iter().map(|&id| id as u32).collect()).collect())
}

fn compare_mask(io: &Reference, name: &str, mask: &[Vec<bool>]) -> Result<Comparison> {
    let found: Vec<f32> = mask.iter().flatten().map(|&is| f32::from(u8::from(is))).collect();
    Ok(Comparison::of(name, &found, &io.values(name)?, Tolerance::EXACT))
}
