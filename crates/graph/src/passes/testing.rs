//! What tests of passes share: seeded numbers, graphs in a line a node, and evaluation node by node.

use super::{Pass, PassOptions, driver};
use crate::{
    Constant, Dim, Fact, Graph, Op, TensorFact, ValueId,
    ops::{Binary, BinaryFunction, EvalContext, Inputs, Unary, UnaryFunction, Wide},
};
use cutover_tensor::{DType, Tensor, Value};

/// Multiplies the iterations of seeded tests.
pub(crate) fn soak() -> u64 {
    std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1)
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len() as u64) as usize]
    }

    /// In `[-2, 2)`, multiples of 1/64.
    pub fn float(&mut self) -> f32 {
        self.below(256) as f32 / 64.0 - 2.0
    }

    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let count = shape.iter().product();
        Tensor::from_vec(shape, (0..count).map(|_| self.float()).collect()).unwrap()
    }
}

/// A graph under construction. Nodes are named by number: `n0`, `n1`, …, their outputs `v0`, `v1`, ….
pub(crate) struct Builder {
    pub graph: Graph,
    pub random: Random,
}

impl Builder {
    pub fn new(seed: u64) -> Builder {
        Builder { graph: Graph::new("test"), random: Random::new(seed) }
    }

    pub fn input(&mut self, name: &str, shape: &[usize]) -> ValueId {
        self.graph.add_input(name, TensorFact::of_constant_shape(DType::F32, shape))
    }

    /// Extents that are names become symbols.
    pub fn symbolic_input(&mut self, name: &str, shape: &[&str]) -> ValueId {
        let dim = |d: &&str| d.parse::<i64>().map_or_else(|_| Dim::symbol(*d), Dim::Const);
        self.graph.add_input(name, TensorFact::new(DType::F32, shape.iter().map(dim).collect::<Vec<_>>()))
    }

    pub fn constant(&mut self, tensor: Tensor) -> ValueId {
        let name = format!("c{}", self.graph.value_count());
        self.graph.add_constant(name, Constant::new(tensor))
    }

    pub fn scalar(&mut self, value: f32) -> ValueId {
        self.constant(Tensor::scalar(value))
    }

    pub fn integers(&mut self, values: &[i64]) -> ValueId {
        self.constant(Tensor::from_vec([values.len()], values.to_vec()).unwrap())
    }

    /// A constant of random elements.
    pub fn weight(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(shape);
        self.constant(tensor)
    }

    pub fn node(&mut self, op: impl Into<Op>, inputs: &[ValueId]) -> ValueId {
        self.nodes(op, inputs, 1)[0]
    }

    pub fn nodes(&mut self, op: impl Into<Op>, inputs: &[ValueId], outputs: usize) -> Vec<ValueId> {
        let number = self.graph.nodes().count();
        let names =
            (0..outputs).map(|o| if o == 0 { format!("v{number}") } else { format!("v{number}.{o}") }).collect();
        let inputs = inputs.iter().copied().map(Some).collect();
        let id = self.graph.add_node(format!("n{number}"), op.into(), inputs, names).unwrap();
        self.graph.node(id).outputs.clone()
    }

    pub fn unary(&mut self, function: UnaryFunction, x: ValueId) -> ValueId {
        self.node(Unary { function }, &[x])
    }

    pub fn binary(&mut self, function: BinaryFunction, a: ValueId, b: ValueId) -> ValueId {
        self.node(Binary { function }, &[a, b])
    }

    pub fn with_number(&mut self, function: BinaryFunction, a: ValueId, number: f32) -> ValueId {
        let number = self.scalar(number);
        self.binary(function, a, number)
    }

    pub fn finish(mut self, outputs: &[ValueId]) -> Graph {
        self.graph.set_outputs(outputs.to_vec());
        self.graph.verify().unwrap();
        self.graph
    }
}

/// The outputs of `graph` by the operators' own definitions.
pub(crate) fn evaluate(graph: &Graph, inputs: &[Tensor]) -> Vec<Tensor> {
    let mut values: Vec<Option<Value>> = vec![None; graph.value_count()];
    for (&id, tensor) in graph.inputs().iter().zip(inputs) {
        values[id.index()] = Some(tensor.clone().into());
    }
    for (id, _) in graph.values() {
        if let Some(constant) = graph.constant(id) {
            values[id.index()] = Some(constant.tensor.clone().into());
        }
    }
    for id in graph.topological_order().unwrap() {
        let node = graph.node(id);
        let inputs: Vec<Option<&Value>> =
            node.inputs.iter().map(|i| i.and_then(|i| values[i.index()].as_ref())).collect();
        let context = EvalContext { outputs: node.outputs.len(), ..EvalContext::default() };
        let results = node.op.eval(Inputs(&inputs), &context).unwrap_or_else(|e| panic!("{}: {e}", node.name));
        for (&output, value) in node.outputs.iter().zip(results) {
            values[output.index()] = Some(value);
        }
    }
    graph.outputs().iter().map(|o| values[o.index()].clone().unwrap().into_tensor().unwrap()).collect()
}

/// Random inputs for `graph`, its symbols at `extent`.
pub(crate) fn random_inputs(graph: &Graph, random: &mut Random, extent: usize) -> Vec<Tensor> {
    let tensor = |random: &mut Random, fact: &Fact| {
        let fact = fact.as_tensor().unwrap();
        let dims = fact.shape.as_ref().unwrap().iter();
        random.tensor(&dims.map(|d| d.as_const().map_or(extent, |d| d as usize)).collect::<Vec<_>>())
    };
    graph.inputs().iter().map(|&id| tensor(random, &graph.value(id).fact)).collect()
}

/// Asserts that both graphs give the same outputs, to `tolerance` of the largest element of each.
pub(crate) fn assert_same(before: &Graph, after: &Graph, inputs: &[Tensor], tolerance: f64) {
    let names = |g: &Graph| g.outputs().iter().map(|&o| g.value(o).name.clone()).collect::<Vec<_>>();
    assert_eq!(names(before), names(after));
    for (index, (x, y)) in evaluate(before, inputs).iter().zip(evaluate(after, inputs)).enumerate() {
        assert_eq!((x.dtype(), x.shape()), (y.dtype(), y.shape()), "output {index}");
        match (Wide::of(x).unwrap(), Wide::of(&y).unwrap()) {
            (Wide::Float(x), Wide::Float(y)) => {
                let scale = x.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
                for (i, (a, b)) in x.iter().zip(&y).enumerate() {
                    assert!(
                        (a - b).abs() <= tolerance * scale || (a.is_nan() && b.is_nan()),
                        "output {index}[{i}]: {a} became {b}"
                    );
                }
            }
            (x, y) => assert_eq!(x, y, "output {index}"),
        }
    }
}

/// Runs `passes` alone on `graph`, asserts that answers stay what they are to `tolerance`, and gives the operators that are left, in
/// order.
pub(crate) fn check(passes: &[&dyn Pass], graph: Graph, tolerance: f64) -> Vec<String> {
    let (after, _) = driver::run(graph.clone(), passes, &PassOptions::default()).unwrap();
    for extent in [3, 5] {
        let inputs = random_inputs(&graph, &mut Random::new(extent as u64), extent);
        assert_same(&graph, &after, &inputs, tolerance);
    }
    after.topological_order().unwrap().into_iter().map(|id| after.node(id).op.name()).collect()
}
