//! Decision trees as they are evaluated: every form that ONNX spells them in becomes one layout, made once at import.
//!
//! The two children of a node lie side by side, so that a step is `child + test`, and a leaf is its own child: a row may
//! take more steps than its path is long. Tests are turned round until each is one of `x ≤ split`, `x = split` and
//! `x ∈ set`. Nodes of a tree come breadth-first. A node with several parents (LightGBM's converter writes sets that way) is a
//! record beside each of its siblings, over one pair of children.

use crate::Identity;
use cutover_tensor::{Element, Tensor};
use std::{collections::VecDeque, sync::OnceLock};

/// Longest path from a root to a leaf.
const DEPTH_LIMIT: usize = 1 << 16;
/// Slots, leaves and features are numbered in 32 bits.
const COUNT_LIMIT: usize = 1 << 31;

/// Trees over one numbering of slots.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    /// By slot: the feature that a node tests; 0 for a leaf.
    pub features: Vec<u32>,
    /// By slot: what the feature is compared with; NaN for a leaf and for a set.
    pub splits: Vec<f64>,
    /// `splits` for rows in f32, with the same outcome for every f32 (and so no greater than in f64).
    pub splits_f32: Vec<f32>,
    /// By slot: where the row goes if the test fails; the slot after it if it holds. A leaf's is itself.
    pub children: Vec<u32>,
    /// By slot: how it tests.
    pub tests: Vec<Test>,
    /// By slot: of a leaf its number, of a node that tests for a set the set's.
    pub payloads: Vec<u32>,
    /// The slot of every tree's root.
    pub roots: Vec<u32>,
    /// Where the weights of each leaf begin, and where those of the last end.
    pub leaf_starts: Vec<u32>,
    /// The target of each weight.
    pub targets: Vec<u32>,
    pub weights: Vec<f64>,
    /// Where the members of each set begin, and where those of the last end.
    pub set_starts: Vec<u32>,
    /// Ascending in each set.
    pub members: Vec<f64>,
    /// Most steps from a root to a leaf.
    pub depth: usize,
    identity: OnceLock<Identity>,
}

/// How a node tests its feature `x`, and where NaN goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub kind: TestKind,
    /// NaN is taken as if the test held.
    pub nan_holds: bool,
    /// The file says `x < t`: the split is the number before `t`.
    pub strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestKind {
    Leaf,
    AtMost,
    Equal,
    Member,
}

/// A node's test as files spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    AtMost,
    Below,
    AtLeast,
    Above,
    Equal,
    NotEqual,
    Member,
}

/// In the order of their codes.
pub(super) const MODES: [(Mode, &str); 7] = [
    (Mode::AtMost, "BRANCH_LEQ"),
    (Mode::Below, "BRANCH_LT"),
    (Mode::AtLeast, "BRANCH_GTE"),
    (Mode::Above, "BRANCH_GT"),
    (Mode::Equal, "BRANCH_EQ"),
    (Mode::NotEqual, "BRANCH_NEQ"),
    (Mode::Member, "BRANCH_MEMBER"),
];

/// Where a branch leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Node(usize),
    Leaf(usize),
}

/// A node as files have it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Branch {
    pub feature: usize,
    pub mode: Mode,
    pub split: f64,
    /// NaN goes where the test holds.
    pub missing_holds: bool,
    pub holds: Target,
    pub fails: Target,
    /// Of a node that tests for one.
    pub set: usize,
}

/// Trees as files have them; every target in range.
#[derive(Clone, Debug, Default)]
pub(super) struct Source {
    pub branches: Vec<Branch>,
    /// `(target, weight)` of every leaf.
    pub leaves: Vec<Vec<(u32, f64)>>,
    pub sets: Vec<Vec<f64>>,
    pub roots: Vec<Target>,
}

const LEAF: Test = Test { kind: TestKind::Leaf, nan_holds: false, strict: false };
const UNPLACED: u32 = u32::MAX;

impl Forest {
    /// # Errors
    /// A cycle; a path or a number of nodes above the limits.
    pub(super) fn lay_out(source: &Source) -> Result<Forest, String> {
        let slots = source.branches.len().checked_mul(2).and_then(|n| n.checked_add(source.roots.len()));
        let weights: usize = source.leaves.iter().map(Vec::len).sum();
        if slots.is_none_or(|n| n >= COUNT_LIMIT) || weights >= COUNT_LIMIT || source.leaves.len() >= COUNT_LIMIT {
            return Err(format!("has {} nodes, above the limit of {COUNT_LIMIT}", source.branches.len()));
        }
        let mut forest =
            Forest { depth: depth(source)?, leaf_starts: vec![0], set_starts: vec![0], ..Forest::default() };
        let mut pairs = vec![UNPLACED; source.branches.len()];
        let mut leaves = vec![UNPLACED; source.leaves.len()];
        let mut sets = vec![UNPLACED; source.sets.len()];
        let mut waiting = VecDeque::new();
        for &root in &source.roots {
            let slot = forest.grow(1);
            forest.roots.push(slot as u32);
            waiting.push_back((slot, root));
            while let Some((slot, target)) = waiting.pop_front() {
                match target {
                    Target::Leaf(leaf) => {
                        if leaves[leaf] == UNPLACED {
                            leaves[leaf] = forest.leaf_starts.len() as u32 - 1;
                            forest.targets.extend(source.leaves[leaf].iter().map(|(target, _)| target));
                            forest.weights.extend(source.leaves[leaf].iter().map(|(_, weight)| weight));
                            forest.leaf_starts.push(forest.weights.len() as u32);
                        }
                        forest.payloads[slot] = leaves[leaf];
                        forest.children[slot] = slot as u32;
                    }
                    Target::Node(node) => {
                        let branch = &source.branches[node];
                        let (test, split, swapped) = canonical(branch);
                        if pairs[node] == UNPLACED {
                            let pair = forest.grow(2);
                            pairs[node] = pair as u32;
                            let (first, second) = match swapped {
                                false => (branch.fails, branch.holds),
                                true => (branch.holds, branch.fails),
                            };
                            waiting.extend([(pair, first), (pair + 1, second)]);
                        }
                        if branch.mode == Mode::Member && sets[branch.set] == UNPLACED {
                            sets[branch.set] = forest.set_starts.len() as u32 - 1;
                            forest.members.extend(&source.sets[branch.set]);
                            let start = forest.set_starts[forest.set_starts.len() - 1] as usize;
                            forest.members[start..].sort_by(f64::total_cmp);
                            forest.set_starts.push(forest.members.len() as u32);
                        }
                        if branch.mode == Mode::Member {
                            forest.payloads[slot] = sets[branch.set];
                        }
                        forest.features[slot] = branch.feature as u32;
                        forest.splits[slot] = split;
                        forest.splits_f32[slot] = narrow(test.kind, split);
                        forest.children[slot] = pairs[node];
                        forest.tests[slot] = test;
                    }
                }
            }
        }
        Ok(forest)
    }

    /// The key under which what is made of the layout can be shared.
    pub fn identity(&self) -> Identity {
        fn of<T: Element>(values: &[T]) -> Identity {
            let tensor = Tensor::from_vec([values.len()], values.to_vec());
            Identity::of_tensor(&tensor.expect("as many values as the shape has elements"))
        }
        *self.identity.get_or_init(|| {
            let test = |test: &Test| test.kind as u8 | u8::from(test.nan_holds) << 2;
            let tests: Vec<u8> = self.tests.iter().map(test).collect();
            let counts =
                [&self.features, &self.children, &self.payloads, &self.roots, &self.leaf_starts, &self.targets];
            let counts = counts.into_iter().chain([&self.set_starts]).map(|counts| of(counts));
            let numbers = [&self.splits, &self.weights, &self.members].into_iter().map(|numbers| of(numbers));
            Identity::derived("forest", &counts.chain(numbers).chain([of(&tests)]).collect::<Vec<_>>())
        })
    }

    /// The members of a set, ascending.
    pub fn set(&self, set: usize) -> &[f64] {
        &self.members[self.set_starts[set] as usize..self.set_starts[set + 1] as usize]
    }

    fn grow(&mut self, count: usize) -> usize {
        let first = self.children.len();
        let slots = first + count;
        self.features.resize(slots, 0);
        self.splits.resize(slots, f64::NAN);
        self.splits_f32.resize(slots, f32::NAN);
        self.children.resize(slots, 0);
        self.tests.resize(slots, LEAF);
        self.payloads.resize(slots, 0);
        first
    }

    /// What the layout was made from: a node for every pair of children, in the order of the pairs.
    pub(super) fn source(&self) -> Source {
        let mut node_of_pair = vec![UNPLACED; self.children.len()];
        let mut placed = Vec::new();
        for slot in 0..self.children.len() {
            let pair = self.children[slot] as usize;
            if self.tests[slot].kind != TestKind::Leaf && node_of_pair[pair] == UNPLACED {
                node_of_pair[pair] = placed.len() as u32;
                placed.push(slot);
            }
        }
        let target = |slot: usize| match self.tests[slot].kind {
            TestKind::Leaf => Target::Leaf(self.payloads[slot] as usize),
            _ => Target::Node(node_of_pair[self.children[slot] as usize] as usize),
        };
        let branch = |&slot: &usize| {
            let (test, pair) = (self.tests[slot], self.children[slot] as usize);
            let (mode, split) = match test.kind {
                TestKind::AtMost if test.strict => (Mode::Below, self.splits[slot].next_up()),
                TestKind::Equal => (Mode::Equal, self.splits[slot]),
                TestKind::Member => (Mode::Member, 0.0),
                _ => (Mode::AtMost, self.splits[slot]),
            };
            let (fails, holds) = (target(pair), target(pair + 1));
            let (feature, set) = (self.features[slot] as usize, self.payloads[slot] as usize);
            Branch { feature, mode, split, missing_holds: test.nan_holds, holds, fails, set }
        };
        let leaf = |range: &[u32]| self.leaf_weights(range[0] as usize..range[1] as usize).collect();
        let set = |range: &[u32]| self.members[range[0] as usize..range[1] as usize].to_vec();
        Source {
            branches: placed.iter().map(branch).collect(),
            leaves: self.leaf_starts.windows(2).map(leaf).collect(),
            sets: self.set_starts.windows(2).map(set).collect(),
            roots: self.roots.iter().map(|&root| target(root as usize)).collect(),
        }
    }

    fn leaf_weights(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = (u32, f64)> + '_ {
        self.targets[range.clone()].iter().copied().zip(self.weights[range].iter().copied())
    }

    /// The `(target, weight)` pairs of the leaf that `row` reaches from `root`.
    pub fn reach(&self, root: u32, row: &[f64]) -> impl Iterator<Item = (u32, f64)> + '_ {
        let mut slot = root as usize;
        while self.tests[slot].kind != TestKind::Leaf {
            slot = self.children[slot] as usize + usize::from(self.holds(slot, row[self.features[slot] as usize]));
        }
        let leaf = self.payloads[slot] as usize;
        self.leaf_weights(self.leaf_starts[leaf] as usize..self.leaf_starts[leaf + 1] as usize)
    }

    /// Whether the test at `slot` holds for `x`.
    pub fn holds(&self, slot: usize, x: f64) -> bool {
        let test = self.tests[slot];
        if x.is_nan() {
            return test.nan_holds;
        }
        match test.kind {
            TestKind::Leaf => false,
            TestKind::AtMost => x <= self.splits[slot],
            TestKind::Equal => x == self.splits[slot],
            TestKind::Member => {
                let members = self.set(self.payloads[slot] as usize);
                let at = members.partition_point(|&m| m < x);
                members.get(at) == Some(&x)
            }
        }
    }

    /// Features that a row must have.
    pub fn feature_count(&self) -> usize {
        self.features.iter().max().map_or(0, |&feature| feature as usize + 1)
    }
}

/// Equal bits, so that a layout equals itself: the splits of leaves are NaN.
impl PartialEq for Forest {
    fn eq(&self, other: &Forest) -> bool {
        let bits =
            |v: &[f64], w: &[f64]| v.len() == w.len() && v.iter().zip(w).all(|(a, b)| a.to_bits() == b.to_bits());
        self.features == other.features
            && bits(&self.splits, &other.splits)
            && self.children == other.children
            && self.tests == other.tests
            && self.payloads == other.payloads
            && self.roots == other.roots
            && self.leaf_starts == other.leaf_starts
            && self.targets == other.targets
            && bits(&self.weights, &other.weights)
            && self.set_starts == other.set_starts
            && bits(&self.members, &other.members)
    }
}

/// The test of a branch as one of the layout's, its split, and whether it holds where the branch's fails.
fn canonical(branch: &Branch) -> (Test, f64, bool) {
    let (split, missing) = (branch.split, branch.missing_holds);
    let below = if split == f64::NEG_INFINITY { f64::NAN } else { split.next_down() };
    let test = |kind, nan_holds, strict| Test { kind, nan_holds, strict };
    match branch.mode {
        Mode::AtMost => (test(TestKind::AtMost, missing, false), split, false),
        Mode::Below => (test(TestKind::AtMost, missing, true), below, false),
        // Nothing is above or at least NaN: `x ≤ ∞` always holds, and the branch fails.
        Mode::Above | Mode::AtLeast if split.is_nan() => (test(TestKind::AtMost, !missing, false), f64::INFINITY, true),
        Mode::Above => (test(TestKind::AtMost, !missing, false), split, true),
        Mode::AtLeast => (test(TestKind::AtMost, !missing, true), below, true),
        Mode::Equal => (test(TestKind::Equal, missing, false), split, false),
        // NaN differs from everything.
        Mode::NotEqual => (test(TestKind::Equal, false, false), split, true),
        Mode::Member => (test(TestKind::Member, missing, false), f64::NAN, false),
    }
}

/// The f32 that every f32 compares with as with `split`.
fn narrow(kind: TestKind, split: f64) -> f32 {
    let nearest = split as f32;
    match kind {
        TestKind::AtMost if f64::from(nearest) > split => nearest.next_down(),
        TestKind::Equal if f64::from(nearest) != split => f32::NAN,
        _ => nearest,
    }
}

/// The longest path, which a cycle has none of.
fn depth(source: &Source) -> Result<usize, String> {
    const NEW: u32 = u32::MAX;
    const OPEN: u32 = u32::MAX - 1;
    let mut depths = vec![NEW; source.branches.len()];
    let mut path = Vec::new();
    let mut longest = 0;
    for &root in &source.roots {
        let Target::Node(root) = root else { continue };
        path.push(root);
        while let Some(&node) = path.last() {
            let children = [source.branches[node].fails, source.branches[node].holds];
            let inner = children.iter().filter_map(|child| if let Target::Node(n) = child { Some(*n) } else { None });
            if depths[node] == NEW {
                depths[node] = OPEN;
                for child in inner {
                    match depths[child] {
                        NEW => path.push(child),
                        OPEN => return Err("has a cycle: a node leads back to itself".to_string()),
                        _ => {}
                    }
                }
                continue;
            }
            path.pop();
            if depths[node] == OPEN {
                let deepest = inner.map(|child| depths[child]).max().unwrap_or(0);
                depths[node] = deepest + 1;
                longest = longest.max(deepest as usize + 1);
            }
        }
    }
    match longest > DEPTH_LIMIT {
        true => Err(format!("has a path of {longest} nodes, above the limit of {DEPTH_LIMIT}")),
        false => Ok(longest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(mode: Mode, split: f64, missing_holds: bool) -> Branch {
        let (holds, fails) = (Target::Leaf(1), Target::Leaf(0));
        Branch { feature: 0, mode, split, missing_holds, holds, fails, set: 0 }
    }

    fn forest(branches: Vec<Branch>) -> Result<Forest, String> {
        let leaves = vec![vec![(0, 0.0)], vec![(0, 1.0)]];
        let sets = vec![vec![3.0, -1.0, 0.0]];
        Forest::lay_out(&Source { branches, leaves, sets, roots: vec![Target::Node(0)] })
    }

    #[test]
    fn every_mode_takes_the_branch_it_says_in_both_widths() {
        let numbers =
            [f64::NEG_INFINITY, -1.0, -0.0, 0.0, 1e-46, 0.1, f64::from(0.1f32), 3.0, 1e300, f64::INFINITY, f64::NAN];
        for (mode, split) in MODES.iter().flat_map(|(mode, _)| numbers.map(|split| (*mode, split))) {
            for missing in [false, true] {
                let forest = forest(vec![branch(mode, split, missing)]).unwrap();
                for x in numbers.map(|x| x as f32) {
                    let wide = f64::from(x);
                    let expected = x.is_nan() && missing
                        || match mode {
                            Mode::AtMost => wide <= split,
                            Mode::Below => wide < split,
                            Mode::AtLeast => wide >= split,
                            Mode::Above => wide > split,
                            Mode::Equal => wide == split,
                            Mode::NotEqual => wide != split,
                            Mode::Member => [3.0, -1.0, 0.0].contains(&wide),
                        };
                    let reached: Vec<_> = forest.reach(0, &[wide]).collect();
                    assert_eq!(
                        reached,
                        [(0, f64::from(u8::from(expected)))],
                        "{x} {mode:?} {split}, missing {missing}"
                    );
                    let narrow = match forest.tests[0].kind {
                        TestKind::AtMost => x <= forest.splits_f32[0],
                        TestKind::Equal => x == forest.splits_f32[0],
                        _ => continue,
                    };
                    assert!(x.is_nan() || narrow == forest.holds(0, wide), "{x} {mode:?} {split} in f32");
                }
                assert_eq!(Forest::lay_out(&forest.source()).unwrap(), forest, "{mode:?} {split}");
            }
        }
    }

    #[test]
    fn shared_nodes_stay_shared_and_cycles_are_refused() {
        // A ladder whose rungs both lead to the next: 2^40 paths, 41 nodes.
        let rung = |i: usize| Branch {
            holds: Target::Node(i + 1),
            fails: Target::Node(i + 1),
            ..branch(Mode::AtMost, i as f64, false)
        };
        let mut ladder: Vec<Branch> = (0..40).map(rung).collect();
        ladder.push(branch(Mode::AtMost, 0.0, false));
        let laid_out = forest(ladder.clone()).unwrap();
        assert_eq!((laid_out.children.len(), laid_out.depth), (83, 41));
        assert_eq!(Forest::lay_out(&laid_out.source()).unwrap(), laid_out);
        ladder[40].fails = Target::Node(7);
        assert!(forest(ladder).unwrap_err().contains("cycle"));
        let itself = Branch { holds: Target::Node(0), ..branch(Mode::AtMost, 0.0, false) };
        assert!(forest(vec![itself]).unwrap_err().contains("cycle"));
    }

    #[test]
    fn long_paths_are_refused_without_recursion() {
        let link = |i: usize| Branch { fails: Target::Node(i + 1), ..branch(Mode::Equal, i as f64, false) };
        let mut chain: Vec<Branch> = (0..DEPTH_LIMIT).map(link).collect();
        chain.push(branch(Mode::Equal, 0.0, false));
        assert!(forest(chain).unwrap_err().contains("above the limit"));
    }
}
