//! Transposed convolution: the gradient of a convolution by its input.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Padding, Spelling, Wide, Window, WindowAxis,
    conv::{check_kernel, differ},
    window::three_axes,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// `X [n, c, …]`, `W [c, m/group, …]`, optional `B [m]` to `Y [n, m, …]`: every input element adds the kernel, weighted, to
/// the output at `stride` times its place.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvTranspose {
    pub window: Window,
    pub group: usize,
    /// Added to the output at the end of each axis; empty for none.
    pub output_padding: Vec<usize>,
    /// Spatial extents that the padding is made to fit; then the window's own pads are not read.
    pub output_shape: Option<Vec<usize>>,
}

impl Operator for ConvTranspose {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let window = Window::read(node)?;
        let group = node.count("group", 1)?;
        let mut extents = |name: &str| match node.optional_ints(name)? {
            None => Ok(None),
            Some(values) => match values.iter().find(|v| !(0..=0x7fff_ffff).contains(*v)) {
                Some(v) => Err(node.corrupt(format!("'{name}' has {v}"))),
                None => Ok(Some(values.into_iter().map(|v| v as usize).collect::<Vec<_>>())),
            },
        };
        let output_padding = extents("output_padding")?.unwrap_or_default();
        let output_shape = extents("output_shape")?.filter(|shape| !shape.is_empty());
        Ok(ConvTranspose { window, group, output_padding, output_shape }.into())
    }

    fn export(&self) -> Spelling {
        let ints = |values: &[usize]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
        let mut spelling = self.window.spell(Spelling::new("ConvTranspose")).with("group", self.group as i64);
        if !self.output_padding.is_empty() {
            spelling = spelling.with("output_padding", ints(&self.output_padding));
        }
        match &self.output_shape {
            Some(shape) => spelling.with("output_shape", ints(shape)),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 2)?;
        let shape = self.infer_shape(x, w, inputs.optional_tensor(2)?)?;
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let fact = TensorFact::of_tensor;
        let bias = inputs.optional_tensor(2)?;
        let output = self.infer_shape(&fact(x), &fact(w), bias.map(fact).as_ref())?;
        let output: Shape = output.into_iter().flatten().filter_map(|d| usize::try_from(d.as_const()?).ok()).collect();
        let mut y = vec![0.0; context.bounded_len(&output)?];
        let axes = three_axes(&self.axes(&x.shape()[2..], &w.shape()[2..], &output[2..])?)?;
        let plane: usize = output[2..].iter().product();
        if plane == 0 {
            return Ok(vec![Wide::Float(y).narrow(x.dtype(), output)?.into()]);
        }
        if let Some(bias) = bias {
            let bias = Wide::floats(bias)?;
            for (plane, &b) in y.chunks_exact_mut(plane).zip(bias.iter().cycle()) {
                plane.fill(b);
            }
        }
        self.scatter(&axes, &Wide::floats(x)?, x.shape(), &Wide::floats(w)?, &mut y, output[1]);
        Ok(vec![Wide::Float(y).narrow(x.dtype(), output)?.into()])
    }
}

impl ConvTranspose {
    fn infer_shape(&self, x: &TensorFact, w: &TensorFact, b: Option<&TensorFact>) -> Result<Option<Vec<Dim>>, OpError> {
        let (Some(xs), Some(ws)) = (&x.shape, &w.shape) else { return Ok(None) };
        if xs.len() < 3 || xs.len() != ws.len() {
            return Err(OpError::input(format!(
                "expected an input and a weight of one rank, at least 3: got {x} and {w}"
            )));
        }
        if differ(&xs[1], &ws[0]) {
            return Err(OpError::input(format!("the input {x} has {} channels, the weight {w} {}", xs[1], ws[0])));
        }
        if xs[1].as_const().is_some_and(|c| c % self.group as i64 != 0) {
            return Err(OpError::input(format!("{} channels do not divide into {} groups", xs[1], self.group)));
        }
        let channels = ws[1].clone() * Dim::from(self.group);
        if let Some(b) = b
            && b.shape.as_ref().is_some_and(|b| b.len() != 1 || differ(&b[0], &channels))
        {
            return Err(OpError::input(format!("expected a bias of [{channels}], got {b}")));
        }
        check_kernel(&self.window, &ws[2..])?;
        let mut shape = vec![xs[0].clone(), channels];
        shape.extend(self.output_extents(&xs[2..], &ws[2..])?);
        Ok(Some(shape))
    }

    /// `stride·(input − 1) + output_padding + dilation·(kernel − 1) + 1 − pads`, or `stride·input` for the SAME modes.
    pub fn output_extents(&self, input: &[Dim], kernel: &[Dim]) -> Result<Vec<Dim>, OpError> {
        self.window.check_rank(input.len(), kernel.len())?;
        let lists = [
            ("output_padding", self.output_padding.len()),
            ("output_shape", self.output_shape.as_ref().map_or(0, Vec::len)),
        ];
        if let Some((name, len)) = lists.into_iter().find(|&(_, len)| len != 0 && len != input.len()) {
            return Err(OpError::input(format!("{name} is for {len} spatial axes, the input has {}", input.len())));
        }
        if let Some(shape) = &self.output_shape {
            return Ok(shape.iter().map(|&d| Dim::from(d)).collect());
        }
        let axes = input.iter().zip(kernel).enumerate();
        axes.map(|(axis, (input, kernel))| {
            let stride = Dim::from(self.window.stride(axis));
            let extent = match self.window.padding {
                Padding::SameUpper | Padding::SameLower => input.clone() * stride,
                Padding::Explicit { .. } => {
                    let (begin, end) = self.window.explicit_pads(axis);
                    self.unpadded_extent(axis, input, kernel) - Dim::from(begin) - Dim::from(end)
                }
            };
            match extent.as_const() {
                Some(extent @ ..0) => {
                    Err(OpError::input(format!("spatial axis {axis} of the result would have extent {extent}")))
                }
                _ => Ok(extent),
            }
        })
        .collect()
    }

    fn unpadded_extent(&self, axis: usize, input: &Dim, kernel: &Dim) -> Dim {
        let one = Dim::Const(1);
        let output_padding = self.output_padding.get(axis).copied().unwrap_or(0);
        (input.clone() - one.clone()) * Dim::from(self.window.stride(axis))
            + Dim::from(output_padding)
            + (kernel.clone() - one.clone()) * Dim::from(self.window.dilation(axis))
            + one
    }

    /// The window of the convolution this is the gradient of, whose *output* is our input: `input` and `output` are ours.
    pub fn axes(&self, input: &[usize], kernel: &[usize], output: &[usize]) -> Result<Vec<WindowAxis>, OpError> {
        (0..input.len())
            .map(|axis| {
                let unpadded = self.unpadded_extent(axis, &input[axis].into(), &kernel[axis].into());
                let unpadded = unpadded.as_const().unwrap_or(i64::MAX);
                let total = usize::try_from(unpadded - output[axis] as i64).unwrap_or(0);
                let explicit = self.output_shape.is_none();
                let (pad_begin, pad_end) = match self.window.padding {
                    Padding::Explicit { .. } if explicit => self.window.explicit_pads(axis),
                    Padding::SameUpper => (total / 2, total - total / 2),
                    _ => (total - total / 2, total / 2),
                };
                Ok(WindowAxis {
                    input: input[axis],
                    output: output[axis],
                    kernel: kernel[axis],
                    stride: self.window.stride(axis),
                    dilation: self.window.dilation(axis),
                    pad_begin,
                    pad_end,
                })
            })
            .collect()
    }

    fn scatter(&self, axes: &[WindowAxis; 3], x: &[f64], x_shape: &Shape, w: &[f64], y: &mut [f64], m: usize) {
        let [z, row, column] = axes.map(|axis| {
            // For each kernel element, the pairs (input, output) it connects.
            let connects = |tap: usize| {
                let pairs = (0..axis.input).filter_map(move |i| {
                    let o = (i * axis.stride + tap * axis.dilation).checked_sub(axis.pad_begin)?;
                    (o < axis.output).then_some((i, o))
                });
                pairs.collect::<Vec<_>>()
            };
            (0..axis.kernel).map(connects).collect::<Vec<_>>()
        });
        let (input_plane, output_plane) =
            (axes.iter().map(|a| a.input).product::<usize>(), axes.iter().map(|a| a.output).product::<usize>());
        let taps: usize = axes.iter().map(|a| a.kernel).product();
        let (channels, group_m) = (x_shape[1], m / self.group);
        let group_channels = channels / self.group;
        let (input_row, output_row) = (axes[2].input, axes[2].output);
        if input_plane == 0 {
            return;
        }
        for (index, y) in y.chunks_exact_mut(output_plane).enumerate() {
            let (n, m_index) = (index / m, index % m);
            let group = m_index / group_m;
            for c in group * group_channels..(group + 1) * group_channels {
                let x = &x[(n * channels + c) * input_plane..][..input_plane];
                let w = &w[(c * group_m + m_index % group_m) * taps..][..taps];
                let mut tap = 0;
                for (zs, rows) in z.iter().flat_map(|zs| row.iter().map(move |rows| (zs, rows))) {
                    for columns in &column {
                        let weight = w[tap];
                        tap += 1;
                        for (&(iz, oz), &(iy, oy)) in zs.iter().flat_map(|z| rows.iter().map(move |r| (z, r))) {
                            let x = &x[(iz * axes[1].input + iy) * input_row..][..input_row];
                            let y = &mut y[(oz * axes[1].output + oy) * output_row..][..output_row];
                            columns.iter().for_each(|&(ix, ox)| y[ox] += x[ix] * weight);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("ConvTranspose", 11)
            .with("strides", vec![2i64, 2])
            .wave(&[1, 2, 2, 2])
            .wave(&[2, 1, 2, 2])
            .wave(&[1])
            .gives([f32s(
                &[1, 1, 4, 4],
                &[
                    1.125, -1.3125, -0.75, 0.875, -0.3125, 1.375, 1.125, -0.6875, 1.5, -0.375, -0.375, 1.8125, -0.875,
                    1.375, 0.5625, -0.6875,
                ],
            )]);
        case("ConvTranspose", 11)
            .with("strides", vec![2i64, 3])
            .with("pads", vec![1i64, 0, 0, 1])
            .with("output_padding", vec![1i64, 2])
            .with("dilations", vec![2i64, 1])
            .with("group", 2)
            .wave(&[1, 2, 2, 3])
            .wave(&[2, 1, 2, 3])
            .gives([f32s(
                &[1, 2, 5, 10],
                &[
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3125, 0.3125, 0.3125, -0.5, 0.8125, 0.0625,
                    0.75, -1.4375, -0.1875, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.9375, 1.25, 0.0,
                    -0.1875, 0.25, 0.0, 0.5625, -0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, 1.0625, -0.6875, 0.25, -0.1875, 0.0625, 2.5,
                    -1.4375, 0.8125, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.9375, 0.375, -0.375,
                    0.3125, -0.125, 0.125, 1.5625, -0.625, 0.625, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0,
                ],
            )]);
        case("ConvTranspose", 11)
            .with("strides", vec![2i64])
            .with("output_shape", vec![5i64])
            .with("auto_pad", "SAME_UPPER")
            .wave(&[1, 1, 3])
            .wave(&[1, 1, 3])
            .gives([f32s(&[1, 1, 5], &[-1.5625, -0.5625, 0.625, 0.375, -0.625])]);
        case("ConvTranspose", 11)
            .with("strides", vec![2i64])
            .with("output_shape", vec![6i64])
            .with("auto_pad", "SAME_LOWER")
            .wave(&[1, 1, 3])
            .wave(&[1, 1, 3])
            .gives([f32s(&[1, 1, 6], &[-1.5625, -0.5625, 0.625, 0.375, -0.625, -0.125])]);
        case("ConvTranspose", 11)
            .with("strides", vec![2i64])
            .with("auto_pad", "SAME_LOWER")
            .wave(&[1, 1, 3])
            .wave(&[1, 1, 3])
            .gives([f32s(&[1, 1, 6], &[-1.5625, -0.5625, 0.625, 0.375, -0.625, -0.125])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("ConvTranspose", 11).wave(&[1, 3, 4]).wave(&[2, 2, 3]).fails("has 3 channels");
        case("ConvTranspose", 11)
            .with("pads", vec![3i64, 3])
            .wave(&[1, 1, 2])
            .wave(&[1, 1, 3])
            .fails("would have extent -2");
    }
}
