//! `bias/`: attention with additive biases, whole and in chunks. ACE-Step has no such module; PyTorch computed it.

use std::ops::Range;

use burn::tensor::Tensor;
use serde::Deserialize;

use super::Context;
use crate::error::Result;
use crate::nn::attention::attend_from;
use crate::nn::bias::{Alibi, BiasProvider, BiasRequest, KeyPadding, NoBias, Sum, T5Buckets};
use crate::reference::{Comparison, Reference, Tolerance};
use crate::weights::read_json;

const TOLERANCE: Tolerance = Tolerance::of(1e-5);

#[derive(Deserialize)]
struct Fixture {
    chunk: usize,
    window: usize,
    scale: f32,
    t5: T5,
}

#[derive(Deserialize)]
struct T5 {
    num_buckets: usize,
    max_distance: usize,
    bidirectional: bool,
}

pub(super) fn check(context: &Context<'_>) -> Result<Vec<Comparison>> {
    let folder = context.path("bias");
    let fixture: Fixture = read_json(&folder.join("bias.json"))?;
    let io = Reference::open(&folder.join("bias.safetensors"))?;
    let device = context.device.burn();
    let tensor = |name: &str| io.tensor::<4>(name, device);
    let (q, k, v) = (tensor("q")?, tensor("k")?, tensor("v")?);
    let [batch, heads, length, _] = q.dims();
    let key_mask = io.values("key_mask")?;
    let padding = KeyPadding {
        mask: key_mask.chunks(length).map(|row| row.iter().map(|&is| is != 0.0).collect()).collect(),
    };
    let t5 = T5Buckets {
        tables: vec![io.tensor("t5_table", device)?],
        num_buckets: fixture.t5.num_buckets,
        max_distance: fixture.t5.max_distance,
        bidirectional: fixture.t5.bidirectional,
    };
    let alibi = Alibi::symmetric(heads);
    let both = Sum(vec![&t5, &padding]);

    let all: Vec<usize> = (0..length).collect();
    let of_all = |provider: &dyn BiasProvider| {
        let request = BiasRequest { layer: 0, batch, heads, queries: 0..length, keys: &all };
        let bias = provider.bias(&request, device).unwrap_or_else(|| Tensor::zeros([1; 4], device));
        bias.expand([1, heads, length, length])
    };
    let mut found = vec![
        Comparison::of("alibi_slopes", &alibi.slopes, &io.values("alibi_slopes")?, TOLERANCE),
        io.compare("alibi_bias", of_all(&alibi), TOLERANCE)?,
        io.compare("t5_bias", of_all(&t5), TOLERANCE)?,
    ];

    let rows = |queries: Range<usize>, keys: Range<usize>, provider: &dyn BiasProvider| {
        let of_queries = q.clone().narrow(2, queries.start, queries.len());
        let [k, v] = [&k, &v].map(|x| x.clone().narrow(2, keys.start, keys.len()));
        let bias = Some((provider, 0));
        attend_from(queries.start, of_queries, k, &all[keys], v, fixture.scale, bias)
    };
    let chunks = || {
        let starts = (0..length).step_by(fixture.chunk.max(1));
        starts.map(|start| start..length.min(start + fixture.chunk.max(1)))
    };
    let providers: [(&str, &dyn BiasProvider); 5] = [
        ("zero", &NoBias),
        ("t5", &t5),
        ("alibi", &alibi),
        ("padding", &padding),
        ("t5_plus_padding", &both),
    ];
    for (name, provider) in providers {
        let name = format!("out.{name}");
        found.push(io.compare(&name, rows(0..length, 0..length, provider), TOLERANCE)?);
        let parts = chunks().map(|queries| rows(queries, 0..length, provider)).collect();
        let mut comparison = io.compare(&name, Tensor::cat(parts, 2), TOLERANCE)?;
        comparison.tensor += " in chunks";
        found.push(comparison);
    }
    let windowed = chunks().map(|queries| {
        let keys = queries.end.saturating_sub(fixture.window)..queries.end;
        rows(queries, keys, &both)
    });
    let windowed = Tensor::cat(windowed.collect(), 2);
    found.push(io.compare("out.t5_plus_padding_windowed", windowed, TOLERANCE)?);
    Ok(found)
}
