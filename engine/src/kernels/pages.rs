//! Keys or values of a sequence, put into pages as caches hold them.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use half::f16;

use super::check::{Cached, Comparison, Inputs, halves, read_cache};
use super::qkv::PAGE;
use super::rows::{UNITS, cubes, item};
use crate::error::Result;

/// The sizes of the keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    /// Key heads.
    pub kv_heads: usize,
    /// Width of a head, an even number.
    pub head_dim: usize,
}

impl Pages {
    /// Elements of the pages of so many positions.
    pub fn elements(&self, positions: usize) -> usize {
        positions.next_multiple_of(PAGE) * self.kv_heads * self.head_dim
    }
}

/// Writes `positions` rows (f32 `[positions, kv_heads, head_dim]`) to `cache` (`[pages, kv_heads, PAGE, head_dim]` of the type
/// `C`): position `p` to page `p / PAGE`. What lies past the last position is left as it is.
pub fn launch<C: Float>(client: &Client, pages: Pages, positions: usize, rows: &Handle, cache: &Handle) {
    let pairs = positions * pages.kv_heads * pages.head_dim / 2;
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at `pairs`.
    unsafe {
        pages_kernel::launch_unchecked::<C>(
            client,
            cubes(pairs),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(rows.clone(), pairs),
            BufferArg::from_raw_parts(cache.clone(), pages.elements(positions) / 2),
            pairs,
            pages,
        );
    }
}

#[cube(launch_unchecked)]
fn pages_kernel<C: Float>(
    rows: &[Vector<f32, Const<2>>],
    cache: &mut [Vector<C, Const<2>>],
    pairs: usize,
    #[comptime] pages: Pages,
) {
    let pair = item();
    if pair < pairs {
        let of_head = comptime!(pages.head_dim / 2);
        let kv_heads = comptime!(pages.kv_heads);
        let position = pair / of_head / kv_heads;
        let slot = (position / PAGE * kv_heads + pair / of_head % kv_heads) * PAGE + position % PAGE;
        cache[slot * of_head + pair % of_head] = Vector::<C, Const<2>>::cast_from(rows[pair]);
    }
}

/// A page, and several of which the last is not full.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = check_cached::<f32>(client)?;
    if halves(client) {
        found.extend(check_cached::<f16>(client)?);
    }
    Ok(found)
}

fn check_cached<C: Cached>(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (positions, kv_heads, head_dim) in [(1, 1, 16), (64, 2, 64), (150, 8, 24)] {
        let pages = Pages { kv_heads, head_dim };
        let mut inputs = Inputs::new(client, positions as u64);
        let rows = inputs.f32(positions * kv_heads * head_dim, 1.0);
        let elements = pages.elements(positions);
        let cache = client.create_from_slice(&vec![0xff; elements * size_of::<C>()]);
        launch::<C>(client, pages, positions, &rows.handle, &cache);
        let mut truth = vec![f64::NAN; elements];
        for (index, head) in rows.values.chunks(head_dim).enumerate() {
            let (position, kv_head) = (index / kv_heads, index % kv_heads);
            let slot = (position / PAGE * kv_heads + kv_head) * PAGE + position % PAGE;
            truth[slot * head_dim..(slot + 1) * head_dim].copy_from_slice(head);
        }
        let case = format!("{}, {positions} positions, {kv_heads}×{head_dim}", C::NAME);
        let cache = read_cache::<C>(client, &cache)?;
        found.push(Comparison::near("pages", case, head_dim, &cache, &truth, C::ROUNDING));
    }
    Ok(found)
}
