//! Cases of operators, for the tests beside them: a node of some opset and its inputs in, tensors out.
//!
//! Every case checks more than values: that the node is read, that its spelling is read back as the same
//! operator, and that facts inferred from exact, symbolic and unknown shapes never contradict what evaluation gives.

use super::*;
use crate::{Bindings, Dim};
use cutover_tensor::{DType, Element, Tensor};
use std::collections::BTreeMap;

/// One node and its inputs.
pub(crate) struct Case {
    op: &'static str,
    opset: i64,
    attributes: BTreeMap<String, Attribute>,
    inputs: Vec<Option<Tensor>>,
    outputs: usize,
    tolerance: f64,
}

pub(crate) fn case(op: &'static str, opset: i64) -> Case {
    // f32 results that ONNX Runtime computed and that were written with six digits.
    Case { op, opset, attributes: BTreeMap::new(), inputs: Vec::new(), outputs: 1, tolerance: 1e-5 }
}

pub(crate) fn tensor<T: Element>(shape: &[usize], values: &[T]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).expect("as many values as the shape has elements")
}

pub(crate) fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    tensor(shape, values)
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

    pub fn input(mut self, tensor: Tensor) -> Case {
        self.inputs.push(Some(tensor));
        self
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

    /// Evaluation must give these, and nothing of it may contradict inference.
    pub fn gives<const N: usize>(mut self, expected: [Tensor; N]) {
        self.outputs = N;
        let (op, inputs) = self.read().unwrap_or_else(|error| panic!("{}: {error}", self.op));
        self.check_spelling(&op, &inputs);
        let results = run(&op, &inputs, N).unwrap_or_else(|error| panic!("{}: {error}", self.op));
        for (index, (result, expected)) in results.iter().zip(&expected).enumerate() {
            let result = result.as_tensor().expect("a tensor");
            self.compare(index, result, expected);
        }
        self.check_facts(&op, &inputs, &results);
    }

    /// Reading, inference or evaluation must refuse the node with a message that holds `message`.
    pub fn fails(self, message: &str) {
        let error = match self.read() {
            Err(error) => error,
            Ok((op, inputs)) => match infer(&op, &exact(&inputs), self.outputs).and_then(|_| run(&op, &inputs, 1)) {
                Err(error) => error,
                Ok(results) => panic!("{} gave {results:?} instead of an error with '{message}'", self.op),
            },
        };
        assert!(error.contains(message), "{}: '{error}' does not say '{message}'", self.op);
    }

    fn read(&self) -> Result<(Op, Vec<Option<Tensor>>), String> {
        self.read_as(self.op, self.opset, self.attributes.clone(), self.inputs.clone())
    }

    fn read_as(
        &self,
        op: &str,
        opset: i64,
        attributes: BTreeMap<String, Attribute>,
        mut inputs: Vec<Option<Tensor>>,
    ) -> Result<(Op, Vec<Option<Tensor>>), String> {
        let present = inputs.iter().map(Option::is_some).collect();
        let mut node = NodeReader::new("node", "", op, opset, present, self.outputs, attributes);
        let read = Op::import(op, &mut node).unwrap_or_else(|| panic!("{op} is not listed"));
        let read = read.map_err(|error| error.to_string())?;
        node.inserted_inputs().iter().for_each(|&index| inputs.insert(index, None));
        for (index, constant) in node.finish().map_err(|error| error.to_string())? {
            inputs.resize(inputs.len().max(index + 1), None);
            inputs[index] = Some(constant);
        }
        Ok((read, inputs))
    }

    fn check_spelling(&self, op: &Op, inputs: &[Option<Tensor>]) {
        let spelling = op.spelling().expect("a built-in operator has a spelling");
        if spelling.coerced_at.is_some() {
            return;
        }
        let attributes = spelling.attributes.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        let opset = spelling.since;
        let (again, _) = self
            .read_as(spelling.op_type, opset, attributes, inputs.to_vec())
            .unwrap_or_else(|error| panic!("{spelling:?} cannot be read: {error}"));
        assert_eq!(format!("{again:?}"), format!("{op:?}"), "{spelling:?} means something else");
    }

    fn compare(&self, index: usize, result: &Tensor, expected: &Tensor) {
        let place = format!("output {index} of {} {:?}", self.op, self.attributes);
        assert_eq!((result.dtype(), result.shape()), (expected.dtype(), expected.shape()), "{place}");
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

    fn check_facts(&self, op: &Op, inputs: &[Option<Tensor>], results: &[Value]) {
        let mut bindings = Bindings::new();
        let mut symbol = |input: usize, axis: usize, extent: usize| {
            let name = format!("i{input}.{axis}");
            bindings.insert(name.as_str().into(), extent as i64);
            Dim::symbol(name)
        };
        let symbolic = inputs.iter().enumerate().map(|(index, input)| {
            let tensor = input.as_ref()?;
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
        let unknown = |input: &Option<Tensor>| {
            input.as_ref().map(|tensor| Fact::Tensor(TensorFact::unknown_rank(tensor.dtype())))
        };
        for facts in [exact(inputs), symbolic, inputs.iter().map(unknown).collect()] {
            let inferred = infer(op, &facts, self.outputs).unwrap_or_else(|error| panic!("{}: {error}", self.op));
            for (fact, result) in inferred.iter().zip(results) {
                let (fact, result) = (fact.tensor().expect("a tensor's fact"), result.as_tensor().expect("a tensor"));
                let extents = fact.shape.as_ref();
                let fits = extents.is_none_or(|extents| {
                    extents.len() == result.shape().rank()
                        && extents.iter().zip(result.shape().iter()).all(|(extent, &actual)| {
                            extent.eval(&bindings).is_none_or(|extent| extent == actual as i64)
                        })
                });
                assert!(fits && fact.dtype == result.dtype(), "{}: {result:?} was inferred to be {fact}", self.op);
            }
        }
    }
}

fn exact(inputs: &[Option<Tensor>]) -> Vec<Option<Fact>> {
    inputs.iter().map(|input| input.as_ref().map(|tensor| Fact::Tensor(TensorFact::of_tensor(tensor)))).collect()
}

fn infer(op: &Op, facts: &[Option<Fact>], outputs: usize) -> Result<Vec<Fact>, String> {
    let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
    op.infer(Facts(&facts), &InferContext { node: "node", outputs }).map_err(|error| error.to_string())
}

/// Evaluates an operator, as tests of fused forms need it too.
pub(crate) fn run(op: &Op, inputs: &[Option<Tensor>], outputs: usize) -> Result<Vec<Value>, String> {
    let values: Vec<Option<Value>> = inputs.iter().map(|input| input.clone().map(Value::Tensor)).collect();
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
