//! Latencies in a bounded number of counters.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Counters per doubling: a quantile is right to within 1/32, about 3 %.
const STEPS: usize = 32;
/// From 1 µs to 2^27 µs, a little over two minutes; what is outside counts at the ends.
const DOUBLINGS: usize = 27;

/// A histogram with logarithmic buckets, as HdrHistogram has them: constant memory, quantiles to within 3 %.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatencyHistogram {
    buckets: Vec<u32>,
    count: u64,
    sum_us: u64,
    max_us: u64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        LatencyHistogram { buckets: vec![0; STEPS * (DOUBLINGS + 1)], count: 0, sum_us: 0, max_us: 0 }
    }
}

impl LatencyHistogram {
    pub fn record(&mut self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = &mut self.buckets[bucket(us)];
        *bucket = bucket.saturating_add(1);
        self.count += 1;
        self.sum_us = self.sum_us.saturating_add(us);
        self.max_us = self.max_us.max(us);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sum of all latencies, in seconds.
    pub fn sum_s(&self) -> f64 {
        self.sum_us as f64 / 1e6
    }

    /// The `q`-quantile in milliseconds (`q` within 0 and 1), the upper end of its bucket; `None` where nothing was recorded.
    pub fn quantile_ms(&self, q: f64) -> Option<f64> {
        let rank = ((q.clamp(0.0, 1.0) * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let index = self.buckets.iter().position(|&n| {
            seen += u64::from(n);
            seen >= rank
        })?;
        Some(upper_us(index).min(self.max_us) as f64 / 1e3)
    }

    /// How many latencies were at most `bound_us` (to within a bucket).
    pub fn at_most(&self, bound_us: u64) -> u64 {
        self.buckets.iter().enumerate().filter(|(i, _)| upper_us(*i) <= bound_us).map(|(_, &n)| u64::from(n)).sum()
    }
}

fn bucket(us: u64) -> usize {
    let us = us.clamp(1, (1 << DOUBLINGS) - 1);
    let doubling = us.ilog2() as usize;
    let step = if doubling >= 5 { us >> (doubling - 5) } else { us << (5 - doubling) } as usize - STEPS;
    doubling * STEPS + step
}

/// The largest whole number of microseconds that falls into bucket `index`.
fn upper_us(index: usize) -> u64 {
    let (doubling, step) = (index / STEPS, (index % STEPS + STEPS + 1) as u64);
    if doubling >= 5 { (step << (doubling - 5)) - 1 } else { (step >> (5 - doubling)).max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut histogram = LatencyHistogram::default();
        assert_eq!(histogram.quantile_ms(0.5), None);
        for us in 1..=100_000 {
            histogram.record(Duration::from_micros(us));
        }
        for q in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let (exact, found) = (q * 100.0, histogram.quantile_ms(q).unwrap());
            assert!((found / exact - 1.0).abs() < 0.04, "{q}: {found} ms, {exact} ms expected");
        }
    }

    #[test]
    fn extremes_are_counted_at_the_ends() {
        let mut histogram = LatencyHistogram::default();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::from_secs(1 << 40));
        assert_eq!(histogram.count(), 2);
        assert!(histogram.quantile_ms(1.0).unwrap() > 1e5);
    }
}
