//! What each bias adds to the scores of attention, whole and in two chunks: `cargo run --release -p engine --example attention_bias`.
use std::ops::Range;

use burn::tensor::{Device, Tensor};
use engine::backend::Backend;
use engine::nn::bias::{Alibi, BiasProvider, BiasRequest, KeyPadding, NoBias, Sum, T5Buckets};

/// Positions of queries and keys.
const LENGTH: usize = 6;

/// A bias of one's own: a query sees its neighbours and itself.
struct Neighbours;

impl BiasProvider for Neighbours {
    fn bias(&self, request: &BiasRequest<'_>, device: &Device) -> Option<Tensor<4>> {
        let rows =
            request.queries.clone().flat_map(|query| request.keys.iter().map(move |&key| (query, key)));
        let values: Vec<f32> =
            rows.map(|(query, key)| if query.abs_diff(key) <= 1 { 0.0 } else { f32::NEG_INFINITY }).collect();
        let shape = [1, 1, request.queries.len(), request.keys.len()];
        Some(Tensor::<1>::from_data(values.as_slice(), device).reshape(shape))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Backend::Cpu.open()?;
    // A number for each bucket of distances and each of two heads.
    let table: Vec<f32> = (0..8).flat_map(|bucket| [bucket as f32, -(bucket as f32)]).collect();
    let t5 = T5Buckets {
        tables: vec![Tensor::<1>::from_data(table.as_slice(), device.burn()).reshape([8, 2])],
        num_buckets: 8,
        max_distance: 6,
        bidirectional: true,
    };
    let padding = KeyPadding { mask: vec![vec![true, true, true, true, false, false]] };
    let (causal, symmetric) = (Alibi::new(2), Alibi::symmetric(2));
    let both = Sum(vec![&t5, &padding]);
    let providers: [(&str, &dyn BiasProvider); 7] = [
        ("none", &NoBias),
        ("padding of the last two keys", &padding),
        ("ALiBi, first of two heads", &causal),
        ("ALiBi in both directions", &symmetric),
        ("T5 buckets, the bucket's number", &t5),
        ("T5 buckets and padding", &both),
        ("one's own: neighbours", &Neighbours),
    ];
    let keys: Vec<usize> = (0..LENGTH).collect();
    for (name, provider) in providers {
        println!("{name}");
        let part = |queries: Range<usize>| -> Result<Option<Vec<f32>>, Box<dyn std::error::Error>> {
            let count = queries.len();
            let request = BiasRequest { layer: 0, batch: 1, heads: 2, queries, keys: &keys };
            let Some(bias) = provider.bias(&request, device.burn()) else { return Ok(None) };
            // The first head's; one row may stand for all.
            let bias = bias.narrow(1, 0, 1).expand([1, 1, count, LENGTH]);
            Ok(Some(bias.into_data().try_to_vec()?))
        };
        let (whole, first, second) = (part(0..LENGTH)?, part(0..2)?, part(2..LENGTH)?);
        for row in whole.iter().flat_map(|whole| whole.chunks(LENGTH)) {
            let shown =
                row.iter().map(|&value| if value < -1e20 { "     ·".into() } else { format!("{value:6.2}") });
            println!("  {}", shown.collect::<String>());
        }
        let chunks = first.zip(second).map(|(first, second)| [first, second].concat());
        println!(
            "  in chunks of 2 and 4 queries: {}\n",
            if chunks == whole { "the same" } else { "ANOTHER" }
        );
    }
    Ok(())
}
