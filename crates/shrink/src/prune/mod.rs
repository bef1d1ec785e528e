//! Pruning: channels, heads and neurons that really go ([`prune()`]), and single weights that become zero ([`sparsify`]).
//!
//! What goes is found in three steps: which indices of which axes belong together ([`Dependencies`]), how much each matters ([`Criterion`]), and
//! which are the least ([`Scope`], [`Amount`]).

mod axes;
mod dependency;
mod importance;
mod recurrent;
mod rewrite;
mod select;
mod sparse;

pub use axes::{Axes, AxisId, KeptIndices};
pub use dependency::{Dependencies, Restrictions};
pub use importance::{Criterion, Group};
pub use select::{Scope, bindings, select};
pub use sparse::{Sparsity, SparsityReport, sparsify};

use crate::{Data, Progress, Sample, ShrinkError, latencies, plain};
use cutover_backend::Backend;
use cutover_graph::{Bindings, Graph, Op};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// How much goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This share of the channels and heads that may.
    Channels(f64),
    /// As many as leave at most this share of all multiplications.
    Operations(f64),
    /// As many as leave at most this share of the latency, measured on the backend.
    Latency(f64),
}

#[derive(Clone, Debug)]
pub struct PruneOptions {
    pub amount: Amount,
    pub criterion: Criterion,
    pub scope: Scope,
    /// Indices of weights come out as multiples of this, where groups are large enough.
    pub multiple: usize,
    pub restrictions: Restrictions,
}

impl Default for PruneOptions {
    /// Half of the multiplications, by L2, in multiples of 8.
    fn default() -> PruneOptions {
        PruneOptions {
            amount: Amount::Operations(0.5),
            criterion: Criterion::default(),
            scope: Scope::default(),
            multiple: 8,
            restrictions: Restrictions::default(),
        }
    }
}

/// What went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PruneReport {
    pub groups: Vec<PrunedGroup>,
    /// Elements of all constants.
    pub parameters: [u64; 2],
    /// Multiplications of one run, open extents as in the first sample.
    pub operations: [u64; 2],
    /// Whether the asked share of operations or latency was reached; where not, everything that may went.
    pub reached: bool,
    /// Reasons why axes of weights keep their extents, each with how many axes it holds, the most first.
    pub frozen: Vec<(String, usize)>,
}

/// A group before and after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrunedGroup {
    /// The layers that make it.
    pub nodes: Vec<String>,
    /// Indices of weights that go with each of the group's.
    pub width: usize,
    pub before: usize,
    pub after: usize,
}

/// Refuses what is no share.
pub(crate) fn check_share(what: &str, share: f64) -> Result<(), ShrinkError> {
    match (0.0..1.0).contains(&share) {
        true => Ok(()),
        false => Err(ShrinkError::Option(format!("{what} is {share}: expected at least 0 and below 1"))),
    }
}

/// Removes channels, heads and neurons from `graph`. What the model reads and gives keeps its shape.
///
/// # Errors
/// A share outside 0 to 1; no samples; weights or activations that are not finite, by name; nothing that may go, with what holds it.
pub fn prune(
    graph: &Graph,
    options: &PruneOptions,
    data: &Data,
    backend: &Arc<dyn Backend>,
    progress: Progress<'_>,
) -> Result<(Graph, PruneReport), ShrinkError> {
    let (Amount::Channels(share) | Amount::Operations(share) | Amount::Latency(share)) = options.amount;
    check_share("the share to prune to", share)?;
    if options.multiple == 0 {
        return Err(ShrinkError::Option("channels in multiples of 0: expected at least 1".to_string()));
    }
    if let Some((_, node)) = graph.nodes().find(|(_, node)| is_quantized(&node.op)) {
        let message = format!("node '{}' ({}) is of a quantized model", node.name, node.op.name());
        return Err(ShrinkError::Option(format!("{message}: prune the float model, then quantize what is left")));
    }
    let samples = &data.samples[..];
    let bindings = samples.first().map(|sample| bindings(graph, sample)).ok_or(ShrinkError::NoSamples)?;
    let dependencies = Dependencies::new(plain(graph.clone())?, &options.restrictions);
    let mut groups = dependencies.groups();
    let frozen = dependencies.reasons();
    if groups.is_empty() {
        let reasons: Vec<String> = frozen.iter().take(3).map(|(reason, axes)| format!("{reason} ({axes})")).collect();
        return Err(ShrinkError::Option(format!("nothing can be pruned: {}", reasons.join("; "))));
    }
    dependencies.score(&mut groups, options.criterion, backend, data, progress)?;
    let (kept, reached) = Search { dependencies: &dependencies, groups: &groups, options, bindings: &bindings }
        .find(samples, backend, progress)?;
    let pruned = dependencies.remove(&kept)?;
    let parameters = |graph: &Graph| {
        graph.values().filter_map(|(id, _)| graph.constant(id)).map(|c| c.tensor.element_count() as u64).sum()
    };
    let entry = |group: &Group| PrunedGroup {
        nodes: group.nodes.clone(),
        width: group.width,
        before: group.size,
        after: kept.get(&group.axis).map_or(group.size, Vec::len),
    };
    let report = PruneReport {
        groups: groups.iter().map(entry).collect(),
        parameters: [parameters(&dependencies.graph), parameters(&pruned)],
        operations: [
            dependencies.operations(&KeptIndices::new(), &bindings),
            dependencies.operations(&kept, &bindings),
        ],
        reached,
        frozen,
    };
    Ok((pruned, report))
}

/// Whether integers stand for floats here.
fn is_quantized(op: &Op) -> bool {
    let name = op.name();
    ["uantize", "QLinear", "Integer", "NBits"].iter().any(|part| name.contains(part))
}

impl Dependencies {
    /// Why axes of products' weights keep their extents, the most frequent first.
    fn reasons(&self) -> Vec<(String, usize)> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, node) in self.graph.nodes().filter(|(_, node)| importance::is_product(&node.op)) {
            for value in node.inputs.iter().take(2).flatten().filter(|&&v| self.graph.constant(v).is_some()) {
                for &axis in self.of.get(value).into_iter().flatten().take(2) {
                    if let Some(reason) = self.axes.frozen(axis) {
                        *counts.entry(reason).or_default() += 1;
                    }
                }
            }
        }
        let mut counts: Vec<(String, usize)> = counts.into_iter().map(|(r, n)| (r.to_string(), n)).collect();
        counts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        counts
    }
}

/// Steps of the search for a share of operations; of latency each takes seconds.
const OPERATIONS_STEPS: usize = 20;
const LATENCY_STEPS: usize = 6;
const LATENCY_TIME: Duration = Duration::from_secs(2);

struct Search<'a> {
    dependencies: &'a Dependencies,
    groups: &'a [Group],
    options: &'a PruneOptions,
    bindings: &'a Bindings,
}

impl Search<'_> {
    fn select(&self, ratio: f64) -> KeptIndices {
        select(self.groups, ratio, self.options.scope, self.options.multiple)
    }

    /// What stays, and whether that is as little as was asked for.
    fn find(
        &self,
        samples: &[Sample],
        backend: &Arc<dyn Backend>,
        progress: Progress<'_>,
    ) -> Result<(KeptIndices, bool), ShrinkError> {
        match self.options.amount {
            Amount::Channels(ratio) => Ok((self.select(ratio), true)),
            Amount::Operations(share) => {
                let whole = self.dependencies.operations(&KeptIndices::new(), self.bindings) as f64;
                let left = |kept: &KeptIndices| self.dependencies.operations(kept, self.bindings) as f64 / whole;
                self.bisect(OPERATIONS_STEPS, &mut |kept| Ok(left(kept) <= share))
            }
            Amount::Latency(share) => {
                let mut step = 0;
                self.bisect(LATENCY_STEPS, &mut |kept| {
                    let pruned = self.dependencies.remove(kept)?;
                    let times = latencies(&self.dependencies.graph, &pruned, backend, samples, LATENCY_TIME)?;
                    step += 1;
                    progress("latency", step.min(LATENCY_STEPS), LATENCY_STEPS);
                    Ok(times[1].as_secs_f64() <= share * times[0].as_secs_f64())
                })
            }
        }
    }

    /// The smallest ratio that is `enough`, by halving.
    fn bisect(
        &self,
        steps: usize,
        enough: &mut dyn FnMut(&KeptIndices) -> Result<bool, ShrinkError>,
    ) -> Result<(KeptIndices, bool), ShrinkError> {
        let (mut low, mut high) = (0.0, 1.0);
        let mut best = None;
        for _ in 0..steps {
            let middle = (low + high) / 2.0;
            let kept = self.select(middle);
            match enough(&kept)? {
                true => (high, best) = (middle, Some(kept)),
                false => low = middle,
            }
        }
        Ok(best.map_or_else(|| (self.select(1.0), false), |kept| (kept, true)))
    }
}
