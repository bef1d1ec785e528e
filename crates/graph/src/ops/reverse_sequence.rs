//! Sequences of several lengths, each backwards.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, select};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `x [time, batch, …]` (or `[batch, time, …]`) and `lengths [batch]`: the first so many elements of every sequence in reverse
/// order, what comes after them as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ReverseSequence {
    pub batch_first: bool,
}

impl Operator for ReverseSequence {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let axes = (node.int("batch_axis", 1)?, node.int("time_axis", 0)?);
        match axes {
            (0, 1) | (1, 0) => Ok(ReverseSequence { batch_first: axes.0 == 0 }.into()),
            (batch, time) => {
                Err(node.corrupt(format!("'batch_axis' and 'time_axis' must be 0 and 1, got {batch} and {time}")))
            }
        }
    }

    fn export(&self) -> Spelling {
        let batch = i64::from(!self.batch_first);
        Spelling::new("ReverseSequence").with("batch_axis", batch).with("time_axis", 1 - batch)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        movement::known_integers(inputs, 1)?;
        if x.rank().is_some_and(|rank| rank < 2) {
            return Err(OpError::input(format!("expected [time, batch, …], got {x}")));
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let [first, second, rest @ ..] = shape else {
            return Err(OpError::input(format!("expected [time, batch, …], got shape {}", x.shape())));
        };
        let (batch, time) = if self.batch_first { (*first, *second) } else { (*second, *first) };
        let lengths = inputs.integers(1)?;
        if lengths.len() != batch {
            return Err(OpError::input(format!("{} lengths for {batch} sequences", lengths.len())));
        }
        let within = |&l: &i64| usize::try_from(l).ok().filter(|&l| l <= time);
        let lengths: Option<Vec<usize>> = lengths.iter().map(within).collect();
        let lengths = lengths.ok_or_else(|| OpError::input(format!("a length outside 0 to {time}")))?;
        let inner: usize = rest.iter().product();
        let sources = (0..x.element_count()).map(|n| {
            let (outer, second, within) = (n / inner / shape[1], n / inner % shape[1], n % inner);
            let (b, t) = if self.batch_first { (outer, second) } else { (second, outer) };
            let t = if t < lengths[b] { lengths[b] - 1 - t } else { t };
            let (outer, second) = if self.batch_first { (b, t) } else { (t, b) };
            (outer * shape[1] + second) * inner + within
        });
        Ok(vec![select(x, shape, sources)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        let x: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let time_first = case("ReverseSequence", 10).input(f32s(&[4, 2], &x)).input(tensor::<i64>(&[2], &[3, 4]));
        time_first.gives([f32s(&[4, 2], &[4., 7., 2., 5., 0., 3., 6., 1.])]);
        let batch_first = case("ReverseSequence", 10).with("batch_axis", 0).with("time_axis", 1);
        batch_first
            .input(f32s(&[2, 2, 2], &x))
            .input(tensor::<i64>(&[2], &[2, 0]))
            .gives([f32s(&[2, 2, 2], &[2., 3., 0., 1., 4., 5., 6., 7.])]);
        case("ReverseSequence", 10).wave(&[0, 0]).input(tensor::<i64>(&[0], &[])).gives([f32s(&[0, 0], &[])]);
    }

    #[test]
    fn refuses_lengths_that_do_not_fit() {
        let node = |lengths: &[i64]| case("ReverseSequence", 10).wave(&[4, 2]).input(tensor(&[lengths.len()], lengths));
        node(&[5, 0]).fails("a length outside 0 to 4");
        node(&[1]).fails("1 lengths for 2 sequences");
        node(&[1, 1]).with("batch_axis", 0).fails("must be 0 and 1");
    }
}
