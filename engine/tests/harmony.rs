//! Harmony against its own documentation, and against malformed tokens of our making.
//!
//! The cases stand in `tests/harmony/`; see the README there.

#[path = "harmony/case.rs"]
mod case;
#[path = "harmony/corpus.rs"]
mod corpus;
#[path = "harmony/network.rs"]
mod network;
#[path = "harmony/properties.rs"]
mod properties;
#[path = "harmony/rules.rs"]
mod rules;
