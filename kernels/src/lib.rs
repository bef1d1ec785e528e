//! All code of Cutover that runs on a device: CPU SIMD kernels behind one dispatch ladder.
