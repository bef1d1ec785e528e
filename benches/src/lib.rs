//! Criterion benchmarks: kernels, whole models, swaps.
