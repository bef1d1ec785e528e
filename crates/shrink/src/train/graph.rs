//! A trained network as a graph.

use super::{Layer, Network, TrainError};
use candle_core::Var;
use cutover_graph::{
    Constant, Dim, Graph, GraphError, Op, TensorFact, ValueId,
    ops::{Conv, Flatten, Gemm, MaxPool, Padding, Softmax, SoftmaxFunction, Unary, UnaryFunction, Window},
};
use cutover_tensor::{DType, Tensor};

pub(super) fn build(name: &str, network: &Network, parameters: &[(Var, Var)]) -> Result<Graph, TrainError> {
    let mut graph = Graph::new(name);
    let [c, h, w] = network.input.map(Dim::from);
    let mut value = graph.add_input("image", TensorFact::new(DType::F32, [Dim::symbol("N"), c, h, w]));
    let mut parameters = parameters.iter();
    let mut is_image = true;
    let mut classes = 0;
    for (at, layer) in network.layers.iter().enumerate() {
        let mut weights = || {
            let (weight, bias) = parameters.next().expect("weights for every layer that has some");
            Ok::<_, TrainError>([("weight", tensor(weight)?), ("bias", tensor(bias)?)])
        };
        value = match *layer {
            Layer::Relu => node(&mut graph, format!("relu{at}"), Unary { function: UnaryFunction::Relu }, vec![value])?,
            Layer::MaxPool { size } => {
                let pool = MaxPool { window: window(Some(size), size, 0), column_major_indices: false };
                node(&mut graph, format!("pool{at}"), pool, vec![value])?
            }
            Layer::Convolution { kernel, .. } => {
                let conv = Conv { window: window(None, 1, kernel / 2), group: 1, activation: None };
                let inputs = with_weights(&mut graph, value, format!("conv{at}"), weights()?);
                node(&mut graph, format!("conv{at}"), conv, inputs)?
            }
            Layer::Linear { units } => {
                if std::mem::take(&mut is_image) {
                    value = node(&mut graph, format!("flatten{at}"), Flatten { axis: 1 }, vec![value])?;
                }
                classes = units;
                let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
                let inputs = with_weights(&mut graph, value, format!("linear{at}"), weights()?);
                node(&mut graph, format!("linear{at}"), gemm, inputs)?
            }
        };
    }
    debug_assert!(classes > 0);
    let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
    value = node(&mut graph, "probabilities".to_string(), softmax, vec![value])?;
    graph.set_outputs(vec![value]);
    graph.verify()?;
    Ok(graph)
}

/// A node whose only output has its name.
fn node(graph: &mut Graph, name: String, op: impl Into<Op>, inputs: Vec<ValueId>) -> Result<ValueId, GraphError> {
    let inputs = inputs.into_iter().map(Some).collect();
    let node = graph.add_node(format!("/{name}"), op.into(), inputs, vec![name])?;
    Ok(graph.node(node).outputs[0])
}

fn with_weights(graph: &mut Graph, value: ValueId, layer: String, weights: [(&str, Tensor); 2]) -> Vec<ValueId> {
    let add = |(role, tensor)| graph.add_constant(format!("{layer}.{role}"), Constant::new(tensor));
    [value].into_iter().chain(weights.map(add)).collect()
}

fn window(kernel: Option<usize>, stride: usize, padding: usize) -> Window {
    Window {
        kernel_shape: kernel.map(|k| vec![k, k]),
        strides: vec![stride; 2],
        dilations: Vec::new(),
        padding: Padding::Explicit { begin: vec![padding; 2], end: vec![padding; 2] },
        ceil_mode: false,
    }
}

fn tensor(variable: &Var) -> Result<Tensor, TrainError> {
    let values = variable.as_tensor().flatten_all()?.to_vec1::<f32>()?;
    Tensor::from_vec(variable.dims(), values).map_err(|e| {
        TrainError::Graph(GraphError::Op { node: "a weight".to_string(), op: "constant".to_string(), source: e.into() })
    })
}
