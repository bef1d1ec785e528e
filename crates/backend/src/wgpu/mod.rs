//! Any GPU, through Vulkan, Metal, DX12 or GL.

mod devices;
mod driver;
mod gpu;
mod texels;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CompileOptions, Input, Output, RunContext, RunError, SessionMemory};
    use cutover_graph::{
        Graph, Plan, TensorFact,
        ops::{Unary, UnaryFunction},
    };
    use cutover_tensor::{DType, Tensor, Value};

    /// `y = e^x` of `count` elements.
    fn exponential(count: usize) -> Plan {
        let mut graph = Graph::new("exponential");
        let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[count]));
        let op = Unary { function: UnaryFunction::Exp }.into();
        let node = graph.add_node("exp", op, vec![Some(x)], vec!["y".into()]).unwrap();
        graph.set_outputs(vec![graph.node(node).outputs[0]]);
        Plan::new(graph).unwrap()
    }

    #[test]
    fn a_lost_device_is_an_error_of_the_run() {
        let Ok(gpu) = gpu::Gpu::open(None) else {
            return println!("skipped: a_lost_device_is_an_error_of_the_run needs a GPU");
        };
        let backend = Planned::new(gpu);
        let executable = backend.compile(&exponential(3), &CompileOptions::default()).unwrap();
        let mut session = executable.session(SessionMemory::default()).unwrap();
        let x = Value::Tensor(Tensor::from_vec([3], vec![0.0f32, 1.0, -1.0]).unwrap());
        let mut run = || session.run(&[Input::Value(&x)], &mut [Output::Allocate(None)], &RunContext::default());
        run().unwrap();
        backend.driver().device.destroy();
        for _ in 0..2 {
            let error = run().unwrap_err();
            assert!(matches!(error, RunError::DeviceLost(_)), "{error}");
        }
    }

    #[test]
    fn what_a_device_has_no_memory_for_is_refused() {
        let Ok(gpu) = gpu::Gpu::open(None) else {
            return println!("skipped: what_a_device_has_no_memory_for_is_refused needs a GPU");
        };
        let most = gpu.limits.binding_bytes as usize;
        let backend = Planned::new(gpu);
        let executable = backend.compile(&exponential(1000), &CompileOptions::default()).unwrap();
        let budget = SessionMemory { budget_bytes: Some(1000) };
        let error = executable.session(budget).err().unwrap().to_string();
        assert!(error.starts_with("a session on the GPU needs "), "{error}");
        let error = backend.compile(&exponential(most / 4 + 1), &CompileOptions::default()).err().unwrap().to_string();
        assert!(error.starts_with("a tensor on the GPU needs "), "{error}");
    }
}
