//! Triangles of matrices.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `x [*, rows, columns]` and `k` (0): the elements of every matrix on and above its `k`-th diagonal, or on and below it, and zeros
/// elsewhere. Diagonals are counted from the main one, those above it positive.
#[derive(Clone, Debug, PartialEq)]
pub struct Trilu {
    pub upper: bool,
}

impl Operator for Trilu {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=2)?;
        Ok(Trilu { upper: node.flag("upper", true)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Trilu").with("upper", i64::from(self.upper))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if inputs.get(1).is_some() {
            movement::known_integer(inputs, 1)?;
        }
        check_matrices(x.rank().unwrap_or(2))?;
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        check_matrices(shape.len())?;
        let k = inputs.get(1).map_or(Ok(0), |_| movement::integer(inputs, 1))?;
        let (rows, columns) = (shape[shape.len() - 2].max(1), shape[shape.len() - 1].max(1));
        let sources = (0..x.element_count()).map(|i| {
            let (row, column) = (i / columns % rows, i % columns);
            let above = (column as i64 - row as i64).cmp(&k);
            (if self.upper { above.is_ge() } else { above.is_le() }).then_some(i)
        });
        movement::fill(x, shape, None, sources)
    }
}

fn check_matrices(rank: usize) -> Result<(), OpError> {
    match rank {
        0 | 1 => Err(OpError::input(format!("expected matrices, got a tensor of rank {rank}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = || tensor::<i64>(&[2, 3], &[1, 2, 3, 4, 5, 6]);
        let cases: [(i64, i64, [i64; 6]); 6] = [
            (1, 0, [1, 2, 3, 0, 5, 6]),
            (1, 1, [0, 2, 3, 0, 0, 6]),
            (1, -1, [1, 2, 3, 4, 5, 6]),
            (0, 0, [1, 0, 0, 4, 5, 0]),
            (0, -2, [0; 6]),
            (0, i64::MAX, [1, 2, 3, 4, 5, 6]),
        ];
        for (upper, k, expected) in cases {
            let node = case("Trilu", 14).with("upper", upper).input(x()).input(Tensor::scalar(k));
            node.gives([tensor::<i64>(&[2, 3], &expected)]);
        }
        let batches = tensor::<i32>(&[2, 2, 1], &[1, 2, 3, 4]);
        case("Trilu", 14).input(batches).gives([tensor::<i32>(&[2, 2, 1], &[1, 0, 3, 0])]);
        case("Trilu", 14).wave(&[3, 0]).gives([tensor::<f32>(&[3, 0], &[])]);
        case("Trilu", 14).wave(&[3]).fails("expected matrices");
    }
}
