//! What turns noise into data step by step: schedulers and guidance.

pub mod guidance;
pub mod scheduler;
