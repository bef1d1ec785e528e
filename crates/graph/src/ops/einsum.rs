//! Sums of products in Einstein's notation.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast::broadcast_dim,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};
use std::{
    num::Wrapping,
    ops::{AddAssign, Mul},
};

/// NumPy's `einsum`: `equation` names the axes of every input and of the result, e.g. `bij,bjk->bik`; axes that the result lacks
/// are summed over, `...` stands for any axes that broadcast, and without `->` the result has every letter that occurs once,
/// sorted.
#[derive(Clone, Debug, PartialEq)]
pub struct Einsum {
    pub equation: String,
}

/// An axis: a letter, or one that an ellipsis stands for, counted from the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    Ellipsis(usize),
    Letter(char),
}

/// The equation for inputs of known ranks.
struct Terms {
    inputs: Vec<Vec<Label>>,
    output: Vec<Label>,
}

impl Operator for Einsum {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        match node.optional_string("equation")? {
            Some(equation) => Ok(Einsum { equation: equation.split_whitespace().collect() }.into()),
            None => Err(node.corrupt("attribute 'equation' is missing")),
        }
    }

    fn export(&self) -> Spelling {
        Spelling::new("Einsum").with("equation", self.equation.as_str())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let facts = (0..inputs.len()).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        for index in 1..facts.len() {
            inputs.same_dtype(0, index)?;
        }
        let dtype = inputs.tensor(0)?.dtype;
        let Some(shapes) = facts.iter().map(|fact| fact.shape.as_deref()).collect::<Option<Vec<_>>>() else {
            return Ok(vec![TensorFact::unknown_rank(dtype).into()]);
        };
        let terms = self.terms(&shapes.iter().map(|s| s.len()).collect::<Vec<_>>())?;
        let extents = extents(&terms, &shapes)?;
        let shape = terms.output.iter().map(|label| extent_of(&extents, label).clone()).collect::<Vec<_>>();
        Ok(vec![TensorFact::new(dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let tensors = (0..inputs.len()).map(|i| inputs.tensor(i)).collect::<Result<Vec<_>, _>>()?;
        let dtype = inputs.tensor(0)?.dtype();
        let terms = self.terms(&tensors.iter().map(|t| t.shape().rank()).collect::<Vec<_>>())?;
        let dims: Vec<Vec<Dim>> = tensors.iter().map(|t| t.shape().iter().map(|&d| d.into()).collect()).collect();
        let extents = extents(&terms, &dims.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let contraction = Contraction::new(&terms, &extents, &tensors.iter().map(|t| t.shape()).collect::<Vec<_>>());
        let output = contraction.output.clone();
        context.bounded_len(&output)?;
        context.bounded_work(&contraction.extents)?;
        let values = tensors.iter().map(|t| Wide::of(t)).collect::<Result<Vec<_>, _>>()?;
        let mut floats = Vec::new();
        let mut integers = Vec::new();
        for value in &values {
            match value {
                Wide::Float(v) => floats.push(v.as_slice()),
                Wide::Int(v) => integers.push(v.iter().map(|&x| Wrapping(x)).collect::<Vec<_>>()),
                Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
            }
        }
        let y = match (floats.is_empty(), integers.is_empty()) {
            (false, true) => Wide::Float(contraction.apply(&floats, 1.0)),
            (true, false) => {
                let integers: Vec<_> = integers.iter().map(Vec::as_slice).collect();
                Wide::Int(contraction.apply(&integers, Wrapping(1)).into_iter().map(|x| x.0).collect())
            }
            _ => return Err(OpError::input("expected inputs of one type")),
        };
        Ok(vec![y.narrow(dtype, output)?.into()])
    }
}

impl Einsum {
    /// For inputs of these ranks the label of every axis of each, and of the result: axes of one label are one.
    pub fn labels(&self, ranks: &[usize]) -> Result<(Vec<Vec<usize>>, Vec<usize>), OpError> {
        let Terms { inputs, output } = self.terms(ranks)?;
        let mut known: Vec<Label> = Vec::new();
        let mut number = |label: Label| match known.iter().position(|&l| l == label) {
            Some(number) => number,
            None => {
                known.push(label);
                known.len() - 1
            }
        };
        let inputs = inputs.into_iter().map(|labels| labels.into_iter().map(&mut number).collect()).collect();
        Ok((inputs, output.into_iter().map(&mut number).collect()))
    }

    fn terms(&self, ranks: &[usize]) -> Result<Terms, OpError> {
        let bad = |why: String| OpError::input(format!("equation '{}': {why}", self.equation));
        let (left, right) = match self.equation.split_once("->") {
            Some((left, right)) => (left, Some(right)),
            None => (self.equation.as_str(), None),
        };
        let sides: Vec<&str> = left.split(',').collect();
        if sides.len() != ranks.len() {
            return Err(bad(format!("is for {} inputs, there are {}", sides.len(), ranks.len())));
        }
        let parse = |term: &str, ellipsis: &dyn Fn(usize) -> Result<usize, OpError>| -> Result<Vec<Label>, OpError> {
            let (before, after) = match term.split_once("...") {
                Some((before, after)) => (before, Some(after)),
                None => (term, None),
            };
            if let Some(other) =
                before.chars().chain(after.unwrap_or_default().chars()).find(|c| !c.is_ascii_alphabetic())
            {
                return Err(bad(format!("'{other}' is no letter")));
            }
            let letters = before.len() + after.map_or(0, str::len);
            let covered = if after.is_some() { ellipsis(letters)? } else { 0 };
            let mut labels: Vec<Label> = before.chars().map(Label::Letter).collect();
            labels.extend((0..covered).rev().map(Label::Ellipsis));
            labels.extend(after.unwrap_or_default().chars().map(Label::Letter));
            Ok(labels)
        };
        let mut inputs = Vec::new();
        for (term, &rank) in sides.iter().zip(ranks) {
            let short = || bad(format!("'{term}' has more letters than the {rank} axes of its input"));
            let labels = parse(term, &|letters| rank.checked_sub(letters).ok_or_else(short))?;
            if labels.len() != rank {
                return Err(bad(format!("'{term}' names {} axes, its input has {rank}", labels.len())));
            }
            inputs.push(labels);
        }
        let all = || inputs.iter().flatten().copied();
        let covered =
            all().filter_map(|l| if let Label::Ellipsis(i) = l { Some(i + 1) } else { None }).max().unwrap_or(0);
        let output = match right {
            Some(right) => parse(right, &|_| Ok(covered))?,
            None => {
                let mut letters: Vec<Label> = all().filter(|l| matches!(l, Label::Letter(_))).collect();
                letters.sort();
                let once = |l: &Label| all().filter(|other| other == l).count() == 1;
                (0..covered).rev().map(Label::Ellipsis).chain(letters.into_iter().filter(once)).collect()
            }
        };
        for (i, label) in output.iter().enumerate() {
            if output[..i].contains(label) || !all().any(|l| l == *label) {
                return Err(bad(format!("the result names an axis twice, or one that no input has ({label:?})")));
            }
        }
        Ok(Terms { inputs, output })
    }
}

fn extent_of<'a>(extents: &'a [(Label, Dim)], label: &Label) -> &'a Dim {
    &extents.iter().find(|(l, _)| l == label).expect("every label of a checked equation has an extent").1
}

/// The extent of every axis: those of the result first and in its order, then the summed ones.
fn extents(terms: &Terms, shapes: &[&[Dim]]) -> Result<Vec<(Label, Dim)>, OpError> {
    let mut extents: Vec<(Label, Dim)> = terms.output.iter().map(|&label| (label, Dim::Const(1))).collect();
    for (labels, shape) in terms.inputs.iter().zip(shapes) {
        for (&label, dim) in labels.iter().zip(*shape) {
            match extents.iter_mut().find(|(l, _)| *l == label) {
                None => extents.push((label, dim.clone())),
                Some((_, known)) => {
                    *known = broadcast_dim(known, dim).ok_or_else(|| {
                        OpError::input(format!("{label:?} is {known} in one input and {dim} in another"))
                    })?;
                }
            }
        }
    }
    Ok(extents)
}

/// The sum with every extent known: for each axis, how far each input moves.
struct Contraction {
    output: Shape,
    /// Of the result's axes, then of the summed ones.
    extents: Vec<usize>,
    strides: Vec<Vec<usize>>,
}

impl Contraction {
    fn new(terms: &Terms, extents: &[(Label, Dim)], shapes: &[&Shape]) -> Contraction {
        let known: Vec<usize> =
            extents.iter().map(|(_, d)| d.as_const().and_then(|d| usize::try_from(d).ok()).unwrap_or(0)).collect();
        let strides = terms.inputs.iter().zip(shapes).map(|(labels, shape)| {
            let strides = shape.strides();
            // A letter that an input has twice walks its diagonal.
            let along = |label: &Label| {
                let axes = labels.iter().enumerate().filter(|(axis, l)| *l == label && shape[*axis] != 1);
                axes.map(|(axis, _)| strides[axis]).sum()
            };
            extents.iter().map(|(label, _)| along(label)).collect()
        });
        Contraction { output: known[..terms.output.len()].into(), strides: strides.collect(), extents: known }
    }

    fn apply<T: Copy + Default + AddAssign + Mul<Output = T>>(&self, values: &[&[T]], one: T) -> Vec<T> {
        let mut y = vec![T::default(); self.output.element_count()];
        let summed = self.output.rank();
        let terms: usize = self.extents[summed..].iter().product();
        if terms == 0 {
            return y;
        }
        let mut index = vec![0usize; self.extents.len()];
        let mut offsets = vec![0usize; values.len()];
        for y in &mut y {
            for _ in 0..terms {
                let product =
                    values.iter().zip(&offsets).fold(one, |product, (values, &offset)| product * values[offset]);
                *y += product;
                self.advance(&mut index, &mut offsets);
            }
        }
        y
    }

    /// The next multi-index, row-major, and the inputs' offsets there.
    fn advance(&self, index: &mut [usize], offsets: &mut [usize]) {
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < self.extents[axis] {
                offsets.iter_mut().zip(&self.strides).for_each(|(offset, strides)| *offset += strides[axis]);
                return;
            }
            let back = self.extents[axis] - 1;
            offsets.iter_mut().zip(&self.strides).for_each(|(offset, strides)| *offset -= back * strides[axis]);
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, wave};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("Einsum", 12)
            .with("equation", "bij,bjk->bik")
            .wave(&[2, 1, 2])
            .wave(&[2, 2, 2])
            .gives([f32s(&[2, 1, 2], &[0.75, -1.9375, -1.75, 0.9375])]);
        case("Einsum", 12).with("equation", "ii->i").wave(&[1, 2]).gives([wave(&[2], 0)]);
        case("Einsum", 12).with("equation", "ii->i").wave(&[3, 3]).gives([f32s(&[3], &[-1.25, 0.25, -1.0])]);
        case("Einsum", 12)
            .with("equation", "...ij -> ...ji")
            .wave(&[2, 1, 2])
            .gives([f32s(&[2, 2, 1], &[-1.25, 0.5, -0.5, 1.25])]);
        case("Einsum", 12)
            .with("equation", "ij,kj")
            .wave(&[2, 2])
            .wave(&[1, 2])
            .gives([f32s(&[2, 1], &[1.25, 1.8125])]);
        case("Einsum", 12)
            .with("equation", "bi,bj,ij->b")
            .wave(&[2, 2])
            .wave(&[2, 1])
            .wave(&[2, 1])
            .gives([f32s(&[2], &[0.34375, -1.32812])]);
        case("Einsum", 12).with("equation", "ij->").wave(&[2, 3]).gives([f32s(&[], &[-0.5])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("Einsum", 12)
            .with("equation", "ij,jk->ik")
            .wave(&[2, 3])
            .wave(&[2, 2])
            .fails("is 3 in one input and 2 in another");
        case("Einsum", 12).with("equation", "ij->ik").wave(&[2, 3]).fails("one that no input has");
        case("Einsum", 12).with("equation", "ij,jk").wave(&[2, 3]).fails("is for 2 inputs, there are 1");
        case("Einsum", 12).with("equation", "ijk").wave(&[2, 3]).fails("names 3 axes, its input has 2");
    }
}
