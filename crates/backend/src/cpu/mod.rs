//! The CPU: hot patterns lowered to SIMD kernels over one arena.

use crate::Backend;
use std::sync::Arc;

/// How the CPU backend is set up.
#[derive(Clone, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads, the caller's included; 0 for as many as this process may use.
    pub threads: usize,
    /// A lower rung of the dispatch ladder than the CPU offers: `avx512`, `avx2`, `scalar`.
    pub isa: Option<String>,
}

/// The CPU backend.
pub fn cpu(options: CpuOptions) -> Result<Arc<dyn Backend>, crate::CompileError> {
    let _ = options;
    unimplemented!()
}
