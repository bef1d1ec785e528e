//! Reductions over axes.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `data` reduced over `axes` (the optional second input, i64; negative ones count from the end). Without axes over all,
/// or, with `noop_with_empty_axes`, over none (then only the function of a single element is applied).
#[derive(Clone, Debug, PartialEq)]
pub struct Reduce {
    pub function: ReduceFunction,
    /// Reduced axes stay, of extent 1.
    pub keep_dims: bool,
    pub noop_with_empty_axes: bool,
}

macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident $name:literal),* $(,)?) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ReduceFunction { $($(#[$doc])* $variant),* }

        impl ReduceFunction {
            pub fn name(self) -> &'static str {
                match self { $(ReduceFunction::$variant => $name),* }
            }
            fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(ReduceFunction::$variant),)* _ => None }
            }
        }
    };
}

functions! {
    Sum "ReduceSum",
    /// Nothing reduces to NaN.
    Mean "ReduceMean",
    /// Nothing reduces to −∞, the type's least integer, or false.
    Max "ReduceMax",
    /// Nothing reduces to ∞, the type's largest integer, or true.
    Min "ReduceMin",
    Prod "ReduceProd",
    /// `Σ |x|`.
    L1 "ReduceL1",
    /// `√Σ x²`.
    L2 "ReduceL2",
    /// `log Σ x`.
    LogSum "ReduceLogSum",
    /// `log Σ exp(x)`.
    LogSumExp "ReduceLogSumExp",
    SumSquare "ReduceSumSquare",
}

impl Operator for Reduce {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let function = ReduceFunction::from_name(&node.op_type).expect("listed under this name");
        let axes_are_input = node.opset >= if function == ReduceFunction::Sum { 13 } else { 18 };
        node.expect_inputs(if axes_are_input { 1..=2 } else { 1..=1 })?;
        if !axes_are_input && let Some(axes) = node.optional_ints("axes")? {
            let tensor = Tensor::from_vec([axes.len()], axes).expect("as many as there are");
            node.push_constant(1, tensor);
        }
        let keep_dims = node.flag("keepdims", true)?;
        let noop_with_empty_axes = axes_are_input && node.flag("noop_with_empty_axes", false)?;
        Ok(Reduce { function, keep_dims, noop_with_empty_axes }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new(self.function.name())
            .with("keepdims", i64::from(self.keep_dims))
            .with("noop_with_empty_axes", i64::from(self.noop_with_empty_axes))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(dims) = &x.shape else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let axes = match inputs.optional_tensor(1)? {
            None => Some(Vec::new()),
            Some(axes) if axes.constant_shape() == Some(vec![0]) => Some(Vec::new()),
            Some(axes) => axes.constant_value(),
        };
        let Some(axes) = axes else {
            // Which extents become 1 only the data says.
            let shape = self.keep_dims.then(|| (0..dims.len()).map(|i| context.fresh(&format!("d{i}"))).collect());
            return Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()]);
        };
        let reduced = self.reduced(&axes, dims.len())?;
        let fact = TensorFact::new(x.dtype, self.output(dims, &reduced, Dim::Const(1)));
        let value = x.value.as_ref().filter(|_| reduced.iter().all(|&r| r)).and_then(|v| self.of_symbols(v));
        Ok(vec![fact.with_value(value.map(|v| vec![v])).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let axes = if inputs.get(1).is_some() { inputs.integers(1)? } else { Vec::new() };
        let reduced = self.reduced(&axes, x.shape().rank())?;
        let output = Shape::from(self.output(x.shape(), &reduced, 1));
        let len = context.bounded_len(&output)?;
        let groups = Groups::new(x.shape(), &reduced);
        let y = match Wide::of(x)? {
            Wide::Float(x) => Wide::Float(groups.map(len, &x, |values| self.function.of_floats(values))),
            Wide::Int(values) => {
                let bounds = bounds_of_integers(x.dtype());
                Wide::Int(groups.map(len, &values, |values| self.function.of_integers(values, bounds)))
            }
            Wide::Bool(x) => {
                let function: fn(&[bool]) -> bool = match self.function {
                    ReduceFunction::Max => |values| values.contains(&true),
                    ReduceFunction::Min => |values| !values.contains(&false),
                    other => return Err(OpError::input(format!("{} is not defined on bool", other.name()))),
                };
                Wide::Bool(groups.map(len, &x, function))
            }
        };
        Ok(vec![y.narrow(x.dtype(), output)?.into()])
    }
}

impl Reduce {
    /// For every axis, whether it is reduced.
    pub fn reduced(&self, axes: &[i64], rank: usize) -> Result<Vec<bool>, OpError> {
        if axes.is_empty() {
            return Ok(vec![!self.noop_with_empty_axes; rank]);
        }
        let mut reduced = vec![false; rank];
        for &axis in axes {
            reduced[normalize_axis(axis, rank)?] = true;
        }
        Ok(reduced)
    }

    fn output<T: Clone>(&self, dims: &[T], reduced: &[bool], one: T) -> Vec<T> {
        let dims = dims.iter().zip(reduced);
        dims.filter_map(|(d, &r)| if !r { Some(d.clone()) } else { self.keep_dims.then(|| one.clone()) }).collect()
    }

    /// What exporters compute shapes with.
    fn of_symbols(&self, values: &[Dim]) -> Option<Dim> {
        let mut values = values.iter().cloned();
        match self.function {
            ReduceFunction::Sum => values.try_fold(Dim::Const(0), |a, b| (a + b).unless_overflown()),
            ReduceFunction::Prod => values.try_fold(Dim::Const(1), |a, b| (a * b).unless_overflown()),
            ReduceFunction::Max => values.reduce(|a, b| a.maximum(&b)),
            ReduceFunction::Min => values.reduce(|a, b| a.minimum(&b)),
            _ => None,
        }
    }
}

impl ReduceFunction {
    pub fn of_floats(self, x: &[f64]) -> f64 {
        use ReduceFunction::*;
        let largest = || x.iter().fold(f64::NEG_INFINITY, |a, &b| if b > a || b.is_nan() { b } else { a });
        let sum = |f: fn(f64) -> f64| x.iter().map(|&x| f(x)).sum::<f64>();
        match self {
            // From +0.0: the sum of an empty iterator is -0.0.
            Sum => x.iter().fold(0.0, |a, b| a + b),
            Mean => x.iter().fold(0.0, |a, b| a + b) / x.len() as f64,
            Max => largest(),
            Min => x.iter().fold(f64::INFINITY, |a, &b| if b < a || b.is_nan() { b } else { a }),
            Prod => x.iter().product(),
            L1 => sum(f64::abs) + 0.0,
            L2 => sum(|x| x * x).max(0.0).sqrt(),
            LogSum => (x.iter().fold(0.0, |a, b| a + b)).ln(),
            LogSumExp => {
                let largest = largest();
                if largest.is_infinite() {
                    largest
                } else {
                    largest + x.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
                }
            }
            SumSquare => sum(|x| x * x) + 0.0,
        }
    }

    /// Fractions are cut off, as in an integer division.
    pub fn of_integers(self, x: &[i128], (least, most): (i128, i128)) -> i128 {
        use ReduceFunction::*;
        let sum = || x.iter().fold(0i128, |a, &b| a.wrapping_add(b));
        match self {
            Sum => sum(),
            Mean => sum().checked_div(x.len() as i128).unwrap_or(0),
            Max => x.iter().copied().max().unwrap_or(least),
            Min => x.iter().copied().min().unwrap_or(most),
            Prod => x.iter().fold(1i128, |a, &b| a.wrapping_mul(b)),
            L1 => x.iter().fold(0i128, |a, &b| a.wrapping_add(b.abs())),
            SumSquare => x.iter().fold(0i128, |a, &b| a.wrapping_add(b.wrapping_mul(b))),
            L2 | LogSum | LogSumExp => {
                let floats: Vec<f64> = x.iter().map(|&x| x as f64).collect();
                self.of_floats(&floats) as i128
            }
        }
    }
}

/// Least and largest value of an integer type.
pub fn bounds_of_integers(dtype: DType) -> (i128, i128) {
    match dtype {
        DType::I8 => (i8::MIN.into(), i8::MAX.into()),
        DType::I16 => (i16::MIN.into(), i16::MAX.into()),
        DType::I32 => (i32::MIN.into(), i32::MAX.into()),
        DType::I64 => (i64::MIN.into(), i64::MAX.into()),
        DType::U8 => (0, u8::MAX.into()),
        DType::U16 => (0, u16::MAX.into()),
        DType::U32 => (0, u32::MAX.into()),
        _ => (0, u64::MAX.into()),
    }
}

/// The elements of a tensor in groups that reduce to one element each.
struct Groups {
    /// Extent and stride of each kept axis, and of each reduced one.
    kept: Vec<(usize, usize)>,
    reduced: Vec<(usize, usize)>,
}

impl Groups {
    fn new(shape: &Shape, reduced: &[bool]) -> Groups {
        let axes = || shape.iter().copied().zip(shape.strides()).zip(reduced);
        Groups {
            kept: axes().filter(|(_, r)| !**r).map(|(axis, _)| axis).collect(),
            reduced: axes().filter(|(_, r)| **r).map(|(axis, _)| axis).collect(),
        }
    }

    /// `function` of each of the `count` groups, in row-major order of the kept axes.
    fn map<T: Copy, R>(&self, count: usize, values: &[T], mut function: impl FnMut(&[T]) -> R) -> Vec<R> {
        let members = if count == 0 { Vec::new() } else { offsets(&self.reduced) };
        let starts = if count == 0 { Vec::new() } else { offsets(&self.kept) };
        let mut group = Vec::with_capacity(members.len());
        (starts.into_iter())
            .map(|start| {
                group.clear();
                group.extend(members.iter().map(|member| values[start + member]));
                function(&group)
            })
            .collect()
    }
}

/// The flat offset of every multi-index of axes of these extents and strides, row-major.
fn offsets(axes: &[(usize, usize)]) -> Vec<usize> {
    if axes.iter().any(|&(extent, _)| extent == 0) {
        return Vec::new();
    }
    axes.iter().fold(vec![0], |offsets, &(extent, stride)| {
        offsets.iter().flat_map(|offset| (0..extent).map(move |i| offset + i * stride)).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("ReduceSum", 13)
            .with("keepdims", 0)
            .wave(&[2, 3])
            .input(tensor::<i64>(&[1], &[-1]))
            .gives([f32s(&[2], &[-1.25, 0.75])]);
        case("ReduceMean", 18)
            .wave(&[2, 3, 2])
            .input(tensor::<i64>(&[2], &[0, 2]))
            .gives([f32s(&[1, 3, 1], &[0.0625, 0.125, -0.5])]);
        case("ReduceMax", 13).with("axes", vec![1i64]).wave(&[2, 3]).gives([f32s(&[2, 1], &[0.5, 1.25])]);
        case("ReduceMin", 18).with("keepdims", 0).wave(&[2, 3]).gives([f32s(&[], &[-1.25])]);
        case("ReduceProd", 13)
            .with("axes", vec![0i64])
            .with("keepdims", 0)
            .wave(&[2, 3])
            .gives([f32s(&[3], &[-1.5625, 0.125, 0.375])]);
        case("ReduceL1", 18).wave(&[2, 2]).gives([f32s(&[1, 1], &[3.5])]);
        case("ReduceL2", 18).wave(&[2, 2]).input(tensor::<i64>(&[1], &[1])).gives([f32s(&[2, 1], &[1.34629, 1.34629])]);
        case("ReduceLogSum", 18).input(f32s(&[3], &[1.0, 2.0, 4.0])).gives([f32s(&[1], &[1.94591])]);
        case("ReduceLogSumExp", 18).input(f32s(&[3], &[100.0, 101.0, 0.0])).gives([f32s(&[1], &[101.313])]);
        case("ReduceSumSquare", 18)
            .with("noop_with_empty_axes", 1)
            .wave(&[2, 2])
            .input(tensor::<i64>(&[1], &[0]))
            .gives([f32s(&[1, 2], &[1.8125, 1.8125])]);
        case("ReduceSum", 13)
            .with("noop_with_empty_axes", 1)
            .wave(&[2, 2])
            .gives([f32s(&[2, 2], &[-1.25, 0.5, -0.5, 1.25])]);
        case("ReduceSum", 11).with("axes", vec![-2i64]).input(tensor::<i32>(&[2, 2], &[1, 2, 3, 4])).gives([tensor::<
            i32,
        >(
            &[1, 2],
            &[4, 6],
        )]);
        case("ReduceMax", 20)
            .input(f32s(&[0, 2], &[]))
            .input(tensor::<i64>(&[1], &[0]))
            .gives([f32s(&[1, 2], &[f32::NEG_INFINITY, f32::NEG_INFINITY])]);
        case("ReduceProd", 18)
            .input(f32s(&[0, 2], &[]))
            .input(tensor::<i64>(&[1], &[0]))
            .gives([f32s(&[1, 2], &[1.0, 1.0])]);
        case("ReduceSum", 13)
            .input(f32s(&[2, 0], &[]))
            .input(tensor::<i64>(&[1], &[1]))
            .gives([f32s(&[2, 1], &[0.0, 0.0])]);
    }

    #[test]
    fn axes_outside_are_errors() {
        case("ReduceSum", 13).wave(&[2, 3]).input(tensor::<i64>(&[1], &[2])).fails("axis 2 of a tensor of rank 2");
        case("ReduceSum", 13)
            .with("axes", vec![0i64])
            .wave(&[2, 3])
            .fails("has attribute 'axes', which opset 13 does not define");
    }

    #[test]
    fn sums_and_products_of_shapes_stay_known() {
        let dims = vec![Dim::symbol("N"), 3.into(), Dim::symbol("N")];
        let list = TensorFact::new(DType::I64, vec![3.into()]).with_value(Some(dims));
        for (function, expected) in [(ReduceFunction::Sum, "2*N + 3"), (ReduceFunction::Prod, "3*N*N")] {
            let reduce = Reduce { function, keep_dims: false, noop_with_empty_axes: false };
            let facts =
                reduce.infer(Facts(&[Some(&list.clone().into())]), &InferContext { node: "n", outputs: 1 }).unwrap();
            let value = facts[0].tensor().unwrap().value.clone().unwrap();
            assert_eq!(value[0].to_string(), expected);
        }
    }
}
