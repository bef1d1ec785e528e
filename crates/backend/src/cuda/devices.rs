//! What devices there are, and what each can do.

use super::{
    api::{self, Facts},
    driver::Cuda,
};
use crate::{CompileError, Peak, gpu::Driver};

/// A device, with what matters to our kernels.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaDevice {
    pub name: String,
    /// `9.0`.
    pub compute_capability: String,
    pub memory_bytes: u64,
    pub multiprocessors: u32,
    pub clock_mhz: u32,
    /// Threads of a block, and the memory that they share without asking for more.
    pub block_threads: u32,
    pub block_bytes: u32,
    /// The CUDA that the driver is for, and that of NVRTC.
    pub driver: String,
    pub compiler: String,
}

/// Every device of this machine in the driver's order, and, where `measured`, the peak of each that runs kernels.
///
/// # Errors
/// Why there is none.
pub fn cuda_devices(measured: bool) -> Result<Vec<(CudaDevice, Option<Result<Peak, CompileError>>)>, CompileError> {
    let all = api::devices()?.into_iter().enumerate().map(|(ordinal, facts)| {
        let of = of(&facts);
        let peak = || {
            let cuda = Cuda::of(ordinal, facts, None)?;
            cuda.measure_peak().ok_or_else(|| CompileError::Options(format!("GPU '{}' runs no kernel", of.name)))
        };
        let peak = measured.then(peak);
        (of, peak)
    });
    Ok(all.collect())
}

fn of(facts: &Facts) -> CudaDevice {
    let positive = |number: i32| number.max(0) as u32;
    CudaDevice {
        name: facts.name.clone(),
        compute_capability: format!("{}.{}", facts.capability / 10, facts.capability % 10),
        memory_bytes: facts.memory_bytes,
        multiprocessors: positive(facts.multiprocessors),
        clock_mhz: positive(facts.clock_khz) / 1000,
        block_threads: positive(facts.invocations),
        block_bytes: positive(facts.shared_bytes),
        driver: api::version(facts.driver),
        compiler: api::version(facts.compiler),
    }
}
