//! `cutover devices`.

use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::Result;
use cutover::backend::{CompileError, Peak};
use serde_json::{Value, json};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover devices --json\n\n\
    GPUs in the order they are preferred in, what each offers, and what short kernels got out of it. --adapter takes a part of a name.")]
pub(crate) struct Arguments {
    /// Lists what there is without running anything on it.
    #[arg(long)]
    no_measure: bool,
}

/// A device as it is printed.
struct Listed {
    backend: &'static str,
    name: String,
    interface: String,
    features: Vec<String>,
    largest_bytes: u64,
    bound_bytes: u64,
    peak: Option<Result<Peak, CompileError>>,
    /// What a script may want more.
    more: Value,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let (mut devices, mut missing) = (Vec::new(), Vec::new());
        #[cfg(feature = "cuda")]
        match cuda(!self.no_measure) {
            Ok(found) => devices.extend(found),
            Err(error) => missing.push(error.to_string()),
        }
        #[cfg(feature = "wgpu")]
        match wgpu(!self.no_measure) {
            found if found.is_empty() => missing.push("no GPU that Vulkan, Metal, DX12 or GL reaches".to_string()),
            found => devices.extend(found),
        }
        let header =
            ["backend", "device", "interface", "features", "largest buffer", "bound at once", "GFLOP/s", "GB/s"];
        let told: Vec<Value> = devices.iter().map(Listed::json).collect();
        printer.print(&json!({ "devices": told, "missing": missing }), || {
            let missing: String = missing.iter().map(|reason| format!("{reason}\n")).collect();
            match devices.is_empty() {
                true => missing,
                false => table(&header, devices.iter().map(Listed::row).collect(), true) + &missing,
            }
        })?;
        Ok(Verdict::Yes)
    }
}

#[cfg(feature = "wgpu")]
fn wgpu(measured: bool) -> Vec<Listed> {
    let all = cutover::backend::wgpu_adapters(measured).into_iter().map(|(adapter, peak)| {
        let features = [("f16", adapter.has_f16), ("i64", adapter.has_i64), ("subgroups", adapter.has_subgroups)];
        Listed {
            backend: "wgpu",
            interface: format!("{}, {}", adapter.interface, adapter.kind),
            features: features.into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_string()).collect(),
            largest_bytes: adapter.max_buffer_bytes,
            bound_bytes: adapter.max_binding_bytes,
            peak,
            more: json!({
                "kind": adapter.kind,
                "driver": adapter.driver,
                "bindings": adapter.max_bindings,
                "workgroup_bytes": adapter.workgroup_bytes,
                "workgroup_invocations": adapter.workgroup_invocations,
            }),
            name: adapter.name,
        }
    });
    all.collect()
}

#[cfg(feature = "cuda")]
fn cuda(measured: bool) -> Result<Vec<Listed>, CompileError> {
    let all = cutover::backend::cuda_devices(measured)?.into_iter().map(|(device, peak)| Listed {
        backend: "cuda",
        interface: format!("CUDA {}, compute capability {}", device.driver, device.compute_capability),
        features: ["f16", "i64"].map(str::to_string).to_vec(),
        largest_bytes: device.memory_bytes,
        bound_bytes: device.memory_bytes.min(u64::from(u32::MAX)),
        peak,
        more: json!({
            "compute_capability": device.compute_capability,
            "driver": device.driver,
            "nvrtc": device.compiler,
            "multiprocessors": device.multiprocessors,
            "clock_mhz": device.clock_mhz,
            "block_threads": device.block_threads,
            "block_bytes": device.block_bytes,
        }),
        name: device.name,
    });
    Ok(all.collect())
}

impl Listed {
    fn row(&self) -> Vec<String> {
        let number = |of: fn(&Peak) -> f64| match &self.peak {
            Some(Ok(peak)) => format!("{:.1}", of(peak) / 1e9),
            _ => "-".to_string(),
        };
        let failure = self.peak.as_ref().and_then(|peak| peak.as_ref().err()).map(ToString::to_string);
        vec![
            self.backend.to_string(),
            self.name.clone(),
            self.interface.clone(),
            self.features.join(" "),
            bytes(self.largest_bytes),
            bytes(self.bound_bytes),
            failure.unwrap_or_else(|| number(|peak| peak.operations_per_second)),
            number(|peak| peak.bytes_per_second),
        ]
    }

    fn json(&self) -> Value {
        let peak = self.peak.as_ref().and_then(|peak| peak.as_ref().ok());
        json!({
            "backend": self.backend,
            "name": self.name,
            "interface": self.interface,
            "features": self.features,
            "limits": { "buffer_bytes": self.largest_bytes, "binding_bytes": self.bound_bytes },
            "details": self.more,
            "gflop_per_second": peak.map(|peak| peak.operations_per_second / 1e9),
            "integer_gop_per_second": peak.map(|peak| peak.integer_operations_per_second / 1e9),
            "gb_per_second": peak.map(|peak| peak.bytes_per_second / 1e9),
            "error": self.peak.as_ref().and_then(|peak| peak.as_ref().err()).map(ToString::to_string),
        })
    }
}
