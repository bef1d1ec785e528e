//! Versions of models on a device: kept, swapped under load, rolled out and rolled back.
//!
//! [`Host`] is the way in. `store` keeps versions across power cuts, `swap` pins, drains and releases them, `rollout` decides who gets
//! traffic (pure state machines: time and events are passed in), `router` sends requests and remembers answers for feedback.
//! Synchronous; knows no concrete backend, no network.

mod admission;
mod checklist;
mod control;
mod deploy;
mod error;
mod host;
mod request;
pub mod rollout;
mod router;
mod socket;
mod status;
mod store;
mod swap;

pub use checklist::{Check, Checklist, ChecklistLine, Item};
pub use cutover_backend as backend;
pub use cutover_monitor as monitor;
pub use cutover_tensor as tensor;
pub use error::{AdmissionError, FeedbackError, HostError, InferError, StoreError};
pub use host::{Host, HostOptions, RolloutId};
pub use request::{Answer, Label, Request};
pub use rollout::{AbTest, BlueGreen, Canary, Shadow, Strategy};
pub use router::StreamStep;
pub use socket::{Call, Client};
pub use status::{
    HistoryEntry, Metrics, ModelStatus, OutageStatus, RolloutStatus, Status, VersionMetrics, VersionStatus,
};
pub use store::{Lost, StoreCheck, StoreRepair, check_store, repair_store};
