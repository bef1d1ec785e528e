//! What GPUs there are, and what each can do.

use super::gpu::Gpu;
use crate::{CompileError, Peak, gpu::Candidate};
use ::wgpu as api;

/// An adapter, with what matters to our kernels.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub name: String,
    /// `Vulkan`, `Metal`, `DX12`, `GL`.
    pub interface: String,
    /// Discrete, integrated, virtual, or a processor that imitates one.
    pub kind: String,
    pub driver: String,
    pub has_f16: bool,
    pub has_i64: bool,
    pub has_subgroups: bool,
    pub max_buffer_bytes: u64,
    /// Largest range that one kernel reads or writes.
    pub max_binding_bytes: u64,
    pub max_bindings: u32,
    pub workgroup_bytes: u32,
    pub workgroup_invocations: u32,
}

/// Every adapter of this machine in the order of preference, and, where `measured`, the peak of each that gives a device.
pub fn adapters(measured: bool) -> Vec<(Adapter, Option<Result<Peak, CompileError>>)> {
    let all = super::gpu::adapters();
    all.into_iter()
        .map(|adapter| {
            let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
            let of = Adapter {
                name: info.name,
                interface: info.backend.to_string(),
                kind: format!("{:?}", info.device_type),
                driver: [info.driver, info.driver_info].join(" ").trim().to_string(),
                has_f16: features.contains(api::Features::SHADER_F16),
                has_i64: features.contains(api::Features::SHADER_INT64),
                has_subgroups: features.contains(api::Features::SUBGROUP),
                max_buffer_bytes: limits.max_buffer_size,
                max_binding_bytes: limits.max_storage_buffer_binding_size,
                max_bindings: limits.max_storage_buffers_per_shader_stage,
                workgroup_bytes: limits.max_compute_workgroup_storage_size,
                workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            };
            let peak = || {
                let gpu = Gpu::of(&adapter)?;
                peak(&gpu).ok_or_else(|| CompileError::Options(format!("GPU '{}' runs no kernel", of.name)))
            };
            let peak = measured.then(peak);
            (of, peak)
        })
        .collect()
}

pub(super) fn peak(gpu: &Gpu) -> Option<Peak> {
    crate::gpu::peak(&gpu.limits, |source, bytes, groups| timed(gpu, source, bytes, groups))
}

/// Seconds of one dispatch over a buffer of `bytes`, after one that nobody counts; the best of three.
fn timed(gpu: &Gpu, source: &str, bytes: u64, groups: u32) -> Option<f64> {
    let (source, read_only) = (source.to_string(), vec![false]);
    gpu.time(&Candidate { source, read_only, groups: [groups, 1, 1], bytes: vec![bytes] })
}
