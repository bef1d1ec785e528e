//! A graph as a computation that candle can differentiate.
//!
//! What follows from weights is computed on candle's tensors, one family of operators a file; everything else (masks, shapes, indices) is
//! evaluated by the operators' own definition. The matrix products, windows and recurrences are operations of ours: candle holds their
//! tensors and walks back through them.

mod elementwise;
mod movement;
mod operators;
mod product;
mod recurrent;
mod rows;
mod tape;
#[cfg(test)]
mod tests;
mod window;

pub(crate) use elementwise::{Arithmetic, binary, map, map2, unary};
pub(crate) use movement::Sources;
pub(crate) use product::matmul;
pub(crate) use rows::{Reduction, RowFunction, cosine, of_rows, reduce};
pub(crate) use tape::{Function, View, apply, read, view};

use crate::{Sample, ShrinkError};
use candle_core::{Device, Tensor};
use cutover_graph::{
    Graph, NodeId, Op, OpError, Source, ValueId,
    ops::{BinaryFunction, EvalContext, Inputs},
};
use cutover_tensor::{DType, Shape, Tensor as Host, TensorError, Value};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

/// Why a node can't be computed or differentiated.
#[derive(Debug)]
pub(crate) struct Fault(pub String);

impl From<candle_core::Error> for Fault {
    fn from(error: candle_core::Error) -> Fault {
        Fault(error.to_string())
    }
}

impl From<OpError> for Fault {
    fn from(error: OpError) -> Fault {
        Fault(error.to_string())
    }
}

impl From<TensorError> for Fault {
    fn from(error: TensorError) -> Fault {
        Fault(error.to_string())
    }
}

/// A value of a run.
#[derive(Clone, Debug)]
pub(crate) enum Flow {
    /// Follows from no weight.
    Host(Value),
    /// Recorded.
    Live(Tensor),
}

/// Looks at what a node reads before it does.
pub(crate) trait Lens {
    /// Whether it looks at a value even where that follows from no weight.
    fn wants(&self, node: NodeId, value: ValueId) -> bool;

    /// What the node reads instead.
    fn look(&mut self, node: NodeId, value: ValueId, tensor: &Tensor) -> Result<Tensor, Fault>;
}

/// A lens that changes nothing.
pub(crate) struct Clear;

impl Lens for Clear {
    fn wants(&self, _: NodeId, _: ValueId) -> bool {
        false
    }

    fn look(&mut self, _: NodeId, _: ValueId, tensor: &Tensor) -> Result<Tensor, Fault> {
        Ok(tensor.clone())
    }
}

/// What a movement's sources follow from: the node, the shape it moves, and a digest of its other inputs.
type MoveKey = (NodeId, Vec<usize>, Vec<u8>);

/// Most movements whose sources are kept.
const MOVES_MAX: usize = 512;

/// A graph of which some values, weights as a rule, are variables.
pub(crate) struct Differentiable {
    graph: Graph,
    order: Vec<NodeId>,
    /// The variables' places among the parameters of a run.
    parameters: HashMap<ValueId, usize>,
    moves: Mutex<HashMap<MoveKey, Arc<Sources>>>,
}

impl Differentiable {
    /// `graph`, which is best [`crate::plain`], with these values as its variables.
    pub fn new(graph: Graph, parameters: &[ValueId]) -> Result<Differentiable, ShrinkError> {
        let order = graph.topological_order()?;
        let parameters = parameters.iter().enumerate().map(|(place, &value)| (value, place)).collect();
        Ok(Differentiable { graph, order, parameters, moves: Mutex::default() })
    }

    /// The values `wanted`, from `parameters` and a sample. Where a value follows from no parameter it comes as a constant.
    ///
    /// # Errors
    /// An input that is missing; a node that can't be differentiated, by name.
    pub fn run(
        &self,
        parameters: &[Tensor],
        sample: &Sample,
        wanted: &[ValueId],
        lens: &mut dyn Lens,
    ) -> Result<Vec<Tensor>, ShrinkError> {
        let graph = &self.graph;
        let mut uses = vec![0usize; graph.value_count()];
        for (_, node) in graph.nodes() {
            node.inputs.iter().flatten().for_each(|v| uses[v.index()] += 1);
        }
        wanted.iter().for_each(|v| uses[v.index()] += 1);
        let mut flows: HashMap<ValueId, Flow> = HashMap::new();
        for &input in graph.inputs() {
            let name = &graph.value(input).name;
            if let Some((_, value)) = sample.iter().find(|(n, _)| n == name) {
                flows.insert(input, Flow::Host(value.clone()));
            } else if !self.parameters.contains_key(&input) {
                return Err(ShrinkError::Option(format!("samples have no input '{name}'")));
            }
        }
        for (&value, &place) in &self.parameters {
            flows.insert(value, Flow::Live(parameters[place].clone()));
        }
        for &id in &self.order {
            let node = graph.node(id);
            let at = |fault: Fault| ShrinkError::Untrainable {
                node: node.name.clone(),
                op: node.op.name(),
                message: fault.0,
            };
            let mut inputs = Vec::with_capacity(node.inputs.len());
            for input in &node.inputs {
                let Some(value) = *input else {
                    inputs.push(None);
                    continue;
                };
                let flow = match (flows.get(&value), &graph.value(value).source) {
                    (Some(flow), _) => flow.clone(),
                    (None, Source::Constant(constant)) => Flow::Host(constant.tensor.clone().into()),
                    _ => return Err(at(Fault(format!("'{}' was not computed", graph.value(value).name)))),
                };
                inputs.push(Some(match flow {
                    Flow::Live(tensor) => Flow::Live(lens.look(id, value, &tensor).map_err(at)?),
                    flow if lens.wants(id, value) => {
                        let tensor = operators::live(&flow).map_err(at)?;
                        Flow::Live(lens.look(id, value, &tensor).map_err(at)?)
                    }
                    flow => flow,
                }));
            }
            let outputs = self.evaluate(id, &inputs).map_err(at)?;
            for (&value, flow) in node.outputs.iter().zip(outputs) {
                if uses[value.index()] > 0 {
                    flows.insert(value, flow);
                }
            }
            for value in node.inputs.iter().flatten() {
                uses[value.index()] -= 1;
                if uses[value.index()] == 0 {
                    flows.remove(value);
                }
            }
        }
        let tensor = |value: &ValueId| {
            let name = || graph.value(*value).name.clone();
            let missing = || ShrinkError::NotObserved { value: name() };
            let flow = flows.get(value).ok_or_else(missing)?;
            operators::live(flow).map_err(|fault| ShrinkError::Training(format!("value '{}': {}", name(), fault.0)))
        };
        wanted.iter().map(tensor).collect()
    }

    fn evaluate(&self, id: NodeId, inputs: &[Option<Flow>]) -> Result<Vec<Flow>, Fault> {
        let node = self.graph.node(id);
        if inputs.iter().flatten().any(|flow| matches!(flow, Flow::Live(_))) && has_derivative(&node.op) {
            let operands = operators::Operands { id, node, inputs, moves: &self.moves };
            return Ok(operands.apply()?.into_iter().map(Flow::Live).collect());
        }
        let shape_only = matches!(node.op, Op::Shape(_) | Op::Size(_) | Op::EyeLike(_));
        let values: Vec<Option<Value>> = inputs
            .iter()
            .map(|flow| match flow {
                None => Ok(None),
                Some(Flow::Host(value)) => Ok(Some(value.clone())),
                Some(Flow::Live(tensor)) if shape_only => Ok(Some(Host::zeros(DType::F32, tensor.dims())?.into())),
                Some(Flow::Live(tensor)) => Ok(Some(to_host(tensor)?.into())),
            })
            .collect::<Result<_, Fault>>()?;
        let values: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
        let context = EvalContext { outputs: node.outputs.len(), ..EvalContext::default() };
        Ok(node.op.eval(Inputs(&values), &context)?.into_iter().map(Flow::Host).collect())
    }
}

/// Whether what an operator gives follows smoothly from what it reads: otherwise it is evaluated, and no gradient passes.
fn has_derivative(op: &Op) -> bool {
    match op {
        Op::Shape(_) | Op::Size(_) | Op::EyeLike(_) | Op::Predicate(_) | Op::ArgReduce(_) | Op::NonZero(_) => false,
        Op::Binary(binary) => !(binary.function.compares() || matches!(binary.function, BinaryFunction::Mod)),
        Op::Cast(cast) => cast.to.is_float(),
        _ => true,
    }
}

/// A tensor of the runtime as one of candle.
pub(crate) fn from_host(tensor: &Host) -> Result<Tensor, Fault> {
    if tensor.dtype() != DType::F32 {
        return Err(Fault(format!("{} where f32 was expected", tensor.dtype())));
    }
    Ok(Tensor::from_vec(tensor.to_vec::<f32>()?, tensor.shape().dims(), &Device::Cpu)?)
}

pub(crate) fn to_host(tensor: &Tensor) -> Result<Host, Fault> {
    let values = read(&tensor.contiguous()?, |view| view.data.to_vec())?;
    Ok(Host::from_vec(Shape::new(tensor.dims()), values)?)
}

/// The f32 constants that training changes: weights, biases, the scales of norms, embeddings. Numbers that are part of a formula (a single one,
/// a mask, an epsilon) are not.
pub(crate) fn trainable(graph: &Graph) -> Vec<ValueId> {
    let mut found: Vec<ValueId> = Vec::new();
    for (_, node) in graph.nodes() {
        for (place, value) in node.inputs.iter().enumerate().filter_map(|(i, v)| Some((i, (*v)?))) {
            let Some(constant) = graph.constant(value) else { continue };
            if constant.tensor.dtype() != DType::F32 || found.contains(&value) {
                continue;
            }
            let several = constant.tensor.element_count() > 1;
            let ordinary = || constant.tensor.as_slice::<f32>().is_ok_and(|v| v.iter().all(|v| v.abs() < 1e4));
            let is_weight = match &node.op {
                Op::Conv(_) | Op::ConvTranspose(_) => place > 0,
                Op::MatMul(_) | Op::Gemm(_) => several || place == 2,
                Op::BatchNorm(_) => place == 1 || place == 2,
                Op::LayerNorm(_) | Op::InstanceNorm(_) => place > 0,
                Op::Recurrent(_) => (1..=3).contains(&place),
                Op::Gather(_) => place == 0 && several,
                Op::Binary(binary) => match binary.function {
                    BinaryFunction::PRelu => place == 1,
                    BinaryFunction::Add | BinaryFunction::Sub | BinaryFunction::Mul | BinaryFunction::Div => {
                        several && ordinary()
                    }
                    _ => false,
                },
                Op::Concat(_) | Op::Expand(_) => several && ordinary(),
                _ => false,
            };
            if is_weight {
                found.push(value);
            }
        }
    }
    found
}
