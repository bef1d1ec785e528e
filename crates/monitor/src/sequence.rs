//! Evidence that holds at every moment at once, so that looking after every request is sound: confidence sequences for means and their
//! differences, and e-processes for rates.

use crate::{Proportion, Strata};

/// Where the sequences of gates are tightest, in observations: a canary decides after some hundreds.
pub const TIGHTEST_AT: f64 = 500.0;

/// Half the width, after `n` observations of standard deviation `sigma`, of an asymptotic confidence sequence for their mean
/// that misses it at any time with probability `alpha` at most, on one side, and is tightest at `tightest_at` observations (Waudby-Smith,
/// Arbour, Sinha, Kennedy and Ramdas 2024, *Time-uniform central limit theory and asymptotic confidence sequences*, Annals of Statistics
/// 52(6), proposition 2.2).
pub fn half_width(sigma: f64, n: f64, alpha: f64, tightest_at: f64) -> f64 {
    if n <= 0.0 {
        return f64::INFINITY;
    }
    let alpha = 2.0 * alpha;
    // Their equation for the ρ that is tightest at a given n.
    let log = -2.0 * alpha.ln();
    let rho_squared = (log + log.ln_1p()) / tightest_at;
    let t = n * rho_squared + 1.0;
    sigma * (2.0 * t / (n * n * rho_squared) * (t.sqrt() / alpha).ln()).max(0.0).sqrt()
}

/// A difference `b - a`, and half the width of an interval round it that holds at all times, each side at level `alpha`.
///
/// The variance is that of the proportions with one success and one failure added to each (Agresti and Caffo 2000), so that a
/// proportion of 0 or 1 after few observations does not look certain; the number of observations is the harmonic one.
pub fn proportion_difference(a: Proportion, b: Proportion, alpha: f64) -> (f64, f64) {
    stratified_difference(&Strata::of(a), &Strata::of(b), alpha, TIGHTEST_AT)
}

/// As [`proportion_difference`], of proportions that were counted stratum by stratum (Mantel and Haenszel 1959): arms are compared within a
/// stratum alone, each weighted by its harmonic number of observations. What changed between strata, and the arms' shares in them, counts
/// for nothing.
pub fn stratified_difference(a: &Strata, b: &Strata, alpha: f64, tightest_at: f64) -> (f64, f64) {
    let smooth = |p: Proportion| (p.count as f64 + 1.0) / (p.total as f64 + 2.0);
    let (mut weights, mut sum, mut variance) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b.iter()).filter(|(a, b)| a.total > 0 && b.total > 0) {
        let (n, m) = (a.total as f64, b.total as f64);
        let weight = n * m / (n + m);
        let (p, q) = (smooth(a), smooth(b));
        weights += weight;
        sum += weight * (b.count as f64 / m - a.count as f64 / n);
        variance += weight * weight * (p * (1.0 - p) / n + q * (1.0 - q) / m);
    }
    if weights == 0.0 {
        return (0.0, f64::INFINITY);
    }
    // The weighted mean's variance, times the observations it stands for, is that of one of them.
    let sigma = (variance / weights).sqrt();
    (sum / weights, half_width(sigma, weights, alpha, tightest_at))
}

/// The natural logarithm of the evidence that of `total` independent events more than the share `limit` are of a kind that `count` are:
/// an e-process under every share up to `limit` (a mixture over Beta(1, 1) cut to the shares above it; Robbins 1970, Lindon and Malek
/// 2022). By Ville's inequality it ever exceeds `ln(1/alpha)` with probability `alpha` at most.
///
/// With `limit` a rate and `count` of `total` trials it tests that rate. With `limit = r·ρ/(r·ρ + 1 - r)` and the events of two arms, one
/// of which gets the share `r` of the requests, it tests that the ratio of their rates is above `ρ`, at any load and any share of events.
pub fn ln_evidence_above(count: u64, total: u64, limit: f64) -> f64 {
    let (m, rest) = (count as f64, total.saturating_sub(count) as f64);
    let limit = limit.clamp(1e-12, 1.0 - 1e-12);
    let (_, above) = ln_beta_tails(limit, 1.0 + m, 1.0 + rest);
    ln_beta(1.0 + m, 1.0 + rest) + above - (1.0 - limit).ln() - m * limit.ln() - rest * (1.0 - limit).ln()
}

/// As [`ln_evidence_above`], that the share is below `limit`.
pub fn ln_evidence_below(count: u64, total: u64, limit: f64) -> f64 {
    ln_evidence_above(total.saturating_sub(count), total, 1.0 - limit)
}

fn ln_beta(a: f64, b: f64) -> f64 {
    ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b)
}

/// Logarithm of the gamma function for `x > 0` (Lanczos' approximation with g = 7 and nine terms), right to about 1e-14 of its size.
fn ln_gamma(x: f64) -> f64 {
    const TERMS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    let x = x - 1.0;
    let t = x + 7.5;
    let series = TERMS[1..].iter().enumerate().fold(TERMS[0], |sum, (i, term)| sum + term / (x + i as f64 + 1.0));
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x + 0.5) * t.ln() - t + series.ln()
}

/// Logarithms of the shares of Beta(`a`, `b`) below and above `x`, by the continued fraction of the incomplete beta function (Press et al.,
/// *Numerical Recipes*, section 6.4), on the side where it converges fast.
fn ln_beta_tails(x: f64, a: f64, b: f64) -> (f64, f64) {
    let front = a * x.ln() + b * (-x).ln_1p() - ln_beta(a, b);
    // 1 - e^v, as a logarithm.
    let rest = |v: f64| (-v.min(0.0).exp()).ln_1p();
    if x < (a + 1.0) / (a + b + 2.0) {
        let below = front + (beta_fraction(x, a, b) / a).ln();
        (below.min(0.0), rest(below))
    } else {
        let above = front + (beta_fraction(1.0 - x, b, a) / b).ln();
        (rest(above), above.min(0.0))
    }
}

fn beta_fraction(x: f64, a: f64, b: f64) -> f64 {
    const TINY: f64 = 1e-300;
    let bounded = |v: f64| if v.abs() < TINY { TINY } else { v };
    let mut c = 1.0;
    let mut d = 1.0 / bounded(1.0 - (a + b) * x / (a + 1.0));
    let mut fraction = d;
    // It takes about the square root of the larger parameter.
    for m in (1..100_000).map(f64::from) {
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut change = 1.0;
        for step in [even, odd] {
            d = 1.0 / bounded(1.0 + step * d);
            c = bounded(1.0 + step / c);
            change = d * c;
            fraction *= change;
        }
        if (change - 1.0).abs() < 1e-14 {
            break;
        }
    }
    fraction
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

    #[test]
    fn strata_that_differ_do_not_make_arms_differ() {
        // 90 % and 50 % in both arms alike, but the arms' shares of the strata are opposite.
        let counted = |parts: [(u64, u64); 2]| {
            let mut strata = Strata::of(Proportion { count: parts[0].0, total: parts[0].1 });
            strata.begin();
            strata.add_to(1, &vec![true; parts[1].0 as usize]);
            strata.add_to(1, &vec![false; (parts[1].1 - parts[1].0) as usize]);
            strata
        };
        let (a, b) = (counted([(900, 1000), (50, 100)]), counted([(90, 100), (500, 1000)]));
        let (difference, half) = stratified_difference(&a, &b, 0.01, TIGHTEST_AT);
        assert!(difference.abs() < 1e-9 && half < 0.2, "{difference} ± {half}");
        let pooled = proportion_difference(a.pooled(), b.pooled(), 0.01);
        assert!(pooled.0 + pooled.1 < -0.2, "pooled, the mixture of strata looks like a difference: {pooled:?}");
    }

    /// Golden values of `scipy.special.betaln` and `log(betainc)`.
    #[test]
    fn beta_functions_are_those_of_the_books() {
        let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-10 * b.abs().max(1.0), "{a}, expected {b}");
        close(ln_beta(3.0, 5.0), (1.0f64 / 105.0).ln());
        close(ln_gamma(0.5), std::f64::consts::PI.sqrt().ln());
        close(ln_gamma(101.0), (1..=100).map(|v| f64::from(v).ln()).sum());
        // I_x(1, b) = 1 - (1 - x)^b and I_x(a, 1) = x^a.
        close(ln_beta_tails(0.3, 1.0, 7.0).1, 7.0 * 0.7f64.ln());
        close(ln_beta_tails(0.3, 40.0, 1.0).0, 40.0 * 0.3f64.ln());
        close(ln_beta_tails(0.5, 123.0, 123.0).0, 0.5f64.ln());
        assert!(ln_beta_tails(0.01, 5e8, 5e8).0 < -1e8);
    }

    /// Under its null the expectation of an e-process is at most 1; at the null's boundary it is 1.
    #[test]
    fn evidence_is_worth_one_where_there_is_nothing_to_find() {
        for (n, limit) in [(1u64, 0.3f64), (20, 0.05), (200, 0.5)] {
            assert!(ln_evidence_above(0, 0, limit).abs() < 1e-12);
            let mut expectation = 0.0;
            for m in 0..=n {
                let choose = ln_gamma(n as f64 + 1.0) - ln_gamma(m as f64 + 1.0) - ln_gamma((n - m) as f64 + 1.0);
                let probability = choose + m as f64 * limit.ln() + (n - m) as f64 * (1.0 - limit).ln();
                expectation += (probability + ln_evidence_above(m, n, limit)).exp();
                assert!(m == 0 || ln_evidence_above(m, n, limit) > ln_evidence_above(m - 1, n, limit));
            }
            assert!((expectation - 1.0).abs() < 1e-9, "{expectation} after {n} at {limit}");
        }
    }

    /// Looked at after every event, and wrong no more often than it says; and it tells a doubled rate after about the
    /// `ln(1/alpha)/KL` events that theory asks for.
    #[test]
    fn evidence_for_a_rate_ratio_errs_as_declared() {
        let (share, alpha) = (0.2f64, 0.05f64);
        let of_events = |ratio: f64| share * ratio / (share * ratio + 1.0 - share);
        let run = |seed: u64, ratio: f64, events: u64| {
            let (mut random, mut count) = (Random(seed * 7919 + 1), 0);
            (1..=events).find(|&total| {
                count += u64::from(random.unit() < of_events(ratio));
                ln_evidence_above(count, total, of_events(1.0)) >= (1.0 / alpha).ln()
            })
        };
        let alarms = (0..400).filter(|&seed| run(seed, 1.0, 1000).is_some()).count();
        assert!(alarms as f64 <= 400.0 * alpha + 3.0 * (400.0 * alpha * (1.0 - alpha)).sqrt(), "{alarms} of 400");
        let mut told: Vec<u64> = (0..200).map(|seed| run(seed, 2.0, 10_000).expect("twice the rate is told")).collect();
        told.sort();
        assert!((40..100).contains(&told[100]), "median {} events, theory 62", told[100]);
    }
}
