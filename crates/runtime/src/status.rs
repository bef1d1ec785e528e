//! What a host tells of itself.

use crate::swap::{Version, lock};
use cutover_monitor::{Evidence, LatencyHistogram};
use serde::{Deserialize, Serialize};
use std::{
    sync::atomic::Ordering,
    time::{SystemTime, UNIX_EPOCH},
};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub models: Vec<ModelStatus>,
    /// Bytes that all resident versions take, what they share counted once.
    #[serde(default)]
    pub memory_bytes: u64,
    /// The budget for it.
    #[serde(default)]
    pub memory_bytes_max: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelStatus {
    pub name: String,
    pub active: VersionStatus,
    /// Where a rollback goes.
    pub previous: Option<String>,
    pub rollout: Option<RolloutStatus>,
    /// Set while nothing of it is in memory.
    #[serde(default)]
    pub outage: Option<OutageStatus>,
    /// Streams that are open.
    #[serde(default)]
    pub streams: usize,
}

/// An announced time without answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OutageStatus {
    /// The version that comes.
    pub version: String,
    pub expected_s: f64,
    pub so_far_s: f64,
}

/// A version in service and what was counted of it since it took traffic.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VersionStatus {
    pub version: String,
    pub backend: String,
    pub requests: u64,
    pub errors: u64,
    pub in_flight: usize,
    pub latency_p50_ms: Option<f64>,
    pub latency_p99_ms: Option<f64>,
    /// Of the answers whose labels came.
    pub accuracy: Option<f64>,
    pub labels: u64,
    pub weight_bytes: u64,
    /// The part of `weight_bytes` that other versions in memory hold too.
    pub shared_bytes: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RolloutStatus {
    pub id: String,
    pub strategy: String,
    pub candidate: VersionStatus,
    /// From 1.
    pub step: usize,
    /// Of the requests, between 0 and 1.
    pub share: f64,
    pub serving_s: f64,
    /// Whether it waits because both arms fail alike.
    #[serde(default)]
    pub holding: bool,
    pub evidence: Vec<Evidence>,
}

/// One transition, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// Milliseconds since 1970, by the device's clock.
    pub at_unix_ms: u64,
    pub model: String,
    /// `deployed`, `started`, `resumed`, `share`, `promoted`, `rolled back`, `inconclusive`, `alert`, `refused`, `outage`, `lost`,
    /// `signed off`, `policy`.
    pub event: String,
    pub version: String,
    pub reason: String,
}

impl HistoryEntry {
    pub(crate) fn new(model: &str, event: &str, version: &str, reason: &str) -> HistoryEntry {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        HistoryEntry {
            at_unix_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            model: model.to_string(),
            event: event.to_string(),
            version: version.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// Counters for whoever scrapes them.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub versions: Vec<VersionMetrics>,
    /// Versions put in service or taken back since the host was opened.
    pub swaps: u64,
    /// Requests waiting for a worker now.
    pub waiting: usize,
}

#[derive(Clone, Debug)]
pub struct VersionMetrics {
    pub model: String,
    pub version: String,
    /// `active` or `candidate`.
    pub role: &'static str,
    /// Of the requests, between 0 and 1.
    pub share: f64,
    pub requests: u64,
    pub errors: u64,
    pub in_flight: usize,
    pub latency: LatencyHistogram,
    pub labels: u64,
    pub labels_right: u64,
    pub weight_bytes: u64,
}

impl VersionStatus {
    pub(crate) fn of(version: &Version) -> VersionStatus {
        let total = lock(&version.total);
        let footprint = version.executable.footprint();
        let placed = version.executable.placement().nodes.first().map(|n| n.backend.to_string());
        VersionStatus {
            version: version.name.clone(),
            backend: placed.unwrap_or_default(),
            requests: total.requests(),
            errors: total.errors.count,
            in_flight: version.in_flight.load(Ordering::Relaxed),
            latency_p50_ms: total.latency.quantile_ms(0.5),
            latency_p99_ms: total.latency.quantile_ms(0.99),
            accuracy: total.accuracy.pooled().value(),
            labels: total.accuracy.pooled().total,
            weight_bytes: footprint.weight_bytes,
            shared_bytes: footprint.shared_bytes,
        }
    }

    /// Of a version that callers never see: what it did with copies of requests.
    pub(crate) fn of_shadow(version: &Version) -> VersionStatus {
        let copies = version.window();
        VersionStatus {
            requests: copies.requests(),
            errors: copies.errors.count,
            latency_p50_ms: copies.latency.quantile_ms(0.5),
            latency_p99_ms: copies.latency.quantile_ms(0.99),
            ..VersionStatus::of(version)
        }
    }
}

impl VersionMetrics {
    pub(crate) fn of(model: &str, version: &Version, role: &'static str, share: f64) -> VersionMetrics {
        let total = lock(&version.total);
        VersionMetrics {
            model: model.to_string(),
            version: version.name.clone(),
            role,
            share,
            requests: total.requests(),
            errors: total.errors.count,
            in_flight: version.in_flight.load(Ordering::Relaxed),
            latency: total.latency.clone(),
            labels: total.accuracy.pooled().total,
            labels_right: total.accuracy.pooled().count,
            weight_bytes: version.executable.footprint().weight_bytes,
        }
    }
}
