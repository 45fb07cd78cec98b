//! The bodies of the fuzz targets, one function each. `fuzz_targets/` calls them under libFuzzer; `tests/corpus.rs`
//! calls them on the stable compiler for every committed input. `README.md` says how to run both.
//!
//! Each target states a property. A body panics where an input breaks it.
//!
//! # Inputs
//! The readers of files take an input in two ways: as the file itself, and as instructions (`edits`, or the
//! structures of a target) that change a valid small model (`tiny`). So a few bytes reach what a file of 90 KB
//! would be needed for.

mod accepted;
mod checkpoint;
mod config;
mod edits;
mod gguf;
mod granularity;
mod json;
mod mxfp4;
mod parts;
mod reader;
mod roundtrip;
mod scratch;
mod tiny;
mod tokenizer_section;
mod trickle;
mod verify;

pub use checkpoint::checkpoint;
pub use config::config;
pub use gguf::gguf;
pub use granularity::granularity;
pub use mxfp4::mxfp4;
pub use reader::reader;
pub use roundtrip::roundtrip;
pub use tokenizer_section::tokenizer_section;
pub use verify::verify;

use arbitrary::{Arbitrary, Unstructured};
use peak_alloc::PeakAlloc;

/// Measures what the bodies hold, see [`bounded`].
#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// A target: what it does with an input.
pub type Body = fn(&[u8]);

/// Every target by name.
pub const TARGETS: [(&str, Body); 9] = [
    ("reader", reader),
    ("verify", verify),
    ("tokenizer_section", tokenizer_section),
    ("roundtrip", roundtrip),
    ("granularity", granularity),
    ("mxfp4", mxfp4),
    ("checkpoint", checkpoint),
    ("gguf", gguf),
    ("config", config),
];

/// Makes parallel code run on the calling thread, so that an input always takes the same path. For a process that
/// runs one target and nothing else.
pub fn use_one_thread() {
    // An error means that there is a pool already, which is as good.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global();
}

/// Runs `work` on an input of `len` bytes and panics if it holds more than a constant and 256 times that at once.
///
/// The readers' records take up to a hundred bytes for two of the input (a JSON array of digits); what this is to find
/// are allocations that follow a number in the input. All threads count, so nothing else may run.
fn bounded<T>(len: usize, work: impl FnOnce() -> T) -> T {
    const CONSTANT: usize = 8 << 20;
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let result = work();
    let held = MEMORY.peak_usage().saturating_sub(before);
    assert!(held <= CONSTANT + 256 * len, "held {held} bytes for an input of {len}");
    result
}

/// The instructions that an input spells, if it is long enough.
fn instructions<'a, T: Arbitrary<'a>>(data: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(data)).ok()
}
