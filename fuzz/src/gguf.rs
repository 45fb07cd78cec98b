//! Target.
/// Stub.
pub fn gguf(_: &[u8]) {}
