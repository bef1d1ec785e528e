//! Cutover: ONNX models on a device, fast, and replaced while they serve.
//!
//! ```no_run
//! # fn main() -> Result<(), cutover::Error> {
//! let model = cutover::Model::open("digits.cutover")?; // or a bare .onnx
//! let mut session = model.compile(cutover::Device::Auto)?.session()?;
//! let image = cutover::Tensor::from_vec([1, 1, 8, 8], vec![0f32; 64])?;
//! let answers = session.run([("image", image.view())])?;
//! println!("{:?}", answers.get("probabilities").map(|p| p.to_vec::<f32>()));
//! # Ok(())
//! # }
//! ```
//!
//! A [`Host`] keeps versions that survive power cuts, and swaps them under load:
//!
//! ```no_run
//! # fn main() -> Result<(), cutover::Error> {
//! let host = cutover::open_host("/var/lib/app/models")?;
//! host.deploy("digits", "digits-v2.cutover".as_ref(), cutover::Strategy::canary())?;
//! # Ok(())
//! # }
//! ```
//!
//! This crate is the whole of what embeds: no async runtime, no network, no training.

mod auto;
mod choices;
mod model;

pub use cutover_backend as backend;
pub use cutover_graph as graph;
pub use cutover_input as input;
pub use cutover_monitor as monitor;
pub use cutover_package as package;
pub use cutover_runtime as runtime;
pub use cutover_tensor as tensor;

pub use cutover_runtime::{Answer, Host, HostOptions, Label, Request, Strategy};
pub use cutover_tensor::{DType, Shape, Tensor, TensorView, TensorViewMut, Value};
pub use model::{Answers, CompiledModel, Device, DeviceOptions, Model, OpenOptions, Session};

use std::path::Path;

/// What can go wrong from a file to an answer, by who must act.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Import(#[from] graph::ImportError),
    #[error(transparent)]
    Graph(#[from] graph::GraphError),
    #[error(transparent)]
    Package(#[from] package::PackageError),
    #[error(transparent)]
    Preprocessing(#[from] input::InputError),
    #[error(transparent)]
    Compile(#[from] backend::CompileError),
    #[error(transparent)]
    Resource(#[from] backend::ResourceError),
    #[error(transparent)]
    Run(#[from] backend::RunError),
    #[error(transparent)]
    Tensor(#[from] tensor::TensorError),
    #[error(transparent)]
    Host(#[from] runtime::HostError),
    /// An input's name that the model does not have, or one that is missing.
    #[error("{0}")]
    Name(String),
}

/// Opens the store in `folder` with this device's backends and default options.
pub fn open_host(folder: impl AsRef<Path>) -> Result<Host, Error> {
    let backends = vec![Device::Auto.backend(&DeviceOptions::default())?];
    Ok(Host::open(folder, HostOptions { backends, ..HostOptions::default() })?)
}
