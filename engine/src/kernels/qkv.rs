//! The joint projection of queries, keys and values, with everything up to attention: RMSNorm before it, its bias, RoPE,
//! and the writing of keys and values to the cache.
//!
//! Rows `2i` and `2i + 1` of a `model.bin` are a pair that RoPE rotates, and one group of lanes computes both.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;

use super::check::{Angles, Cached, Comparison, F32, Inputs, Pool, halves, poisoned, read, read_cache};
use super::dense::{ROWS, Shape, dot_rows};
use super::group::{F4, Group, U4, group_sum};
use super::linear::inverse_rms;
use super::linear::multiplied;
use super::{normalise, rotate};
use crate::error::Result;

/// Groups in a cube: small cubes spread evenly.
const GROUPS: u32 = 1;
/// Chunks that a lane has in flight.
const UNROLL: usize = 4;
/// Positions of a page of the cache.
pub const PAGE: usize = 64;
/// Positions that share a row of the coarse table of angles.
pub const FINE: usize = 256;

/// The sizes of the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Qkv {
    /// Width of the residual stream, a multiple of 8.
    pub columns: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads, equally many value heads.
    pub kv_heads: usize,
    /// Width of a head, a multiple of 8.
    pub head_dim: usize,
    /// The bits of RMSNorm's ε.
    pub epsilon: u32,
    /// Page numbers of a sequence in `pages`: page `n` of a sequence stands at `n mod table`.
    pub table: usize,
}

/// The buffers of the projection.
pub struct Buffers<'a> {
    /// f32 `[tokens, columns]`: the residual stream.
    pub x: &'a Handle,
    /// f32 `[columns]`.
    pub norm: &'a Handle,
    /// bf16 `[(heads + 2 kv_heads) · head_dim, columns]`.
    pub weights: &'a Handle,
    /// f32, one for each row.
    pub bias: &'a Handle,
    /// f32 `[…, head_dim / 2, 2]`: cosine and sine of the positions that are multiples of [`FINE`].
    pub coarse: &'a Handle,
    /// f32 `[FINE, head_dim / 2, 2]`: those of the positions below, times the concentration.
    pub fine: &'a Handle,
    /// u32 `[tokens]`.
    pub positions: &'a Handle,
    /// u32 `[tokens, table]`.
    pub pages: &'a Handle,
    /// f32 `[tokens, heads · head_dim]`: the rotated queries.
    pub q: &'a Handle,
    /// `[pages, kv_heads, PAGE, head_dim]`.
    pub keys: &'a Handle,
    /// As `keys`.
    pub values: &'a Handle,
    /// Elements of `keys`.
    pub cache_len: usize,
}

/// Projects `tokens` rows, one of each sequence. The cache has the type `C`.
pub fn launch<C: Float>(client: &Client, qkv: Qkv, tokens: usize, buffers: &Buffers<'_>) {
    launch_grouped::<C>(client, qkv, tokens, buffers, Group::of(client));
}

/// [`launch`] with a group of one's choice.
fn launch_grouped<C: Float>(client: &Client, qkv: Qkv, tokens: usize, buffers: &Buffers<'_>, group: Group) {
    let rows = (qkv.heads + 2 * qkv.kv_heads) * qkv.head_dim;
    let chunks = qkv.columns / 8;
    let shape = Shape { chunks, tokens, normed: true, unroll: UNROLL, group }.fitted();
    let pairs = qkv.head_dim / 2;
    // SAFETY: lengths are those of the buffers by the caller's contract; `rows` is a multiple of 8, so that cubes cover them
    // exactly, and page numbers are those of the pool.
    unsafe {
        qkv_kernel::launch_unchecked::<C>(
            client,
            CubeCount::Static((rows / (ROWS * GROUPS as usize)) as u32, 1, 1),
            CubeDim::new_2d(group.lanes, GROUPS),
            BufferArg::from_raw_parts(buffers.weights.clone(), rows * chunks),
            BufferArg::from_raw_parts(buffers.bias.clone(), rows),
            BufferArg::from_raw_parts(buffers.norm.clone(), chunks * 2),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * chunks * 2),
            BufferArg::from_raw_parts(buffers.coarse.clone(), buffers.coarse.size() as usize / 4),
            BufferArg::from_raw_parts(buffers.fine.clone(), FINE * pairs * 2),
            BufferArg::from_raw_parts(buffers.positions.clone(), tokens),
            BufferArg::from_raw_parts(buffers.pages.clone(), tokens * qkv.table),
            BufferArg::from_raw_parts(buffers.q.clone(), tokens * qkv.heads * qkv.head_dim),
            BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len),
            BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len),
            qkv,
            shape,
        );
    }
}

#[cube(launch_unchecked)]
fn qkv_kernel<C: Float>(
    weights: &[U4],
    bias: &[f32],
    norm: &[F4],
    x: &[F4],
    coarse: &[f32],
    fine: &[f32],
    positions: &[u32],
    pages: &[u32],
    q: &mut [f32],
    keys: &mut [C],
    values: &mut [C],
    #[comptime] qkv: Qkv,
    #[comptime] shape: Shape,
) {
    let head_dim = comptime!(qkv.head_dim);
    let row = (CUBE_POS_X as usize * comptime!(GROUPS as usize) + UNIT_POS_Y as usize) * ROWS;
    let mut sums = Array::<f32>::new(comptime!(ROWS * shape.tokens));
    let mut squares = Array::<f32>::new(shape.tokens);
    dot_rows(weights, x, norm, &mut sums, &mut squares, row, shape);
    #[unroll]
    for t in 0..comptime!(shape.tokens) {
        let group = comptime!(shape.group);
        let factor =
            inverse_rms(group_sum(squares[t], group, GROUPS), comptime!(qkv.columns), comptime!(qkv.epsilon));
        let first = group_sum(sums[t * ROWS], group, GROUPS) * factor;
        let second = group_sum(sums[t * ROWS + 1], group, GROUPS) * factor;
        if UNIT_POS_X == 0 {
            let a = first + bias[row];
            let b = second + bias[row + 1];
            let head = row / head_dim;
            let offset = row % head_dim;
            let position = positions[t] as usize;
            if head < comptime!(qkv.heads + qkv.kv_heads) {
                // cos(c + f) and sin(c + f).
                let at_coarse = position / FINE * head_dim + offset;
                let at_fine = position % FINE * head_dim + offset;
                let cos = coarse[at_coarse] * fine[at_fine] - coarse[at_coarse + 1] * fine[at_fine + 1];
                let sin = coarse[at_coarse + 1] * fine[at_fine] + coarse[at_coarse] * fine[at_fine + 1];
                let rotated = a * cos - b * sin;
                let rotated_next = b * cos + a * sin;
                if head < comptime!(qkv.heads) {
                    q[t * comptime!(qkv.heads * qkv.head_dim) + row] = rotated;
                    q[t * comptime!(qkv.heads * qkv.head_dim) + row + 1] = rotated_next;
                } else {
                    let at = slot(pages, position, t, head - comptime!(qkv.heads), qkv) + offset;
                    keys[at] = C::cast_from(rotated);
                    keys[at + 1] = C::cast_from(rotated_next);
                }
            } else {
                let at = slot(pages, position, t, head - comptime!(qkv.heads + qkv.kv_heads), qkv) + offset;
                values[at] = C::cast_from(a);
                values[at + 1] = C::cast_from(b);
            }
        }
    }
}

/// Where the key of a position of sequence `t` begins.
#[cube]
fn slot(pages: &[u32], position: usize, t: usize, head: usize, #[comptime] qkv: Qkv) -> usize {
    let table = comptime!(qkv.table);
    let page = pages[t * table + position / PAGE % table] as usize;
    ((page * comptime!(qkv.kv_heads) + head) * PAGE + position % PAGE) * comptime!(qkv.head_dim)
}

/// Queries, keys and values of a token: `W·norm(x) + b`, the first two rotated.
fn reference(
    qkv: Qkv,
    weights: &[f64],
    bias: &[f64],
    norm: &[f64],
    x: &[f64],
    position: usize,
    angles: &Angles,
) -> [Vec<f64>; 3] {
    let normed = normalise::reference(x, norm, qkv.epsilon);
    let projected: Vec<f64> = multiplied(weights, &normed).zip(bias).map(|(sum, bias)| sum + bias).collect();
    rotate::reference(&projected, [qkv.heads, qkv.kv_heads, qkv.head_dim], position, angles)
}

/// Sequences at positions of either table of angles, tables in which pages come round.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |columns, [heads, kv_heads, head_dim]: [usize; 3], table| {
        let epsilon = 1e-5f32.to_bits();
        Qkv { columns, heads, kv_heads, head_dim, epsilon, table }
    };
    let mut found = check_cached::<f32>(client, &[(of(40, [4, 2, 16], 5), vec![300, 0])])?;
    if halves(client) {
        let cases = [
            (of(2880, [8, 1, 64], 3), vec![131_071]),
            (of(96, [16, 2, 64], 3), vec![255, 256, 5000]),
            (of(64, [8, 8, 24], 2), vec![128, 127]),
        ];
        found.extend(check_cached::<f16>(client, &cases)?);
    }
    Ok(found)
}

fn check_cached<C: Cached>(client: &Client, cases: &[(Qkv, Vec<usize>)]) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (qkv, positions) in cases {
        let &Qkv { columns, heads, kv_heads, head_dim, table, .. } = qkv;
        let (rows, tokens) = ((heads + 2 * kv_heads) * head_dim, positions.len());
        let mut inputs = Inputs::new(client, columns as u64);
        let (x, norm) = (inputs.f32(tokens * columns, 2.0), inputs.f32(columns, 2.0));
        let (weights, bias) = (inputs.bf16(rows * columns, 0.1), inputs.f32(rows, 1.0));
        let pool = Pool::new(&mut inputs.random, tokens, table, kv_heads, head_dim);
        let angles = Angles::new(&inputs, head_dim, positions.iter().copied().fold(0, usize::max));
        let (mut queries, mut cached) = (Vec::new(), pool.untouched());
        for (sequence, (&position, x)) in positions.iter().zip(x.values.chunks(columns)).enumerate() {
            let [q, k, v] =
                reference(*qkv, &weights.values, &bias.values, &norm.values, x, position, &angles);
            queries.extend(q);
            pool.write(&mut cached, sequence, position, [&k, &v]);
        }
        let numbers: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        for group in Group::all(client) {
            let q = poisoned(client, tokens * heads * head_dim);
            let [keys, values] = [(); 2].map(|()| pool.poisoned::<C>(client));
            let buffers = Buffers {
                x: &x.handle,
                norm: &norm.handle,
                weights: &weights.handle,
                bias: &bias.handle,
                coarse: &angles.coarse,
                fine: &angles.fine,
                positions: &inputs.upload(&numbers),
                pages: &inputs.upload(&pool.numbers),
                q: &q,
                keys: &keys,
                values: &values,
                cache_len: pool.len(),
            };
            launch_grouped::<C>(client, *qkv, tokens, &buffers, group);
            let case = |what: &str| {
                format!(
                    "{what}, {tokens} × {columns} → {heads}/{kv_heads}×{head_dim}, {}, {}",
                    C::NAME,
                    group.name()
                )
            };
            let near = |what: &str, found: &[f32], truth: &[f64], bound| {
                Comparison::near("qkv", case(what), head_dim, found, truth, bound)
            };
            found.push(near("queries", &read(client, &q)?, &queries, F32));
            let rounding = C::ROUNDING + F32;
            found.push(near("keys", &read_cache::<C>(client, &keys)?, &cached[0], rounding));
            found.push(near("values", &read_cache::<C>(client, &values)?, &cached[1], rounding));
        }
    }
    Ok(found)
}
