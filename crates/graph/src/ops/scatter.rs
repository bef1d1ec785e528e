//! Replacement or combination of elements at given indices.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, gather, movement,
    normalize_axis, select_from,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// Inputs `x`, `indices` and `updates`: `x` with the updates put where the indices say, one after the other. Negative indices count from
/// the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Scatter {
    pub place: ScatterPlace,
    pub reduction: ScatterReduction,
}

/// How an index says where its update goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScatterPlace {
    /// `updates[i₀, …]` to `x[i₀, …, indices[i₀, …], …]` at `axis`.
    Elements { axis: i64 },
    /// `indices [counts…, n]`: `updates [counts…, …]` to the slices of `x` that every `n` indices select along its first axes.
    Slices,
}

/// What becomes of the element that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScatterReduction {
    Replace,
    Add,
    Multiply,
    Maximum,
    Minimum,
}

const REDUCTIONS: [(&str, ScatterReduction); 5] = [
    ("none", ScatterReduction::Replace),
    ("add", ScatterReduction::Add),
    ("mul", ScatterReduction::Multiply),
    ("max", ScatterReduction::Maximum),
    ("min", ScatterReduction::Minimum),
];

impl Scatter {
    /// For every update, row-major, the flat index of the element of `x` that it changes.
    fn targets(
        &self,
        x: &[usize],
        indices: &[i64],
        index_shape: &[usize],
        updates: &[usize],
    ) -> Result<Vec<usize>, OpError> {
        let strides = movement::strides(x);
        let count = Shape::new(updates).checked_len().unwrap_or(0);
        match self.place {
            ScatterPlace::Elements { axis } => {
                let axis = normalize_axis(axis, x.len())?;
                let within = |a: usize| a == axis || updates[a] <= x[a];
                if index_shape != updates || updates.len() != x.len() || !(0..x.len()).all(within) {
                    return Err(mismatch(x, index_shape, updates));
                }
                let ignored = strides.iter().enumerate().map(|(a, &s)| if a == axis { 0 } else { s as isize });
                let lines = movement::strided(updates.to_vec(), ignored.collect(), 0).sources;
                lines.zip(indices).map(|(at, &i)| Ok(at + gather::index(i, x[axis])? * strides[axis])).collect()
            }
            ScatterPlace::Slices => {
                let tuple = index_shape.last().copied().filter(|&n| n <= x.len());
                let expected = tuple.map(|n| [&index_shape[..index_shape.len() - 1], &x[n..]].concat());
                let (Some(tuple), true) = (tuple, expected.is_some_and(|shape| shape == updates)) else {
                    return Err(mismatch(x, index_shape, updates));
                };
                let slice: usize = x[tuple..].iter().product();
                let mut targets = Vec::with_capacity(count);
                for n in 0..count.checked_div(slice).unwrap_or(0) {
                    let mut start = 0;
                    for (axis, &given) in indices[n * tuple..][..tuple].iter().enumerate() {
                        start += gather::index(given, x[axis])? * strides[axis];
                    }
                    targets.extend(start..start + slice);
                }
                Ok(targets)
            }
        }
    }

    fn check_types(&self, x: DType, updates: DType) -> Result<(), OpError> {
        if x != updates {
            return Err(OpError::input(format!("updates of type {updates} for elements of type {x}")));
        }
        Ok(())
    }
}

fn mismatch(x: &[usize], indices: &[usize], updates: &[usize]) -> OpError {
    let [x, indices, updates] = [x, indices, updates].map(Shape::new);
    OpError::input(format!("updates of shape {updates} at indices of shape {indices} of a tensor of shape {x}"))
}

fn float(reduction: ScatterReduction, a: f64, b: f64) -> f64 {
    match reduction {
        ScatterReduction::Replace => b,
        ScatterReduction::Add => a + b,
        ScatterReduction::Multiply => a * b,
        _ if a.is_nan() || b.is_nan() => f64::NAN,
        ScatterReduction::Maximum => a.max(b),
        ScatterReduction::Minimum => a.min(b),
    }
}

fn int(reduction: ScatterReduction, a: i128, b: i128) -> i128 {
    match reduction {
        ScatterReduction::Replace => b,
        // What wraps at 128 bits has the same lowest 64.
        ScatterReduction::Add => a.wrapping_add(b),
        ScatterReduction::Multiply => a.wrapping_mul(b),
        ScatterReduction::Maximum => a.max(b),
        ScatterReduction::Minimum => a.min(b),
    }
}

fn boolean(reduction: ScatterReduction, a: bool, b: bool) -> bool {
    match reduction {
        ScatterReduction::Replace => b,
        ScatterReduction::Add | ScatterReduction::Maximum => a | b,
        ScatterReduction::Multiply | ScatterReduction::Minimum => a & b,
    }
}

fn combine<T: Copy>(x: &mut [T], updates: &[T], targets: &[usize], f: impl Fn(T, T) -> T) {
    for (&target, &update) in targets.iter().zip(updates) {
        x[target] = f(x[target], update);
    }
}

/// `x` with every update combined with the element at its target.
fn combined(x: &Tensor, updates: &Tensor, targets: &[usize], reduction: ScatterReduction) -> Result<Tensor, OpError> {
    if reduction == ScatterReduction::Replace {
        let mut sources: Vec<(usize, usize)> = (0..x.element_count()).map(|i| (0, i)).collect();
        targets.iter().enumerate().for_each(|(update, &target)| sources[target] = (1, update));
        return select_from(&[x, updates], x.shape().clone(), sources.into_iter());
    }
    if x.dtype() == DType::String {
        if reduction != ScatterReduction::Add {
            return Err(OpError::input("strings are only put in place or joined ('add')"));
        }
        let mut strings = x.strings()?.to_vec();
        targets.iter().zip(updates.strings()?).for_each(|(&target, update)| strings[target].push_str(update));
        return Ok(Tensor::from_strings(x.shape().clone(), strings)?);
    }
    let mut wide = Wide::of(x)?;
    match (&mut wide, Wide::of(updates)?) {
        (Wide::Float(x), Wide::Float(u)) => combine(x, &u, targets, |a, b| float(reduction, a, b)),
        (Wide::Int(x), Wide::Int(u)) => combine(x, &u, targets, |a, b| int(reduction, a, b)),
        (Wide::Bool(x), Wide::Bool(u)) => combine(x, &u, targets, |a, b| boolean(reduction, a, b)),
        _ => return Err(OpError::input("updates of another type than the elements")),
    }
    wide.narrow(x.dtype(), x.shape().clone())
}

impl Operator for Scatter {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        let place = match node.op_type.as_str() {
            "ScatterND" => ScatterPlace::Slices,
            _ => ScatterPlace::Elements { axis: node.int("axis", 0)? },
        };
        let name = if node.op_type == "Scatter" { "none".to_string() } else { node.string("reduction", "none")? };
        let reduction = REDUCTIONS.iter().find(|(n, _)| *n == name).map(|&(_, reduction)| reduction);
        let reduction = reduction.ok_or_else(|| {
            node.corrupt(format!("attribute 'reduction' must be none, add, mul, max or min, got '{name}'"))
        })?;
        Ok(Scatter { place, reduction }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match self.place {
            ScatterPlace::Elements { axis } => Spelling::new("ScatterElements").with("axis", axis),
            ScatterPlace::Slices => Spelling::new("ScatterND"),
        };
        let name = REDUCTIONS.iter().find(|(_, r)| *r == self.reduction).map_or("none", |(name, _)| name);
        spelling.with("reduction", name)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, indices, updates) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        gather::check_indices(indices)?;
        self.check_types(x.dtype, updates.dtype)?;
        let fact = TensorFact { value: None, ..x.clone() };
        let shapes = (x.constant_shape(), indices.constant_shape(), updates.constant_shape());
        let value = match (&x.value, indices.constant_value(), &updates.value, shapes) {
            (Some(x), Some(indices), Some(updates), (Some(x_shape), Some(index_shape), Some(update_shape)))
                if self.reduction == ScatterReduction::Replace =>
            {
                let mut value = x.clone();
                let targets = self.targets(&x_shape, &indices, &index_shape, &update_shape)?;
                targets.into_iter().zip(updates).for_each(|(target, update)| value[target] = update.clone());
                Some(value)
            }
            _ => None,
        };
        Ok(vec![fact.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        let updates = inputs.tensor(2)?;
        self.check_types(x.dtype(), updates.dtype())?;
        let targets = self.targets(shape, &inputs.integers(1)?, inputs.tensor(1)?.shape(), updates.shape())?;
        Ok(vec![combined(x, updates, &targets, self.reduction)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    #[test]
    fn elements_agree_with_onnx_runtime() {
        let x = || f32s(&[2, 3], &[1., 2., 3., 4., 5., 6.]);
        let indices = || tensor::<i64>(&[1, 2], &[1, -1]);
        let cases: [(&str, i64, [f32; 6]); 6] = [
            ("none", 0, [1., 2., 3., 9., -7., 6.]),
            ("none", 1, [1., 9., -7., 4., 5., 6.]),
            ("add", 1, [1., 11., -4., 4., 5., 6.]),
            ("mul", 0, [1., 2., 3., 36., -35., 6.]),
            ("max", 0, [1., 2., 3., 9., 5., 6.]),
            ("min", -1, [1., 2., -7., 4., 5., 6.]),
        ];
        for (reduction, axis, expected) in cases {
            let node = case("ScatterElements", 18).with("reduction", reduction).with("axis", axis);
            node.input(x()).input(indices()).input(f32s(&[1, 2], &[9., -7.])).gives([f32s(&[2, 3], &expected)]);
        }
        let old = case("Scatter", 9).input(x()).input(tensor::<i32>(&[1, 1], &[1])).input(f32s(&[1, 1], &[0.]));
        old.gives([f32s(&[2, 3], &[1., 2., 3., 0., 5., 6.])]);
    }

    #[test]
    fn slices_agree_with_onnx_runtime() {
        let x = || tensor::<i64>(&[3, 2], &[1, 2, 3, 4, 5, 6]);
        let node = |reduction: &str, indices: Tensor, updates: Tensor| {
            case("ScatterND", 18).with("reduction", reduction).input(x()).input(indices).input(updates)
        };
        let rows = || tensor::<i64>(&[2, 1], &[2, 0]);
        let updates = || tensor::<i64>(&[2, 2], &[7, 8, 9, 10]);
        node("none", rows(), updates()).gives([tensor::<i64>(&[3, 2], &[9, 10, 3, 4, 7, 8])]);
        node("mul", rows(), updates()).gives([tensor::<i64>(&[3, 2], &[9, 20, 3, 4, 35, 48])]);
        let cell = node("add", tensor::<i64>(&[2, 2], &[0, 1, 0, 1]), tensor::<i64>(&[2], &[10, 20]));
        cell.gives([tensor::<i64>(&[3, 2], &[1, 32, 3, 4, 5, 6])]);
        let all = node("none", tensor::<i64>(&[1, 0], &[]), tensor::<i64>(&[1, 3, 2], &[0; 6]));
        all.gives([tensor::<i64>(&[3, 2], &[0; 6])]);
        node("none", tensor::<i64>(&[0, 1], &[]), tensor::<i64>(&[0, 2], &[])).gives([x()]);
        node("none", rows(), tensor::<i64>(&[2], &[0, 0])).fails("updates of shape [2] at indices of shape [2, 1]");
        node("none", tensor::<i64>(&[1, 1], &[3]), tensor::<i64>(&[1, 2], &[0, 0])).fails("index 3 of an axis of 3");
    }

    #[test]
    fn strings_and_booleans() {
        let node = |reduction: &str, x: Tensor, updates: Tensor| {
            let node = case("ScatterElements", 16).with("reduction", reduction);
            node.input(x).input(tensor::<i64>(&[2], &[1, 1])).input(updates)
        };
        let words = || (strings(&[3], &["a", "b", "c"]), strings(&[2], &["x", "y"]));
        let (x, updates) = words();
        node("none", x, updates).gives([strings(&[3], &["a", "y", "c"])]);
        let (x, updates) = words();
        node("add", x, updates).gives([strings(&[3], &["a", "bxy", "c"])]);
        let (x, updates) = words();
        node("max", x, updates).fails("strings are only put in place or joined");
        let bools = |shape: &[usize], values: &[bool]| Tensor::from_bools(shape, values).expect("as many as elements");
        let (x, updates) = (|| bools(&[3], &[true, false, true]), || bools(&[2], &[true, false]));
        node("add", x(), updates()).gives([bools(&[3], &[true, true, true])]);
        node("mul", x(), updates()).gives([bools(&[3], &[true, false, true])]);
    }
}
