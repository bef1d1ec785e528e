//! Rows scaled to a norm of 1.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ML_DOMAIN, Rows, f32_values, numeric, row_dim},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// Each row of `x` (`[n, features]`, or one row) divided by its norm, in f32. A row whose norm is 0 stays as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer {
    pub norm: RowNorm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowNorm {
    /// The largest element (not its magnitude).
    Max,
    /// `Σ |x|`
    L1,
    /// `√Σ x²`
    L2,
}

const NORMS: [(RowNorm, &str); 3] = [(RowNorm::Max, "MAX"), (RowNorm::L1, "L1"), (RowNorm::L2, "L2")];

impl RowNorm {
    pub fn of(self, row: &[f32]) -> f64 {
        let wide = row.iter().map(|&x| f64::from(x));
        match self {
            RowNorm::Max => wide.fold(f64::NEG_INFINITY, f64::max),
            RowNorm::L1 => wide.map(f64::abs).sum(),
            RowNorm::L2 => wide.map(|x| x * x).sum::<f64>().sqrt(),
        }
    }
}

impl Operator for Normalizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let name = node.string("norm", "MAX")?;
        match NORMS.iter().find(|(_, n)| *n == name) {
            Some(&(norm, _)) => Ok(Normalizer { norm }.into()),
            None => Err(node.corrupt(format!("norm '{name}', expected MAX, L1 or L2"))),
        }
    }

    fn export(&self) -> Spelling {
        Spelling::new("Normalizer").in_domain(ML_DOMAIN).with("norm", NORMS[self.norm as usize].1)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = numeric(inputs, 0)?;
        row_dim(x, None, context)?;
        Ok(vec![TensorFact { dtype: DType::F32, shape: x.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let rows = Rows::of(x)?;
        let values = f32_values(x)?;
        let normalised = values.chunks(rows.features.max(1)).flat_map(|row| {
            let norm = self.norm.of(row);
            let divisor = if norm == 0.0 { 1.0 } else { norm };
            row.iter().map(move |&x| f64::from(x) / divisor)
        });
        Ok(vec![Wide::Float(normalised.collect()).narrow(DType::F32, x.shape().clone())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        let values = [1.0, 2.0, -3.0, 0.0, 0.0, 0.0, -1.0, -2.0, -4.0];
        for (norm, expected) in [
            ("MAX", [0.5, 1.0, -1.5, 0.0, 0.0, 0.0, 1.0, 2.0, 4.0]),
            ("L1", [0.166_666_7, 0.333_333_3, -0.5, 0.0, 0.0, 0.0, -0.142_857_1, -0.285_714_3, -0.571_428_6]),
            ("L2", [0.267_261_2, 0.534_522_5, -0.801_783_7, 0.0, 0.0, 0.0, -0.218_217_9, -0.436_435_8, -0.872_871_6]),
        ] {
            let normalizer = || case("ai.onnx.ml.Normalizer", 1).with("norm", norm);
            normalizer().input(f32s(&[3, 3], &values)).gives([f32s(&[3, 3], &expected)]);
            normalizer().input(f32s(&[3], &values[..3])).gives([f32s(&[3], &expected[..3])]);
            let whole = values.map(|v| v as i64);
            normalizer().input(tensor::<i64>(&[3, 3], &whole)).gives([f32s(&[3, 3], &expected)]);
            normalizer().input(f32s(&[2, 0], &[])).gives([f32s(&[2, 0], &[])]);
        }
        case("ai.onnx.ml.Normalizer", 1).with("norm", "L3").wave(&[1, 2]).fails("L3");
        case("ai.onnx.ml.Normalizer", 1).wave(&[1, 2, 2]).fails("rows of features");
    }
}
