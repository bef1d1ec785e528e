//! What a file says of a value's type, as a fact, and how far a body may rely on it.

use super::{
    import::corrupt,
    proto::{self, Extent, TypeProto, TypeValue},
};
use crate::{Dim, Fact, ImportError, TensorFact};
use cutover_tensor::DType;

/// The fact that a declared type is; unnamed dimensions get symbols called after `name`.
pub(super) fn fact(declared: &TypeProto, name: &str, place: &str, rank_limit: usize) -> Result<Fact, ImportError> {
    let dtype = |code: i32| match DType::from_onnx_code(code) {
        Some(dtype) => Ok(dtype),
        None => corrupt(place, format!("element type {code} is not one of ONNX's")),
    };
    match &declared.value {
        Some(TypeValue::Tensor(tensor)) => {
            let dtype = dtype(tensor.elem_type)?;
            let Some(shape) = &tensor.shape else { return Ok(TensorFact::unknown_rank(dtype).into()) };
            if shape.dim.len() > rank_limit {
                let (actual, limit) = (shape.dim.len() as u64, rank_limit as u64);
                return Err(ImportError::Limit { place: place.to_string(), what: "the rank", actual, limit });
            }
            let dims = shape.dim.iter().enumerate().map(|(axis, dim)| match &dim.value {
                Some(Extent::Value(value)) if *value >= 0 => Dim::Const(*value),
                Some(Extent::Parameter(symbol)) if !symbol.is_empty() => Dim::symbol(symbol.as_str()),
                // Some exporters write -1 for what varies.
                _ => Dim::symbol(format!("{name}.{axis}")),
            });
            Ok(TensorFact::new(dtype, dims.collect::<Vec<_>>()).into())
        }
        Some(TypeValue::Sequence(of)) => Ok(Fact::Sequence(Box::new(element(of, name, place, rank_limit)?))),
        Some(TypeValue::Optional(of)) => Ok(Fact::Optional(Box::new(element(of, name, place, rank_limit)?))),
        Some(TypeValue::Map(map)) => {
            let Some(value) = &map.value_type else { return corrupt(place, "a map without a type of its values") };
            Ok(Fact::Map { key: dtype(map.key_type)?, value: Box::new(fact(value, name, place, rank_limit)?) })
        }
        Some(TypeValue::SparseTensor(_)) => {
            Err(ImportError::Unsupported { place: place.to_string(), message: "sparse tensors".to_string() })
        }
        None => corrupt(place, "has no type"),
    }
}

fn element(of: &proto::ElementTypeProto, name: &str, place: &str, rank_limit: usize) -> Result<Fact, ImportError> {
    match &of.elem_type {
        Some(of) => fact(of, name, place, rank_limit),
        None => corrupt(place, "a sequence or optional of no type"),
    }
}

/// What a body may rely on of an input of which it says no type, as those of ONNX's own functions do, and of the elements of containers: a
/// shape may change from one iteration to the next.
pub(super) fn of_any_shape(given: &Fact) -> Fact {
    match given {
        Fact::Tensor(tensor) => TensorFact::unknown_rank(tensor.dtype).into(),
        Fact::Sequence(of) => Fact::Sequence(Box::new(of_any_shape(of))),
        Fact::Optional(of) => Fact::Optional(Box::new(of_any_shape(of))),
        Fact::Map { .. } => given.clone(),
    }
}

/// What a body declares of an input, without the numbers that its node does not know of what it hands over: exporters that trace a model declare
/// the extents of their example.
pub(super) fn traced(declared: Fact, given: &Fact, name: &str) -> Fact {
    match (declared, given) {
        (
            Fact::Tensor(TensorFact { dtype, shape: Some(shape), value }),
            Fact::Tensor(TensorFact { shape: Some(given), .. }),
        ) if shape.len() == given.len() => {
            let extents = shape.into_iter().zip(given).enumerate();
            let extent = |(axis, (declared, given)): (usize, (Dim, &Dim))| match declared.as_const() {
                Some(_) if declared != *given => Dim::symbol(format!("{name}.{axis}")),
                _ => declared,
            };
            TensorFact { dtype, shape: Some(extents.map(extent).collect()), value }.into()
        }
        (declared @ Fact::Tensor(_), _) => declared,
        (declared, _) => of_any_shape(&declared),
    }
}
