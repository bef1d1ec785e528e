//! Training: a graph's weights are fitted to a teacher, to labels, or to both.
//!
//! What is asked for ([`Fit`]) can be read everywhere; [`fit`] needs the feature `train`, which brings candle, and says so where it is not there.

#[cfg(feature = "train")]
mod batches;
#[cfg(feature = "train")]
mod checkpoint;
#[cfg(feature = "train")]
mod differentiable;
#[cfg(feature = "train")]
mod fake_quantize;
#[cfg(feature = "train")]
mod fit;
#[cfg(feature = "train")]
mod gradients;
#[cfg(feature = "train")]
mod loss;
#[cfg(feature = "train")]
mod optimizer;
mod options;
mod student;

#[cfg(all(test, feature = "train"))]
mod tests;

#[cfg(feature = "train")]
pub(crate) use gradients::Gradients;
pub use options::{FakeQuantize, Feature, Fit, Fitted, Losses, Point, Progress, Schedule};
pub use student::{layers, student_of};

#[cfg(feature = "train")]
mod network;
#[cfg(feature = "train")]
pub use network::{Layer, Network, NetworkError};

use crate::{Data, ShrinkError};
use cutover_backend::Backend;
use cutover_graph::Graph;
use std::{ops::ControlFlow, sync::Arc};

/// Trains the weights of `student` over `data`: to answer as `teacher` does, as the labels say, or both, by [`Fit::losses`].
/// The teacher runs on `backend`, once for each sample. `progress` may end the run after any step.
///
/// Samples are stacked along their first axis where all inputs of the student have a symbolic one and their shapes agree; elsewhere a batch is run
/// sample by sample and its gradients are summed.
///
/// # Errors
/// [`ShrinkError::Option`] for what can't be asked for, [`ShrinkError::Sample`] for samples that do not fit, an operator that can't be
/// differentiated, by name, and [`ShrinkError::Option`] where this build has no feature `train`.
pub fn fit(
    student: &Graph,
    teacher: Option<&Graph>,
    data: &Data,
    held_out: Option<&Data>,
    options: &Fit,
    backend: &Arc<dyn Backend>,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Fitted, ShrinkError> {
    #[cfg(feature = "train")]
    return self::fit::fit(student, teacher, data, held_out, options, backend, progress);
    #[cfg(not(feature = "train"))]
    {
        let _ = (student, teacher, data, held_out, options, backend, progress);
        Err(ShrinkError::Option("training is not in this build: it needs the feature 'train'".to_string()))
    }
}
