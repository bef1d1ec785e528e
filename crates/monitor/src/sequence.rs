//! Confidence sequences: intervals that hold at every moment at once, so that looking after every request is sound.

use crate::Proportion;

/// Where the sequence is tightest, in observations: a canary decides after some hundreds.
const TIGHTEST_AT: f64 = 500.0;

/// Half the width, after `n` observations of standard deviation `sigma`, of an asymptotic confidence sequence for their mean
/// that misses it at any time with probability `alpha` at most, on one side (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas
/// 2024, *Time-uniform central limit theory and asymptotic confidence sequences*, Annals of Statistics 52(6), proposition 2.2).
pub fn half_width(sigma: f64, n: f64, alpha: f64) -> f64 {
    if n <= 0.0 {
        return f64::INFINITY;
    }
    let alpha = 2.0 * alpha;
    // Their equation for the ρ that is tightest at a given n.
    let log = -2.0 * alpha.ln();
    let rho_squared = (log + log.ln_1p()) / TIGHTEST_AT;
    let t = n * rho_squared + 1.0;
    sigma * (2.0 * t / (n * n * rho_squared) * (t.sqrt() / alpha).ln()).max(0.0).sqrt()
}

/// `(difference, half width)` of two proportions `b - a`: an interval that holds at all times, each side at level `alpha`.
///
/// The variance is that of the proportions with one success and one failure added to each (Agresti and Caffo 2000), so that a
/// proportion of 0 or 1 after few observations does not look certain; the number of observations is the harmonic one.
pub fn proportion_difference(a: Proportion, b: Proportion, alpha: f64) -> (f64, f64) {
    if a.total == 0 || b.total == 0 {
        return (0.0, f64::INFINITY);
    }
    let (n, m) = (a.total as f64, b.total as f64);
    let smooth = |p: Proportion| (p.count as f64 + 1.0) / (p.total as f64 + 2.0);
    let (p, q) = (smooth(a), smooth(b));
    let variance = p * (1.0 - p) / n + q * (1.0 - q) / m;
    let effective = n * m / (n + m);
    let difference = b.count as f64 / m - a.count as f64 / n;
    (difference, half_width((variance * effective).sqrt(), effective, alpha))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*, for a seeded check without a dependency.
    struct Random(u64);

    impl Random {
        fn unit(&mut self) -> f64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    #[test]
    fn equal_proportions_are_rarely_ever_told_apart() {
        let mut random = Random(7);
        let (runs, alpha) = (300, 0.05);
        let mut missed = 0;
        for _ in 0..runs {
            let (mut a, mut b) = (Proportion::default(), Proportion::default());
            for _ in 0..2000 {
                a.add(random.unit() < 0.9);
                b.add(random.unit() < 0.9);
                let (difference, half) = proportion_difference(a, b, alpha);
                if difference + half < 0.0 {
                    missed += 1;
                    break;
                }
            }
        }
        assert!(f64::from(missed) <= f64::from(runs) * alpha * 1.5, "{missed} of {runs}");
    }

    #[test]
    fn a_worse_proportion_is_told_soon() {
        let mut random = Random(11);
        let (mut a, mut b) = (Proportion::default(), Proportion::default());
        let told = (0..5000).position(|_| {
            a.add(random.unit() < 0.98);
            b.add(random.unit() < 0.83);
            let (difference, half) = proportion_difference(a, b, 0.01);
            difference + half < -0.02
        });
        assert!(told.is_some_and(|n| n < 600), "{told:?}");
    }
}
