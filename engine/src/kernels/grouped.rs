//! The selected experts of many tokens: products of sorted pairs with MXFP4 matrices, with the tiles of `tile`.
//!
//! ```text
//! x ─► gate_up, SwiGLU ─► hidden (in the order of pairs)
//!   ─► down ─► outputs (f32, by pair) ─► combine: residual += Σ share · output
//! ```
//!
//! A cube has a tile of [`super::dispatch`] and some rows of its expert's matrix. Nothing is added atomically: [`combine`]
//! sums the outputs of a token in the order of its places.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Input, Inputs, Packed, poisoned, read, values_of};
use super::dispatch::{Dispatch, Sorted};
use super::gate_up::swiglu;
use super::group::{F4, U4};
use super::method::write_pair;
use super::tile::{Format, Tile, place, product};
use crate::error::Result;

/// Units of a cube that combines.
const UNITS: usize = 256;

/// The sizes of a layer of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grouped {
    /// Experts of the layer.
    pub experts: usize,
    /// Experts that are selected for a token.
    pub active: usize,
    /// Width of the residual stream, a multiple of 32.
    pub embedding_dim: usize,
    /// Hidden units of an expert, a multiple of 32.
    pub mlp_dim: usize,
    /// The bits of SwiGLU's clamp.
    pub limit: u32,
}

impl Grouped {
    /// Pairs of a tile ([`super::dispatch`]) for `tokens` tokens.
    pub fn pairs_of_tile(&self, client: &Client, tokens: usize) -> usize {
        Tile::grouped(client, self.embedding_dim, 2 * self.mlp_dim, self.average(tokens)).tokens
    }

    /// Pairs that an expert gets on average.
    fn average(&self, tokens: usize) -> usize {
        (tokens * self.active).div_ceil(self.experts)
    }
}

/// What both products of the experts read.
pub struct Buffers<'a> {
    /// In the words of [`super::method::Method`]: the normalised input `[tokens, embedding_dim]` of [`gate_up`], the hidden units
    /// `[tokens · active, mlp_dim]` in the order of pairs of [`down`].
    pub x: &'a Handle,
    /// u32 `[tokens · active]`, of [`super::dispatch`].
    pub order: &'a Handle,
    /// u32 `[tiles, 4]`, of [`super::dispatch`].
    pub tiles: &'a Handle,
    /// MXFP4 codes `[experts, 2 · mlp_dim, embedding_dim]` or `[experts, embedding_dim, mlp_dim]`.
    pub codes: &'a Handle,
    /// Their stored scales.
    pub scales: &'a Handle,
    /// f32 `[experts, 2 · mlp_dim]` or `[experts, embedding_dim]`.
    pub bias: &'a Handle,
    /// Of [`gate_up`] the hidden units; of [`down`] f32 `[tokens · active, embedding_dim]`, in the order of tokens and
    /// places.
    pub y: &'a Handle,
}

/// Computes the hidden units of `tokens` tokens, whose pairs are in `tiles` tiles of [`Grouped::pairs_of_tile`] pairs.
pub fn gate_up(client: &Client, grouped: Grouped, tokens: usize, tiles: usize, buffers: &Buffers<'_>) {
    let rows = 2 * grouped.mlp_dim;
    let tile = Tile::grouped(client, grouped.embedding_dim, rows, grouped.average(tokens));
    gate_up_tiled(client, grouped, tokens, tiles, buffers, tile);
}

/// [`gate_up`] with a tile of one's choice.
pub(crate) fn gate_up_tiled(
    client: &Client,
    grouped: Grouped,
    tokens: usize,
    tiles: usize,
    buffers: &Buffers<'_>,
    tile: Tile,
) {
    let pairs = tokens * grouped.active;
    let blocks = grouped.experts * tile.matrix_rows * tile.columns / 32;
    // SAFETY: lengths are those of the buffers by the caller's contract; tiles name experts and pairs that there are, and what
    // lies past the last pair or row is read from those and not written.
    unsafe {
        gate_up_kernel::launch_unchecked(
            client,
            CubeCount::Static(tile.matrix_rows.div_ceil(tile.rows()) as u32, tiles as u32, 1),
            tile.cube_dim(),
            BufferArg::from_raw_parts(buffers.codes.clone(), blocks),
            BufferArg::from_raw_parts(buffers.scales.clone(), blocks / 4),
            BufferArg::from_raw_parts(buffers.bias.clone(), grouped.experts * tile.matrix_rows),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * tile.method.words(tile.columns) / 4),
            BufferArg::from_raw_parts(buffers.order.clone(), pairs),
            BufferArg::from_raw_parts(buffers.tiles.clone(), tiles),
            BufferArg::from_raw_parts(buffers.y.clone(), pairs * tile.method.words(grouped.mlp_dim)),
            tile.chunks(),
            grouped,
            tile,
        );
    }
}

/// Computes the outputs of all pairs of `tokens` tokens, in tiles as for [`gate_up`].
pub fn down(client: &Client, grouped: Grouped, tokens: usize, tiles: usize, buffers: &Buffers<'_>) {
    let rows = grouped.embedding_dim;
    let tile = Tile::grouped(client, grouped.mlp_dim, rows, grouped.average(tokens));
    down_tiled(client, grouped, tokens, tiles, buffers, tile);
}

/// [`down`] with a tile of one's choice.
pub(crate) fn down_tiled(
    client: &Client,
    grouped: Grouped,
    tokens: usize,
    tiles: usize,
    buffers: &Buffers<'_>,
    tile: Tile,
) {
    let pairs = tokens * grouped.active;
    let blocks = grouped.experts * tile.matrix_rows * tile.columns / 32;
    // SAFETY: as for `gate_up_kernel`.
    unsafe {
        down_kernel::launch_unchecked(
            client,
            CubeCount::Static(tile.matrix_rows.div_ceil(tile.rows()) as u32, tiles as u32, 1),
            tile.cube_dim(),
            BufferArg::from_raw_parts(buffers.codes.clone(), blocks),
            BufferArg::from_raw_parts(buffers.scales.clone(), blocks / 4),
            BufferArg::from_raw_parts(buffers.bias.clone(), grouped.experts * tile.matrix_rows),
            BufferArg::from_raw_parts(buffers.x.clone(), pairs * tile.method.words(tile.columns) / 4),
            BufferArg::from_raw_parts(buffers.order.clone(), pairs),
            BufferArg::from_raw_parts(buffers.tiles.clone(), tiles),
            BufferArg::from_raw_parts(buffers.y.clone(), pairs * tile.matrix_rows / 2),
            tile.chunks(),
            tile,
        );
    }
}

/// Adds the outputs of `tokens` tokens (f32 `[tokens, active, embedding_dim]`), times `shares` (f32 `[tokens, active]`), to `x`
/// (f32 `[tokens, embedding_dim]`).
pub fn combine(
    client: &Client,
    grouped: Grouped,
    tokens: usize,
    outputs: &Handle,
    shares: &Handle,
    x: &Handle,
) {
    let quads = grouped.embedding_dim / 4;
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at the end of a row.
    unsafe {
        combine_kernel::launch_unchecked(
            client,
            CubeCount::Static(quads.div_ceil(UNITS) as u32, tokens as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(outputs.clone(), tokens * grouped.active * quads),
            BufferArg::from_raw_parts(shares.clone(), tokens * grouped.active),
            BufferArg::from_raw_parts(x.clone(), tokens * quads),
            quads,
            grouped.active,
        );
    }
}

#[cube(launch_unchecked)]
pub(crate) fn gate_up_kernel(
    codes: &[U4],
    scales: &[u32],
    bias: &[f32],
    x: &[U4],
    order: &[u32],
    tiles: &[U4],
    hidden: &mut [u32],
    chunks: usize,
    #[comptime] grouped: Grouped,
    #[comptime] tile: Tile,
) {
    let here = tiles[CUBE_POS_Y as usize];
    let (first, count) = (here.extract(1usize) as usize, here.extract(2usize) as usize);
    if count > 0 {
        let matrix = here.extract(0usize) as usize * comptime!(tile.matrix_rows);
        let first_row = CUBE_POS_X as usize * comptime!(tile.rows());
        let mut sources = Shared::<[u32]>::new_slice(comptime!(tile.tokens));
        let mut row = UNIT_POS as usize;
        while row < comptime!(tile.tokens) {
            let pair = order[first + select(row < count, row, 0usize)];
            sources[row] = pair / comptime!(grouped.active as u32);
            row += comptime!(tile.units());
        }
        sync_cube();
        let mut sums = Array::<f32>::new(comptime!(2 * tile.pairs()));
        product(codes, scales, x, &sources, &mut sums, matrix, first_row, chunks, tile);
        // Hidden units are written two and two.
        #[unroll]
        for two in 0..comptime!(tile.pairs() / 2) {
            let one = activated(bias, &sums, matrix, first_row, comptime!(2 * two), grouped, tile);
            let other = activated(bias, &sums, matrix, first_row, comptime!(2 * two + 1), grouped, tile);
            let (token, row) = place(comptime!(2 * two), tile);
            if comptime!(!tile.has_quads()) {
                // Neighbours are those of two lanes, which exchange: one writes for one token and the other for another.
                let odd = UNIT_POS_X % 2u32 == 1u32;
                let theirs = plane_shuffle_xor(select(odd, one, other), 1u32);
                let token = select(odd, token + 8, token);
                if token < count && first_row + row < comptime!(2 * grouped.mlp_dim) {
                    let at = (first + token) * comptime!(grouped.mlp_dim / 2) + (first_row + row) / 4;
                    write_pair(
                        hidden,
                        at,
                        select(odd, theirs, one),
                        select(odd, other, theirs),
                        comptime!(tile.method),
                    );
                }
            } else if token < count && first_row + row < comptime!(2 * grouped.mlp_dim) {
                let at = (first + token) * comptime!(grouped.mlp_dim / 2) + (first_row + row) / 4;
                write_pair(hidden, at, one, other, comptime!(tile.method));
            }
        }
    }
}

/// The hidden unit of a pair of sums, with the biases.
#[cube]
fn activated(
    bias: &[f32],
    sums: &Array<f32>,
    matrix: usize,
    first_row: usize,
    #[comptime] pair: usize,
    #[comptime] grouped: Grouped,
    #[comptime] tile: Tile,
) -> f32 {
    let (_token, row) = place(pair, tile);
    let row = first_row + row;
    let row = matrix + select(row < comptime!(tile.matrix_rows), row, 0usize);
    let (gate, up) = (sums[2 * pair] + bias[row], sums[2 * pair + 1] + bias[row + 1]);
    swiglu(gate, up, comptime!(f32::from_bits(grouped.limit)))
}

#[cube(launch_unchecked)]
pub(crate) fn down_kernel(
    codes: &[U4],
    scales: &[u32],
    bias: &[f32],
    x: &[U4],
    order: &[u32],
    tiles: &[U4],
    outputs: &mut [Vector<f32, Const<2>>],
    chunks: usize,
    #[comptime] tile: Tile,
) {
    let here = tiles[CUBE_POS_Y as usize];
    let (first, count) = (here.extract(1usize) as usize, here.extract(2usize) as usize);
    if count > 0 {
        let matrix = here.extract(0usize) as usize * comptime!(tile.matrix_rows);
        let first_row = CUBE_POS_X as usize * comptime!(tile.rows());
        let mut sources = Shared::<[u32]>::new_slice(comptime!(tile.tokens));
        let mut row = UNIT_POS as usize;
        while row < comptime!(tile.tokens) {
            sources[row] = (first + select(row < count, row, 0usize)) as u32;
            row += comptime!(tile.units());
        }
        sync_cube();
        let mut sums = Array::<f32>::new(comptime!(2 * tile.pairs()));
        product(codes, scales, x, &sources, &mut sums, matrix, first_row, chunks, tile);
        #[unroll]
        for pair in 0..comptime!(tile.pairs()) {
            let (token, row) = place(pair, tile);
            let row = first_row + row;
            if token < count && row < comptime!(tile.matrix_rows) {
                let mut both = Vector::<f32, Const<2>>::empty();
                both.insert(0usize, sums[2 * pair] + bias[matrix + row]);
                both.insert(1usize, sums[2 * pair + 1] + bias[matrix + row + 1]);
                outputs[order[first + token] as usize * comptime!(tile.matrix_rows / 2) + row / 2] = both;
            }
        }
    }
}

#[cube(launch_unchecked)]
fn combine_kernel(outputs: &[F4], shares: &[f32], x: &mut [F4], quads: usize, #[comptime] active: usize) {
    let quad = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let token = CUBE_POS_Y as usize;
    if quad < quads {
        let mut sum = x[token * quads + quad];
        #[unroll]
        for place in 0..active {
            let pair = token * active + place;
            sum += outputs[pair * quads + quad] * F4::new(shares[pair]);
        }
        x[token * quads + quad] = sum;
    }
}

/// What [`combine`] makes of a token: `x + Σ share · output`.
fn reference(x: &[f64], outputs: &[f64], shares: &[f64]) -> Vec<f64> {
    let mut sum = x.to_vec();
    for (output, share) in outputs.chunks(x.len()).zip(shares) {
        sum.iter_mut().zip(output).for_each(|(sum, output)| *sum += share * output);
    }
    sum
}

/// Each of the three kernels by itself, with every tile that is ever chosen. The first two have their references in
/// [`super::gate_up`] and [`super::down`].
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, experts, embedding_dim, mlp_dim) in
        [(1, 4, 2880, 32), (3, 8, 96, 160), (17, 32, 160, 96), (130, 5, 288, 224), (3, 4, 32, 2880)]
    {
        let grouped = Grouped { experts, active: 4, embedding_dim, mlp_dim, limit: 7.0f32.to_bits() };
        found.extend(check_gate_up(client, grouped, tokens)?);
        found.extend(check_down(client, grouped, tokens)?);
        found.push(check_combine(client, grouped, tokens)?);
    }
    Ok(found)
}

fn check_gate_up(client: &Client, grouped: Grouped, tokens: usize) -> Result<Vec<Comparison>> {
    let Grouped { active, embedding_dim, mlp_dim, limit, .. } = grouped;
    let mut inputs = Inputs::new(client, tokens as u64);
    let layer = Layer::new(&mut inputs, grouped, tokens, [2 * mlp_dim, embedding_dim]);
    let mut found = Vec::new();
    for tile in Tile::all(client, Format::Mxfp4, embedding_dim, 2 * mlp_dim) {
        let sorted = layer.sorted(grouped, tile);
        let x = inputs.rows(tokens * embedding_dim, 1.0, tile.method);
        let y = poisoned(client, tile.method.words(tokens * active * mlp_dim));
        let buffers = Buffers {
            x: &x.handle,
            order: &inputs.upload(&sorted.order),
            tiles: &inputs.upload(&sorted.tiles),
            codes: &layer.matrix.codes,
            scales: &layer.matrix.scales,
            bias: &layer.bias.handle,
            y: &y,
        };
        gate_up_tiled(client, grouped, tokens, sorted.tiles.len(), &buffers, tile);
        let hidden = sorted.order.iter().flat_map(|&pair| {
            let (weights, bias) = layer.expert(sorted.ids[pair as usize]);
            let x = &x.values[pair as usize / active * embedding_dim..][..embedding_dim];
            super::gate_up::reference(weights, bias, x, f32::from_bits(limit).into())
        });
        let (truth, found_here) = (hidden.collect::<Vec<_>>(), values_of(&read(client, &y)?, tile.method));
        let case = format!("{}, {}", grouped.case("gate_up", tokens), tile.name());
        let bound = tile.method.rounding() + F32;
        found.push(Comparison::near("grouped", case, mlp_dim, &found_here, &truth, bound));
    }
    Ok(found)
}

fn check_down(client: &Client, grouped: Grouped, tokens: usize) -> Result<Vec<Comparison>> {
    let Grouped { active, embedding_dim, mlp_dim, .. } = grouped;
    let mut inputs = Inputs::new(client, tokens as u64);
    let layer = Layer::new(&mut inputs, grouped, tokens, [embedding_dim, mlp_dim]);
    let mut found = Vec::new();
    for tile in Tile::all(client, Format::Mxfp4, mlp_dim, embedding_dim) {
        let sorted = layer.sorted(grouped, tile);
        let hidden = inputs.rows(tokens * active * mlp_dim, 1.0, tile.method);
        let y = poisoned(client, tokens * active * embedding_dim);
        let buffers = Buffers {
            x: &hidden.handle,
            order: &inputs.upload(&sorted.order),
            tiles: &inputs.upload(&sorted.tiles),
            codes: &layer.matrix.codes,
            scales: &layer.matrix.scales,
            bias: &layer.bias.handle,
            y: &y,
        };
        down_tiled(client, grouped, tokens, sorted.tiles.len(), &buffers, tile);
        let mut outputs = vec![Vec::new(); tokens * active];
        for (&pair, hidden) in sorted.order.iter().zip(hidden.values.chunks(mlp_dim)) {
            let (weights, bias) = layer.expert(sorted.ids[pair as usize]);
            outputs[pair as usize] = super::down::reference(weights, bias, hidden).collect();
        }
        let (truth, found_here) = (outputs.concat(), read(client, &y)?);
        let case = format!("{}, {}", grouped.case("down", tokens), tile.name());
        found.push(Comparison::near("grouped", case, embedding_dim, &found_here, &truth, F32));
    }
    Ok(found)
}

fn check_combine(client: &Client, grouped: Grouped, tokens: usize) -> Result<Comparison> {
    let Grouped { active, embedding_dim, .. } = grouped;
    let mut inputs = Inputs::new(client, tokens as u64);
    let outputs = inputs.f32(tokens * active * embedding_dim, 1.0);
    let (shares, x) = (inputs.f32(tokens * active, 1.0), inputs.f32(tokens * embedding_dim, 1.0));
    let written = inputs.again(&x);
    combine(client, grouped, tokens, &outputs.handle, &shares.handle, &written);
    let of_tokens = outputs.values.chunks(active * embedding_dim).zip(shares.values.chunks(active));
    let rows = x.values.chunks(embedding_dim).zip(of_tokens);
    let truth: Vec<f64> = rows.flat_map(|(x, (outputs, shares))| reference(x, outputs, shares)).collect();
    let (case, found) = (grouped.case("combine", tokens), read(client, &written)?);
    Ok(Comparison::near("grouped", case, embedding_dim, &found, &truth, F32))
}

impl Grouped {
    fn case(&self, kernel: &str, tokens: usize) -> String {
        let Grouped { experts, active, embedding_dim, mlp_dim, .. } = self;
        format!("{kernel}, {tokens} × {active} of {experts} experts, {embedding_dim} → {mlp_dim}")
    }
}

/// One of the two products of the experts, and who selected them.
struct Layer {
    rows: usize,
    columns: usize,
    matrix: Packed,
    bias: Input,
    logits: Vec<f64>,
}

impl Layer {
    fn new(inputs: &mut Inputs<'_>, grouped: Grouped, tokens: usize, [rows, columns]: [usize; 2]) -> Layer {
        let matrix = inputs.mxfp4(grouped.experts * rows, columns);
        let bias = inputs.f32(grouped.experts * rows, 9.0);
        Layer { rows, columns, matrix, bias, logits: inputs.f32(tokens * grouped.experts, 2.0).values }
    }

    fn sorted(&self, grouped: Grouped, tile: Tile) -> Sorted {
        let Grouped { experts, active, .. } = grouped;
        super::dispatch::reference(Dispatch { experts, active, tile: tile.tokens }, &self.logits)
    }

    /// Weights and biases of an expert.
    fn expert(&self, id: u32) -> (&[f64], &[f64]) {
        let first = id as usize * self.rows;
        let weights = &self.matrix.values[first * self.columns..][..self.rows * self.columns];
        (weights, &self.bias.values[first..][..self.rows])
    }
}
