//! `ai.onnx.preview.training.Gradient`: an operator on graphs, replaced at import by the nodes that compute its outputs.
//!
//! The part of the graph between the tensors named in `xs` and `zs` and the one named in `y` is a function. It is written out once more
//! with the node's inputs as its arguments (what is the same is shared by a pass), and differentiated in reverse: for every value, from
//! the last to the first, what the sum of all elements of `y` gains with each of its elements. An operator without a rule here is
//! refused by name; what does not depend on any of `xs` needs none.

use crate::{
    Constant, Graph, GraphError, ImportError, Op, TensorFact, ValueId,
    ops::{
        Binary, BinaryFunction as B, Cast, ConstantOfShape, Expand, Gemm, Identity, MatMul, Reduce, ReduceFunction,
        Reshape, Shape, Size, Slice, SoftmaxFunction, Transpose, Unary, UnaryFunction as U, Unsqueeze,
        VariadicFunction, Where, Wide,
    },
};
use cutover_tensor::{DType, Tensor};
use std::collections::{HashMap, HashSet};

/// A node of the function that is differentiated.
struct Step {
    op: Op,
    inputs: Vec<Option<ValueId>>,
    outputs: Vec<ValueId>,
}

/// Where the nodes of a gradient are written.
pub(super) struct Tape<'a> {
    pub graph: &'a mut Graph,
    /// Fresh names of a node and of a value.
    pub names: &'a mut dyn FnMut() -> (String, String),
    /// Of the node, for messages.
    pub place: &'a str,
    /// How many nodes may still be made.
    pub nodes_left: usize,
}

impl Tape<'_> {
    /// The gradients of `y` for the first `xs` of `arguments`, each a named value and the one that is given for it.
    pub fn gradients(
        &mut self,
        y: ValueId,
        arguments: &[(ValueId, ValueId)],
        xs: usize,
    ) -> Result<Vec<ValueId>, ImportError> {
        let mut replaced: HashMap<ValueId, ValueId> = HashMap::new();
        let mut points = Vec::with_capacity(xs);
        for (at, &(named, given)) in arguments.iter().enumerate() {
            // One value may be given for two names, and they are two variables.
            let point = if at < xs { self.node(Identity, &[given])? } else { given };
            if replaced.insert(named, point).is_some() {
                return Err(self.corrupt(format!("names '{}' twice", self.graph.value(named).name)));
            }
            points.extend((at < xs).then_some(point));
        }
        let steps = self.function(y, &mut replaced)?;
        let y = replaced.get(&y).copied().unwrap_or(y);
        let mut variable: HashSet<ValueId> = points.iter().copied().collect();
        for step in &steps {
            if step.inputs.iter().flatten().any(|input| variable.contains(input)) {
                // What is counted or compared does not change with it.
                variable.extend(step.outputs.iter().filter(|&&output| self.is_float(output)));
            }
        }
        let mut gradients: HashMap<ValueId, ValueId> = HashMap::new();
        if variable.contains(&y) {
            let ones = self.filled_like(y, 1.0)?;
            gradients.insert(y, ones);
        }
        for step in steps.iter().rev() {
            if !step.outputs.iter().any(|output| variable.contains(output) && gradients.contains_key(output)) {
                continue;
            }
            let known: Vec<Option<ValueId>> = step.outputs.iter().map(|o| gradients.get(o).copied()).collect();
            let needed: Vec<bool> = step.inputs.iter().map(|i| i.is_some_and(|i| variable.contains(&i))).collect();
            for (at, gradient) in self.rule(step, &known, &needed)? {
                let Some(input) = step.inputs[at].filter(|_| needed[at]) else { continue };
                let sum = match gradients.get(&input) {
                    Some(&before) => self.binary(B::Add, before, gradient)?,
                    None => gradient,
                };
                gradients.insert(input, sum);
            }
        }
        let gradient = |tape: &mut Self, point: &ValueId| match gradients.get(point) {
            Some(&gradient) => Ok(gradient),
            None => tape.filled_like(*point, 0.0),
        };
        points.iter().map(|point| gradient(self, point)).collect()
    }

    /// The nodes between what is `replaced` and `y`, written again for the replacements; `replaced` then has all their outputs.
    fn function(&mut self, y: ValueId, replaced: &mut HashMap<ValueId, ValueId>) -> Result<Vec<Step>, ImportError> {
        let (mut needed, mut waiting) = (HashSet::new(), vec![y]);
        while let Some(value) = waiting.pop() {
            let Some((node, _)) = self.graph.producer(value).filter(|_| !replaced.contains_key(&value)) else {
                continue;
            };
            if needed.insert(node) {
                waiting.extend(self.graph.node(node).inputs.iter().flatten());
            }
        }
        let mut steps = Vec::with_capacity(needed.len());
        for id in self.graph.topological_order()? {
            if !needed.contains(&id) {
                continue;
            }
            let node = self.graph.node(id).clone();
            let inputs: Vec<_> =
                node.inputs.iter().map(|i| i.map(|i| replaced.get(&i).copied().unwrap_or(i))).collect();
            if inputs == node.inputs {
                continue;
            }
            let outputs = self.nodes(node.op.clone(), inputs.clone(), node.outputs.len())?;
            for (&old, &new) in node.outputs.iter().zip(&outputs) {
                replaced.entry(old).or_insert(new);
            }
            steps.push(Step { op: node.op, inputs, outputs });
        }
        Ok(steps)
    }

    /// What each input of `step` gains, for those that are `needed`; `known` are the gains of its outputs.
    fn rule(
        &mut self,
        step: &Step,
        known: &[Option<ValueId>],
        needed: &[bool],
    ) -> Result<Vec<(usize, ValueId)>, ImportError> {
        let refused = |tape: &Self, what: &str| {
            let message = format!("the gradient of {}{what}", step.op.name());
            Err(ImportError::Unsupported { place: tape.place.to_string(), message })
        };
        let (Some(dy), true) = (known[0], known[1..].iter().all(Option::is_none)) else {
            return refused(self, " for an output other than the first");
        };
        let input = |at: usize| step.inputs.get(at).copied().flatten();
        let y = step.outputs[0];
        let Some(x) = input(0) else { return refused(self, " without its first input") };
        Ok(match &step.op {
            Op::Identity(_) => vec![(0, dy)],
            Op::Cast(_) => {
                let dtype = self.fact(x)?.dtype;
                vec![(0, self.node(Cast::to(dtype), &[dy])?)]
            }
            Op::Unary(op) => match self.unary(op.function, x, y, dy)? {
                Some(dx) => vec![(0, dx)],
                None => return refused(self, ""),
            },
            Op::Binary(op) => {
                let Some(b) = input(1) else { return refused(self, " without its second input") };
                let mut gains = Vec::new();
                for (at, operand) in [(0, x), (1, b)] {
                    if needed[at] {
                        let Some(gain) = self.operand(op.function, at, [x, b, y], dy)? else {
                            return refused(self, "");
                        };
                        gains.push((at, self.summed_to(gain, operand)?));
                    }
                }
                gains
            }
            Op::Variadic(op) if matches!(op.function, VariadicFunction::Sum | VariadicFunction::Mean) => {
                let share = match op.function {
                    VariadicFunction::Mean => self.times(dy, 1.0 / step.inputs.len() as f64)?,
                    _ => dy,
                };
                let mut gains = Vec::new();
                for (at, operand) in step.inputs.iter().enumerate().filter(|(at, _)| needed[*at]) {
                    gains.push((at, self.summed_to(share, operand.expect("a needed input is there"))?));
                }
                gains
            }
            Op::Where(_) => {
                let zero = self.scalar_like(dy, 0.0)?;
                let mut gains = Vec::new();
                for at in [1, 2].into_iter().filter(|&at| needed[at]) {
                    let operands = if at == 1 { [x, dy, zero] } else { [x, zero, dy] };
                    let gain = self.node(Where, &operands)?;
                    gains.push((at, self.summed_to(gain, input(at).expect("a needed input is there"))?));
                }
                gains
            }
            Op::MatMul(_) => {
                let Some(b) = input(1) else { return refused(self, " without its second input") };
                if [x, b]
                    .iter()
                    .any(|&v| self.graph.value(v).fact.as_tensor().and_then(TensorFact::rank).is_none_or(|r| r < 2))
                {
                    return refused(self, " of vectors, or of unknown ranks");
                }
                let product = |tape: &mut Self, a, b| tape.node(MatMul { activation: None }, &[a, b]);
                let mut gains = Vec::new();
                if needed[0] {
                    let transposed = self.transposed(b)?;
                    let gain = product(self, dy, transposed)?;
                    gains.push((0, self.summed_to(gain, x)?));
                }
                if needed[1] {
                    let transposed = self.transposed(x)?;
                    let gain = product(self, transposed, dy)?;
                    gains.push((1, self.summed_to(gain, b)?));
                }
                gains
            }
            Op::Gemm(op) => {
                let Some(b) = input(1) else { return refused(self, " without its second input") };
                let product = |tape: &mut Self, a, b, transpose_a, transpose_b| {
                    tape.node(Gemm { alpha: op.alpha, beta: 1.0, transpose_a, transpose_b, activation: None }, &[a, b])
                };
                let (ta, tb) = (op.transpose_a, op.transpose_b);
                let mut gains = Vec::new();
                if needed[0] {
                    let gain = if ta { product(self, b, dy, tb, true)? } else { product(self, dy, b, false, !tb)? };
                    gains.push((0, gain));
                }
                if needed[1] {
                    let gain = if tb { product(self, dy, x, true, ta)? } else { product(self, x, dy, !ta, false)? };
                    gains.push((1, gain));
                }
                if let Some(c) = input(2).filter(|_| needed[2]) {
                    let gain = self.times(dy, f64::from(op.beta))?;
                    gains.push((2, self.summed_to(gain, c)?));
                }
                gains
            }
            Op::Reduce(op) if matches!(op.function, ReduceFunction::Sum | ReduceFunction::Mean) => {
                let mut gain = dy;
                if op.function == ReduceFunction::Mean {
                    let (all, rest) = (self.count(x)?, self.count(y)?);
                    let dtype = self.fact(x)?.dtype;
                    let [all, rest] = [self.node(Cast::to(dtype), &[all])?, self.node(Cast::to(dtype), &[rest])?];
                    let share = self.binary(B::Div, rest, all)?;
                    gain = self.binary(B::Mul, gain, share)?;
                }
                if let Some(axes) = input(1).filter(|_| !op.keep_dims) {
                    // Of no axes at all, all are meant: then `dy` is one number.
                    if self.graph.value(axes).fact.tensor().ok().and_then(TensorFact::constant_count) != Some(0) {
                        gain = self.node(Unsqueeze, &[gain, axes])?;
                    }
                }
                let shape = self.shape(x)?;
                vec![(0, self.node(Expand, &[gain, shape])?)]
            }
            Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) => vec![(0, self.reshaped(dy, x)?)],
            Op::Transpose(op) => {
                let Some(rank) = self.fact(x)?.rank() else { return refused(self, " of unknown rank") };
                let permutation = op.permutation(rank).map_err(|e| self.corrupt(e.to_string()))?;
                let mut inverse = vec![0; rank];
                permutation.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
                vec![(0, self.node(Transpose { permutation: Some(inverse) }, &[dy])?)]
            }
            Op::Expand(_) => vec![(0, self.summed_to(dy, x)?)],
            Op::Concat(op) => {
                let mut gains = Vec::new();
                let mut start = 0i64;
                for (at, part) in step.inputs.iter().enumerate() {
                    let part = part.ok_or_else(|| self.corrupt("an operand is missing".to_string()))?;
                    let fact = self.fact(part)?;
                    let axis = fact.rank().and_then(|rank| crate::ops::normalize_axis(op.axis, rank).ok());
                    let extent = axis.and_then(|axis| fact.shape.as_ref()?[axis].as_const());
                    let Some(extent) = extent else { return refused(self, " of unknown extents") };
                    if needed[at] {
                        let [from, to, axis] =
                            [start, start.saturating_add(extent), op.axis].map(|v| self.integers(&[v]));
                        gains.push((at, self.node(Slice, &[dy, from, to, axis])?));
                    }
                    start = start.saturating_add(extent);
                }
                gains
            }
            Op::Softmax(op) if !op.coerced && op.function != SoftmaxFunction::Hardmax => {
                let axis = self.integers(&[op.axis]);
                let sum = Reduce { function: ReduceFunction::Sum, keep_dims: true, noop_with_empty_axes: false };
                vec![(
                    0,
                    match op.function {
                        // y · (dy − Σ dy · y)
                        SoftmaxFunction::Softmax => {
                            let weighted = self.binary(B::Mul, dy, y)?;
                            let sum = self.node(sum, &[weighted, axis])?;
                            let rest = self.binary(B::Sub, dy, sum)?;
                            self.binary(B::Mul, rest, y)?
                        }
                        // dy − exp(y) · Σ dy
                        _ => {
                            let sum = self.node(sum, &[dy, axis])?;
                            let p = self.apply(U::Exp, y)?;
                            let weighted = self.binary(B::Mul, p, sum)?;
                            self.binary(B::Sub, dy, weighted)?
                        }
                    },
                )]
            }
            _ => return refused(self, ""),
        })
    }

    /// `dy` times the derivative of a function of one number.
    fn unary(&mut self, function: U, x: ValueId, y: ValueId, dy: ValueId) -> Result<Option<ValueId>, ImportError> {
        let factor = match function {
            U::Neg => return Ok(Some(self.apply(U::Neg, dy)?)),
            U::Abs => self.apply(U::Sign, x)?,
            U::Exp => y,
            U::Log => return Ok(Some(self.binary(B::Div, dy, x)?)),
            U::Sqrt => {
                let twice = self.times(y, 2.0)?;
                return Ok(Some(self.binary(B::Div, dy, twice)?));
            }
            // −y²
            U::Reciprocal => {
                let square = self.binary(B::Mul, y, y)?;
                self.apply(U::Neg, square)?
            }
            U::Sin => self.apply(U::Cos, x)?,
            U::Cos => {
                let sine = self.apply(U::Sin, x)?;
                self.apply(U::Neg, sine)?
            }
            U::Sinh => self.apply(U::Cosh, x)?,
            U::Cosh => self.apply(U::Sinh, x)?,
            // 1 − y²
            U::Tanh => {
                let (one, square) = (self.scalar_like(y, 1.0)?, self.binary(B::Mul, y, y)?);
                self.binary(B::Sub, one, square)?
            }
            // y · (1 − y)
            U::Sigmoid => {
                let one = self.scalar_like(y, 1.0)?;
                let rest = self.binary(B::Sub, one, y)?;
                self.binary(B::Mul, y, rest)?
            }
            U::Softplus => self.apply(U::Sigmoid, x)?,
            // 2 / √π · exp(−x²)
            U::Erf => {
                let square = self.binary(B::Mul, x, x)?;
                let square = self.apply(U::Neg, square)?;
                let bell = self.apply(U::Exp, square)?;
                self.times(bell, std::f64::consts::FRAC_2_SQRT_PI)?
            }
            U::Relu | U::LeakyRelu { .. } => {
                let (one, zero) = (self.scalar_like(x, 1.0)?, self.scalar_like(x, 0.0)?);
                let below = match function {
                    U::LeakyRelu { alpha } => self.scalar_like(x, f64::from(alpha))?,
                    _ => zero,
                };
                let is_above = self.binary(B::Greater, x, zero)?;
                self.node(Where, &[is_above, one, below])?
            }
            U::Floor | U::Ceil | U::Round | U::Sign => self.scalar_like(x, 0.0)?,
            _ => return Ok(None),
        };
        Ok(Some(self.binary(B::Mul, dy, factor)?))
    }

    /// What operand `at` of `y = f(a, b)` gains, of the shape of `y`.
    fn operand(
        &mut self,
        function: B,
        at: usize,
        [a, b, y]: [ValueId; 3],
        dy: ValueId,
    ) -> Result<Option<ValueId>, ImportError> {
        Ok(Some(match (function, at) {
            (B::Add, _) | (B::Sub, 0) => dy,
            (B::Sub, _) => self.apply(U::Neg, dy)?,
            (B::Mul, _) => self.binary(B::Mul, dy, if at == 0 { b } else { a })?,
            (B::Div, 0) => self.binary(B::Div, dy, b)?,
            // −dy · y / b
            (B::Div, _) => {
                let ratio = self.binary(B::Div, y, b)?;
                let gain = self.binary(B::Mul, dy, ratio)?;
                self.apply(U::Neg, gain)?
            }
            // dy · b · a^(b − 1)
            (B::Pow, 0) => {
                let dtype = self.fact(a)?.dtype;
                let b = if self.fact(b)?.dtype == dtype { b } else { self.node(Cast::to(dtype), &[b])? };
                let one = self.scalar_like(b, 1.0)?;
                let exponent = self.binary(B::Sub, b, one)?;
                let power = self.binary(B::Pow, a, exponent)?;
                let slope = self.binary(B::Mul, b, power)?;
                self.binary(B::Mul, dy, slope)?
            }
            // dy · y · ln a
            (B::Pow, _) => {
                if self.fact(a)?.dtype != self.fact(b)?.dtype {
                    return Ok(None);
                }
                let logarithm = self.apply(U::Log, a)?;
                let slope = self.binary(B::Mul, y, logarithm)?;
                self.binary(B::Mul, dy, slope)?
            }
            _ => return Ok(None),
        }))
    }

    /// `gain` summed over the axes along which `operand` was broadcast.
    fn summed_to(&mut self, gain: ValueId, operand: ValueId) -> Result<ValueId, ImportError> {
        let (from, to) = (self.fact(gain)?, self.fact(operand)?);
        let unknown = |tape: &Self| ImportError::Unsupported {
            place: tape.place.to_string(),
            message: format!("the gradient of a broadcast of '{}', of unknown shape", tape.graph.value(operand).name),
        };
        let (Some(from), Some(to)) = (&from.shape, &to.shape) else { return Err(unknown(self)) };
        if from == to {
            return Ok(gain);
        }
        let Some(lead) = from.len().checked_sub(to.len()) else { return Err(unknown(self)) };
        let mut axes: Vec<i64> = (0..lead as i64).collect();
        for (axis, dim) in to.iter().enumerate().filter(|(axis, dim)| **dim != from[lead + axis]) {
            if dim.as_const() != Some(1) {
                return Err(unknown(self));
            }
            axes.push((lead + axis) as i64);
        }
        let axes = self.integers(&axes);
        let sum = Reduce { function: ReduceFunction::Sum, keep_dims: true, noop_with_empty_axes: false };
        let summed = self.node(sum, &[gain, axes])?;
        self.reshaped(summed, operand)
    }

    fn reshaped(&mut self, x: ValueId, like: ValueId) -> Result<ValueId, ImportError> {
        let shape = self.shape(like)?;
        self.node(Reshape { allow_zero: true }, &[x, shape])
    }

    fn shape(&mut self, x: ValueId) -> Result<ValueId, ImportError> {
        self.node(Shape { start: 0, end: None }, &[x])
    }

    fn count(&mut self, x: ValueId) -> Result<ValueId, ImportError> {
        self.node(Size, &[x])
    }

    /// The last two axes exchanged.
    fn transposed(&mut self, x: ValueId) -> Result<ValueId, ImportError> {
        let rank = self.fact(x)?.rank().filter(|&rank| rank >= 2);
        let Some(rank) = rank else { return Err(self.corrupt("a matrix expected".to_string())) };
        let mut permutation: Vec<usize> = (0..rank).collect();
        permutation.swap(rank - 2, rank - 1);
        self.node(Transpose { permutation: Some(permutation) }, &[x])
    }

    fn filled_like(&mut self, x: ValueId, value: f64) -> Result<ValueId, ImportError> {
        let dtype = self.fact(x)?.dtype;
        if !self.is_float(x) {
            let name = &self.graph.value(x).name;
            return Err(self.corrupt(format!("'{name}' is of type {dtype}: only floats have gradients")));
        }
        let value = Wide::Float(vec![value]).narrow(dtype, [1]).map_err(|e| self.corrupt(e.to_string()))?;
        let shape = self.shape(x)?;
        self.node(ConstantOfShape { value }, &[shape])
    }

    fn is_float(&self, x: ValueId) -> bool {
        let dtype = self.graph.value(x).fact.as_tensor().map(|fact| fact.dtype);
        matches!(dtype, Some(DType::F32 | DType::F64 | DType::F16 | DType::BF16))
    }

    fn fact(&self, x: ValueId) -> Result<TensorFact, ImportError> {
        let value = self.graph.value(x);
        match value.fact.as_tensor() {
            Some(fact) => Ok(fact.clone()),
            None => Err(self.corrupt(format!("'{}' is a {}, and only tensors have gradients", value.name, value.fact))),
        }
    }

    fn times(&mut self, x: ValueId, factor: f64) -> Result<ValueId, ImportError> {
        let factor = self.scalar_like(x, factor)?;
        self.binary(B::Mul, x, factor)
    }

    fn scalar_like(&mut self, x: ValueId, value: f64) -> Result<ValueId, ImportError> {
        let dtype = self.fact(x)?.dtype;
        let tensor = Wide::Float(vec![value]).narrow(dtype, []).map_err(|e| self.corrupt(e.to_string()))?;
        Ok(self.constant(tensor))
    }

    fn integers(&mut self, values: &[i64]) -> ValueId {
        let tensor = Tensor::from_vec([values.len()], values.to_vec()).expect("as many values as elements");
        self.constant(tensor)
    }

    fn constant(&mut self, tensor: Tensor) -> ValueId {
        let (_, name) = (self.names)();
        self.graph.add_constant(name, Constant::new(tensor))
    }

    fn binary(&mut self, function: B, a: ValueId, b: ValueId) -> Result<ValueId, ImportError> {
        self.node(Binary { function }, &[a, b])
    }

    fn apply(&mut self, function: U, x: ValueId) -> Result<ValueId, ImportError> {
        self.node(Unary { function }, &[x])
    }

    fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> Result<ValueId, ImportError> {
        Ok(self.nodes(op.into(), inputs.iter().copied().map(Some).collect(), 1)?[0])
    }

    fn nodes(&mut self, op: Op, inputs: Vec<Option<ValueId>>, outputs: usize) -> Result<Vec<ValueId>, ImportError> {
        self.nodes_left = self.nodes_left.checked_sub(1).ok_or_else(|| ImportError::Unsupported {
            place: self.place.to_string(),
            message: "a gradient of more nodes than the limit".to_string(),
        })?;
        let (name, _) = (self.names)();
        let names = (0..outputs).map(|_| (self.names)().1).collect();
        let id = self.graph.add_node(name, op, inputs, names).map_err(|e: GraphError| ImportError::from(e))?;
        Ok(self.graph.node(id).outputs.clone())
    }

    fn corrupt(&self, message: String) -> ImportError {
        ImportError::Corrupt { place: self.place.to_string(), message }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Dim,
        ops::{BinaryFunction, EvalContext, Softmax, Subgraph, UnaryFunction, cases},
    };
    use cutover_tensor::Value;

    use super::*;

    struct Builder {
        graph: Graph,
        count: usize,
    }

    impl Builder {
        fn input(&mut self, shape: &[i64]) -> ValueId {
            let name = self.fresh();
            let dims: Vec<Dim> = shape.iter().copied().map(Dim::Const).collect();
            self.graph.add_input(name, TensorFact::new(DType::F64, dims))
        }

        fn fresh(&mut self) -> String {
            self.count += 1;
            format!("v{}", self.count)
        }

        fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
            let (name, output) = (self.fresh(), self.fresh());
            let inputs = inputs.iter().copied().map(Some).collect();
            let id = self.graph.add_node(name, op.into(), inputs, vec![output]).unwrap();
            self.graph.node(id).outputs[0]
        }

        fn integers(&mut self, values: &[i64]) -> ValueId {
            let name = self.fresh();
            self.graph.add_constant(name, Constant::new(cases::tensor::<i64>(&[values.len()], values)))
        }
    }

    fn f64s(value: &Value) -> Vec<f64> {
        value.as_tensor().unwrap().to_vec().unwrap()
    }

    /// The gradients of what `build` makes of inputs of these shapes are those that differences of the function itself give.
    fn check(shapes: &[&[i64]], build: impl FnOnce(&mut Builder, &[ValueId]) -> ValueId) {
        let mut builder = Builder { graph: Graph::new("g"), count: 0 };
        let xs: Vec<ValueId> = shapes.iter().map(|shape| builder.input(shape)).collect();
        let y = build(&mut builder, &xs);
        let gradients = differentiate(&mut builder, y, &xs).unwrap();
        builder.graph.set_outputs([vec![y], gradients].concat());
        builder.graph.verify().unwrap();
        let function = Subgraph::new(builder.graph, 0).unwrap();
        let evaluate = |points: &[Vec<f64>]| {
            let tensor = |(shape, values): (&&[i64], &Vec<f64>)| {
                let shape: Vec<usize> = shape.iter().map(|&d| d as usize).collect();
                Value::from(Tensor::from_vec(shape, values.clone()).unwrap())
            };
            function.eval(shapes.iter().zip(points).map(tensor).collect(), &EvalContext::default()).unwrap()
        };
        let count = |shape: &[i64]| shape.iter().product::<i64>() as usize;
        // Away from 0, where some have kinks or poles.
        let value = |i: usize| 0.3 + ((i * 7) % 11) as f64 / 8.0;
        let points: Vec<Vec<f64>> =
            shapes.iter().enumerate().map(|(at, s)| (0..count(s)).map(|i| value(i + 3 * at)).collect()).collect();
        let results = evaluate(&points);
        let step = 1e-5;
        for (at, point) in points.iter().enumerate() {
            let gradient = f64s(&results[1 + at]);
            assert_eq!(gradient.len(), point.len());
            for i in 0..point.len() {
                let sum = |difference: f64| {
                    let mut moved = points.clone();
                    moved[at][i] += difference;
                    f64s(&evaluate(&moved)[0]).iter().sum::<f64>()
                };
                let slope = (sum(step) - sum(-step)) / (2.0 * step);
                // A central difference of this step is as exact.
                let close = (slope - gradient[i]).abs() <= 1e-6 * slope.abs().max(1.0);
                assert!(close, "gradient {i} of input {at} is {}, differences give {slope}", gradient[i]);
            }
        }
    }

    fn differentiate(builder: &mut Builder, y: ValueId, xs: &[ValueId]) -> Result<Vec<ValueId>, ImportError> {
        let mut count = 0;
        let mut names = || {
            count += 1;
            (format!("n{}.{count}", y.index()), format!("g{}.{count}", y.index()))
        };
        let arguments: Vec<(ValueId, ValueId)> = xs.iter().map(|&x| (x, x)).collect();
        let mut tape = Tape { graph: &mut builder.graph, names: &mut names, place: "here", nodes_left: 1000 };
        tape.gradients(y, &arguments, xs.len())
    }

    #[test]
    fn functions_of_one_number() {
        use crate::ops::UnaryFunction::*;
        let all = [
            Neg,
            Abs,
            Exp,
            Log,
            Sqrt,
            Reciprocal,
            Sin,
            Cos,
            Sinh,
            Cosh,
            Tanh,
            Sigmoid,
            Softplus,
            Erf,
            Relu,
            Floor,
            LeakyRelu { alpha: 0.1 },
        ];
        for function in all {
            check(&[&[2, 3]], |b, x| b.node(Unary { function }, x));
        }
    }

    #[test]
    fn broadcast_operands_gain_sums() {
        use crate::ops::BinaryFunction::*;
        for function in [Add, Sub, Mul, Div, Pow] {
            check(&[&[2, 3], &[3]], |b, x| b.node(Binary { function }, x));
            check(&[&[], &[2, 1, 2]], |b, x| b.node(Binary { function }, x));
            check(&[&[2, 1], &[1, 3]], |b, x| b.node(Binary { function }, x));
        }
    }

    #[test]
    fn products_of_matrices() {
        check(&[&[2, 3, 4], &[4, 2]], |b, x| b.node(MatMul { activation: None }, x));
        for (transpose_a, transpose_b) in [(false, false), (false, true), (true, false), (true, true)] {
            let a: &[i64] = if transpose_a { &[3, 2] } else { &[2, 3] };
            let b: &[i64] = if transpose_b { &[4, 3] } else { &[3, 4] };
            let gemm = Gemm { alpha: 0.5, beta: 3.0, transpose_a, transpose_b, activation: None };
            check(&[a, b, &[4]], |builder, x| {
                let y = builder.node(gemm, x);
                builder.node(Unary { function: UnaryFunction::Tanh }, &[y])
            });
        }
    }

    #[test]
    fn sums_means_and_movement() {
        for function in [ReduceFunction::Sum, ReduceFunction::Mean] {
            for keep_dims in [false, true] {
                check(&[&[2, 3, 2]], |b, x| {
                    let axes = b.integers(&[1, -1]);
                    let squared = b.node(Binary { function: BinaryFunction::Mul }, &[x[0], x[0]]);
                    b.node(Reduce { function, keep_dims, noop_with_empty_axes: false }, &[squared, axes])
                });
                check(&[&[2, 3]], |b, x| b.node(Reduce { function, keep_dims, noop_with_empty_axes: false }, x));
            }
        }
        check(&[&[2, 3], &[2, 1]], |b, x| {
            let joined = b.node(crate::ops::Concat { axis: 1 }, x);
            let turned = b.node(Transpose { permutation: Some(vec![1, 0]) }, &[joined]);
            let shape = b.integers(&[2, 4]);
            let shaped = b.node(Reshape { allow_zero: false }, &[turned, shape]);
            b.node(Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false }, &[shaped])
        });
        check(&[&[2, 3], &[3]], |b, x| {
            let y = b.node(Softmax { function: SoftmaxFunction::LogSoftmax, axis: 0, coerced: false }, &[x[0]]);
            b.node(Binary { function: BinaryFunction::Mul }, &[y, x[1]])
        });
    }

    #[test]
    fn a_gradient_has_a_gradient() {
        check(&[&[3]], |b, x| {
            let cube = b.node(Binary { function: BinaryFunction::Mul }, &[x[0], x[0]]);
            let cube = b.node(Binary { function: BinaryFunction::Mul }, &[cube, x[0]]);
            differentiate(b, cube, x).unwrap()[0]
        });
    }

    #[test]
    fn what_has_no_rule_is_refused_by_name() {
        let mut b = Builder { graph: Graph::new("g"), count: 0 };
        let x = b.input(&[2]);
        let y = b.node(crate::ops::Unique { axis: None, sorted: true }, &[x]);
        let error = differentiate(&mut b, y, &[x]).unwrap_err().to_string();
        assert!(error.contains("the gradient of Unique"), "{error}");
    }
}
