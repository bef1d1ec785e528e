//! A convolution of each channel with what came before, and the state that carries it on.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ, select_from,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// ONNX's `CausalConvWithState`: `y[t] = f(Σ w[i] · x[t − k + 1 + i] + b)` for each channel. Inputs: `X [n, c, l]`, weights `[c, 1, k]`,
/// optional biases `[c]`, and optionally the `k − 1` elements before `[n, c, k − 1]`, zeros without them. Outputs: `[n, c, l]` and the
/// last `k − 1` elements.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalConv {
    /// `f` is `x · sigmoid(x)`.
    pub is_silu: bool,
}

impl Operator for CausalConv {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=4)?;
        let is_silu = match node.string("activation", "none")?.as_str() {
            "none" => false,
            "silu" | "swish" => true,
            other => return Err(node.corrupt(format!("activation '{other}', expected none, silu or swish"))),
        };
        Ok(CausalConv { is_silu }.into())
    }

    fn export(&self) -> Spelling {
        let activation = if self.is_silu { "silu" } else { "none" };
        Spelling::new("CausalConvWithState").since(27).with("activation", activation)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, weight) = (inputs.tensor(0)?, inputs.tensor(1)?);
        (1..4).try_for_each(|index| inputs.same_dtype(0, index))?;
        let wrong = || OpError::input(format!("expected [n, c, l] and weights [c, 1, k], got {x} and {weight}"));
        let state = match (x.shape.as_deref(), weight.shape.as_deref()) {
            (Some([n, c, _]), Some([channels, one, k])) => {
                if differ(c, channels) || differ(one, &Dim::Const(1)) || k.as_const().is_some_and(|k| k < 1) {
                    return Err(wrong());
                }
                TensorFact::new(x.dtype, vec![n.clone(), c.clone(), k.clone() - Dim::Const(1)])
            }
            (None | Some([_, _, _]), None | Some([_, _, _])) => TensorFact::unknown_rank(x.dtype),
            _ => return Err(wrong()),
        };
        Ok(vec![TensorFact { value: None, ..x.clone() }.into(), state.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, weight) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (&[n, c, length], &[channels, 1, k]) = (x.shape().dims(), weight.shape().dims()) else {
            let (x, weight) = (x.shape(), weight.shape());
            return Err(OpError::input(format!("expected [n, c, l] and weights [c, 1, k], got {x} and {weight}")));
        };
        let before = k.checked_sub(1).ok_or_else(|| OpError::input("weights of no element"))?;
        let zeros;
        let past = match inputs.optional_tensor(3)? {
            Some(past) => past,
            None => {
                context.bounded_len(&[n, c, before])?;
                zeros = Tensor::zeros(x.dtype(), [n, c, before])?;
                &zeros
            }
        };
        let bias = inputs.optional_tensor(2)?.map(Wide::floats).transpose()?.unwrap_or_else(|| vec![0.0; channels]);
        if channels != c || bias.len() != c || past.shape().dims() != [n, c, before] {
            let (weight, past, biases) = (weight.shape(), past.shape(), bias.len());
            return Err(OpError::input(format!("{c} channels, weights {weight}, {biases} biases and a state {past}")));
        }
        let rows = if x.element_count() + past.element_count() == 0 { 0 } else { n * c };
        let (values, old, weights) = (Wide::floats(x)?, Wide::floats(past)?, Wide::floats(weight)?);
        let mut y = Vec::with_capacity(values.len());
        let mut state = Vec::with_capacity(old.len());
        for row in 0..rows {
            let element = |i: usize| match i.checked_sub(before) {
                None => old[row * before + i],
                Some(i) => values[row * length + i],
            };
            let of_channel = &weights[row % c * k..(row % c + 1) * k];
            for at in 0..length {
                let sum: f64 = of_channel.iter().enumerate().map(|(i, w)| w * element(at + i)).sum();
                let sum = sum + bias[row % c];
                y.push(if self.is_silu { sum / (1.0 + (-sum).exp()) } else { sum });
            }
            state.extend((length..length + before).map(|i| match i.checked_sub(before) {
                None => (1, row * before + i),
                Some(i) => (0, row * length + i),
            }));
        }
        let y = Wide::Float(y).narrow(x.dtype(), x.shape().clone())?;
        Ok(vec![y.into(), select_from(&[x, past], [n, c, before], state.into_iter())?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn what_came_before_goes_on() {
        let of = || {
            let x = f32s(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0]);
            case("CausalConvWithState", 27).input(x).input(f32s(&[2, 1, 3], &[1.0, 10.0, 100.0, 1.0, 1.0, 1.0]))
        };
        let bias = || f32s(&[2], &[0.5, -7.0]);
        of().gives([f32s(&[1, 2, 2], &[100.0, 210.0, 3.0, 7.0]), f32s(&[1, 2, 2], &[1.0, 2.0, 3.0, 4.0])]);
        let past = f32s(&[1, 2, 2], &[5.0, 6.0, 0.0, 0.0]);
        of().input(bias()).input(past).gives([f32s(&[1, 2, 2], &[165.5, 216.5, -4.0, 0.0])]);
        let silu = [100.5, 210.5, -4.0 / (1.0 + 4f32.exp()), 0.0];
        of().with("activation", "silu").input(bias()).gives([f32s(&[1, 2, 2], &silu)]);
        // Shorter than what is carried on.
        let short = case("CausalConvWithState", 27).input(f32s(&[1, 1, 1], &[2.0])).input(f32s(&[1, 1, 3], &[1.0; 3]));
        let past = f32s(&[1, 1, 2], &[3.0, 4.0]);
        short.omitted().input(past).gives([f32s(&[1, 1, 1], &[9.0]), f32s(&[1, 1, 2], &[4.0, 2.0])]);
        case("CausalConvWithState", 27).wave(&[1, 2, 3]).wave(&[3, 1, 2]).fails("weights [c, 1, k]");
    }
}
