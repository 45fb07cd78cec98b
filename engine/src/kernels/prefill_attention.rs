//! Attention of many new tokens of one sequence over its cache, which already holds their keys and values: causal, with sinks and
//! a sliding window.
//!
//! A cube takes some neighbouring tokens and one key head; the queries that share it are rows of one product. Keys pass by
//! a tile at a time, with a running softmax, so that nothing of the size of the scores is ever stored.
//!
//! ```text
//! keys ─► scores = q·kᵀ ─► largest, weights ─► sums = shrink · sums + weights·v
//! ```
//!
//! With tensor cores a plane has 16 rows, and the scores that the first product leaves in a lane's registers are what the second
//! takes from that lane. The factors are f16: weights lie between 0 and 1, and f16 holds 3 bits more than bf16.

use cubecl::client::Client;
use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::ir::FloatKind;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;

use super::attention;
use super::check::{Cached, Comparison, F16, F32, Inputs, Pool, halves, poisoned, read, values_of};
use super::group::{F4, U4};
use super::method::{Method, has_mma, write_pair};
use super::qkv::PAGE;
use crate::error::Result;

/// Planes of a cube with tensor cores.
const PLANES: usize = 8;
/// Rows of a cube with tensor cores.
const ROWS: usize = 16 * PLANES;
/// The width of a head with tensor cores.
const HEAD: usize = 64;
/// Pieces of 16 bytes in a key in shared memory.
const PIECES: usize = HEAD / 8;
/// Pieces of a page that a unit stages.
const STAGED: usize = PAGE * PIECES / (32 * PLANES);
/// Units of a cube without tensor cores.
const UNITS: usize = 256;
/// Keys that such a cube looks at at a time.
const TILE: usize = 32;
/// The score of what is not seen: far below any other, and finite.
const HIDDEN: f32 = -1e30;

/// Eight values of a cache.
type C8<C> = Vector<C, Const<8>>;
/// Two f32.
type F2 = Vector<f32, Const<2>>;
/// Two f16, a register of a factor.
type H2 = Vector<f16, Const<2>>;

/// The sizes of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillAttention {
    /// Query heads.
    pub heads: usize,
    /// Key heads; queries `h` read keys `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head, a multiple of 8.
    pub head_dim: usize,
    /// Keys that a query sees, its own included; 0 for all.
    pub window: usize,
    /// Page numbers in `pages`: page `n` of the sequence stands at `n mod table`. The pages of all keys that any of the new
    /// tokens sees must differ.
    pub table: usize,
}

impl PrefillAttention {
    /// Query heads of a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens of a cube without tensor cores.
    fn tokens(&self) -> usize {
        (TILE / self.group()).max(1)
    }

    /// Bytes of shared memory that a cube without tensor cores takes.
    pub(crate) fn shared_bytes(&self) -> usize {
        let rows = self.tokens() * self.group();
        let queries_and_tile = rows * self.head_dim + TILE * (self.head_dim + 2);
        size_of::<f32>() * (queries_and_tile + rows * (TILE + 1) + 3 * rows)
    }

    /// Pairs of the output that a unit has without tensor cores.
    fn items(&self) -> usize {
        (self.tokens() * self.group() * self.head_dim / 2).div_ceil(UNITS)
    }
}

/// The buffers of attention.
pub struct Buffers<'a> {
    /// f32 `[tokens, heads, head_dim]`.
    pub q: &'a Handle,
    /// `[pages, kv_heads, PAGE, head_dim]`.
    pub keys: &'a Handle,
    /// As `keys`.
    pub values: &'a Handle,
    /// Elements of `keys`.
    pub cache_len: usize,
    /// u32 `[table]`: the pages of the sequence.
    pub pages: &'a Handle,
    /// f32 `[heads]`.
    pub sinks: &'a Handle,
    /// `[tokens, heads, head_dim]` in the words of [`Method`].
    pub out: &'a Handle,
}

/// Attends with `tokens` queries of positions `first..first + tokens`. The cache has the type `C`.
pub fn launch<C: Float>(
    client: &Client,
    attention: PrefillAttention,
    first: usize,
    tokens: usize,
    buffers: &Buffers<'_>,
) {
    launch_for::<C>(client, attention, first, tokens, buffers, Method::of(client));
}

/// [`launch`] for a method of one's choice.
fn launch_for<C: Float>(
    client: &Client,
    attention: PrefillAttention,
    first: usize,
    tokens: usize,
    buffers: &Buffers<'_>,
    method: Method,
) {
    let PrefillAttention { heads, kv_heads, head_dim, table, .. } = attention;
    let fits = head_dim == HEAD && ROWS.is_multiple_of(attention.group());
    let out = tokens * method.words(heads * head_dim);
    // SAFETY: lengths are those of the buffers by the caller's contract, and page numbers are those of the pool; what lies past the
    // last token is read from it and not written.
    unsafe {
        if fits && method == Method::TensorCores && has_mma(client, FloatKind::F16) {
            tensor_kernel::launch_unchecked::<C>(
                client,
                CubeCount::Static(kv_heads as u32, tokens.div_ceil(ROWS / attention.group()) as u32, 1),
                CubeDim::new_2d(32, PLANES as u32),
                BufferArg::from_raw_parts(buffers.q.clone(), tokens * heads * head_dim / 4),
                BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len / 8),
                BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len / 8),
                BufferArg::from_raw_parts(buffers.pages.clone(), table),
                BufferArg::from_raw_parts(buffers.sinks.clone(), heads),
                BufferArg::from_raw_parts(buffers.out.clone(), out),
                first,
                tokens,
                attention,
            );
        } else {
            units_kernel::launch_unchecked::<C>(
                client,
                CubeCount::Static(kv_heads as u32, tokens.div_ceil(attention.tokens()) as u32, 1),
                CubeDim::new_1d(UNITS as u32),
                BufferArg::from_raw_parts(buffers.q.clone(), tokens * heads * head_dim / 2),
                BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len / 2),
                BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len / 2),
                BufferArg::from_raw_parts(buffers.pages.clone(), table),
                BufferArg::from_raw_parts(buffers.sinks.clone(), heads),
                BufferArg::from_raw_parts(buffers.out.clone(), out),
                first,
                tokens,
                attention,
                method,
            );
        }
    }
}

/// Where the keys that the tokens from position `position` on see begin: at a multiple of `tile`.
#[cube]
fn first_key(position: usize, #[comptime] tile: usize, #[comptime] attention: PrefillAttention) -> usize {
    let mut start = 0usize.runtime();
    if comptime!(attention.window > 0) {
        let window = comptime!(attention.window);
        start = select(position + 1 > window, position + 1 - window, 0usize) / tile * tile;
    }
    start
}

/// Whether the query of a position sees a key.
#[cube]
fn sees(position: usize, key: usize, #[comptime] attention: PrefillAttention) -> bool {
    if comptime!(attention.window > 0) {
        key <= position && key + comptime!(attention.window) > position
    } else {
        key <= position
    }
}

/// Where the key of a position begins, in keys.
#[cube]
fn slot(pages: &[u32], position: usize, head: usize, #[comptime] attention: PrefillAttention) -> usize {
    let page = pages[position / PAGE % comptime!(attention.table)] as usize;
    (page * comptime!(attention.kv_heads) + head) * PAGE + position % PAGE
}

#[cube(launch_unchecked)]
pub(crate) fn tensor_kernel<C: Float>(
    q: &[F4],
    keys: &[C8<C>],
    values: &[C8<C>],
    pages: &[u32],
    sinks: &[f32],
    out: &mut [u32],
    first: usize,
    tokens: usize,
    #[comptime] attention: PrefillAttention,
) {
    let group = comptime!(attention.group());
    let of_cube = comptime!(ROWS / attention.group());
    let lane = UNIT_POS_X as usize;
    let (of_eight, quarter) = (lane / 4, lane % 4);
    let kv_head = CUBE_POS_X as usize;
    // The last tokens see the most keys: their cubes come first.
    let first_token = (tokens.div_ceil(of_cube) - 1 - CUBE_POS_Y as usize) * of_cube;
    let definition = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let mut key_tile = Shared::<[U4]>::new_slice(comptime!(PAGE * PIECES));
    let mut value_tile = Shared::<[C8<f16>]>::new_slice(comptime!(PAGE * PIECES));

    // A lane has two rows, eight apart, and of each of their heads the columns 32j + 8·quarter + 0..8 as factors.
    let row = UNIT_POS_Y as usize * 16 + of_eight;
    let mut positions = Array::<usize>::new(2usize);
    let mut queries = Sequence::<Array<H2>>::new();
    #[unroll]
    for _ in 0..comptime!(HEAD / 16) {
        queries.push(Array::<H2>::new(4usize));
    }
    #[unroll]
    for half in 0..2usize {
        let row = row + half * 8;
        let token = first_token + row / group;
        positions[half] = first + token;
        let token = select(token < tokens, token, tokens - 1);
        let start =
            (token * comptime!(attention.heads) + kv_head * group + row % group) * comptime!(HEAD / 4);
        #[unroll]
        for step in 0..comptime!(HEAD / 16) {
            let four = q[start + comptime!(step / 2 * 8) + quarter * 2 + comptime!(step % 2)];
            let factors = queries.index_mut(step);
            #[unroll]
            for i in 0..2usize {
                let mut both = F2::empty();
                both.insert(0usize, four.extract(comptime!(2 * i)));
                both.insert(1usize, four.extract(comptime!(2 * i + 1)));
                factors[half + 2 * i] = H2::cast_from(both);
            }
        }
    }

    let mut sums = Sequence::<Array<F2>>::new();
    #[unroll]
    for _ in 0..comptime!(HEAD / 8) {
        sums.push(zeros());
    }
    let mut largest = Array::<f32>::new(2usize);
    let mut totals = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        largest[half] = HIDDEN;
        totals[half] = 0.0f32;
    }

    let last = first_token + of_cube;
    let end = first + select(last < tokens, last, tokens);
    let mut start = first_key(first + first_token, PAGE, attention);
    let mut next_keys = Array::<U4>::new(STAGED);
    let mut next_values = Array::<U4>::new(STAGED);
    read_page::<C>(keys, pages, &mut next_keys, start, end, kv_head, attention);
    read_page::<C>(values, pages, &mut next_values, start, end, kv_head, attention);
    while start < end {
        sync_cube();
        #[unroll]
        for i in 0..STAGED {
            let (key, piece) = staged(i);
            // What a plane reads at once lies in different banks.
            key_tile[key * PIECES + (piece ^ (key % 2 * 4))] = next_keys[i];
            value_tile[key * PIECES + (piece ^ (key % 8))] = C8::<f16>::reinterpret(next_values[i]);
        }
        sync_cube();
        let next = start + PAGE;
        read_page::<C>(keys, pages, &mut next_keys, next, end, kv_head, attention);
        read_page::<C>(values, pages, &mut next_values, next, end, kv_head, attention);

        let mut scores = Sequence::<Array<F2>>::new();
        #[unroll]
        for n in 0..comptime!(PAGE / 8) {
            scores.push(zeros());
            let key = n * 8 + of_eight;
            #[unroll]
            for j in 0..comptime!(HEAD / 32) {
                let words = key_tile[key * PIECES + ((j * 4 + quarter) ^ (key % 2 * 4))];
                #[unroll]
                for half in 0..2usize {
                    let mut factors = Array::<H2>::new(2usize);
                    factors[0] = H2::reinterpret(words.extract(comptime!(2 * half)));
                    factors[1] = H2::reinterpret(words.extract(comptime!(2 * half + 1)));
                    let step = comptime!(2 * j + half);
                    definition.execute_inplace(queries.index(step), &factors, scores.index_mut(n));
                }
            }
        }
        #[unroll]
        for half in 0..2usize {
            let position = positions[half];
            let before = largest[half];
            let mut now = before;
            #[unroll]
            for n in 0..comptime!(PAGE / 8) {
                let tile = scores.index_mut(n);
                let mut both = tile[half];
                #[unroll]
                for i in 0..2usize {
                    let key = start + comptime!(n * 8 + i) + quarter * 2;
                    let score = select(sees(position, key, attention), both.extract(i), HIDDEN);
                    both.insert(i, score);
                    now = max(now, score);
                }
                tile[half] = both;
            }
            now = max(now, plane_shuffle_xor(now, 1u32));
            now = max(now, plane_shuffle_xor(now, 2u32));
            let shrink = (before - now).exp();
            largest[half] = now;
            let mut total = totals[half] * shrink;
            #[unroll]
            for n in 0..comptime!(PAGE / 8) {
                let tile = scores.index_mut(n);
                let both = tile[half];
                let mut weights = F2::empty();
                weights.insert(0usize, (both.extract(0usize) - now).exp());
                weights.insert(1usize, (both.extract(1usize) - now).exp());
                total += weights.extract(0usize) + weights.extract(1usize);
                tile[half] = weights;
            }
            totals[half] = total;
            #[unroll]
            for d in 0..comptime!(HEAD / 8) {
                let tile = sums.index_mut(d);
                tile[half] *= F2::new(shrink);
            }
        }
        #[unroll]
        for step in 0..comptime!(PAGE / 16) {
            let mut weights = Array::<H2>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                let tile = scores.index(comptime!(2 * step + i / 2));
                weights[i] = H2::cast_from(tile[comptime!(i % 2)]);
            }
            #[unroll]
            for d in 0..comptime!(HEAD / 16) {
                // Four 8×8 parts: the keys of the step in two halves, for two eights of columns.
                let key = comptime!(step * 16) + lane / 8 % 2 * 8 + lane % 8;
                let piece = comptime!(d * 2) + lane / 16;
                let at = key * PIECES + (piece ^ (key % 8));
                let parts = definition.load_matrix::<C8<f16>, Const<2>>(
                    &value_tile[at..at + 1],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                #[unroll]
                for i in 0..2usize {
                    let mut factors = Array::<H2>::new(2usize);
                    factors[0] = parts[2 * i];
                    factors[1] = parts[2 * i + 1];
                    definition.execute_inplace(&weights, &factors, sums.index_mut(comptime!(2 * d + i)));
                }
            }
        }
        start = next;
    }

    #[unroll]
    for half in 0..2usize {
        let mut total = totals[half];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        let row = row + half * 8;
        let token = first_token + row / group;
        let head = kv_head * group + row % group;
        let factor = scaled_by(largest[half], total, sinks[head]);
        if token < tokens {
            let start = (token * comptime!(attention.heads) + head) * comptime!(HEAD / 2);
            #[unroll]
            for d in 0..comptime!(HEAD / 8) {
                let tile = sums.index(d);
                let both = tile[half] * F2::new(factor);
                let at = start + comptime!(d * 4) + quarter;
                write_pair(out, at, both.extract(0usize), both.extract(1usize), Method::TensorCores);
            }
        }
    }
}

/// An accumulator of nothing.
#[cube]
fn zeros() -> Array<F2> {
    let mut tile = Array::<F2>::new(2usize);
    tile[0] = F2::new(0.0f32);
    tile[1] = F2::new(0.0f32);
    tile
}

/// What sums of weighted values are multiplied by, given their largest score and the sum of their weights: the sink takes part.
#[cube]
fn scaled_by(largest: f32, total: f32, sink: f32) -> f32 {
    let reference = max(sink, largest);
    let shrink = (largest - reference).exp();
    shrink / (total * shrink + (sink - reference).exp())
}

/// The key of a page and the piece of it that is a unit's number `i`.
#[cube]
fn staged(#[comptime] i: usize) -> (usize, usize) {
    let flat = UNIT_POS as usize + comptime!(i * 32 * PLANES);
    (flat / PIECES, flat % PIECES)
}

/// Reads this unit's share of the page of position `start`, zeros past `end`: no one has written there.
#[cube]
fn read_page<C: Float>(
    cache: &[C8<C>],
    pages: &[u32],
    read: &mut Array<U4>,
    start: usize,
    end: usize,
    head: usize,
    #[comptime] attention: PrefillAttention,
) {
    #[unroll]
    for i in 0..STAGED {
        let (key, piece) = staged(i);
        let position = start + key;
        let valid = position < end;
        let at = slot(pages, select(valid, position, end - 1), head, attention);
        let values = U4::reinterpret(C8::<f16>::cast_from(cache[at * PIECES + piece]));
        let mut words = U4::empty();
        #[unroll]
        for w in 0..4usize {
            words.insert(w, select(valid, values.extract(w), 0u32));
        }
        read[i] = words;
    }
}

#[cube(launch_unchecked)]
pub(crate) fn units_kernel<C: Float>(
    q: &[F2],
    keys: &[Vector<C, Const<2>>],
    values: &[Vector<C, Const<2>>],
    pages: &[u32],
    sinks: &[f32],
    out: &mut [u32],
    first: usize,
    tokens: usize,
    #[comptime] attention: PrefillAttention,
    #[comptime] method: Method,
) {
    let unit = UNIT_POS as usize;
    let group = comptime!(attention.group());
    let of_cube = comptime!(attention.tokens());
    let rows = comptime!(attention.tokens() * attention.group());
    let pairs = comptime!(attention.head_dim / 2);
    // One more, so that units which read different keys read different banks.
    let stride = comptime!(attention.head_dim / 2 + 1);
    let kv_head = CUBE_POS_X as usize;
    let first_token = CUBE_POS_Y as usize * of_cube;
    let mut queries =
        Shared::<[F2]>::new_slice(comptime!(attention.tokens() * attention.group() * attention.head_dim / 2));
    let mut tile = Shared::<[F2]>::new_slice(comptime!(TILE * (attention.head_dim / 2 + 1)));
    let mut scores =
        Shared::<[f32]>::new_slice(comptime!(attention.tokens() * attention.group() * (TILE + 1)));
    let mut largest = Shared::<[f32]>::new_slice(comptime!(attention.tokens() * attention.group()));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(attention.tokens() * attention.group()));
    let mut shrink = Shared::<[f32]>::new_slice(comptime!(attention.tokens() * attention.group()));

    let mut i = unit;
    while i < rows * pairs {
        let row = i / pairs;
        let token = first_token + row / group;
        let token = select(token < tokens, token, tokens - 1);
        queries[i] =
            q[(token * comptime!(attention.heads) + kv_head * group + row % group) * pairs + i % pairs];
        i += UNITS;
    }
    let mut row = unit;
    while row < rows {
        largest[row] = HIDDEN;
        totals[row] = 0.0f32;
        row += UNITS;
    }
    let mut sums = Array::<F2>::new(comptime!(attention.items()));
    #[unroll]
    for item in 0..comptime!(attention.items()) {
        sums[item] = F2::new(0.0f32);
    }

    let last = first_token + of_cube;
    let end = first + select(last < tokens, last, tokens);
    let mut start = first_key(first + first_token, TILE, attention);
    while start < end {
        sync_cube();
        stage::<C>(keys, pages, &mut tile, start, end, kv_head, attention);
        sync_cube();
        let mut i = unit;
        while i < rows * TILE {
            let (row, key) = (i / TILE, i % TILE);
            let mut dot = 0.0f32;
            for pair in 0..pairs {
                let both = queries[row * pairs + pair] * tile[key * stride + pair];
                dot += both.extract(0usize) + both.extract(1usize);
            }
            let seen = sees(first + first_token + row / group, start + key, attention);
            scores[row * comptime!(TILE + 1) + key] = select(seen, dot, HIDDEN);
            i += UNITS;
        }
        sync_cube();
        stage::<C>(values, pages, &mut tile, start, end, kv_head, attention);
        let mut row = unit;
        while row < rows {
            let line = row * comptime!(TILE + 1);
            let before = largest[row];
            let mut now = before;
            for key in 0..TILE {
                now = max(now, scores[line + key]);
            }
            let mut total = totals[row] * (before - now).exp();
            for key in 0..TILE {
                let weight = (scores[line + key] - now).exp();
                scores[line + key] = weight;
                total += weight;
            }
            largest[row] = now;
            totals[row] = total;
            shrink[row] = (before - now).exp();
            row += UNITS;
        }
        sync_cube();
        #[unroll]
        for item in 0..comptime!(attention.items()) {
            let i = unit + item * UNITS;
            if i < rows * pairs {
                let row = i / pairs;
                let mut sum = sums[item] * F2::new(shrink[row]);
                for key in 0..TILE {
                    sum += tile[key * stride + i % pairs] * F2::new(scores[row * comptime!(TILE + 1) + key]);
                }
                sums[item] = sum;
            }
        }
        start += TILE;
    }
    #[unroll]
    for item in 0..comptime!(attention.items()) {
        let i = unit + item * UNITS;
        let row = i / pairs;
        let token = first_token + row / group;
        if i < rows * pairs && token < tokens {
            let head = kv_head * group + row % group;
            let both = sums[item] * F2::new(scaled_by(largest[row], totals[row], sinks[head]));
            let at = (token * comptime!(attention.heads) + head) * pairs + i % pairs;
            write_pair(out, at, both.extract(0usize), both.extract(1usize), method);
        }
    }
}

/// Puts keys or values side by side, zeros past `end`: no one has written there.
#[cube]
fn stage<C: Float>(
    cache: &[Vector<C, Const<2>>],
    pages: &[u32],
    tile: &mut [F2],
    start: usize,
    end: usize,
    head: usize,
    #[comptime] attention: PrefillAttention,
) {
    let pairs = comptime!(attention.head_dim / 2);
    let mut i = UNIT_POS as usize;
    while i < TILE * pairs {
        let key = i / pairs;
        let position = start + key;
        let mut both = F2::new(0.0f32);
        if position < end {
            both = F2::cast_from(cache[slot(pages, position, head, attention) * pairs + i % pairs]);
        }
        tile[key * comptime!(attention.head_dim / 2 + 1) + i % pairs] = both;
        i += UNITS;
    }
}

/// First chunks and later ones, windows that begin within a page and a tile, groups of heads that fill no cube, tables in which
/// pages come round. The reference is that of [`super::attention`].
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |[heads, kv_heads, head_dim]: [usize; 3], window, table| PrefillAttention {
        heads,
        kv_heads,
        head_dim,
        window,
        table,
    };
    let mut found = check_cached::<f32>(client, &[(of([4, 2, 16], 0, 1), 0, 1)])?;
    if halves(client) {
        let cases = [
            (of([16, 2, 64], 0, 5), 170, 130),
            (of([64, 8, 64], 128, 5), 500, 17),
            (of([8, 8, 24], 33, 3), 65, 3),
            (of([6, 2, 64], 70, 5), 127, 130),
        ];
        found.extend(check_cached::<f16>(client, &cases)?);
    }
    Ok(found)
}

fn check_cached<C: Cached>(
    client: &Client,
    cases: &[(PrefillAttention, usize, usize)],
) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for &(attention, first, tokens) in cases {
        let PrefillAttention { heads, kv_heads, head_dim, window, table } = attention;
        let mut inputs = Inputs::new(client, (heads + window) as u64);
        let pool = Pool::new(&mut inputs.random, 1, table, kv_heads, head_dim);
        let [keys, values] = [(); 2].map(|()| pool.filled::<C>(&mut inputs.random, &[first + tokens]));
        let q = inputs.f32(tokens * heads * head_dim, 4.0 / (head_dim as f32).sqrt());
        let sinks = inputs.f32(heads, 2.0);
        let queries = q.values.chunks(head_dim).enumerate().flat_map(|(query, q)| {
            let (token, head) = (query / heads, query % heads);
            attention::reference(q, sinks.values[head], first + token, window, |position| {
                let slot = pool.slot(0, position, head / (heads / kv_heads));
                [&keys, &values].map(|cache| &cache[slot..slot + head_dim])
            })
        });
        let truth: Vec<f64> = queries.collect();
        for method in Method::all(client) {
            let out = poisoned(client, method.words(tokens * heads * head_dim));
            let buffers = Buffers {
                q: &q.handle,
                keys: &inputs.upload(&keys),
                values: &inputs.upload(&values),
                cache_len: keys.len(),
                pages: &inputs.upload(&pool.numbers),
                sinks: &sinks.handle,
                out: &out,
            };
            launch_for::<C>(client, attention, first, tokens, &buffers, method);
            let out = values_of(&read(client, &out)?, method);
            let case = format!(
                "{}, {heads}/{kv_heads}×{head_dim}, window {window}, {tokens} tokens at {first}, {method:?}",
                C::NAME
            );
            // With the instruction queries and weights are f16.
            let factors = if method == Method::TensorCores { 2.0 * F16 } else { F32 };
            let bound = method.rounding() + factors;
            found.push(Comparison::near("prefill_attention", case, head_dim, &out, &truth, bound));
        }
    }
    Ok(found)
}
