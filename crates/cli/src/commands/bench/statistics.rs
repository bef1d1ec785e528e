//! What may be said of measured times: medians, intervals, and whether two rounds of measurements differ.
//!
//! Runs in one process are alike, so what is independent is a round: a process of its own. Intervals and tests are over the medians of rounds.

use crate::made_up::Random;

/// The value below which a share `q` of the sorted ones lies, by nearest rank; NaN where there is none.
pub(super) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = ((q * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(at - 1).copied().unwrap_or(f64::NAN)
}

/// The mean of the middle two where there are two; NaN of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    median_of_sorted(&sorted)
}

fn median_of_sorted(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Where a true value lies, and how probably.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Interval {
    pub low: f64,
    pub high: f64,
    /// At least as probable as this.
    pub coverage: f64,
}

/// An interval for the median of what `values` were drawn from, whatever its distribution: between the k-th smallest and the k-th largest, with the largest k
/// that covers `confidence`. With few values k is 1, and the coverage is less. `None` of fewer than two values.
pub(super) fn median_interval(values: &[f64], confidence: f64) -> Option<Interval> {
    let n = values.len();
    if n < 2 {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // Below the median lie as many as a fair coin gives heads: P(heads < k) on either side.
    let mut term = 0.5f64.powi(n as i32);
    let (mut below, mut best) = (term, (1, 1.0 - 2.0 * term));
    for k in 2..=n / 2 {
        term *= (n + 2 - k) as f64 / (k - 1) as f64;
        below += term;
        if 1.0 - 2.0 * below < confidence {
            break;
        }
        best = (k, 1.0 - 2.0 * below);
    }
    let (k, coverage) = best;
    Some(Interval { low: sorted[k - 1], high: sorted[n - k], coverage })
}

/// The 95 % interval of the ratio of medians, `after` over `before`, by the percentiles of a bootstrap that draws rounds from either side.
pub(super) fn ratio_interval(before: &[f64], after: &[f64], seed: u64) -> Option<Interval> {
    const RESAMPLES: usize = 10_000;
    if before.len() < 2 || after.len() < 2 {
        return None;
    }
    let mut random = Random::new(seed);
    let mut drawn = Vec::new();
    let mut median_of_some = |values: &[f64]| {
        drawn.clear();
        drawn.extend((0..values.len()).map(|_| values[random.below(values.len() as u64) as usize]));
        drawn.sort_by(f64::total_cmp);
        median_of_sorted(&drawn)
    };
    let mut ratios: Vec<f64> = (0..RESAMPLES).map(|_| median_of_some(after) / median_of_some(before)).collect();
    ratios.sort_by(f64::total_cmp);
    Some(Interval { low: quantile(&ratios, 0.025), high: quantile(&ratios, 0.975), coverage: 0.95 })
}

/// The two-sided probability that two samples of one distribution differ in their ranks as much as these (Mann–Whitney U): exact for up to 25 values a side, ties
/// included, by the normal approximation with its correction for ties otherwise. 1 where a side is empty.
pub(super) fn mann_whitney(a: &[f64], b: &[f64]) -> f64 {
    const EXACT: usize = 25;
    let (n, m) = (a.len(), b.len());
    if n == 0 || m == 0 {
        return 1.0;
    }
    let mut all: Vec<(f64, bool)> = a.iter().map(|&v| (v, true)).chain(b.iter().map(|&v| (v, false))).collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    // Twice the ranks: equal values share the mean of theirs.
    let (mut ranks, mut sum, mut ties) = (Vec::with_capacity(n + m), 0, 0.0);
    while let Some(&(value, _)) = all.get(ranks.len()) {
        let start = ranks.len();
        let equal = all[start..].iter().take_while(|(v, _)| *v == value).count();
        let rank = 2 * start + equal + 1;
        sum += rank * all[start..start + equal].iter().filter(|(_, of_a)| *of_a).count();
        ties += (equal as f64).powi(3) - equal as f64;
        ranks.extend(std::iter::repeat_n(rank, equal));
    }
    let mean = n * (n + m + 1);
    let distance = sum.abs_diff(mean);
    if n <= EXACT && m <= EXACT {
        let counts = rank_sums(&ranks, n);
        let total: f64 = counts.iter().sum();
        let far = counts.iter().enumerate().filter(|(sum, _)| sum.abs_diff(mean) >= distance);
        return far.map(|(_, count)| count).sum::<f64>() / total;
    }
    let (nf, mf) = (n as f64, m as f64);
    let all = nf + mf;
    let variance = nf * mf / 12.0 * (all + 1.0 - ties / (all * (all - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    let z = (distance as f64 / 2.0 - 0.5).max(0.0) / variance.sqrt();
    complementary_error(z / std::f64::consts::SQRT_2).min(1.0)
}

/// How many choices of `n` of `ranks` have each sum.
fn rank_sums(ranks: &[usize], n: usize) -> Vec<f64> {
    let size = ranks.iter().sum::<usize>() + 1;
    let mut counts = vec![vec![0.0; size]; n + 1];
    counts[0][0] = 1.0;
    for &rank in ranks {
        for chosen in (1..=n).rev() {
            for sum in rank..size {
                counts[chosen][sum] += counts[chosen - 1][sum - rank];
            }
        }
    }
    counts.swap_remove(n)
}

/// The least that [`mann_whitney`] can give for so many values a side.
pub(super) fn least_p(n: usize, m: usize) -> f64 {
    let orders: f64 = (1..=n).map(|i| (m + i) as f64 / i as f64).product();
    (2.0 / orders).min(1.0)
}

/// Probabilities corrected for being the smallest of many, by Holm: the chance of even one false alarm among all stays what is asked for.
pub(super) fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let (mut corrected, mut most) = (vec![1.0; p.len()], 0.0f64);
    for (rank, &at) in order.iter().enumerate() {
        most = most.max(p[at] * (p.len() - rank) as f64).min(1.0);
        corrected[at] = most;
    }
    corrected
}

/// erfc, within 1.2e-7 (Numerical Recipes, 6.2).
fn complementary_error(x: f64) -> f64 {
    const C: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let t = 1.0 / (1.0 + 0.5 * x.abs());
    let sum = C.iter().rev().fold(0.0, |sum, c| sum * t + c);
    let erfc = t * (-x * x + sum).exp();
    if x < 0.0 { 2.0 - erfc } else { erfc }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(actual: f64, expected: f64, tolerance: f64) {
        assert!((actual - expected).abs() <= tolerance, "{actual}, expected {expected}");
    }

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan() && quantile(&[], 0.5).is_nan());
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|q| quantile(&sorted, q)), [1.0, 50.0, 99.0, 100.0]);
    }

    #[test]
    fn the_interval_of_a_median_is_the_binomial_one() {
        let values: Vec<f64> = (1..=10).map(f64::from).collect();
        // Of ten values the second and the ninth: 1 − 2 (1 + 10) / 2^10.
        let interval = median_interval(&values, 0.95).unwrap();
        assert_eq!((interval.low, interval.high), (2.0, 9.0));
        near(interval.coverage, 1.0 - 22.0 / 1024.0, 1e-12);
        let few = median_interval(&[1.0, 2.0, 3.0], 0.95).unwrap();
        assert_eq!((few.low, few.high, few.coverage), (1.0, 3.0, 0.75));
        assert_eq!(median_interval(&[1.0], 0.95), None);
    }

    #[test]
    fn the_interval_covers_the_median_as_often_as_it_says() {
        let mut random = Random::new(7);
        let hits = (0..4000).filter(|_| {
            let values: Vec<f64> = (0..10).map(|_| -random.unit().ln()).collect();
            let interval = median_interval(&values, 0.95).unwrap();
            (interval.low..=interval.high).contains(&std::f64::consts::LN_2)
        });
        // 97.85 % of 4000, give or take four deviations.
        near(hits.count() as f64, 3914.0, 37.0);
    }

    #[test]
    fn ranks_are_compared_as_the_tables_say() {
        // Two-sided, from tables of U: all of three below all of three is 2 of 20 orders.
        near(mann_whitney(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]), 0.1, 1e-12);
        near(mann_whitney(&[4.0, 5.0, 6.0], &[1.0, 2.0, 3.0]), 0.1, 1e-12);
        near(mann_whitney(&[1.0, 3.0, 5.0], &[2.0, 4.0, 6.0]), 0.7, 1e-12);
        let (low, high): (Vec<f64>, Vec<f64>) = (0..10).map(|i| (f64::from(i), f64::from(i) + 100.0)).unzip();
        near(mann_whitney(&low, &high), 2.0 / 184_756.0, 1e-15);
        near(least_p(10, 10), 2.0 / 184_756.0, 1e-15);
        // From scipy.stats.mannwhitneyu, exact.
        let (odd, later): (Vec<f64>, Vec<f64>) =
            (0..10).map(|i| (2.0 * f64::from(i) + 1.0, 2.0 * f64::from(i) + 6.5)).unzip();
        near(mann_whitney(&odd, &later), 0.105_122_432, 1e-9);
        assert_eq!(mann_whitney(&[1.0; 4], &[1.0; 5]), 1.0);
        assert_eq!(mann_whitney(&[], &[1.0]), 1.0);
        // Ties: every choice of ranks counted one by one.
        near(mann_whitney(&[1.0, 2.0, 2.0, 3.0], &[2.0, 4.0, 4.0, 5.0]), 0.11428571428571428, 1e-12);
        near(mann_whitney(&[1.0, 1.0, 2.0], &[1.0, 3.0, 3.0, 3.0, 4.0]), 0.125, 1e-12);
        // Many: the normal approximation (scipy.stats.mannwhitneyu, asymptotic).
        let (many, more): (Vec<f64>, Vec<f64>) = (0..30).map(|i| (f64::from(i), f64::from(i / 2) + 10.0)).unzip();
        near(mann_whitney(&many, &more), 0.2703056439989152, 1e-6);
    }

    #[test]
    fn no_difference_is_found_where_there_is_none() {
        let mut random = Random::new(11);
        let mut draw = || (0..10).map(|_| random.unit()).collect::<Vec<f64>>();
        let alarms = (0..2000).filter(|_| mann_whitney(&draw(), &draw()) < 0.05).count();
        assert!((40..=120).contains(&alarms), "{alarms} of 2000 at 5 %");
    }

    #[test]
    fn holm_corrects_by_rank() {
        let corrected = holm(&[0.01, 0.04, 0.03, 0.005]);
        let expected = [0.03, 0.06, 0.06, 0.02];
        corrected.iter().zip(expected).for_each(|(a, e)| near(*a, e, 1e-12));
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn a_ratio_lies_in_its_interval_and_follows_the_seed() {
        let before: Vec<f64> = (0..10).map(|i| 10.0 + f64::from(i) / 10.0).collect();
        let after: Vec<f64> = before.iter().map(|v| v * 1.2).collect();
        let interval = ratio_interval(&before, &after, 3).unwrap();
        assert!(interval.low < 1.2 && 1.2 < interval.high && interval.low > 1.1 && interval.high < 1.3, "{interval:?}");
        assert_eq!(ratio_interval(&before, &after, 3), Some(interval));
        assert_eq!(ratio_interval(&before[..1], &after, 3), None);
    }
}
