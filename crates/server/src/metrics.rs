//! `/metrics` for Prometheus.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use cutover_runtime::{Host, Metrics, VersionMetrics};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};
use std::fmt;

/// Upper bounds of the latency buckets, in seconds.
const BOUNDS_S: [f64; 12] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0];

pub fn routes() -> Router<Host> {
    Router::new().route("/metrics", get(metrics))
}

async fn metrics(State(host): State<Host>) -> Response {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Snapshot(host.metrics())));
    let mut body = String::new();
    match text::encode(&mut body, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], body)
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[derive(Debug)]
struct Snapshot(Metrics);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Metrics { versions, swaps, waiting } = &self.0;
        type Number = fn(&VersionMetrics) -> u64;
        let counters: [(&str, &str, Number); 4] = [
            ("cutover_requests", "Requests by model and version", |v| v.requests),
            ("cutover_errors", "Requests that a version could not answer", |v| v.errors),
            ("cutover_labels", "Labels that came for a version's answers", |v| v.labels),
            ("cutover_labels_right", "Labels that the version's answer agreed with", |v| v.labels_right),
        ];
        for (name, help, number) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for version in versions {
                let labels = labels(version);
                family.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&number(version), None)?;
            }
        }
        let gauges: [(&str, &str, fn(&VersionMetrics) -> f64); 3] = [
            ("cutover_in_flight", "Requests a version is computing now", |v| v.in_flight as f64),
            ("cutover_share", "Share of the requests that go to a version", |v| v.share),
            ("cutover_weight_bytes", "Bytes of weights a version holds", |v| v.weight_bytes as f64),
        ];
        for (name, help, number) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for version in versions {
                family.encode_family(&labels(version))?.encode_gauge(&number(version))?;
            }
        }
        let (name, help) = ("cutover_latency_seconds", "From when a model began on a request to when it ended");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for version in versions {
            let mut below = 0;
            let mut buckets: Vec<(f64, u64)> = Vec::with_capacity(BOUNDS_S.len() + 1);
            for bound in BOUNDS_S {
                let at_most = version.latency.at_most((bound * 1e6) as u64);
                buckets.push((bound, at_most - below));
                below = at_most;
            }
            let count = version.latency.count();
            buckets.push((f64::INFINITY, count - below));
            let labels = labels(version);
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(version.latency.sum_s(), count, &buckets, None)?;
        }
        let mut family =
            encoder.encode_descriptor("cutover_swaps", "Changes of who serves", None, MetricType::Counter)?;
        family.encode_counter::<NoLabelSet, u64, f64>(swaps, None)?;
        let mut family =
            encoder.encode_descriptor("cutover_waiting", "Requests waiting for a worker", None, MetricType::Gauge)?;
        family.encode_gauge(&(*waiting as i64))
    }
}

fn labels(version: &VersionMetrics) -> [(&'static str, String); 3] {
    [("model", version.model.clone()), ("version", version.version.clone()), ("role", version.role.to_string())]
}
