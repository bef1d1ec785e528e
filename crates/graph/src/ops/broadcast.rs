//! What elementwise operators of several inputs share: broadcasting of symbolic shapes and values.

use crate::{Dim, Fact, OpError, TensorFact};
use cutover_tensor::DType;

/// The shape that NumPy-style broadcasting gives; unknown where one of them is.
pub fn broadcast_dims(facts: &[&TensorFact]) -> Result<Option<Vec<Dim>>, OpError> {
    let Some(shapes) = facts.iter().map(|f| f.shape.as_deref()).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut result = vec![Dim::Const(1); rank];
    for shape in &shapes {
        for (out, dim) in result[rank - shape.len()..].iter_mut().zip(*shape) {
            *out = broadcast_dim(out, dim).ok_or_else(|| {
                let list: Vec<_> = facts.iter().map(|f| f.to_string()).collect();
                OpError::input(format!("shapes of {} do not broadcast: {out} against {dim}", list.join(" and ")))
            })?;
        }
    }
    Ok(Some(result))
}

/// One axis; `None` where two known extents contradict each other.
pub(super) fn broadcast_dim(a: &Dim, b: &Dim) -> Option<Dim> {
    match (a.as_const(), b.as_const()) {
        _ if a == b => Some(a.clone()),
        (Some(1), _) => Some(b.clone()),
        (_, Some(1)) => Some(a.clone()),
        (Some(_), Some(_)) => None,
        // A symbol against a number is that number, or 1.
        (Some(_), None) => Some(a.clone()),
        (None, Some(_)) => Some(b.clone()),
        // Equal, or one of them 1, which against 0 gives 0.
        (None, None) => Some(a.maximum(b) * a.minimum(b).minimum(&Dim::Const(1))),
    }
}

/// The fact of an elementwise result, with its elements where all inputs' are known and `element` gives each.
pub fn elementwise_fact(
    facts: &[&TensorFact],
    dtype: DType,
    element: impl Fn(&[&Dim]) -> Option<Dim>,
) -> Result<Fact, OpError> {
    let shape = broadcast_dims(facts)?;
    let fact = TensorFact { dtype, shape, value: None };
    let value = (|| {
        let count = fact.constant_count().filter(|&count| count <= TensorFact::VALUE_LIMIT)?;
        let shape = fact.constant_shape()?;
        let columns = facts
            .iter()
            .map(|f| {
                let value = f.value.as_ref()?;
                let from = f.constant_shape()?;
                Some(super::broadcast_index(&from, &shape).map(|i| &value[i]).collect::<Vec<_>>())
            })
            .collect::<Option<Vec<_>>>()?;
        (0..count).map(|i| element(&columns.iter().map(|c| c[i]).collect::<Vec<_>>())).collect::<Option<Vec<_>>>()
    })();
    Ok(fact.with_value(value).into())
}
