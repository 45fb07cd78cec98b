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

use super::check::{Comparison, F32, Inputs, poisoned, read};
use super::group::U4;
use super::router::selection;
use crate::error::Result;

/// Units of a cube.
const UNITS: usize = 256;
/// Experts of a layer, at most: a unit lists the tiles of each.
pub const MOST_EXPERTS: usize = UNITS;
/// Logits, up to which a cube takes them all.
const MOST_LOGITS: usize = 2048;
/// The id of a place that no expert has taken.
const NONE: u32 = u32::MAX;

/// The sizes of the selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dispatch {
    /// Experts, at most [`MOST_EXPERTS`].
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
        if pairs <= UNITS && tokens * experts <= MOST_LOGITS {
            few_kernel::launch_unchecked(
                client,
                CubeCount::Static(1, 1, 1),
                dim,
                BufferArg::from_raw_parts(buffers.logits.clone(), tokens * experts),
                BufferArg::from_raw_parts(buffers.ids.clone(), pairs),
                BufferArg::from_raw_parts(buffers.shares.clone(), pairs),
                BufferArg::from_raw_parts(buffers.order.clone(), pairs),
                BufferArg::from_raw_parts(buffers.starts.clone(), experts + 1),
                BufferArg::from_raw_parts(buffers.tiles.clone(), tiles),
                tokens,
                tiles,
                dispatch,
            );
            return;
        }
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

/// All of it, for so few tokens that a unit has a pair.
#[cube(launch_unchecked)]
fn few_kernel(
    logits: &[f32],
    ids: &mut [u32],
    shares: &mut [f32],
    order: &mut [u32],
    starts: &mut [u32],
    tiles: &mut [U4],
    tokens: usize,
    bound: usize,
    #[comptime] dispatch: Dispatch,
) {
    let unit = UNIT_POS as usize;
    let (experts, active) = (comptime!(dispatch.experts), comptime!(dispatch.active));
    let pairs = tokens * active;
    let mut staged = Shared::<[f32]>::new_slice(MOST_LOGITS);
    let mut selected = Shared::<[u32]>::new_slice(UNITS);
    let mut values = Shared::<[f32]>::new_slice(UNITS);
    // Places without an expert: whatever is read there must be one.
    selected[unit] = 0u32;
    values[unit] = 0.0f32;
    let mut at = unit;
    while at < tokens * experts {
        staged[at] = logits[at];
        at += UNITS;
    }
    sync_cube();
    // A unit finds the place of an expert by comparing it with all; what is not a number has none.
    let mut at = unit;
    while at < tokens * experts {
        let (token, expert) = (at / experts, at % experts);
        let own = staged[at];
        let mut before = select(own.is_nan(), comptime!(active as u32), 0u32);
        for other in 0..experts {
            let logit = staged[token * experts + other];
            let larger = logit > own || (logit == own && other < expert);
            before += select(larger, 1u32, 0u32);
        }
        if before < comptime!(active as u32) {
            selected[token * active + before as usize] = expert as u32;
            values[token * active + before as usize] = own;
        }
        at += UNITS;
    }
    sync_cube();
    if unit < pairs {
        let first = unit / active * active;
        let mut sum = 0.0f32;
        #[unroll]
        for place in 0..active {
            sum += (values[first + place] - values[first]).exp();
        }
        let own = selected[unit];
        ids[unit] = own;
        shares[unit] = (values[unit] - values[first]).exp() / sum;
        let mut before = 0u32;
        for pair in 0..pairs {
            let id = selected[pair];
            before += select(id < own || (id == own && pair < unit), 1u32, 0u32);
        }
        order[before as usize] = unit as u32;
    }
    let mut start = 0u32;
    let mut count = 0u32;
    if unit < experts {
        for pair in 0..pairs {
            let id = selected[pair] as usize;
            start += select(id < unit, 1u32, 0u32);
            count += select(id == unit, 1u32, 0u32);
        }
        starts[unit] = start;
        if unit == comptime!(dispatch.experts - 1) {
            starts[unit + 1] = start + count;
        }
    }
    list_tiles(tiles, unit as u32, start, count, bound, comptime!(dispatch.tile as u32));
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
    list_tiles(tiles, expert as u32, start, pairs, bound, size);
}

/// Lists the tiles of a unit's expert, whose pairs begin at `start`, behind those of the units before it, and empty ones at the end.
/// All units of the cube call it.
#[cube]
fn list_tiles(tiles: &mut [U4], expert: u32, start: u32, pairs: u32, bound: usize, #[comptime] size: u32) {
    let unit = UNIT_POS as usize;
    let count = pairs.div_ceil(size);
    let mut ends = Shared::<[u32]>::new_slice(UNITS);
    ends[unit] = count;
    scan(&mut ends);
    let first = ends[unit] - count;
    for i in 0..count {
        let mut tile = U4::empty();
        tile.insert(0usize, expert);
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

/// What the kernels write.
pub(crate) struct Sorted {
    pub ids: Vec<u32>,
    pub shares: Vec<f64>,
    pub order: Vec<u32>,
    pub starts: Vec<u32>,
    pub tiles: Vec<[u32; 4]>,
}

/// The selection of rows of logits, and the order in which experts take the pairs.
pub(crate) fn reference(dispatch: Dispatch, logits: &[f64]) -> Sorted {
    let Dispatch { experts, active, tile } = dispatch;
    let (ids, shares): (Vec<u32>, Vec<f64>) = logits
        .chunks(experts)
        .flat_map(|logits| selection(logits, active))
        .map(|(id, share)| (id as u32, share))
        .unzip();
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&pair| ids[pair as usize]);
    let (mut starts, mut tiles) = (vec![0], Vec::new());
    for expert in 0..experts as u32 {
        let start = starts[expert as usize];
        let end = start + ids.iter().filter(|&&id| id == expert).count() as u32;
        let firsts = (start..end).step_by(tile);
        tiles.extend(firsts.map(|first| [expert, first, (end - first).min(tile as u32), 0]));
        starts.push(end);
    }
    tiles.resize(dispatch.tiles(logits.len() / experts), [0; 4]);
    Sorted { ids, shares, order, starts, tiles }
}

/// Equal logits, logits that are not numbers, experts that all choose and none, and more pairs than a cube has units.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, experts, active, tile) in
        [(1, 4, 4, 16), (3, 32, 4, 16), (17, 4, 2, 3), (130, 32, 4, 16), (300, 128, 4, 64)]
    {
        let mut inputs = Inputs::new(client, tokens as u64);
        let dispatch = Dispatch { experts, active, tile };
        let mut logits = inputs.random.values(tokens * experts, 4.0);
        for (token, row) in logits.chunks_mut(experts).enumerate() {
            match token % 4 {
                1 => row.iter_mut().for_each(|logit| *logit = logit.round()),
                2 => row[token % experts] = f32::NAN,
                3 => row[..active].iter_mut().for_each(|logit| *logit += 50.0),
                _ => {}
            }
        }
        let logits = inputs.of(&logits);
        let (pairs, tiles) = (tokens * active, dispatch.tiles(tokens));
        let [ids, shares, order, starts, tiles] =
            [pairs, pairs, pairs, experts + 1, 4 * tiles].map(|words| poisoned(client, words));
        let buffers = Buffers {
            logits: &logits.handle,
            ids: &ids,
            shares: &shares,
            order: &order,
            starts: &starts,
            tiles: &tiles,
        };
        launch(client, dispatch, tokens, &buffers);
        let truth = reference(dispatch, &logits.values);
        let case =
            |what: &str| format!("{what}, {tokens} tokens, {active} of {experts} experts, tiles of {tile}");
        for (what, found_here, truth) in [
            ("ids", ids, &truth.ids[..]),
            ("order", order, &truth.order),
            ("starts", starts, &truth.starts),
            ("tiles", tiles, truth.tiles.as_flattened()),
        ] {
            let found_here: Vec<u32> = read(client, &found_here)?;
            found.push(Comparison::exact("dispatch", case(what), &found_here, truth));
        }
        let shares = read(client, &shares)?;
        found.push(Comparison::near("dispatch", case("shares"), active, &shares, &truth.shares, F32));
    }
    Ok(found)
}
