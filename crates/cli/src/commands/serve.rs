//! `cutover serve`.

use super::{
    convert::{Source, convert},
    memory,
};
use crate::{Verdict, output::Printer};
use anyhow::{Context, Result};
use cutover::{Device, DeviceOptions, Host, HostOptions, Strategy, backend::MemoryUse, package::Package};
use cutover_server::{Server, ServerOptions};
use serde_json::json;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

#[derive(clap::Args)]
#[command(after_help = "Example: cutover serve --store models digits.cutover\n\
    curl -s localhost:8080/v2/models/digits\n\n\
    The server has no access control yet: it listens on this machine alone unless --listen says otherwise.")]
pub(crate) struct Arguments {
    /// Packages, or ONNX models, to be served; those that the store has in service already are left as they are.
    models: Vec<PathBuf>,
    /// Where versions are kept; a temporary folder if left out.
    #[arg(long)]
    store: Option<PathBuf>,
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// auto, cpu or reference.
    #[arg(long, default_value = "auto")]
    backend: Device,
    /// Threads of the CPU for one request; one per core if left out.
    #[arg(long)]
    threads: Option<usize>,
    /// fast, or lean: the weights once and one arena a worker, no more.
    #[arg(long, default_value = "fast", value_parser = memory)]
    memory: MemoryUse,
    /// Requests that run at once.
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Requests of one model that run at once; as many as there are workers if left out.
    #[arg(long)]
    instances: Option<usize>,
    /// Bytes that all versions in memory may take together.
    #[arg(long)]
    memory_bytes: Option<u64>,
    /// Bytes that the store's objects may take.
    #[arg(long)]
    store_bytes: Option<u64>,
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let temporary = tempfile::Builder::new().prefix("cutover-").tempdir().context("a temporary folder")?;
        let store = self.store.clone().unwrap_or_else(|| temporary.path().join("store"));
        let options = DeviceOptions { threads: self.threads, memory: self.memory, ..DeviceOptions::default() };
        let host = Host::open(
            &store,
            HostOptions {
                backends: vec![self.backend.backend(&options)?],
                workers: self.workers,
                instances: self.instances,
                memory_bytes: self.memory_bytes,
                store_bytes: self.store_bytes,
                ..HostOptions::default()
            },
        )?;
        let served = |host: &Host| host.status().models.into_iter().map(|m| m.name).collect::<Vec<_>>();
        for path in &self.models {
            let package = match Package::is_one(path) {
                true => path.clone(),
                false => {
                    let name = path.file_stem().and_then(|s| s.to_str()).context("a model file needs a name")?;
                    package_of(path, name, "1", temporary.path())?
                }
            };
            let name = Package::open(&package)?.manifest.name;
            if !served(&host).contains(&name) {
                host.deploy(&name, &package, Strategy::blue_green()).with_context(|| format!("{}", path.display()))?;
            }
        }
        let server = Server::start(host.clone(), self.listen, &ServerOptions::default())
            .with_context(|| format!("cannot listen on {}", self.listen))?;
        let url = format!("http://{}", server.address());
        let document = json!({ "url": url, "store": store.display().to_string(), "models": served(&host) });
        printer.print(&document, || format!("serving {} at {url}; Ctrl-C ends it", served(&host).join(", ")))?;
        server.wait_for_signal()?;
        Ok(Verdict::Yes)
    }
}

/// A host whose requests run on one backend.
pub(super) fn open_host(store: &Path, device: Device, options: &DeviceOptions, workers: usize) -> Result<Host> {
    let backends = vec![device.backend(options)?];
    Ok(Host::open(store, HostOptions { backends, workers, ..HostOptions::default() })?)
}

/// The package that is made in `folder` of a bare model.
pub(super) fn package_of(path: &Path, name: &str, version: &str, folder: &Path) -> Result<PathBuf> {
    let package = folder.join(format!("{name}-{version}.cutover"));
    let source = Source { model: path, name, version, golden: None, f16: false };
    convert(&source, &package).with_context(|| format!("{}", path.display()))?;
    Ok(package)
}
