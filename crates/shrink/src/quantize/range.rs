//! From what was seen of a value to the range that its integers cover.

use crate::Observation;
use serde::{Deserialize, Serialize};

/// How much of what was seen the range covers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Calibration {
    /// All.
    MinMax,
    /// All but this share at both ends together, in `(0, 1)`.
    Percentile(f64),
    /// The least Kullback–Leibler divergence between the values and what they are taken for, by Migacz, "8-bit Inference with TensorRT"
    /// (GTC 2017).
    Entropy,
    /// The least squared error.
    LeastError,
}

/// An interval of real numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Range {
    pub low: f32,
    pub high: f32,
}

impl Range {
    /// The range of what was observed. Where nothing was counted, all of it.
    pub fn of(observation: &Observation, calibration: Calibration) -> Range {
        let whole = Range { low: observation.low, high: observation.high };
        let counted = observation.histogram.iter().any(|&n| n > 0);
        if !counted || whole.low >= whole.high {
            return whole;
        }
        let histogram = Histogram { range: whole, counts: &observation.histogram };
        match calibration {
            Calibration::MinMax => whole,
            Calibration::Percentile(share) => histogram.percentile(share),
            Calibration::Entropy => histogram.entropy(),
            Calibration::LeastError => histogram.least_error(),
        }
    }
}

struct Histogram<'a> {
    range: Range,
    counts: &'a [u64],
}

/// Steps of an eight-bit quantization.
const STEPS: usize = 256;

impl Histogram<'_> {
    fn width(&self) -> f64 {
        (f64::from(self.range.high) - f64::from(self.range.low)) / self.counts.len() as f64
    }

    /// The middle of a bin.
    fn middle(&self, bin: usize) -> f64 {
        f64::from(self.range.low) + (bin as f64 + 0.5) * self.width()
    }

    /// Leaves out `share` of the values, half at each end; an end at 0 loses nothing.
    fn percentile(&self, share: f64) -> Range {
        let total: u64 = self.counts.iter().sum();
        let ends = usize::from(self.range.low < 0.0) + usize::from(self.range.high > 0.0);
        let leave = (total as f64 * share / ends.max(1) as f64) as u64;
        let skip = |bins: &mut dyn Iterator<Item = &u64>| {
            let mut left = 0;
            bins.take_while(|&&count| {
                left += count;
                left <= leave
            })
            .count()
        };
        let (first, last) = (skip(&mut self.counts.iter()), skip(&mut self.counts.iter().rev()));
        let mut range = self.range;
        if range.low < 0.0 {
            range.low = (f64::from(self.range.low) + first as f64 * self.width()) as f32;
        }
        if range.high > 0.0 {
            range.high = (f64::from(self.range.high) - last as f64 * self.width()) as f32;
        }
        if range.low < range.high { range } else { self.range }
    }

    /// The mean squared error of quantizing to `STEPS` steps over `[low, high]`, which holds 0.
    fn error(&self, low: f64, high: f64) -> f64 {
        let scale = (high - low) / (STEPS - 1) as f64;
        let mut error = 0.0;
        for (bin, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let x = self.middle(bin);
            let outside = if x < low { low - x } else { (x - high).max(0.0) };
            // Inside, an error spread evenly over a step.
            let squared = if outside > 0.0 { outside * outside } else { scale * scale / 12.0 };
            error += count as f64 * squared;
        }
        error
    }

    /// Both ends are moved in, one after the other, to where the error is least.
    fn least_error(&self) -> Range {
        let (low, high) = (f64::from(self.range.low).min(0.0), f64::from(self.range.high).max(0.0));
        let shares = || (5..=100).rev().map(|part| part as f64 / 100.0);
        let best = |at: &dyn Fn(f64) -> (f64, f64)| {
            let error = |share: &f64| {
                let (low, high) = at(*share);
                self.error(low, high)
            };
            at(shares().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(1.0))
        };
        let (mut low, mut high) = best(&|share| (low * share, high * share));
        (low, high) = best(&|share| (low * share, high));
        (low, high) = best(&|share| (low, high * share));
        Range { low: low as f32, high: high as f32 }
    }

    /// Magnitudes in bins, and the threshold whose clipped and quantized distribution is nearest; the range is cut at it on both sides.
    fn entropy(&self) -> Range {
        let bins = self.counts.len();
        let largest = f64::from(self.range.high.abs().max(self.range.low.abs()));
        let mut magnitudes = vec![0f64; bins];
        for (bin, &count) in self.counts.iter().enumerate() {
            let at = (self.middle(bin).abs() / largest * bins as f64) as usize;
            magnitudes[at.min(bins - 1)] += count as f64;
        }
        // Zeros, of which a ReLU leaves many, cost nothing at any threshold.
        magnitudes[0] = magnitudes[1];
        // An end alone at 0 leaves all steps to the other; otherwise they share them.
        let levels = if self.range.low >= 0.0 || self.range.high <= 0.0 { STEPS } else { STEPS / 2 };
        let divergence = |cut: &usize| divergence(&magnitudes, *cut, levels);
        let cut = (levels..=bins).min_by(|a, b| divergence(a).total_cmp(&divergence(b))).unwrap_or(bins);
        let threshold = (largest * cut as f64 / bins as f64) as f32;
        Range { low: self.range.low.max(-threshold), high: self.range.high.min(threshold) }
    }
}

/// `KL(P‖Q)`, where `P` is the first `cut` bins with all beyond added to the last, and `Q` the same bins merged to `levels` and spread
/// again over those that are not empty.
fn divergence(bins: &[f64], cut: usize, levels: usize) -> f64 {
    let mut p = bins[..cut].to_vec();
    p[cut - 1] += bins[cut..].iter().sum::<f64>();
    let mut q = vec![0f64; cut];
    for level in 0..levels {
        let span = level * cut / levels..(level + 1) * cut / levels;
        let mass: f64 = bins[span.clone()].iter().sum();
        let filled = bins[span.clone()].iter().filter(|&&n| n > 0.0).count();
        for i in span.filter(|&i| bins[i] > 0.0) {
            q[i] = mass / filled as f64;
        }
    }
    let (p_sum, q_sum): (f64, f64) = (p.iter().sum(), q.iter().sum());
    if p_sum == 0.0 || q_sum == 0.0 {
        return f64::INFINITY;
    }
    let terms = p.iter().zip(&q).filter(|(p, _)| **p > 0.0);
    // What P has and Q has not costs as much as one value in a million would.
    terms.map(|(p, q)| p / p_sum * ((p / p_sum) / (q / q_sum).max(1e-6)).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing::observed;

    /// A bell of values within about ±1, and one outlier at 50.
    fn bell() -> Vec<f32> {
        let mut values: Vec<f32> = (0..20_000)
            .map(|i| (0..6).map(|k| ((i * (2 * k + 7) * 37 + k * 11) % 1009) as f32 / 1009.0 - 0.5).sum::<f32>() / 2.0)
            .collect();
        values.push(50.0);
        values
    }

    #[test]
    fn outliers_are_cut_off_by_all_but_min_max() {
        let observation = observed(&bell());
        let range = |calibration| Range::of(&observation, calibration);
        assert_eq!(range(Calibration::MinMax).high, 50.0);
        for calibration in [Calibration::Percentile(1e-3), Calibration::Entropy] {
            let range = range(calibration);
            assert!(range.high < 10.0 && range.high > 0.3, "{calibration:?}: {range:?}");
            assert!(range.low < -0.3, "{calibration:?}: {range:?}");
        }
    }

    #[test]
    fn least_error_keeps_what_is_worth_its_steps() {
        // One value in twenty thousand at fifty times the spread is worth more than finer steps of the others; at twice the spread it is not.
        let mut values = bell();
        let wide = Range::of(&observed(&values), Calibration::LeastError);
        assert!(wide.high > 5.0, "{wide:?}");
        *values.last_mut().unwrap() = 2.5;
        let narrow = Range::of(&observed(&values), Calibration::LeastError);
        assert!(narrow.high < 2.6 && narrow.high > 0.8, "{narrow:?}");
    }

    #[test]
    fn what_is_constant_or_empty_keeps_its_range() {
        for calibration in [Calibration::Percentile(0.01), Calibration::Entropy, Calibration::LeastError] {
            assert_eq!(Range::of(&observed(&[3.0; 10]), calibration), Range { low: 3.0, high: 3.0 });
            let none = Range::of(&observed(&[]), calibration);
            assert_eq!((none.low, none.high), (0.0, 0.0));
        }
    }
}
