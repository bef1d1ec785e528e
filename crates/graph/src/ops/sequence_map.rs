//! A graph for every element of a sequence.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Subgraph,
    subgraph::{Run, captured},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// ONNX's `SequenceMap`. Inputs: a sequence; further sequences of its length, or values that every element gets; what the body captures.
/// The outputs are the sequences of what the body gives.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceMap {
    pub body: Subgraph,
}

impl Operator for SequenceMap {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=usize::MAX)?;
        let body = node.subgraph("body")?;
        if body.formal() != node.inputs.len() {
            let (formal, given) = (body.formal(), node.inputs.len());
            return Err(node.corrupt(format!("its body has {formal} inputs, {given} are given")));
        }
        Ok(SequenceMap { body }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("SequenceMap").with("body", self.body.clone())
    }

    fn infer(&self, _: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let output =
            |at: usize| Ok(Fact::Sequence(Box::new(self.body.output_fact(at, context, &format!("output{at}"))?)));
        (0..context.outputs).map(output).collect()
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        context.counting(|context| self.eval_with(inputs, &mut |_, given| self.body.iterate(given, context)))
    }
}

impl SequenceMap {
    pub(super) fn eval_with<E: From<OpError>>(
        &self,
        inputs: Inputs<'_>,
        run: &mut Run<'_, E>,
    ) -> Result<Vec<Value>, E> {
        let formal = self.body.formal();
        let Some(Value::Sequence(first)) = inputs.get(0) else {
            return Err(OpError::input("input 0 must be a sequence").into());
        };
        let outer = captured(&self.body, &inputs, formal)?;
        let mut outputs = vec![Vec::with_capacity(first.len()); self.body.graph().outputs().len()];
        for at in 0..first.len() {
            let given = (0..formal).map(|input| match inputs.get(input) {
                Some(Value::Sequence(values)) => values.get(at).cloned().ok_or_else(|| {
                    let (length, expected) = (values.len(), first.len());
                    OpError::input(format!("input {input} is a sequence of {length} elements, {expected} expected"))
                }),
                Some(value) => Ok(value.clone()),
                None => Err(OpError::input(format!("input {input} is missing"))),
            });
            let mut given: Vec<Value> = given.collect::<Result<_, OpError>>()?;
            given.extend(outer.iter().cloned());
            self.body.check(&given)?;
            for (output, value) in outputs.iter_mut().zip(run(0, given)?) {
                output.push(value);
            }
        }
        Ok(outputs.into_iter().map(Value::Sequence).collect())
    }
}
