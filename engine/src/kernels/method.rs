//! How a device multiplies many rows, and the precision in which rows enter such products.
//!
//! Rows are words. In half precision a word has two values, the first in its low half, so that no device needs 16-bit buffers.

use cubecl::client::Client;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use half::{bf16, f16};

/// Who multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// The `mma` instruction of NVIDIA's tensor cores, whose registers we fill ourselves; rows are bf16.
    TensorCores,
    /// Cooperative matrices, which are loaded from shared memory; rows are f16.
    Fragments,
    /// The units of a cube; rows are f32.
    Units,
}

impl Method {
    /// The best that a device has.
    pub fn of(client: &Client) -> Method {
        Method::all(client)[0]
    }

    /// Every method that a device has, the best first.
    pub(crate) fn all(client: &Client) -> Vec<Method> {
        let methods = [
            (Method::TensorCores, has_mma(client, FloatKind::BF16)),
            (Method::Fragments, has_fragments(client)),
            (Method::Units, true),
        ];
        methods.into_iter().filter_map(|(method, has)| has.then_some(method)).collect()
    }

    /// Words of a row.
    pub fn words(self, values: usize) -> usize {
        match self {
            Method::TensorCores | Method::Fragments => values / 2,
            Method::Units => values,
        }
    }
}

/// Whether a device multiplies 16×16 by 16×8 fragments of a type into f32 in planes of 32, with the shared memory that our tiles
/// take.
pub(crate) fn has_mma(client: &Client, float: FloatKind) -> bool {
    let properties = client.properties();
    planes_of_32(client)
        && properties.hardware.max_shared_memory_size >= 96 << 10
        && properties.features.matmul.mma.contains(&into_f32(float, 8))
}

/// Whether a device multiplies 16×16 f16 matrices into f32 in planes of 32.
fn has_fragments(client: &Client) -> bool {
    planes_of_32(client) && client.properties().features.matmul.cmma.contains(&into_f32(FloatKind::F16, 16))
}

fn planes_of_32(client: &Client) -> bool {
    let hardware = &client.properties().hardware;
    hardware.plane_size_min == 32 && hardware.plane_size_max == 32
}

/// Products of 16×16 and 16×`n` fragments of a type, in f32.
fn into_f32(float: FloatKind, n: u32) -> MmaConfig {
    let [a_type, cd_type] = [float, FloatKind::F32].map(ElemType::Float);
    MmaConfig { a_type, b_type: a_type, cd_type, m: 16, n, k: 16 }
}

/// Writes the values `2 · pair` and `2 · pair + 1` of `rows`.
#[cube]
pub(crate) fn write_pair(rows: &mut [u32], pair: usize, first: f32, second: f32, #[comptime] method: Method) {
    let mut both = Vector::<f32, Const<2>>::empty();
    both.insert(0usize, first);
    both.insert(1usize, second);
    match method {
        Method::TensorCores => rows[pair] = u32::reinterpret(Vector::<bf16, Const<2>>::cast_from(both)),
        Method::Fragments => rows[pair] = u32::reinterpret(Vector::<f16, Const<2>>::cast_from(both)),
        Method::Units => {
            rows[2 * pair] = u32::reinterpret(first);
            rows[2 * pair + 1] = u32::reinterpret(second);
        }
    }
}
