//! Attention of one new token of each sequence over its cache, with sinks and a sliding window.
//!
//! A cube takes the queries of one key head and a part ("split") of the pages, one at a time, with a running softmax; nothing
//! of the size of the scores is ever stored. Where there is more than one split, [`launch`] joins their results in a second,
//! small kernel.
//!
//! ```text
//! a page's keys and values ─► shared ─► scores of all queries ─► largest, weights ─► weighted sum of values
//! ```

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;

use super::check::{Cached, Comparison, F32, Inputs, Pool, halves, poisoned, read, values_of};
use super::method::{Method, write_pair};
use super::qkv::PAGE;
use crate::error::Result;

/// Two f32.
type F2 = Vector<f32, Const<2>>;
/// Units of a cube.
const UNITS: usize = 256;
/// The score of what is not seen: far below any other, and finite.
const HIDDEN: f32 = -1e30;

/// The sizes of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key heads; queries `h` read keys `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head, a multiple of 8.
    pub head_dim: usize,
    /// Keys that a query sees, its own included; 0 for all.
    pub window: usize,
    /// Page numbers of a sequence in `pages`: page `n` of a sequence stands at `n mod table`.
    pub table: usize,
    /// Parts of the keys.
    pub splits: usize,
    /// The precision of the output: [`Method::Units`] for f32, else that of a product with tiles.
    pub method: Method,
}

impl Attention {
    /// Queries that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// f32 elements of `partial` that `tokens` queries need.
    pub fn partial_len(&self, tokens: usize) -> usize {
        tokens * self.heads * self.splits * (self.head_dim + 2)
    }
}

/// Bytes of shared memory that a cube takes for `group` queries that share a key head, of a cache whose elements have so many.
pub(crate) fn shared_bytes(group: usize, head_dim: usize, element: usize) -> usize {
    let scores_and_weights = 2 * group * PAGE;
    size_of::<f32>() * (group * head_dim + scores_and_weights) + element * PAGE * (2 * head_dim + 2)
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
    /// u32 `[tokens]`: the positions of the queries.
    pub positions: &'a Handle,
    /// u32 `[tokens, table]`.
    pub pages: &'a Handle,
    /// f32 `[heads]`.
    pub sinks: &'a Handle,
    /// f32, [`Attention::partial_len`].
    pub partial: &'a Handle,
    /// `[tokens, heads, head_dim]` in the words of [`Attention::method`].
    pub out: &'a Handle,
}

/// Attends with `tokens` queries, one of each sequence. The cache has the type `C`.
pub fn launch<C: Float>(client: &Client, attention: Attention, tokens: usize, buffers: &Buffers<'_>) {
    let Attention { heads, kv_heads, head_dim, splits, table, method, .. } = attention;
    let partial = attention.partial_len(tokens);
    let out = tokens * method.words(heads * head_dim);
    // SAFETY: lengths are those of the buffers by the caller's contract, and page numbers are those of the pool.
    unsafe {
        attention_kernel::launch_unchecked::<C>(
            client,
            CubeCount::Static(kv_heads as u32, splits as u32, tokens as u32),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(buffers.q.clone(), tokens * heads * head_dim / 2),
            BufferArg::from_raw_parts(buffers.keys.clone(), buffers.cache_len / 4),
            BufferArg::from_raw_parts(buffers.values.clone(), buffers.cache_len / 4),
            BufferArg::from_raw_parts(buffers.positions.clone(), tokens),
            BufferArg::from_raw_parts(buffers.pages.clone(), tokens * table),
            BufferArg::from_raw_parts(buffers.sinks.clone(), heads),
            BufferArg::from_raw_parts(buffers.partial.clone(), partial),
            BufferArg::from_raw_parts(buffers.out.clone(), out),
            attention,
        );
        if splits > 1 {
            join_kernel::launch_unchecked(
                client,
                CubeCount::Static(heads as u32, tokens as u32, 1),
                CubeDim::new_1d(head_dim as u32 / 2),
                BufferArg::from_raw_parts(buffers.partial.clone(), partial),
                BufferArg::from_raw_parts(buffers.sinks.clone(), heads),
                BufferArg::from_raw_parts(buffers.out.clone(), out),
                attention,
            );
        }
    }
}

#[cube(launch_unchecked)]
fn attention_kernel<C: Float>(
    q: &[F2],
    keys: &[Vector<C, Const<4>>],
    values: &[Vector<C, Const<4>>],
    positions: &[u32],
    pages: &[u32],
    sinks: &[f32],
    partial: &mut [f32],
    out: &mut [u32],
    #[comptime] attention: Attention,
) {
    let unit = UNIT_POS as usize;
    let kv_head = CUBE_POS_X as usize;
    let split = CUBE_POS_Y as usize;
    let token = CUBE_POS_Z as usize;
    let group = comptime!(attention.group());
    let pairs = comptime!(attention.head_dim / 2);
    // One more, so that units which read different keys read different banks.
    let stride = comptime!(attention.head_dim / 2 + 1);
    let fours = comptime!(attention.head_dim / 4);
    let loads = comptime!((PAGE * attention.head_dim / 4).div_ceil(UNITS));
    let of_part = comptime!(attention.group().div_ceil(UNITS / PAGE));
    let items = comptime!((attention.group() * attention.head_dim / 2).div_ceil(UNITS));

    let mut queries = Shared::<[F2]>::new_slice(comptime!(attention.group() * attention.head_dim / 2));
    let mut key_tile =
        Shared::<[Vector<C, Const<2>>]>::new_slice(comptime!(PAGE * (attention.head_dim / 2 + 1)));
    let mut value_tile = Shared::<[Vector<C, Const<2>>]>::new_slice(comptime!(PAGE * attention.head_dim / 2));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(attention.group() * PAGE));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(attention.group() * PAGE));

    let first_q = (token * comptime!(attention.heads) + kv_head * group) * pairs;
    let mut i = unit;
    while i < group * pairs {
        queries[i] = q[first_q + i];
        i += UNITS;
    }
    let len = positions[token] as usize + 1;
    let mut first = 0usize.runtime();
    if comptime!(attention.window > 0) {
        let window = comptime!(attention.window);
        first = select(len > window, len - window, 0usize);
    }
    // The pages of this split.
    let pages_end = len.div_ceil(PAGE);
    let of_split = (pages_end - first / PAGE).div_ceil(comptime!(attention.splits));
    let mut page = first / PAGE + split * of_split;
    let end = select(page + of_split < pages_end, page + of_split, pages_end);

    let mut sums = Array::<F2>::new(items);
    let mut totals = Array::<f32>::new(items);
    let mut largest = Array::<f32>::new(items);
    #[unroll]
    for item in 0..items {
        sums[item] = F2::new(0.0f32);
        totals[item] = 0.0f32;
        largest[item] = HIDDEN;
    }
    while page < end {
        let number = pages[token * comptime!(attention.table) + page % comptime!(attention.table)] as usize;
        let base =
            (number * comptime!(attention.kv_heads) + kv_head) * comptime!(PAGE * attention.head_dim / 4);
        let mut some_keys = Array::<Vector<C, Const<4>>>::new(loads);
        let mut some_values = Array::<Vector<C, Const<4>>>::new(loads);
        #[unroll]
        for load in 0..loads {
            let i = unit + load * UNITS;
            let i = select(i < comptime!(PAGE * attention.head_dim / 4), i, 0usize);
            some_keys[load] = keys[base + i];
            some_values[load] = values[base + i];
        }
        // Until here, units may still read the last page's.
        sync_cube();
        #[unroll]
        for load in 0..loads {
            let i = unit + load * UNITS;
            if i < comptime!(PAGE * attention.head_dim / 4) {
                let pair = i % fours * 2;
                // What was never written may be anything, and nothing times anything may not be a number.
                let written = page * PAGE + i / fours < len;
                let zero = C::new(0.0f32);
                #[unroll]
                for j in 0..2usize {
                    let mut both = Vector::<C, Const<2>>::empty();
                    both.insert(0usize, some_keys[load].extract(comptime!(2 * j)));
                    both.insert(1usize, some_keys[load].extract(comptime!(2 * j + 1)));
                    key_tile[i / fours * stride + pair + j] = both;
                    let mut both = Vector::<C, Const<2>>::empty();
                    both.insert(0usize, select(written, some_values[load].extract(comptime!(2 * j)), zero));
                    both.insert(
                        1usize,
                        select(written, some_values[load].extract(comptime!(2 * j + 1)), zero),
                    );
                    value_tile[i / fours * pairs + pair + j] = both;
                }
            }
        }
        sync_cube();
        // A unit has a key and a part of the queries.
        let key = unit % PAGE;
        let part = unit / PAGE;
        let mut dots = Array::<f32>::new(of_part);
        #[unroll]
        for h in 0..of_part {
            dots[h] = 0.0f32;
        }
        for four in 0..comptime!(attention.head_dim / 8) {
            #[unroll]
            for j in 0..4usize {
                let pair = four * 4 + j;
                let k = F2::cast_from(key_tile[key * stride + pair]);
                #[unroll]
                for h in 0..of_part {
                    let head = part * of_part + h;
                    let both = k * queries[select(head < group, head, group - 1) * pairs + pair];
                    dots[h] = dots[h] + both.extract(0usize) + both.extract(1usize);
                }
            }
        }
        let position = page * PAGE + key;
        let seen = position >= first && position < len;
        #[unroll]
        for h in 0..of_part {
            let head = part * of_part + h;
            if head < group {
                scores[head * PAGE + key] = select(seen, dots[h], HIDDEN);
            }
        }
        sync_cube();
        // A unit has two components of the output of one query, and weighs some of its keys.
        let mut shrink = Array::<f32>::new(items);
        #[unroll]
        for item in 0..items {
            let i = unit + item * UNITS;
            let head = select(i < group * pairs, i / pairs, group - 1);
            let mut most = largest[item];
            for four in 0..comptime!(PAGE / 4) {
                #[unroll]
                for j in 0..4usize {
                    let score = scores[head * PAGE + four * 4 + j];
                    most = select(score > most, score, most);
                }
            }
            shrink[item] = (largest[item] - most).exp();
            largest[item] = most;
            let mut key = i % pairs;
            while key < PAGE {
                weights[head * PAGE + key] = (scores[head * PAGE + key] - most).exp();
                key += pairs;
            }
        }
        sync_cube();
        #[unroll]
        for item in 0..items {
            let i = unit + item * UNITS;
            let head = select(i < group * pairs, i / pairs, group - 1);
            let mut sum = sums[item] * F2::new(shrink[item]);
            let mut total = totals[item] * shrink[item];
            for four in 0..comptime!(PAGE / 4) {
                #[unroll]
                for j in 0..4usize {
                    let key = four * 4 + j;
                    let weight = weights[head * PAGE + key];
                    sum += F2::cast_from(value_tile[key * pairs + i % pairs]) * F2::new(weight);
                    total += weight;
                }
            }
            sums[item] = sum;
            totals[item] = total;
        }
        page += 1;
    }
    #[unroll]
    for item in 0..items {
        let i = unit + item * UNITS;
        if i < group * pairs {
            let head = kv_head * group + i / pairs;
            let query = token * comptime!(attention.heads) + head;
            if comptime!(attention.splits == 1) {
                let sink = sinks[head];
                let reference = select(sink > largest[item], sink, largest[item]);
                let shrink = (largest[item] - reference).exp();
                let factor = shrink / (totals[item] * shrink + (sink - reference).exp());
                let both = sums[item] * F2::new(factor);
                let at = query * pairs + i % pairs;
                write_pair(out, at, both.extract(0usize), both.extract(1usize), comptime!(attention.method));
            } else {
                let at = (query * comptime!(attention.splits) + split) * comptime!(attention.head_dim + 2);
                partial[at + i % pairs * 2] = sums[item].extract(0usize);
                partial[at + i % pairs * 2 + 1] = sums[item].extract(1usize);
                if i.is_multiple_of(pairs) {
                    partial[at + comptime!(attention.head_dim)] = largest[item];
                    partial[at + comptime!(attention.head_dim + 1)] = totals[item];
                }
            }
        }
    }
}

/// Joins the splits of one query: a unit has two components.
#[cube(launch_unchecked)]
fn join_kernel(partial: &[f32], sinks: &[f32], out: &mut [u32], #[comptime] attention: Attention) {
    let head = CUBE_POS_X as usize;
    let token = CUBE_POS_Y as usize;
    let head_dim = comptime!(attention.head_dim);
    let query = token * comptime!(attention.heads) + head;
    let width = comptime!(attention.head_dim + 2);
    let first = query * comptime!(attention.splits * (attention.head_dim + 2));
    let mut largest = sinks[head];
    for split in 0..comptime!(attention.splits) {
        let most = partial[first + split * width + head_dim];
        largest = select(most > largest, most, largest);
    }
    let mut total = (sinks[head] - largest).exp();
    let pair = UNIT_POS as usize;
    let mut one = 0.0f32;
    let mut other = 0.0f32;
    for split in 0..comptime!(attention.splits) {
        let at = first + split * width;
        let factor = (partial[at + head_dim] - largest).exp();
        total += partial[at + head_dim + 1] * factor;
        one += partial[at + pair * 2] * factor;
        other += partial[at + pair * 2 + 1] * factor;
    }
    let at = query * comptime!(attention.head_dim / 2) + pair;
    write_pair(out, at, one / total, other / total, comptime!(attention.method));
}

/// What a query at `position` reads: `Σ e^(q·k) v / (e^sink + Σ e^(q·k))` over the keys and values `kept` that it sees.
pub(crate) fn reference<'a, C: Cached>(
    q: &[f64],
    sink: f64,
    position: usize,
    window: usize,
    kept: impl Fn(usize) -> [&'a [C]; 2],
) -> Vec<f64> {
    let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
    let mut total = sink.exp();
    let mut sum = vec![0.0; q.len()];
    for [key, value] in (first..=position).map(kept) {
        let weight = q.iter().zip(key).map(|(q, k)| q * f64::from(k.value())).sum::<f64>().exp();
        total += weight;
        sum.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * f64::from(v.value()));
    }
    sum.into_iter().map(|sum| sum / total).collect()
}

/// Sequences of any length, windows that begin within a page, tables in which pages come round, splits that are empty.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let of = |[heads, kv_heads, head_dim]: [usize; 3], window, table, splits| Attention {
        heads,
        kv_heads,
        head_dim,
        window,
        table,
        splits,
        method: Method::Units,
    };
    let small = (of([4, 2, 16], 0, 1, 1), vec![0]);
    let split = (of([8, 2, 32], 0, 5, 4), vec![300, 5, 64]);
    let mut found = check_cached::<f32>(client, &[small, split.clone()])?;
    if halves(client) {
        let cases = [
            split,
            (of([8, 8, 24], 5, 3, 1), vec![3, 64, 66]),
            (of([64, 8, 64], 128, 4, 1), vec![700, 126, 127, 128]),
            (of([8, 2, 16], 0, 3, 2), (0..17).map(|sequence| sequence * 11).collect()),
        ];
        found.extend(check_cached::<f16>(client, &cases)?);
    }
    Ok(found)
}

fn check_cached<C: Cached>(client: &Client, cases: &[(Attention, Vec<usize>)]) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    let methods = Method::all(client);
    let cases = methods.iter().flat_map(|&method| {
        cases.iter().map(move |(attention, positions)| (Attention { method, ..*attention }, positions))
    });
    for (attention, positions) in cases {
        let Attention { heads, kv_heads, head_dim, window, table, splits, method } = attention;
        let tokens = positions.len();
        let mut inputs = Inputs::new(client, (heads + window) as u64);
        let pool = Pool::new(&mut inputs.random, tokens, table, kv_heads, head_dim);
        let lens: Vec<usize> = positions.iter().map(|position| position + 1).collect();
        let [keys, values] = [(); 2].map(|()| pool.filled::<C>(&mut inputs.random, &lens));
        let q = inputs.f32(tokens * heads * head_dim, 4.0 / (head_dim as f32).sqrt());
        let sinks = inputs.f32(heads, 2.0);
        let numbers: Vec<u32> = positions.iter().map(|&position| position as u32).collect();
        let out = poisoned(client, tokens * method.words(heads * head_dim));
        let buffers = Buffers {
            q: &q.handle,
            keys: &inputs.upload(&keys),
            values: &inputs.upload(&values),
            cache_len: keys.len(),
            positions: &inputs.upload(&numbers),
            pages: &inputs.upload(&pool.numbers),
            sinks: &sinks.handle,
            partial: &poisoned(client, attention.partial_len(tokens)),
            out: &out,
        };
        launch::<C>(client, attention, tokens, &buffers);
        let queries = q.values.chunks(head_dim).enumerate().flat_map(|(query, q)| {
            let (token, head) = (query / heads, query % heads);
            reference(q, sinks.values[head], positions[token], window, |position| {
                let slot = pool.slot(token, position, head / (heads / kv_heads));
                [&keys, &values].map(|cache| &cache[slot..slot + head_dim])
            })
        });
        let truth: Vec<f64> = queries.collect();
        let case = format!(
            "{}, {method:?}, {heads}/{kv_heads}×{head_dim}, window {window}, {splits} splits, {tokens} sequences",
            C::NAME
        );
        let bound = F32 + method.rounding();
        let out = values_of(&read(client, &out)?, method);
        found.push(Comparison::near("attention", case, head_dim, &out, &truth, bound));
    }
    Ok(found)
}
