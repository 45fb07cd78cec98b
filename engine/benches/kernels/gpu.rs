//! Kernels on a GPU. Launches are recorded as a graph and take their weights from different buffers in turn.

use std::cell::LazyCell;
use std::time::{Duration, Instant};

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use engine::backend::Device;
use engine::kernels::attention::{self, Attention};
use engine::kernels::dispatch::{self, Dispatch};
use engine::kernels::grouped::{self, Grouped};
use engine::kernels::linear::{self, Linear};
use engine::kernels::matmul::{self, Matmul};
use engine::kernels::method::Method;
use engine::kernels::mxfp4_dot::Decoding;
use engine::kernels::prefill_attention::{self, PrefillAttention};
use engine::kernels::qkv::PAGE;
use engine::kernels::{down, gate_up};
use half::{bf16, f16};

use crate::suite::{Stored, Suite};
use crate::weights::{Dense, Matrix, Weights, floats};

/// Launches of a graph, at most.
const MOST_LAUNCHES: usize = 64;
/// Splits of attention, at most, as the runtime has them.
const MOST_SPLITS: usize = 32;

/// Measures all groups.
pub fn measure(
    suite: &mut Suite,
    device: &Device,
    weights: &Weights,
) -> Result<(), Box<dyn std::error::Error>> {
    let client = device.client().ok_or("a GPU without a client")?;
    let gpu = Gpu { client, weights };
    gpu.copy(suite);
    gpu.dense(suite);
    gpu.experts(suite);
    gpu.decode_attention(suite);
    gpu.prefill_attention(suite);
    Ok(())
}

struct Gpu<'a> {
    client: Client,
    weights: &'a Weights,
}

impl Gpu<'_> {
    fn copy(&self, suite: &mut Suite) {
        let bytes = self.weights.copied;
        suite.measure(Weights::copy(bytes), || {
            let client = self.client.clone();
            let [from, to] = [(); 2].map(|()| client.empty(bytes));
            self.graph(4, move |_| copy(&client, &from, &to, bytes))
        });
    }

    fn dense(&self, suite: &mut Suite) {
        for (case, Dense { kind, rows, columns, count }) in self.weights.dense_layers() {
            suite.measure(case, || {
                let matrices: Vec<Handle> =
                    (0..count).map(|block| self.upload(&self.weights.dense(kind, block))).collect();
                let product = self.linear(rows, columns);
                self.graph(count, move |launch| product(&matrices[launch]))
            });
        }
    }

    /// Experts for one token and for many, packed and dequantised.
    fn experts(&self, suite: &mut Suite) {
        let packed = LazyCell::new(|| Matrix::ALL.map(|matrix| self.packed(matrix)));
        for matrix in Matrix::ALL {
            let case = |stored| self.weights.experts_of_a_token(matrix, stored);
            suite.measure(case(Stored::Mxfp4), || self.packed_gemv(matrix, &packed));
            suite.measure(case(Stored::Bf16), || self.decoded_gemv(matrix));
        }
        let decoded = LazyCell::new(|| Matrix::ALL.map(|matrix| self.decoded(matrix)));
        for &tokens in &self.weights.prompts {
            let case = |stored| self.weights.experts(tokens, stored);
            suite.measure(case(Stored::Mxfp4), || self.packed_moe(tokens, &packed));
            suite.measure(case(Stored::Bf16), || self.decoded_moe(tokens, &decoded));
        }
    }

    /// The kernel of a step of decoding, each launch with other experts.
    fn packed_gemv(&self, matrix: Matrix, packed: &[Packed; 2]) -> impl FnMut(u64) -> Duration + use<> {
        let config = self.weights.config();
        let client = self.client.clone();
        let sizes = gate_up::Experts {
            experts: config.num_experts,
            active: config.num_active_experts,
            embedding_dim: config.embedding_dim,
            mlp_dim: config.mlp_dim,
            limit: config.swiglu_limit.to_bits(),
            decoding: Decoding::of(&client),
        };
        let Packed { codes, scales, bias } = packed[matrix as usize].clone();
        let sets = self.weights.sets();
        let logits: Vec<Handle> =
            (0..sets).map(|set| self.upload(&self.weights.logits_of_set(set))).collect();
        let ids: Vec<Handle> = (0..sets)
            .map(|set| self.upload(&self.weights.set(set).map(|expert| expert as u32).collect::<Vec<_>>()))
            .collect();
        let shares = self.floats(sizes.active);
        let x = self.floats(sizes.embedding_dim);
        let hidden = self.floats(sizes.active * sizes.mlp_dim);
        self.graph(sets, move |set| match matrix {
            Matrix::GateUp => {
                let buffers = gate_up::Buffers {
                    logits: &logits[set],
                    normed: &x,
                    codes: &codes,
                    scales: &scales,
                    bias: &bias,
                    hidden: &hidden,
                    ids: &ids[set],
                    shares: &shares,
                };
                gate_up::launch(&client, sizes, 1, &buffers);
            }
            Matrix::Down => {
                let buffers = down::Buffers {
                    hidden: &hidden,
                    ids: &ids[set],
                    shares: &shares,
                    codes: &codes,
                    scales: &scales,
                    bias: &bias,
                    x: &x,
                };
                down::launch(&client, sizes, 1, &buffers);
            }
        })
    }

    /// The same experts as one dense product: gate and up one below the other, for they share their input; down side by side, for
    /// their outputs are summed.
    fn decoded_gemv(&self, matrix: Matrix) -> impl FnMut(u64) -> Duration + use<> {
        let active = self.weights.config().num_active_experts;
        let [rows, columns] = matrix.shape(self.weights.config());
        let joined = |set: usize| -> Vec<bf16> {
            let experts: Vec<_> =
                self.weights.set(set).map(|expert| self.weights.decoded(matrix, expert)).collect();
            match matrix {
                Matrix::GateUp => experts.concat(),
                Matrix::Down => (0..rows)
                    .flat_map(|row| {
                        experts.iter().flat_map(move |expert| &expert[row * columns..][..columns])
                    })
                    .copied()
                    .collect(),
            }
        };
        let sets = self.weights.sets();
        let matrices: Vec<Handle> = (0..sets).map(|set| self.upload(&joined(set))).collect();
        let product = match matrix {
            Matrix::GateUp => self.linear(active * rows, columns),
            Matrix::Down => self.linear(rows, active * columns),
        };
        self.graph(sets, move |set| product(&matrices[set]))
    }

    /// Selection, both products and the sum.
    fn packed_moe(&self, tokens: usize, packed: &[Packed; 2]) -> impl FnMut(u64) -> Duration + use<> {
        let config = self.weights.config();
        let client = self.client.clone();
        let sizes = Grouped {
            experts: config.num_experts,
            active: config.num_active_experts,
            embedding_dim: config.embedding_dim,
            mlp_dim: config.mlp_dim,
            limit: config.swiglu_limit.to_bits(),
        };
        let pairs = tokens * sizes.active;
        let selection = Dispatch {
            experts: sizes.experts,
            active: sizes.active,
            tile: sizes.pairs_of_tile(&client, tokens),
        };
        let tiles = selection.tiles(tokens);
        let words = |count: usize| client.empty(count * size_of::<u32>());
        let logits = self.floats(tokens * sizes.experts);
        let (ids, shares, order) = (words(pairs), words(pairs), words(pairs));
        let (starts, tile_list) = (words(sizes.experts + 1), words(4 * tiles));
        let x = self.rows(tokens, sizes.embedding_dim);
        let hidden = words(Method::of(&client).words(pairs * sizes.mlp_dim));
        let outputs = words(pairs * sizes.embedding_dim);
        let residual = self.floats(tokens * sizes.embedding_dim);
        let [first, second] = packed.clone();
        self.graph(2, move |_| {
            let buffers = dispatch::Buffers {
                logits: &logits,
                ids: &ids,
                shares: &shares,
                order: &order,
                starts: &starts,
                tiles: &tile_list,
            };
            dispatch::launch(&client, selection, tokens, &buffers);
            let buffers = grouped::Buffers {
                x: &x,
                order: &order,
                tiles: &tile_list,
                codes: &first.codes,
                scales: &first.scales,
                bias: &first.bias,
                y: &hidden,
            };
            grouped::gate_up(&client, sizes, tokens, tiles, &buffers);
            let buffers = grouped::Buffers {
                x: &hidden,
                codes: &second.codes,
                scales: &second.scales,
                bias: &second.bias,
                y: &outputs,
                ..buffers
            };
            grouped::down(&client, sizes, tokens, tiles, &buffers);
            grouped::combine(&client, sizes, tokens, &outputs, &shares, &residual);
        })
    }

    /// Both products of each expert with its tokens, which have been sorted beforehand; nothing else.
    fn decoded_moe(&self, tokens: usize, decoded: &[Vec<Handle>; 2]) -> impl FnMut(u64) -> Duration + use<> {
        let client = self.client.clone();
        let logits = floats(tokens * self.weights.config().num_experts);
        let counts = self.weights.tokens_of_experts(&logits).into_iter().map(|tokens| tokens.len());
        let mut products = Vec::new();
        for (expert, count) in counts.enumerate().filter(|(_, count)| *count > 0) {
            for matrix in Matrix::ALL {
                let [rows, columns] = matrix.shape(self.weights.config());
                let sizes = Matmul { rows, columns, bias: false, residual: false };
                let y = client.empty(count * rows * size_of::<f32>());
                let weights = decoded[matrix as usize][expert].clone();
                products.push((sizes, count, weights, self.rows(count, columns), y));
            }
        }
        let bias = self.floats(1);
        self.graph(2, move |_| {
            for (sizes, count, weights, x, y) in &products {
                matmul::launch(&client, *sizes, *count, &matmul::Buffers { weights, bias: &bias, x, y });
            }
        })
    }

    /// A token of one sequence over its cache, each launch over another one.
    fn decode_attention(&self, suite: &mut Suite) {
        let cache = LazyCell::new(|| self.cache());
        for &depth in &self.weights.depths {
            suite.measure(self.weights.attention_of_a_token(depth), || {
                let config = self.weights.config();
                let client = self.client.clone();
                let cache = cache.clone();
                let table = depth.div_ceil(PAGE);
                let sequences = (cache.pages / table).clamp(1, MOST_LAUNCHES);
                let sizes = Attention {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    head_dim: config.head_dim,
                    window: 0,
                    table,
                    splits: depth.div_ceil(2 * PAGE).next_power_of_two().min(MOST_SPLITS),
                    method: Method::Units,
                };
                let tables: Vec<Handle> = (0..sequences)
                    .map(|sequence| self.upload(&cache.table(sequence * table, table)))
                    .collect();
                let width = sizes.heads * sizes.head_dim;
                let (q, out, sinks) = (self.floats(width), self.floats(width), self.floats(sizes.heads));
                let partial = client.empty(sizes.partial_len(1) * size_of::<f32>());
                let position = self.upload(&[depth as u32 - 1]);
                self.graph(sequences, move |sequence| {
                    let buffers = attention::Buffers {
                        q: &q,
                        keys: &cache.keys,
                        values: &cache.values,
                        cache_len: cache.len,
                        positions: &position,
                        pages: &tables[sequence],
                        sinks: &sinks,
                        partial: &partial,
                        out: &out,
                    };
                    attention::launch::<f16>(&client, sizes, 1, &buffers);
                })
            });
        }
    }

    /// The first tokens of a sequence.
    fn prefill_attention(&self, suite: &mut Suite) {
        let Some(&tokens) = self.weights.prompts.last() else { return };
        suite.measure(self.weights.attention(tokens), || {
            let config = self.weights.config();
            let client = self.client.clone();
            let cache = self.cache();
            let sizes = PrefillAttention {
                heads: config.num_heads,
                kv_heads: config.num_kv_heads,
                head_dim: config.head_dim,
                window: 0,
                table: tokens.div_ceil(PAGE),
            };
            let width = sizes.heads * sizes.head_dim;
            let (q, sinks) = (self.floats(tokens * width), self.floats(sizes.heads));
            let out = client.empty(tokens * Method::of(&client).words(width) * size_of::<u32>());
            let pages = self.upload(&cache.table(0, sizes.table));
            self.graph(2, move |_| {
                let buffers = prefill_attention::Buffers {
                    q: &q,
                    keys: &cache.keys,
                    values: &cache.values,
                    cache_len: cache.len,
                    pages: &pages,
                    sinks: &sinks,
                    out: &out,
                };
                prefill_attention::launch::<f16>(&client, sizes, 0, tokens, &buffers);
            })
        });
    }

    /// Runs of launches `0..launches`, again and again.
    fn graph<F: Fn(usize)>(&self, launches: usize, launch: F) -> impl FnMut(u64) -> Duration + use<F> {
        let client = self.client.clone();
        let sync = |client: &Client| cubecl::future::block_on(client.sync()).expect("a device that works");
        client.graph_prepare().expect("a device that records");
        (0..launches).for_each(&launch);
        client.start_capture().expect("a device that records");
        (0..launches).for_each(&launch);
        let graph = client.stop_capture().expect("a device that records");
        move |iterations| {
            // The launches own the buffers of the graph.
            let _ = &launch;
            let replays = iterations.div_ceil(launches as u64);
            sync(&client);
            let start = Instant::now();
            for _ in 0..replays {
                // SAFETY: the buffers live as long as this closure, and everything here is one thread's work on one stream.
                unsafe { graph.replay() }.expect("a graph that was recorded");
            }
            sync(&client);
            start.elapsed().mul_f64(iterations as f64 / (replays * launches as u64) as f64)
        }
    }

    fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Handle {
        let bytes = bytemuck::cast_slice(values);
        self.client.memory_persistent_allocation((), |()| self.client.create_from_slice(bytes))
    }

    fn floats(&self, count: usize) -> Handle {
        self.upload(&floats(count))
    }

    /// Rows as tensor cores, or whatever the device has, take them.
    fn rows(&self, rows: usize, columns: usize) -> Handle {
        let values = floats(rows * columns);
        match Method::of(&self.client) {
            Method::TensorCores => self.upload(&values.into_iter().map(bf16::from_f32).collect::<Vec<_>>()),
            Method::Fragments => self.upload(&values.into_iter().map(f16::from_f32).collect::<Vec<_>>()),
            Method::Units => self.upload(&values),
        }
    }

    /// A dense layer for one token, without anything but the product.
    fn linear(&self, rows: usize, columns: usize) -> impl Fn(&Handle) + use<> {
        let client = self.client.clone();
        let sizes = Linear { rows, columns, bias: false, residual: false, epsilon: None };
        let (x, y) = (self.floats(columns), self.floats(rows));
        move |weights| {
            linear::launch(&client, sizes, 1, &linear::Buffers { weights, bias: &x, norm: &x, x: &x, y: &y });
        }
    }

    /// A matrix of all experts.
    fn packed(&self, matrix: Matrix) -> Packed {
        let experts = self.weights.config().num_experts;
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for expert in 0..experts {
            let [some_codes, some_scales] = self.weights.packed(matrix, expert);
            codes.extend(some_codes);
            scales.extend(some_scales);
        }
        let [rows, _] = matrix.shape(self.weights.config());
        Packed { codes: self.upload(&codes), scales: self.upload(&scales), bias: self.floats(experts * rows) }
    }

    /// A matrix of each expert, dequantised.
    fn decoded(&self, matrix: Matrix) -> Vec<Handle> {
        let experts = 0..self.weights.config().num_experts;
        experts.map(|expert| self.upload(&self.weights.decoded(matrix, expert))).collect()
    }

    /// As many pages as are read in turn.
    fn cache(&self) -> Cache {
        let config = self.weights.config();
        let longest = self.weights.depths.iter().chain(&self.weights.prompts).max().copied().unwrap_or(0);
        let bytes = self.weights.caches.max(self.weights.bytes_of_cache(longest.next_multiple_of(PAGE)));
        let pages = bytes / self.weights.bytes_of_cache(PAGE);
        let len = pages * PAGE * config.num_kv_heads * config.head_dim;
        let [keys, values] = [(); 2].map(|()| {
            let values: Vec<f16> = floats(len).into_iter().map(f16::from_f32).collect();
            self.upload(&values)
        });
        Cache { keys, values, len, pages }
    }
}

/// A matrix of all experts as a file has it, and f32 biases.
#[derive(Clone)]
struct Packed {
    codes: Handle,
    scales: Handle,
    bias: Handle,
}

/// Keys and values in pages.
#[derive(Clone)]
struct Cache {
    keys: Handle,
    values: Handle,
    /// Elements of each.
    len: usize,
    pages: usize,
}

impl Cache {
    /// Page numbers that are nowhere neighbours.
    fn table(&self, first: usize, count: usize) -> Vec<u32> {
        (first..first + count).map(|page| (page * 7919 % self.pages) as u32).collect()
    }
}

/// 16 bytes.
type U4 = Vector<u32, Const<4>>;
/// Units of a cube that copies, and pieces of 16 bytes that each copies.
const UNITS: usize = 256;
const PIECES: usize = 4;

fn copy(client: &Client, from: &Handle, to: &Handle, bytes: usize) {
    let pieces = bytes / size_of::<u32>() / 4;
    let cubes = pieces.div_ceil(UNITS * PIECES) as u32;
    // SAFETY: both buffers have `pieces` pieces; units stop there.
    unsafe {
        copy_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes.min(65_535), cubes.div_ceil(65_535), 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(from.clone(), pieces),
            BufferArg::from_raw_parts(to.clone(), pieces),
            pieces,
        );
    }
}

#[cube(launch_unchecked)]
fn copy_kernel(from: &[U4], to: &mut [U4], #[comptime] pieces: usize) {
    let cube = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
    let first = cube * comptime!(UNITS * PIECES) + UNIT_POS as usize;
    #[unroll]
    for piece in 0..PIECES {
        let at = first + comptime!(piece * UNITS);
        if at < pieces {
            to[at] = from[at];
        }
    }
}
