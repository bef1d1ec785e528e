//! Real numbers as integers: `real = (q − zero_point) · scale`.

use super::range::Range;
use cutover_tensor::{DType, Tensor, TensorError};

/// The integers that stand for activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationType {
    /// `[0, 255]`, the zero point wherever the range puts it.
    U8,
    /// `[−128, 127]`, the zero point wherever the range puts it.
    I8,
    /// `[−127, 127]`, the zero point 0.
    SymmetricI8,
}

impl ActivationType {
    /// Least and greatest integer.
    pub fn bounds(self) -> (i32, i32) {
        match self {
            ActivationType::U8 => (0, 255),
            ActivationType::I8 => (-128, 127),
            ActivationType::SymmetricI8 => (-127, 127),
        }
    }
}

/// Scale and zero point of one tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    pub scale: f32,
    pub zero_point: i32,
    pub of: ActivationType,
}

impl Affine {
    /// What covers `range`, which is widened to hold 0: padding and ReLU need it exact. Where the range is 0 alone the scale is 1.
    pub fn covering(range: Range, of: ActivationType) -> Affine {
        let (least, greatest) = of.bounds();
        let (low, high) = (range.low.min(0.0), range.high.max(0.0));
        if low == high {
            return Affine { scale: 1.0, zero_point: if of == ActivationType::I8 { -128 } else { 0 }, of };
        }
        if of == ActivationType::SymmetricI8 {
            let scale = (high.max(-low) / 127.0).max(f32::MIN_POSITIVE);
            return Affine { scale, zero_point: 0, of };
        }
        // Divided first: the width of a range of large floats may be infinite.
        let steps = (greatest - least) as f32;
        let scale = (high / steps - low / steps).max(f32::MIN_POSITIVE);
        let zero_point = (least as f32 - low / scale).round_ties_even() as i32;
        Affine { scale, zero_point: zero_point.clamp(least, greatest), of }
    }

    /// What `value` becomes and is taken for again.
    pub fn round(&self, value: f32) -> f32 {
        let (least, greatest) = self.of.bounds();
        let q = (value / self.scale).round_ties_even() as i64 + i64::from(self.zero_point);
        (q.clamp(least.into(), greatest.into()) - i64::from(self.zero_point)) as f32 * self.scale
    }

    pub fn scale_tensor(&self) -> Result<Tensor, TensorError> {
        Tensor::from_vec(Vec::<usize>::new(), vec![self.scale])
    }

    pub fn zero_point_tensor(&self) -> Result<Tensor, TensorError> {
        match self.of {
            ActivationType::U8 => Tensor::from_vec(Vec::<usize>::new(), vec![self.zero_point as u8]),
            _ => Tensor::from_vec(Vec::<usize>::new(), vec![self.zero_point as i8]),
        }
    }

    pub fn dtype(&self) -> DType {
        if self.of == ActivationType::U8 { DType::U8 } else { DType::I8 }
    }
}

/// How a weight's scale is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightRange {
    /// The largest magnitude is the last step.
    #[default]
    Largest,
    /// The clipped range with the least squared error.
    LeastError,
}

/// A weight in signed bytes, symmetric, `[−127, 127]`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    /// In the order of the weight.
    pub values: Vec<i8>,
    /// One for each channel, or one for all.
    pub scales: Vec<f32>,
}

/// Which elements are of one channel: element `i` is of channel `i / inner % channels`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channels {
    pub count: usize,
    pub inner: usize,
}

impl Channels {
    pub const ONE: Channels = Channels { count: 1, inner: 1 };

    /// Those along `axis` of `shape`.
    pub fn along(shape: &[usize], axis: usize) -> Channels {
        Channels { count: shape[axis], inner: shape[axis + 1..].iter().product() }
    }

    pub fn of(self, element: usize) -> usize {
        element / self.inner.max(1) % self.count.max(1)
    }
}

impl QuantizedWeight {
    pub fn new(weights: &[f32], channels: Channels, range: WeightRange) -> QuantizedWeight {
        let mut largest = vec![0f32; channels.count];
        for (i, w) in weights.iter().enumerate() {
            let channel = channels.of(i);
            largest[channel] = largest[channel].max(w.abs());
        }
        let mut scales: Vec<f32> = largest.iter().map(|&m| scale_of(m)).collect();
        if range == WeightRange::LeastError {
            scales = least_error(weights, channels, &largest);
        }
        let values = weights.iter().enumerate().map(|(i, &w)| step(w, scales[channels.of(i)]) as i8).collect();
        QuantizedWeight { values, scales }
    }

    /// What the weight is taken for.
    pub fn rounded(&self, channels: Channels) -> Vec<f32> {
        self.values.iter().enumerate().map(|(i, &q)| f32::from(q) * self.scales[channels.of(i)]).collect()
    }
}

/// A channel of zeros has scale 1.
fn scale_of(largest: f32) -> f32 {
    if largest > 0.0 { (largest / 127.0).max(f32::MIN_POSITIVE) } else { 1.0 }
}

fn step(w: f32, scale: f32) -> f32 {
    (w / scale).round_ties_even().clamp(-127.0, 127.0)
}

/// The best of some twenty clipped ranges, channel by channel.
fn least_error(weights: &[f32], channels: Channels, largest: &[f32]) -> Vec<f32> {
    let mut best: Vec<(f64, f32)> = largest.iter().map(|&m| (f64::INFINITY, scale_of(m))).collect();
    for part in (60..=100).step_by(2) {
        let scales: Vec<f32> = largest.iter().map(|&m| scale_of(m * part as f32 / 100.0)).collect();
        let mut errors = vec![0f64; channels.count];
        for (i, &w) in weights.iter().enumerate() {
            let channel = channels.of(i);
            let error = w - step(w, scales[channel]) * scales[channel];
            errors[channel] += f64::from(error * error);
        }
        for ((best, error), scale) in best.iter_mut().zip(errors).zip(scales) {
            if error < best.0 {
                *best = (error, scale);
            }
        }
    }
    best.into_iter().map(|(_, scale)| scale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_exact_and_ends_of_the_range_are_near() {
        for of in [ActivationType::U8, ActivationType::I8, ActivationType::SymmetricI8] {
            for (low, high) in [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 1e-30), (-3e38, 3e38), (0.0, 0.0)] {
                let affine = Affine::covering(Range { low, high }, of);
                assert_eq!(affine.round(0.0), 0.0, "{of:?} of {low}..{high}");
                assert!(affine.scale > 0.0 && affine.scale.is_finite());
                for end in [low, high] {
                    assert!((affine.round(end) - end).abs() <= affine.scale * 1.01, "{of:?}: {end} in {low}..{high}");
                }
            }
        }
    }

    #[test]
    fn channels_have_scales_of_their_own() {
        // Two channels of two, `[channel][2]`, and the same transposed.
        let rows =
            QuantizedWeight::new(&[1.27, -0.5, 0.0127, 0.01], Channels { count: 2, inner: 2 }, WeightRange::Largest);
        assert_eq!((rows.values, rows.scales), (vec![127, -50, 127, 100], vec![0.01, 0.0001]));
        let columns = Channels::along(&[2, 2], 1);
        let quantized = QuantizedWeight::new(&[1.27, 0.0127, -0.5, 0.01], columns, WeightRange::Largest);
        assert_eq!(quantized.values, [127, 127, -50, 100]);
        assert!((quantized.rounded(columns)[2] + 0.5).abs() < 1e-6);
        assert_eq!(QuantizedWeight::new(&[0.0, 0.0], Channels::ONE, WeightRange::LeastError).scales, [1.0]);
    }

    #[test]
    fn clipping_an_outlier_can_lessen_the_error() {
        let mut weights: Vec<f32> = (0..4096).map(|i| ((i * 37 % 211) as f32 - 105.0) / 2000.0).collect();
        weights[7] = 0.08;
        let error = |range| {
            let rounded = QuantizedWeight::new(&weights, Channels::ONE, range).rounded(Channels::ONE);
            weights.iter().zip(rounded).map(|(w, r)| f64::from((w - r).powi(2))).sum::<f64>()
        };
        assert!(error(WeightRange::LeastError) < error(WeightRange::Largest));
    }
}
