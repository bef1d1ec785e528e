//! What constants and shapes decide before a run, found by the operators' own evaluation.

use cutover_graph::{
    Node, Op, TensorFact, ValueId,
    ops::{EvalContext, Inputs},
};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// What `node` gives, where all that it reads is `known`, or only shapes are read; each of at most `max_elements`. What fails is left to fail in
/// the run.
pub(crate) fn outputs<'a>(
    node: &Node,
    max_elements: usize,
    fact: impl Fn(ValueId) -> &'a TensorFact,
    known: impl Fn(ValueId) -> Option<Tensor>,
) -> Option<Vec<Tensor>> {
    let shapes_only = matches!(node.op, Op::EyeLike(_) | Op::Shape(_) | Op::Size(_));
    let shape = |id: ValueId| fact(id).constant_shape().map(Shape::from);
    let mut values = Vec::with_capacity(node.inputs.len());
    for input in &node.inputs {
        values.push(match *input {
            None => None,
            Some(id) if shapes_only => Some(Value::Tensor(Tensor::zeros(fact(id).dtype, shape(id)?).ok()?)),
            Some(id) => Some(Value::Tensor(known(id)?)),
        });
    }
    let borrowed: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let context = EvalContext { outputs: node.outputs.len(), max_elements, ..EvalContext::default() };
    let results = node.op.eval(Inputs(&borrowed), &context).ok()?;
    let tensors: Vec<Tensor> = results.into_iter().map(Value::into_tensor).collect::<Option<_>>()?;
    let fits = |(tensor, &id): (&Tensor, &ValueId)| {
        tensor.dtype() == fact(id).dtype && shape(id).is_some_and(|shape| *tensor.shape() == shape)
    };
    (tensors.len() >= node.outputs.len() && tensors.iter().zip(&node.outputs).all(fits)).then_some(tensors)
}

/// Where the elements of a selection come from: for each, the position in its first input, of shape `from`, counted from 1, and 0 where it is
/// filled. The operator is evaluated on positions instead of elements, beside its `others`.
///
/// # Errors
/// Why the operator is no such selection.
pub(crate) fn sources(node: &Node, from: Shape, others: Vec<Option<Value>>, to: &Shape) -> Result<Vec<i64>, String> {
    let positions = (1..=from.element_count() as i64).collect();
    let positions = Tensor::from_vec(from, positions).map_err(|error| error.to_string())?;
    let values: Vec<Option<Value>> = [Some(Value::Tensor(positions))].into_iter().chain(others).collect();
    let borrowed: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
    let results = node.op.eval(Inputs(&borrowed), &EvalContext::default()).map_err(|error| error.to_string())?;
    let sources = results.first().and_then(Value::as_tensor);
    let sources = sources.filter(|t| t.dtype() == DType::I64 && t.shape() == to).and_then(|t| t.to_vec().ok());
    sources.ok_or_else(|| "a selection of another kind".to_string())
}
