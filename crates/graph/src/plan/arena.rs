//! From live intervals to offsets in one arena.
//!
//! Finding the least total is NP-hard (dynamic storage allocation), so this is the usual greedy: the largest interval first, each
//! into the tightest gap between those that live at the same time and are placed already (Pisarchyk and Lee, "Efficient Memory
//! Management for Deep Neural Net Inference", 2020). It knows sizes and times only; what they are for is the caller's matter.

use std::ops::Range;

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
    place_counted(intervals, alignment).map(|(offsets, _)| offsets)
}

/// As [`place`], and how often a run of bytes was looked up.
fn place_counted(intervals: &[Interval], alignment: usize) -> Option<(Offsets, usize)> {
    assert!(alignment.is_power_of_two(), "an alignment of {alignment}");
    assert!(intervals.iter().all(|i| i.first <= i.last), "an interval ends before it begins");
    let mut order: Vec<usize> = (0..intervals.len()).filter(|&i| intervals[i].size_bytes > 0).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(intervals[i].size_bytes), intervals[i].first, i));
    let mut offsets = vec![0usize; intervals.len()];
    let mut total_bytes = 0usize;
    let mut taken = Taken::new(intervals);
    for index in order {
        let interval = &intervals[index];
        let mut best: Option<(usize, usize)> = None;
        let mut free_from = 0usize;
        taken.find(interval);
        while let Some(run) = taken.next_after(free_from) {
            if let Some(gap) = run.start.checked_sub(free_from)
                && gap >= interval.size_bytes
                && best.is_none_or(|(least, _)| gap < least)
            {
                best = Some((gap, free_from));
            }
            free_from = run.end;
        }
        let offset = best.map_or(free_from, |(_, offset)| offset);
        let end = offset.checked_add(interval.size_bytes)?.checked_next_multiple_of(alignment)?;
        total_bytes = total_bytes.max(end);
        offsets[index] = offset;
        taken.add(interval, offset..end);
    }
    Some((Offsets { offsets, total_bytes }, taken.visited))
}

/// Which bytes are taken when: a segment tree over the steps at which anything begins or ends (Bentley, "Solutions to Klee's rectangle
/// problems", 1977). Bytes that touch are one run, and buffers lie close together, so that a few runs lead past all that is taken.
struct Taken {
    /// Steps at which intervals begin or end, ascending.
    steps: Vec<usize>,
    /// The root is 1, the children of `n` are `2n` and `2n + 1`.
    nodes: Vec<TakenNode>,
    /// What was found: nodes, and whether the bytes taken at all of its steps or at some are meant.
    found: Vec<(usize, bool)>,
    visited: usize,
}

#[derive(Clone, Default)]
struct TakenNode {
    /// Taken at some of the node's steps.
    at_some: Runs,
    /// Taken at all of them, by what does not take all of its parent's.
    at_all: Runs,
}

impl Taken {
    fn new(intervals: &[Interval]) -> Taken {
        let mut steps: Vec<usize> = intervals.iter().flat_map(|i| [i.first, i.last]).collect();
        steps.sort_unstable();
        steps.dedup();
        let nodes = vec![TakenNode::default(); 2 * steps.len().next_power_of_two()];
        Taken { steps, nodes, found: Vec::new(), visited: 0 }
    }

    /// Positions in `steps`.
    fn span(&self, interval: &Interval) -> Range<usize> {
        let position = |step| self.steps.partition_point(|&other| other < step);
        position(interval.first)..position(interval.last) + 1
    }

    /// Finds what is taken at any step of `interval`.
    fn find(&mut self, interval: &Interval) {
        let span = self.span(interval);
        self.found.clear();
        self.find_below(1, 0..self.nodes.len() / 2, &span);
    }

    fn find_below(&mut self, node: usize, covers: Range<usize>, span: &Range<usize>) {
        if covers.end <= span.start || span.end <= covers.start || self.nodes[node].at_some.0.is_empty() {
            return;
        }
        if span.start <= covers.start && covers.end <= span.end {
            return self.found.push((node, false));
        }
        if !self.nodes[node].at_all.0.is_empty() {
            self.found.push((node, true));
        }
        let middle = covers.start.midpoint(covers.end);
        self.find_below(2 * node, covers.start..middle, span);
        self.find_below(2 * node + 1, middle..covers.end, span);
    }

    /// Of what was found: the run that holds byte `from` and ends last, else one of those that begin next; `None` where nothing is taken
    /// from there on.
    fn next_after(&mut self, from: usize) -> Option<Range<usize>> {
        self.visited += self.found.len();
        let runs = self.found.iter().filter_map(|&(node, at_all)| {
            let TakenNode { at_some, at_all: all } = &self.nodes[node];
            if at_all { all.after(from) } else { at_some.after(from) }
        });
        runs.min_by_key(|run| (run.start.max(from), std::cmp::Reverse(run.end))).cloned()
    }

    fn add(&mut self, interval: &Interval, bytes: Range<usize>) {
        let span = self.span(interval);
        self.insert(1, 0..self.nodes.len() / 2, &span, &bytes);
    }

    fn insert(&mut self, node: usize, covers: Range<usize>, span: &Range<usize>, bytes: &Range<usize>) {
        if covers.end <= span.start || span.end <= covers.start {
            return;
        }
        self.nodes[node].at_some.add(bytes.clone());
        if span.start <= covers.start && covers.end <= span.end {
            return self.nodes[node].at_all.add(bytes.clone());
        }
        let middle = covers.start.midpoint(covers.end);
        self.insert(2 * node, covers.start..middle, span, bytes);
        self.insert(2 * node + 1, middle..covers.end, span, bytes);
    }
}

/// Ranges that neither overlap nor touch, ascending.
#[derive(Clone, Default)]
struct Runs(Vec<Range<usize>>);

impl Runs {
    /// The first that ends after byte `from`.
    fn after(&self, from: usize) -> Option<&Range<usize>> {
        self.0.get(self.0.partition_point(|run| run.end <= from))
    }

    fn add(&mut self, bytes: Range<usize>) {
        let from = self.0.partition_point(|run| run.end < bytes.start);
        let to = self.0.partition_point(|run| run.start <= bytes.end);
        let touching = &self.0[from..to];
        let start = touching.first().map_or(bytes.start, |run| run.start.min(bytes.start));
        let end = touching.last().map_or(bytes.end, |run| run.end.max(bytes.end));
        self.0.splice(from..to, std::iter::once(start..end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::testing::Random;

    /// The same greedy over all that is placed.
    fn place_plainly(intervals: &[Interval], alignment: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..intervals.len()).filter(|&i| intervals[i].size_bytes > 0).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(intervals[i].size_bytes), intervals[i].first, i));
        let mut offsets = vec![0usize; intervals.len()];
        let mut placed: Vec<usize> = Vec::new();
        for index in order {
            let (mut best, mut free_from) = (None, 0usize);
            for &other in placed.iter().filter(|&&other| intervals[other].overlaps(&intervals[index])) {
                let gap = offsets[other].saturating_sub(free_from);
                if gap >= intervals[index].size_bytes && best.is_none_or(|(least, _)| gap < least) {
                    best = Some((gap, free_from));
                }
                free_from = free_from.max((offsets[other] + intervals[other].size_bytes).next_multiple_of(alignment));
            }
            offsets[index] = best.map_or(free_from, |(_, offset)| offset);
            placed.push(index);
            placed.sort_by_key(|&other| (offsets[other], other));
        }
        offsets
    }

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
            assert_eq!(offsets.offsets, place_plainly(&list, 64));
            let padded = |i: &Interval| i.size_bytes.next_multiple_of(64);
            let live =
                |step: usize| list.iter().filter(|i| i.first <= step && step <= i.last).map(padded).sum::<usize>();
            let least = (0..60).map(live).max().unwrap_or(0);
            assert!(offsets.total_bytes >= least);
            assert!(offsets.total_bytes <= 2 * least, "{} for {least}", offsets.total_bytes);
        }
    }

    #[test]
    fn work_grows_with_the_intervals() {
        let chain = |i: usize, _: usize| Interval { size_bytes: 64 + i * 37 % 4096, first: i, last: i + 1 + i % 5 };
        // All are alive in the end.
        let fan = |i: usize, count: usize| Interval { size_bytes: 64 + i * 37 % 4096, first: i, last: count };
        // Some live long.
        let skips =
            |i: usize, _: usize| Interval { last: i + if i.is_multiple_of(50) { 500 } else { 2 }, ..chain(i, 0) };
        let shapes: [&dyn Fn(usize, usize) -> Interval; 3] = [&chain, &fan, &skips];
        for shape in shapes {
            let work = |count: usize| {
                let list: Vec<Interval> = (0..count).map(|i| shape(i, count)).collect();
                place_counted(&list, 64).unwrap().1
            };
            let (small, large) = (work(2000), work(8000));
            // Four times as many, in a tree of two levels more.
            assert!(2 * large <= 11 * small, "{small} lookups for 2000 intervals, {large} for 8000");
        }
    }

    #[test]
    fn what_does_not_fit_an_address_is_refused() {
        assert_eq!(place(&intervals(&[(usize::MAX - 10, 0, 1), (64, 1, 1)]), 64), None);
        assert_eq!(place(&intervals(&[(usize::MAX, 0, 0)]), 64), None);
        check(&intervals(&[(usize::MAX / 2 - 64, 0, 0), (usize::MAX / 2 - 64, 1, 1)]), 64);
    }
}
