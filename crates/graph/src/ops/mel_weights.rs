//! Triangular filters on the mel scale.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, cast::cast,
    cosine_window::output_type, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// Inputs, all scalars: the number of filters, the length of the transform, the sample rate, and the frequencies at which the lowest filter
/// starts and before which the highest ends. The result `[⌊length / 2⌋ + 1, filters]` weights the bins of a onesided spectrum. Filter `i` is a
/// triangle over the points `i`, `i + 1` and `i + 2` of as many as there are filters and two more, at equal distances on the scale
/// `mel(f) = 2595·log₁₀(1 + f / 700)`, each on the bin below `(length + 1)·f / rate`.
#[derive(Clone, Debug, PartialEq)]
pub struct MelWeights {
    pub dtype: DType,
}

impl Operator for MelWeights {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(5..=5)?;
        Ok(MelWeights { dtype: output_type(node)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MelWeightMatrix").with("output_datatype", i64::from(self.dtype.onnx_code()))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let extent = |index: usize, what: &str| -> Result<Dim, OpError> {
            if let Some(value) = movement::known_integer(inputs, index)? {
                count(value, what)?;
            }
            let value = inputs.tensor(index)?.value.as_ref().and_then(|value| value.first().cloned());
            Ok(value.unwrap_or_else(|| context.fresh(what)))
        };
        let filters = extent(0, "filters")?;
        let bins = extent(1, "length")?.floor_div(&Dim::Const(2)) + Dim::Const(1);
        Ok(vec![TensorFact::new(self.dtype, [bins, filters]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let filters = count(movement::integer(inputs, 0)?, "filters")?;
        let length = count(movement::integer(inputs, 1)?, "length")?;
        let rate = movement::integer(inputs, 2)?;
        let frequency = |index: usize| -> Result<f64, OpError> {
            match Wide::floats(inputs.tensor(index)?)?.as_slice() {
                [hertz] if (0.0..f64::INFINITY).contains(hertz) => Ok(*hertz),
                other => Err(OpError::input(format!("input {index} must be one frequency, got {other:?}"))),
            }
        };
        let (lowest, highest) = (frequency(3)?, frequency(4)?);
        if rate <= 0 || lowest > highest {
            return Err(OpError::input(format!("frequencies from {lowest} to {highest} at {rate} samples a second")));
        }
        let bins = length / 2 + 1;
        let mut weights = vec![0.0; context.bounded_len(&[bins, filters])?];
        if !weights.is_empty() {
            let mel = |hertz: f64| 2595.0 * (hertz / 700.0).ln_1p() / std::f64::consts::LN_10;
            let hertz = |mel: f64| 700.0 * (mel / 2595.0 * std::f64::consts::LN_10).exp_m1();
            let step = (mel(highest) - mel(lowest)) / (filters + 2) as f64;
            let bin = |point: usize| -> Result<usize, OpError> {
                let at = (length + 1) as f64 * hertz(point as f64 * step + mel(lowest)) / rate as f64;
                let at = at.floor().max(0.0) as usize;
                let beyond =
                    || OpError::input(format!("frequencies to {highest} of a spectrum of {bins} bins at {rate}"));
                Some(at).filter(|&at| at <= bins).ok_or_else(beyond)
            };
            for filter in 0..filters {
                let [left, centre, right] = [bin(filter)?, bin(filter + 1)?, bin(filter + 2)?];
                let mut weight = |at: usize, weight: f64| {
                    if at < bins {
                        weights[at * filters + filter] = weight;
                    }
                };
                (left..centre).for_each(|at| weight(at, (at - left) as f64 / (centre - left) as f64));
                weight(centre, 1.0);
                (centre + 1..right).for_each(|at| weight(at, (right - at) as f64 / (right - centre) as f64));
            }
        }
        let weights = Wide::Float(weights).narrow(DType::F64, [bins, filters])?;
        Ok(vec![cast(&weights, self.dtype)?.into()])
    }
}

fn count(value: i64, what: &str) -> Result<usize, OpError> {
    usize::try_from(value).ok().filter(|&v| v < 1 << 60).ok_or_else(|| OpError::input(format!("{what} of {value}")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn node(filters: i32, length: i32, rate: i32, highest: f32) -> Case {
        let scalars = [filters, length, rate];
        let node = scalars.iter().fold(case("MelWeightMatrix", 17), |node, &v| node.input(tensor::<i32>(&[], &[v])));
        node.input(f32s(&[], &[0.0])).input(f32s(&[], &[highest]))
    }

    #[test]
    fn agrees_with_onnx() {
        let weights = [1., 0., 0.5, 0.5, 0., 1., 0., 0.5, 0., 0., 0., 0., 0., 0., 0., 0., 0., 0.];
        node(2, 16, 8000, 4000.).gives([f32s(&[9, 2], &weights)]);
        node(0, 8, 8000, 4000.).gives([f32s(&[5, 0], &[])]);
    }

    #[test]
    fn refuses_filters_beyond_the_spectrum() {
        node(4, 8, 1000, 40000.).fails("of a spectrum of 5 bins");
        node(4, 8, 0, 4000.).fails("at 0 samples a second");
        node(4, 8, 8000, f32::NAN).fails("must be one frequency");
        node(-1, 8, 8000, 4000.).fails("filters of -1");
        node(i32::MAX, i32::MAX, 8000, 4000.).fails("resource limit");
    }
}
