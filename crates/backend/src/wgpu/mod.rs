//! Any GPU, through Vulkan, Metal, DX12 or GL: a plan as one submission of generated kernels over one arena.
//!
//! Values are functions of a place until something needs them in memory ([`code`]), so chains of operators become one kernel. For every
//! set of input shapes there is a plan of concrete dispatches ([`plan`]); what shapes alone determine is computed on the host while
//! planning. It runs plans whole or not at all: whoever wants what it can't do done elsewhere puts it into a partition.

mod code;
mod devices;
mod executable;
mod gpu;
mod lower;
mod plan;

use crate::{Backend, CompileError, CompileOptions, DeviceInfo, Executable, Peak, Precision, Support};
use cutover_graph::{Graph, Node, Plan};
pub use devices::{Adapter, adapters};
use std::sync::Arc;

const NAME: &str = "wgpu";

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
    Ok(Arc::new(Wgpu { gpu: Arc::new(gpu::Gpu::open(options.adapter.as_deref())?) }))
}

struct Wgpu {
    gpu: Arc<gpu::Gpu>,
}

impl Backend for Wgpu {
    fn describe(&self) -> DeviceInfo {
        let info = &self.gpu.info;
        DeviceInfo { backend: NAME, device: info.name.clone(), isa: info.backend.to_string(), threads: 1 }
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        match lower::refusal(&self.gpu, graph, node) {
            Some(reason) => Support::No { reason },
            None => Support::Native { kernel: lower::kernel_name(&node.op).unwrap_or(NAME) },
        }
    }

    fn measure_peak(&self) -> Option<Peak> {
        devices::peak(&self.gpu)
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        if options.precision != Precision::F32 {
            let message = format!("the GPU computes as the model says, not in {:?}", options.precision);
            return Err(CompileError::Options(message));
        }
        let graph = plan.graph();
        for &id in plan.order() {
            let node = graph.node(id);
            if let Some(reason) = lower::refusal(&self.gpu, graph, node) {
                return Err(CompileError::Unsupported { node: node.name.clone(), op: node.op.name(), reason });
            }
        }
        Ok(executable::WgpuExecutable::new(Arc::clone(&self.gpu), plan)?)
    }
}
