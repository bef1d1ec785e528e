//! What the suites share: small models, packages of them, and hosts.

pub mod conformance;

use cutover::{
    DType, Device, DeviceOptions, Host, HostOptions, Model, Tensor,
    graph::{
        Constant, Dim, Graph, TensorFact,
        ops::{Gemm, Softmax, SoftmaxFunction, Unary, UnaryFunction},
    },
    package::{Contents, Golden, Manifest, write},
};
use std::path::{Path, PathBuf};

/// xorshift64*: seeded, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform within -1 and 1.
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// How many times the sample a soak runs.
pub fn soak_factor() -> usize {
    std::env::var("CUTOVER_SOAK").ok().and_then(|f| f.parse().ok()).unwrap_or(1)
}

pub const FEATURES: usize = 64;
pub const CLASSES: usize = 8;

/// `features [N, 64]` → `probabilities [N, 8]` through ten layers of a megabyte, the last of which depends on `seed`.
pub fn deep(seed: u64) -> Graph {
    const WIDTH: usize = 512;
    const LAYERS: usize = 10;
    let mut graph = Graph::new("deep");
    let mut value = graph.add_input("features", TensorFact::new(DType::F32, [Dim::symbol("N"), FEATURES.into()]));
    for layer in 0..LAYERS + 2 {
        let (from, to) = match layer {
            0 => (FEATURES, WIDTH),
            layer if layer <= LAYERS => (WIDTH, WIDTH),
            _ => (WIDTH, CLASSES),
        };
        let mut random = Random::new(if layer == LAYERS { 100 + seed } else { layer as u64 + 1 });
        let scale = 1.7 / (from as f32).sqrt();
        let values = (0..to * from).map(|_| random.unit() * scale).collect::<Vec<f32>>();
        let weight = Tensor::from_vec([to, from], values).expect("as many values as the shape holds");
        let weight = graph.add_constant(format!("weight{layer}"), Constant::new(weight));
        let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
        let inputs = vec![Some(value), Some(weight), None];
        let node = graph.add_node(format!("linear{layer}"), gemm.into(), inputs, vec![format!("linear{layer}.out")]);
        value = graph.node(node.expect("a valid layer")).outputs[0];
    }
    let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
    let node = graph.add_node("softmax", softmax.into(), vec![Some(value)], vec!["probabilities".to_string()]);
    let output = graph.node(node.expect("a valid layer")).outputs[0];
    graph.set_outputs(vec![output]);
    graph
}

/// A classifier `features [N, 64]` → `probabilities [N, 8]` whose every weight depends on `seed`; its larger tensors are objects of
/// their own in a store.
pub fn classifier(seed: u64) -> Graph {
    const HIDDEN: usize = 512;
    let mut random = Random::new(seed);
    let mut graph = Graph::new("classifier");
    let mut value = graph.add_input("features", TensorFact::new(DType::F32, [Dim::symbol("N"), FEATURES.into()]));
    for (layer, (from, to)) in [(FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES)].into_iter().enumerate() {
        let scale = 2.0 / (from as f32).sqrt();
        let mut constant = |graph: &mut Graph, name: &str, shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| random.unit() * scale).collect::<Vec<f32>>();
            let tensor = Tensor::from_vec(shape, values).expect("as many values as the shape holds");
            Some(graph.add_constant(format!("{name}{layer}"), Constant::new(tensor)))
        };
        let (weight, bias) = (constant(&mut graph, "weight", &[to, from]), constant(&mut graph, "bias", &[to]));
        let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
        let inputs = vec![Some(value), weight, bias];
        let node = graph.add_node(format!("linear{layer}"), gemm.into(), inputs, vec![format!("linear{layer}.out")]);
        value = graph.node(node.expect("a valid layer")).outputs[0];
        if to == HIDDEN {
            let relu = Unary { function: UnaryFunction::Relu };
            let node = graph.add_node(
                format!("relu{layer}"),
                relu.into(),
                vec![Some(value)],
                vec![format!("relu{layer}.out")],
            );
            value = graph.node(node.expect("a valid layer")).outputs[0];
        }
    }
    let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
    let node = graph.add_node("softmax", softmax.into(), vec![Some(value)], vec!["probabilities".to_string()]);
    let output = graph.node(node.expect("a valid layer")).outputs[0];
    graph.set_outputs(vec![output]);
    graph
}

/// What `graph` answers to `input`, by the definition.
pub fn reference(graph: &Graph, input: &str, tensor: &Tensor, output: &str) -> Vec<f32> {
    let model = Model::from_graph(graph.clone(), &Default::default()).expect("a valid graph");
    let mut session = model.compile(Device::Reference).expect("the reference takes all").session().expect("memory");
    let answers = session.run([(input, tensor.view())]).expect("a valid input");
    answers.get(output).expect("the model's output").to_vec().expect("f32")
}

/// Writes `graph` as a package of one model of this name, with golden vectors for `input`.
pub fn package(
    graph: &Graph,
    name: &str,
    version: &str,
    input: (&str, &Tensor),
    output: &str,
    folder: &Path,
) -> PathBuf {
    let expected = reference(graph, input.0, input.1, output);
    let rows = input.1.shape()[0];
    let expected = Tensor::from_vec([rows, expected.len() / rows], expected).expect("rows of classes");
    let golden =
        Golden { inputs: vec![(input.0.to_string(), input.1.clone())], outputs: vec![(output.to_string(), expected)] };
    let manifest = Manifest::of(graph, name, version).expect("a valid name");
    let path = folder.join(format!("{name}-{version}.cutover"));
    write(&Contents { graph, manifest, golden: &golden, profile: None, tokenizer: None }, &path)
        .expect("a package can be written");
    path
}

/// A host on the CPU backend, one thread for each request.
pub fn host(store: &Path, options: HostOptions) -> Host {
    let device = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
    let backends = vec![Device::Cpu.backend(&device).expect("the CPU")];
    Host::open(store, HostOptions { backends, ..options }).expect("a store")
}
