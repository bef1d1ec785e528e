//! Coins of given probabilities.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    randomness::{Stream, float_seed, probability},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// 1 with the probability that the input's element is, else 0. Which elements, `randomness` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Bernoulli {
    /// `None` for the input's type.
    pub dtype: Option<DType>,
    pub seed: f32,
}

impl Operator for Bernoulli {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let dtype = match node.optional_int("dtype")? {
            None => None,
            Some(code) => {
                let dtype = i32::try_from(code).ok().and_then(DType::from_onnx_code);
                Some(dtype.ok_or_else(|| node.corrupt(format!("dtype {code} is not one of ONNX's")))?)
            }
        };
        if let Some(dtype) = dtype.filter(|&dtype| zeros_and_ones(dtype, Vec::new()).is_none()) {
            return Err(node.unsupported(format!("zeros and ones of {dtype}")));
        }
        Ok(Bernoulli { dtype, seed: float_seed(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Bernoulli").with("seed", self.seed);
        match self.dtype {
            Some(dtype) => spelling.with("dtype", i64::from(dtype.onnx_code())),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let p = inputs.tensor(0)?;
        Ok(vec![TensorFact { dtype: self.dtype.unwrap_or(p.dtype), shape: p.shape.clone(), value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let p = inputs.tensor(0)?;
        let dtype = self.dtype.unwrap_or(p.dtype());
        let mut stream = Stream::of_float(self.seed);
        let mut coin = |p: f64| probability(p).map(|p| stream.uniform() < p);
        let coins = Wide::floats(p)?.into_iter().map(&mut coin).collect::<Result<Vec<bool>, _>>()?;
        let wide = zeros_and_ones(dtype, coins);
        let wide = wide.ok_or_else(|| OpError::unsupported(format!("zeros and ones of {dtype}")))?;
        Ok(vec![wide.narrow(dtype, p.shape().clone())?.into()])
    }
}

fn zeros_and_ones(dtype: DType, coins: Vec<bool>) -> Option<Wide> {
    match dtype {
        DType::Bool => Some(Wide::Bool(coins)),
        DType::String | DType::Complex64 | DType::Complex128 | DType::F8E8M0 => None,
        dtype if dtype.is_float() => Some(Wide::Float(coins.into_iter().map(|c| f64::from(u8::from(c))).collect())),
        _ => Some(Wide::Int(coins.into_iter().map(i128::from).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, run, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn as_many_ones_as_is_probable() {
        let p: Vec<f32> = (0..20_000).map(|i| [0.0, 0.1, 0.7, 1.0][i % 4]).collect();
        let op = Bernoulli { dtype: Some(DType::I32), seed: 3.0 };
        let results = run(&op.into(), &[Some(f32s(&[20_000], &p))], 1).unwrap();
        let coins: Vec<i32> = results[0].as_tensor().unwrap().to_vec().unwrap();
        for (place, expected) in [(0, 0.0), (1, 0.1), (2, 0.7), (3, 1.0)] {
            let share = coins.iter().skip(place).step_by(4).sum::<i32>() as f64 / 5_000.0;
            // Four standard errors of 5,000 draws.
            assert!((share - expected).abs() <= 4.0 * (expected * (1.0 - expected) / 5_000.0).sqrt(), "{share}");
        }
    }

    #[test]
    fn certain_coins() {
        let certain = |opset| case("Bernoulli", opset).input(f32s(&[2], &[0.0, 1.0]));
        certain(15).gives([f32s(&[2], &[0.0, 1.0])]);
        certain(22).with("dtype", 9).with("seed", 2.0f32).gives([Tensor::from_bools([2], &[false, true]).unwrap()]);
        certain(22).with("dtype", 7).gives([tensor::<i64>(&[2], &[0, 1])]);
        certain(22).with("dtype", 8).fails("zeros and ones of string");
        case("Bernoulli", 15).input(f32s(&[1], &[1.5])).fails("1.5 is no probability");
        case("Bernoulli", 15).input(f32s(&[1], &[f32::NAN])).fails("NaN is no probability");
    }
}
