//! The router: RMSNorm, the logits of all experts, and the selection.
//!
//! A cube computes one logit of one token. What the selected experts multiply, the normalised input, is computed here once and
//! written by all cubes together. The selection itself costs less than starting a kernel for it, so that the cubes which need
//! it repeat it (`select_expert`). For products with tiles ([`launch_rows`]) it is not repeated: see [`super::dispatch`].

use std::cmp::Ordering;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read, side_by_side, values_of};
use super::dense::{high, low};
use super::group::F4;
use super::linear::inverse_rms;
use super::linear::multiplied;
use super::method::{Method, write_pair};
use super::normalise;
use crate::error::Result;

/// Units of a cube.
const UNITS: u32 = 128;

/// The sizes of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Router {
    /// Experts.
    pub experts: usize,
    /// Width of the residual stream, a multiple of 32.
    pub columns: usize,
    /// The bits of RMSNorm's ε.
    pub epsilon: u32,
}

/// The buffers of a router.
pub struct Buffers<'a> {
    /// f32 `[tokens, columns]`: the residual stream.
    pub x: &'a Handle,
    /// f32 `[columns]`.
    pub norm: &'a Handle,
    /// bf16 `[experts, columns]`.
    pub weights: &'a Handle,
    /// f32 `[experts]`.
    pub bias: &'a Handle,
    /// f32 `[tokens, experts]`: the logits.
    pub logits: &'a Handle,
    /// f32 `[tokens, columns]`: the normalised input, in the order of `transposed`; of [`launch_rows`] in that of columns, in the
    /// words of [`Method`].
    pub normed: &'a Handle,
}

/// Where four values that begin at `4 · quad` of a row stand: the blocks of 32 lie side by side, so that lanes which take a block
/// each read side by side.
#[cube]
pub(crate) fn transposed(quad: usize, #[comptime] blocks: usize) -> usize {
    quad % 8 * blocks + quad / 8
}

/// Routes `tokens` rows.
pub fn launch(client: &Client, router: Router, tokens: usize, buffers: &Buffers<'_>) {
    launch_as(client, router, tokens, buffers, None);
}

/// [`launch`] for products with tiles. For few tokens: it reads the weights once for each.
pub fn launch_rows(client: &Client, router: Router, tokens: usize, buffers: &Buffers<'_>) {
    launch_as(client, router, tokens, buffers, Some(Method::of(client)));
}

fn launch_as(client: &Client, router: Router, tokens: usize, buffers: &Buffers<'_>, rows: Option<Method>) {
    let quads = router.columns / 4;
    let words = rows.unwrap_or(Method::Units).words(router.columns);
    // SAFETY: lengths are those of the buffers by the caller's contract; units stop at the end of a row.
    unsafe {
        router_kernel::launch_unchecked(
            client,
            CubeCount::Static(router.experts as u32, tokens as u32, 1),
            CubeDim::new_1d(UNITS),
            BufferArg::from_raw_parts(buffers.weights.clone(), router.experts * quads),
            BufferArg::from_raw_parts(buffers.bias.clone(), router.experts),
            BufferArg::from_raw_parts(buffers.norm.clone(), quads),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * quads),
            BufferArg::from_raw_parts(buffers.logits.clone(), tokens * router.experts),
            BufferArg::from_raw_parts(buffers.normed.clone(), tokens * words),
            router,
            rows,
        );
    }
}

#[cube(launch_unchecked)]
fn router_kernel(
    weights: &[Vector<u32, Const<2>>],
    bias: &[f32],
    norm: &[F4],
    x: &[F4],
    logits: &mut [f32],
    normed: &mut [u32],
    #[comptime] router: Router,
    #[comptime] rows: Option<Method>,
) {
    let unit = UNIT_POS as usize;
    let expert = CUBE_POS_X as usize;
    let token = CUBE_POS_Y as usize;
    let quads = comptime!(router.columns / 4);
    let mut sum = 0.0f32;
    let mut squares = 0.0f32;
    let mut quad = unit;
    while quad < quads {
        let value = x[token * quads + quad];
        let scaled = value * norm[quad];
        let words = weights[expert * quads + quad];
        #[unroll]
        for i in 0..2usize {
            let word = words.extract(i);
            sum += low(word) * scaled.extract(comptime!(2 * i))
                + high(word) * scaled.extract(comptime!(2 * i + 1));
        }
        #[unroll]
        for i in 0..4usize {
            squares += value.extract(i) * value.extract(i);
        }
        quad += comptime!(UNITS as usize);
    }
    let mut all_sums = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    let mut all_squares = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    all_sums[unit] = sum;
    all_squares[unit] = squares;
    let mut half = comptime!(UNITS as usize / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            all_sums[unit] += all_sums[unit + half];
            all_squares[unit] += all_squares[unit + half];
        }
        half /= 2;
    }
    sync_cube();
    let inverse = inverse_rms(all_squares[0], comptime!(router.columns), comptime!(router.epsilon));
    if unit == 0 {
        logits[token * comptime!(router.experts) + expert] = all_sums[0] * inverse + bias[expert];
    }
    let mut quad = expert + unit * comptime!(router.experts);
    while quad < quads {
        let value = x[token * quads + quad] * norm[quad] * F4::new(inverse);
        let place =
            if comptime!(rows.is_some()) { quad } else { transposed(quad, comptime!(router.columns / 32)) };
        #[unroll]
        for i in 0..2usize {
            let (one, other) = (value.extract(comptime!(2 * i)), value.extract(comptime!(2 * i + 1)));
            write_pair(
                normed,
                (token * quads + place) * 2 + i,
                one,
                other,
                comptime!(rows.unwrap_or(Method::Units)),
            );
        }
        quad += comptime!(UNITS as usize * router.experts);
    }
}

/// The expert in place `place` of the selection of a token, the largest logit first and the lower id first among equals, and
/// its weight: the softmax over the first `active`. All units of the cube call it; `logits` begins at the token's.
///
/// A unit finds the place of each expert that is its own by comparing it with all.
#[cube]
pub(crate) fn select_expert(
    logits: &[f32],
    first: usize,
    place: usize,
    #[comptime] experts: usize,
    #[comptime] active: usize,
) -> (usize, f32) {
    let mut ids = Shared::<[u32]>::new_slice(active);
    let mut values = Shared::<[f32]>::new_slice(active);
    let mut expert = UNIT_POS as usize;
    // Logits that are not numbers leave places without an expert: whatever is read there must be one.
    if expert < active {
        ids[expert] = 0u32;
        values[expert] = 0.0f32;
    }
    sync_cube();
    while expert < experts {
        let own = logits[first + expert];
        let mut before = 0u32;
        for other in 0..experts {
            let logit = logits[first + other];
            let larger = logit > own || (logit == own && other < expert);
            before += select(larger, 1u32, 0u32);
        }
        if before < comptime!(active as u32) {
            ids[before as usize] = expert as u32;
            values[before as usize] = own;
        }
        expert += CUBE_DIM as usize;
    }
    sync_cube();
    let largest = values[0];
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..active {
        sum += (values[i] - largest).exp();
    }
    let weight = (values[place] - largest).exp() / sum;
    (ids[place] as usize, weight)
}

/// The normalised row and its logits.
pub(crate) fn reference(
    router: Router,
    weights: &[f64],
    bias: &[f64],
    norm: &[f64],
    x: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let normed = normalise::reference(x, norm, router.epsilon);
    let logits = multiplied(weights, &normed).zip(bias).map(|(sum, bias)| sum + bias).collect();
    (normed, logits)
}

/// What is selected of a row of logits: the `active` largest, the lower id first among equals, with the softmax over them. What is
/// not a number is not selected, and a place that no expert has taken is the first expert's, as if its logit were 0.
pub(crate) fn selection(logits: &[f64], active: usize) -> Vec<(usize, f64)> {
    let mut best: Vec<(usize, f64)> =
        logits.iter().copied().enumerate().filter(|(_, logit)| !logit.is_nan()).collect();
    best.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap_or(Ordering::Equal));
    best.resize(active, (0, 0.0));
    let largest = best[0].1;
    let total: f64 = best.iter().map(|(_, logit)| (logit - largest).exp()).sum();
    best.into_iter().map(|(id, logit)| (id, (logit - largest).exp() / total)).collect()
}

/// Rows narrower and wider than a cube, few experts and many.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, columns, experts) in [(1, 64, 4), (3, 2880, 32), (17, 96, 128)] {
        let mut inputs = Inputs::new(client, columns as u64);
        let router = Router { experts, columns, epsilon: 1e-5f32.to_bits() };
        let (x, norm) = (inputs.f32(tokens * columns, 2.0), inputs.f32(columns, 2.0));
        let (weights, bias) = (inputs.bf16(experts * columns, 0.1), inputs.f32(experts, 1.0));
        let [logits, normed] = [experts, columns].map(|width| poisoned(client, tokens * width));
        let buffers = Buffers {
            x: &x.handle,
            norm: &norm.handle,
            weights: &weights.handle,
            bias: &bias.handle,
            logits: &logits,
            normed: &normed,
        };
        launch(client, router, tokens, &buffers);
        let rows = x.values.chunks(columns);
        let (true_normed, true_logits): (Vec<_>, Vec<_>) =
            rows.map(|x| reference(router, &weights.values, &bias.values, &norm.values, x)).unzip();
        let near = |what: &str, width, found: &[f32], truth: &[f64]| {
            let case = format!("{what}, {tokens} × {columns}, {experts} experts");
            Comparison::near("router", case, width, found, truth, F32)
        };
        let (true_normed, true_logits) = (true_normed.concat(), true_logits.concat());
        found.push(near("logits", experts, &read(client, &logits)?, &true_logits));
        found.push(near("normed", columns, &read(client, &normed)?, &side_by_side(&true_normed, columns)));
        for method in Method::all(client) {
            let [logits, normed] =
                [experts, method.words(columns)].map(|width| poisoned(client, tokens * width));
            let buffers = Buffers { logits: &logits, normed: &normed, ..buffers };
            launch_as(client, router, tokens, &buffers, Some(method));
            found.push(near(
                &format!("logits for {method:?}"),
                experts,
                &read(client, &logits)?,
                &true_logits,
            ));
            let case = format!("rows of {method:?}, {tokens} × {columns}");
            let rows = values_of(&read(client, &normed)?, method);
            let bound = F32 + method.rounding();
            found.push(Comparison::near("router", case, columns, &rows, &true_normed, bound));
        }
    }
    Ok(found)
}
