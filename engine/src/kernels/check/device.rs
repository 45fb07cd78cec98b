//! Inputs on a device, beside what they are in float64, and what comes back from there.

use bytemuck::Pod;
use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::{bf16, f16};

use super::{F32, Random};
use crate::backend::read;
use crate::error::Result;
use crate::kernels::method::Method;
use crate::kernels::qkv::{FINE, PAGE};

/// What rounding to f16 may cost, which has 11 bits: half a unit of the last.
pub(crate) const F16: f64 = 1.0 / 2048.0;
/// What rounding to bf16 may cost, which has 8 bits.
const BF16: f64 = 1.0 / 256.0;

/// Random inputs of a device.
pub(crate) struct Inputs<'a> {
    client: &'a Client,
    pub random: Random,
}

/// Numbers on a device.
pub(crate) struct Input {
    pub handle: Handle,
    pub values: Vec<f64>,
}

/// An MXFP4 matrix on a device.
pub(crate) struct Packed {
    pub codes: Handle,
    pub scales: Handle,
    pub values: Vec<f64>,
}

impl Inputs<'_> {
    pub fn new(client: &Client, seed: u64) -> Inputs<'_> {
        Inputs { client, random: Random::new(seed) }
    }

    /// Anything, as it is.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Handle {
        self.client.create_from_slice(bytemuck::cast_slice(values))
    }

    /// Numbers of one's choice in f32.
    pub fn of(&self, values: &[f32]) -> Input {
        Input { handle: self.upload(values), values: values.iter().map(|&value| value.into()).collect() }
    }

    /// Numbers between `−scale` and `scale` in f32.
    pub fn f32(&mut self, count: usize, scale: f32) -> Input {
        let values = self.random.values(count, scale);
        self.of(&values)
    }

    /// Such numbers in bf16.
    pub fn bf16(&mut self, count: usize, scale: f32) -> Input {
        let values: Vec<bf16> = self.random.values(count, scale).into_iter().map(bf16::from_f32).collect();
        Input { handle: self.upload(&values), values: values.iter().map(|value| value.to_f64()).collect() }
    }

    /// Such numbers as rows of a method.
    pub fn rows(&mut self, count: usize, scale: f32, method: Method) -> Input {
        match method {
            Method::TensorCores => self.bf16(count, scale),
            Method::Fragments => {
                let values: Vec<f16> =
                    self.random.values(count, scale).into_iter().map(f16::from_f32).collect();
                Input { handle: self.upload(&values), values: values.iter().map(|v| v.to_f64()).collect() }
            }
            Method::Units => self.f32(count, scale),
        }
    }

    /// A buffer of its own with the same f32.
    pub fn again(&self, input: &Input) -> Handle {
        self.upload(&input.values.iter().map(|&value| value as f32).collect::<Vec<_>>())
    }

    /// A matrix as of [`Random::mxfp4`].
    pub fn mxfp4(&mut self, rows: usize, columns: usize) -> Packed {
        let packed = self.random.mxfp4(rows, columns);
        Packed {
            codes: self.upload(&packed.codes),
            scales: self.upload(&packed.scales),
            values: packed.values,
        }
    }
}

/// A buffer of words that are not numbers, nor pairs of halves that are.
pub(crate) fn poisoned(client: &Client, words: usize) -> Handle {
    client.create_from_slice(&vec![0xff; words * 4])
}

/// The values of a cache.
pub(crate) fn read_cache<C: Cached>(client: &Client, handle: &Handle) -> Result<Vec<f32>> {
    Ok(read::<C>(client, handle)?.into_iter().map(C::value).collect())
}

/// The values of rows in the words of a method.
pub(crate) fn values_of(rows: &[u32], method: Method) -> Vec<f32> {
    match method {
        Method::TensorCores => bytemuck::cast_slice(rows).iter().map(|value: &bf16| value.to_f32()).collect(),
        Method::Fragments => bytemuck::cast_slice(rows).iter().map(|value: &f16| value.to_f32()).collect(),
        Method::Units => bytemuck::cast_slice(rows).to_vec(),
    }
}

impl Method {
    /// What rounding to a row of the method may cost.
    pub(crate) fn rounding(self) -> f64 {
        match self {
            Method::TensorCores => BF16,
            Method::Fragments => F16,
            Method::Units => F32,
        }
    }
}

/// Moves the quads of rows so that their blocks of 32 lie side by side: quad `q` of block `b` of `n` to place `q · n + b`.
pub(crate) fn side_by_side<T: Copy>(rows: &[T], width: usize) -> Vec<T> {
    let blocks = width / 32;
    let places = (0..8).flat_map(|quad| (0..blocks).map(move |block| block * 32 + quad * 4));
    let of_row = |row: &[T]| places.clone().flat_map(|at| row[at..at + 4].to_vec()).collect::<Vec<_>>();
    rows.chunks(width).flat_map(of_row).collect()
}

/// A type that keys and values may have.
pub(crate) trait Cached: Float + CubeElement + Pod {
    const NAME: &str;
    /// What rounding to it may cost.
    const ROUNDING: f64;
    fn of(value: f32) -> Self;
    fn value(self) -> f32;
}

impl Cached for f32 {
    const NAME: &str = "f32";
    const ROUNDING: f64 = F32;
    fn of(value: f32) -> f32 {
        value
    }
    fn value(self) -> f32 {
        self
    }
}

impl Cached for f16 {
    const NAME: &str = "f16";
    const ROUNDING: f64 = F16;
    fn of(value: f32) -> f16 {
        f16::from_f32(value)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
}

/// Whether caches can be f16.
pub(crate) fn halves(client: &Client) -> bool {
    client.properties().supports_type(ElemType::Float(FloatKind::F16))
}

/// Pages of keys or values, `[pages, kv_heads, PAGE, head_dim]`, those of some sequences among others.
pub(crate) struct Pool {
    /// The pages of each sequence, `[sequences, table]`: page `n` of a sequence stands at `n mod table`.
    pub numbers: Vec<u32>,
    table: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Pool {
    /// Pages all over the pool, two of which are nobody's.
    pub fn new(
        random: &mut Random,
        sequences: usize,
        table: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Pool {
        let count = sequences * table + 2;
        let keys = random.numbers(count, u32::MAX as usize);
        let mut numbers: Vec<u32> = (0..count as u32).collect();
        numbers.sort_by_key(|&number| keys[number as usize]);
        numbers.truncate(sequences * table);
        Pool { numbers, table, kv_heads, head_dim }
    }

    /// Elements of the pool.
    pub fn len(&self) -> usize {
        (self.numbers.len() + 2) * self.kv_heads * PAGE * self.head_dim
    }

    /// Where the vector of a position of a sequence begins.
    pub fn slot(&self, sequence: usize, position: usize, kv_head: usize) -> usize {
        let page = self.numbers[sequence * self.table + position / PAGE % self.table] as usize;
        ((page * self.kv_heads + kv_head) * PAGE + position % PAGE) * self.head_dim
    }

    /// Keys and values that nobody has written.
    pub fn untouched(&self) -> [Vec<f64>; 2] {
        [(); 2].map(|()| vec![f64::NAN; self.len()])
    }

    /// The same on a device.
    pub fn poisoned<C: Cached>(&self, client: &Client) -> Handle {
        client.create_from_slice(&vec![0xff; self.len() * size_of::<C>()])
    }

    /// Writes the keys and values of a position, `[kv_heads, head_dim]` each.
    pub fn write(&self, cache: &mut [Vec<f64>; 2], sequence: usize, position: usize, new: [&[f64]; 2]) {
        for (cache, new) in cache.iter_mut().zip(new) {
            for (kv_head, new) in new.chunks(self.head_dim).enumerate() {
                let slot = self.slot(sequence, position, kv_head);
                cache[slot..slot + self.head_dim].copy_from_slice(new);
            }
        }
    }

    /// A cache in which only the positions below `lens` of the sequences were written, as far back as there are pages.
    pub fn filled<C: Cached>(&self, random: &mut Random, lens: &[usize]) -> Vec<C> {
        let mut cache = vec![C::of(f32::NAN); self.len()];
        for (sequence, &len) in lens.iter().enumerate() {
            let first = len.div_ceil(PAGE).saturating_sub(self.table) * PAGE;
            for position in first..len {
                for kv_head in 0..self.kv_heads {
                    let slot = self.slot(sequence, position, kv_head);
                    for (at, value) in random.values(self.head_dim, 1.0).into_iter().enumerate() {
                        cache[slot + at] = C::of(value);
                    }
                }
            }
        }
        cache
    }
}

/// Tables of a rotation with θ = 150000, times 1.3.
pub(crate) struct Angles {
    pub coarse: Handle,
    pub fine: Handle,
    head_dim: usize,
}

impl Angles {
    const FACTOR: f64 = 1.3;

    /// For positions up to `last`.
    pub fn new(inputs: &Inputs<'_>, head_dim: usize, last: usize) -> Angles {
        let table = |rows: usize, step: usize, factor: f64| {
            let row = |row: usize| (0..head_dim / 2).map(move |pair| angle(head_dim, row * step, pair));
            let values = (0..rows)
                .flat_map(row)
                .flat_map(|angle| [(angle.cos() * factor) as f32, (angle.sin() * factor) as f32]);
            inputs.upload(&values.collect::<Vec<_>>())
        };
        Angles { coarse: table(last / FINE + 1, FINE, 1.0), fine: table(FINE, 1, Angles::FACTOR), head_dim }
    }

    /// The vector of a head at a position: `(a, b)` becomes `(a·cos − b·sin, b·cos + a·sin)`.
    pub fn rotated(&self, head: &[f64], position: usize) -> Vec<f64> {
        let pairs = head.as_chunks::<2>().0.iter().enumerate();
        let rotated = pairs.flat_map(|(pair, [a, b])| {
            let (sin, cos) = angle(self.head_dim, position, pair).sin_cos();
            [a * cos - b * sin, b * cos + a * sin].map(|value| value * Angles::FACTOR)
        });
        rotated.collect()
    }
}

fn angle(head_dim: usize, position: usize, pair: usize) -> f64 {
    position as f64 * 150_000f64.powf(-2.0 * pair as f64 / head_dim as f64)
}
