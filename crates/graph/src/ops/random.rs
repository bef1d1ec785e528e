//! Numbers drawn from a distribution.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, checked_shape,
    randomness::{Stream, float_dtype, float_seed, is_drawn},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// Independent numbers: RandomUniform and RandomNormal of the given shape, their `…Like` forms of the shape of the input. Which numbers,
/// `randomness` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Random {
    pub distribution: Distribution,
    /// `None` in a `…Like` form that takes its input's type.
    pub dtype: Option<DType>,
    /// `None` in a `…Like` form.
    pub shape: Option<Vec<i64>>,
    pub seed: f32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// From `[low, high)`, before it is rounded to the result's type.
    Uniform {
        low: f32,
        high: f32,
    },
    Normal {
        mean: f32,
        scale: f32,
    },
}

impl Operator for Random {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let is_like = node.op_type.ends_with("Like");
        let inputs = usize::from(is_like);
        node.expect_inputs(inputs..=inputs)?;
        let distribution = match node.op_type.starts_with("RandomUniform") {
            true => Distribution::Uniform { low: node.float("low", 0.0)?, high: node.float("high", 1.0)? },
            false => Distribution::Normal { mean: node.float("mean", 0.0)?, scale: node.float("scale", 1.0)? },
        };
        let dtype = float_dtype(node)?.or((!is_like).then_some(DType::F32));
        let shape = match is_like {
            true => None,
            false => Some(node.optional_ints("shape")?.ok_or_else(|| node.corrupt("attribute 'shape' is missing"))?),
        };
        if let Some(extent) = shape.iter().flatten().find(|&&extent| extent < 0) {
            return Err(node.corrupt(format!("an extent of {extent}")));
        }
        Ok(Random { distribution, dtype, shape, seed: float_seed(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let name = match (self.distribution, &self.shape) {
            (Distribution::Uniform { .. }, Some(_)) => "RandomUniform",
            (Distribution::Uniform { .. }, None) => "RandomUniformLike",
            (Distribution::Normal { .. }, Some(_)) => "RandomNormal",
            (Distribution::Normal { .. }, None) => "RandomNormalLike",
        };
        let mut spelling = match self.distribution {
            Distribution::Uniform { low, high } => Spelling::new(name).with("low", low).with("high", high),
            Distribution::Normal { mean, scale } => Spelling::new(name).with("mean", mean).with("scale", scale),
        };
        if let Some(dtype) = self.dtype {
            spelling = spelling.with("dtype", i64::from(dtype.onnx_code()));
        }
        if let Some(shape) = &self.shape {
            spelling = spelling.with("shape", shape.clone());
        }
        spelling.with("seed", self.seed)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let fact = match &self.shape {
            Some(shape) => {
                let dims: Vec<Dim> = shape.iter().copied().map(Dim::Const).collect();
                TensorFact::new(self.dtype_of(DType::F32)?, dims)
            }
            None => {
                let x = inputs.tensor(0)?;
                TensorFact { dtype: self.dtype_of(x.dtype)?, shape: x.shape.clone(), value: None }
            }
        };
        Ok(vec![fact.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (dtype, shape) = match &self.shape {
            Some(shape) => (self.dtype_of(DType::F32)?, super::expand::extents(shape)?),
            None => {
                let x = inputs.tensor(0)?;
                (self.dtype_of(x.dtype())?, x.shape().to_vec())
            }
        };
        let shape = checked_shape(shape, context)?;
        let mut stream = Stream::of_float(self.seed);
        let draw = |_| match self.distribution {
            Distribution::Uniform { low, high } => {
                f64::from(low) + stream.uniform() * (f64::from(high) - f64::from(low))
            }
            Distribution::Normal { mean, scale } => f64::from(mean) + stream.normal() * f64::from(scale),
        };
        let numbers = (0..shape.element_count()).map(draw).collect();
        Ok(vec![Wide::Float(numbers).narrow(dtype, shape)?.into()])
    }
}

impl Random {
    fn dtype_of(&self, input: DType) -> Result<DType, OpError> {
        let dtype = self.dtype.unwrap_or(input);
        match is_drawn(dtype) {
            true => Ok(dtype),
            false => Err(OpError::input(format!("random numbers of type {dtype}: attribute 'dtype' must say another"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, run, tensor};

    fn drawn(op: Random) -> Vec<f64> {
        let results = run::<Value>(&op.into(), &[], 1).unwrap();
        Wide::floats(results[0].as_tensor().unwrap()).unwrap()
    }

    fn check(distribution: Distribution, mean: f64, deviation: f64, within: (f64, f64)) {
        let draw = |seed| drawn(Random { distribution, dtype: Some(DType::F64), shape: Some(vec![100, 200]), seed });
        let numbers = draw(7.0);
        assert_eq!(numbers, draw(7.0));
        assert_ne!(numbers, draw(8.0));
        let count = numbers.len() as f64;
        let actual = numbers.iter().sum::<f64>() / count;
        let variance = numbers.iter().map(|x| (x - actual).powi(2)).sum::<f64>() / count;
        // Four standard errors of 20,000 draws, and of their spread.
        assert!((actual - mean).abs() < 4.0 * deviation / count.sqrt(), "mean {actual}");
        assert!((variance.sqrt() / deviation - 1.0).abs() < 0.03, "deviation {}", variance.sqrt());
        assert!(numbers.iter().all(|&x| within.0 <= x && x < within.1));
        // Neighbours have nothing to do with each other.
        let products: f64 = numbers.windows(2).map(|w| (w[0] - mean) * (w[1] - mean)).sum();
        assert!((products / count / variance).abs() < 4.0 / count.sqrt());
    }

    #[test]
    fn distributions_are_what_they_are_called() {
        check(Distribution::Uniform { low: -1.0, high: 3.0 }, 1.0, 4.0 / 12f64.sqrt(), (-1.0, 3.0));
        check(Distribution::Normal { mean: 2.0, scale: 0.5 }, 2.0, 0.5, (f64::MIN, f64::MAX));
    }

    #[test]
    fn shapes_and_types_are_read() {
        case("RandomUniform", 22).with("shape", vec![2, 3]).with("high", 0.0f32).gives([f32s(&[2, 3], &[0.0; 6])]);
        let constant = |op| case(op, 1).with("scale", 0.0f32).with("mean", 2.0f32);
        constant("RandomNormalLike").wave(&[2]).gives([f32s(&[2], &[2.0; 2])]);
        let typed = constant("RandomNormalLike").with("dtype", 11).input(tensor::<i64>(&[2], &[1, 2]));
        typed.gives([tensor::<f64>(&[2], &[2.0; 2])]);
        constant("RandomNormal").with("shape", vec![0, 4]).gives([f32s(&[0, 4], &[])]);
        case("RandomNormalLike", 1).input(tensor::<i64>(&[1], &[1])).fails("attribute 'dtype' must say another");
        case("RandomNormal", 1).with("shape", vec![-1]).fails("an extent of -1");
        case("RandomNormal", 1).with("shape", vec![1 << 40, 1 << 40]).fails("above");
        case("RandomUniform", 1).fails("'shape' is missing");
        case("RandomUniform", 1).with("shape", vec![1]).with("dtype", 7).fails("dtype 7");
    }
}
