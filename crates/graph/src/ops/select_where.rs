//! Choice between two tensors, element by element.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, broadcast_index, broadcast_shape,
    elementwise_fact, select_from,
};
use crate::{Dim, Fact, ImportError, OpError};
use cutover_tensor::{DType, Value};

/// `condition ? x : y`, elementwise after broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct Where;

impl Operator for Where {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        Ok(Where.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Where")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (condition, x, y) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        if condition.dtype != DType::Bool || x.dtype != y.dtype {
            let got = format!("{}, {} and {}", condition.dtype, x.dtype, y.dtype);
            return Err(OpError::input(format!("expected bool and two of one type, got {got}")));
        }
        let pick = |v: &[&Dim]| match v[0].as_const() {
            Some(0) => Some(v[2].clone()),
            Some(_) => Some(v[1].clone()),
            None => (v[1] == v[2]).then(|| v[1].clone()),
        };
        Ok(vec![elementwise_fact(&[condition, x, y], x.dtype, pick)?])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (condition, x, y) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let shape = broadcast_shape(&[condition.shape(), x.shape(), y.shape()])?;
        let truth = condition.to_bools()?;
        let conditions = broadcast_index(condition.shape(), &shape).map(|i| truth[i]);
        let sources = broadcast_index(x.shape(), &shape).zip(broadcast_index(y.shape(), &shape));
        let sources = conditions.zip(sources).map(|(c, (i, j))| if c { (0, i) } else { (1, j) });
        Ok(vec![select_from(&[x, y], shape.clone(), sources)?.into()])
    }
}
