//! Target.
/// Stub.
pub fn mxfp4(_: &[u8]) {}
