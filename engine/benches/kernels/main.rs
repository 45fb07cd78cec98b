//! How fast the kernels are, beside a copy on the same device and beside the same products with dequantised weights.
//!
//! ```text
//! cargo bench -p engine --features bench --bench kernels                the processor and a GPU through wgpu
//! cargo bench -p engine --features bench,cuda --bench kernels           an NVIDIA GPU too
//! cargo bench -p engine --features bench --bench kernels -- '^cuda/gemv'    some of it
//! cargo bench -p engine --features bench --bench kernels -- --test      each once, in small shapes
//! ```
//!
//! `KERNELS_JSON=FILE` writes the last table as JSON too. Shapes are those of gpt-oss-20b where the device can hold its buffers,
//! and small ones in software. The binary that `cargo bench --no-run` names runs by itself with `--bench`.
//!
//! ```text
//! weights    random weights and what they are dequantised to
//! gpu        kernels in recorded graphs, for a launch costs the host more than most kernels the device
//! native     kernels of the processor, those of `engine::native`
//! ace_step   parts of ACE-Step, as eager operations
//! suite      measurements, by criterion, and the table of ratios
//! ```

mod ace_step;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod gpu;
// The files of the engine have more than is measured.
#[allow(dead_code, unused_imports)]
mod native;
mod suite;
mod weights;

use engine::backend::Backend;
// What the processor's kernels, which are compiled here again, know as their crate.
use engine::{backend, error, gpt_oss};

use suite::Suite;
use weights::Weights;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut suite = Suite::new();
    for device in Backend::ALL.into_iter().filter_map(|backend| backend.open().ok()) {
        let weights = Weights::fitting(&device, suite.is_test())?;
        suite.on(&device, weights.shapes());
        match device.backend() {
            Backend::Cpu => native::measure(&mut suite, &weights),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Backend::Wgpu | Backend::Cuda => gpu::measure(&mut suite, &device, &weights)?,
            #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
            Backend::Wgpu | Backend::Cuda => {}
        }
        ace_step::measure(&mut suite, &device)?;
    }
    suite.finish()
}
