//! Small convolutional networks as graphs, their weights drawn from a seed: what training starts from where there is no model yet.

use super::batches::uniform;
use cutover_graph::{
    Constant, Dim, Graph, GraphError, Op, TensorFact, ValueId,
    ops::{Conv, Flatten, Gemm, MaxPool, Padding, Softmax, SoftmaxFunction, Unary, UnaryFunction, Window},
};
use cutover_tensor::{DType, Tensor};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// A chain of layers over images `[n, channels, height, width]`.
#[derive(Clone, Debug)]
pub struct Network {
    /// Channels, height and width of an image.
    pub input: [usize; 3],
    pub layers: Vec<Layer>,
}

/// One layer of a [`Network`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Stride 1, an odd square kernel, padded so that height and width stay.
    Convolution {
        channels: usize,
        kernel: usize,
    },
    Relu,
    /// Window and stride `size`; a remainder is dropped.
    MaxPool {
        size: usize,
    },
    /// Flattens what comes, then `x · Wᵀ + b`.
    Linear {
        units: usize,
    },
}

/// Why a network is none.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("layer {layer}: {message}")]
    Layer { layer: usize, message: String },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl Network {
    /// The network as a graph called `name`: input `image [N, c, h, w]`, output `probabilities [N, classes]` through a softmax. Weights are uniform
    /// within `±√(6 / fan_in)` (He et al. 2015), biases 0.
    ///
    /// # Errors
    /// A layer that does not fit what comes; a last layer that gives no classes.
    pub fn graph(&self, name: &str, seed: u64) -> Result<Graph, NetworkError> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut graph = Graph::new(name);
        let [c, h, w] = self.input.map(Dim::from);
        let mut value = graph.add_input("image", TensorFact::new(DType::F32, [Dim::symbol("N"), c, h, w]));
        // Of one example.
        let mut shape = self.input.to_vec();
        for (at, layer) in self.layers.iter().enumerate() {
            let wrong = |message: String| NetworkError::Layer { layer: at, message };
            let image = |what: &str| match shape[..] {
                [c, h, w] => Ok((c, h, w)),
                _ => Err(wrong(format!("{what} needs an image, and comes after a linear layer"))),
            };
            (value, shape) = match *layer {
                Layer::Relu => {
                    let relu = Unary { function: UnaryFunction::Relu };
                    (node(&mut graph, format!("relu{at}"), relu, vec![value])?, shape)
                }
                Layer::MaxPool { size } => {
                    let (c, h, w) = image("a pooling layer")?;
                    if size == 0 || size > h.min(w) {
                        return Err(wrong(format!("a window of {size} over an image of {h} by {w}")));
                    }
                    let pool = MaxPool { window: window(Some(size), size, 0), column_major_indices: false };
                    (node(&mut graph, format!("pool{at}"), pool, vec![value])?, vec![c, h / size, w / size])
                }
                Layer::Convolution { channels, kernel } => {
                    let (c, h, w) = image("a convolution")?;
                    if kernel % 2 == 0 {
                        return Err(wrong(format!("a kernel of {kernel}, expected an odd one")));
                    }
                    let conv = Conv { window: window(None, 1, kernel / 2), group: 1, activation: None };
                    let weights = weights(&[channels, c, kernel, kernel], &mut random).map_err(wrong)?;
                    let inputs = with_weights(&mut graph, value, format!("conv{at}"), weights);
                    (node(&mut graph, format!("conv{at}"), conv, inputs)?, vec![channels, h, w])
                }
                Layer::Linear { units } => {
                    if shape.len() > 1 {
                        value = node(&mut graph, format!("flatten{at}"), Flatten { axis: 1 }, vec![value])?;
                    }
                    let gemm = Gemm { alpha: 1.0, beta: 1.0, transpose_a: false, transpose_b: true, activation: None };
                    let weights = weights(&[units, shape.iter().product()], &mut random).map_err(wrong)?;
                    let inputs = with_weights(&mut graph, value, format!("linear{at}"), weights);
                    (node(&mut graph, format!("linear{at}"), gemm, inputs)?, vec![units])
                }
            };
        }
        if shape.len() != 1 {
            let message = "the last layer with weights must be linear: its units are the classes".to_string();
            return Err(NetworkError::Layer { layer: self.layers.len().saturating_sub(1), message });
        }
        let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
        value = node(&mut graph, "probabilities".to_string(), softmax, vec![value])?;
        graph.set_outputs(vec![value]);
        graph.verify()?;
        Ok(graph)
    }
}

/// A weight of this shape and its bias.
fn weights(shape: &[usize], random: &mut ChaCha8Rng) -> Result<[(&'static str, Tensor); 2], String> {
    let bound = (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
    let values = (0..shape.iter().product()).map(|_| ((2.0 * uniform(random) - 1.0) * bound) as f32).collect();
    let weight = Tensor::from_vec(shape, values).map_err(|e| e.to_string())?;
    let bias = Tensor::from_vec([shape[0]], vec![0f32; shape[0]]).map_err(|e| e.to_string())?;
    Ok([("weight", weight), ("bias", bias)])
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
