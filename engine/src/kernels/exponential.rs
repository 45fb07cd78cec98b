//! The exponential in nearly full precision on every device.

use cubecl::prelude::*;

/// eˣ, within 2 units in the last place, of x up to 88, beyond which it stays. A device's own may be off by ten (software Vulkan),
/// because it is a power of two of a rounded product.
///
/// By the method of Cody and Waite (1980): x = n · ln 2 + r with ln 2 in two parts, and a polynomial for eʳ.
#[cube]
pub(crate) fn exponential(x: f32) -> f32 {
    let x = f32::clamp(x, -87.0f32, 88.0f32);
    let n = f32::round(x * comptime!(std::f32::consts::LOG2_E));
    let r = (x - n * 0.693_359_4f32) + n * 2.121_944_4e-4f32;
    let mut p = comptime!(1.0f32 / 5040.0).runtime();
    p = p * r + comptime!(1.0f32 / 720.0);
    p = p * r + comptime!(1.0f32 / 120.0);
    p = p * r + comptime!(1.0f32 / 24.0);
    p = p * r + comptime!(1.0f32 / 6.0);
    p = p * r + 0.5f32;
    p = p * r + 1.0f32;
    p = p * r + 1.0f32;
    // 2ⁿ by its bits: the exponent, 127 more, behind 23 bits of mantissa.
    p * f32::reinterpret(((n as i32 + 127i32) as u32) << 23u32)
}
