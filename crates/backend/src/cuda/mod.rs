//! NVIDIA's GPUs, through CUDA's driver.
//!
//! Kernels are the generated ones, translated ([`write`]) and compiled by NVRTC for the device that is there. Neither library is linked:
//! a machine without them is told what it lacks.

mod api;
mod cache;
mod devices;
mod driver;
mod energy;
mod library;
mod write;

use crate::{Backend, CompileError, gpu::Gpu};
pub use devices::{CudaDevice, cuda_devices};
pub use energy::GpuEnergy;
use std::{path::PathBuf, sync::Arc};

/// How the GPU is chosen, and where what was compiled for it is kept.
#[derive(Clone, Debug, Default)]
pub struct CudaOptions {
    /// A part of the device's name, in any case; the driver's first without it.
    pub adapter: Option<String>,
    /// The folder of compiled kernels; none are kept without it.
    pub cache: Option<PathBuf>,
}

/// The CUDA backend. What it compiles shares its kernels and weights.
///
/// # Errors
/// What is missing, in words: a library, a driver that is new enough, a device of compute capability 7.5.
pub fn cuda(options: CudaOptions) -> Result<Arc<dyn Backend>, CompileError> {
    Ok(Arc::new(Gpu::new(driver::Cuda::open(options.adapter.as_deref(), options.cache)?)))
}
