//! What turns noise into data step by step: schedulers, guidance, and the noise itself.

pub mod guidance;
pub mod noise;
pub mod scheduler;
