//! GPUs, whoever drives them: a plan as one submission of generated kernels over one arena.
//!
//! Values are functions of a place until something needs them in memory ([`code`]), so chains of operators become one kernel. For every
//! set of input shapes there is a plan of concrete dispatches ([`plan`]); what shapes alone determine is computed on the host while
//! planning. A [`Driver`] compiles and runs them: it sees text, ranges of memory and dispatches, and no graph. Plans run whole or not
//! at all: whoever wants what a device can't do done elsewhere puts it into a partition.

mod code;
mod device;
mod executable;
mod lower;
mod peak;
mod plan;
mod stock;

use crate::{Backend, CompileError, CompileOptions, DeviceInfo, Executable, Peak, Precision, Support};
#[cfg(feature = "wgpu")]
pub(crate) use code::TEXELS_IN_ROW;
use cutover_graph::{Graph, Node, Plan};
#[cfg(feature = "wgpu")]
pub(crate) use device::{Beside, Candidate, Times};
pub(crate) use device::{Device, Driver, Limits, lock};
#[cfg(feature = "cuda")]
pub(crate) use device::{LibraryFunction, LibraryProduct, Solution};
pub(crate) use peak::peak;
#[cfg(feature = "wgpu")]
pub(crate) use plan::Step;
pub(crate) use plan::{FAULT_BYTES, Place, Ready, ShapePlan, Source};
use std::sync::Arc;

/// The backend of one device. What it compiles shares its pipelines and weights.
pub(crate) struct Gpu<D: Driver> {
    device: Arc<Device<D>>,
}

impl<D: Driver> Gpu<D> {
    pub fn new(driver: D) -> Gpu<D> {
        Gpu { device: Arc::new(Device::new(driver)) }
    }

    #[cfg(all(test, feature = "wgpu"))]
    pub fn driver(&self) -> &D {
        &self.device.driver
    }
}

impl<D: Driver> Backend for Gpu<D> {
    fn describe(&self) -> DeviceInfo {
        self.device.driver.describe()
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        match lower::refusal(self.device.driver.limits(), graph, node) {
            Some(reason) => Support::No { reason },
            None => Support::Native { kernel: lower::kernel_name(&node.op).unwrap_or(D::NAME) },
        }
    }

    fn measure_peak(&self) -> Option<Peak> {
        self.device.driver.measure_peak()
    }

    fn driver(&self) -> Option<String> {
        self.device.driver.version()
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        self.check_precision(options.precision)?;
        let graph = plan.graph();
        for &id in plan.order() {
            let node = graph.node(id);
            if let Some(reason) = lower::refusal(self.device.driver.limits(), graph, node) {
                return Err(CompileError::Unsupported { node: node.name.clone(), op: node.op.name(), reason });
            }
        }
        Ok(executable::GpuExecutable::new(Arc::clone(&self.device), plan, options)?)
    }
}

impl<D: Driver> Gpu<D> {
    /// Fails where the device has no products in `precision`.
    fn check_precision(&self, precision: Precision) -> Result<(), CompileError> {
        let limits = self.device.driver.limits();
        let what = match (precision, limits.written) {
            (Precision::F32, _) | (Precision::F16, Some(_)) => return Ok(()),
            (Precision::F16, None) if limits.has_f16 => return Ok(()),
            (Precision::F16, None) => format!("'{}' has no numbers of 16 bits on this device", D::NAME),
            (_, None) => format!("'{}' computes as the model says, not in {precision:?}", D::NAME),
            (Precision::BF16 | Precision::Tf32, Some(device)) if device.sm < 80 => {
                let capability = f64::from(device.sm) / 10.0;
                format!("products in {precision:?} need compute capability 8.0, this GPU has {capability:.1}")
            }
            (Precision::BF16 | Precision::Tf32, Some(_)) => return Ok(()),
        };
        Err(CompileError::Options(what))
    }
}
