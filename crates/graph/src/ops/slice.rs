//! Ranges of axes.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement, normalize_axis};
use crate::{Dim, Fact, ImportError, OpError};
use cutover_tensor::Value;

/// Inputs `x`, `starts`, `ends`, and optionally `axes` (all, from the first) and `steps` (1): elements `start, start + step, …` before
/// `end`. Negative positions count from the end, and all are clamped to the axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice;

/// One axis' first position, step and number of elements.
fn range(extent: usize, start: i64, end: i64, step: i64) -> Result<(usize, isize, usize), OpError> {
    let n = extent as i64;
    let wrap = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
    let (low, high) = if step > 0 { (0, n) } else { (-1, n - 1) };
    if step == 0 {
        return Err(OpError::input("a step of 0"));
    }
    if n == 0 {
        return Ok((0, step as isize, 0));
    }
    // An end of -1 with a negative step means the last element, as in NumPy: only what is below -n reaches before the first.
    let (start, end) = (wrap(start).clamp(low.max(0), high), wrap(end).clamp(low, high));
    let distance = if step > 0 { end - start } else { start - end };
    let count = if distance <= 0 { 0 } else { (distance as u64).div_ceil(step.unsigned_abs()) as usize };
    Ok((start.max(0) as usize, step as isize, count))
}

struct Ranges {
    axes: Vec<usize>,
    starts: Vec<i64>,
    ends: Vec<i64>,
    steps: Vec<i64>,
}

impl Ranges {
    fn new(
        rank: usize,
        starts: Vec<i64>,
        ends: Vec<i64>,
        axes: Option<Vec<i64>>,
        steps: Option<Vec<i64>>,
    ) -> Result<Ranges, OpError> {
        let count = starts.len();
        let axes = axes.unwrap_or_else(|| (0..count as i64).collect());
        let steps = steps.unwrap_or_else(|| vec![1; count]);
        if ends.len() != count || axes.len() != count || steps.len() != count {
            let lengths = format!("{count}, {}, {} and {}", ends.len(), axes.len(), steps.len());
            return Err(OpError::input(format!("starts, ends, axes and steps of lengths {lengths}")));
        }
        Ok(Ranges { axes: super::normalize_axes(&axes, rank)?, starts, ends, steps })
    }

    fn moved(&self, shape: &[usize]) -> Result<movement::Moved, OpError> {
        let strides = movement::strides(shape);
        let mut to = shape.to_vec();
        let mut steps: Vec<isize> = strides.iter().map(|&s| s as isize).collect();
        let mut first = 0;
        for (i, &axis) in self.axes.iter().enumerate() {
            let (start, step, count) = range(shape[axis], self.starts[i], self.ends[i], self.steps[i])?;
            first += start * strides[axis];
            to[axis] = count;
            steps[axis] = steps[axis].saturating_mul(step);
        }
        Ok(movement::strided(to, steps, first))
    }
}

/// The extent of a slice of a symbolic axis, where it can be told.
fn symbolic_extent(extent: &Dim, start: &Dim, end: &Dim, step: i64) -> Option<Dim> {
    if let (Some(n), Some(start), Some(end)) = (extent.as_const(), start.as_const(), end.as_const()) {
        return range(usize::try_from(n).ok()?, start, end, step).ok().map(|r| Dim::from(r.2));
    }
    let wrap = |v: &Dim| {
        if v.lower_bound().is_none_or(|b| b < 0) && v.as_const().is_some_and(|c| c < 0) {
            extent.clone() + v.clone()
        } else {
            v.clone()
        }
    };
    let huge = |v: &Dim| v.as_const().is_some_and(|c| c >= i64::from(i32::MAX));
    let far = |v: &Dim| v.as_const().is_some_and(|c| c <= -i64::from(i32::MAX));
    if step > 0 {
        let start = wrap(start).minimum(extent).maximum(&Dim::Const(0));
        let end =
            if huge(end) || end == extent { extent.clone() } else { wrap(end).minimum(extent).maximum(&Dim::Const(0)) };
        let length = end - start;
        let length = if length.lower_bound().is_some_and(|b| b >= 0) { length } else { length.maximum(&Dim::Const(0)) };
        return Some(if step == 1 { length } else { length.ceil_div(&Dim::Const(step)) });
    }
    // Backwards from the last to the first: a reversal.
    let whole = start.as_const() == Some(-1) || huge(start);
    (step == -1 && whole && far(end)).then(|| extent.clone())
}

impl Operator for Slice {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        if node.opset < 10 {
            node.expect_inputs(1..=1)?;
            let missing = |node: &NodeReader, name: &str| node.corrupt(format!("attribute '{name}' is missing"));
            let starts = node.optional_ints("starts")?.ok_or_else(|| missing(node, "starts"))?;
            let ends = node.optional_ints("ends")?.ok_or_else(|| missing(node, "ends"))?;
            for (index, values) in [(1, Some(starts)), (2, Some(ends)), (3, node.optional_ints("axes")?)] {
                if let Some(values) = values {
                    let tensor = movement::integers(node, values)?;
                    node.push_constant(index, tensor);
                }
            }
        }
        node.expect_inputs(3..=5)?;
        Ok(Slice.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("Slice")
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let Some(shape) = &x.shape else { return movement::moved_fact(x, None, |_| unreachable!("no shape is known")) };
        let starts = inputs.tensor(1)?;
        if starts.rank().is_some_and(|rank| rank != 1) {
            return Err(OpError::input(format!("expected a list of starts, got {starts}")));
        }
        let length = starts.constant_shape().and_then(|s| s.first().copied());
        if let Some(length) = length.filter(|&length| length > shape.len()) {
            return Err(OpError::input(format!("{length} ranges for a tensor of {} axes", shape.len())));
        }
        let all = || length.map(|n| (0..n as i64).collect::<Vec<_>>());
        let axes = if inputs.get(3).is_some() { movement::known_integers(inputs, 3)? } else { all() };
        let steps = match inputs.get(4) {
            Some(_) => movement::known_integers(inputs, 4)?,
            None => length.map(|n| vec![1; n]),
        };
        let mut dims = shape.clone();
        let Some(axes) = axes else {
            // Which axes change is not known: none of their extents is.
            let fresh = (0..dims.len()).map(|a| context.fresh(&format!("dim{a}"))).collect();
            return movement::moved_fact(&crate::TensorFact { value: None, ..x.clone() }, Some(fresh), |_| {
                unreachable!("no value is known")
            });
        };
        let (start, end) = (&starts.value, &inputs.tensor(2)?.value);
        for (i, &axis) in axes.iter().enumerate() {
            let axis = normalize_axis(axis, shape.len())?;
            let extent = match (start, end, &steps) {
                (Some(s), Some(e), Some(steps)) if i < s.len() && i < e.len() && i < steps.len() => {
                    symbolic_extent(&shape[axis], &s[i], &e[i], steps[i])
                }
                _ => None,
            };
            dims[axis] = extent.unwrap_or_else(|| context.fresh(&format!("dim{axis}")));
        }
        let constants =
            |v: &Option<Vec<Dim>>| v.as_ref().and_then(|v| v.iter().map(Dim::as_const).collect::<Option<Vec<_>>>());
        match (constants(start), constants(end), steps) {
            (Some(starts), Some(ends), Some(steps)) => {
                let ranges = Ranges::new(shape.len(), starts, ends, Some(axes), Some(steps))?;
                movement::moved_fact(x, Some(dims), |shape| ranges.moved(shape))
            }
            _ => Ok(vec![crate::TensorFact::new(x.dtype, dims).into()]),
        }
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        if inputs.tensor(1)?.shape().rank() != 1 {
            return Err(OpError::input(format!("expected a list of starts, got {:?}", inputs.tensor(1)?)));
        }
        let optional = |i: usize| inputs.get(i).map(|_| inputs.integers(i)).transpose();
        let ranges = Ranges::new(shape.len(), inputs.integers(1)?, inputs.integers(2)?, optional(3)?, optional(4)?)?;
        ranges.moved(shape)?.apply(x)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn nothing_has_no_elements_in_either_direction() {
        for step in [-2, -1, 1, 2] {
            let one = |value: i32| tensor::<i32>(&[1], &[value]);
            let slice = case("Slice", 13).wave(&[0, 2]).input(one(-2)).input(one(0)).input(one(0)).input(one(step));
            slice.gives([f32s(&[0, 2], &[])]);
        }
    }

    #[test]
    fn positions_are_clamped_to_the_axis() {
        let x = || f32s(&[4], &[0., 1., 2., 3.]);
        let slice = |start: i64, end: i64, step: i64, expected: &[f32]| {
            let one = |value: i64| tensor::<i64>(&[1], &[value]);
            let slice = case("Slice", 13).input(x()).input(one(start)).input(one(end)).input(one(0)).input(one(step));
            slice.gives([f32s(&[expected.len()], expected)]);
        };
        slice(1, i64::MAX, 2, &[1., 3.]);
        slice(-1, i64::MIN, -2, &[3., 1.]);
        slice(9, -9, -1, &[3., 2., 1., 0.]);
        slice(-9, i64::MAX, -1, &[]);
        slice(2, 1, 1, &[]);
        slice(1, 4, i64::MAX, &[1.]);
        slice(2, i64::MIN, i64::MIN + 1, &[2.]);
    }

    #[test]
    fn starts_are_a_list() {
        let node = |starts: &[usize]| case("Slice", 13).wave(&[2, 2]).input(tensor::<i64>(starts, &[1, 1]));
        node(&[2]).input(tensor::<i64>(&[2], &[2, 2])).gives([f32s(&[1, 1], &[1.25])]);
        node(&[1, 2]).input(tensor::<i64>(&[2], &[2, 2])).fails("expected a list of starts");
    }
}
