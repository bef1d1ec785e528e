//! `cutover devices`.

use crate::{
    Verdict,
    output::{Printer, bytes, table},
};
use anyhow::Result;
use cutover::backend::{Peak, WgpuAdapter, wgpu_adapters};
use serde_json::json;

#[derive(clap::Args)]
#[command(after_help = "Example: cutover devices --json\n\n\
    GPUs in the order they are preferred in, what each offers, and what short kernels got out of it. --adapter takes a part of a name.")]
pub(crate) struct Arguments {
    /// Lists what there is without running anything on it.
    #[arg(long)]
    no_measure: bool,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let mut rows = Vec::new();
        let mut devices = Vec::new();
        for (adapter, peak) in wgpu_adapters(!self.no_measure) {
            let (peak, failure) = match peak {
                None => (None, None),
                Some(Ok(peak)) => (Some(peak), None),
                Some(Err(error)) => (None, Some(error.to_string())),
            };
            rows.push(row(&adapter, peak, failure.as_deref()));
            devices.push(json!({
                "name": adapter.name,
                "interface": adapter.interface,
                "kind": adapter.kind,
                "driver": adapter.driver,
                "features": features(&adapter),
                "limits": {
                    "buffer_bytes": adapter.max_buffer_bytes,
                    "binding_bytes": adapter.max_binding_bytes,
                    "bindings": adapter.max_bindings,
                    "workgroup_bytes": adapter.workgroup_bytes,
                    "workgroup_invocations": adapter.workgroup_invocations,
                },
                "gflop_per_second": peak.map(|peak| peak.operations_per_second / 1e9),
                "gb_per_second": peak.map(|peak| peak.bytes_per_second / 1e9),
                "error": failure,
            }));
        }
        let header = ["device", "interface", "features", "largest buffer", "bound at once", "GFLOP/s", "GB/s"];
        printer.print(&json!({ "devices": devices }), || match rows.is_empty() {
            true => "no GPU that Vulkan, Metal, DX12 or GL reaches\n".to_string(),
            false => table(&header, rows, true),
        })?;
        Ok(Verdict::Yes)
    }
}

fn features(adapter: &WgpuAdapter) -> Vec<&'static str> {
    let all = [("f16", adapter.has_f16), ("i64", adapter.has_i64), ("subgroups", adapter.has_subgroups)];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

fn row(adapter: &WgpuAdapter, peak: Option<Peak>, failure: Option<&str>) -> Vec<String> {
    let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{:.1}", value / 1e9));
    vec![
        adapter.name.clone(),
        format!("{}, {}", adapter.interface, adapter.kind),
        features(adapter).join(" "),
        bytes(adapter.max_buffer_bytes),
        bytes(adapter.max_binding_bytes),
        failure.map_or(number(peak.map(|peak| peak.operations_per_second)), str::to_string),
        number(peak.map(|peak| peak.bytes_per_second)),
    ]
}
