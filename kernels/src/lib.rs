//! All code of Cutover that runs on a device: CPU SIMD kernels behind one dispatch ladder, and shaders for GPUs as text.
//!
//! The crate depends on nothing in the workspace and knows no graph, tensor or thread pool: a kernel is a function over
//! slices that a backend calls. It allocates nothing, reads no environment and keeps no state.

pub mod cpu;
pub mod cuda;
pub mod wgsl;
