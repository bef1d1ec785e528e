//! Convolution.

use super::{
    Activation, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window, WindowAxis,
    window::three_axes,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};
use std::ops::{AddAssign, Mul};

/// `Y = f(X ∗ W + B + Z)`: `X [n, c, …]`, `W [m, c/group, …]`, optional `B [m]`, and, where a residual was fused, `Z` of the
/// shape of `Y`. Inputs in that order.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    pub window: Window,
    pub group: usize,
    pub activation: Option<Activation>,
}

impl Operator for Conv {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        // ONNX Runtime's optimiser writes what it fused under names of its own.
        let fused = node.op_type.ends_with("FusedConv");
        node.expect_inputs(2..=if fused { 4 } else { 3 })?;
        let window = Window::read(node)?;
        let activation = if fused { Activation::read(node)? } else { None };
        Ok(Conv { window, group: node.count("group", 1)?, activation }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = self.window.spell(Spelling::new("Conv")).with("group", self.group as i64);
        spelling.added_input = Some(3);
        spelling.then.extend(self.activation.map(Activation::spelling));
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        for index in 1..inputs.len() {
            inputs.same_dtype(0, index)?;
        }
        let shape = infer_shape(&self.window, self.group, x, w, inputs.optional_tensor(2)?)?;
        let fact = TensorFact { dtype: x.dtype, shape, value: None };
        if let (Some(z), Some(shape)) = (inputs.optional_tensor(3)?, &fact.shape)
            && z.shape
                .as_ref()
                .is_some_and(|z| z.len() != shape.len() || z.iter().zip(shape).any(|(a, b)| differ(a, b)))
        {
            return Err(OpError::input(format!("the residual is {z}, the result {fact}")));
        }
        Ok(vec![fact.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let geometry = Geometry::new(&self.window, self.group, x.shape(), w.shape())?;
        let mut y = match inputs.optional_tensor(3)? {
            None => vec![0.0; geometry.output_len(context)?],
            Some(z) if z.shape() == &geometry.output => Wide::floats(z)?,
            Some(z) => {
                let message = format!("the residual is {}, the result {}", z.shape(), geometry.output);
                return Err(OpError::input(message));
            }
        };
        if let Some(b) = inputs.optional_tensor(2)? {
            geometry.add_bias(&Wide::floats(b)?, &mut y)?;
        }
        geometry.convolve(&Wide::floats(x)?, &Wide::floats(w)?, &mut y);
        if let Some(f) = self.activation {
            y.iter_mut().for_each(|y| *y = f.apply(*y));
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), geometry.output)?.into()])
    }
}

/// Whether two extents are known to be unequal.
pub(super) fn differ(a: &Dim, b: &Dim) -> bool {
    matches!((a.as_const(), b.as_const()), (Some(a), Some(b)) if a != b)
}

/// `[n, m, …]` from `X [n, c, …]`, `W [m, c/group, …]` and `B [m]`; unknown rank where that of `X` or `W` is.
pub(super) fn infer_shape(
    window: &Window,
    group: usize,
    x: &TensorFact,
    w: &TensorFact,
    b: Option<&TensorFact>,
) -> Result<Option<Vec<Dim>>, OpError> {
    let (Some(xs), Some(ws)) = (&x.shape, &w.shape) else { return Ok(None) };
    if xs.len() < 3 || xs.len() != ws.len() {
        return Err(OpError::input(format!("expected an input and a weight of one rank, at least 3: got {x} and {w}")));
    }
    let channels = ws[1].clone() * Dim::from(group);
    if differ(&xs[1], &channels) {
        return Err(OpError::input(format!("the input {x} has {} channels, the weight {w} {channels}", xs[1])));
    }
    if ws[0].as_const().is_some_and(|m| m % group as i64 != 0) {
        return Err(OpError::input(format!("{} output channels do not divide into {group} groups", ws[0])));
    }
    if let Some(b) = b
        && b.shape.as_ref().is_some_and(|b| b.len() != 1 || differ(&b[0], &ws[0]))
    {
        return Err(OpError::input(format!("expected a bias of [{}], got {b}", ws[0])));
    }
    check_kernel(window, &ws[2..])?;
    let mut shape = vec![xs[0].clone(), ws[0].clone()];
    shape.extend(window.output_extents(&xs[2..], &ws[2..])?);
    Ok(Some(shape))
}

/// A weight's extents must be those of `kernel_shape`, where that is given, and above zero.
pub(super) fn check_kernel(window: &Window, weight: &[Dim]) -> Result<(), OpError> {
    if let Some(kernel) = &window.kernel_shape
        && (kernel.len() != weight.len() || kernel.iter().zip(weight).any(|(&k, w)| differ(&Dim::from(k), w)))
    {
        return Err(OpError::input(format!("kernel_shape is {kernel:?}, the weight's is {weight:?}")));
    }
    match weight.iter().any(|d| d.as_const() == Some(0)) {
        true => Err(OpError::input(format!("the weight's spatial extents {weight:?} hold nothing"))),
        false => Ok(()),
    }
}

/// One convolution with every extent known.
pub(super) struct Geometry {
    pub group: usize,
    /// `[n, m, …]`.
    pub output: Shape,
    axes: [WindowAxis; 3],
    channels: usize,
}

impl Geometry {
    pub fn new(window: &Window, group: usize, x: &Shape, w: &Shape) -> Result<Geometry, OpError> {
        let fact = |shape: &Shape| TensorFact::of_constant_shape(cutover_tensor::DType::F32, shape);
        let output = infer_shape(window, group, &fact(x), &fact(w), None)?;
        let output = output.into_iter().flatten().filter_map(|d| usize::try_from(d.as_const()?).ok()).collect();
        let axes = three_axes(&window.axes(&x[2..], &w[2..])?)?;
        Ok(Geometry { group, output, axes, channels: x[1] })
    }

    pub fn output_len(&self, context: &EvalContext) -> Result<usize, OpError> {
        context.bounded_len(&self.output)
    }

    pub fn plane_len(&self) -> usize {
        self.output[2..].iter().product()
    }

    pub fn add_bias<T: Copy + AddAssign>(&self, bias: &[T], y: &mut [T]) -> Result<(), OpError> {
        let m = self.output[1];
        if bias.len() != m {
            return Err(OpError::input(format!("expected a bias of [{m}], got {} elements", bias.len())));
        }
        let plane = self.plane_len();
        if plane > 0 {
            for (plane, b) in y.chunks_exact_mut(plane).zip(bias.iter().cycle()) {
                plane.iter_mut().for_each(|y| *y += *b);
            }
        }
        Ok(())
    }

    /// `y += x ∗ w`, every sum in the order channel, then kernel element.
    pub fn convolve<T: Copy + AddAssign + Mul<Output = T>>(&self, x: &[T], w: &[T], y: &mut [T]) {
        let [az, ay, ax] = &self.axes;
        let (input_plane, output_plane) = (az.input * ay.input * ax.input, az.output * ay.output * ax.output);
        let taps = az.kernel * ay.kernel * ax.kernel;
        let (m, group_channels) = (self.output[1], self.channels / self.group);
        if y.is_empty() || input_plane == 0 {
            return;
        }
        for (index, y) in y.chunks_exact_mut(output_plane).enumerate() {
            let (n, m_index) = (index / m, index % m);
            let group = m_index / (m / self.group);
            for c in 0..group_channels {
                let x = &x[(n * self.channels + group * group_channels + c) * input_plane..][..input_plane];
                let w = &w[(m_index * group_channels + c) * taps..][..taps];
                let mut tap = 0;
                for (tz, ty) in (0..az.kernel).flat_map(|tz| (0..ay.kernel).map(move |ty| (tz, ty))) {
                    for tx in 0..ax.kernel {
                        let weight = w[tap];
                        tap += 1;
                        let columns = ax.outputs_at(tx);
                        if columns.is_empty() {
                            continue;
                        }
                        let first = ax.input_at(columns.start, tx);
                        for oz in az.outputs_at(tz) {
                            for oy in ay.outputs_at(ty) {
                                let from = (az.input_at(oz, tz) * ay.input + ay.input_at(oy, ty)) * ax.input;
                                let to = &mut y[(oz * ay.output + oy) * ax.output..][columns.clone()];
                                let from = &x[from + first..];
                                // One loop for both would not be vectorised.
                                if ax.stride == 1 {
                                    to.iter_mut().zip(from).for_each(|(y, &x)| *y += x * weight);
                                } else {
                                    let from = from.iter().step_by(ax.stride);
                                    to.iter_mut().zip(from).for_each(|(y, &x)| *y += x * weight);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, check_fused, f32s, tensor, wave};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("Conv", 11)
            .wave(&[1, 2, 4])
            .wave(&[2, 2, 3])
            .wave(&[2])
            .gives([f32s(&[1, 2, 2], &[0.4375, 1.25, -0.1875, -0.5])]);
        case("Conv", 11)
            .with("strides", vec![2i64, 1])
            .with("pads", vec![1i64, 0, 0, 1])
            .with("dilations", vec![1i64, 2])
            .wave(&[1, 2, 4, 5])
            .wave(&[2, 2, 2, 2])
            .gives([f32s(
                &[1, 2, 2, 4],
                &[
                    -1.625, -0.1875, 0.5625, -0.1875, 2.0, -3.125, 0.0, 2.625, -2.1875, 0.3125, 0.0625, 0.25, 1.6875,
                    -0.625, -1.5625, 2.1875,
                ],
            )]);
        case("Conv", 11)
            .with("group", 2)
            .with("auto_pad", "SAME_UPPER")
            .with("strides", vec![2i64, 2])
            .wave(&[1, 2, 3, 4])
            .wave(&[2, 1, 2, 2])
            .wave(&[2])
            .gives([f32s(&[1, 2, 2, 2], &[2.125, 2.3125, 1.6875, -1.1875, 1.25, -0.25, 0.0, -2.0])]);
        case("Conv", 11)
            .with("auto_pad", "SAME_LOWER")
            .wave(&[1, 1, 2, 3])
            .wave(&[1, 1, 2, 2])
            .gives([f32s(&[1, 1, 2, 3], &[0.9375, -0.6875, 0.5, -2.5, 1.375, -0.25])]);
        case("Conv", 11)
            .with("auto_pad", "VALID")
            .with("kernel_shape", vec![2i64, 1, 2])
            .wave(&[1, 1, 2, 2, 3])
            .wave(&[1, 1, 2, 1, 2])
            .gives([f32s(&[1, 1, 1, 2, 2], &[1.5, -0.125, 0.0625, -0.1875])]);
        case("Conv", 11).wave(&[0, 2, 3]).wave(&[1, 2, 2]).gives([f32s(&[0, 1, 2], &[])]);
    }

    #[test]
    fn what_onnx_runtime_fused_is_read() {
        case("com.microsoft.FusedConv", 1)
            .with("activation", "Relu")
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .input(f32s(&[1], &[0.5]))
            .input(f32s(&[1, 1, 2, 1], &[1.304, 0.9471]))
            .gives([f32s(&[1, 1, 2, 1], &[1.6889, 1.14197])]);
        case("com.microsoft.FusedConv", 1)
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .omitted()
            .input(f32s(&[1, 1, 2, 1], &[1.304, 0.9471]))
            .gives([f32s(&[1, 1, 2, 1], &[1.1889, 0.64197])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "LeakyRelu")
            .with("activation_params", vec![0.25f32])
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .input(f32s(&[1], &[0.5]))
            .gives([f32s(&[1, 1, 2, 1], &[0.384895, 0.19487])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "Clip")
            .with("activation_params", vec![-0.5f32, 0.5])
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .gives([f32s(&[1, 1, 2, 1], &[-0.115105, -0.30513])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "HardSigmoid")
            .with("activation_params", vec![0.3f32, 0.4])
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .gives([f32s(&[1, 1, 2, 1], &[0.365469, 0.308461])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "Tanh")
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .gives([f32s(&[1, 1, 2, 1], &[-0.114599, -0.296001])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "Sigmoid")
            .input(f32s(&[1, 1, 2, 2], &[0.1257, -0.1321, 0.6404, 0.1049]))
            .input(f32s(&[1, 1, 1, 2], &[-0.5357, 0.3616]))
            .gives([f32s(&[1, 1, 2, 1], &[0.471256, 0.424304])]);
        case("com.microsoft.FusedConv", 1)
            .with("activation", "Elu")
            .wave(&[1, 1, 2])
            .wave(&[1, 1, 1])
            .fails("activation 'Elu'");
    }

    #[test]
    fn contradictions_are_errors() {
        case("Conv", 11).wave(&[1, 3, 4]).wave(&[2, 2, 3]).fails("has 3 channels");
        case("Conv", 11)
            .wave(&[1, 1, 2])
            .wave(&[1, 1, 3])
            .fails("the window spans 3 elements of spatial axis 0, which has 2");
        case("Conv", 11).with("group", 2).wave(&[1, 2, 4]).wave(&[3, 1, 3]).fails("do not divide into 2 groups");
        case("Conv", 11).with("strides", vec![0i64]).wave(&[1, 1, 4]).wave(&[1, 1, 3]).fails("'strides' has 0");
        case("Conv", 11).with("pads", vec![-1i64, 0]).wave(&[1, 1, 4]).wave(&[1, 1, 3]).fails("negative padding");
        case("Conv", 11).wave(&[1, 1, 4]).wave(&[1, 1, 3]).wave(&[1]).wave(&[1, 1, 2]).fails("has 4 inputs");
        case("Conv", 11)
            .with("kernel_shape", vec![2i64])
            .wave(&[1, 1, 4])
            .wave(&[1, 1, 3])
            .fails("kernel_shape is [2]");
        case("Conv", 11).wave(&[1, 1, 4]).input(tensor::<i8>(&[1, 1, 3], &[1, 2, 3])).fails("must have one type");
        let huge = case("Conv", 11).with("pads", vec![0x7fff_fff0i64; 6]);
        huge.wave(&[1, 1, 1, 1, 1]).wave(&[1, 1, 1, 1, 1]).fails("above the limit");
    }

    #[test]
    fn a_fused_residual_and_activation_come_after_the_sum() {
        let window = Window {
            kernel_shape: None,
            strides: vec![],
            dilations: vec![],
            padding: crate::ops::Padding::SameUpper,
            ceil_mode: false,
        };
        let plain = Conv { window, group: 1, activation: None };
        let fused = Conv { activation: Some(Activation::Relu), ..plain.clone() };
        let inputs = [wave(&[1, 2, 3, 3], 0), wave(&[2, 2, 2, 2], 1), wave(&[2], 2), wave(&[1, 2, 3, 3], 3)].map(Some);
        check_fused(plain, fused, &inputs, 3, Activation::Relu);
    }
}
