//! What the examples share: a model's inputs made up, a run, and how far two answers are apart.

use cutover_backend::{Input, Output, RunContext, Session, binding::shape_of};
use cutover_graph::{Bindings, Plan};
use cutover_tensor::{DType, Tensor, Value};
use std::{collections::BTreeSet, error::Error};

/// Random floats and integers of 0; `extent` says what a symbol is, by its name and the axis of the input that has it.
pub fn random_inputs(
    plan: &Plan,
    extent: impl Fn(&str, usize) -> Result<i64, Box<dyn Error>>,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let graph = plan.graph();
    let mut state = 1u64;
    let mut unit = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut inputs = Vec::new();
    for &id in graph.inputs() {
        let fact = graph.value(id).fact.as_tensor().ok_or("an input that is no tensor")?;
        let dims = fact.shape.as_ref().ok_or("an input of unknown rank")?;
        let mut extents = Bindings::new();
        for (axis, dim) in dims.iter().enumerate() {
            let mut symbols = BTreeSet::new();
            dim.collect_symbols(&mut symbols);
            for symbol in symbols {
                let extent = extent(symbol.as_ref(), axis)?;
                extents.insert(symbol, extent);
            }
        }
        let shape = shape_of(dims, &extents).ok_or("an input of unknown shape")?;
        let count: usize = shape.iter().product();
        inputs.push(Value::Tensor(match fact.dtype {
            DType::F32 => Tensor::from_vec(shape, (0..count).map(|_| unit()).collect::<Vec<f32>>())?,
            dtype => Tensor::from_bytes(dtype, shape, &vec![0; count * dtype.bits() / 8])?,
        }));
    }
    Ok(inputs)
}

/// The values that a run gives.
pub fn run(
    session: &mut dyn Session,
    inputs: &[Value],
    outputs: usize,
    context: &RunContext<'_>,
) -> Result<Vec<Value>, Box<dyn Error>> {
    let given: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let mut outputs: Vec<Output<'_>> = (0..outputs).map(|_| Output::Allocate(None)).collect();
    session.run(&given, &mut outputs, context)?;
    let value = |output| match output {
        Output::Allocate(Some(value)) => Ok(value),
        _ => Err("an output is missing".into()),
    };
    outputs.into_iter().map(value).collect()
}

/// The largest difference, over the largest element.
pub fn difference(a: &Value, b: &Value) -> Result<f32, Box<dyn Error>> {
    let (Value::Tensor(a), Value::Tensor(b)) = (a, b) else { return Err("an output is no tensor".into()) };
    if a.dtype() != DType::F32 {
        return Ok(if a.bytes() == b.bytes() { 0.0 } else { f32::INFINITY });
    }
    let (a, b) = (a.to_vec::<f32>()?, b.to_vec::<f32>()?);
    let scale = b.iter().fold(f32::MIN_POSITIVE, |most, v| most.max(v.abs()));
    let apart = |(a, b): (&f32, &f32)| {
        if (a - b).is_nan() && a.to_bits() != b.to_bits() { f32::INFINITY } else { (a - b).abs() }
    };
    Ok(a.iter().zip(&b).map(apart).fold(0.0, f32::max) / scale)
}
