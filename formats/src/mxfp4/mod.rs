//! MXFP4, the 4-bit block format of the experts' weights (OCP Microscaling Formats v1.0: E2M1 elements, a UE8M0 scale).
//!
//! A block is 32 values of a row: 16 bytes, each with the even value in the low nibble and the odd one in the high
//! nibble, and one scale byte. A value is `CODES[code] × 2^(scale − 127)`.
//!
//! Everything in this module works with the checkpoint's scales. A `model.bin` stores them [`SCALE_OFFSET`] higher.
//!
//! | module | what |
//! |---|---|
//! | [`codec`] | the reference: one value at a time |
//! | [`quantize`] | f32 → MXFP4, least squared error |
//! | [`decode`](mod@decode) | MXFP4 → f32, fast |

pub mod codec;
pub mod decode;
pub mod quantize;

pub use codec::{BLOCK, BLOCK_BYTES, CODES, MAX_SCALE, SCALE_OFFSET, checkpoint_scale, stored_scale, value};
pub use decode::{LengthMismatch, decode};
pub use quantize::{NotFinite, quantize_row};
