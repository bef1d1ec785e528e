//! How a graph's loss follows from its weights, for who ranks them.

use super::{
    differentiable::{Clear, Differentiable, Fault, from_host, read},
    loss::{cross_entropy, logits, mean_square},
};
use crate::{Sample, ShrinkError};
use candle_core::{Tensor, Var};
use cutover_graph::{Graph, ValueId};

/// A graph with f32 constants of it as variables.
pub(crate) struct Gradients {
    differentiable: Differentiable,
    variables: Vec<Var>,
    logits: ValueId,
}

impl Gradients {
    /// # Errors
    /// A weight that is no tensor of floats.
    pub fn new(graph: &Graph, weights: &[ValueId]) -> Result<Gradients, ShrinkError> {
        let variable = |&id: &ValueId| {
            let name = || graph.value(id).name.clone();
            let refuse = |message: String| ShrinkError::Weight { name: name(), message };
            let constant = graph.constant(id).ok_or_else(|| refuse("is no constant".to_string()))?;
            let tensor = from_host(&constant.tensor).map_err(|fault| refuse(fault.0))?;
            Var::from_tensor(&tensor).map_err(|e| refuse(e.to_string()))
        };
        let variables = weights.iter().map(variable).collect::<Result<Vec<Var>, ShrinkError>>()?;
        let output = graph.outputs().first().copied();
        let output = output.ok_or_else(|| ShrinkError::Option("the model has no output".to_string()))?;
        let differentiable = Differentiable::new(graph.clone(), weights)?;
        Ok(Gradients { differentiable, variables, logits: logits(graph, output) })
    }

    /// The derivatives of the loss on a sample in every weight, in their order; empty for one that the loss does not follow from. The loss is the
    /// cross-entropy with the labels; without labels, the mean square of the first output (of its logits), whose change is the answer's.
    ///
    /// # Errors
    /// A node that can't be differentiated, by name; labels that do not fit.
    pub fn of(&self, sample: &Sample, labels: Option<&[i64]>) -> Result<Vec<Vec<f32>>, ShrinkError> {
        let failed = |fault: Fault| ShrinkError::Training(fault.0);
        let parameters: Vec<Tensor> = self.variables.iter().map(|v| v.as_tensor().clone()).collect();
        let answers = self.differentiable.run(&parameters, sample, &[self.logits], &mut Clear)?;
        let loss = match labels {
            Some(labels) => cross_entropy(&answers[0], labels),
            None => answers[0].zeros_like().and_then(|zeros| mean_square(&answers[0], &zeros)),
        };
        let found = loss.and_then(|loss| loss.backward()).map_err(|e| failed(e.into()))?;
        let gradient = |variable: &Var| match found.get(variable.as_tensor()) {
            Some(gradient) => read(gradient, |view| view.data.to_vec()).map_err(|e| failed(e.into())),
            None => Ok(Vec::new()),
        };
        self.variables.iter().map(gradient).collect()
    }
}
