//! Where tensors live and who computes with them, chosen at run time.

use std::fmt::{self, Debug};
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use burn::tensor::{DType, FloatDType, Tensor};
use bytemuck::Pod;
use cubecl::client::Client;
use cubecl::server::Handle;

use crate::error::{Error, Result};

/// A family of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The processor: Burn's Flex backend, pure Rust. Works everywhere.
    Cpu,
    /// Vulkan, Metal or WebGPU through wgpu.
    Wgpu,
    /// NVIDIA GPUs.
    Cuda,
}

impl Backend {
    /// Every backend, whether this build has it or not.
    pub const ALL: [Backend; 3] = [Backend::Cpu, Backend::Wgpu, Backend::Cuda];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Backend::Cpu => "cpu",
            Backend::Wgpu => "wgpu",
            Backend::Cuda => "cuda",
        }
    }

    /// Whether this build has it.
    pub fn is_compiled(self) -> bool {
        match self {
            Backend::Cpu => true,
            Backend::Wgpu => cfg!(feature = "wgpu"),
            Backend::Cuda => cfg!(feature = "cuda"),
        }
    }

    /// Opens the default device of the backend.
    ///
    /// # Errors
    /// [`Error::Backend`] where this build lacks it or the machine has no such device.
    pub fn open(self) -> Result<Device> {
        match self {
            Backend::Cpu => Ok(Device {
                backend: self,
                name: "CPU".into(),
                burn: burn::tensor::Device::flex(),
                cube: None,
                memory: available_host_memory(),
                max_buffer: None,
                floats: vec![Float::F32, Float::Bf16, Float::F16],
            }),
            #[cfg(feature = "wgpu")]
            Backend::Wgpu => {
                let found =
                    guarded(self, || cubecl::Device::wgpu(Default::default()).map_err(|e| e.to_string()))?;
                let burn = burn::tensor::Device::wgpu(Default::default());
                Ok(Device::of_cube(self, &found, burn))
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda => {
                let found = guarded(self, || cubecl::Device::cuda(0).map_err(|e| e.to_string()))?;
                Ok(Device::of_cube(self, &found, burn::tensor::Device::cuda(0)))
            }
            #[allow(unreachable_patterns)]
            absent => Err(Error::Backend {
                backend: absent,
                reason: format!(
                    "not part of this build; build with `--features {absent}`, or use --backend cpu"
                ),
            }),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Backend {
    type Err = String;
    fn from_str(text: &str) -> Result<Backend, String> {
        Backend::ALL
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("found {text}, needed cpu, wgpu or cuda"))
    }
}

/// A floating-point type of weights, activations or caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// IEEE single precision.
    F32,
    /// IEEE half precision: 11 bits of precision, up to 65504.
    F16,
    /// bfloat16: 8 bits of precision, the range of `F32`.
    Bf16,
}

impl Float {
    /// Every type.
    pub const ALL: [Float; 3] = [Float::F32, Float::F16, Float::Bf16];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::Bf16 => "bf16",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> u64 {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
        }
    }

    /// Burn's name for it.
    pub fn dtype(self) -> FloatDType {
        match self {
            Float::F32 => FloatDType::F32,
            Float::F16 => FloatDType::F16,
            Float::Bf16 => FloatDType::BF16,
        }
    }
}

impl From<Float> for DType {
    fn from(float: Float) -> DType {
        float.dtype().into()
    }
}

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Float {
    type Err = String;
    fn from_str(text: &str) -> Result<Float, String> {
        Float::ALL
            .into_iter()
            .find(|float| float.name() == text)
            .ok_or_else(|| format!("found {text}, needed f32, f16 or bf16"))
    }
}

/// An open device and what is known of it.
#[derive(Clone, Debug)]
pub struct Device {
    backend: Backend,
    name: String,
    burn: burn::tensor::Device,
    cube: Option<cubecl::Device>,
    memory: Option<u64>,
    max_buffer: Option<u64>,
    floats: Vec<Float>,
}

impl Device {
    /// The family that it belongs to.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// As it calls itself.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Burn's handle, for tensors of one's own.
    pub fn burn(&self) -> &burn::tensor::Device {
        &self.burn
    }

    /// CubeCL's client, for kernels of one's own; `None` of the processor.
    pub fn client(&self) -> Option<cubecl::client::Client> {
        self.cube.as_ref().map(cubecl::Device::client)
    }

    /// Bytes of memory: what the host has available, or all of a GPU's. `None` where the driver does not say.
    pub fn memory(&self) -> Option<u64> {
        self.memory
    }

    /// Bytes of the largest buffer, where there is a limit.
    pub fn max_buffer(&self) -> Option<u64> {
        self.max_buffer
    }

    /// Whether tensors can have this type.
    pub fn supports(&self, float: Float) -> bool {
        self.floats.contains(&float)
    }

    /// Waits until everything that was asked of it is done.
    ///
    /// # Errors
    /// [`Error::Device`] where something failed.
    pub fn sync(&self) -> Result<()> {
        waiting(|| self.burn.sync()).map_err(failed)
    }

    /// Bytes per second that a large copy reads and writes, the median of five: what every other kernel is measured by. `None` of
    /// the processor.
    ///
    /// # Errors
    /// [`Error::Device`] where the device fails.
    pub fn copy_rate(&self) -> Result<Option<f64>> {
        let Some(client) = self.client() else { return Ok(None) };
        Ok(Some(crate::kernels::copy::rate(&client)?))
    }

    fn of_cube(backend: Backend, cube: &cubecl::Device, burn: burn::tensor::Device) -> Device {
        let client = cube.client();
        let properties = client.properties();
        let name = properties.identity.name.clone();
        let floats =
            Float::ALL.into_iter().filter(|&float| burn.supports_dtype(DType::from(float))).collect();
        Device {
            backend,
            name,
            memory: properties.memory.max_memory(),
            max_buffer: Some(properties.memory.max_page_size),
            floats,
            burn,
            cube: Some(cube.clone()),
        }
    }
}

/// Waits hold it together, a recording holds it alone.
static RECORDING: RwLock<()> = RwLock::new(());

/// Runs what makes this thread wait for a GPU, such as reading a tensor, while no model of this process records a graph.
///
/// CUDA lets no thread wait while another one records (CubeCL records in the driver's global mode): the wait fails, and the recording
/// with it. What this crate waits for is wrapped already. A program that reads Burn's tensors in one thread while a model of
/// [`gpu`](crate::gpu) decodes in another wraps its own reads, down to the values, for Burn's data come when they are first looked
/// at. What cannot be wrapped is the tuning of Burn's operations when they first run: let that be over before. Everything else that
/// threads do at once needs nothing.
///
/// `wait` must not use a model: one that wanted to record would wait for it for ever.
///
/// ```
/// # use burn::tensor::Tensor;
/// let device = engine::backend::Backend::Cpu.open()?;
/// let sums = Tensor::<2>::ones([2, 3], device.burn()).sum_dim(1);
/// let sums = engine::backend::waiting(|| sums.try_into_data().map(|data| data.try_to_vec::<f32>()));
/// # assert_eq!(sums.unwrap().unwrap(), [3.0, 3.0]);
/// # Ok::<(), engine::Error>(())
/// ```
pub fn waiting<R>(wait: impl FnOnce() -> R) -> R {
    let _held = RECORDING.read().unwrap_or_else(PoisonError::into_inner);
    wait()
}

/// Runs what records a graph while no thread waits for a GPU (see [`waiting`]).
pub(crate) fn recording<R>(record: impl FnOnce() -> R) -> R {
    let _held = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
    record()
}

/// Waits until everything that was asked of a client is done.
pub(crate) fn sync(client: &Client) -> Result<()> {
    waiting(|| cubecl::future::block_on(client.sync())).map_err(failed)
}

/// What a buffer holds.
pub(crate) fn read<T: Pod>(client: &Client, buffer: &Handle) -> Result<Vec<T>> {
    let bytes = waiting(|| client.read_one(buffer.clone())).map_err(failed)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

/// The values of a tensor of f32 in row-major order.
pub(crate) fn values_of_tensor<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    // They come when they are first looked at.
    waiting(|| tensor.try_into_data().map_err(failed)?.try_into_vec().map_err(failed))
}

/// An error of a device as ours.
pub(crate) fn failed(error: impl Debug) -> Error {
    Error::Device(format!("{error:?}"))
}

/// Opening a device may panic inside a driver's loader; to a caller that is a device that is not there.
fn guarded<T>(
    backend: Backend,
    open: impl FnOnce() -> Result<T, String> + std::panic::UnwindSafe,
) -> Result<T> {
    let advice = "install its driver (Debian: mesa-vulkan-drivers for software Vulkan), or use --backend cpu";
    match std::panic::catch_unwind(open) {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(reason)) => Err(Error::Backend { backend, reason: format!("{reason}; {advice}") }),
        Err(_) => Err(Error::Backend { backend, reason: format!("no device; {advice}") }),
    }
}

/// What the operating system would give a new program without swapping.
fn available_host_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let available = system.available_memory();
    // A container may have less than the machine; what its files take in the page cache can be had again.
    let limit =
        system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory.saturating_sub(limits.rss));
    Some(available.min(limit)).filter(|&bytes| bytes > 0)
}
