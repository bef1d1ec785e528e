//! From live intervals to offsets in one arena.
//!
//! Finding the least total is NP-hard (dynamic storage allocation), so this is the usual greedy: the largest interval first, each
//! into the tightest gap between those that live at the same time and are placed already (Pisarchyk and Lee, "Efficient Memory
//! Management for Deep Neural Net Inference", 2020). It knows sizes and times only; what they are for is the caller's matter.

/// Bytes that must stay untouched from step `first` to step `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    pub size_bytes: usize,
    pub first: usize,
    pub last: usize,
}

impl Interval {
    /// Whether both are alive at some step.
    pub fn overlaps(&self, other: &Interval) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Where each interval lies, in the order they were given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// Multiples of the alignment. Intervals of no bytes are at 0.
    pub offsets: Vec<usize>,
    pub total_bytes: usize,
}

/// Offsets for `intervals` so that no two that are alive together share a byte. Depends on nothing but its arguments.
///
/// `None` where the total would not fit a `usize`.
///
/// # Panics
/// If `alignment` is no power of two, or an interval ends before it begins.
pub fn place(intervals: &[Interval], alignment: usize) -> Option<Offsets> {
    assert!(alignment.is_power_of_two(), "an alignment of {alignment}");
    assert!(intervals.iter().all(|i| i.first <= i.last), "an interval ends before it begins");
    let mut order: Vec<usize> = (0..intervals.len()).filter(|&i| intervals[i].size_bytes > 0).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(intervals[i].size_bytes), intervals[i].first, i));
    let mut offsets = vec![0usize; intervals.len()];
    let mut total_bytes = 0usize;
    // Those placed, by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(order.len());
    for index in order {
        let interval = &intervals[index];
        let mut best: Option<(usize, usize)> = None;
        let mut free_from = 0usize;
        for &other in placed.iter().filter(|&&other| intervals[other].overlaps(interval)) {
            if let Some(gap) = offsets[other].checked_sub(free_from)
                && gap >= interval.size_bytes
                && best.is_none_or(|(least, _)| gap < least)
            {
                best = Some((gap, free_from));
            }
            let end = offsets[other].checked_add(intervals[other].size_bytes)?.checked_next_multiple_of(alignment)?;
            free_from = free_from.max(end);
        }
        let offset = best.map_or(free_from, |(_, offset)| offset);
        total_bytes = total_bytes.max(offset.checked_add(interval.size_bytes)?);
        offsets[index] = offset;
        let at = placed.partition_point(|&other| (offsets[other], other) < (offset, index));
        placed.insert(at, index);
    }
    Some(Offsets { offsets, total_bytes: total_bytes.checked_next_multiple_of(alignment)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::testing::Random;

    fn check(intervals: &[Interval], alignment: usize) -> Offsets {
        let offsets = place(intervals, alignment).unwrap();
        assert_eq!(offsets, place(intervals, alignment).unwrap());
        for (i, a) in intervals.iter().enumerate() {
            let from = offsets.offsets[i];
            assert!(from.is_multiple_of(alignment) && from + a.size_bytes <= offsets.total_bytes);
            for (j, b) in intervals.iter().enumerate().skip(i + 1) {
                let other = offsets.offsets[j];
                let apart = from + a.size_bytes <= other || other + b.size_bytes <= from;
                assert!(apart || !a.overlaps(b) || a.size_bytes == 0 || b.size_bytes == 0, "{a:?} {b:?}");
            }
        }
        offsets
    }

    fn intervals(list: &[(usize, usize, usize)]) -> Vec<Interval> {
        list.iter().map(|&(size_bytes, first, last)| Interval { size_bytes, first, last }).collect()
    }

    #[test]
    fn lives_that_meet_are_apart_and_others_share() {
        let total = |list: &[(usize, usize, usize)]| check(&intervals(list), 64).total_bytes;
        assert_eq!(total(&[]), 0);
        assert_eq!(total(&[(0, 0, 9), (1, 0, 1)]), 64);
        // A chain needs its two largest neighbours.
        assert_eq!(total(&[(128, 0, 1), (256, 1, 2), (64, 2, 3), (192, 3, 4)]), 384);
        // The gap that the small one leaves is used again.
        assert_eq!(total(&[(64, 0, 9), (128, 0, 3), (128, 4, 9), (64, 5, 6)]), 256);
    }

    #[test]
    fn random_intervals_never_share_bytes_and_stay_near_the_least() {
        let mut random = Random::new(7);
        for _ in 0..40 * crate::passes::testing::soak() {
            let count = random.below(60) as usize;
            let list: Vec<Interval> = (0..count)
                .map(|_| {
                    let first = random.below(40) as usize;
                    let (size_bytes, length) = (random.below(5000) as usize, random.below(12) as usize);
                    Interval { size_bytes, first, last: first + length }
                })
                .collect();
            let offsets = check(&list, 64);
            let padded = |i: &Interval| i.size_bytes.next_multiple_of(64);
            let live =
                |step: usize| list.iter().filter(|i| i.first <= step && step <= i.last).map(padded).sum::<usize>();
            let least = (0..60).map(live).max().unwrap_or(0);
            assert!(offsets.total_bytes >= least);
            assert!(offsets.total_bytes <= 2 * least, "{} for {least}", offsets.total_bytes);
        }
    }

    #[test]
    fn what_does_not_fit_an_address_is_refused() {
        assert_eq!(place(&intervals(&[(usize::MAX - 10, 0, 1), (64, 1, 1)]), 64), None);
        assert_eq!(place(&intervals(&[(usize::MAX, 0, 0)]), 64), None);
        check(&intervals(&[(usize::MAX / 2 - 64, 0, 0), (usize::MAX / 2 - 64, 1, 1)]), 64);
    }
}
