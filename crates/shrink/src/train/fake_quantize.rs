//! Rounding in training as static quantization will round: a lens on what nodes read, placed where [`crate::quantize`] puts its pairs.
//!
//! Gradients pass as if nothing were rounded (the straight-through estimator, Bengio et al. 2013), but not where a value is cut off (Jacob et al. 2018).
//! Biases stay as they are: their integers are of 32 bits.

use super::{
    FakeQuantize,
    differentiable::{Fault, Function, Lens, View, apply, map, map2, read},
};
use crate::{
    ShrinkError,
    quantize::{ActivationType, Affine, Channels, Placement, Range},
};
use candle_core::Tensor;
use cutover_graph::{Graph, NodeId, ValueId};
use std::collections::HashMap;

/// Of the range's running mean while it is learned (Jacob et al. 2018).
const MOMENTUM: f32 = 0.95;

pub(super) struct Rounding {
    options: FakeQuantize,
    /// What nodes read as integers, and the value whose range it has.
    activations: HashMap<(NodeId, ValueId), ValueId>,
    /// Weights of products, and the axis of their channels.
    weights: HashMap<(NodeId, ValueId), usize>,
    /// What activations reached, but for values that only moved: those keep the range of what they come from.
    pub ranges: HashMap<ValueId, Range>,
    /// Whether ranges follow what is seen.
    pub learning: bool,
    /// Of this run.
    rounded: HashMap<(ValueId, usize), Tensor>,
}

impl Rounding {
    pub fn new(graph: &Graph, options: &FakeQuantize) -> Result<Rounding, ShrinkError> {
        let bits = [Some(options.weight_bits), options.activation_bits];
        if let Some(bits) = bits.into_iter().flatten().find(|bits| !(2..=8).contains(bits)) {
            return Err(ShrinkError::Option(format!("training for integers of {bits} bits, expected 2 to 8")));
        }
        let placement = Placement::of(graph, &options.exclude.iter().cloned().collect())?;
        let origins = placement.origins(graph);
        let mut rounding = Rounding {
            options: options.clone(),
            activations: HashMap::new(),
            weights: HashMap::new(),
            ranges: HashMap::new(),
            learning: true,
            rounded: HashMap::new(),
        };
        for (value, nodes) in placement.takers(graph) {
            let origin = origins.get(&value).copied().unwrap_or(value);
            rounding.activations.extend(nodes.into_iter().map(|node| ((node, value), origin)));
        }
        if options.activation_bits.is_none() {
            rounding.activations.clear();
        }
        for product in placement.products(graph) {
            rounding.weights.insert((product.node, product.weight), product.channel_axis);
        }
        Ok(rounding)
    }

    /// Before every run: what was rounded in the last one is forgotten.
    pub fn begin(&mut self, learning: bool) {
        self.learning = learning;
        self.rounded.clear();
    }

    fn observe(&mut self, value: ValueId, tensor: &Tensor) -> candle_core::Result<Range> {
        let known = self.ranges.get(&value).copied();
        if let (Some(range), false) = (known, self.learning) {
            return Ok(range);
        }
        let seen = read(&tensor.contiguous()?, |view| {
            let ends = |(low, high): (f32, f32), &x: &f32| (low.min(x), high.max(x));
            view.data.iter().fold((f32::INFINITY, f32::NEG_INFINITY), ends)
        })?;
        let mix = |old: f32, new: f32| MOMENTUM * old + (1.0 - MOMENTUM) * new;
        let range = match known {
            Some(old) => Range { low: mix(old.low, seen.0), high: mix(old.high, seen.1) },
            None => Range { low: seen.0, high: seen.1 },
        };
        self.ranges.insert(value, range);
        Ok(range)
    }
}

impl Lens for Rounding {
    fn wants(&self, node: NodeId, value: ValueId) -> bool {
        self.activations.contains_key(&(node, value)) || self.weights.contains_key(&(node, value))
    }

    fn look(&mut self, node: NodeId, value: ValueId, tensor: &Tensor) -> Result<Tensor, Fault> {
        let (key, axis, origin) = match (self.weights.get(&(node, value)), self.activations.get(&(node, value))) {
            (Some(&axis), _) => ((value, axis), Some(axis), value),
            (_, Some(&origin)) => ((value, usize::MAX), None, origin),
            _ => return Ok(tensor.clone()),
        };
        if let Some(rounded) = self.rounded.get(&key) {
            return Ok(rounded.clone());
        }
        let rounded = match axis {
            Some(axis) => {
                let channels = match self.options.per_channel {
                    true => Channels::along(tensor.dims(), axis),
                    false => Channels::ONE,
                };
                apply(RoundWeights { channels, steps: ((1 << (self.options.weight_bits - 1)) - 1) as f32 }, &[tensor])?
            }
            None => {
                // Of a value that only moved, the range is that of what it came from, which was seen first.
                let range = match self.ranges.get(&origin) {
                    Some(&range) if origin != value => range,
                    _ => self.observe(origin, tensor)?,
                };
                let bits = self.options.activation_bits.unwrap_or(8);
                apply(RoundActivations(Grid::covering(range, bits, self.options.symmetric)), &[tensor])?
            }
        };
        self.rounded.insert(key, rounded.clone());
        Ok(rounded)
    }
}

/// Numbers that integers of a few bits stand for: `(q − zero) · scale`, `q` from `least` to `greatest`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Grid {
    scale: f32,
    zero: f32,
    least: f32,
    greatest: f32,
}

impl Grid {
    /// As [`Affine::covering`], which it is at 8 bits.
    fn covering(range: Range, bits: u32, symmetric: bool) -> Grid {
        let of = if symmetric { ActivationType::SymmetricI8 } else { ActivationType::U8 };
        let steps = ((1u32 << bits) - 1) as f32;
        if bits == 8 {
            let affine = Affine::covering(range, of);
            let (least, greatest) = of.bounds();
            let zero = affine.zero_point as f32;
            return Grid { scale: affine.scale, zero, least: least as f32, greatest: greatest as f32 };
        }
        let (low, high) = (range.low.min(0.0), range.high.max(0.0));
        let half = ((1u32 << (bits - 1)) - 1) as f32;
        match symmetric {
            _ if low == high => Grid { scale: 1.0, zero: 0.0, least: 0.0, greatest: steps },
            true => Grid { scale: high.max(-low) / half, zero: 0.0, least: -half, greatest: half },
            false => {
                let scale = (high / steps - low / steps).max(f32::MIN_POSITIVE);
                Grid { scale, zero: (-low / scale).round_ties_even().clamp(0.0, steps), least: 0.0, greatest: steps }
            }
        }
    }

    fn step(&self, x: f32) -> f32 {
        (x / self.scale).round_ties_even() + self.zero
    }
}

struct RoundActivations(Grid);

impl Function for RoundActivations {
    const NAME: &'static str = "rounding of activations";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let grid = self.0;
        let round = |x: f32| (grid.step(x).clamp(grid.least, grid.greatest) - grid.zero) * grid.scale;
        (map(args[0].data, round), args[0].shape.to_vec())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let grid = self.0;
        let inside = |x: f32| (grid.least..=grid.greatest).contains(&grid.step(x));
        vec![Some(map2(args[0].data, dy.data, |x, dy| if inside(x) { dy } else { 0.0 }))]
    }
}

/// Weights to `±steps` steps, the largest of a channel the last one.
struct RoundWeights {
    channels: Channels,
    steps: f32,
}

impl Function for RoundWeights {
    const NAME: &'static str = "rounding of weights";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let weights = args[0].data;
        let mut largest = vec![0f32; self.channels.count];
        let channel = |i: usize| self.channels.of(i);
        weights.iter().enumerate().for_each(|(i, w)| largest[channel(i)] = largest[channel(i)].max(w.abs()));
        let scale = |m: f32| if m > 0.0 { (m / self.steps).max(f32::MIN_POSITIVE) } else { 1.0 };
        let scales: Vec<f32> = largest.into_iter().map(scale).collect();
        let round = |(i, w): (usize, &f32)| {
            let scale = scales[channel(i)];
            (w / scale).round_ties_even().clamp(-self.steps, self.steps) * scale
        };
        (weights.iter().enumerate().map(round).collect(), args[0].shape.to_vec())
    }

    fn backward(&self, _: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        vec![Some(dy.data.to_vec())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{QuantizedWeight, WeightRange};
    use candle_core::{Device, Var};

    #[test]
    fn weights_are_rounded_as_quantization_rounds_them() {
        let weights: Vec<f32> = (0..24).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 / 4.0)).collect();
        for channels in [Channels::ONE, Channels::along(&[4, 3, 2], 0), Channels::along(&[4, 3, 2], 1)] {
            let expected = QuantizedWeight::new(&weights, channels, WeightRange::Largest).rounded(channels);
            let view = View { data: &weights, shape: &[4, 3, 2] };
            assert_eq!(RoundWeights { channels, steps: 127.0 }.forward(&[view]).0, expected);
        }
    }

    #[test]
    fn gradients_pass_within_the_range_alone() {
        let grid = Grid::covering(Range { low: -1.0, high: 3.0 }, 4, false);
        let x = Var::from_vec(vec![-2.0f32, -0.9, 0.13, 2.9, 3.5], 5, &Device::Cpu).unwrap();
        let y = apply(RoundActivations(grid), &[x.as_tensor()]).unwrap();
        let gradients = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>().unwrap(), [0.0, 1.0, 1.0, 1.0, 0.0]);
        let y = y.to_vec1::<f32>().unwrap();
        assert!(y.iter().all(|y| (y / grid.scale).fract().abs() < 1e-3) && y[4] <= 3.1, "{y:?}");
    }
}
