//! From the projection of many tokens of one sequence to attention: RoPE, and the writing of keys and values to the cache.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::qkv::{FINE, PAGE};

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
    /// Page numbers in `pages`: page `n` of the sequence stands at `n mod table`.
    pub table: usize,
}

/// The buffers of the rotation.
pub struct Buffers<'a> {
    /// f32 `[tokens, (heads + 2 kv_heads) · head_dim]`: the projection with its bias.
    pub projected: &'a Handle,
    /// f32 `[…, head_dim / 2, 2]`: cosine and sine of the positions that are multiples of [`FINE`].
    pub coarse: &'a Handle,
    /// f32 `[FINE, head_dim / 2, 2]`: those of the positions below, times the concentration.
    pub fine: &'a Handle,
    /// u32 `[table]`: the pages of the sequence.
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

/// Rotates `tokens` rows of positions `first..first + tokens`. The cache has the type `C`.
pub fn launch<C: Float>(client: &Client, rotate: Rotate, first: usize, tokens: usize, buffers: &Buffers<'_>) {
    let pairs = rotate.head_dim / 2;
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
            BufferArg::from_raw_parts(buffers.pages.clone(), rotate.table),
            BufferArg::from_raw_parts(buffers.q.clone(), tokens * rotate.heads * pairs),
            BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len / 2),
            BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len / 2),
            first,
            rotate,
        );
    }
}

#[cube(launch_unchecked)]
fn rotate_kernel<C: Float>(
    projected: &[Vector<f32, Const<2>>],
    coarse: &[Vector<f32, Const<2>>],
    fine: &[Vector<f32, Const<2>>],
    pages: &[u32],
    q: &mut [Vector<f32, Const<2>>],
    keys: &mut [Vector<C, Const<2>>],
    values: &mut [Vector<C, Const<2>>],
    first: usize,
    #[comptime] rotate: Rotate,
) {
    let of_head = comptime!(rotate.head_dim / 2);
    let queries = comptime!(rotate.heads * rotate.head_dim / 2);
    let all = comptime!((rotate.heads + 2 * rotate.kv_heads) * rotate.head_dim / 2);
    let token = CUBE_POS_X as usize;
    let position = first + token;
    let page = pages[position / PAGE % comptime!(rotate.table)] as usize;
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
