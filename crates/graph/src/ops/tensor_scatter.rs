//! New elements written into a cache.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, conv::differ, movement,
    normalize_axis, select_from,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// The cache `[b, …]`, and in it along `axis` the elements of an update that differs in that axis alone, from the index that the third
/// input has for each sample, 0 without it. A circular cache goes on at its start.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorScatter {
    pub axis: i64,
    pub is_circular: bool,
}

impl TensorScatter {
    fn axis(&self, rank: usize) -> Result<usize, OpError> {
        match normalize_axis(self.axis, rank)? {
            0 => Err(OpError::input("the first axis is that of samples, none of a cache")),
            axis => Ok(axis),
        }
    }
}

impl Operator for TensorScatter {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let axis = node.int("axis", -2)?;
        let is_circular = match node.string("mode", "linear")?.as_str() {
            "linear" => false,
            "circular" => true,
            other => return Err(node.corrupt(format!("mode '{other}', expected linear or circular"))),
        };
        Ok(TensorScatter { axis, is_circular }.into())
    }

    fn export(&self) -> Spelling {
        let mode = if self.is_circular { "circular" } else { "linear" };
        Spelling::new("TensorScatter").since(24).with("axis", self.axis).with("mode", mode)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (cache, update) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        inputs.optional_tensor(2)?;
        if let (Some(from), Some(to)) = (&update.shape, &cache.shape) {
            let axis = self.axis(to.len())?;
            let mut others = from.iter().zip(to).enumerate().filter(|(i, _)| *i != axis);
            if from.len() != to.len() || others.any(|(_, (a, b))| differ(a, b)) {
                return Err(OpError::input(format!("an update {update} of {cache}, along axis {axis}")));
            }
        }
        Ok(vec![TensorFact { value: None, ..cache.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (cache, shape) = movement::source(inputs)?;
        let update = inputs.tensor(1)?;
        let axis = self.axis(shape.len())?;
        let (rows, extent, inner) = movement::around(shape, axis);
        let mut expected = shape.to_vec();
        let length = update.shape().dims().get(axis).copied().unwrap_or(usize::MAX);
        expected[axis] = length;
        if update.shape().dims() != expected || length > extent {
            return Err(OpError::input(format!(
                "an update {} of {}, along axis {axis}",
                update.shape(),
                cache.shape()
            )));
        }
        let starts = match inputs.get(2) {
            None => vec![0; shape[0]],
            Some(_) => inputs.integers(2)?,
        };
        let mut sources: Vec<(usize, usize)> = (0..cache.element_count()).map(|i| (0, i)).collect();
        if starts.len() != shape[0] {
            return Err(OpError::input(format!("{} places for {} samples", starts.len(), shape[0])));
        }
        let rows = if update.element_count() == 0 { 0 } else { rows };
        for row in 0..rows {
            let start = starts[row / (rows / shape[0])];
            let last = start.checked_add(length as i64).filter(|&last| last <= extent as i64);
            if start < 0 || (last.is_none() && !self.is_circular) {
                return Err(OpError::input(format!("{length} elements at {start} in a cache of {extent}")));
            }
            for at in 0..length {
                let to = (start as usize % extent + at) % extent;
                for i in 0..inner {
                    sources[(row * extent + to) * inner + i] = (1, (row * length + at) * inner + i);
                }
            }
        }
        Ok(vec![select_from(&[cache, update], cache.shape().clone(), sources.into_iter())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, tensor};

    fn of(starts: &[i64]) -> Case {
        let cache = tensor::<i32>(&[2, 3, 1], &[1, 2, 3, 4, 5, 6]);
        let update = tensor::<i32>(&[2, 2, 1], &[10, 20, 30, 40]);
        case("TensorScatter", 24).input(cache).input(update).input(tensor::<i64>(&[starts.len()], starts))
    }

    #[test]
    fn every_sample_has_its_place() {
        of(&[1, 0]).gives([tensor::<i32>(&[2, 3, 1], &[1, 10, 20, 30, 40, 6])]);
        of(&[2, 4]).with("mode", "circular").gives([tensor::<i32>(&[2, 3, 1], &[20, 2, 10, 4, 30, 40])]);
        of(&[2, 0]).fails("2 elements at 2 in a cache of 3");
        of(&[-1, 0]).with("mode", "circular").fails("2 elements at -1");
        of(&[0, 0]).with("axis", 0).fails("the first axis");
        of(&[0]).fails("1 places for 2 samples");
    }
}
