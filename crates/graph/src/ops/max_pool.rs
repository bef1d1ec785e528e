//! The largest element under a sliding window.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window, WindowAxis,
    window::{for_each_tap, three_axes},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Value};

/// `X [n, c, …]` to `Y [n, c, …]`, and as a second output the flat index in `X` that each element came from. NaN is larger
/// than everything; a window that lies wholly in the padding gives the least value of the type.
#[derive(Clone, Debug, PartialEq)]
pub struct MaxPool {
    pub window: Window,
    /// Whether indices count a plane's elements with the first spatial axis fastest.
    pub column_major_indices: bool,
}

impl Operator for MaxPool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let window = read(node)?;
        Ok(MaxPool { window, column_major_indices: node.flag("storage_order", false)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("MaxPool")).with("storage_order", i64::from(self.column_major_indices))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = infer_shape(&self.window, x)?;
        let output = |dtype| TensorFact { dtype, shape: shape.clone(), value: None }.into();
        Ok(vec![output(x.dtype), output(DType::I64)])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let geometry = Geometry::new(&self.window, x.shape())?;
        context.bounded_len(&geometry.output)?;
        let (y, indices) = match Wide::of(x)? {
            Wide::Float(values) => {
                let (y, indices) = self.largest(&geometry, &values, f64::NEG_INFINITY, |x, y| x > y || x.is_nan());
                (Wide::Float(y), indices)
            }
            Wide::Int(values) => {
                let least = match x.dtype() {
                    DType::I8 => i8::MIN.into(),
                    DType::I16 => i16::MIN.into(),
                    DType::I32 => i32::MIN.into(),
                    DType::I64 => i64::MIN.into(),
                    _ => 0,
                };
                let (y, indices) = self.largest(&geometry, &values, least, |x, y| x > y);
                (Wide::Int(y), indices)
            }
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        let indices = Wide::Int(indices).narrow(DType::I64, geometry.output.clone())?;
        Ok(vec![y.narrow(x.dtype(), geometry.output)?.into(), indices.into()])
    }
}

impl MaxPool {
    fn largest<T: Copy>(
        &self,
        geometry: &Geometry,
        x: &[T],
        least: T,
        above: impl Fn(T, T) -> bool,
    ) -> (Vec<T>, Vec<i128>) {
        let mut y = vec![least; geometry.output.element_count()];
        // -1 is no element of the input.
        let mut indices = vec![-1i128; y.len()];
        let (from, to) = (geometry.input_plane(), geometry.output_plane());
        if y.is_empty() || from == 0 {
            return (y, indices);
        }
        for (plane, x) in x.chunks_exact(from).enumerate() {
            let (y, indices) = (&mut y[plane * to..][..to], &mut indices[plane * to..][..to]);
            for_each_tap(&geometry.axes, |o, i| {
                if indices[o] < 0 || above(x[i], y[o]) {
                    (y[o], indices[o]) = (x[i], i as i128);
                }
            });
            for index in indices.iter_mut().filter(|i| **i >= 0) {
                let mut within = *index as usize;
                if self.column_major_indices {
                    let [z, y, x] = &geometry.axes;
                    let (iz, iy, ix) = (within / (y.input * x.input), within / x.input % y.input, within % x.input);
                    within = (ix * y.input + iy) * z.input + iz;
                }
                *index = (plane * from + within) as i128;
            }
        }
        (y, indices)
    }
}

/// The window of a pooling operator.
pub(super) fn read(node: &mut NodeReader) -> Result<Window, ImportError> {
    let mut window = Window::read(node)?;
    if window.kernel_shape.is_none() {
        return Err(node.corrupt("attribute 'kernel_shape' is missing"));
    }
    window.ceil_mode = node.flag("ceil_mode", false)?;
    Ok(window)
}

/// `[n, c, …]`; `None` where the rank is unknown.
pub(super) fn infer_shape(window: &Window, x: &TensorFact) -> Result<Option<Vec<Dim>>, OpError> {
    let Some(dims) = &x.shape else { return Ok(None) };
    if dims.len() < 3 {
        return Err(OpError::input(format!("expected [n, c, …] with a spatial axis, got {x}")));
    }
    let kernel: Vec<Dim> = window.kernel()?.iter().map(|&k| Dim::from(k)).collect();
    let mut shape = dims[..2].to_vec();
    shape.extend(window.output_extents(&dims[2..], &kernel)?);
    Ok(Some(shape))
}

/// One pooling with every extent known.
pub(super) struct Geometry {
    pub output: Shape,
    pub axes: [WindowAxis; 3],
}

impl Geometry {
    pub fn new(window: &Window, x: &Shape) -> Result<Geometry, OpError> {
        if x.rank() < 3 {
            return Err(OpError::input(format!("expected [n, c, …] with a spatial axis, got {x}")));
        }
        let axes = window.axes(&x[2..], window.kernel()?)?;
        let output = x[..2].iter().copied().chain(axes.iter().map(|axis| axis.output)).collect();
        Ok(Geometry { output, axes: three_axes(&axes)? })
    }

    pub fn input_plane(&self) -> usize {
        self.axes.iter().map(|axis| axis.input).product()
    }

    pub fn output_plane(&self) -> usize {
        self.axes.iter().map(|axis| axis.output).product()
    }

    /// For every output the sum of `of(x)` over its window.
    pub fn sums(&self, x: &[f64], of: impl Fn(f64) -> f64) -> Vec<f64> {
        let mut y = vec![0.0; self.output.element_count()];
        let (from, to) = (self.input_plane(), self.output_plane());
        if !y.is_empty() && from > 0 {
            for (y, x) in y.chunks_exact_mut(to).zip(x.chunks_exact(from)) {
                for_each_tap(&self.axes, |o, i| y[o] += of(x[i]));
            }
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("MaxPool", 12)
            .with("kernel_shape", vec![3i64, 3])
            .with("strides", vec![2i64, 2])
            .with("pads", vec![1i64, 1, 1, 1])
            .wave(&[1, 1, 4, 5])
            .gives([
                f32s(&[1, 1, 2, 3], &[1.0, 1.25, 1.25, 1.0, 1.0, 1.25]),
                tensor::<i64>(&[1, 1, 2, 3], &[6, 3, 3, 6, 6, 14]),
            ]);
        case("MaxPool", 12)
            .with("kernel_shape", vec![2i64, 2])
            .with("strides", vec![2i64, 2])
            .with("ceil_mode", 1)
            .with("storage_order", 1)
            .wave(&[1, 2, 3, 3])
            .gives([
                f32s(&[1, 2, 2, 2], &[1.25, -0.5, 1.0, -1.0, 0.75, 1.25, 0.25, 1.0]),
                tensor::<i64>(&[1, 2, 2, 2], &[1, 6, 2, 8, 9, 16, 11, 17]),
            ]);
        case("MaxPool", 12)
            .with("kernel_shape", vec![2i64])
            .with("dilations", vec![3i64])
            .wave(&[1, 1, 6])
            .gives([f32s(&[1, 1, 3], &[1.25, 0.5, -0.5])]);
        case("MaxPool", 12)
            .with("kernel_shape", vec![2i64, 2])
            .with("auto_pad", "SAME_LOWER")
            .wave(&[1, 1, 2, 3])
            .gives([f32s(&[1, 1, 2, 3], &[-1.25, 0.5, 0.5, 1.25, 1.25, 0.5])]);
        case("MaxPool", 12)
            .with("kernel_shape", vec![2i64])
            .input(tensor::<i8>(&[1, 1, 4], &[-3, 5, -128, -127]))
            .gives([tensor::<i8>(&[1, 1, 3], &[5, 5, -127])]);
    }

    #[test]
    fn a_window_is_required() {
        case("MaxPool", 12).wave(&[1, 1, 4]).fails("'kernel_shape' is missing");
        case("MaxPool", 12)
            .with("kernel_shape", vec![2i64])
            .wave(&[1, 1, 4, 4])
            .fails("kernel_shape is for 1 spatial axes, the input has 2");
    }
}
