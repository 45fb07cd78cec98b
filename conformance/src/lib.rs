//! The conformance suite of `model.bin`.
//!
//! - [`cases`]: an invalid input for every rule, with the rule and the bytes that must be named;
//! - [`oracle`]: where things lie, computed a second time and independently;
//! - [`contract`]: the same cases against any implementation that has a command line;
//! - [`synthetic`]: valid models of any size that are a formula and no file;
//! - [`spec_tables`]: the tables of the specification, generated from the code.
//!
//! The tests are in `tests/suite`; every test path contains `conformance`, so that `cargo test conformance` at the root
//! runs all of them.

pub mod cases;
pub mod checkpoint;
pub mod contract;
pub mod oracle;
pub mod spec_tables;
pub mod synthetic;
