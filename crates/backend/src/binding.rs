//! Whether what a caller hands in, and where the results shall go, fit a model's signature.
//!
//! Checked once per run, before any node runs. Inputs give the model's symbols their values; everything after that can be
//! sized. A signature without symbols is checked without a heap allocation.

use crate::{Input, Output, RunError, Signature};
use cutover_graph::{Bindings, Dim, Fact, TensorFact};
use cutover_tensor::{DType, MapKeys, Shape, TensorViewMut, Value};

/// Checks `inputs` against the signature and leaves in `symbols` the value of every symbol they determine.
///
/// # Errors
/// [`RunError::InputCount`]; [`RunError::Input`] for another type, rank or extent; [`RunError::Symbol`] where two extents
/// that share a symbol differ.
pub fn bind_inputs(signature: &Signature, inputs: &[Input<'_>], symbols: &mut Bindings) -> Result<(), RunError> {
    symbols.clear();
    if inputs.len() != signature.inputs.len() {
        return Err(RunError::InputCount { expected: signature.inputs.len(), actual: inputs.len() });
    }
    let mut expressions = false;
    for (index, (binding, input)) in signature.inputs.iter().zip(inputs).enumerate() {
        let mismatch = || mismatch(&binding.name, &binding.fact, input);
        if !is_of(&binding.fact, input) {
            return Err(mismatch());
        }
        let Some((shape, extents)) = extents_of(&binding.fact, input) else { continue };
        for (axis, (dim, &extent)) in shape.iter().zip(extents).enumerate() {
            let extent = i64::try_from(extent).map_err(|_| mismatch())?;
            match (dim, dim.as_symbol()) {
                (Dim::Const(_), _) => {}
                (_, Some(symbol)) => match symbols.get(symbol) {
                    None => {
                        symbols.insert(symbol.clone(), extent);
                    }
                    Some(&earlier) if earlier == extent => {}
                    Some(&earlier) => {
                        return Err(RunError::Symbol {
                            name: binding.name.clone(),
                            axis,
                            symbol: symbol.to_string(),
                            actual: extent,
                            earlier,
                            earlier_name: first_use(signature, symbol, index),
                        });
                    }
                },
                _ => expressions = true,
            }
        }
    }
    // Expressions are checked when every symbol has its value, whichever input gave it.
    if expressions {
        for (binding, input) in signature.inputs.iter().zip(inputs) {
            let Some((shape, extents)) = extents_of(&binding.fact, input) else { continue };
            let fits = |(dim, &extent): (&Dim, &usize)| {
                dim.eval(symbols).is_none_or(|value| usize::try_from(value) == Ok(extent))
            };
            if !shape.iter().zip(extents).all(fits) {
                return Err(mismatch(&binding.name, &binding.fact, input));
            }
        }
    }
    Ok(())
}

/// Checks the places for the results as far as `symbols` decide their shapes; a shape that only data decides is checked by
/// [`check_result`] when it is there.
///
/// # Errors
/// [`RunError::OutputCount`], [`RunError::Output`], [`RunError::OutputKind`].
pub fn check_outputs(signature: &Signature, outputs: &[Output<'_>], symbols: &Bindings) -> Result<(), RunError> {
    if outputs.len() != signature.outputs.len() {
        return Err(RunError::OutputCount { expected: signature.outputs.len(), actual: outputs.len() });
    }
    for (binding, output) in signature.outputs.iter().zip(outputs) {
        let Output::Write(view) = output else { continue };
        let Fact::Tensor(fact) = &binding.fact else {
            return Err(RunError::OutputKind { name: binding.name.clone(), kind: binding.fact.to_string() });
        };
        let Some(shape) = fact.shape.as_deref().and_then(|dims| shape_of(dims, symbols)) else { continue };
        check_result(&binding.name, fact.dtype, &shape, view)?;
    }
    Ok(())
}

/// Checks that a result of `dtype` and `shape` fits the caller's buffer exactly.
///
/// # Errors
/// [`RunError::Output`].
pub fn check_result(name: &str, dtype: DType, shape: &[usize], view: &TensorViewMut<'_>) -> Result<(), RunError> {
    if view.dtype() == dtype && view.shape() == shape {
        return Ok(());
    }
    let actual = format!("{} {}", view.dtype(), Shape::new(view.shape()));
    Err(RunError::Output { name: name.to_string(), dtype, shape: shape.into(), actual })
}

/// The extents that `symbols` give `dims`; `None` where a symbol is free or an extent is negative or too large.
pub fn shape_of(dims: &[Dim], symbols: &Bindings) -> Option<Shape> {
    dims.iter().map(|dim| dim.eval(symbols).and_then(|d| usize::try_from(d).ok())).collect()
}

/// The declared and the given extents of an input that is a tensor, or an optional that holds one. Elements of a sequence have no extents
/// in common, so their symbols are not bound.
fn extents_of<'a>(fact: &'a Fact, input: &'a Input<'_>) -> Option<(&'a [Dim], &'a [usize])> {
    let (mut fact, extents) = match input {
        Input::View(view) => (fact, view.shape()),
        Input::Value(value) => {
            let (mut fact, mut value) = (fact, *value);
            while let (Fact::Optional(of), Value::Optional(Some(element))) = (fact, value) {
                (fact, value) = (of, element);
            }
            (fact, value.as_tensor()?.shape().dims())
        }
    };
    while let Fact::Optional(of) = fact {
        fact = of;
    }
    Some((fact.as_tensor()?.shape.as_deref()?, extents))
}

/// Whether an input is of the kind, element types, ranks and constant extents of `fact`.
fn is_of(fact: &Fact, input: &Input<'_>) -> bool {
    match (fact, input) {
        (Fact::Tensor(fact), Input::View(view)) => tensor_is_of(fact, view.dtype(), view.shape()),
        (fact, Input::Value(value)) => value_is_of(fact, value),
        _ => false,
    }
}

fn value_is_of(fact: &Fact, value: &Value) -> bool {
    match (fact, value) {
        (Fact::Tensor(fact), Value::Tensor(tensor)) => tensor_is_of(fact, tensor.dtype(), tensor.shape()),
        (Fact::Sequence(of), Value::Sequence(values)) => values.iter().all(|value| value_is_of(of, value)),
        (Fact::Optional(of), Value::Optional(value)) => value.as_ref().is_none_or(|value| value_is_of(of, value)),
        (Fact::Map { key, value }, Value::Map { keys, values }) => {
            let keys = if let MapKeys::Ints(_) = keys { DType::I64 } else { DType::String };
            *key == keys && value.as_tensor().is_some_and(|value| value.dtype == values.dtype())
        }
        _ => false,
    }
}

fn tensor_is_of(fact: &TensorFact, dtype: DType, extents: &[usize]) -> bool {
    let is_of = |(dim, &extent): (&Dim, &usize)| dim.as_const().is_none_or(|dim| usize::try_from(dim) == Ok(extent));
    let fits = |dims: &Vec<Dim>| dims.len() == extents.len() && dims.iter().zip(extents).all(is_of);
    fact.dtype == dtype && fact.shape.as_ref().is_none_or(fits)
}

fn first_use(signature: &Signature, symbol: &str, before: usize) -> String {
    let uses = |fact: &Fact| {
        let mut fact = fact;
        while let Fact::Optional(of) = fact {
            fact = of;
        }
        let dims = fact.as_tensor().and_then(|t| t.shape.as_deref()).unwrap_or_default();
        dims.iter().any(|dim| dim.as_symbol().is_some_and(|s| &**s == symbol))
    };
    let found = signature.inputs[..=before].iter().find(|binding| uses(&binding.fact));
    found.map(|binding| binding.name.clone()).unwrap_or_default()
}

pub(crate) fn mismatch(name: &str, expected: &Fact, input: &Input<'_>) -> RunError {
    let actual = match input {
        Input::View(view) => format!("{}{}", view.dtype(), Shape::new(view.shape())),
        Input::Value(value) => describe(value),
    };
    RunError::Input { name: name.to_string(), expected: expected.clone(), actual }
}

/// The type of a value, as facts are written; the first few elements stand for those of a long sequence.
fn describe(value: &Value) -> String {
    const SHOWN: usize = 4;
    match value {
        Value::Tensor(tensor) => format!("{}{}", tensor.dtype(), tensor.shape()),
        Value::Sequence(values) if values.is_empty() => "an empty sequence".to_string(),
        Value::Sequence(values) => {
            let shown: Vec<String> = values.iter().take(SHOWN).map(describe).collect();
            let more = if values.len() > SHOWN { format!(" and {} more", values.len() - SHOWN) } else { String::new() };
            format!("a sequence of {}{more}", shown.join(", "))
        }
        Value::Optional(None) => "an empty optional".to_string(),
        Value::Optional(Some(value)) => format!("an optional of {}", describe(value)),
        Value::Map { keys, values } => {
            let keys = if let MapKeys::Ints(_) = keys { DType::I64 } else { DType::String };
            format!("a map from {keys} to {}", values.dtype())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Binding;
    use cutover_tensor::{Tensor, TensorView};

    fn signature(inputs: &[(&str, Vec<Dim>)]) -> Signature {
        let bind = |(name, dims): &(&str, Vec<Dim>)| Binding {
            name: name.to_string(),
            fact: TensorFact::new(DType::F32, dims.clone()).into(),
        };
        Signature { inputs: inputs.iter().map(bind).collect(), outputs: inputs.iter().map(bind).collect() }
    }

    fn check(inputs: &[(&str, Vec<Dim>)], shapes: &[&[usize]], expected: Result<&[(&str, i64)], &str>) {
        let signature = signature(inputs);
        let tensors: Vec<Tensor> = shapes.iter().map(|&s| Tensor::zeros(DType::F32, s).unwrap()).collect();
        let views: Vec<Input<'_>> = tensors.iter().map(|t| Input::View(t.view())).collect();
        let mut symbols = Bindings::new();
        match (bind_inputs(&signature, &views, &mut symbols), expected) {
            (Ok(()), Ok(expected)) => {
                let bound: Vec<(&str, i64)> = symbols.iter().map(|(s, &v)| (&**s, v)).collect();
                assert_eq!(bound, expected);
            }
            (Err(error), Err(expected)) => assert_eq!(error.to_string(), expected),
            (result, expected) => panic!("{result:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn inputs_bind_symbols_or_say_what_is_wrong() {
        let n = || Dim::symbol("N");
        check(&[("x", vec![n(), 3.into()])], &[&[5, 3]], Ok(&[("N", 5)]));
        check(&[("x", vec![n()]), ("y", vec![n(), 2.into()])], &[&[0], &[0, 2]], Ok(&[("N", 0)]));
        check(&[("x", vec![n() * 2.into()]), ("y", vec![n()])], &[&[6], &[3]], Ok(&[("N", 3)]));
        check(&[("x", vec![n()])], &[], Err("1 inputs expected, 0 given"));
        check(&[("x", vec![n(), 3.into()])], &[&[5, 4]], Err("input 'x': expected f32[N, 3], got f32[5, 4]"));
        check(&[("x", vec![n(), 3.into()])], &[&[3]], Err("input 'x': expected f32[N, 3], got f32[3]"));
        check(
            &[("x", vec![n() * 2.into()]), ("y", vec![n()])],
            &[&[5], &[3]],
            Err("input 'x': expected f32[2*N], got f32[5]"),
        );
        check(
            &[("x", vec![n()]), ("y", vec![1.into(), n()])],
            &[&[2], &[1, 4]],
            Err("input 'y' (axis 1) makes dimension 'N' 4, but it was 2 in input 'x'"),
        );
    }

    #[test]
    fn an_input_of_another_type_is_refused() {
        let signature = signature(&[("x", vec![2.into()])]);
        let mut symbols = Bindings::new();
        let view = TensorView::new(&[2], &[1i64, 2]).unwrap();
        let error = bind_inputs(&signature, &[Input::View(view)], &mut symbols).unwrap_err();
        assert_eq!(error.to_string(), "input 'x': expected f32[2], got i64[2]");
        let sequence = Value::Sequence(vec![]);
        let error = bind_inputs(&signature, &[Input::Value(&sequence)], &mut symbols).unwrap_err();
        assert_eq!(error.to_string(), "input 'x': expected f32[2], got an empty sequence");
    }

    #[test]
    fn containers_are_checked_down_to_their_tensors() {
        let of = |dims: Vec<Dim>| Fact::Tensor(TensorFact::new(DType::F32, dims));
        let tensor = |shape: &[usize]| Value::Tensor(Tensor::zeros(DType::F32, shape).unwrap());
        let some = |value: Value| Value::Optional(Some(Box::new(value)));
        let n = || Dim::symbol("N");
        let check = |fact: &Fact, value: &Value, expected: Result<Option<i64>, &str>| {
            let bind = |name: &str| Binding { name: name.to_string(), fact: fact.clone() };
            let signature = Signature { inputs: vec![bind("x")], outputs: vec![] };
            let mut symbols = Bindings::new();
            let result = bind_inputs(&signature, &[Input::Value(value)], &mut symbols);
            let result = result.map(|()| symbols.get("N").copied()).map_err(|e| e.to_string());
            assert_eq!(result.as_ref().copied().map_err(String::as_str), expected);
        };
        let sequence = Fact::Sequence(Box::new(of(vec![n(), 3.into()])));
        check(&sequence, &Value::Sequence(vec![]), Ok(None));
        check(&sequence, &Value::Sequence(vec![tensor(&[1, 3]), tensor(&[2, 3])]), Ok(None));
        let wrong = Value::Sequence(vec![tensor(&[1, 3]), tensor(&[2, 4])]);
        let message = "input 'x': expected sequence(f32[N, 3]), got a sequence of f32[1, 3], f32[2, 4]";
        check(&sequence, &wrong, Err(message));
        check(&sequence, &tensor(&[1, 3]), Err("input 'x': expected sequence(f32[N, 3]), got f32[1, 3]"));
        let optional = Fact::Optional(Box::new(of(vec![n()])));
        check(&optional, &Value::Optional(None), Ok(None));
        check(&optional, &some(tensor(&[5])), Ok(Some(5)));
        let message = "input 'x': expected optional(f32[N]), got an optional of f32[5, 1]";
        check(&optional, &some(tensor(&[5, 1])), Err(message));
        let nested = Fact::Optional(Box::new(sequence));
        check(&nested, &some(Value::Sequence(vec![tensor(&[7, 3])])), Ok(None));
        check(
            &nested,
            &some(wrong),
            Err(
                "input 'x': expected optional(sequence(f32[N, 3])), got an optional of a sequence of f32[1, 3], f32[2, 4]",
            ),
        );
    }

    #[test]
    fn output_buffers_have_the_results_type_and_shape() {
        let signature = signature(&[("y", vec![Dim::symbol("N"), 2.into()])]);
        let symbols = Bindings::from([("N".into(), 3)]);
        let check = |shape: &[usize], expected: Option<&str>| {
            let mut values = vec![0f32; shape.iter().product()];
            let view = TensorViewMut::new(shape, &mut values).unwrap();
            let result = check_outputs(&signature, &[Output::Write(view)], &symbols);
            assert_eq!(result.err().map(|e| e.to_string()).as_deref(), expected);
        };
        check(&[3, 2], None);
        check(&[6], Some("output 'y': the result is f32 [3, 2], the buffer is f32 [6]"));
        let error = check_outputs(&signature, &[], &symbols).unwrap_err();
        assert_eq!(error.to_string(), "1 output places expected, 0 given");
    }
}
