//! Nodes that are interpreted between regions: with code of their own where the reference's widening is most of the time.

use crate::Support;
use cutover_graph::{
    Op, OpError,
    ops::{EvalContext, Inputs},
};
use cutover_tensor::{DType, Tensor, Value};

/// As the placement says it.
pub(super) fn support(op: &Op) -> Support {
    match kernel(op) {
        "reference" => {
            let reason = "strings, containers, or a shape that only data decides";
            Support::Fallback { reason: reason.to_string() }
        }
        kernel => Support::Native { kernel },
    }
}

pub(super) fn kernel(op: &Op) -> &'static str {
    match op {
        Op::NonZero(_) => "non-zero",
        Op::NonMaxSuppression(_) => "non-maximum suppression",
        _ if !op.subgraphs().is_empty() => "control flow",
        _ => "reference",
    }
}

pub(super) fn eval(op: &Op, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
    match op {
        Op::NonZero(_) => match non_zero(inputs.tensor(0)?, context)? {
            Some(indices) => Ok(vec![Value::Tensor(indices)]),
            None => op.eval(inputs, context),
        },
        // Its definition compares f32s as they are.
        _ => op.eval(inputs, context),
    }
}

/// `[rank, n]`: the index of every element that is not zero, row-major, one per column. `None` for types that are not whole bytes.
fn non_zero(x: &Tensor, context: &EvalContext) -> Result<Option<Tensor>, OpError> {
    fn found<const N: usize>(bytes: &[u8], is_zero: impl Fn([u8; N]) -> bool) -> Vec<usize> {
        let (elements, _) = bytes.as_chunks::<N>();
        elements.iter().enumerate().filter(|(_, element)| !is_zero(**element)).map(|(at, _)| at).collect()
    }
    let bytes = x.bytes();
    let found = match x.dtype() {
        // Zeros of both signs are zero.
        DType::F32 => found(bytes, |b| f32::from_le_bytes(b) == 0.0),
        DType::F64 => found(bytes, |b| f64::from_le_bytes(b) == 0.0),
        DType::Bool | DType::U8 | DType::I8 => found(bytes, |b: [u8; 1]| b == [0]),
        DType::I16 | DType::U16 => found(bytes, |b: [u8; 2]| b == [0; 2]),
        DType::I32 | DType::U32 => found(bytes, |b: [u8; 4]| b == [0; 4]),
        DType::I64 | DType::U64 => found(bytes, |b: [u8; 8]| b == [0; 8]),
        _ => return Ok(None),
    };
    let shape = x.shape();
    let mut indices = vec![0i64; context.bounded_len(&[shape.rank(), found.len()])?];
    for (axis, row) in (0..shape.rank()).zip(indices.chunks_exact_mut(found.len().max(1))) {
        let (stride, extent) = (shape[axis + 1..].iter().product::<usize>(), shape[axis]);
        row.iter_mut().zip(&found).for_each(|(index, at)| *index = (at / stride % extent) as i64);
    }
    Ok(Some(Tensor::from_vec([shape.rank(), found.len()], indices)?))
}
