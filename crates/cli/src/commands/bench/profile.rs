//! Time and work by node and by operator, as `--profile` shows them.

use crate::output::table;
use cutover::backend::{OpTiming, Peak, Profiler, Work};
use serde_json::{Value as Json, json};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Mutex,
    time::Duration,
};

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The median over runs of what a node's steps took together, in ms.
fn median_of_runs(durations: &[Duration], runs: usize) -> f64 {
    let steps = (durations.len() / runs).max(1);
    let mut totals: Vec<f64> = durations.chunks(steps).map(|run| run.iter().copied().map(ms).sum()).collect();
    totals.sort_by(f64::total_cmp);
    totals[totals.len() / 2]
}

/// Time by node.
#[derive(Default)]
pub(super) struct Profile(Mutex<BTreeMap<(String, String, String), Steps>>);

/// The steps of a node in all runs.
#[derive(Default)]
struct Steps {
    durations: Vec<Duration>,
    work: Work,
}

impl Profiler for Profile {
    fn record(&self, timing: OpTiming<'_>) {
        let mut nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = (timing.node.to_string(), timing.op.to_string(), timing.kernel.to_string());
        let steps = nodes.entry(key).or_default();
        steps.durations.push(timing.duration);
        steps.work.operations += timing.work.operations;
        steps.work.integer_operations += timing.work.integer_operations;
        steps.work.bytes += timing.work.bytes;
    }
}

/// What one or more nodes did in a run.
struct Line {
    /// Empty for an operator's nodes together.
    node: String,
    op: String,
    kernel: String,
    nodes: usize,
    ms: f64,
    /// All nodes have the same work in every run, or nearly.
    work: Work,
}

impl Line {
    /// Billions of operations, and of bytes, in a second.
    fn rates(&self) -> [Option<f64>; 2] {
        [self.work.products(), self.work.bytes].map(|count| (count > 0).then(|| count as f64 / self.ms.max(1e-9) / 1e6))
    }

    fn share_of_peak(&self, peak: Option<Peak>) -> Option<f64> {
        peak?.share(self.work, self.ms / 1e3)
    }
}

impl Profile {
    /// Of every node, where it was run once.
    pub fn work(&self) -> Vec<Work> {
        let nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        nodes.values().map(|steps| steps.work).collect()
    }

    /// Of every node, the longest first. Times are medians over runs.
    fn nodes(&self, runs: usize) -> Vec<Line> {
        let nodes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let one = |((node, op, kernel), steps): (&(String, String, String), &Steps)| Line {
            node: node.clone(),
            op: op.clone(),
            kernel: kernel.clone(),
            nodes: 1,
            ms: median_of_runs(&steps.durations, runs),
            work: Work {
                operations: steps.work.operations / runs as u64,
                integer_operations: steps.work.integer_operations / runs as u64,
                bytes: steps.work.bytes / runs as u64,
            },
        };
        let mut nodes: Vec<_> = nodes.iter().map(one).collect();
        nodes.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        nodes
    }

    /// Of every operator with its kernel, the longest first.
    fn ops(&self, runs: usize) -> Vec<Line> {
        let mut ops: BTreeMap<(String, String), Line> = BTreeMap::new();
        for node in self.nodes(runs) {
            match ops.entry((node.op.clone(), node.kernel.clone())) {
                Entry::Vacant(place) => drop(place.insert(Line { node: String::new(), ..node })),
                Entry::Occupied(mut op) => {
                    let op = op.get_mut();
                    op.nodes += 1;
                    op.ms += node.ms;
                    op.work.operations += node.work.operations;
                    op.work.integer_operations += node.work.integer_operations;
                    op.work.bytes += node.work.bytes;
                }
            }
        }
        let mut ops: Vec<_> = ops.into_values().collect();
        ops.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        ops
    }

    pub fn json(&self, runs: usize, peak: Option<Peak>) -> Json {
        let line = |line: Line| {
            let [gflops, gbytes] = line.rates();
            json!({
                "node": line.node, "op": line.op, "kernel": line.kernel, "nodes": line.nodes, "ms": line.ms,
                "gflops_per_second": gflops, "gbytes_per_second": gbytes, "of_peak": line.share_of_peak(peak),
            })
        };
        json!({
            "peak": peak.map(|peak| json!({
                "gflops_per_second": peak.operations_per_second / 1e9,
                "integer_gops_per_second": peak.integer_operations_per_second / 1e9,
                "gbytes_per_second": peak.bytes_per_second / 1e9,
            })),
            "ops": self.ops(runs).into_iter().map(line).collect::<Vec<_>>(),
            "nodes": self.nodes(runs).into_iter().map(line).collect::<Vec<_>>(),
        })
    }

    pub fn text(&self, runs: usize, peak: Option<Peak>) -> String {
        let total: f64 = self.nodes(runs).iter().map(|n| n.ms).sum();
        let percent = |part: f64| format!("{:.1} %", 100.0 * part);
        let cells = |first: String, line: &Line| {
            let [gflops, gbytes] = line.rates().map(|rate| rate.map_or(String::new(), |rate| format!("{rate:.1}")));
            let of_peak = line.share_of_peak(peak).map_or(String::new(), percent);
            let (ms, share) = (format!("{:.3}", line.ms), percent(line.ms / total.max(1e-9)));
            vec![first, ms, share, gflops, gbytes, of_peak]
        };
        let what = |line: &Line| format!("{} ({})", line.op, line.kernel);
        let rates = ["ms", "share", "GFLOP/s", "GB/s", "of peak"];
        let ops = self.ops(runs).into_iter().map(|op| {
            let mut cells = cells(what(&op), &op);
            cells.insert(1, op.nodes.to_string());
            cells
        });
        let header: Vec<&str> = ["operator (kernel)", "nodes"].into_iter().chain(rates).collect();
        let ops = table(&header, ops.collect(), true);
        let nodes = self.nodes(runs).into_iter().take(30).map(|node| {
            let mut cells = cells(node.node.clone(), &node);
            cells.insert(1, what(&node));
            cells
        });
        let header: Vec<&str> = ["node (the 30 longest)", "operator (kernel)"].into_iter().chain(rates).collect();
        let nodes = table(&header, nodes.collect(), true);
        let peak = peak.map_or(String::new(), |peak| {
            let (gflops, gbytes) = (peak.operations_per_second / 1e9, peak.bytes_per_second / 1e9);
            let integers = peak.integer_operations_per_second / 1e9;
            format!("\nAt most {gflops:.0} GFLOP/s in registers, {integers:.0} of bytes, and {gbytes:.0} GB/s from the cores' caches, measured now.\n")
        });
        format!("\n{ops}\n\n{nodes}\n{peak}")
    }
}
