//! The CPU: a plan lowered to SIMD kernels over one arena.
//!
//! A graph is cut into regions whose shapes follow from those of what enters them, and nodes that are interpreted between them
//! ([`schedule`]); most models are one region. For every set of input shapes a region has a *shape plan* ([`plan`]): concrete steps,
//! layouts and offsets, made once and kept in a bounded cache. Operators that are only several others in one become these before
//! ([`compose`]). A region's run wakes the threads once; they walk the steps together, each computing its part of every output. What no
//! kernel here takes runs by the operator's reference evaluation, and the placement says so.
#![allow(unsafe_code)] // arena slicing and the thread pool

mod eager;
mod executable;
mod frame;
mod lower;
mod peak;
mod plan;
mod pool;
mod program;
mod schedule;
mod segment;
mod weights;

use crate::{Backend, CompileError, CompileOptions, DeviceInfo, Executable, Peak, Precision, Support, compose};
use cutover_graph::{Graph, Node, Plan};
use cutover_kernels::cpu::IsaLevel;
use std::sync::Arc;

/// How the CPU backend is set up.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads, the caller's included; 0 for as many as this process may use.
    pub threads: usize,
    /// A lower rung of the dispatch ladder than the CPU offers: `avx512bf16`, `avx512vnni`, `avx512`, `avxvnni`, `avx2`, `neonbf16`, `neondot`, `neon`, `scalar`.
    pub isa: Option<String>,
    pub memory: MemoryUse,
}

/// What memory is spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryUse {
    /// Huge pages, plans of many shapes kept, filters in whatever form is fastest.
    #[default]
    Fast,
    /// As little as it takes: the weights once, and one arena. Sums may be of another order than those of `Fast`.
    Lean,
}

impl MemoryUse {
    fn is_huge(self) -> bool {
        self == MemoryUse::Fast
    }

    /// Shape plans that are kept of each segment.
    fn shapes_kept(self) -> usize {
        match self {
            MemoryUse::Fast => 16,
            MemoryUse::Lean => 1,
        }
    }
}

/// The CPU backend. Its threads and packed weights are shared by everything it compiles.
///
/// # Errors
/// An instruction set that this machine does not have; threads that can't be started.
pub fn cpu(options: CpuOptions) -> Result<Arc<dyn Backend>, CompileError> {
    let level = match &options.isa {
        None => IsaLevel::detect(),
        Some(name) => IsaLevel::named(name).ok_or_else(|| {
            let known: Vec<_> = IsaLevel::available().map(IsaLevel::name).collect();
            CompileError::Options(format!("instruction set '{name}': this machine has {}", known.join(", ")))
        })?,
    };
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if options.threads == 0 { cores() } else { options.threads };
    if threads > 1024 {
        return Err(CompileError::Options(format!("{threads} threads, expected at most 1024")));
    }
    Ok(Arc::new(Cpu {
        device: Arc::new(Device {
            level,
            memory: options.memory,
            pool: pool::Pool::new(threads)?,
            weights: weights::Cache::default(),
            forests: lower::trees::Cache::default(),
        }),
    }))
}

const NAME: &str = "cpu";

struct Cpu {
    device: Arc<Device>,
}

/// What every executable of one backend shares.
struct Device {
    level: IsaLevel,
    memory: MemoryUse,
    pool: pool::Pool,
    weights: weights::Cache,
    forests: lower::trees::Cache,
}

impl Backend for Cpu {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            backend: NAME,
            device: processor().unwrap_or_else(|| std::env::consts::ARCH.to_string()),
            isa: self.device.level.name().to_string(),
            threads: self.device.pool.threads(),
        }
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        match compose::is_composed(graph, node) {
            true => Support::Native { kernel: compose::KERNEL },
            false => lower::support(graph, node),
        }
    }

    fn measure_peak(&self) -> Option<Peak> {
        Some(peak::measure(&self.device))
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        if options.precision == Precision::Tf32 {
            return Err(CompileError::Options(
                "no processor computes in tf32: that is for NVIDIA's tensor cores".into(),
            ));
        }
        Ok(executable::CpuExecutable::new(Arc::clone(&self.device), plan, *options)?)
    }
}

/// The processor's name, where the system tells.
fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}
