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
}

impl Arguments {
    pub fn run(self, printer: &Printer) -> Result<Verdict> {
        let temporary = tempfile::Builder::new().prefix("cutover-").tempdir().context("a temporary folder")?;
        let store = self.store.clone().unwrap_or_else(|| temporary.path().join("store"));
        let options = DeviceOptions { threads: self.threads, memory: self.memory, ..DeviceOptions::default() };
        let host = open_host(&store, self.backend, &options, self.workers)?;
        let served = |host: &Host| host.status().models.into_iter().map(|m| m.name).collect::<Vec<_>>();
        for path in &self.models {
            let package = package_of(path, temporary.path())?;
            let name = Package::open(&package)?.manifest.name;
            if !served(&host).contains(&name) {
                host.deploy(&name, &package, Strategy::blue_green()).with_context(|| format!("{}", path.display()))?;
            }
        }
        let server = Server::start(host.clone(), self.listen, &ServerOptions::default())
            .with_context(|| format!("cannot listen on {}", self.listen))?;
        let url = format!("http://{}", server.address());
        host.announce(&json!({ "pid": std::process::id(), "url": url }).to_string())?;
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

/// The package at `path`; of a bare model one is made in `folder`.
fn package_of(path: &Path, folder: &Path) -> Result<PathBuf> {
    if Package::is_one(path) {
        return Ok(path.to_path_buf());
    }
    let name = path.file_stem().and_then(|s| s.to_str()).context("a model file needs a name")?;
    let package = folder.join(format!("{name}.cutover"));
    let source = Source { model: path, name, version: "1", golden: None, f16: false };
    convert(&source, &package).with_context(|| format!("{}", path.display()))?;
    Ok(package)
}
