//! A graph again and again, with values carried from one iteration to the next.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Subgraph,
    branch::{condition, truth},
    stacked::{Stack, stacked_fact},
    subgraph::{Run, captured, either, own_inputs},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::{Tensor, Value};

/// ONNX's `Loop`. Inputs: the largest number of iterations (optional), the first condition (optional), the carried values, what the body
/// captures. The body takes the iteration's number, the condition and the carried values; it gives the condition, the carried
/// values and elements of the outputs that are stacked over the iterations.
#[derive(Clone, Debug, PartialEq)]
pub struct Repeat {
    pub body: Subgraph,
}

impl Repeat {
    fn carried(&self) -> usize {
        self.body.formal() - 2
    }
}

impl Operator for Repeat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=usize::MAX)?;
        let body = node.subgraph("body")?;
        let (carried, outputs) = (node.inputs.len() - 2, body.graph().outputs().len());
        if body.formal() != carried + 2 || outputs < carried + 1 {
            return Err(node.corrupt(format!(
                "carries {carried} values; its body has {} inputs and {outputs} outputs, {} and at least {} expected",
                body.formal(),
                carried + 2,
                carried + 1
            )));
        }
        Ok(Repeat { body }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Loop").with("body", self.body.clone())
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let carried = own_inputs(&inputs, &[&self.body])?.checked_sub(2).filter(|&c| c == self.carried());
        let carried = carried.ok_or_else(|| OpError::input("another number of carried values than its body has"))?;
        let output = |at: usize| {
            let stem = format!("output{at}");
            let made = self.body.output_fact(at + 1, context, &stem)?;
            if at >= carried {
                return stacked_fact(&made, 0, context.fresh("trips"));
            }
            let initial = inputs.get(2 + at).ok_or_else(|| OpError::input(format!("input {} is missing", 2 + at)))?;
            // An optional may be what begins; what the body gives says what is carried.
            let initial = match (initial, &made) {
                (Fact::Optional(of), made) if !matches!(made, Fact::Optional(_)) => of,
                (initial, _) => initial,
            };
            either(initial, &made, context, &stem).map_err(|e| OpError::input(format!("output {at} {e}")))
        };
        (0..context.outputs).map(output).collect()
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        context.counting(|context| self.eval_with(inputs, context, &mut |_, given| self.body.iterate(given, context)))
    }
}

impl Repeat {
    pub(super) fn eval_with<E: From<OpError>>(
        &self,
        inputs: Inputs<'_>,
        context: &EvalContext,
        run: &mut Run<'_, E>,
    ) -> Result<Vec<Value>, E> {
        let carried = self.carried();
        let trips_max = match inputs.get(0) {
            Some(_) => match inputs.integers(0)?.as_slice() {
                [trips] => Some(*trips),
                other => {
                    return Err(OpError::input(format!("{} numbers of iterations, 1 expected", other.len())).into());
                }
            },
            None => None,
        };
        let mut goes_on = if inputs.get(1).is_some() { condition(&inputs, 1)? } else { true };
        let missing = |at: usize| OpError::input(format!("input {at} is missing"));
        let mut state: Vec<Value> = (2..2 + carried)
            .map(|at| inputs.get(at).cloned().ok_or_else(|| missing(at)))
            .collect::<Result<_, OpError>>()?;
        let outer = captured(&self.body, &inputs, 2 + carried)?;
        let elements = self.body.graph().outputs().len() - 1 - carried;
        let mut stacks: Vec<Stack> = (0..elements).map(|_| Stack::default()).collect();
        let mut trip = 0i64;
        while goes_on && trips_max.is_none_or(|most| trip < most) {
            let mut given =
                vec![Tensor::scalar(trip).into(), Tensor::from_bools([], &[true]).map_err(OpError::from)?.into()];
            given.append(&mut state);
            given.extend(outer.iter().cloned());
            self.body.check(&given)?;
            let mut made = run(0, given)?.into_iter();
            let condition = made.next().and_then(Value::into_tensor);
            goes_on = truth(&condition.ok_or_else(|| OpError::input("the body's condition is not a tensor"))?)?;
            state.extend(made.by_ref().take(carried));
            for (stack, value) in stacks.iter_mut().zip(made) {
                stack.push(value, context)?;
            }
            trip += 1;
        }
        // An optional may be what begins; without an iteration it is what ends.
        let made = &self.body.graph().outputs()[1..];
        for (value, &made) in state.iter_mut().zip(made) {
            if let (Value::Optional(held), false) =
                (&mut *value, matches!(self.body.graph().value(made).fact, Fact::Optional(_)))
            {
                let held =
                    held.take().ok_or_else(|| OpError::input("an optional without an element is carried out"))?;
                *value = *held;
            }
        }
        for (at, stack) in stacks.into_iter().enumerate() {
            let element = &self.body.graph().value(self.body.graph().outputs()[1 + carried + at]).fact;
            state.push(stack.finish(0, false, element)?.into());
        }
        Ok(state)
    }
}
