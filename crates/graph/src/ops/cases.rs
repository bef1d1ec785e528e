//! Cases of operators, for the tests beside them: a node of some opset and its inputs in, tensors out.
//!
//! Every case checks more than values: that the node is read, that its spelling is read back as the same
//! operator, and that facts inferred from exact, symbolic and unknown shapes never contradict what evaluation gives.

use super::*;
use crate::{Bindings, Dim};
use cutover_tensor::{DType, Element, MapKeys, Tensor};
use std::collections::BTreeMap;

/// One node and its inputs.
pub(crate) struct Case {
    op: &'static str,
    opset: i64,
    attributes: BTreeMap<String, Attribute>,
    inputs: Vec<Option<Value>>,
    /// Facts of inputs that don't show in their values: those of containers without elements.
    declared: BTreeMap<usize, Fact>,
    outputs: usize,
    tolerance: f64,
}

pub(crate) fn case(op: &'static str, opset: i64) -> Case {
    // f32 results that ONNX Runtime computed and that were written with six digits.
    let (attributes, declared) = (BTreeMap::new(), BTreeMap::new());
    Case { op, opset, attributes, inputs: Vec::new(), declared, outputs: 1, tolerance: 1e-5 }
}

pub(crate) fn tensor<T: Element>(shape: &[usize], values: &[T]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).expect("as many values as the shape has elements")
}

pub(crate) fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    tensor(shape, values)
}

pub(crate) fn strings(shape: &[usize], values: &[&str]) -> Tensor {
    Tensor::from_strings(shape, values.iter().map(|s| s.to_string()).collect()).expect("as many strings as elements")
}

pub(crate) fn sequence(tensors: &[&Tensor]) -> Value {
    Value::Sequence(tensors.iter().map(|&tensor| Value::Tensor(tensor.clone())).collect())
}

/// Values between −1.25 and 1.25, in quarters, that repeat only after eleven elements; `seed` tells inputs apart.
pub(crate) fn wave(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    f32s(shape, &(0..count).map(|i| ((i * 7 + seed * 3) % 11) as f32 / 4.0 - 1.25).collect::<Vec<_>>())
}

impl Case {
    pub fn with(mut self, name: &str, value: impl Into<Attribute>) -> Case {
        self.attributes.insert(name.to_string(), value.into());
        self
    }

    pub fn input(mut self, value: impl Into<Value>) -> Case {
        self.inputs.push(Some(value.into()));
        self
    }

    /// Adds an input whose value does not show its type.
    pub fn declared(mut self, (value, fact): (Value, Fact)) -> Case {
        self.declared.insert(self.inputs.len(), fact);
        self.input(value)
    }

    /// Adds a [`wave`] whose seed is the input's index.
    pub fn wave(self, shape: &[usize]) -> Case {
        let seed = self.inputs.len();
        self.input(wave(shape, seed))
    }

    pub fn omitted(mut self) -> Case {
        self.inputs.push(None);
        self
    }

    /// Names that many outputs, where the node must be refused.
    pub fn outputs(mut self, count: usize) -> Case {
        self.outputs = count;
        self
    }

    /// Evaluation must give these, and nothing of it may contradict inference.
    pub fn gives<V: Into<Value>, const N: usize>(mut self, expected: [V; N]) {
        self.outputs = N;
        let (op, inputs) = self.read().unwrap_or_else(|error| panic!("{}: {error}", self.op));
        self.check_spelling(&op, &inputs);
        let results = run(&op, &inputs, N).unwrap_or_else(|error| panic!("{}: {error}", self.op));
        for (index, (result, expected)) in results.iter().zip(expected).enumerate() {
            match (result, expected.into()) {
                (Value::Tensor(result), Value::Tensor(expected)) => self.compare(index, result, &expected),
                (result, expected) => {
                    assert_eq!(*result, expected, "output {index} of {} {:?}", self.op, self.attributes)
                }
            }
        }
        self.check_facts(&op, &inputs, &results);
    }

    /// Reading, inference or evaluation must refuse the node with a message that holds `message`.
    pub fn fails(self, message: &str) {
        let error = match self.read() {
            Err(error) => error,
            Ok((op, inputs)) => match infer(&op, &self.exact(&inputs), self.outputs).and_then(|_| run(&op, &inputs, 1))
            {
                Err(error) => error,
                Ok(results) => panic!("{} gave {results:?} instead of an error with '{message}'", self.op),
            },
        };
        assert!(error.contains(message), "{}: '{error}' does not say '{message}'", self.op);
    }

    fn read(&self) -> Result<(Op, Vec<Option<Value>>), String> {
        self.read_as(self.op, self.opset, self.attributes.clone(), self.inputs.clone())
    }

    fn read_as(
        &self,
        op: &str,
        opset: i64,
        attributes: BTreeMap<String, Attribute>,
        mut inputs: Vec<Option<Value>>,
    ) -> Result<(Op, Vec<Option<Value>>), String> {
        let present = inputs.iter().map(Option::is_some).collect();
        let (domain, op_type) = op.rsplit_once('.').unwrap_or(("", op));
        let mut node = NodeReader::new("node", domain, op_type, opset, present, self.outputs, attributes);
        let read = Op::import(op, &mut node).unwrap_or_else(|| panic!("{op} is not listed"));
        let read = read.map_err(|error| error.to_string())?;
        node.inserted_inputs().iter().for_each(|&index| inputs.insert(index, None));
        for &(index, axis) in node.aligned_inputs() {
            let rank = |input: &Option<Value>| input.as_ref().and_then(Value::as_tensor).map(|t| t.shape().rank());
            let (first, rank) = (rank(&inputs[0]).unwrap_or(0), rank(&inputs[index]).unwrap_or(0));
            let axes = trailing_axes(first, rank, axis).ok_or("the axes do not meet")?;
            if let Some(Value::Tensor(tensor)) = &mut inputs[index] {
                let dims: Vec<usize> = tensor.shape().iter().copied().chain(axes.iter().map(|_| 1)).collect();
                *tensor = tensor.reshape(dims).map_err(|error| error.to_string())?;
            }
        }
        let first = inputs.first().and_then(Option::as_ref).and_then(Value::as_tensor).map(Tensor::dtype);
        for (index, constant) in node.finish(first).map_err(|error| error.to_string())? {
            inputs.resize(inputs.len().max(index + 1), None);
            inputs[index] = Some(constant.into());
        }
        Ok((read, inputs))
    }

    fn check_spelling(&self, op: &Op, inputs: &[Option<Value>]) {
        let spelling = op.spelling().expect("a built-in operator has a spelling");
        // What is written as several nodes is read as several operators, and forms that the default domain dropped are not written.
        let is_several = spelling.coerced_at.is_some()
            || !spelling.then.is_empty()
            || spelling.added_input.is_some_and(|at| at < inputs.len());
        if is_several || (spelling.domain.is_empty() && spelling.until.is_some()) {
            return;
        }
        let attributes = spelling.attributes.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        let opset = spelling.since;
        let (again, _) = self
            .read_as(&op.name(), opset, attributes, inputs.to_vec())
            .unwrap_or_else(|error| panic!("{spelling:?} cannot be read: {error}"));
        assert_eq!(format!("{again:?}"), format!("{op:?}"), "{spelling:?} means something else");
    }

    fn compare(&self, index: usize, result: &Tensor, expected: &Tensor) {
        let place = format!("output {index} of {} {:?}", self.op, self.attributes);
        assert_eq!((result.dtype(), result.shape()), (expected.dtype(), expected.shape()), "{place}");
        if result.dtype() == DType::String {
            return assert_eq!(result.strings(), expected.strings(), "{place}");
        }
        match (Wide::of(result), Wide::of(expected)) {
            (Ok(Wide::Float(result)), Ok(Wide::Float(expected))) => {
                for (i, (a, b)) in result.iter().zip(&expected).enumerate() {
                    let equal = a == b || (a.is_nan() && b.is_nan());
                    let close = (a - b).abs() <= self.tolerance * b.abs().max(1.0);
                    assert!(equal || close, "{place}: element {i} is {a}, expected {b}");
                }
            }
            (result, expected) => assert_eq!(result, expected, "{place}"),
        }
    }

    fn check_facts(&self, op: &Op, inputs: &[Option<Value>], results: &[Value]) {
        let mut bindings = Bindings::new();
        let mut symbol = |input: usize, axis: usize, extent: usize| {
            let name = format!("i{input}.{axis}");
            bindings.insert(name.as_str().into(), extent as i64);
            Dim::symbol(name)
        };
        let exact = self.exact(inputs);
        let symbolic = inputs.iter().enumerate().map(|(index, input)| {
            let Some(Value::Tensor(tensor)) = input else { return exact[index].clone() };
            let mut fact = TensorFact::of_tensor(tensor);
            // Lists of axes and sizes stay known: a model has them as constants.
            if tensor.shape().rank() > 1 {
                let extents = tensor.shape().iter().enumerate();
                fact.shape = Some(extents.map(|(axis, &extent)| symbol(index, axis, extent)).collect());
                fact.value = None;
            }
            Some(Fact::Tensor(fact))
        });
        let symbolic: Vec<Option<Fact>> = symbolic.collect();
        let unknown = exact.iter().map(|fact| fact.as_ref().map(of_unknown_ranks)).collect();
        for facts in [exact, symbolic, unknown] {
            let inferred = infer(op, &facts, self.outputs).unwrap_or_else(|error| panic!("{}: {error}", self.op));
            for (fact, result) in inferred.iter().zip(results) {
                assert!(fact.admits(result, &bindings), "{}: {result:?} was inferred to be {fact}", self.op);
            }
        }
    }

    fn exact(&self, inputs: &[Option<Value>]) -> Vec<Option<Fact>> {
        let fact = |(index, input): (usize, &Option<Value>)| {
            let value = input.as_ref()?;
            Some(self.declared.get(&index).cloned().unwrap_or_else(|| fact_of(value)))
        };
        inputs.iter().enumerate().map(fact).collect()
    }
}

/// What a value says of itself; containers without elements say nothing.
fn fact_of(value: &Value) -> Fact {
    match value {
        Value::Tensor(tensor) => TensorFact::of_tensor(tensor).into(),
        Value::Sequence(values) => {
            let mut axes = 0..;
            let mut fresh = |axis: usize| Dim::symbol(format!("element{}.{axis}", axes.next().unwrap_or(0)));
            let facts = values.iter().map(fact_of);
            let of = facts.reduce(|a, b| a.join(&b, &mut fresh).expect("elements of one type"));
            Fact::Sequence(Box::new(of.expect("an input without elements is declared")))
        }
        Value::Optional(value) => {
            Fact::Optional(Box::new(fact_of(value.as_deref().expect("an input without an element is declared"))))
        }
        Value::Map { keys, values } => {
            let key = if let MapKeys::Ints(_) = keys { DType::I64 } else { DType::String };
            Fact::Map { key, value: Box::new(TensorFact::new(values.dtype(), vec![]).into()) }
        }
    }
}

fn of_unknown_ranks(fact: &Fact) -> Fact {
    match fact {
        Fact::Tensor(fact) => TensorFact::unknown_rank(fact.dtype).into(),
        Fact::Sequence(of) => Fact::Sequence(Box::new(of_unknown_ranks(of))),
        Fact::Optional(of) => Fact::Optional(Box::new(of_unknown_ranks(of))),
        Fact::Map { .. } => fact.clone(),
    }
}

fn infer(op: &Op, facts: &[Option<Fact>], outputs: usize) -> Result<Vec<Fact>, String> {
    let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
    op.infer(Facts(&facts), &InferContext { node: "node", outputs }).map_err(|error| error.to_string())
}

/// Evaluates an operator, as tests of fused forms need it too.
pub(crate) fn run<V: Clone + Into<Value>>(op: &Op, inputs: &[Option<V>], outputs: usize) -> Result<Vec<Value>, String> {
    let values: Vec<Option<Value>> = inputs.iter().map(|input| input.clone().map(Into::into)).collect();
    let values: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let context = EvalContext { outputs, ..EvalContext::default() };
    op.eval(Inputs(&values), &context).map_err(|error| error.to_string())
}

/// The product's one result with its fused parts, or with the same parts applied after it.
pub(crate) fn check_fused(
    plain: impl Into<Op>,
    fused: impl Into<Op>,
    inputs: &[Option<Tensor>],
    added: usize,
    f: Activation,
) {
    let (plain, fused) = (plain.into(), fused.into());
    let result = |op: &Op, inputs: &[Option<Tensor>]| {
        run(op, inputs, 1).expect("valid inputs").remove(0).into_tensor().expect("a tensor")
    };
    let product = result(&plain, &inputs[..added]);
    let expected: Vec<f32> = match inputs.get(added) {
        Some(Some(z)) => {
            let z_values = Wide::floats(z).expect("floats");
            let sums = Wide::floats(&product).expect("floats").into_iter();
            let sources = broadcast_index(z.shape(), product.shape());
            sums.zip(sources).map(|(y, source)| f.apply(y + z_values[source]) as f32).collect()
        }
        _ => Wide::floats(&product).expect("floats").into_iter().map(|y| f.apply(y) as f32).collect(),
    };
    let got = result(&fused, inputs).to_vec::<f32>().expect("f32");
    assert_eq!(got.len(), expected.len());
    for (a, b) in got.iter().zip(&expected) {
        // The unfused product was rounded to f32 in between.
        assert!((a - b).abs() <= 1e-5, "{fused:?}: {a} instead of {b}");
    }
    assert_eq!(result(&fused, inputs).dtype(), DType::F32);
}
