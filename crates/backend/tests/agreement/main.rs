//! The CPU backend gives what the reference gives, whatever the graph, the instruction set and the number of threads.

mod any_type;
mod compositions;
mod fusions;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu_by_hand;
mod halves;
mod models_of_rows;
mod networks;
mod quantized;
mod regions;
mod support;
mod vision;
