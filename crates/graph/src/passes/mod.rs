//! Rewrites that leave a model's answers alone, and the driver that applies them.
//!
//! A pass looks at the graph round one node and *returns* a patch. Only [`declutter`] applies patches: it infers facts again, checks the
//! rules, and names the pass, the step and the node of a patch that breaks one. Passes here know ONNX only: layouts, kernels and memory
//! are for a backend's own lowering.

mod driver;
mod expand_fused;
mod fold_constants;
mod fold_scales;
mod fuse_activations;
mod fuse_sums;
mod merge_reshapes;
mod merge_scalars;
mod merge_transposes;
mod number_classes;
mod recognise_activations;
mod recognise_layer_norm;
mod remove_dead_code;
mod remove_no_ops;
mod share_equal;
mod subject;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use subject::Subject;

use crate::{Graph, GraphError, NodeId, Patch};

/// One kind of rewrite.
pub trait Pass: Sync {
    /// As it stands in reports and errors.
    fn name(&self) -> &'static str;

    /// The patch for the pattern that ends in `node`, or `None` where there is nothing to do. Applying it must leave nothing
    /// for the same pass at the same place, or the passes would never come to an end.
    fn propose(&self, subject: &Subject, node: NodeId) -> Option<Patch>;
}

/// How to run the passes.
#[derive(Clone, Copy, Debug)]
pub struct PassOptions {
    /// Stops after so many patches, to find a bad rewrite by bisection; `Some(0)` changes nothing.
    pub stop_after: Option<usize>,
    /// Checks every rule of the graph after every patch, not once for every pass that changed something.
    pub verify_each_patch: bool,
    pub folding: Folding,
}

impl Default for PassOptions {
    fn default() -> Self {
        PassOptions { stop_after: None, verify_each_patch: cfg!(debug_assertions), folding: Folding::default() }
    }
}

/// What folding a node's constants may cost: a file of a few bytes may ask for any work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Folding {
    /// Bytes that a node's results may have beyond those of its operands.
    pub growth_bytes: usize,
    /// Iterations of all loops in a node.
    pub trips: u64,
}

impl Default for Folding {
    fn default() -> Self {
        Folding { growth_bytes: 64 << 10, trips: 1 << 10 }
    }
}

/// What was done to a graph.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassReport {
    /// The patches, in the order they were applied.
    pub steps: Vec<Step>,
    pub nodes_before: usize,
    pub nodes_after: usize,
    /// What it cost, in inputs of nodes that a pass looked at or whose facts were inferred again; grows as the graph does.
    pub work: usize,
}

/// One patch that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub pass: &'static str,
    /// The node at which the pattern ended.
    pub node: String,
    /// The operators that went and those that came for them.
    pub description: String,
}

/// The passes, in the order in which each round tries them: what removes nodes comes before what recognises patterns, and that
/// before what fuses them.
const PASSES: &[&dyn Pass] = &[
    &remove_dead_code::RemoveDeadCode,
    &expand_fused::ExpandFused,
    &fold_constants::FoldConstants,
    &remove_no_ops::RemoveNoOps,
    &share_equal::ShareEqual,
    &merge_reshapes::MergeReshapes,
    &merge_transposes::MergeTransposes,
    &merge_scalars::MergeScalars,
    &number_classes::NumberClasses,
    &recognise_layer_norm::RecogniseLayerNorm,
    &recognise_activations::RecogniseActivations,
    &fold_scales::FoldScales,
    &fuse_sums::FuseBias,
    &fuse_sums::FuseResidual,
    &fuse_activations::FuseActivations,
];

/// Applies every pass until none has anything left to do.
///
/// # Errors
/// [`GraphError::Pass`] where a patch broke a rule of the graph, changed a type or contradicted a known shape: a fault of this crate,
/// not of the model.
pub fn declutter(graph: Graph, options: &PassOptions) -> Result<(Graph, PassReport), GraphError> {
    driver::run(graph, PASSES, options)
}

/// As [`declutter`], with `passes` of the caller's own: what a backend writes its plan with.
///
/// # Errors
/// As [`declutter`].
pub fn rewrite(graph: Graph, passes: &[&dyn Pass], options: &PassOptions) -> Result<(Graph, PassReport), GraphError> {
    driver::run(graph, passes, options)
}
