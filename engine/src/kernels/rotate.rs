//! From the projection of many tokens to attention: RoPE, and the writing of keys and values to the cache.

use std::ops::Range;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;

use super::check::{Angles, Cached, Comparison, F32, Inputs, Pool, halves, poisoned, read, read_cache};
use super::qkv::{FINE, PAGE};
use crate::error::Result;

/// Units of a cube.
const UNITS: usize = 256;

/// The sizes of the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rotate {
    /// Query heads.
    pub heads: usize,
    /// Key heads, equally many value heads.
    pub kv_heads: usize,
    /// Width of a head, a multiple of 2.
    pub head_dim: usize,
    /// Page numbers of a sequence in `pages`: page `n` of the sequence stands at `n mod table`.
    pub table: usize,
    /// Whether every token has a sequence of its own; else all are of one.
    pub each: bool,
}

/// The buffers of the rotation.
pub struct Buffers<'a> {
    /// f32 `[tokens, (heads + 2 kv_heads) · head_dim]`: the projection with its bias.
    pub projected: &'a Handle,
    /// f32 `[…, head_dim / 2, 2]`: cosine and sine of the positions that are multiples of [`FINE`].
    pub coarse: &'a Handle,
    /// f32 `[FINE, head_dim / 2, 2]`: those of the positions below, times the concentration.
    pub fine: &'a Handle,
    /// u32 `[tokens]`: the positions of the tokens.
    pub positions: &'a Handle,
    /// u32 `[sequences, table]`.
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

/// Rotates `tokens` rows. The cache has the type `C`.
pub fn launch<C: Float>(client: &Client, rotate: Rotate, tokens: usize, buffers: &Buffers<'_>) {
    let pairs = rotate.head_dim / 2;
    let sequences = if rotate.each { tokens } else { 1 };
    // SAFETY: lengths are those of the buffers by the caller's contract, page numbers are those of the pool, and units stop at the
    // end of a row.
    unsafe {
        rotate_kernel::launch_unchecked::<C>(
            client,
            CubeCount::Static(tokens as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(
                buffers.projected.clone(),
                tokens * (rotate.heads + 2 * rotate.kv_heads) * pairs,
            ),
            BufferArg::from_raw_parts(buffers.coarse.clone(), buffers.coarse.size() as usize / 8),
            BufferArg::from_raw_parts(buffers.fine.clone(), FINE * pairs),
            BufferArg::from_raw_parts(buffers.positions.clone(), tokens),
            BufferArg::from_raw_parts(buffers.pages.clone(), sequences * rotate.table),
            BufferArg::from_raw_parts(buffers.q.clone(), tokens * rotate.heads * pairs),
            BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len / 2),
            BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len / 2),
            rotate,
        );
    }
}

#[cube(launch_unchecked)]
fn rotate_kernel<C: Float>(
    projected: &[Vector<f32, Const<2>>],
    coarse: &[Vector<f32, Const<2>>],
    fine: &[Vector<f32, Const<2>>],
    positions: &[u32],
    pages: &[u32],
    q: &mut [Vector<f32, Const<2>>],
    keys: &mut [Vector<C, Const<2>>],
    values: &mut [Vector<C, Const<2>>],
    #[comptime] rotate: Rotate,
) {
    let of_head = comptime!(rotate.head_dim / 2);
    let queries = comptime!(rotate.heads * rotate.head_dim / 2);
    let all = comptime!((rotate.heads + 2 * rotate.kv_heads) * rotate.head_dim / 2);
    let token = CUBE_POS_X as usize;
    let position = positions[token] as usize;
    let sequence = if comptime!(rotate.each) { token } else { 0usize.runtime() };
    let page = pages[sequence * comptime!(rotate.table) + position / PAGE % comptime!(rotate.table)] as usize;
    let mut pair = UNIT_POS as usize;
    while pair < all {
        let both = projected[token * all + pair];
        let (head, offset) = (pair / of_head, pair % of_head);
        // cos(c + f) and sin(c + f).
        let c = coarse[position / FINE * of_head + offset];
        let f = fine[position % FINE * of_head + offset];
        let cos = c.extract(0usize) * f.extract(0usize) - c.extract(1usize) * f.extract(1usize);
        let sin = c.extract(1usize) * f.extract(0usize) + c.extract(0usize) * f.extract(1usize);
        let mut rotated = Vector::<f32, Const<2>>::empty();
        rotated.insert(0usize, both.extract(0usize) * cos - both.extract(1usize) * sin);
        rotated.insert(1usize, both.extract(1usize) * cos + both.extract(0usize) * sin);
        if pair < queries {
            q[token * queries + pair] = rotated;
        } else {
            let slot = (page * comptime!(rotate.kv_heads) + head % comptime!(rotate.kv_heads)) * PAGE
                + position % PAGE;
            let at = slot * of_head + offset;
            if head < comptime!(rotate.heads + rotate.kv_heads) {
                keys[at] = Vector::<C, Const<2>>::cast_from(rotated);
            } else {
                values[at] = Vector::<C, Const<2>>::cast_from(both);
            }
        }
        pair += UNITS;
    }
}

/// Queries, keys and values of a projected row: heads one after the other, the first two kinds rotated.
pub(crate) fn reference(
    projected: &[f64],
    [heads, kv_heads, head_dim]: [usize; 3],
    position: usize,
    angles: &Angles,
) -> [Vec<f64>; 3] {
    let (q, rest) = projected.split_at(heads * head_dim);
    let (k, v) = rest.split_at(kv_heads * head_dim);
    let rotated = |heads: &[f64]| {
        heads.chunks(head_dim).flat_map(|head| angles.rotated(head, position)).collect::<Vec<f64>>()
    };
    [rotated(q), rotated(k), v.to_vec()]
}

/// Chunks within a page and over several, within a row of the coarse table and over two, tables in which pages come round; and
/// sequences at positions of their own.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |[heads, kv_heads, head_dim]: [usize; 3], table, positions: Range<usize>| {
        (Rotate { heads, kv_heads, head_dim, table, each: false }, positions.collect::<Vec<_>>())
    };
    let several = of([16, 2, 64], 5, 170..300);
    let mut each = of([8, 2, 64], 4, 0..0);
    each.0.each = true;
    each.1 = vec![3, 900, 64, 127, 0, 255, 256];
    let mut found = check_cached::<f32>(client, &[several.clone(), each.clone()])?;
    if halves(client) {
        let cases = [
            several,
            each,
            of([4, 2, 16], 1, 0..1),
            of([8, 1, 64], 4, 131_000..131_017),
            of([64, 8, 64], 3, 254..257),
            of([8, 8, 24], 2, 60..100),
        ];
        found.extend(check_cached::<f16>(client, &cases)?);
    }
    Ok(found)
}

fn check_cached<C: Cached>(client: &Client, cases: &[(Rotate, Vec<usize>)]) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (rotate, positions) in cases {
        let &Rotate { heads, kv_heads, head_dim, table, each } = rotate;
        let (first, tokens) = (positions[0], positions.len());
        let width = (heads + 2 * kv_heads) * head_dim;
        let mut inputs = Inputs::new(client, first as u64);
        let projected = inputs.f32(tokens * width, 1.0);
        let pool = Pool::new(&mut inputs.random, if each { tokens } else { 1 }, table, kv_heads, head_dim);
        let last = positions.iter().copied().max().unwrap_or(0);
        let angles = Angles::new(&inputs, head_dim, last + 1);
        let (mut queries, mut cached) = (Vec::new(), pool.untouched());
        for (index, (row, &position)) in projected.values.chunks(width).zip(positions).enumerate() {
            let [q, k, v] = reference(row, [heads, kv_heads, head_dim], position, &angles);
            queries.extend(q);
            pool.write(&mut cached, if each { index } else { 0 }, position, [&k, &v]);
        }
        let q = poisoned(client, tokens * heads * head_dim);
        let [keys, values] = [(); 2].map(|()| pool.poisoned::<C>(client));
        let buffers = Buffers {
            projected: &projected.handle,
            coarse: &angles.coarse,
            fine: &angles.fine,
            positions: &inputs.upload(&positions.iter().map(|&position| position as u32).collect::<Vec<_>>()),
            pages: &inputs.upload(&pool.numbers),
            q: &q,
            keys: &keys,
            values: &values,
            cache_len: pool.len(),
        };
        launch::<C>(client, *rotate, tokens, &buffers);
        let near = |what: &str, found: &[f32], truth: &[f64], bound| {
            let case =
                format!("{what}, {}, {heads}/{kv_heads}×{head_dim}, {tokens} tokens from {first}", C::NAME);
            Comparison::near("rotate", case, head_dim, found, truth, bound)
        };
        found.push(near("queries", &read(client, &q)?, &queries, F32));
        let rounding = C::ROUNDING + F32;
        found.push(near("keys", &read_cache::<C>(client, &keys)?, &cached[0], rounding));
        found.push(near("values", &read_cache::<C>(client, &values)?, &cached[1], rounding));
    }
    Ok(found)
}
