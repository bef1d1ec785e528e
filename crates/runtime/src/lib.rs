//! Versions of models on a device: kept, swapped under load, rolled out and rolled back.
//!
//! [`Host`] is the way in. `store` keeps versions across power cuts, `swap` pins, drains and releases them, `rollout` decides who gets
//! traffic (pure state machines: time and events are passed in), `router` sends requests and remembers answers for feedback.
//! Synchronous; knows no concrete backend, no network.

mod admission;
mod control;
mod error;
mod host;
mod request;
pub mod rollout;
mod router;
mod status;
mod store;
mod swap;

pub use cutover_backend as backend;
pub use cutover_monitor as monitor;
pub use cutover_tensor as tensor;
pub use error::{AdmissionError, FeedbackError, HostError, InferError, StoreError};
pub use host::{Host, HostOptions, RolloutId};
pub use request::{Answer, Label, Request};
pub use rollout::{BlueGreen, Canary, Strategy};
pub use status::{HistoryEntry, Metrics, ModelStatus, RolloutStatus, Status, VersionMetrics, VersionStatus};
