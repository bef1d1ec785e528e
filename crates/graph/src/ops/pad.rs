//! Elements added at both ends of axes, or taken away.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, checked_shape, movement,
    normalize_axes,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// Inputs `x`, `pads` (how many before each axis, then how many after each; negative ones are taken away), the `constant` to pad with (0),
/// and the `axes` that `pads` is for (all).
#[derive(Clone, Debug, PartialEq)]
pub struct Pad {
    pub mode: PadMode,
}

/// What the added elements are, once negative pads have been taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PadMode {
    Constant,
    /// Mirrored at the first and the last element, which come once; as often as needed.
    Reflect,
    /// The nearest element.
    Edge,
    /// As if the axis were a circle.
    Wrap,
}

const MODES: [(&str, PadMode); 4] =
    [("constant", PadMode::Constant), ("reflect", PadMode::Reflect), ("edge", PadMode::Edge), ("wrap", PadMode::Wrap)];

/// One axis: what is left of the source, `low..high`, and the position in the source of the result's first element.
#[derive(Clone, Copy)]
struct Span {
    low: i64,
    high: i64,
    first: i64,
    extent: usize,
}

impl Span {
    fn new(axis: usize, extent: usize, begin: i64, end: i64) -> Result<Span, OpError> {
        let (n, too_large) = (extent as i64, || OpError::Resource(format!("pads {begin} and {end} of axis {axis}")));
        let padded = n.checked_add(begin).and_then(|n| n.checked_add(end)).ok_or_else(too_large)?;
        let extent = usize::try_from(padded).map_err(|_| {
            OpError::input(format!("pads {begin} and {end} of axis {axis}, which has {extent} elements"))
        })?;
        let first = begin.checked_neg().ok_or_else(too_large)?;
        let high = if end < 0 { n.checked_add(end).ok_or_else(too_large)? } else { n };
        Ok(Span { low: first.max(0), high, first, extent })
    }

    fn source(&self, mode: PadMode, i: usize) -> Option<usize> {
        let Span { low, high, .. } = *self;
        let (at, extent) = (self.first + i as i64, high - low);
        let at = match mode {
            PadMode::Constant => return (low..high).contains(&at).then_some(at as usize),
            PadMode::Edge => at.clamp(low, high - 1),
            PadMode::Wrap => low + (at - low).rem_euclid(extent),
            PadMode::Reflect if extent == 1 => low,
            PadMode::Reflect => {
                let period = 2 * (extent - 1);
                let within = (at - low).rem_euclid(period);
                low + within.min(period - within)
            }
        };
        Some(at as usize)
    }
}

/// Every axis' span.
fn spans(shape: &[usize], pads: &[i64], axes: Option<Vec<i64>>) -> Result<Vec<Span>, OpError> {
    let axes = axes.unwrap_or_else(|| (0..shape.len() as i64).collect());
    let axes = normalize_axes(&axes, shape.len())?;
    check_count(pads.len(), axes.len())?;
    let mut both = vec![(0, 0); shape.len()];
    for (i, &axis) in axes.iter().enumerate() {
        both[axis] = (pads[i], pads[axes.len() + i]);
    }
    both.into_iter().enumerate().map(|(axis, (begin, end))| Span::new(axis, shape[axis], begin, end)).collect()
}

fn check_count(pads: usize, axes: usize) -> Result<(), OpError> {
    if pads == 2 * axes {
        return Ok(());
    }
    Err(OpError::input(format!("{pads} pads for {axes} axes, expected {}", 2 * axes)))
}

impl Operator for Pad {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let mode = node.string("mode", "constant")?;
        let mode = MODES.iter().find(|(name, _)| *name == mode).map(|&(_, mode)| mode);
        let mode = mode.ok_or_else(|| node.corrupt("attribute 'mode' must be constant, reflect, edge or wrap"))?;
        if node.opset < 11 {
            node.expect_inputs(1..=1)?;
            let name = if node.opset < 2 { "paddings" } else { "pads" };
            let pads = node.optional_ints(name)?;
            let pads = pads.ok_or_else(|| node.corrupt(format!("attribute '{name}' is missing")))?;
            let pads = movement::integers(node, pads)?;
            node.push_constant(1, pads);
            let value = node.float("value", 0.0)?;
            if value != 0.0 {
                node.push_number(2, value);
            }
        }
        node.expect_inputs(2..=if node.opset < 18 { 3 } else { 4 })?;
        Ok(Pad { mode }.into())
    }

    fn export(&self) -> Spelling {
        let name = MODES.iter().find(|(_, mode)| *mode == self.mode).map_or("constant", |(name, _)| name);
        Spelling::new("Pad").with("mode", name)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, pads) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 2)?;
        let known = movement::known_integers(inputs, 1)?;
        let Some(shape) = &x.shape else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let axes = match inputs.get(3) {
            Some(_) => movement::known_integers(inputs, 3)?,
            None => Some((0..shape.len() as i64).collect()),
        };
        let fresh = |axis: usize| context.fresh(&format!("dim{axis}"));
        let Some(axes) = axes else {
            return Ok(vec![TensorFact::new(x.dtype, (0..shape.len()).map(fresh).collect::<Vec<_>>()).into()]);
        };
        let mut dims = shape.clone();
        let normal = normalize_axes(&axes, shape.len())?;
        if let Some(pads) = &pads.value {
            check_count(pads.len(), normal.len())?;
        }
        for (i, &axis) in normal.iter().enumerate() {
            dims[axis] = match &pads.value {
                Some(pads) => shape[axis].clone() + pads[i].clone() + pads[normal.len() + i].clone(),
                None => fresh(axis),
            };
            if let Some(extent) = dims[axis].as_const()
                && extent < 0
            {
                return Err(OpError::input(format!("pads leave {extent} elements of axis {axis}")));
            }
        }
        let fact = TensorFact::new(x.dtype, dims);
        let constant = match inputs.optional_tensor(2)? {
            Some(constant) => constant.value.as_ref().and_then(|v| v.first().cloned()),
            None => Some(Dim::Const(0)),
        };
        let few = fact.constant_count().is_some_and(|count| count <= TensorFact::VALUE_LIMIT);
        let value = match (&x.value, x.constant_shape(), known, constant) {
            (Some(value), Some(from), Some(pads), Some(constant)) if few => {
                let (to, sources) = self.sources(&from, &spans(&from, &pads, Some(axes))?)?;
                let all = sources.map(|source| source.map_or_else(|| constant.clone(), |i| value[i].clone()));
                (fact.constant_shape() == Some(to)).then(|| all.collect())
            }
            _ => None,
        };
        Ok(vec![fact.with_value(value).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, from) = movement::source(inputs)?;
        let axes = inputs.get(3).map(|_| inputs.integers(3)).transpose()?;
        let spans = spans(from, &inputs.integers(1)?, axes)?;
        let constant = inputs.optional_tensor(2)?;
        if let Some(constant) = constant.filter(|c| c.element_count() != 1) {
            return Err(OpError::input(format!("the constant must be one element, got shape {}", constant.shape())));
        }
        checked_shape(spans.iter().map(|span| span.extent).collect(), context)?;
        let (to, sources) = self.sources(from, &spans)?;
        movement::fill(x, to, constant, sources)
    }
}

impl Pad {
    /// The result's shape, and where its elements come from.
    #[allow(clippy::type_complexity)]
    fn sources(
        &self,
        from: &[usize],
        spans: &[Span],
    ) -> Result<(Vec<usize>, Box<dyn Iterator<Item = Option<usize>>>), OpError> {
        let to: Vec<usize> = spans.iter().map(|span| span.extent).collect();
        let empty = (0..to.len()).find(|&axis| to[axis] > 0 && spans[axis].high <= spans[axis].low);
        match empty {
            Some(axis) if self.mode != PadMode::Constant && !to.contains(&0) => {
                Err(OpError::input(format!("axis {axis} has no element left to pad with")))
            }
            _ => {
                let sources = movement::along_axes(from, &to, |axis, i| spans[axis].source(self.mode, i));
                Ok((to, sources))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    fn counted(shape: &[usize]) -> Tensor {
        f32s(shape, &(0..shape.iter().product::<usize>()).map(|i| i as f32).collect::<Vec<_>>())
    }

    fn pads(values: &[i64]) -> Tensor {
        tensor(&[values.len()], values)
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        type Expected<'a> = (&'a str, &'a [i64], &'a [usize], &'a [f32]);
        let cases: [Expected; 9] = [
            ("constant", &[0, 1, 0, 2], &[2, 6], &[0., 0., 1., 2., 0., 0., 0., 3., 4., 5., 0., 0.]),
            ("constant", &[0, -1, 0, 2], &[2, 4], &[1., 2., 0., 0., 4., 5., 0., 0.]),
            ("constant", &[0, -4, 0, 4], &[2, 3], &[0.; 6]),
            ("reflect", &[0, 1, 0, 2], &[2, 6], &[1., 0., 1., 2., 1., 0., 4., 3., 4., 5., 4., 3.]),
            ("edge", &[-1, 2, 0, -2], &[1, 3], &[3.; 3]),
            ("edge", &[0, -1, 0, 2], &[2, 4], &[1., 2., 2., 2., 4., 5., 5., 5.]),
            ("wrap", &[0, 1, 0, 2], &[2, 6], &[2., 0., 1., 2., 0., 1., 5., 3., 4., 5., 3., 4.]),
            ("wrap", &[0, -1, 0, 2], &[2, 4], &[1., 2., 1., 2., 4., 5., 4., 5.]),
            ("wrap", &[3, -2, 0, 0], &[5, 1], &[5., 2., 5., 2., 5.]),
        ];
        for (mode, amounts, shape, expected) in cases {
            let result = f32s(shape, expected);
            case("Pad", 21).with("mode", mode).input(counted(&[2, 3])).input(pads(amounts)).gives([result]);
        }
    }

    #[test]
    fn mirrors_as_often_as_numpy() {
        let expected = [1., 2., 1., 0., 1., 2., 1., 0., 1., 2.];
        case("Pad", 13)
            .with("mode", "reflect")
            .input(counted(&[3]))
            .input(pads(&[3, 4]))
            .gives([f32s(&[10], &expected)]);
        let one = case("Pad", 13).with("mode", "reflect").input(f32s(&[1], &[7.0])).input(pads(&[2, 1]));
        one.gives([f32s(&[4], &[7.0; 4])]);
    }

    #[test]
    fn a_constant_and_axes_of_any_type() {
        case("Pad", 18)
            .input(tensor::<i64>(&[2, 2], &[1, 2, 3, 4]))
            .input(pads(&[1, 0]))
            .input(Tensor::scalar(9i64))
            .input(tensor::<i32>(&[1], &[-1]))
            .gives([tensor::<i64>(&[2, 3], &[9, 1, 2, 9, 3, 4])]);
        let text = case("Pad", 13).input(strings(&[1], &["a"])).input(pads(&[1, 1])).input(strings(&[], &["-"]));
        text.gives([strings(&[3], &["-", "a", "-"])]);
        let old = case("Pad", 2).with("pads", vec![1, 0]).with("value", 0.5f32).input(f32s(&[1], &[2.0]));
        old.gives([f32s(&[2], &[0.5, 2.0])]);
        case("Pad", 1).with("paddings", vec![0, 1]).input(f32s(&[1], &[2.0])).gives([f32s(&[2], &[2.0, 0.0])]);
        case("Pad", 13).input(counted(&[0, 2])).input(pads(&[1, 0, 1, 0])).gives([f32s(&[2, 2], &[0.0; 4])]);
    }

    #[test]
    fn refuses_what_has_no_result() {
        case("Pad", 13).input(counted(&[3])).input(pads(&[1])).fails("1 pads for 1 axes, expected 2");
        case("Pad", 13).input(counted(&[3])).input(pads(&[-2, -2])).fails("pads leave -1 elements");
        case("Pad", 13).input(counted(&[3])).input(pads(&[i64::MAX, 1])).fails("pads");
        let none = case("Pad", 13).with("mode", "edge").input(counted(&[0])).input(pads(&[1, 1]));
        none.fails("no element left");
        case("Pad", 13).with("mode", "mirror").wave(&[3]).input(pads(&[0, 0])).fails("'mode' must be");
    }

    #[test]
    fn a_number_as_attribute_takes_the_type_of_the_elements() {
        use crate::ops::cases::{case, tensor};
        let old = case("Pad", 2).with("pads", vec![1i64, 0]).with("value", 2.5f32).input(tensor::<f64>(&[1], &[1.0]));
        old.gives([tensor::<f64>(&[2], &[2.5, 1.0])]);
    }
}
