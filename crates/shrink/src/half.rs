//! Weights in 16 bits.
//!
//! Each large f32 constant is stored as f16 or bf16 with a `Cast` back to f32 after it: half the bytes to send and keep, the same arithmetic. An
//! engine that folds constants pays nothing for it at run time. Nothing is computed in 16 bits here.

use crate::{ShrinkError, constant_bytes};
use cutover_graph::{Constant, Graph, ValueId, ops::Cast};
use cutover_tensor::{DType, Shape, Tensor, TensorError, bf16, f16};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Floats of 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HalfFormat {
    /// 11 bits of significand, up to 65504.
    #[default]
    F16,
    /// 8 bits of significand, the range of f32.
    Bf16,
}

impl HalfFormat {
    fn largest(self) -> f32 {
        match self {
            HalfFormat::F16 => f16::MAX.to_f32(),
            HalfFormat::Bf16 => bf16::MAX.to_f32(),
        }
    }

    /// `value` as this format holds it: the nearest, infinite where there is none.
    fn round(self, value: f32) -> f32 {
        match self {
            HalfFormat::F16 => f16::from_f32(value).to_f32(),
            HalfFormat::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    fn tensor(self, shape: Shape, values: &[f32]) -> Result<Tensor, TensorError> {
        match self {
            HalfFormat::F16 => Tensor::from_vec(shape, values.iter().map(|&v| f16::from_f32(v)).collect()),
            HalfFormat::Bf16 => Tensor::from_vec(shape, values.iter().map(|&v| bf16::from_f32(v)).collect()),
        }
    }
}

impl fmt::Display for HalfFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HalfFormat::F16 => "f16",
            HalfFormat::Bf16 => "bf16",
        })
    }
}

/// What to convert.
#[derive(Clone, Copy, Debug)]
pub struct HalfOptions {
    pub format: HalfFormat,
    /// Constants of fewer elements stay: they weigh nothing, and are often what precision hangs on (scales, biases, bounds).
    pub elements_min: usize,
}

impl Default for HalfOptions {
    fn default() -> Self {
        HalfOptions { format: HalfFormat::F16, elements_min: 1024 }
    }
}

/// What [`half_weights`] did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HalfReport {
    /// Of all constants.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Names of the constants that have 16 bits now.
    pub converted: Vec<String>,
    /// Constants that are large enough, but stay as they are.
    pub kept: Vec<Kept>,
    /// Largest error of any element of a converted constant, over the largest element of that constant.
    pub largest_error: f64,
}

/// A constant that stays f32.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub name: String,
    pub reason: String,
}

/// `graph` with its large f32 constants stored in 16 bits. The names and types of its inputs and outputs stay.
///
/// A constant with an element that the format cannot hold (above 65504 for f16) stays, and is named in the report.
pub fn half_weights(mut graph: Graph, options: &HalfOptions) -> Result<(Graph, HalfReport), ShrinkError> {
    let format = options.format;
    let mut report = HalfReport { bytes_before: constant_bytes(&graph), ..HalfReport::default() };
    let uses = graph.uses();
    let is_weight = |&(id, constant): &(ValueId, &Constant)| {
        constant.tensor.dtype() == DType::F32
            && constant.tensor.element_count() >= options.elements_min
            && !uses[id.index()].is_empty()
    };
    let constants = graph.values().filter_map(|(id, _)| Some((id, graph.constant(id)?))).filter(is_weight);
    let weights: Vec<(ValueId, Tensor)> = constants.map(|(id, constant)| (id, constant.tensor.clone())).collect();
    for (id, tensor) in weights {
        let name = graph.value(id).name.clone();
        let at = |source| ShrinkError::Tensor { name: name.clone(), source };
        if graph.outputs().contains(&id) {
            report.kept.push(Kept { name, reason: "it is an output of the model".to_string() });
            continue;
        }
        let values = tensor.to_vec::<f32>().map_err(at)?;
        if let Some(value) = values.iter().find(|v| v.is_finite() && format.round(**v).is_infinite()) {
            let reason = format!("{format} ends at {}, it holds {value}", format.largest());
            report.kept.push(Kept { name, reason });
            continue;
        }
        let finite = || values.iter().filter(|v| v.is_finite());
        let largest = finite().fold(0f32, |m, v| m.max(v.abs()));
        let error = finite().fold(0f32, |m, &v| m.max((v - format.round(v)).abs()));
        if largest > 0.0 {
            report.largest_error = report.largest_error.max(f64::from(error) / f64::from(largest));
        }
        let halved = format.tensor(tensor.shape().clone(), &values).map_err(at)?;
        // The stored tensor keeps the name: that is what a package digests, and what the next version shares.
        let widened = graph.unique_value_name(&format!("{name}.f32"));
        graph.value_mut(id).name = graph.unique_value_name(&format!("{name}.replaced"));
        let half = graph.add_constant(name.clone(), Constant::new(halved));
        let node_name = graph.unique_node_name(&format!("{name}.to_f32"));
        let node = graph.add_node(node_name, Cast::to(DType::F32).into(), vec![Some(half)], vec![widened])?;
        let widened = graph.node(node).outputs[0];
        graph.replace_uses(id, widened);
        graph.remove_constant(id);
        report.converted.push(name);
    }
    graph.verify()?;
    report.bytes_after = constant_bytes(&graph);
    Ok((graph, report))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ShrinkError, compare};
    use cutover_backend::reference;
    use cutover_graph::{
        Dim, TensorFact,
        ops::{Binary, BinaryFunction, MatMul},
        passes::{PassOptions, declutter},
    };
    use cutover_tensor::Value;

    /// `y = x · w + b` with `x [N, 64]`, `w [64, 32]`, `b [32]`; the first element of `w` is `first`.
    fn model(first: f32) -> Graph {
        let mut graph = Graph::new("model");
        let x = graph.add_input("x", TensorFact::new(DType::F32, vec![Dim::symbol("N"), 64.into()]));
        let mut weights: Vec<f32> = (0..64 * 32).map(|i| ((i * 37 % 101) as f32 - 50.0) / 77.0).collect();
        weights[0] = first;
        let w = graph.add_constant("w", Constant::new(Tensor::from_vec([64, 32], weights).unwrap()));
        let b = graph.add_constant("b", Constant::new(Tensor::from_vec([32], vec![0.123f32; 32]).unwrap()));
        let product = MatMul { activation: None }.into();
        let node = graph.add_node("product", product, vec![Some(x), Some(w)], vec!["xw".into()]).unwrap();
        let product = graph.node(node).outputs[0];
        let sum = Binary { function: BinaryFunction::Add }.into();
        let node = graph.add_node("sum", sum, vec![Some(product), Some(b)], vec!["y".into()]).unwrap();
        graph.set_outputs(vec![graph.node(node).outputs[0]]);
        graph
    }

    fn samples() -> Vec<Vec<(String, Value)>> {
        let input = |seed: usize| {
            let elements: Vec<f32> = (0..3 * 64).map(|i| ((i * 53 + seed * 17) % 97) as f32 / 97.0 - 0.5).collect();
            vec![("x".to_string(), Tensor::from_vec([3, 64], elements).unwrap().into())]
        };
        (0..4).map(input).collect()
    }

    #[test]
    fn large_constants_become_halves_and_answers_stay_near() {
        let before = model(0.5);
        let (after, report) = half_weights(before.clone(), &HalfOptions::default()).unwrap();
        assert_eq!((report.converted.as_slice(), report.kept.as_slice()), (&["w".to_string()][..], &[][..]));
        assert_eq!((report.bytes_before, report.bytes_after), ((64 * 32 + 32) * 4, 64 * 32 * 2 + 32 * 4));
        // Half an ulp of 11 bits of significand.
        assert!(report.largest_error > 0.0 && report.largest_error <= 1.0 / 2048.0, "{}", report.largest_error);
        let options = HalfOptions { format: HalfFormat::Bf16, ..HalfOptions::default() };
        let (coarse, coarser) = half_weights(before.clone(), &options).unwrap();
        assert_eq!((coarser.bytes_after, coarser.converted.len()), (report.bytes_after, 1));
        assert!(coarser.largest_error > report.largest_error && coarser.largest_error <= 1.0 / 256.0);
        let noise = compare(&before, &coarse, &reference(), &samples()).unwrap().outputs[0].sqnr_db;
        assert!(noise > 40.0 && noise < 70.0, "{noise}");
        let comparison = compare(&before, &after, &reference(), &samples()).unwrap();
        let y = &comparison.outputs[0];
        assert_eq!((y.name.as_str(), comparison.samples), ("y", 4));
        assert!(y.sqnr_db > 60.0 && y.sqnr_db.is_finite(), "{}", y.sqnr_db);
        assert!(y.absolute_error_max > 0.0 && y.absolute_error_max < 1e-3);
        assert_eq!(y.top1_agreement, Some(1.0));
        // A decluttered model has no Cast left, and runs as before.
        let (folded, _) = declutter(after.clone(), &PassOptions::default()).unwrap();
        assert_eq!(folded.nodes().map(|(_, n)| n.op.name()).collect::<Vec<_>>(), ["MatMul"]);
        assert!(compare(&after, &folded, &reference(), &samples()).unwrap().outputs[0].absolute_error_max < 1e-6);
    }

    #[test]
    fn what_16_bits_cannot_hold_is_kept_and_named() {
        let (after, report) = half_weights(model(70_000.0), &HalfOptions::default()).unwrap();
        let reason = "f16 ends at 65504, it holds 70000".to_string();
        assert_eq!(report.kept, [Kept { name: "w".to_string(), reason }]);
        assert_eq!((report.converted.len(), report.bytes_after), (0, report.bytes_before));
        assert_eq!(after.node_count(), 2);
        let options = HalfOptions { format: HalfFormat::Bf16, ..HalfOptions::default() };
        assert_eq!(half_weights(model(70_000.0), &options).unwrap().1.kept, []);
        assert_eq!(half_weights(model(f32::MAX), &options).unwrap().1.kept.len(), 1);
    }

    #[test]
    fn equal_graphs_agree_to_the_bit_and_different_models_are_refused() {
        let graph = model(0.5);
        let comparison = compare(&graph, &graph, &reference(), &samples()).unwrap();
        assert_eq!((comparison.outputs[0].absolute_error_max, comparison.outputs[0].sqnr_db), (0.0, f64::INFINITY));
        let mut other = graph.clone();
        let output = other.outputs()[0];
        other.value_mut(output).name = "z".to_string();
        assert!(matches!(compare(&graph, &other, &reference(), &samples()), Err(ShrinkError::Signature(_))));
        let unnamed = vec![vec![("u".to_string(), Value::from(Tensor::scalar(1f32)))]];
        let error = compare(&graph, &graph, &reference(), &unnamed).unwrap_err();
        assert_eq!(error.to_string(), "sample 0: has no input 'x'");
    }
}
