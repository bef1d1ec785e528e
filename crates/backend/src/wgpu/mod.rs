//! Any GPU, through Vulkan, Metal, DX12 or GL.

mod clock;
mod devices;
mod driver;
mod gpu;
mod kept;
#[cfg(test)]
mod tests;
mod texels;
mod tuned;

use crate::{Backend, CompileError, gpu::Gpu as Planned};
pub use devices::{Adapter, adapters};
use std::sync::Arc;

/// How the GPU is chosen.
#[derive(Clone, Debug, Default)]
pub struct WgpuOptions {
    /// A part of the adapter's name, in any case; the first that `cutover devices` lists without it.
    pub adapter: Option<String>,
}

/// The GPU backend. What it compiles shares its pipelines and weights.
///
/// # Errors
/// A machine without such a GPU, or one whose driver gives no device.
pub fn wgpu(options: WgpuOptions) -> Result<Arc<dyn Backend>, CompileError> {
    Ok(Arc::new(Planned::new(gpu::Gpu::open(options.adapter.as_deref())?)))
}
