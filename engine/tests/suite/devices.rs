//! The devices that tests run on.

use engine::backend::{Backend, Device};

/// The processor, and what wgpu finds. A missing adapter is said aloud; where CI is set, it is a failure.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Backend::Cpu.open().expect("the processor is there")];
    for backend in [Backend::Wgpu, Backend::Cuda] {
        match backend.open() {
            Ok(device) => devices.push(device),
            Err(error) if backend == Backend::Wgpu && std::env::var("CI").is_ok_and(|ci| ci == "true") => {
                panic!("CI=true and no Vulkan adapter: {error}")
            }
            Err(error) if backend == Backend::Wgpu => eprintln!("NOT TESTED on wgpu: {error}"),
            Err(_) => {}
        }
    }
    devices
}
