//! `umt5/`: the prompt's encoder, block by block.

use super::Context;
use crate::ace_step::erg::Weaken;
use crate::ace_step::prompt::Tokens;
use crate::ace_step::umt5::{Config, Encoder};
use crate::error::Result;
use crate::nn::bias::{BiasProvider, BiasRequest, T5Buckets};
use crate::nn::hooks::{Hooks, Recording};
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::{Component, Types, read_json};

const F32: Tolerance = Tolerance::of(3e-5);

/// The run that `config.json` of the fixture describes.
#[derive(serde::Deserialize)]
struct Described {
    _fixture: Fixture,
}

#[derive(serde::Deserialize)]
struct Fixture {
    erg_layers: [usize; 2],
    tau: f32,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("umt5");
    let component = Component::<Config>::open(&folder)?;
    let model = component
        .load(context.device, Types::F32, &(), |weights| Encoder::new(&component.config, weights))?;
    let io = Reference::open(&folder.join("io.safetensors"))?;
    let tokens = tokens(&io)?;
    let [_, length] = tokens.shape()?;
    let mut found = Vec::new();

    // Exact, before anything is computed with them.
    let positions = model.positions();
    let distances = (0..length).flat_map(|query| (0..length).map(move |key| key as i64 - query as i64));
    let buckets: Vec<i64> = distances.map(|distance| positions.bucket(distance) as i64).collect();
    found.push(Comparison::same("relative_buckets", &buckets, &io.integers("relative_buckets")?));
    let released = Config::released();
    let released = T5Buckets {
        tables: Vec::new(),
        num_buckets: released.relative_attention_num_buckets,
        max_distance: released.relative_attention_max_distance,
        bidirectional: true,
    };
    let distances = io.integers("real_config.relative_position")?;
    let buckets: Vec<i64> = distances.iter().map(|&distance| released.bucket(distance) as i64).collect();
    found.push(Comparison::same("real_config.bucket", &buckets, &io.integers("real_config.bucket")?));
    let keys: Vec<usize> = (0..length).collect();
    let heads = component.config.num_heads;
    let request = BiasRequest { layer: 0, batch: 1, heads, queries: 0..length, keys: &keys };
    if let Some(bias) = positions.bias(&request, context.device.burn()) {
        found.push(io.compare("position_bias.0", bias, Tolerance::EXACT)?);
    }

    let recording = Recording::default();
    let hidden = model.forward(&tokens, None, &recording.hooks())?;
    found.extend(io.compare_seen("hook.", &recording.finish()?, F32)?);
    found.push(io.compare("last_hidden_state", hidden, F32)?);

    let Described { _fixture: Fixture { erg_layers: [start, end], tau } } =
        read_json(&folder.join("config.json"))?;
    let weaken = Weaken { layers: start..end, tau };
    let hidden = model.forward(&tokens, Some(&weaken), &Hooks::none())?;
    found.push(io.compare("erg.last_hidden_state", hidden, F32)?);
    Ok(found)
}

/// The prompts of the run, padded.
fn tokens(io: &Reference) -> Result<Tokens> {
    let length = io.shape("input_ids")?.last().copied().unwrap_or(0).max(1);
    let (ids, mask) = (io.integers("input_ids")?, io.integers("attention_mask")?);
    Ok(Tokens {
        ids: ids.chunks(length).map(|ids| ids.iter().map(|&id| id as u32).collect()).collect(),
        mask: mask.chunks(length).map(|mask| mask.iter().map(|&flag| flag != 0).collect()).collect(),
    })
}
