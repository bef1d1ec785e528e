//! Resampling to other extents.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, normalize_axis, select,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Tensor, Value};

/// Inputs `X`, optional `roi`, and one of `scales` (f32) and `sizes` (i64), for the axes named or all. Coordinates, filters and
/// rounding are those of ONNX's `Resize`; `Upsample` is the `asymmetric`, `floor` case of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Resize {
    pub mode: ResizeMode,
    pub coordinates: CoordinateMode,
    /// Which input element stands for a coordinate between two (nearest only).
    pub nearest: NearestMode,
    /// Of the cubic filter (Keys 1981).
    pub cubic_coefficient: f32,
    /// Filter taps outside the input count nothing, and the others are scaled up; otherwise the edge is repeated.
    pub exclude_outside: bool,
    /// For [`CoordinateMode::TfCropAndResize`], where a coordinate lies outside the input.
    pub extrapolation: f32,
    /// Filters are widened where the result is smaller.
    pub antialias: bool,
    /// Axes that `roi`, `scales` and `sizes` speak of; `None` for all.
    pub axes: Option<Vec<i64>>,
    pub aspect: AspectPolicy,
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),* }
            }
            fn read(node: &mut NodeReader, attribute: &str, default: $name) -> Result<$name, ImportError> {
                match node.string(attribute, default.name())?.as_str() {
                    $($text => Ok($name::$variant),)*
                    other => Err(node.corrupt(format!("{attribute} '{other}' is not defined"))),
                }
            }
        }
    };
}

named! { ResizeMode { Nearest "nearest", Linear "linear", Cubic "cubic" } }
named! {
    /// How a coordinate of the result maps to one of the input.
    CoordinateMode {
        HalfPixel "half_pixel",
        HalfPixelSymmetric "half_pixel_symmetric",
        PytorchHalfPixel "pytorch_half_pixel",
        AlignCorners "align_corners",
        Asymmetric "asymmetric",
        TfHalfPixelForNearest "tf_half_pixel_for_nn",
        TfCropAndResize "tf_crop_and_resize",
    }
}
named! {
    NearestMode {
        RoundPreferFloor "round_prefer_floor",
        RoundPreferCeil "round_prefer_ceil",
        Floor "floor",
        Ceil "ceil",
    }
}
named! {
    /// What `sizes` mean together.
    AspectPolicy {
        Stretch "stretch",
        /// One scale for all axes, such that none exceeds its size.
        NotLarger "not_larger",
        /// One scale for all axes, such that none falls below its size.
        NotSmaller "not_smaller",
    }
}

const ROI: usize = 1;
const SCALES: usize = 2;
const SIZES: usize = 3;

impl Operator for Resize {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        if node.op_type == "Upsample" || node.opset < 11 {
            return Resize::import_old(node);
        }
        node.expect_inputs(1..=4)?;
        let resize = Resize {
            mode: ResizeMode::read(node, "mode", ResizeMode::Nearest)?,
            coordinates: CoordinateMode::read(node, "coordinate_transformation_mode", CoordinateMode::HalfPixel)?,
            nearest: NearestMode::read(node, "nearest_mode", NearestMode::RoundPreferFloor)?,
            cubic_coefficient: node.float("cubic_coeff_a", -0.75)?,
            exclude_outside: node.flag("exclude_outside", false)?,
            extrapolation: node.float("extrapolation_value", 0.0)?,
            antialias: node.flag("antialias", false)?,
            axes: node.optional_ints("axes")?,
            aspect: AspectPolicy::read(node, "keep_aspect_ratio_policy", AspectPolicy::Stretch)?,
        };
        Ok(resize.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("Resize")
            .with("mode", self.mode.name())
            .with("coordinate_transformation_mode", self.coordinates.name())
            .with("nearest_mode", self.nearest.name())
            .with("cubic_coeff_a", self.cubic_coefficient)
            .with("exclude_outside", i64::from(self.exclude_outside))
            .with("extrapolation_value", self.extrapolation)
            .with("antialias", i64::from(self.antialias))
            .with("keep_aspect_ratio_policy", self.aspect.name());
        if let Some(axes) = &self.axes {
            spelling = spelling.with("axes", axes.clone());
        }
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(dims) = &x.shape else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let axes = self.axis_indices(dims.len())?;
        // A list of no elements counts as omitted: exporters write both.
        let given = |index: usize| -> Result<Option<&TensorFact>, OpError> {
            Ok(inputs.optional_tensor(index)?.filter(|fact| fact.constant_shape() != Some(vec![0])))
        };
        let (scales, sizes) = (given(SCALES)?, given(SIZES)?);
        let list = match (scales, sizes) {
            (Some(list), None) | (None, Some(list)) => list,
            (None, None) => return Err(OpError::input("has neither scales nor sizes")),
            (Some(_), Some(_)) => return Err(OpError::input("has both scales and sizes")),
        };
        if list.shape.as_ref().is_some_and(|s| s.len() != 1 || s[0].as_const().is_some_and(|n| n != axes.len() as i64))
        {
            return Err(OpError::input(format!("expected an element for each of {} axes, got {list}", axes.len())));
        }
        let mut shape = dims.clone();
        for (position, &axis) in axes.iter().enumerate() {
            let element = list.value.as_ref().and_then(|values| values.get(position));
            shape[axis] = match element {
                Some(scale) if scales.is_some() => dims[axis].scaled_by(scale),
                Some(size) if self.aspect == AspectPolicy::Stretch => size.clone(),
                _ => context.fresh(&format!("d{axis}")),
            };
        }
        Ok(vec![TensorFact::new(x.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let axes = self.resampled_axes(x.shape(), inputs)?;
        let output: Shape = axes.iter().map(|axis| axis.output).collect();
        context.bounded_len(&output)?;
        if x.element_count() == 0 && output.element_count() > 0 {
            return Err(OpError::input(format!("there is nothing in {} to fill {output} from", x.shape())));
        }
        if output.element_count() == 0 {
            return Ok(vec![select(x, output, std::iter::empty())?.into()]);
        }
        if self.mode == ResizeMode::Nearest && self.coordinates != CoordinateMode::TfCropAndResize {
            return Ok(vec![self.nearest(x, &axes, output)?.into()]);
        }
        let floats = match Wide::of(x)? {
            Wide::Float(values) => values,
            Wide::Int(values) => values.into_iter().map(|v| v as f64).collect(),
            Wide::Bool(_) => return Err(OpError::unsupported("interpolation of bool")),
        };
        let y = self.filter(floats, &axes);
        let y = match x.dtype().is_float() {
            true => Wide::Float(y),
            // Fractions are cut off, as in a cast.
            false => Wide::Int(y.into_iter().map(|v| v as i128).collect()),
        };
        Ok(vec![y.narrow(x.dtype(), output)?.into()])
    }
}

#[derive(Clone, Copy)]
/// One axis of a resampling.
struct ResampledAxis {
    input: usize,
    output: usize,
    scale: f32,
    roi: (f32, f32),
    /// Not one of [`Resize::axes`], or of scale 1: elements stay where they are.
    kept: bool,
}

/// What one output coordinate is made of.
#[derive(Default)]
struct Taps {
    /// Input indices and their weights.
    weights: Vec<(usize, f64)>,
    outside: bool,
}

impl Resize {
    fn import_old(node: &mut NodeReader) -> Result<Op, ImportError> {
        let mode = match node.string("mode", "nearest")?.as_str() {
            "nearest" => ResizeMode::Nearest,
            "linear" | "bilinear" => ResizeMode::Linear,
            other => return Err(node.corrupt(format!("mode '{other}' is not defined"))),
        };
        if node.op_type == "Upsample" && node.opset < 9 {
            node.expect_inputs(1..=1)?;
            let scales = match node.opset {
                7.. => node.optional_floats("scales")?,
                _ => match (node.optional_float("height_scale")?, node.optional_float("width_scale")?) {
                    (Some(height), Some(width)) => Some(vec![1.0, 1.0, height, width]),
                    _ => None,
                },
            };
            let scales = scales.ok_or_else(|| node.corrupt("the attributes with the scales are missing"))?;
            let tensor = Tensor::from_vec([scales.len()], scales).expect("as many as there are");
            node.push_constant(SCALES, tensor);
        } else {
            node.expect_inputs(2..=2)?;
            node.insert_omitted_input(ROI);
        }
        let resize = Resize {
            mode,
            coordinates: CoordinateMode::Asymmetric,
            nearest: NearestMode::Floor,
            cubic_coefficient: -0.75,
            exclude_outside: false,
            extrapolation: 0.0,
            antialias: false,
            axes: None,
            aspect: AspectPolicy::Stretch,
        };
        Ok(resize.into())
    }

    /// For each axis, what the elements of the result are made of: indices along the input's axis, and their weights. `None` for axes that
    /// stay as they are. What lies outside the input ([`CoordinateMode::TfCropAndResize`]) is not told apart here.
    pub fn weights(&self, shape: &Shape, inputs: Inputs<'_>) -> Result<Vec<Option<Vec<Vec<(usize, f64)>>>>, OpError> {
        let of_axis = |axis: &ResampledAxis| (0..axis.output).map(|i| self.taps(axis, i).weights).collect();
        let axes = self.resampled_axes(shape, inputs)?;
        Ok(axes.iter().map(|axis| (!axis.kept).then(|| of_axis(axis))).collect())
    }

    fn axis_indices(&self, rank: usize) -> Result<Vec<usize>, OpError> {
        match &self.axes {
            None => Ok((0..rank).collect()),
            Some(axes) => axes.iter().map(|&axis| normalize_axis(axis, rank)).collect(),
        }
    }

    fn resampled_axes(&self, shape: &Shape, inputs: Inputs<'_>) -> Result<Vec<ResampledAxis>, OpError> {
        let axes = self.axis_indices(shape.rank())?;
        let kept = |&input: &usize| ResampledAxis { input, output: input, scale: 1.0, roi: (0.0, 1.0), kept: true };
        let mut result: Vec<ResampledAxis> = shape.iter().map(kept).collect();
        let floats = |index: usize, len: usize| -> Result<Option<Vec<f32>>, OpError> {
            match inputs.optional_tensor(index)? {
                Some(tensor) if tensor.element_count() > 0 => {
                    let values: Vec<f32> = Wide::floats(tensor)?.into_iter().map(|v| v as f32).collect();
                    match values.len() == len {
                        true => Ok(Some(values)),
                        false => {
                            Err(OpError::input(format!("input {index} must have {len} elements, has {}", values.len())))
                        }
                    }
                }
                _ => Ok(None),
            }
        };
        let sizes = match inputs.optional_tensor(SIZES)? {
            Some(sizes) if sizes.element_count() > 0 => Some(inputs.integers(SIZES)?),
            _ => None,
        };
        match (floats(SCALES, axes.len())?, sizes) {
            (Some(scales), None) => {
                for (&axis, scale) in axes.iter().zip(scales) {
                    let output = (result[axis].input as f32 * scale).floor();
                    if !(scale > 0.0 && output < u32::MAX as f32) {
                        return Err(OpError::input(format!("axis {axis} of {shape} cannot be scaled by {scale}")));
                    }
                    let kept = scale == 1.0;
                    result[axis] = ResampledAxis { output: output as usize, scale, kept, ..result[axis] };
                }
            }
            (None, Some(sizes)) => {
                let valid = sizes.len() == axes.len() && sizes.iter().all(|s| (0..=u32::MAX.into()).contains(s));
                if !valid {
                    return Err(OpError::input(format!("expected {} sizes, got {sizes:?}", axes.len())));
                }
                let ratios = axes.iter().zip(&sizes).map(|(&axis, &size)| size as f32 / result[axis].input as f32);
                let common = match self.aspect {
                    AspectPolicy::Stretch => None,
                    AspectPolicy::NotLarger => ratios.reduce(f32::min),
                    AspectPolicy::NotSmaller => ratios.reduce(f32::max),
                };
                for (&axis, &size) in axes.iter().zip(&sizes) {
                    let input = result[axis].input as f32;
                    let (output, scale) = match common {
                        None => (size as usize, size as f32 / input),
                        Some(scale) => ((scale * input + 0.5).floor() as usize, scale),
                    };
                    let kept = output == result[axis].input;
                    result[axis] = ResampledAxis { output, scale, kept, ..result[axis] };
                }
            }
            (None, None) => return Err(OpError::input("has neither scales nor sizes")),
            (Some(_), Some(_)) => return Err(OpError::input("has both scales and sizes")),
        }
        if self.coordinates == CoordinateMode::TfCropAndResize {
            let roi = floats(ROI, 2 * axes.len())?.ok_or_else(|| OpError::input("has no roi to crop to"))?;
            for (position, &axis) in axes.iter().enumerate() {
                let (start, end) = (roi[position], roi[position + axes.len()]);
                result[axis].roi = (start, end);
                result[axis].kept &= (start, end) == (0.0, 1.0);
            }
        }
        Ok(result)
    }

    /// The place in the input, in elements from the centre of its first, of element `index` of the result. Computed in f32, the type of
    /// scales: 17 / 1.7 is 10 there, and just below it where 1.7 is widened first.
    fn coordinate(&self, axis: &ResampledAxis, index: usize) -> f32 {
        let (x, input, output) = (index as f32, axis.input as f32, axis.output as f32);
        let half_pixel = (x + 0.5) / axis.scale - 0.5;
        match self.coordinates {
            CoordinateMode::HalfPixel => half_pixel,
            CoordinateMode::HalfPixelSymmetric => {
                let adjustment = output / (axis.scale * input);
                input / 2.0 * (1.0 - adjustment) + half_pixel
            }
            CoordinateMode::PytorchHalfPixel => {
                if axis.output > 1 {
                    half_pixel
                } else {
                    0.0
                }
            }
            CoordinateMode::AlignCorners => {
                if axis.output > 1 {
                    x * (input - 1.0) / (output - 1.0)
                } else {
                    0.0
                }
            }
            CoordinateMode::Asymmetric => x / axis.scale,
            CoordinateMode::TfHalfPixelForNearest => (x + 0.5) / axis.scale,
            CoordinateMode::TfCropAndResize => {
                let (start, end) = axis.roi;
                if axis.output > 1 {
                    start * (input - 1.0) + x * (end - start) * (input - 1.0) / (output - 1.0)
                } else {
                    0.5 * (start + end) * (input - 1.0)
                }
            }
        }
    }

    fn nearest_index(&self, axis: &ResampledAxis, coordinate: f32) -> usize {
        let coordinate = f64::from(coordinate);
        let index = match self.nearest {
            NearestMode::RoundPreferFloor => (coordinate - 0.5).ceil(),
            NearestMode::RoundPreferCeil => (coordinate + 0.5).floor(),
            NearestMode::Floor => coordinate.floor(),
            NearestMode::Ceil => coordinate.ceil(),
        };
        index.clamp(0.0, axis.input as f64 - 1.0) as usize
    }

    fn nearest(&self, x: &Tensor, axes: &[ResampledAxis], output: Shape) -> Result<Tensor, OpError> {
        let strides = x.shape().strides();
        let offsets = axes.iter().zip(strides).map(|(axis, stride)| {
            let index = |i| if axis.kept { i } else { self.nearest_index(axis, self.coordinate(axis, i)) };
            (0..axis.output).map(|i| index(i) * stride).collect::<Vec<_>>()
        });
        let sources = offsets.fold(vec![0usize], |sources, offsets| {
            sources.iter().flat_map(|source| offsets.iter().map(move |offset| source + offset)).collect()
        });
        select(x, output, sources.into_iter())
    }

    /// One axis after the other, since every filter is a product of filters along the axes.
    fn filter(&self, mut values: Vec<f64>, axes: &[ResampledAxis]) -> Vec<f64> {
        let mut shape: Vec<usize> = axes.iter().map(|axis| axis.input).collect();
        let mut outside: Vec<Option<Vec<bool>>> = Vec::with_capacity(axes.len());
        for (position, axis) in axes.iter().enumerate() {
            if axis.kept {
                outside.push(None);
                continue;
            }
            let taps: Vec<Taps> = (0..axis.output).map(|i| self.taps(axis, i)).collect();
            let inner: usize = shape[position + 1..].iter().product();
            let outer: usize = shape[..position].iter().product();
            let mut next = vec![0.0; outer * axis.output * inner];
            for o in 0..outer {
                for (i, taps) in taps.iter().enumerate() {
                    let to = &mut next[(o * axis.output + i) * inner..][..inner];
                    for &(index, weight) in &taps.weights {
                        let from = &values[(o * axis.input + index) * inner..][..inner];
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += from * weight);
                    }
                }
            }
            outside.push(Some(taps.iter().map(|taps| taps.outside).collect()));
            shape[position] = axis.output;
            values = next;
        }
        for (position, outside) in outside.into_iter().enumerate() {
            let Some(outside) = outside.filter(|outside| outside.contains(&true)) else { continue };
            let inner: usize = shape[position + 1..].iter().product();
            for (i, value) in values.iter_mut().enumerate() {
                if outside[i / inner % shape[position]] {
                    *value = self.extrapolation.into();
                }
            }
        }
        values
    }

    fn taps(&self, axis: &ResampledAxis, index: usize) -> Taps {
        let coordinate = self.coordinate(axis, index);
        let last = axis.input as f32 - 1.0;
        let outside = self.coordinates == CoordinateMode::TfCropAndResize && !(0.0..=last).contains(&coordinate);
        if self.mode == ResizeMode::Nearest {
            return Taps { weights: vec![(self.nearest_index(axis, coordinate), 1.0)], outside };
        }
        let coordinate = f64::from(coordinate);
        // Widened by 1/scale where the result is smaller, and normalised again.
        let narrowing = if self.antialias { f64::from(axis.scale.min(1.0)) } else { 1.0 };
        let reach = match self.mode {
            ResizeMode::Cubic => 2.0,
            _ => 1.0,
        };
        let floor = coordinate.floor();
        let first = (floor + (-reach / narrowing).floor() + 1.0) as i64;
        let end = (floor + (reach / narrowing).ceil() + 1.0) as i64;
        let mut weights = Vec::new();
        for tap in first..end {
            let distance = ((tap as f64 - coordinate) * narrowing).abs();
            let weight = match self.mode {
                ResizeMode::Cubic => cubic(distance, self.cubic_coefficient.into()),
                _ => (1.0 - distance).max(0.0),
            };
            let inside = tap.clamp(0, axis.input as i64 - 1);
            if weight != 0.0 && !(self.exclude_outside && inside != tap) {
                weights.push((inside as usize, weight));
            }
        }
        if self.exclude_outside || narrowing < 1.0 {
            let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
            weights.iter_mut().for_each(|(_, weight)| *weight /= sum);
        }
        Taps { weights, outside }
    }
}

/// Keys' cubic convolution kernel.
pub(super) fn cubic(x: f64, a: f64) -> f64 {
    match x {
        ..1.0 => ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0,
        ..2.0 => ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        // In f32 17 / 1.7 is 10, and 10 · 1.3 is 13.
        let ten = |scale: f32| {
            let values: Vec<f32> = (0..10).map(|i| i as f32).collect();
            let resize = case("Resize", 13).with("coordinate_transformation_mode", "asymmetric");
            resize.with("nearest_mode", "floor").input(f32s(&[10], &values)).omitted().input(f32s(&[1], &[scale]))
        };
        let expected = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 7.0, 7.0, 8.0, 8.0, 9.0];
        ten(1.7).gives([f32s(&[17], &expected)]);
        ten(1.3).gives([f32s(&[13], &[0.0, 0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 6.0, 6.0, 7.0, 8.0, 9.0])]);
        let nothing = case("Resize", 13).wave(&[0, 2]).omitted().input(f32s(&[2], &[2.0, 3.0]));
        nothing.gives([f32s(&[0, 6], &[])]);
        case("Resize", 13)
            .with("mode", "nearest")
            .wave(&[1, 1, 2, 2])
            .omitted()
            .input(f32s(&[4], &[1.0, 1.0, 2.0, 1.5]))
            .gives([f32s(&[1, 1, 4, 3], &[-1.25, -1.25, 0.5, -1.25, -1.25, 0.5, -0.5, -0.5, 1.25, -0.5, -0.5, 1.25])]);
        case("Resize", 13)
            .with("mode", "nearest")
            .with("nearest_mode", "ceil")
            .with("coordinate_transformation_mode", "asymmetric")
            .wave(&[1, 1, 3])
            .omitted()
            .omitted()
            .input(tensor::<i64>(&[3], &[1, 1, 5]))
            .gives([f32s(&[1, 1, 5], &[-1.25, 0.5, -0.5, -0.5, -0.5])]);
        case("Resize", 13)
            .with("mode", "linear")
            .wave(&[1, 1, 2, 2])
            .omitted()
            .input(f32s(&[4], &[1.0, 1.0, 2.0, 2.0]))
            .gives([f32s(
                &[1, 1, 4, 4],
                &[
                    -1.25, -0.8125, 0.0625, 0.5, -1.0625, -0.625, 0.25, 0.6875, -0.6875, -0.25, 0.625, 1.0625, -0.5,
                    -0.0625, 0.8125, 1.25,
                ],
            )]);
        case("Resize", 11)
            .with("mode", "linear")
            .with("coordinate_transformation_mode", "align_corners")
            .wave(&[1, 1, 2, 3])
            .input(f32s(&[0], &[]))
            .input(f32s(&[0], &[]))
            .input(tensor::<i64>(&[4], &[1, 1, 3, 2]))
            .gives([f32s(&[1, 1, 3, 2], &[-1.25, -0.5, 0.0, -0.625, 1.25, -0.75])]);
        case("Resize", 13)
            .with("mode", "cubic")
            .with("coordinate_transformation_mode", "pytorch_half_pixel")
            .with("exclude_outside", 1)
            .wave(&[1, 1, 3, 3])
            .omitted()
            .omitted()
            .input(tensor::<i64>(&[4], &[1, 1, 2, 4]))
            .gives([f32s(
                &[1, 1, 2, 4],
                &[-0.824775, 0.0853333, 0.179086, -0.623439, 1.2179, 0.581238, -0.468705, -1.03687],
            )]);
        case("Resize", 18)
            .with("mode", "linear")
            .with("antialias", 1)
            .wave(&[1, 1, 4, 4])
            .omitted()
            .omitted()
            .input(tensor::<i64>(&[4], &[1, 1, 2, 3]))
            .gives([f32s(&[1, 1, 2, 3], &[-0.460227, 0.078125, 0.366477, -0.0852273, 0.296875, -0.0710227])]);
        case("Resize", 18)
            .with("mode", "cubic")
            .with("antialias", 1)
            .wave(&[1, 1, 5, 4])
            .omitted()
            .input(f32s(&[4], &[1.0, 1.0, 0.5, 0.5]))
            .gives([f32s(&[1, 1, 2, 2], &[-0.338442, 0.322748, 0.0646095, -0.0128517])]);
        case("Resize", 13)
            .with("mode", "linear")
            .with("coordinate_transformation_mode", "tf_crop_and_resize")
            .with("extrapolation_value", 9.0f32)
            .wave(&[1, 1, 2, 3])
            .input(f32s(&[8], &[0.0, 0.0, 0.2, 0.0, 1.0, 1.0, 1.4, 1.0]))
            .omitted()
            .input(tensor::<i64>(&[4], &[1, 1, 3, 2]))
            .gives([f32s(&[1, 1, 3, 2], &[-0.75, -0.55, 0.75, -0.7, 9.0, 9.0])]);
        case("Resize", 18)
            .with("axes", vec![2i64, 3])
            .with("keep_aspect_ratio_policy", "not_larger")
            .wave(&[1, 1, 2, 4])
            .omitted()
            .omitted()
            .input(tensor::<i64>(&[2], &[3, 8]))
            .gives([f32s(
                &[1, 1, 3, 6],
                &[
                    -1.25, -1.25, 0.5, -0.5, -0.5, 1.25, -1.25, -1.25, 0.5, -0.5, -0.5, 1.25, 0.25, 0.25, -0.75, 1.0,
                    1.0, 0.0,
                ],
            )]);
        case("Upsample", 7)
            .with("scales", vec![1.0f32, 1.0f32, 2.0f32, 2.0f32])
            .wave(&[1, 1, 1, 2])
            .gives([f32s(&[1, 1, 2, 4], &[-1.25, -1.25, 0.5, 0.5, -1.25, -1.25, 0.5, 0.5])]);
        case("Upsample", 9)
            .with("mode", "linear")
            .wave(&[1, 1, 2, 2])
            .input(f32s(&[4], &[1.0, 1.0, 1.0, 2.0]))
            .gives([f32s(&[1, 1, 2, 4], &[-1.25, -0.375, 0.5, 0.5, -0.5, 0.375, 1.25, 1.25])]);
        case("Resize", 10)
            .wave(&[1, 1, 1, 3])
            .input(f32s(&[4], &[1.0, 1.0, 1.0, 0.6]))
            .gives([f32s(&[1, 1, 1, 1], &[-1.25])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("Resize", 13).wave(&[1, 1, 2]).fails("neither scales nor sizes");
        case("Resize", 13).wave(&[1, 1, 2]).omitted().wave(&[2]).fails("an element for each of 3 axes");
        case("Resize", 13)
            .wave(&[1, 1, 2])
            .omitted()
            .input(f32s(&[3], &[1.0, 1.0, -1.0]))
            .fails("cannot be scaled by -1");
    }

    #[test]
    fn scales_of_height_and_width() {
        let old = crate::ops::cases::case("Upsample", 1).with("height_scale", 1.0f32).with("width_scale", 2.0f32);
        let x = crate::ops::cases::f32s(&[1, 1, 1, 2], &[1., 2.]);
        old.input(x).gives([crate::ops::cases::f32s(&[1, 1, 1, 4], &[1., 1., 2., 2.])]);
    }
}
