//! The contract of a backend, and the backends behind it.
//!
//! `dyn` is paid once per request at this boundary, never per operator. Backends are private types with public
//! constructors ([`reference()`], [`cpu()`]); none names another. A backend sees plans and values, never a file.

pub mod binding;
mod contract;
pub mod cpu;
mod error;
pub mod reference;

pub use contract::{
    Backend, Binding, Cancellation, CompileOptions, DeviceInfo, Executable, Footprint, Input, Numerics, OpTiming,
    Output, Peak, PlacedNode, Placement, Precision, Profiler, RunContext, RunLimits, Session, SessionMemory, Signature,
    Support, Work,
};
pub use cpu::{CpuOptions, MemoryUse, cpu};
pub use error::{CompileError, ResourceError, RunError};
pub use reference::reference;
