//! The contract of a backend, and the backends behind it.
//!
//! `dyn` is paid once per request at this boundary, never per operator. Backends are private types with public
//! constructors ([`reference()`], [`cpu()`], `wgpu()` and `cuda()` with those features); none names another, and [`partition()`] makes two one. A backend sees plans and values, never a file.

mod attention;
pub mod binding;
mod compose;
mod contract;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;
mod known;
mod partition;
pub mod reference;
#[cfg(feature = "wgpu")]
pub mod wgpu;

pub use contract::{
    Backend, Binding, Cancellation, Choice, CompileOptions, DeviceInfo, Executable, Footprint, Input, Numerics,
    OpTiming, Output, Peak, Phase, PhaseObserver, PlacedNode, Placement, Precision, Profiler, RunContext, RunLimits,
    Session, SessionMemory, Signature, Support, Tried, Work,
};
pub use cpu::{CpuOptions, MemoryUse, cpu};
#[cfg(feature = "cuda")]
pub use cuda::{CudaDevice, CudaOptions, GpuEnergy, cuda, cuda_devices};
pub use error::{CompileError, ResourceError, RunError};
pub use partition::partition;
pub use reference::reference;
#[cfg(feature = "wgpu")]
pub use wgpu::{Adapter as WgpuAdapter, WgpuOptions, adapters as wgpu_adapters, wgpu};
