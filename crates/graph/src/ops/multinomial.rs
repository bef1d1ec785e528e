//! Classes drawn by their probabilities.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, checked_shape,
    randomness::{Stream, float_seed},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// Of every row of `[n, classes]` unnormalised logarithms of probabilities, `sample_size` classes drawn with replacement:
/// `[n, sample_size]` of i32 or i64. Which ones, `randomness` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Multinomial {
    pub sample_size: usize,
    pub is_long: bool,
    pub seed: f32,
}

impl Operator for Multinomial {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let code = node.int("dtype", DType::I32.onnx_code().into())?;
        let is_long = code == i64::from(DType::I64.onnx_code());
        if !is_long && code != i64::from(DType::I32.onnx_code()) {
            return Err(node.corrupt(format!("dtype {code}, expected 6 or 7 (i32 or i64)")));
        }
        Ok(Multinomial { sample_size: node.count("sample_size", 1)?, is_long, seed: float_seed(node)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Multinomial")
            .with("sample_size", self.sample_size as i64)
            .with("dtype", i64::from(self.dtype().onnx_code()))
            .with("seed", self.seed)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let rows = match x.shape.as_deref() {
            Some([rows, _]) => rows.clone(),
            None => context.fresh("rows"),
            Some(_) => return Err(OpError::input(format!("expected [n, classes], got {x}"))),
        };
        Ok(vec![TensorFact::new(self.dtype(), [rows, Dim::from(self.sample_size)]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let &[rows, classes] = x.shape().dims() else {
            return Err(OpError::input(format!("expected [n, classes], got {}", x.shape())));
        };
        let shape = checked_shape(vec![rows, self.sample_size], context)?;
        let logarithms = Wide::floats(x)?;
        let mut stream = Stream::of_float(self.seed);
        let mut drawn = Vec::with_capacity(shape.element_count());
        for row in 0..rows {
            let row = &logarithms[row * classes..(row + 1) * classes];
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let mut sum = 0.0;
            let sums: Vec<f64> = row
                .iter()
                .map(|x| {
                    sum += (x - largest).exp();
                    sum
                })
                .collect();
            if !(sum > 0.0 && sum.is_finite()) {
                return Err(OpError::input("a row of logarithms of which none is that of a probability"));
            }
            drawn.extend((0..self.sample_size).map(|_| {
                let at = stream.uniform() * sum;
                // What is drawn lies below the sum, so that some class is above it.
                sums.partition_point(|&s| s <= at).min(classes - 1) as i128
            }));
        }
        Ok(vec![Wide::Int(drawn).narrow(self.dtype(), shape)?.into()])
    }
}

impl Multinomial {
    fn dtype(&self) -> DType {
        if self.is_long { DType::I64 } else { DType::I32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, run, tensor};

    #[test]
    fn classes_come_as_often_as_is_probable() {
        let op = Multinomial { sample_size: 20_000, is_long: true, seed: 1.0 };
        // Probabilities of 0.2, 0, 0.5 and 0.3, times four.
        let x = [0.8f32.ln(), f32::NEG_INFINITY, 2f32.ln(), 1.2f32.ln()];
        let results = run(&op.into(), &[Some(f32s(&[1, 4], &x))], 1).unwrap();
        let classes: Vec<i64> = results[0].as_tensor().unwrap().to_vec().unwrap();
        for (class, p) in [0.2f64, 0.0, 0.5, 0.3].into_iter().enumerate() {
            let share = classes.iter().filter(|&&c| c == class as i64).count() as f64 / 20_000.0;
            // Four standard errors.
            assert!((share - p).abs() <= 4.0 * (p * (1.0 - p) / 20_000.0).sqrt(), "class {class}: {share}");
        }
    }

    #[test]
    fn certain_classes() {
        let infinite = f32::NEG_INFINITY;
        let certain = || case("Multinomial", 7).input(f32s(&[2, 2], &[infinite, -900.0, 3.0, infinite]));
        certain().with("sample_size", 2).gives([tensor::<i32>(&[2, 2], &[1, 1, 0, 0])]);
        certain().with("dtype", 7).gives([tensor::<i64>(&[2, 1], &[1, 0])]);
        case("Multinomial", 7).input(f32s(&[1, 1], &[infinite])).fails("none is that of a probability");
        case("Multinomial", 7).input(f32s(&[1, 0], &[])).fails("none is that of a probability");
        case("Multinomial", 7).wave(&[2]).fails("expected [n, classes]");
    }
}
