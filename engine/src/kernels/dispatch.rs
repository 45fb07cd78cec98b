//! The selection of experts for many tokens, and the order in which the experts take them.
//!
//! A pair is a token and one of its selected experts, numbered `token · active + place`. Pairs are sorted by expert, stably,
//! and cut into tiles of one expert each. All of it stays on the device: the host knows only how many tiles there can be.
//!
//! ```text
//! logits ─► ids, shares ─► order: the pairs of expert 0, those of expert 1, …
//!                      └─► tiles: (expert, first place in the order, count), empty ones last
//! ```

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::group::U4;

/// Units of a cube.
const UNITS: usize = 256;
/// The id of a place that no expert has taken.
const NONE: u32 = u32::MAX;

/// The sizes of the selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dispatch {
    /// Experts, at most 256.
    pub experts: usize,
    /// Experts that are selected for a token.
    pub active: usize,
    /// Pairs of a tile, at most.
    pub tile: usize,
}

impl Dispatch {
    /// The most tiles that `tokens` tokens can need.
    pub fn tiles(&self, tokens: usize) -> usize {
        let pairs = tokens * self.active;
        pairs.min(pairs / self.tile + self.experts)
    }
}

/// The buffers of the selection.
pub struct Buffers<'a> {
    /// f32 `[tokens, experts]`: the router's logits.
    pub logits: &'a Handle,
    /// u32 `[tokens, active]`: the selected experts, the largest logit first and the lower id first among equals.
    pub ids: &'a Handle,
    /// f32 `[tokens, active]`: their weights, the softmax over the selected.
    pub shares: &'a Handle,
    /// u32 `[tokens · active]`: the pairs, sorted.
    pub order: &'a Handle,
    /// u32 `[experts + 1]`: where the pairs of each expert begin in `order`.
    pub starts: &'a Handle,
    /// u32 `[Dispatch::tiles(tokens), 4]`: expert, first place in `order`, pairs, 0.
    pub tiles: &'a Handle,
}

/// Selects and sorts for `tokens` rows.
pub fn launch(client: &Client, dispatch: Dispatch, tokens: usize, buffers: &Buffers<'_>) {
    let Dispatch { experts, active, .. } = dispatch;
    let (pairs, tiles) = (tokens * active, dispatch.tiles(tokens));
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: lengths are those of the buffers by the caller's contract; ids are below `experts`, and units stop at the ends.
    unsafe {
        select_kernel::launch_unchecked(
            client,
            CubeCount::Static(tokens.div_ceil(UNITS) as u32, 1, 1),
            dim,
            BufferArg::from_raw_parts(buffers.logits.clone(), tokens * experts),
            BufferArg::from_raw_parts(buffers.ids.clone(), pairs),
            BufferArg::from_raw_parts(buffers.shares.clone(), pairs),
            tokens,
            experts,
            active,
        );
        sort_kernel::launch_unchecked(
            client,
            CubeCount::Static(experts as u32, 1, 1),
            dim,
            BufferArg::from_raw_parts(buffers.ids.clone(), pairs),
            BufferArg::from_raw_parts(buffers.order.clone(), pairs),
            BufferArg::from_raw_parts(buffers.starts.clone(), experts + 1),
            pairs,
        );
        tiles_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            dim,
            BufferArg::from_raw_parts(buffers.starts.clone(), experts + 1),
            BufferArg::from_raw_parts(buffers.tiles.clone(), tiles),
            tiles,
            dispatch,
        );
    }
}

/// A unit selects for a token: it inserts the experts, one by one, into a list of the best.
#[cube(launch_unchecked)]
fn select_kernel(
    logits: &[f32],
    ids: &mut [u32],
    shares: &mut [f32],
    tokens: usize,
    experts: usize,
    #[comptime] active: usize,
) {
    let token = ABSOLUTE_POS;
    if token < tokens {
        let mut best = Array::<u32>::new(active);
        let mut values = Array::<f32>::new(active);
        #[unroll]
        for place in 0..active {
            best[place] = NONE;
            values[place] = 0.0f32;
        }
        for expert in 0..experts {
            let mut id = expert as u32;
            let mut value = logits[token * experts + expert];
            let mut before = false;
            #[unroll]
            for place in 0..active {
                let (other, logit) = (best[place], values[place]);
                // What it displaces moves on, and what is not a number is never selected.
                before = before || value > logit || (other == NONE && !value.is_nan());
                best[place] = select(before, id, other);
                values[place] = select(before, value, logit);
                id = select(before, other, id);
                value = select(before, logit, value);
            }
        }
        let mut sum = 0.0f32;
        #[unroll]
        for place in 0..active {
            // Places without an expert: whatever is read there must be one.
            best[place] = select(best[place] == NONE, 0u32, best[place]);
            sum += (values[place] - values[0]).exp();
        }
        #[unroll]
        for place in 0..active {
            ids[token * active + place] = best[place];
            shares[token * active + place] = (values[place] - values[0]).exp() / sum;
        }
    }
}

/// A cube places the pairs of an expert, and a unit those of a part of the tokens: it counts, and learns from the cube how many
/// come before.
#[cube(launch_unchecked)]
fn sort_kernel(ids: &[u32], order: &mut [u32], starts: &mut [u32], pairs: usize) {
    let unit = UNIT_POS as usize;
    let expert = CUBE_POS_X as usize;
    let part = pairs.div_ceil(UNITS);
    let first = unit * part;
    let end = select(first + part < pairs, first + part, pairs);
    let mut own = Shared::<[u32]>::new_slice(UNITS);
    let mut lower = Shared::<[u32]>::new_slice(UNITS);
    let mut count = 0u32;
    let mut below = 0u32;
    let mut pair = first;
    while pair < end {
        let id = ids[pair] as usize;
        count += select(id == expert, 1u32, 0u32);
        below += select(id < expert, 1u32, 0u32);
        pair += 1;
    }
    own[unit] = count;
    lower[unit] = below;
    scan(&mut own);
    scan(&mut lower);
    let start = lower[comptime!(UNITS - 1)];
    if unit == 0 {
        starts[expert] = start;
        starts[expert + 1] = start + own[comptime!(UNITS - 1)];
    }
    let mut at = start + own[unit] - count;
    let mut pair = first;
    while pair < end {
        if ids[pair] as usize == expert {
            order[at as usize] = pair as u32;
            at += 1u32;
        }
        pair += 1;
    }
}

/// Replaces each of [`UNITS`] numbers by the sum of those up to it. All units of the cube call it.
#[cube]
fn scan(numbers: &mut [u32]) {
    let unit = UNIT_POS as usize;
    let mut step = 1usize.runtime();
    while step < UNITS {
        sync_cube();
        let before = select(unit >= step, numbers[select(unit >= step, unit - step, 0usize)], 0u32);
        sync_cube();
        numbers[unit] += before;
        step *= 2;
    }
    sync_cube();
}

/// A unit lists the tiles of an expert.
#[cube(launch_unchecked)]
fn tiles_kernel(starts: &[u32], tiles: &mut [U4], bound: usize, #[comptime] dispatch: Dispatch) {
    let unit = UNIT_POS as usize;
    let size = comptime!(dispatch.tile as u32);
    let expert = select(unit < comptime!(dispatch.experts), unit, comptime!(dispatch.experts - 1));
    let start = starts[expert];
    let pairs = select(unit < comptime!(dispatch.experts), starts[expert + 1] - start, 0u32);
    let count = pairs.div_ceil(size);
    let mut ends = Shared::<[u32]>::new_slice(UNITS);
    ends[unit] = count;
    scan(&mut ends);
    let first = ends[unit] - count;
    for i in 0..count {
        let mut tile = U4::empty();
        tile.insert(0usize, expert as u32);
        tile.insert(1usize, start + i * size);
        tile.insert(2usize, select(pairs - i * size < size, pairs - i * size, size));
        tile.insert(3usize, 0u32);
        tiles[(first + i) as usize] = tile;
    }
    let mut empty = ends[comptime!(UNITS - 1)] as usize + unit;
    while empty < bound {
        tiles[empty] = U4::new(0u32);
        empty += UNITS;
    }
}
