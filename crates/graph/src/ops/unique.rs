//! The different elements of a tensor.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, movement, normalize_axis,
    select,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::cmp::Ordering;

/// The different elements, flat, or along `axis` the different slices: in ascending order (slices by their first elements that
/// differ), or in the order in which each comes first. Further outputs (i64, flat): for each of them where it comes first and how
/// often (the last output), and for each element or slice of the input which of them it is. NaNs are equal and come last.
#[derive(Clone, Debug, PartialEq)]
pub struct Unique {
    pub axis: Option<i64>,
    pub sorted: bool,
}

impl Operator for Unique {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        Ok(Unique { axis: node.optional_int("axis")?, sorted: node.flag("sorted", true)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Unique").with("sorted", i64::from(self.sorted));
        match self.axis {
            Some(axis) => spelling.with("axis", axis),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let count = context.fresh("unique");
        let (shape, of_input) = match (self.axis, &x.shape) {
            (None, Some(_)) => (Some(vec![count.clone()]), x.element_count()),
            (None, None) => (Some(vec![count.clone()]), None),
            (Some(_), None) => (None, None),
            (Some(axis), Some(dims)) => {
                let axis = normalize_axis(axis, dims.len())?;
                let mut dims = dims.clone();
                let extent = std::mem::replace(&mut dims[axis], count.clone());
                (Some(dims), Some(extent))
            }
        };
        let y = TensorFact { dtype: x.dtype, shape, value: None };
        let list = |extent| Fact::from(TensorFact::new(DType::I64, [extent]));
        let inverse = of_input.unwrap_or_else(|| context.fresh("elements"));
        Ok(vec![y.into(), list(count.clone()), list(inverse), list(count)])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = match self.axis {
            None => vec![x.element_count()],
            Some(_) => x.shape().to_vec(),
        };
        let axis = normalize_axis(self.axis.unwrap_or(0), shape.len())?;
        let (outer, extent, inner) = movement::around(&shape, axis);
        let compare = comparison(x)?;
        let element = |slice: usize, i: usize| (i / inner * extent + slice) * inner + i % inner;
        let order = |&a: &usize, &b: &usize| {
            let elements = (0..outer * inner).map(|i| compare(element(a, i), element(b, i)));
            elements.fold(Ordering::Equal, Ordering::then)
        };
        let mut slices: Vec<usize> = (0..extent).collect();
        slices.sort_by(order);
        // Equal slices follow each other now, the first of the input first.
        let mut groups: Vec<Vec<usize>> = slices.chunk_by(|a, b| order(a, b).is_eq()).map(<[usize]>::to_vec).collect();
        if !self.sorted {
            groups.sort_by_key(|group| group[0]);
        }
        let mut inverse = vec![0i64; extent];
        for (at, group) in groups.iter().enumerate() {
            group.iter().for_each(|&slice| inverse[slice] = at as i64);
        }
        let mut to = shape.clone();
        to[axis] = groups.len();
        let block = (groups.len() * inner).max(1);
        let count = outer * groups.len() * inner;
        let sources = (0..count).map(|n| {
            let (o, rest) = (n / block, n % block);
            (o * extent + groups[rest / inner][0]) * inner + rest % inner
        });
        let y = select(x, to, sources)?;
        let list = |values: Vec<i64>| Tensor::from_vec([values.len()], values);
        let first = list(groups.iter().map(|group| group[0] as i64).collect())?;
        let counts = list(groups.iter().map(|group| group.len() as i64).collect())?;
        Ok(vec![y.into(), first.into(), list(inverse)?.into(), counts.into()])
    }
}

/// How the elements at two flat indices compare.
fn comparison(x: &Tensor) -> Result<Box<dyn Fn(usize, usize) -> Ordering + '_>, OpError> {
    // Numbers compare as numbers, so that zeros of both signs are equal.
    let numbers = |a: f64, b: f64| a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()));
    if x.dtype() == DType::String {
        let strings = x.strings()?;
        return Ok(Box::new(move |a, b| strings[a].cmp(&strings[b])));
    }
    Ok(match Wide::of(x)? {
        Wide::Float(v) => Box::new(move |a, b| numbers(v[a], v[b])),
        Wide::Int(v) => Box::new(move |a, b| v[a].cmp(&v[b])),
        Wide::Bool(v) => Box::new(move |a, b| v[a].cmp(&v[b])),
    })
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::{Tensor, Value};

    fn ints(values: &[i64]) -> Tensor {
        tensor::<i64>(&[values.len()], values)
    }

    #[test]
    fn the_specifications_examples() {
        let x = f32s(&[6], &[2., 1., 1., 3., 4., 3.]);
        let first = case("Unique", 11).with("sorted", 0).input(x);
        first.gives([
            f32s(&[4], &[2., 1., 3., 4.]),
            ints(&[0, 1, 3, 4]),
            ints(&[0, 1, 1, 2, 3, 2]),
            ints(&[1, 2, 2, 1]),
        ]);
        let flat = case("Unique", 11).input(tensor::<i8>(&[2, 2], &[1, 3, 2, 3]));
        flat.gives([tensor::<i8>(&[3], &[1, 2, 3]), ints(&[0, 2, 1]), ints(&[0, 2, 1, 2]), ints(&[1, 1, 2])]);
        let rows = case("Unique", 28).with("axis", 0).input(f32s(&[3, 3], &[1., 0., 0., 1., 0., 0., 2., 3., 4.]));
        rows.gives([f32s(&[2, 3], &[1., 0., 0., 2., 3., 4.]), ints(&[0, 2]), ints(&[0, 0, 1]), ints(&[2, 1])]);
        let half = [1., 1., 0., 1., 2., 1., 0., 1.];
        let slices = case("Unique", 28).with("axis", -2).input(f32s(&[2, 4, 2], &[half, half].concat()));
        let y = f32s(&[2, 3, 2], &[0., 1., 1., 1., 2., 1., 0., 1., 1., 1., 2., 1.]);
        slices.gives([y, ints(&[1, 0, 2]), ints(&[1, 0, 2, 0]), ints(&[2, 1, 1])]);
    }

    #[test]
    fn every_type_has_an_order() {
        let words = case("Unique", 11).input(strings(&[3], &["b", "a", "b"]));
        words.gives([strings(&[2], &["a", "b"]), ints(&[1, 0]), ints(&[1, 0, 1]), ints(&[1, 2])]);
        let nan = f32::NAN;
        case("Unique", 11).input(f32s(&[5], &[nan, 0., -0., nan, -1.])).gives([f32s(&[3], &[-1., 0., nan])]);
        let bools = |values: &[bool]| Tensor::from_bools([values.len()], values).unwrap();
        case("Unique", 11).input(bools(&[true, false, true])).gives([bools(&[false, true])]);
    }

    #[test]
    fn nothing_is_different() {
        let none: [Value; 4] = [f32s(&[0], &[]).into(), ints(&[]).into(), ints(&[]).into(), ints(&[]).into()];
        case("Unique", 11).wave(&[0, 2]).gives(none);
        case("Unique", 11).with("axis", 1).wave(&[0, 2]).gives([f32s(&[0, 1], &[]), ints(&[0])]);
        case("Unique", 11).with("axis", 2).wave(&[0, 2]).fails("axis 2");
    }
}
