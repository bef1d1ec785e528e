//! Dropout, which does nothing at inference.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    randomness::{Stream, integer_seed},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// Inputs `x`, optional `ratio` (0.5 without it) and optional `training_mode`. In training each element of `x` is dropped with
/// probability `ratio`, and those kept are divided by `1 − ratio`; otherwise `y = x`. The mask says what was kept. Which elements
/// are dropped, `randomness` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropout {
    pub seed: i64,
    /// The mask has the type of `x`, as before opset 10.
    pub mask_as_data: bool,
}

impl Operator for Dropout {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(if node.opset < 12 { 1..=1 } else { 1..=3 })?;
        if node.opset < 12 {
            let ratio = node.float("ratio", 0.5)?;
            // Opset 7 took this away, and training with it.
            let is_training = node.opset < 7 && node.int("is_test", 0)? == 0;
            if is_training {
                node.push_constant(1, Tensor::scalar(ratio));
                node.push_constant(2, Tensor::from_bools([], &[true]).map_err(|e| node.corrupt(e.to_string()))?);
            }
        }
        let mask_as_data = node.opset < 10 && node.outputs > 1;
        let seed = integer_seed(node)?;
        Ok(Dropout { seed, mask_as_data }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Dropout").with("seed", self.seed);
        // No newer form gives such a mask, and the old one has no seed.
        if self.mask_as_data { Spelling::new("Dropout").until(9) } else { spelling }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let dtype = if self.mask_as_data { x.dtype } else { DType::Bool };
        let mask = TensorFact { dtype, shape: x.shape.clone(), value: None };
        let is_inference = match inputs.optional_tensor(2)? {
            Some(training) => training.constant_value().is_some_and(|v| v == [0]),
            None => true,
        };
        let value = x.value.clone().filter(|_| is_inference);
        Ok(vec![TensorFact { value, ..x.clone() }.into(), mask.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let is_training = match inputs.optional_tensor(2)? {
            None => false,
            Some(training) => match training.to_bools()?[..] {
                [training] => training,
                _ => return Err(OpError::input(format!("training_mode must be one boolean, got {training:?}"))),
            },
        };
        let ratio = match inputs.optional_tensor(1)? {
            None => 0.5,
            Some(ratio) => match Wide::floats(ratio)?[..] {
                [ratio] => ratio,
                _ => return Err(OpError::input(format!("ratio must be one number, got {ratio:?}"))),
            },
        };
        if is_training && !(0.0..1.0).contains(&ratio) {
            return Err(OpError::input(format!("ratio must be 0 or more and below 1, got {ratio}")));
        }
        let mut stream = Stream::of_integer(self.seed);
        let keep = |_| !is_training || stream.uniform() >= ratio;
        let mask: Vec<bool> = (0..x.element_count()).map(keep).collect();
        let y = match is_training && ratio > 0.0 {
            false => x.clone(),
            true => {
                let scaled = Wide::floats(x)?
                    .into_iter()
                    .zip(&mask)
                    .map(|(x, &kept)| if kept { x / (1.0 - ratio) } else { 0.0 });
                Wide::Float(scaled.collect()).narrow(x.dtype(), x.shape().clone())?
            }
        };
        let mask = match self.mask_as_data {
            false => Tensor::from_bools(x.shape().clone(), &mask)?,
            true => {
                let ones = mask.into_iter().map(|kept| f64::from(u8::from(kept)));
                Wide::Float(ones.collect()).narrow(x.dtype(), x.shape().clone())?
            }
        };
        Ok(vec![y.into(), mask.into()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, run, tensor, wave};

    fn bools(shape: &[usize], values: &[bool]) -> Tensor {
        Tensor::from_bools(shape, values).unwrap()
    }

    #[test]
    fn nothing_happens_at_inference() {
        let x = || wave(&[2, 2], 0);
        case("Dropout", 7).with("ratio", 0.1f32).input(x()).gives([x()]);
        case("Dropout", 10).input(x()).gives([x(), bools(&[2, 2], &[true; 4])]);
        case("Dropout", 6).with("is_test", 1).input(x()).gives([x()]);
        let told = case("Dropout", 22).input(x()).input(f32s(&[], &[0.9])).input(bools(&[], &[false]));
        told.gives([x(), bools(&[2, 2], &[true; 4])]);
    }

    #[test]
    fn training_drops_as_many_as_it_should() {
        let ones = Some(f32s(&[100, 100], &[1.0; 10_000]));
        let draw = |seed, ratio: f32| {
            let inputs = [ones.clone(), Some(f32s(&[], &[ratio])), Some(bools(&[], &[true]))];
            let results = run(&Dropout { seed, mask_as_data: false }.into(), &inputs, 2).unwrap();
            let [Value::Tensor(y), Value::Tensor(mask)] = &results[..] else { panic!("two tensors") };
            (y.to_vec::<f32>().unwrap(), mask.to_bools().unwrap())
        };
        let (y, mask) = draw(5, 0.75);
        assert!(y.iter().zip(&mask).all(|(&y, &kept)| y == if kept { 4.0 } else { 0.0 }));
        let kept = mask.iter().filter(|&&kept| kept).count() as f64 / 10_000.0;
        // Four standard errors.
        assert!((kept - 0.25).abs() < 4.0 * (0.25f64 * 0.75 / 10_000.0).sqrt(), "{kept}");
        assert_eq!(draw(5, 0.75).1, mask);
        assert_ne!(draw(6, 0.75).1, mask);
        assert_eq!(draw(5, 0.0).0, [1.0; 10_000]);
    }

    #[test]
    fn wrong_ratios_are_refused() {
        let training =
            |ratio: f32| case("Dropout", 13).wave(&[2]).input(f32s(&[], &[ratio])).input(bools(&[], &[true]));
        training(1.0).fails("ratio must be 0 or more and below 1");
        training(f32::NAN).fails("ratio must be");
        case("Dropout", 13).wave(&[2]).input(f32s(&[2], &[0.1, 0.2])).fails("ratio must be one number");
        case("Dropout", 13).input(tensor::<f64>(&[1], &[2.0])).gives([tensor::<f64>(&[1], &[2.0])]);
    }
}
