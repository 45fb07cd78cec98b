//! Products of many rows of activations with a matrix, a tile at a time: the core of [`super::matmul`] and
//! [`super::grouped`].
//!
//! A cube computes the products of [`Tile::tokens`] rows of `x` with [`Tile::rows`] rows of the matrix. Activations go through
//! shared memory, a chunk of columns at a time and double buffered; every plane has its own rows of the matrix, which it reads
//! straight into registers, so that no weight is staged and an MXFP4 weight is decoded exactly once.
//!
//! ```text
//! x ── registers ── shared ──┐
//! W ── registers (decoded) ──┴─ mma ── sums
//! ```
//!
//! A sum does not depend on the order of its terms, so that a lane takes 16 bytes of columns that lie side by side, from both
//! factors, as the columns which the instruction calls 2q, 2q+1, 2q+8 and 2q+9 of two steps. MXFP4 codes leave a word as pairs
//! 4 columns apart; the activations are put into that order on their way to shared memory.
//!
//! Few rows of activations are multiplied by `few`, without staging.
//!
//! Without the instruction both factors are staged: for cooperative matrices as f16, which a plane multiplies four of at
//! a time, and else as f32, of which each unit sums 16 products.

use cubecl::client::Client;
use cubecl::cmma::{self, MatrixIdent, MatrixLayout, MmaDefinition};
use cubecl::prelude::*;
use half::{bf16, f16};

use super::dense::{high, low};
use super::few::{self, place_of_few, product_of_few};
use super::group::U4;
use super::method::Method;

/// 16-byte pieces of activations that a unit has under way at a time.
const UNDER_WAY: usize = 4;
/// Columns that are staged at a time without the instruction.
const STRIP: usize = 32;
/// Rows of both factors in a cube of units, and of the activations in one of cooperative matrices.
const SIDE: usize = 64;
/// Units along a side of a cube of units.
const UNITS_OF_SIDE: usize = 16;
/// Rows of the matrix in a cube of cooperative matrices.
const FRAGMENT_ROWS: usize = 2 * SIDE;
/// Planes of such a cube: two along the activations, four along the matrix.
const FRAGMENT_PLANES: usize = 8;
/// Pieces of eight values between its rows in shared memory, one more than a strip so that rows lie in different banks.
const FRAGMENT_STRIDE: usize = STRIP / 8 + 1;
/// A row of activations beyond any.
pub(super) const NOWHERE: usize = 1 << 28;
/// Rows of activations that an MXFP4 matrix meets on average, up to which they are few.
const FEW_PAIRS: usize = 4;
/// What MXFP4 weights are multiplied by as f16 lies 2^10 above their value: scales from 2^−33 to 2^3 are exact.
const OVER: u32 = 10;
/// What MXFP4 weights are multiplied by as bf16 lies 2^48 below their value, so that scales up to 2^49 fit.
pub(super) const UNDER: u32 = 48;

/// Tokens, planes, eights, steps and steps ahead of the tiles for bf16 matrices, those for fewer tokens first.
const DENSE: [[usize; 5]; 4] = [[32, 4, 2, 8, 5], [32, 4, 4, 4, 2], [64, 4, 4, 4, 2], [128, 8, 4, 4, 1]];
/// Those of the tiles for MXFP4 matrices.
const GROUPED: [[usize; 5]; 3] = [[16, 4, 4, 8, 0], [32, 4, 4, 4, 0], [64, 6, 4, 4, 0]];

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    /// bf16, eight in 16 bytes.
    Bf16,
    /// MXFP4, a block of 32 codes in 16 bytes, with stored scales.
    Mxfp4,
}

impl Format {
    /// Values in 16 bytes.
    pub(crate) fn values(self) -> usize {
        match self {
            Format::Bf16 => 8,
            Format::Mxfp4 => 32,
        }
    }
}

/// Eight f16: cooperative matrices are loaded from multiples of 16 bytes.
type H8 = Vector<f16, Const<8>>;

/// What a product is compiled for. What is said of the instruction does not matter to other methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Columns of both factors, a multiple of 32.
    pub columns: usize,
    /// Rows of the matrix.
    pub matrix_rows: usize,
    /// How the matrix is stored.
    pub format: Format,
    /// Who multiplies, and so how the activations are stored.
    pub method: Method,
    /// Rows of activations: 16, 32, 64 or 128 with the instruction, 8, 16 or 32 where columns are split, [`SIDE`] without it.
    pub tokens: usize,
    /// Whether the planes of a cube have the same rows of the matrix and every one a part of their columns (`few`).
    pub split: bool,
    /// Planes of a cube with the instruction.
    pub planes: usize,
    /// Rows of the matrix that such a plane has, in eights.
    pub eights: usize,
    /// Steps of 32 columns in a chunk, 4 or 8; where columns are split, parts that a plane reads at a time.
    pub steps: usize,
    /// Steps that bf16 weights are read ahead, less than `steps`. MXFP4 weights are read a chunk ahead.
    pub ahead: usize,
}

impl Tile {
    /// The tile for `tokens` rows of activations and a bf16 matrix, as measured on an H100: few rows want their weights read far
    /// ahead, many want them read seldom.
    pub(crate) fn dense(client: &Client, columns: usize, matrix_rows: usize, tokens: usize) -> Tile {
        if tokens <= few::MOST_TOKENS {
            return Tile::few(Method::of(client), Format::Bf16, columns, matrix_rows, tokens);
        }
        let [some, more, many, most] = DENSE;
        let method = Method::of(client);
        let large = Tile::new(method, Format::Bf16, columns, matrix_rows, most);
        let shape = match tokens {
            ..=256 => some,
            257..=768 => more,
            _ => {
                // The last round of cubes had better be a full one.
                let processors =
                    client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
                let cubes = tokens.div_ceil(large.tokens) * matrix_rows.div_ceil(large.rows());
                let places = cubes.next_multiple_of(processors);
                if cubes * 4 >= places * 3 { most } else { many }
            }
        };
        Tile::new(method, Format::Bf16, columns, matrix_rows, shape)
    }

    /// The tile for MXFP4 matrices that `tokens` rows of activations meet each, on average.
    pub(crate) fn grouped(client: &Client, columns: usize, matrix_rows: usize, tokens: usize) -> Tile {
        if tokens <= FEW_PAIRS {
            return Tile::few(Method::of(client), Format::Mxfp4, columns, matrix_rows, 1);
        }
        let [few, more, many] = GROUPED;
        let shape = match tokens {
            0..=16 => few,
            17..=96 => more,
            _ => many,
        };
        Tile::new(Method::of(client), Format::Mxfp4, columns, matrix_rows, shape)
    }

    /// Every tile that is ever chosen, for every method that a device has.
    pub(crate) fn all(client: &Client, format: Format, columns: usize, matrix_rows: usize) -> Vec<Tile> {
        let (shapes, few): (&[[usize; 5]], &[usize]) = match format {
            Format::Bf16 => (&DENSE, &[8, 16, 32]),
            Format::Mxfp4 => (&GROUPED, &[1]),
        };
        let of_method = |method| {
            // Shapes are those of the instruction.
            let (shapes, few) =
                if method == Method::TensorCores { (shapes, few) } else { (&shapes[..1], &[][..]) };
            let large =
                shapes.iter().map(move |&shape| Tile::new(method, format, columns, matrix_rows, shape));
            large
                .chain(few.iter().map(move |&tokens| Tile::few(method, format, columns, matrix_rows, tokens)))
        };
        Method::all(client).into_iter().flat_map(of_method).collect()
    }

    fn new(method: Method, format: Format, columns: usize, matrix_rows: usize, shape: [usize; 5]) -> Tile {
        let shape = if method == Method::TensorCores { shape } else { [SIDE, 0, 0, 0, 0] };
        let [tokens, planes, eights, steps, ahead] = shape;
        Tile { columns, matrix_rows, format, method, tokens, split: false, planes, eights, steps, ahead }
    }

    /// The tile for up to [`few::MOST_TOKENS`] rows of activations.
    fn few(method: Method, format: Format, columns: usize, matrix_rows: usize, tokens: usize) -> Tile {
        let eights_of_tokens = tokens.div_ceil(8).next_power_of_two();
        let [planes, eights, steps] = few::shape(format, matrix_rows);
        let shape = [8 * eights_of_tokens, planes, eights, steps, 0];
        let tile = Tile::new(method, format, columns, matrix_rows, shape);
        Tile { split: tile.method == Method::TensorCores, ..tile }
    }

    /// What tells it from the others of a product.
    pub(crate) fn name(&self) -> String {
        let Tile { method, tokens, planes, eights, steps, .. } = self;
        match method {
            Method::TensorCores if self.split => format!("{method:?} {tokens}, columns split"),
            Method::TensorCores => format!("{method:?} {tokens}×{planes}×{eights}, {steps} steps"),
            Method::Fragments | Method::Units => format!("{method:?}"),
        }
    }

    /// Rows of the matrix in a cube.
    pub(crate) fn rows(&self) -> usize {
        match self.method {
            Method::TensorCores if self.split => self.eights * 8,
            Method::TensorCores => self.planes * self.eights * 8,
            Method::Fragments => FRAGMENT_ROWS,
            Method::Units => SIDE,
        }
    }

    /// Chunks, strips or rounds of a row.
    pub(crate) fn chunks(&self) -> usize {
        match self.method {
            Method::TensorCores if self.split => {
                self.columns.div_ceil(4 * self.format.values() * self.planes * self.steps)
            }
            Method::TensorCores => self.columns.div_ceil(32 * self.steps),
            Method::Fragments | Method::Units => self.columns / STRIP,
        }
    }

    /// The units of a cube.
    pub(crate) fn cube_dim(&self) -> CubeDim {
        match self.method {
            Method::TensorCores => CubeDim::new_2d(32, self.planes as u32),
            Method::Fragments => CubeDim::new_2d(32, FRAGMENT_PLANES as u32),
            Method::Units => CubeDim::new_1d((UNITS_OF_SIDE * UNITS_OF_SIDE) as u32),
        }
    }

    /// Units of a cube.
    pub(crate) fn units(&self) -> usize {
        match self.method {
            Method::TensorCores => 32 * self.planes,
            Method::Fragments => 32 * FRAGMENT_PLANES,
            Method::Units => UNITS_OF_SIDE * UNITS_OF_SIDE,
        }
    }

    /// Pairs of neighbouring rows' sums that a unit ends up with.
    pub(crate) fn pairs(&self) -> usize {
        let pairs = self.tokens * self.rows() / 2;
        if self.split { 2 * pairs.div_ceil(2 * self.units()) } else { pairs / self.units() }
    }

    /// Whether the sums of the pairs `2n` and `2n + 1` are those of four neighbouring rows.
    pub(crate) fn has_quads(&self) -> bool {
        self.split || self.method != Method::TensorCores
    }

    /// 16-byte pieces of activations in a chunk of a row.
    fn pieces(&self) -> usize {
        4 * self.steps
    }

    /// Pieces that a unit stages of a chunk.
    fn staged(&self) -> usize {
        (self.tokens * self.pieces()).div_ceil(self.units())
    }

    /// Parts in which it does.
    fn parts(&self) -> usize {
        self.staged().div_ceil(UNDER_WAY).next_power_of_two().min(self.steps)
    }

    /// Pieces of a part.
    fn of_part(&self) -> usize {
        self.staged().div_ceil(self.parts())
    }

    /// Steps of the product while a part is under way.
    fn part_steps(&self) -> usize {
        self.steps / self.parts()
    }

    /// Blocks of MXFP4 codes that a lane has of a row's chunk.
    fn blocks(&self) -> usize {
        self.steps / 4
    }
}

/// Where the pair `pair` of a unit's sums belongs: the row of activations and the first of the two rows of the matrix, in the
/// tile. A pair that a unit does not have belongs to row [`NOWHERE`].
#[cube]
pub(crate) fn place(pair: usize, #[comptime] tile: Tile) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    let (plane, lane) = (unit / 32, unit % 32);
    match tile.method {
        Method::TensorCores => {
            if comptime!(tile.split) {
                place_of_few(pair, tile)
            } else {
                let token = pair / comptime!(2 * tile.eights) * 16 + pair % 2 * 8 + lane / 4;
                let row =
                    plane * comptime!(8 * tile.eights) + pair / 2 % comptime!(tile.eights) * 8 + lane % 4 * 2;
                (token, row)
            }
        }
        Method::Fragments => {
            // A lane has two quads of each of four fragments.
            let quad = pair / 2 % 2 * 32 + lane;
            let token = plane % 2 * 32 + pair / 8 * 16 + quad / 4;
            let row = plane / 2 * 32 + pair / 4 % 2 * 16 + quad % 4 * 4 + pair % 2 * 2;
            (token, row)
        }
        Method::Units => {
            let token = unit / UNITS_OF_SIDE + pair / 2 * UNITS_OF_SIDE;
            let row = unit % UNITS_OF_SIDE * 4 + pair % 2 * 2;
            (token, row)
        }
    }
}

/// Sums the products of a tile into `sums` (`[tile.pairs(), 2]`, see [`place`]).
///
/// - `weights`: rows of [`Format::values`] values in 16 bytes; the matrix begins at row `matrix`, the tile at row `first` of
///   it. Rows past its end are those of its last row.
/// - `scales`: four stored scales a word, for MXFP4.
/// - `x`: rows of eight halves or four f32 in 16 bytes; `sources`, in shared memory, says which rows the tile has (`[tile.tokens]`).
/// - `chunks` is [`Tile::chunks`]: as a value that the compiler does not know, for it would unroll the loop.
#[cube]
pub(crate) fn product(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    sources: &[u32],
    sums: &mut Array<f32>,
    matrix: usize,
    first: usize,
    chunks: usize,
    #[comptime] tile: Tile,
) {
    match tile.method {
        Method::TensorCores => {
            if comptime!(tile.split) {
                product_of_few(weights, scales, x, sources, sums, matrix, first, chunks, tile);
            } else {
                product_of_tensor_cores(weights, scales, x, sources, sums, matrix, first, chunks, tile);
            }
        }
        Method::Fragments => {
            product_of_fragments(weights, scales, x, sources, sums, matrix, first, chunks, tile)
        }
        Method::Units => product_of_units(weights, scales, x, sources, sums, matrix, first, chunks, tile),
    }
}

#[cube]
fn product_of_tensor_cores(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    sources: &[u32],
    sums: &mut Array<f32>,
    matrix: usize,
    first: usize,
    chunks: usize,
    #[comptime] tile: Tile,
) {
    let lane = UNIT_POS_X as usize;
    let (of_eight, quarter) = (lane / 4, lane % 4);
    let definition = MmaDefinition::<bf16, bf16, f32>::new(16usize, 8usize, 16usize);
    let buffer = comptime!(tile.tokens * tile.pieces());
    let mut stage = Shared::<[U4]>::new_slice(comptime!(2 * tile.tokens * tile.pieces()));

    let mut accumulators = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _ in 0..comptime!(tile.tokens / 16 * tile.eights) {
        let mut accumulator = Array::<Vector<f32, Const<2>>>::new(2usize);
        accumulator[0] = Vector::<f32, Const<2>>::new(0.0f32);
        accumulator[1] = Vector::<f32, Const<2>>::new(0.0f32);
        accumulators.push(accumulator);
    }

    // Where this lane's rows of the matrix begin, in 16 bytes.
    let mut rows = Array::<usize>::new(comptime!(tile.eights));
    #[unroll]
    for n in 0..comptime!(tile.eights) {
        let row = first + UNIT_POS_Y as usize * comptime!(8 * tile.eights) + n * 8 + of_eight;
        let row = select(row < comptime!(tile.matrix_rows), row, comptime!(tile.matrix_rows - 1));
        rows[n] = (matrix + row) * comptime!(tile.columns / tile.format.values());
    }

    // bf16: the steps of a chunk; MXFP4: the blocks of a chunk, now and next.
    let kept = comptime!(if tile.format == Format::Bf16 { tile.steps } else { 2 * tile.blocks() });
    let now = comptime!(tile.blocks() * tile.eights);
    let mut words = Array::<U4>::new(comptime!(kept * tile.eights));
    let mut exponents = Array::<u32>::new(comptime!(kept * tile.eights));
    if comptime!(tile.format == Format::Bf16) {
        #[unroll]
        for step in 0..comptime!(tile.ahead) {
            read_step(weights, &rows, &mut words, step * 4 + quarter, step, tile);
        }
    } else {
        read_blocks(weights, scales, &rows, &mut words, &mut exponents, quarter, 0usize, tile);
    }

    let mut staged = Array::<U4>::new(comptime!(tile.of_part()));
    #[unroll]
    for part in 0..comptime!(tile.parts()) {
        read_part(x, sources, &mut staged, 0usize, part, tile);
        write_part(&mut stage, &staged, 0usize, part, tile);
    }
    sync_cube();

    for chunk in 0..chunks {
        let here = chunk % 2 * buffer;
        let there = buffer - here;
        if comptime!(tile.format == Format::Mxfp4) {
            let block = (chunk + 1) * comptime!(tile.steps) + quarter;
            read_blocks(weights, scales, &rows, &mut words, &mut exponents, block, now, tile);
        }
        #[unroll]
        for step in 0..comptime!(tile.steps) {
            if comptime!(step % tile.part_steps() == 0) {
                read_part(x, sources, &mut staged, chunk + 1, comptime!(step / tile.part_steps()), tile);
            }
            if comptime!(tile.format == Format::Bf16) {
                let ahead = comptime!(step + tile.ahead);
                read_step(
                    weights,
                    &rows,
                    &mut words,
                    chunk * comptime!(tile.pieces()) + ahead * 4 + quarter,
                    comptime!(ahead % tile.steps),
                    tile,
                );
            }
            // This lane's columns of its rows of the matrix: two registers for each of two instructions.
            let mut right = Array::<u32>::new(comptime!(4 * tile.eights));
            #[unroll]
            for n in 0..comptime!(tile.eights) {
                if comptime!(tile.format == Format::Bf16) {
                    let word = words[comptime!(step * tile.eights + n)];
                    #[unroll]
                    for i in 0..4usize {
                        right[n * 4 + i] = word.extract(i);
                    }
                } else {
                    let word = words[comptime!(step / 4 * tile.eights + n)].extract(comptime!(step % 4));
                    #[unroll]
                    for i in 0..4usize {
                        right[n * 4 + i] = decoded_pair(
                            word,
                            exponents[comptime!(step / 4 * tile.eights + n)],
                            comptime!(3 - i as u32),
                        );
                    }
                }
            }
            #[unroll]
            for m in 0..comptime!(tile.tokens / 16) {
                let row = m * 16 + of_eight;
                let at = here + row * comptime!(tile.pieces()) + swizzled(step * 4 + quarter, of_eight);
                let top = stage[at];
                let bottom = stage[at + comptime!(8 * tile.pieces())];
                #[unroll]
                for half in 0..2usize {
                    let mut left = Array::<Vector<bf16, Const<2>>>::new(4usize);
                    left[0] = Vector::<bf16, Const<2>>::reinterpret(top.extract(comptime!(2 * half)));
                    left[1] = Vector::<bf16, Const<2>>::reinterpret(bottom.extract(comptime!(2 * half)));
                    left[2] = Vector::<bf16, Const<2>>::reinterpret(top.extract(comptime!(2 * half + 1)));
                    left[3] = Vector::<bf16, Const<2>>::reinterpret(bottom.extract(comptime!(2 * half + 1)));
                    #[unroll]
                    for n in 0..comptime!(tile.eights) {
                        let mut columns = Array::<Vector<bf16, Const<2>>>::new(2usize);
                        columns[0] = Vector::<bf16, Const<2>>::reinterpret(right[n * 4 + 2 * half]);
                        columns[1] = Vector::<bf16, Const<2>>::reinterpret(right[n * 4 + 2 * half + 1]);
                        let at = comptime!(m * tile.eights + n);
                        definition.execute_inplace(&left, &columns, accumulators.index_mut(at));
                    }
                }
            }
            if comptime!((step + 1) % tile.part_steps() == 0) {
                write_part(&mut stage, &staged, there, comptime!(step / tile.part_steps()), tile);
            }
        }
        if comptime!(tile.format == Format::Mxfp4) {
            #[unroll]
            for at in 0..now {
                words[at] = words[comptime!(now + at)];
                exponents[at] = exponents[comptime!(now + at)];
            }
        }
        sync_cube();
    }

    let unit = if comptime!(tile.format == Format::Bf16) {
        1.0f32.runtime()
    } else {
        comptime!((1u64 << UNDER) as f32).runtime()
    };
    #[unroll]
    for at in 0..comptime!(tile.tokens / 16 * tile.eights) {
        let accumulator = accumulators.index(at);
        #[unroll]
        for i in 0..2usize {
            sums[at * 4 + i * 2] = accumulator[i].extract(0usize) * unit;
            sums[at * 4 + i * 2 + 1] = accumulator[i].extract(1usize) * unit;
        }
    }
}

/// Where a piece of a row of the stage lies: rows that a plane reads at once lie in different banks.
#[cube]
fn swizzled(piece: usize, row: usize) -> usize {
    piece ^ (row % 2 * 4)
}

/// Reads a piece of each of this lane's rows of a bf16 matrix.
#[cube]
fn read_step(
    weights: &[U4],
    rows: &Array<usize>,
    words: &mut Array<U4>,
    piece: usize,
    #[comptime] slot: usize,
    #[comptime] tile: Tile,
) {
    let last = comptime!(tile.columns / 8 - 1);
    // Past the end the activations are zero.
    let piece = select(piece < last, piece, last);
    #[unroll]
    for n in 0..comptime!(tile.eights) {
        words[comptime!(slot * tile.eights + n)] = weights[rows[n] + piece];
    }
}

/// Reads the blocks of a chunk of each of this lane's rows of an MXFP4 matrix: `block`, and every fourth that follows.
#[cube]
fn read_blocks(
    weights: &[U4],
    scales: &[u32],
    rows: &Array<usize>,
    words: &mut Array<U4>,
    exponents: &mut Array<u32>,
    block: usize,
    #[comptime] first: usize,
    #[comptime] tile: Tile,
) {
    let last = comptime!(tile.columns / 32 - 1);
    #[unroll]
    for i in 0..comptime!(tile.blocks()) {
        let block = block + i * 4;
        let block = select(block < last, block, last);
        #[unroll]
        for n in 0..comptime!(tile.eights) {
            let at = rows[n] + block;
            let slot = comptime!(first + i * tile.eights + n);
            words[slot] = weights[at];
            exponents[slot] = factor_of_block(scales, at);
        }
    }
}

/// The bits of the factor of an MXFP4 block as bf16, twice.
#[cube]
pub(super) fn factor_of_block(scales: &[u32], block: usize) -> u32 {
    let stored = (scales[block / 4] >> (u32::cast_from(block % 4) * 8u32)) & 255u32;
    let exponent = stored + comptime!(112 - UNDER);
    select(exponent < 254u32, exponent, 254u32) * 0x0080_0080u32
}

/// Eight activations in the order in which codes leave a word: 0, 4, 1, 5, 2, 6, 3, 7.
#[cube]
pub(super) fn in_order_of_codes(read: U4) -> U4 {
    let mut words = U4::empty();
    #[unroll]
    for w in 0..2usize {
        let (front, back) = (read.extract(w), read.extract(comptime!(w + 2)));
        words.insert(comptime!(2 * w), front & 0xffffu32 | back << 16u32);
        words.insert(comptime!(2 * w + 1), front >> 16u32 | back & 0xffff_0000u32);
    }
    words
}

/// The codes `3 − i` and `7 − i` … of a word as a pair of bf16, times the factor: put into the bits of a bf16, a code `s e e m`
/// is its value times 2^−126.
#[cube]
pub(super) fn decoded_pair(word: u32, factor: u32, #[comptime] shift: u32) -> u32 {
    let moved = word << comptime!(4 * shift);
    let bits = (moved & 0x8000_8000u32) | ((moved >> 6u32) & 0x01c0_01c0u32);
    u32::reinterpret(
        Vector::<bf16, Const<2>>::reinterpret(bits) * Vector::<bf16, Const<2>>::reinterpret(factor),
    )
}

/// Which piece of a chunk is a unit's number `item`: `(row, where it is staged in the row, where it stands in the row)`.
#[cube]
fn staged_piece(item: usize, #[comptime] tile: Tile) -> (usize, usize, usize) {
    let flat = item * comptime!(tile.units()) + UNIT_POS as usize;
    let slot = flat % comptime!(tile.pieces());
    let transposed = slot / 16 * 16 + slot % 4 * 4 + slot % 16 / 4;
    let piece = if comptime!(tile.format == Format::Bf16) { slot } else { transposed };
    (flat / comptime!(tile.pieces()), slot, piece)
}

/// Reads a part of this unit's share of a chunk of the activations.
#[cube]
fn read_part(
    x: &[U4],
    sources: &[u32],
    staged: &mut Array<U4>,
    chunk: usize,
    #[comptime] part: usize,
    #[comptime] tile: Tile,
) {
    let pieces = comptime!(tile.columns / 8);
    #[unroll]
    for i in 0..comptime!(tile.of_part()) {
        let item = comptime!(part * tile.of_part() + i);
        if comptime!(item < tile.staged()) {
            let (row, _slot, piece) = staged_piece(item, tile);
            let at = chunk * comptime!(tile.pieces()) + piece;
            let valid = at < pieces;
            let row = select(row < comptime!(tile.tokens), row, 0usize);
            let source = sources[row] as usize;
            let read = x[source * pieces + select(valid, at, 0usize)];
            let mut words = U4::empty();
            #[unroll]
            for w in 0..4usize {
                words.insert(w, select(valid, read.extract(w), 0u32));
            }
            staged[i] = words;
        }
    }
}

/// Writes what [`read_part`] has read to the buffer that begins at `start`.
#[cube]
fn write_part(
    stage: &mut [U4],
    staged: &Array<U4>,
    start: usize,
    #[comptime] part: usize,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for i in 0..comptime!(tile.of_part()) {
        let item = comptime!(part * tile.of_part() + i);
        if comptime!(item < tile.staged()) {
            let (row, slot, _piece) = staged_piece(item, tile);
            let read = staged[i];
            let mut words = read;
            if comptime!(tile.format == Format::Mxfp4) {
                words = in_order_of_codes(read);
            }
            let even = comptime!((tile.tokens * tile.pieces()).is_multiple_of(tile.units()));
            if even || row < comptime!(tile.tokens) {
                stage[start + row * comptime!(tile.pieces()) + swizzled(slot, row)] = words;
            }
        }
    }
}

#[cube]
fn product_of_fragments(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    sources: &[u32],
    sums: &mut Array<f32>,
    matrix: usize,
    first: usize,
    chunks: usize,
    #[comptime] tile: Tile,
) {
    let (unit, plane) = (UNIT_POS as usize, UNIT_POS_Y as usize);
    let mut left = Shared::<[H8]>::new_slice(comptime!(SIDE * FRAGMENT_STRIDE));
    let mut right = Shared::<[H8]>::new_slice(comptime!(FRAGMENT_ROWS * FRAGMENT_STRIDE));
    let mut finished = Shared::<[f32]>::new_slice(comptime!(FRAGMENT_PLANES * 256));
    let mut accumulators = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..4usize {
        accumulators.push(cmma::Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            16usize,
            16usize,
            16usize,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    // A unit stages eight columns of a row of the activations and of two of the matrix.
    let (line, part) = (unit / 4, unit % 4);
    let source = sources[line] as usize * comptime!(tile.columns / 8);
    for strip in 0..chunks {
        left[line * FRAGMENT_STRIDE + part] = H8::reinterpret(x[source + strip * 4 + part]);
        #[unroll]
        for i in 0..2usize {
            let row = first + line + i * SIDE;
            let values = eight_weights(weights, scales, matrix, row, strip, part, tile);
            let mut halves = H8::empty();
            #[unroll]
            for v in 0..8usize {
                let mut value = values[v];
                if comptime!(tile.format == Format::Mxfp4) {
                    value *= comptime!((1u32 << OVER) as f32);
                }
                halves.insert(v, f16::cast_from(value));
            }
            right[(line + i * SIDE) * FRAGMENT_STRIDE + part] = halves;
        }
        sync_cube();
        #[unroll]
        for step in 0..comptime!(STRIP / 16) {
            let mut columns = Sequence::<cmma::Matrix<H8>>::new();
            #[unroll]
            for n in 0..2usize {
                let at = (plane / 2 * 32 + n * 16) * FRAGMENT_STRIDE + comptime!(step * 2);
                columns.push(fragment(&right, at, MatrixIdent::B, MatrixLayout::ColMajor));
            }
            #[unroll]
            for m in 0..2usize {
                let at = (plane % 2 * 32 + m * 16) * FRAGMENT_STRIDE + comptime!(step * 2);
                let rows = fragment(&left, at, MatrixIdent::A, MatrixLayout::RowMajor);
                #[unroll]
                for n in 0..2usize {
                    let accumulator = accumulators.index(comptime!(2 * m + n));
                    cmma::execute(&rows, columns.index(n), accumulator, accumulator);
                }
            }
        }
        sync_cube();
    }
    let unit = if comptime!(tile.format == Format::Bf16) {
        1.0f32.runtime()
    } else {
        comptime!(1.0 / (1u32 << OVER) as f32).runtime()
    };
    #[unroll]
    for at in 0..4usize {
        let start = plane * 256;
        cmma::store(&mut finished[start..start + 256], accumulators.index(at), 16u32, MatrixLayout::RowMajor);
        sync_cube();
        #[unroll]
        for i in 0..8usize {
            let quad = comptime!(i / 4 * 32) + UNIT_POS_X as usize;
            sums[at * 8 + i] = finished[start + quad * 4 + comptime!(i % 4)] * unit;
        }
        sync_cube();
    }
}

/// A fragment of staged rows.
#[cube]
fn fragment(
    staged: &[H8],
    at: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
) -> cmma::Matrix<H8> {
    let rows = &staged[at..at + comptime!(15 * FRAGMENT_STRIDE + 2)];
    cmma::Matrix::<H8>::from_slice(
        ident,
        16usize,
        16usize,
        16usize,
        layout,
        rows,
        comptime!(8 * FRAGMENT_STRIDE as u32),
    )
}

#[cube]
fn product_of_units(
    weights: &[U4],
    scales: &[u32],
    x: &[U4],
    sources: &[u32],
    sums: &mut Array<f32>,
    matrix: usize,
    first: usize,
    chunks: usize,
    #[comptime] tile: Tile,
) {
    // One more, so that units which read different rows read different banks.
    let stride = comptime!(STRIP + 1);
    let unit = UNIT_POS as usize;
    let mut left = Shared::<[f32]>::new_slice(comptime!(SIDE * (STRIP + 1)));
    let mut right = Shared::<[f32]>::new_slice(comptime!(SIDE * (STRIP + 1)));
    #[unroll]
    for i in 0..comptime!(2 * tile.pairs()) {
        sums[i] = 0.0f32;
    }
    // A unit stages eight columns of a row of each factor.
    let (line, part) = (unit / 4, unit % 4);
    let source = sources[line] as usize * comptime!(tile.columns / 4);
    for strip in 0..chunks {
        let start = line * stride + part * 8;
        #[unroll]
        for i in 0..2usize {
            let words = x[source + strip * 8 + part * 2 + i];
            #[unroll]
            for w in 0..4usize {
                left[start + i * 4 + w] = f32::reinterpret(words.extract(w));
            }
        }
        let values = eight_weights(weights, scales, matrix, first + line, strip, part, tile);
        #[unroll]
        for i in 0..8usize {
            right[start + i] = values[i];
        }
        sync_cube();
        for column in 0..STRIP {
            let mut factors = Array::<f32>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                factors[i] = right[(unit % UNITS_OF_SIDE * 4 + i) * stride + column];
            }
            #[unroll]
            for t in 0..4usize {
                let value = left[(unit / UNITS_OF_SIDE + t * UNITS_OF_SIDE) * stride + column];
                #[unroll]
                for i in 0..4usize {
                    sums[t * 4 + i] += value * factors[i];
                }
            }
        }
        sync_cube();
    }
}

/// Eight weights of a row, which begin at column `32 · strip + 8 · part`.
#[cube]
fn eight_weights(
    weights: &[U4],
    scales: &[u32],
    matrix: usize,
    row: usize,
    strip: usize,
    part: usize,
    #[comptime] tile: Tile,
) -> Array<f32> {
    let row = matrix + select(row < comptime!(tile.matrix_rows), row, comptime!(tile.matrix_rows - 1));
    let mut values = Array::<f32>::new(8usize);
    if comptime!(tile.format == Format::Bf16) {
        let words = weights[row * comptime!(tile.columns / 8) + strip * 4 + part];
        #[unroll]
        for w in 0..4usize {
            values[2 * w] = low(words.extract(w));
            values[2 * w + 1] = high(words.extract(w));
        }
    } else {
        let block = row * comptime!(tile.columns / 32) + strip;
        let words = weights[block];
        let stored = (scales[block / 4] >> (u32::cast_from(block % 4) * 8u32)) & 255u32;
        let front = select(part % 2 == 1, words.extract(1usize), words.extract(0usize));
        let back = select(part % 2 == 1, words.extract(3usize), words.extract(2usize));
        let word = select(part < 2, front, back);
        #[unroll]
        for c in 0..8usize {
            values[c] = decoded(word >> comptime!(4 * c as u32), stored);
        }
    }
    values
}

/// The value of an E2M1 code in the lowest four bits with the scale that is stored for it.
#[cube]
fn decoded(code: u32, stored: u32) -> f32 {
    // Twice the value: 0, 1, 2, 3, 4, 6, 8, 12.
    let magnitude = f32::cast_from((0xc864_3210u32 >> ((code & 7u32) * 4u32)) & 15u32);
    let value = select(code & 8u32 != 0u32, -magnitude, magnitude);
    // 2^(stored − 127 − 14 − 1) in two factors: GPUs flush what is below 2^−126.
    let exponents = stored + 112u32;
    let first = exponents / 2u32;
    value * f32::reinterpret(first << 23u32) * f32::reinterpret((exponents - first) << 23u32)
}
