//! The spectra of a signal's overlapping frames.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, fourier::Fourier, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs: `signal [n, length, 1 or 2]` (real, or real and imaginary parts), the step from frame to frame, optionally a window `[frame]` by
/// which every frame is multiplied, and optionally the frame's length, without both of which the signal is one frame. The result is
/// `[n, ⌊(length − frame) / step⌋ + 1, bins, 2]`: of every frame its transform's `frame` elements, or the first `⌊frame / 2⌋ + 1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Stft {
    pub onesided: bool,
}

impl Stft {
    fn check_parts(&self, parts: usize) -> Result<(), OpError> {
        match parts {
            2 if self.onesided => Err(OpError::input("a onesided spectrum is of real signals, got complex ones")),
            1 | 2 => Ok(()),
            _ => Err(OpError::input(format!("expected a signal [n, length, 1 or 2], got {parts} on the last axis"))),
        }
    }
}

impl Operator for Stft {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=4)?;
        Ok(Stft { onesided: node.flag("onesided", true)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("STFT").with("onesided", i64::from(self.onesided))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let signal = inputs.tensor(0)?;
        if signal.rank().is_some_and(|rank| rank != 3) {
            return Err(OpError::input(format!("expected a signal [n, length, 1 or 2], got {signal}")));
        }
        inputs.same_dtype(0, 2)?;
        let dims = signal.shape.clone();
        if let Some(parts) = dims.as_ref().and_then(|dims| dims[2].as_const()) {
            self.check_parts(parts.try_into().unwrap_or(0))?;
        }
        let step = movement::known_integer(inputs, 1)?.map(positive("step")).transpose()?;
        let window = inputs.optional_tensor(2)?;
        if let Some(window) = window
            && window.rank().is_some_and(|rank| rank != 1)
        {
            return Err(OpError::input(format!("expected a window [frame], got {window}")));
        }
        let length = dims.as_ref().map(|dims| dims[1].clone());
        let frame = match (inputs.optional_tensor(3)?, window) {
            (Some(fact), _) => {
                movement::known_integer(inputs, 3)?.map(positive("frame length")).transpose()?;
                fact.value.as_ref().and_then(|value| value.first().cloned())
            }
            (None, Some(window)) => window.shape.as_ref().map(|dims| dims[0].clone()),
            (None, None) => length.clone(),
        };
        let frame = frame.unwrap_or_else(|| context.fresh("frame"));
        let frames = match (length, step) {
            (Some(length), Some(step)) => {
                if let (Some(length), Some(frame)) = (length.as_const(), frame.as_const()) {
                    check_fits(length, frame)?;
                }
                (length - frame.clone()).floor_div(&Dim::from(step)) + Dim::Const(1)
            }
            _ => context.fresh("frames"),
        };
        let bins = if self.onesided { frame.floor_div(&Dim::Const(2)) + Dim::Const(1) } else { frame };
        let batch = dims.map_or_else(|| context.fresh("n"), |dims| dims[0].clone());
        Ok(vec![TensorFact::new(signal.dtype, [batch, frames, bins, Dim::Const(2)]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (signal, shape) = movement::source(inputs)?;
        let &[batch, length, parts] = shape else {
            return Err(OpError::input(format!("expected a signal [n, length, 1 or 2], got {signal:?}")));
        };
        self.check_parts(parts)?;
        let step = positive("step")(movement::integer(inputs, 1)?)?;
        let window = inputs.optional_tensor(2)?;
        let window_shape = window.map(|window| match window.shape().dims() {
            &[extent] => Ok(extent),
            _ => Err(OpError::input(format!("expected a window [frame], got {window:?}"))),
        });
        let frame = match (inputs.get(3), window_shape.transpose()?) {
            (None, extent) => positive("frame length")(extent.unwrap_or(length) as i64)?,
            (Some(_), extent) => {
                let frame = positive("frame length")(movement::integer(inputs, 3)?)?;
                if let Some(extent) = extent.filter(|&extent| extent != frame) {
                    return Err(OpError::input(format!("a window of {extent} elements on frames of {frame}")));
                }
                frame
            }
        };
        check_fits(length as i64, frame as i64)?;
        let frames = (length - frame) / step + 1;
        let bins = if self.onesided { frame / 2 + 1 } else { frame };
        let to = [batch, frames, bins, 2];
        let mut y = Vec::with_capacity(context.bounded_len(&to)?);
        let values = Wide::floats(signal)?;
        if values.is_empty() {
            return Ok(vec![Tensor::zeros(signal.dtype(), to)?.into()]);
        }
        let window = window.map(Wide::floats).transpose()?.unwrap_or_else(|| vec![1.0; frame]);
        let fourier = Fourier::new(frame);
        let mut line = vec![(0.0, 0.0); frame];
        for signal in values.chunks_exact(length * parts) {
            for start in (0..frames).map(|frame| frame * step) {
                for (k, (number, w)) in line.iter_mut().zip(&window).enumerate() {
                    let at = (start + k) * parts;
                    *number = (signal[at] * w, if parts == 2 { signal[at + 1] * w } else { 0.0 });
                }
                y.extend(fourier.forward(&line).into_iter().take(bins).flat_map(|(re, im)| [re, im]));
            }
        }
        Ok(vec![Wide::Float(y).narrow(signal.dtype(), to)?.into()])
    }
}

fn positive(what: &str) -> impl Fn(i64) -> Result<usize, OpError> + use<'_> {
    move |value| {
        let valid = usize::try_from(value).ok().filter(|&value| value > 0);
        valid.ok_or_else(|| OpError::input(format!("a {what} of {value}")))
    }
}

fn check_fits(length: i64, frame: i64) -> Result<(), OpError> {
    match frame <= length {
        true => Ok(()),
        false => Err(OpError::input(format!("frames of {frame} elements of a signal of {length}"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn stft(step: i64) -> Case {
        let signal = f32s(&[1, 6, 1], &[1., 2., 4., -1., 3., 0.]);
        case("STFT", 17).input(signal).input(tensor::<i64>(&[], &[step]))
    }

    #[test]
    fn agrees_with_numpy() {
        let frame = |case: Case, frame: i64| case.input(tensor::<i64>(&[], &[frame]));
        let halves = [6., 0., -3., -3., 4., 0., 6., 0., 1., 1., 8., 0.];
        frame(stft(2).omitted(), 4).gives([f32s(&[1, 2, 3, 2], &halves)]);
        let window = stft(3).input(f32s(&[3], &[0.5, 1., 0.5]));
        let full = [4.5, 0., -1.5, 0., -1.5, 0., 2.5, 0., -2., -2.598076, -2., 2.598076];
        window.with("onesided", 0).gives([f32s(&[1, 2, 3, 2], &full)]);
        stft(1).gives([f32s(&[1, 1, 4, 2], &[9., 0., -0.5, -2.598076, -4.5, -0.866025, 7., 0.])]);
    }

    #[test]
    fn refuses_frames_that_are_not_there() {
        stft(0).fails("a step of 0");
        stft(1).omitted().input(tensor::<i64>(&[], &[7])).fails("frames of 7 elements of a signal of 6");
        stft(1).input(f32s(&[2], &[1., 1.])).input(tensor::<i64>(&[], &[3])).fails("a window of 2 elements");
        let complex = case("STFT", 17).input(f32s(&[1, 2, 2], &[0.; 4])).input(tensor::<i64>(&[], &[1]));
        complex.fails("of real signals");
    }
}
