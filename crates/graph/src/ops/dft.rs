//! The discrete Fourier transform along an axis.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, fourier::Fourier, movement,
    normalize_axis,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// `y[k] = Σ x[n] · e^(-2πi·kn/N)` along an axis. Inputs: `x`, whose last axis holds real parts (extent 1) or real and imaginary parts
/// (extent 2); optionally the length `N`, to which `x` is cut or filled with zeros; optionally the axis, the last but one without it.
#[derive(Clone, Debug, PartialEq)]
pub struct Dft {
    /// `x[n] = 1/N · Σ y[k] · e^(2πi·kn/N)`
    pub inverse: bool,
    /// The first `⌊N/2⌋ + 1` elements of the spectrum of a real signal; with `inverse` the real signal of such a spectrum.
    pub onesided: bool,
}

impl Dft {
    /// Extent of the last axis of the result, of an input where it is `parts`.
    fn parts(&self, parts: usize) -> Result<usize, OpError> {
        match (parts, self.onesided, self.inverse) {
            (2, true, false) => Err(OpError::input("a onesided spectrum is of real signals, got complex ones")),
            (1, true, true) => Err(OpError::input("a onesided spectrum is complex, got real numbers")),
            (2, true, true) => Ok(1),
            (1 | 2, ..) => Ok(2),
            _ => Err(OpError::input(format!("expected 1 or 2 numbers per element on the last axis, got {parts}"))),
        }
    }

    fn axis(&self, axis: Option<i64>, rank: usize) -> Result<usize, OpError> {
        let axis = normalize_axis(axis.unwrap_or(-2), rank)?;
        match axis + 1 < rank {
            true => Ok(axis),
            false => Err(OpError::input("the last axis holds parts of numbers and has no transform")),
        }
    }
}

impl Operator for Dft {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        if node.opset < 20 {
            node.expect_inputs(1..=2)?;
            let axis = node.int("axis", 1)?;
            node.push_constant(2, Tensor::scalar(axis));
        }
        node.expect_inputs(1..=3)?;
        Ok(Dft { inverse: node.flag("inverse", false)?, onesided: node.flag("onesided", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("DFT").with("inverse", i64::from(self.inverse)).with("onesided", i64::from(self.onesided))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let given =
            |index: usize| if inputs.get(index).is_some() { movement::known_integer(inputs, index) } else { Ok(None) };
        let (length, axis) = (given(1)?, given(2)?);
        let Some(dims) = &x.shape else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let mut shape = dims.clone();
        let Some(last) = shape.last_mut() else { return Err(OpError::input("a scalar has no transform")) };
        *last = match last.as_const() {
            Some(parts) => self.parts(parts.try_into().unwrap_or(0))?.into(),
            None if self.onesided && self.inverse => Dim::Const(1),
            None => Dim::Const(2),
        };
        if inputs.get(2).is_some() && axis.is_none() {
            let signal = shape.len() - 1;
            (0..signal).for_each(|axis| shape[axis] = context.fresh(&format!("axis{axis}")));
            return Ok(vec![TensorFact::new(x.dtype, shape).into()]);
        }
        let axis = self.axis(axis, dims.len())?;
        let length = match (inputs.optional_tensor(1)?, length) {
            (Some(_), Some(length)) => Dim::Const(checked_length(length)? as i64),
            (Some(fact), None) => {
                let known = fact.value.as_ref().and_then(|value| value.first().cloned());
                known.unwrap_or_else(|| context.fresh("length"))
            }
            (None, _) if self.inverse && self.onesided => (dims[axis].clone() - Dim::Const(1)) * Dim::Const(2),
            (None, _) => dims[axis].clone(),
        };
        shape[axis] = match self.onesided && !self.inverse {
            true => length.floor_div(&Dim::Const(2)) + Dim::Const(1),
            false => length,
        };
        if let Some(extent) = shape[axis].as_const() {
            checked_length(extent)?;
        }
        Ok(vec![TensorFact::new(x.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let given = |index: usize| inputs.get(index).map(|_| movement::integer(inputs, index)).transpose();
        let axis = self.axis(given(2)?, shape.len())?;
        let parts = shape[shape.len() - 1];
        let parts_after = self.parts(parts)?;
        let of_real = self.inverse && self.onesided;
        let length = match given(1)? {
            Some(length) => length,
            None if of_real => (shape[axis] as i64 - 1).saturating_mul(2),
            None => shape[axis] as i64,
        };
        let length = checked_length(length)?;
        let extent = if self.onesided && !self.inverse { length / 2 + 1 } else { length };
        let mut to = shape.to_vec();
        to[axis] = extent;
        to[shape.len() - 1] = parts_after;
        let mut y = vec![0.0; context.bounded_len(&to)?];
        let values = Wide::floats(x)?;
        // Elements of a line are `inner` numbers apart.
        let (outer, before, inner) = movement::around(&shape[..shape.len() - 1], axis);
        if !y.is_empty() {
            let fourier = Fourier::new(length);
            let mut line = vec![(0.0, 0.0); length];
            for (o, i) in (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i))) {
                line.fill((0.0, 0.0));
                let read = if of_real { length / 2 + 1 } else { length };
                for (k, number) in line[..read].iter_mut().enumerate().take(before) {
                    let at = ((o * before + k) * inner + i) * parts;
                    *number = (values[at], if parts == 2 { values[at + 1] } else { 0.0 });
                }
                if of_real {
                    mirror(&mut line);
                }
                let transformed = if self.inverse { fourier.inverse(&line) } else { fourier.forward(&line) };
                for (k, number) in transformed.iter().enumerate().take(extent) {
                    let at = ((o * extent + k) * inner + i) * parts_after;
                    y[at] = number.0;
                    if parts_after == 2 {
                        y[at + 1] = number.1;
                    }
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), to)?.into()])
    }
}

fn checked_length(length: i64) -> Result<usize, OpError> {
    let valid = usize::try_from(length).ok().filter(|&length| length > 0);
    valid.ok_or_else(|| OpError::input(format!("a transform of length {length}")))
}

/// The spectrum of a real signal from its first half: every element is the conjugate of the one at the other end.
fn mirror(spectrum: &mut [(f64, f64)]) {
    let length = spectrum.len();
    spectrum[0].1 = 0.0;
    if length.is_multiple_of(2) {
        spectrum[length / 2].1 = 0.0;
    }
    for k in 1..length.div_ceil(2) {
        let (re, im) = spectrum[k];
        spectrum[length - k] = (re, -im);
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};
    use cutover_tensor::Tensor;

    fn dft(opset: i64, x: Tensor) -> Case {
        case("DFT", opset).input(x)
    }

    #[test]
    fn agrees_with_numpy() {
        let real = || f32s(&[1, 5, 1], &[1., 2., 4., -1., 3.]);
        let spectrum = [9., 0., 0.118034, -1.98787, -2.118034, 5.343068, -2.118034, -5.343068, 0.118034, 1.98787];
        dft(17, real()).gives([f32s(&[1, 5, 2], &spectrum)]);
        dft(20, real()).with("onesided", 1).gives([f32s(&[1, 3, 2], &spectrum[..6])]);
        let half = || f32s(&[1, 3, 2], &spectrum[..6]);
        let length = |case: Case, length: i64| case.input(tensor::<i64>(&[], &[length]));
        let back = length(dft(20, half()).with("onesided", 1).with("inverse", 1), 5);
        back.gives([real()]);
        dft(20, half())
            .with("onesided", 1)
            .with("inverse", 1)
            .gives([f32s(&[1, 4, 1], &[1.779509, 3.773443, 1.661475, 1.785574])]);
        dft(20, f32s(&[1, 5, 2], &spectrum))
            .with("inverse", 1)
            .gives([f32s(&[1, 5, 2], &[1., 0., 2., 0., 4., 0., -1., 0., 3., 0.])]);
        // Cut and filled.
        length(dft(20, real()), 2).gives([f32s(&[1, 2, 2], &[3., 0., -1., 0.])]);
        length(dft(20, f32s(&[2, 1], &[1., 2.])), 3).gives([f32s(&[3, 2], &[3., 0., 0., -1.732051, 0., 1.732051])]);
    }

    #[test]
    fn axes_of_both_forms() {
        let x = || f32s(&[2, 2, 1], &[1., 2., 4., 8.]);
        dft(17, x()).with("axis", 0).gives([f32s(&[2, 2, 2], &[5., 0., 10., 0., -3., 0., -6., 0.])]);
        let axis = |axis: i64| dft(20, x()).omitted().input(tensor::<i64>(&[], &[axis]));
        axis(-3).gives([f32s(&[2, 2, 2], &[5., 0., 10., 0., -3., 0., -6., 0.])]);
        axis(1).gives([f32s(&[2, 2, 2], &[3., 0., -1., 0., 12., 0., -4., 0.])]);
        axis(2).fails("the last axis");
        axis(i64::MIN).fails("axis -9223372036854775808");
    }

    #[test]
    fn refuses_what_has_no_transform() {
        dft(20, f32s(&[2, 3], &[0.; 6])).fails("1 or 2 numbers per element");
        dft(20, f32s(&[2, 2], &[0.; 4])).with("onesided", 1).fails("real signals");
        dft(20, f32s(&[2, 1], &[0.; 2])).with("onesided", 1).with("inverse", 1).fails("spectrum is complex");
        let length = |length: i64| dft(20, f32s(&[2, 1], &[0.; 2])).input(tensor::<i64>(&[], &[length]));
        length(0).fails("length 0");
        length(1 << 60).fails("resource limit");
        length(-1).fails("length -1");
    }
}
