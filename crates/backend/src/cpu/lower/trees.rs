//! Ensembles of decision trees.
//!
//! The kernel tests `x ≤ split` alone. `x = v` is `x ≤ v` with `x ≤ the number before v` under it, and a set is a search among its members,
//! each an equality at the end.

use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use bytemuck::{cast_slice, cast_slice_mut};
use cutover_graph::{
    Identity, Node,
    ops::{Aggregate, ClassLabels, EnsembleOutput, Forest, RowScores, TestKind, TreeEnsemble},
};
use cutover_kernels::cpu::trees::{Aggregation, Number, Place, Trees, Weights};
use cutover_tensor::DType;
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Rows whose scores a thread works on at a time.
const BLOCK_ROWS: usize = 128;
/// Features or scores of so many rows at most, unless eight rows have more.
const BLOCK_LEN: usize = 1 << 15;
/// More targets than this are left to the reference: eight rows of scores would take too much of every thread's memory.
const TARGETS_MAX: usize = 1 << 16;

pub(in crate::cpu) struct TreesStep {
    op: TreeEnsemble,
    trees: Width<Arc<Trees<f32>>, Arc<Trees<f64>>>,
    rows: usize,
    features: usize,
    x: Buffer,
    x_type: DType,
    labels: Option<Buffer>,
    scores: Buffer,
}

/// By what rows are compared in: f64 for those in f64, else f32.
enum Width<S, D> {
    Single(S),
    Double(D),
}

/// Forests that some plan holds, as the kernel wants them.
#[derive(Default)]
pub(in crate::cpu) struct Cache {
    single: Mutex<HashMap<Key, Weak<Trees<f32>>>>,
    double: Mutex<HashMap<Key, Weak<Trees<f64>>>>,
}

type Key = (Identity, usize, Aggregation);

fn get<T>(
    cache: &Mutex<HashMap<Key, Weak<Trees<T>>>>,
    key: Key,
    pack: impl FnOnce() -> Option<Trees<T>>,
) -> Option<Arc<Trees<T>>> {
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(trees) = cache.get(&key).and_then(Weak::upgrade) {
        return Some(trees);
    }
    let trees = Arc::new(pack()?);
    cache.retain(|_, trees| trees.strong_count() > 0);
    cache.insert(key, Arc::downgrade(&trees));
    Some(trees)
}

/// A number as splits are held in.
trait Split: Number + Into<f64> {
    const NAN: Self;
    const LEAST: Self;
    fn of(x: f64) -> Self;
    fn below(self) -> Self;
    fn splits(forest: &Forest) -> &[Self];
}

macro_rules! split {
    ($t:ident, $splits:ident) => {
        impl Split for $t {
            const NAN: $t = $t::NAN;
            const LEAST: $t = $t::NEG_INFINITY;
            fn of(x: f64) -> $t {
                x as $t
            }
            fn below(self) -> $t {
                self.next_down()
            }
            fn splits(forest: &Forest) -> &[$t] {
                &forest.$splits
            }
        }
    };
}
split!(f32, splits_f32);
split!(f64, splits);

/// What stands at a place to be made.
#[derive(Clone)]
enum Wanted {
    /// The same as at a slot of the forest.
    Slot(usize),
    /// Of an equality of the slot with the number, the half for what is not above it.
    NotAbove(usize, f64),
    /// Whether the slot's feature is one of some members.
    Among(usize, std::ops::Range<usize>),
}

struct Packing<'a, T> {
    forest: &'a Forest,
    places: Vec<Place<T>>,
    /// By slot of the forest what stands there, once it is known: it may stand at several places.
    known: Vec<Option<Place<T>>>,
    /// By slot of a first child where its pair is.
    pairs: Vec<Option<u32>>,
    waiting: VecDeque<(usize, Wanted)>,
}

impl<T: Split> Packing<'_, T> {
    /// Two places side by side.
    fn pair(&mut self, fails: Wanted, holds: Wanted) -> u32 {
        let at = self.places.len();
        self.places.extend([Place::Leaf { number: 0 }; 2]);
        self.waiting.extend([(at, fails), (at + 1, holds)]);
        at as u32
    }

    /// The children of `slot`.
    fn children(&mut self, slot: usize) -> u32 {
        let first = self.forest.children[slot] as usize;
        if let Some(pair) = self.pairs[first] {
            return pair;
        }
        let pair = self.pair(Wanted::Slot(first), Wanted::Slot(first + 1));
        self.pairs[first] = Some(pair);
        pair
    }

    fn place(&mut self, wanted: Wanted) -> Place<T> {
        match wanted {
            Wanted::Slot(slot) => match self.known[slot] {
                Some(place) => place,
                None => {
                    let place = self.slot(slot);
                    self.known[slot] = Some(place);
                    place
                }
            },
            Wanted::NotAbove(slot, v) => {
                let first = self.forest.children[slot] as usize;
                let child = self.pair(Wanted::Slot(first + 1), Wanted::Slot(first));
                let feature = self.forest.features[slot];
                Place::Test { feature, split: T::of(v).below(), child, nan_holds: false }
            }
            Wanted::Among(slot, members) => self.among(slot, members),
        }
    }

    fn slot(&mut self, slot: usize) -> Place<T> {
        let test = self.forest.tests[slot];
        let (feature, nan_holds) = (self.forest.features[slot], test.nan_holds);
        let split = T::splits(self.forest)[slot];
        match test.kind {
            TestKind::Leaf => Place::Leaf { number: self.forest.payloads[slot] },
            TestKind::AtMost => Place::Test { feature, split, child: self.children(slot), nan_holds },
            TestKind::Equal => self.equals(slot, split, nan_holds),
            TestKind::Member => {
                let count = self.forest.set(self.forest.payloads[slot] as usize).len();
                self.among(slot, 0..count)
            }
        }
    }

    fn equals(&mut self, slot: usize, v: T, nan_holds: bool) -> Place<T> {
        let feature = self.forest.features[slot];
        // Nothing is equal to NaN, and nothing is below the least.
        if v.partial_cmp(&v).is_none() || v == T::LEAST {
            return Place::Test { feature, split: v, child: self.children(slot), nan_holds };
        }
        let fails = Wanted::Slot(self.forest.children[slot] as usize);
        let child = self.pair(fails, Wanted::NotAbove(slot, v.into()));
        Place::Test { feature, split: v, child, nan_holds }
    }

    /// NaN, which is at most nothing, goes where the largest member is tested.
    fn among(&mut self, slot: usize, members: std::ops::Range<usize>) -> Place<T> {
        let set = self.forest.set(self.forest.payloads[slot] as usize);
        let middle = members.start + members.len() / 2;
        if members.len() <= 1 {
            // A member that no number of this width is equal to.
            let v = set.get(members.start).map(|&v| T::of(v)).filter(|&v| v.into() == set[members.start]);
            let nan_holds = self.forest.tests[slot].nan_holds && members.end == set.len();
            return self.equals(slot, v.unwrap_or(T::NAN), nan_holds);
        }
        // The last number that is not above the lower half's last member.
        let last = T::of(set[middle - 1]);
        let split = if last.into() > set[middle - 1] { last.below() } else { last };
        let feature = self.forest.features[slot];
        let child = self.pair(Wanted::Among(slot, middle..members.end), Wanted::Among(slot, members.start..middle));
        Place::Test { feature, split, child, nan_holds: false }
    }
}

/// `None` where there are too many places for the kernel.
fn pack<T: Split>(forest: &Forest, target_count: usize, aggregation: Aggregation) -> Option<Trees<T>> {
    let slots = forest.children.len();
    let equalities = forest.tests.iter().filter(|test| test.kind == TestKind::Equal).count();
    let tests_sets = forest.tests.iter().enumerate().filter(|(_, test)| test.kind == TestKind::Member);
    let tested: usize = tests_sets.map(|(slot, _)| forest.set(forest.payloads[slot] as usize).len() + 1).sum();
    let most = tested.checked_mul(6)?.checked_add(equalities.checked_mul(4)?)?.checked_add(slots)?;
    if most.checked_mul(24)? >= u32::MAX as usize || forest.weights.len() >= u32::MAX as usize {
        return None;
    }
    let longest_set = forest.set_starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let steps = match (tested > 0, equalities > 0) {
        (true, _) => 3 + longest_set.max(1).ilog2() as usize,
        (false, true) => 2,
        (false, false) => 1,
    };
    let mut packing = Packing {
        forest,
        places: Vec::with_capacity(slots),
        known: vec![None; slots],
        pairs: vec![None; slots],
        waiting: VecDeque::new(),
    };
    let mut roots = Vec::with_capacity(forest.roots.len());
    for &root in &forest.roots {
        let at = packing.places.len();
        roots.push(at as u32);
        packing.places.push(Place::Leaf { number: 0 });
        packing.waiting.push_back((at, Wanted::Slot(root as usize)));
        while let Some((at, wanted)) = packing.waiting.pop_front() {
            packing.places[at] = packing.place(wanted);
        }
    }
    let weights = Weights {
        starts: forest.leaf_starts.clone(),
        targets: forest.targets.clone(),
        weights: forest.weights.iter().map(|&weight| T::of(weight)).collect(),
        target_count,
        aggregation,
    };
    Some(Trees::new(&packing.places, &roots, forest.depth.saturating_mul(steps), T::NAN, weights))
}

/// Rows and features of `[rows, features]`, or of one row.
pub(super) fn rows_of(shape: &[usize]) -> Option<(usize, usize)> {
    match *shape {
        [features] => Some((1, features)),
        [rows, features] => Some((rows, features)),
        _ => None,
    }
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node, op: &TreeEnsemble) -> Result<bool, NoPlan> {
    let &[Some(x)] = &node.inputs[..] else { return Ok(false) };
    let x_type = builder.fact(x).dtype;
    let Some((rows, features)) = rows_of(&builder.shape(x)) else { return Ok(false) };
    let has_numbers = match &op.output {
        EnsembleOutput::Classification(classes) => matches!(classes.labels, ClassLabels::Ints(_)),
        _ => true,
    };
    let is_comparable = matches!(x_type, DType::F32 | DType::F64 | DType::I64 | DType::I32);
    if !is_comparable || !has_numbers || op.targets() > TARGETS_MAX || features < op.forest.feature_count().max(1) {
        return Ok(false);
    }
    let aggregation = match op.aggregate {
        Aggregate::Sum | Aggregate::Average => Aggregation::Sum,
        Aggregate::Min => Aggregation::Min,
        Aggregate::Max => Aggregation::Max,
    };
    let (forest, targets) = (&op.forest, op.targets());
    let (key, forests) = ((forest.identity(), targets, aggregation), &builder.device.forests);
    let trees = match x_type {
        DType::F64 => get(&forests.double, key, || pack(forest, targets, aggregation)).map(Width::Double),
        _ => get(&forests.single, key, || pack(forest, targets, aggregation)).map(Width::Single),
    };
    let Some(trees) = trees else { return Ok(false) };
    let input = builder.plain(x)?;
    let outputs = node.outputs.iter().map(|&output| builder.new_plain(output)).collect::<Result<Vec<_>, _>>()?;
    let (labels, scores) = match outputs[..] {
        [labels, scores] => (Some(labels), scores),
        [scores] if !matches!(op.output, EnsembleOutput::Classification(_)) => (None, scores),
        _ => return Ok(false),
    };
    let step = TreesStep { op: op.clone(), trees, rows, features, x: input, x_type, labels, scores };
    builder.need_workspace(step.workspace().end);
    builder.push(Lowered::Trees(step), &[input], &outputs);
    Ok(true)
}

/// Where the parts of a thread's workspace begin, in floats: those in f64 are at even places.
struct Workspace {
    scores: usize,
    converted: usize,
    seen: usize,
    end: usize,
}

impl TreesStep {
    /// Where the trees lie.
    pub fn address(&self) -> usize {
        match &self.trees {
            Width::Single(trees) => Arc::as_ptr(trees) as usize,
            Width::Double(trees) => Arc::as_ptr(trees) as usize,
        }
    }

    /// What the trees take in memory.
    pub fn bytes(&self) -> u64 {
        let bytes = match &self.trees {
            Width::Single(trees) => trees.bytes(),
            Width::Double(trees) => trees.bytes(),
        };
        bytes as u64
    }

    /// As many as are read in the time that the rows take: a row takes a tree about as long as it takes to read this much.
    pub fn bytes_read(&self) -> usize {
        const BYTES_A_TREE: usize = 128;
        self.rows.saturating_mul(self.op.forest.roots.len()).saturating_mul(BYTES_A_TREE)
    }

    /// Whether another plan holds them too.
    pub fn is_shared(&self) -> bool {
        let holders = match &self.trees {
            Width::Single(trees) => Arc::strong_count(trees),
            Width::Double(trees) => Arc::strong_count(trees),
        };
        holders > 1
    }

    fn converts(&self) -> bool {
        matches!(self.x_type, DType::I64 | DType::I32)
    }

    fn block_rows(&self) -> usize {
        let width = self.op.targets().max(if self.converts() { self.features } else { 1 });
        (BLOCK_LEN / width).clamp(8, BLOCK_ROWS).min(self.rows.max(1))
    }

    fn workspace(&self) -> Workspace {
        let (rows, targets) = (self.block_rows(), self.op.targets());
        let floats = if self.x_type == DType::F64 { 2 } else { 1 };
        let scores = 2 * targets;
        let converted = scores + (floats * rows * targets).next_multiple_of(2);
        let seen = converted + if self.converts() { rows * self.features } else { 0 };
        // Of every row of a block, and of the one that is finished.
        Workspace { scores, converted, seen, end: seen + ((rows + 1) * targets).div_ceil(4) }
    }

    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let (mine, block, at) = (worker.share(self.rows), self.block_rows(), self.workspace());
        let (row, rest) = worker.workspace[..at.end].split_at_mut(at.scores);
        let (scores, rest) = rest.split_at_mut(at.converted - at.scores);
        let (converted, seen) = rest.split_at_mut(at.seen - at.converted);
        let (row, seen) = (cast_slice_mut::<f32, f64>(row), cast_slice_mut::<f32, u8>(seen));
        let (seen, seen_of_row) = seen.split_at_mut(block * self.op.targets());
        let seen_of_row = &mut seen_of_row[..self.op.targets()];
        for start in mine.clone().step_by(block) {
            let rows = start..mine.end.min(start + block);
            match &self.trees {
                Width::Double(trees) => {
                    let scores = cast_slice_mut::<f32, f64>(scores);
                    trees.score(cast_slice(frame.bytes(self.x)), self.features, rows.clone(), scores, seen);
                    self.finish(frame, rows, scores, trees.seen(), seen, row, seen_of_row);
                }
                Width::Single(trees) => {
                    match self.convert(frame, rows.clone(), converted) {
                        true => trees.score(converted, self.features, 0..rows.len(), scores, seen),
                        false => trees.score(frame.floats(self.x), self.features, rows.clone(), scores, seen),
                    }
                    self.finish(frame, rows, scores, trees.seen(), seen, row, seen_of_row);
                }
            }
        }
    }

    /// Integers as f32.
    fn convert(&self, frame: &Frame<'_>, rows: std::ops::Range<usize>, converted: &mut [f32]) -> bool {
        let elements = rows.start * self.features..rows.end * self.features;
        super::ml::to_floats(self.x_type, frame.bytes(self.x), elements, converted)
    }

    /// Reads the scores of `rows`, and writes what they mean.
    fn finish<T: Split>(
        &self,
        frame: &Frame<'_>,
        rows: std::ops::Range<usize>,
        scores: &[T],
        known: Option<&[bool]>,
        seen: &[u8],
        row: &mut [f64],
        seen_of_row: &mut [u8],
    ) {
        let targets = self.op.targets();
        let single = self.x_type != DType::F64;
        let writes_doubles = self.op.score_dtype(self.x_type) == DType::F64;
        for (i, at) in rows.enumerate() {
            let of = i * targets..(i + 1) * targets;
            row.iter_mut().zip(&scores[of.clone()]).for_each(|(to, &score)| *to = score.into());
            match known {
                Some(known) => seen_of_row.iter_mut().zip(known).for_each(|(to, &seen)| *to = seen.into()),
                None => seen_of_row.copy_from_slice(&seen[of]),
            }
            let winner = self.op.finish(&mut RowScores { scores: row, seen: seen_of_row, single });
            if writes_doubles {
                frame.write(self.scores, at * targets * size_of::<f64>(), cast_slice(row));
            } else {
                for (target, &score) in row.iter().enumerate() {
                    let place = (at * targets + target) * size_of::<f32>();
                    frame.write(self.scores, place, &(score as f32).to_ne_bytes());
                }
            }
            if let (Some(labels), EnsembleOutput::Classification(classes)) = (self.labels, &self.op.output)
                && let ClassLabels::Ints(names) = &classes.labels
            {
                frame.write(labels, at * size_of::<i64>(), &winner.label(names).to_ne_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_graph::ops::Test;

    /// A forest of one tree in one feature: `tests` follow each other where they fail, and each leads to a leaf of its own where it holds.
    fn chain(tests: &[(TestKind, f64, bool)], sets: &[&[f64]]) -> Forest {
        let mut forest = Forest::default();
        let mut place = |kind, split: f64, nan_holds, child: u32, payload: u32| {
            forest.features.push(0);
            forest.splits.push(split);
            let narrow = split as f32;
            forest.splits_f32.push(match kind {
                TestKind::AtMost if f64::from(narrow) > split => narrow.next_down(),
                TestKind::Equal if f64::from(narrow) != split => f32::NAN,
                _ => narrow,
            });
            forest.children.push(child);
            forest.tests.push(Test { kind, nan_holds, strict: false });
            forest.payloads.push(payload);
        };
        let mut set = 0;
        let (mut at, count) = (0u32, tests.len() as u32);
        for (number, &(kind, split, nan_holds)) in tests.iter().enumerate() {
            let child = if number == 0 { 1 } else { at + 2 };
            place(kind, split, nan_holds, child, set);
            set += u32::from(kind == TestKind::Member);
            if number > 0 {
                place(TestKind::Leaf, f64::NAN, false, at + 1, number as u32 - 1);
            }
            at = child;
        }
        place(TestKind::Leaf, f64::NAN, false, at, count);
        place(TestKind::Leaf, f64::NAN, false, at + 1, count - 1);
        forest.roots.push(0);
        forest.depth = tests.len();
        forest.leaf_starts = (0..=count + 1).collect();
        forest.targets = vec![0; tests.len() + 1];
        forest.weights = (0..=count).map(f64::from).collect();
        forest.set_starts = vec![0];
        for set in sets {
            forest.members.extend(*set);
            forest.set_starts.push(forest.members.len() as u32);
        }
        forest
    }

    #[test]
    fn every_test_is_made_of_comparisons() {
        use TestKind::{AtMost, Equal, Member};
        let numbers =
            [f64::NEG_INFINITY, -1.0, -0.0, 1e-46, 0.1, f64::from(0.1f32), 3.0, 4.0, 1e300, f64::INFINITY, f64::NAN];
        let sets: [&[f64]; 2] = [&[-1.0, 0.0, 0.1, 3.0, 1e300], &[]];
        for nan_holds in [false, true] {
            for v in numbers {
                let tests = [(Equal, v, false), (Member, f64::NAN, nan_holds), (AtMost, v, false), (Equal, 4.0, true)];
                for tests in [&tests[..], &tests[1..2], &[tests[1], tests[1], tests[0]]] {
                    let forest = chain(tests, &sets);
                    let single = pack::<f32>(&forest, 1, Aggregation::Sum).unwrap();
                    let double = pack::<f64>(&forest, 1, Aggregation::Sum).unwrap();
                    for x in numbers {
                        let expected = |x: f64| forest.reach(0, &[x]).map(|(_, weight)| weight).sum::<f64>();
                        let (mut score, mut narrow) = ([0.0], [0.0]);
                        double.score(&[x], 1, 0..1, &mut score, &mut []);
                        single.score(&[x as f32], 1, 0..1, &mut narrow, &mut []);
                        assert_eq!(score[0], expected(x), "{x} in {tests:?}");
                        assert_eq!(f64::from(narrow[0]), expected(f64::from(x as f32)), "{x} in f32 in {tests:?}");
                    }
                }
            }
        }
    }
}
