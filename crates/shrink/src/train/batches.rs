//! Which samples make a step, in an order that the seed and the number of the epoch alone give.

use crate::{Sample, ShrinkError};
use cutover_graph::{Dim, Graph};
use cutover_tensor::{Tensor, Value};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use std::collections::HashMap;

/// Whether samples may be put behind one another along their first axis: all inputs and outputs have one of symbolic extent.
pub(super) fn stackable(graph: &Graph) -> bool {
    let mut values = graph.inputs().iter().chain(graph.outputs());
    values.all(|&value| {
        let shape = graph.value(value).fact.as_tensor().and_then(|fact| fact.shape.as_ref());
        shape.and_then(|shape| shape.first()).is_some_and(|dim| !matches!(dim, Dim::Const(_)))
    })
}

/// What samples must have in common to be stacked.
fn shapes(sample: &Sample) -> Vec<Vec<usize>> {
    let shape = |value: &Value| value.as_tensor().map(|t| t.shape().dims().get(1..).unwrap_or_default().to_vec());
    sample.iter().map(|(_, value)| shape(value).unwrap_or_default()).collect()
}

/// All samples in batches of one shape each; `epoch` shuffles them, `None` leaves them in order.
pub(super) fn batches(
    samples: &[Sample],
    size: usize,
    stack: bool,
    seed: u64,
    epoch: Option<usize>,
) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..samples.len()).collect();
    let mut random = ChaCha8Rng::seed_from_u64(
        seed.wrapping_add(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(epoch.unwrap_or(0) as u64 + 1)),
    );
    if epoch.is_some() {
        shuffle(&mut order, &mut random);
    }
    let mut batches = Vec::new();
    let mut filling: HashMap<Vec<Vec<usize>>, Vec<usize>> = HashMap::new();
    let mut begun = Vec::new();
    for sample in order {
        let key = if stack { shapes(&samples[sample]) } else { Vec::new() };
        let batch = filling.entry(key.clone()).or_insert_with(|| {
            begun.push(key.clone());
            Vec::new()
        });
        batch.push(sample);
        if batch.len() >= size.max(1) {
            batches.push(std::mem::take(batch));
        }
    }
    batches.extend(begun.iter().filter_map(|key| filling.remove(key)).filter(|batch| !batch.is_empty()));
    if epoch.is_some() {
        // What did not fill a batch is not always last.
        shuffle(&mut batches, &mut random);
    }
    batches
}

/// Samples behind one another along the first axis.
pub(super) fn stacked(samples: &[&Sample]) -> Result<Sample, ShrinkError> {
    let Some(first) = samples.first() else { return Err(ShrinkError::NoSamples) };
    let named = |name: &str| {
        let parts: Option<Vec<&Tensor>> =
            samples.iter().map(|s| s.iter().find(|(n, _)| n == name).and_then(|(_, v)| v.as_tensor())).collect();
        let parts = parts.ok_or_else(|| ShrinkError::Option(format!("samples have no tensor '{name}' in common")))?;
        Ok((name.to_string(), concatenated(&parts).map_err(|e| ShrinkError::Option(format!("'{name}': {e}")))?.into()))
    };
    first.iter().map(|(name, _)| named(name)).collect()
}

/// Tensors of one type behind one another along the first axis.
pub(super) fn concatenated(parts: &[&Tensor]) -> Result<Tensor, cutover_tensor::TensorError> {
    if let [one] = parts {
        return Ok((*one).clone());
    }
    let mut shape = parts[0].shape().dims().to_vec();
    if let Some(extent) = shape.first_mut() {
        *extent = parts.iter().map(|part| part.shape().dims()[0]).sum();
    }
    let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes().iter().copied()).collect();
    Tensor::from_bytes(parts[0].dtype(), shape, &bytes)
}

/// Fisher and Yates, from the end.
pub(super) fn shuffle<T>(items: &mut [T], random: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(random, i + 1));
    }
}

/// Uniform in `0..bound`, by multiply and shift (Lemire 2019, without the rejection: the bias is below 2⁻⁴⁰ here).
pub(super) fn below(random: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

/// Uniform in `[0, 1)`, of 53 bits.
pub(super) fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_in_one_batch_of_its_shape() {
        let sample = |i: usize| -> Sample {
            let width = 1 + i % 3;
            vec![("x".to_string(), Tensor::from_vec([1, width], vec![i as f32; width]).unwrap().into())]
        };
        let samples: Vec<Sample> = (0..23).map(sample).collect();
        let epoch = |epoch| batches(&samples, 4, true, 7, Some(epoch));
        assert_eq!(epoch(0), epoch(0));
        assert_ne!(epoch(0), epoch(1));
        for batch in epoch(0) {
            assert!(batch.len() <= 4 && batch.iter().all(|i| i % 3 == batch[0] % 3), "{batch:?}");
            let stacked = stacked(&batch.iter().map(|&i| &samples[i]).collect::<Vec<_>>()).unwrap();
            let tensor = stacked[0].1.as_tensor().unwrap();
            assert_eq!(tensor.shape().dims(), [batch.len(), 1 + batch[0] % 3]);
            assert_eq!(tensor.to_vec::<f32>().unwrap()[0], batch[0] as f32);
        }
        let mut all: Vec<usize> = epoch(3).concat();
        all.sort();
        assert_eq!(all, (0..23).collect::<Vec<_>>());
    }
}
