//! Permutation of axes.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::Value;

/// Axis `i` of the result is axis `permutation[i]` of the input; without one, the axes are reversed.
#[derive(Clone, Debug, PartialEq)]
pub struct Transpose {
    pub permutation: Option<Vec<usize>>,
}

impl Transpose {
    /// The permutation for an input of `rank` axes.
    pub fn permutation(&self, rank: usize) -> Result<Vec<usize>, OpError> {
        match &self.permutation {
            None => Ok((0..rank).rev().collect()),
            Some(p) if p.len() == rank => Ok(p.clone()),
            Some(p) => Err(OpError::input(format!("a permutation of {} axes, the input has {rank}", p.len()))),
        }
    }

    fn moved(&self, shape: &[usize]) -> Result<movement::Moved, OpError> {
        let permutation = self.permutation(shape.len())?;
        let strides = movement::strides(shape);
        let to = permutation.iter().map(|&a| shape[a]).collect();
        Ok(movement::strided(to, permutation.iter().map(|&a| strides[a] as isize).collect(), 0))
    }
}

impl Operator for Transpose {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let Some(given) = node.optional_ints("perm")? else { return Ok(Transpose { permutation: None }.into()) };
        let permutation: Vec<usize> = given.iter().map(|&a| usize::try_from(a).unwrap_or(usize::MAX)).collect();
        let mut sorted = permutation.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..permutation.len()) {
            return Err(node.corrupt(format!("perm {given:?} is not a permutation of 0 to {}", given.len())));
        }
        Ok(Transpose { permutation: Some(permutation) }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Transpose");
        match &self.permutation {
            Some(p) => spelling.with("perm", p.iter().map(|&a| a as i64).collect::<Vec<_>>()),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = match &x.shape {
            Some(shape) => Some(self.permutation(shape.len())?.into_iter().map(|a| shape[a].clone()).collect()),
            None => None,
        };
        movement::moved_fact(x, shape, |shape| self.moved(shape))
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        self.moved(shape)?.apply(x)
    }
}
