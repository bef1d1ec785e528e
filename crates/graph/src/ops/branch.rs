//! One of two graphs, as a condition says.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Subgraph,
    subgraph::{Run, captured, either},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// ONNX's `If`: the outputs of `then_branch` where the condition holds, else those of `else_branch`. Inputs: the condition, one bool; what
/// `then_branch` captures; what `else_branch` captures.
#[derive(Clone, Debug, PartialEq)]
pub struct Branch {
    pub then_branch: Subgraph,
    pub else_branch: Subgraph,
}

impl Operator for Branch {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let (then_branch, else_branch) = (node.subgraph("then_branch")?, node.subgraph("else_branch")?);
        for branch in [&then_branch, &else_branch] {
            if branch.formal() > 0 {
                return Err(node.corrupt(format!("branch '{}' has inputs, none expected", branch.graph().name)));
            }
        }
        Ok(Branch { then_branch, else_branch }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("If").with("then_branch", self.then_branch.clone()).with("else_branch", self.else_branch.clone())
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let chosen = inputs.tensor(0)?.constant_value().and_then(|v| v.first().copied());
        let output = |at: usize| {
            let stem = format!("output{at}");
            let of = |branch: &Subgraph| branch.output_fact(at, context, &stem);
            match chosen {
                Some(0) => of(&self.else_branch),
                Some(_) => of(&self.then_branch),
                None => either(&of(&self.then_branch)?, &of(&self.else_branch)?, context, &stem)
                    .map_err(|e| OpError::input(format!("output {at} {e}"))),
            }
        };
        (0..context.outputs).map(output).collect()
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let run = |context: &EvalContext| {
            self.eval_with(inputs, &mut |which, given| self.subgraphs()[which].iterate(given, context))
        };
        context.counting(run)
    }
}

impl Branch {
    pub(super) fn subgraphs(&self) -> [&Subgraph; 2] {
        [&self.then_branch, &self.else_branch]
    }

    pub(super) fn eval_with<E: From<OpError>>(
        &self,
        inputs: Inputs<'_>,
        run: &mut Run<'_, E>,
    ) -> Result<Vec<Value>, E> {
        let (which, from) = match condition(&inputs, 0)? {
            true => (0, 1),
            false => (1, 1 + self.then_branch.captured()),
        };
        run(which, captured(self.subgraphs()[which], &inputs, from)?)
    }
}

/// The one bool of the tensor at `index`.
pub(super) fn condition(inputs: &Inputs<'_>, index: usize) -> Result<bool, OpError> {
    truth(inputs.tensor(index)?)
}

pub(super) fn truth(tensor: &cutover_tensor::Tensor) -> Result<bool, OpError> {
    match tensor.to_bools()?.as_slice() {
        [condition] => Ok(*condition),
        other => Err(OpError::input(format!("a condition of {} elements, 1 expected", other.len()))),
    }
}
