//! What no kernel takes: the operator's reference evaluation, on one thread.

use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, NoPlan},
    },
};
use cutover_graph::{
    Node, Op, OpError,
    ops::{EvalContext, Inputs},
};
use cutover_tensor::{DType, Shape, Tensor, Value};

pub(in crate::cpu) struct FallbackStep {
    node: String,
    op: Op,
    inputs: Vec<Option<(Buffer, DType, Shape)>>,
    outputs: Vec<(Buffer, DType, Shape)>,
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node) -> Result<(), NoPlan> {
    let mut inputs = Vec::with_capacity(node.inputs.len());
    for input in &node.inputs {
        inputs.push(match *input {
            None => None,
            Some(id) => Some((builder.plain(id)?, builder.fact(id).dtype, builder.shape(id))),
        });
    }
    let mut outputs = Vec::with_capacity(node.outputs.len());
    for &id in &node.outputs {
        outputs.push((builder.new_plain(id)?, builder.fact(id).dtype, builder.shape(id)));
    }
    let reads: Vec<Buffer> = inputs.iter().flatten().map(|i| i.0).collect();
    let writes: Vec<Buffer> = outputs.iter().map(|o| o.0).collect();
    let step = FallbackStep { node: node.name.clone(), op: node.op.clone(), inputs, outputs };
    builder.push(Lowered::Fallback(step), &reads, &writes);
    Ok(())
}

impl FallbackStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>) -> Result<(), RunError> {
        if worker.part != 0 {
            return Ok(());
        }
        let failed = |source: OpError| RunError::Op { node: self.node.clone(), op: self.op.name(), source };
        let read = |input: &Option<(Buffer, DType, Shape)>| {
            let tensor = input.as_ref().map(|(buffer, dtype, shape)| {
                let bytes = frame.bytes(*buffer);
                Tensor::from_bytes(*dtype, shape.clone(), bytes).map(Value::Tensor)
            });
            tensor.transpose().map_err(|e| failed(e.into()))
        };
        let inputs = self.inputs.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let borrowed: Vec<Option<&Value>> = inputs.iter().map(Option::as_ref).collect();
        let context = EvalContext { outputs: self.outputs.len(), ..EvalContext::default() };
        let values = self.op.eval(Inputs(&borrowed), &context).map_err(failed)?;
        for (value, (buffer, dtype, shape)) in values.iter().zip(&self.outputs) {
            match value.as_tensor() {
                Some(tensor) if tensor.dtype() == *dtype && tensor.shape() == shape => {
                    frame.write(*buffer, 0, tensor.bytes())
                }
                _ => {
                    return Err(failed(OpError::input(format!(
                        "a result of another shape than {shape}, which was inferred"
                    ))));
                }
            }
        }
        Ok(())
    }
}
