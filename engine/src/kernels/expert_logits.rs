//! The router's logits of many tokens, in f32 throughout: the selection that follows is a step function.
//!
//! A cube has `TOKENS` tokens and `EXPERTS` experts, and takes `QUADS` quads of columns at a time through shared memory,
//! reading the next ones meanwhile. RMSNorm is fused as in `dense`.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::check::{Comparison, F32, Inputs, poisoned, read};
use super::dense::{high, low};
use super::group::F4;
use super::linear::inverse_rms;
use super::router::{Router, reference};
use crate::error::Result;

/// Tokens of a cube.
const TOKENS: usize = 16;
/// Experts of a cube.
const EXPERTS: usize = 32;
/// Quads of columns that are staged at a time.
const QUADS: usize = 32;
/// Units of a cube, in as many lines as it has tokens.
const UNITS: usize = TOKENS * LINE;
/// Units of a line: each has the experts that stand [`LINE`] apart.
const LINE: usize = 16;
/// Quads of a row that a unit stages.
const STAGED: usize = QUADS / LINE;
/// Quads between rows in shared memory, one more so that units which read different rows read different banks.
const STRIDE: usize = QUADS + 1;

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
}

/// Computes the logits of `tokens` rows.
pub fn launch(client: &Client, router: Router, tokens: usize, buffers: &Buffers<'_>) {
    let quads = router.columns / 4;
    let cubes = [tokens.div_ceil(TOKENS), router.experts.div_ceil(EXPERTS)].map(|cubes| cubes as u32);
    // SAFETY: lengths are those of the buffers by the caller's contract; what lies past the last token, expert or column is read
    // from those and not written.
    unsafe {
        logits_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes[0], cubes[1], 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(buffers.weights.clone(), router.experts * quads),
            BufferArg::from_raw_parts(buffers.bias.clone(), router.experts),
            BufferArg::from_raw_parts(buffers.norm.clone(), quads),
            BufferArg::from_raw_parts(buffers.x.clone(), tokens * quads),
            BufferArg::from_raw_parts(buffers.logits.clone(), tokens * router.experts),
            tokens,
            quads.div_ceil(QUADS),
            router,
        );
    }
}

#[cube(launch_unchecked)]
fn logits_kernel(
    weights: &[Vector<u32, Const<2>>],
    bias: &[f32],
    norm: &[F4],
    x: &[F4],
    logits: &mut [f32],
    tokens: usize,
    steps: usize,
    #[comptime] router: Router,
) {
    let unit = UNIT_POS as usize;
    let quads = comptime!(router.columns / 4);
    let (line, part) = (unit / LINE, unit % LINE);
    let token = CUBE_POS_X as usize * TOKENS + line;
    let source = select(token < tokens, token, tokens - 1) * quads;
    let first_expert = CUBE_POS_Y as usize * EXPERTS;
    let mut left = Shared::<[F4]>::new_slice(comptime!(TOKENS * STRIDE));
    let mut right = Shared::<[F4]>::new_slice(comptime!(EXPERTS * STRIDE));
    let mut squares = Shared::<[f32]>::new_slice(UNITS);

    let mut square = 0.0f32;
    let mut sums = Array::<F4>::new(2usize);
    sums[0] = F4::new(0.0f32);
    sums[1] = F4::new(0.0f32);
    let mut values = Array::<F4>::new(STAGED);
    let mut words = Array::<Vector<u32, Const<2>>>::new(comptime!(2 * STAGED));
    for step in 0..steps + 1 {
        // Writes what the last step has read, and reads while it is being multiplied.
        if step > 0 {
            #[unroll]
            for s in 0..STAGED {
                let part = part + s * LINE;
                let value = values[s];
                #[unroll]
                for i in 0..4usize {
                    square += value.extract(i) * value.extract(i);
                }
                let quad = (step - 1) * QUADS + part;
                left[line * STRIDE + part] = value * norm[select(quad < quads, quad, quads - 1)];
                #[unroll]
                for i in 0..2usize {
                    let word = words[s * 2 + i];
                    let mut factors = F4::empty();
                    #[unroll]
                    for w in 0..2usize {
                        factors.insert(comptime!(2 * w), low(word.extract(w)));
                        factors.insert(comptime!(2 * w + 1), high(word.extract(w)));
                    }
                    right[(line + i * TOKENS) * STRIDE + part] = factors;
                }
            }
        }
        sync_cube();
        #[unroll]
        for s in 0..STAGED {
            let quad = step * QUADS + part + s * LINE;
            let at = select(quad < quads, quad, quads - 1);
            values[s] = x[source + at] * F4::new(select(quad < quads, 1.0f32, 0.0f32));
            #[unroll]
            for i in 0..2usize {
                let expert = first_expert + line + i * TOKENS;
                let expert =
                    select(expert < comptime!(router.experts), expert, comptime!(router.experts - 1));
                words[s * 2 + i] = weights[expert * quads + at];
            }
        }
        if step > 0 {
            for quad in 0..QUADS {
                let shared = left[line * STRIDE + quad];
                #[unroll]
                for i in 0..2usize {
                    sums[i] += shared * right[(part + i * LINE) * STRIDE + quad];
                }
            }
        }
        sync_cube();
    }
    squares[unit] = square;
    sync_cube();
    let mut total = 0.0f32;
    for i in 0..LINE {
        total += squares[line * LINE + i];
    }
    let inverse = inverse_rms(total, comptime!(router.columns), comptime!(router.epsilon));
    #[unroll]
    for i in 0..2usize {
        let expert = first_expert + part + i * LINE;
        if token < tokens && expert < comptime!(router.experts) {
            let sum = sums[i];
            let sum =
                (sum.extract(0usize) + sum.extract(1usize)) + (sum.extract(2usize) + sum.extract(3usize));
            logits[token * comptime!(router.experts) + expert] = sum * inverse + bias[expert];
        }
    }
}

/// Tokens and experts that fill no cube, and a row that is no whole number of stages.
pub(crate) fn check(client: &Client) -> Result<Vec<Comparison>> {
    let mut found = Vec::new();
    for (tokens, columns, experts) in [(1, 64, 4), (17, 160, 32), (130, 2880, 32), (3, 96, 128)] {
        let mut inputs = Inputs::new(client, columns as u64);
        let router = Router { experts, columns, epsilon: 1e-5f32.to_bits() };
        let (x, norm) = (inputs.f32(tokens * columns, 2.0), inputs.f32(columns, 2.0));
        let (weights, bias) = (inputs.bf16(experts * columns, 0.1), inputs.f32(experts, 1.0));
        let logits = poisoned(client, tokens * experts);
        let buffers = Buffers {
            x: &x.handle,
            norm: &norm.handle,
            weights: &weights.handle,
            bias: &bias.handle,
            logits: &logits,
        };
        launch(client, router, tokens, &buffers);
        let truth = x.values.chunks(columns).flat_map(|x| {
            let (_normed, logits) = reference(router, &weights.values, &bias.values, &norm.values, x);
            logits
        });
        let (truth, case) = (truth.collect::<Vec<_>>(), format!("{tokens} × {columns}, {experts} experts"));
        let logits = read(client, &logits)?;
        found.push(Comparison::near("expert_logits", case, experts, &logits, &truth, F32));
    }
    Ok(found)
}
