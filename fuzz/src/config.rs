//! Target.
/// Stub.
pub fn config(_: &[u8]) {}
