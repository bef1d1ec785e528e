//! Decision trees: the leaf that every row reaches in every tree, and what the weights of those leaves come to.
//!
//! A step down a tree has no branch to predict: both children lie side by side, and the outcome of the test is added to where the first is.
//! [`LANES`] rows (or, of few rows, trees) go down together, so that one waits for memory while the others compute. A step is four loads of
//! four different places a lane; gathering them into vectors takes as many, so there are no vectors here and no rung of the ladder.
//!
//! Deliberately absent: other tests than `x ≤ split`, which every other one can be made of, and what is done with the scores.

use std::ops::Range;

/// Rows, or trees, that go down together.
const LANES: usize = 8;
/// Steps between two looks whether all have arrived.
const STRIDE: usize = 4;
/// Fewer rows than this go down several trees at once, each by itself.
const ROWS_MIN: usize = 4;

/// f32 or f64: what features, splits and weights are held and added in.
pub trait Number: Copy + PartialOrd + std::ops::Add<Output = Self> + Default + Send + Sync + 'static {}
impl Number for f32 {}
impl Number for f64 {}

/// A place in a tree, as [`Trees::new`] takes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place<T> {
    /// Rows whose feature is at most `split` go on at place `child + 1`, the others at `child`; NaN where it says.
    Test {
        feature: u32,
        split: T,
        child: u32,
        nan_holds: bool,
    },
    Leaf {
        number: u32,
    },
}

/// How the weights of the leaves that a row reaches become the score of their target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aggregation {
    Sum,
    Min,
    Max,
}

/// The weights of leaves: leaf `i` has those from `starts[i]` up to `starts[i + 1]`.
#[derive(Clone, Debug)]
pub struct Weights<T> {
    pub starts: Vec<u32>,
    /// The target of each.
    pub targets: Vec<u32>,
    pub weights: Vec<T>,
    /// Number of targets.
    pub target_count: usize,
    pub aggregation: Aggregation,
}

/// Trees over one numbering of places and leaves.
#[derive(Clone, Debug)]
pub struct Trees<T> {
    nodes: Vec<Node<T>>,
    /// Byte offsets of the trees' first places.
    roots: Vec<u32>,
    /// Most steps to a leaf.
    depth: usize,
    feature_count: usize,
    /// Some test holds for NaN.
    tests_nan: bool,
    weights: Weights<T>,
    form: Form,
    /// Whether some leaf on a row's way has a weight for the target, where that is so for every row or none.
    seen: Option<Vec<bool>>,
}

/// What leaves look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// One weight each.
    Single,
    /// One weight for every target each, in their order.
    Dense,
    Any,
}

/// A place as rows pass it. A leaf's test fails for everything, and its child is itself.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Node<T> {
    split: T,
    feature: u32,
    /// Byte offset.
    child: u32,
    /// Whether NaN holds in the lowest bit; of a leaf its number in the others.
    tag: u32,
}

impl<T> Node<T> {
    const BYTES: u32 = size_of::<Self>() as u32;
}

impl<T: Number> Trees<T> {
    /// `nan` is NaN, `depth` the most steps from a root to a leaf.
    ///
    /// # Panics
    /// If a child, a leaf, a target or the number of weights is out of range, or there are more places than 32 bits can address.
    pub fn new(places: &[Place<T>], roots: &[u32], depth: usize, nan: T, weights: Weights<T>) -> Trees<T> {
        let bytes = places.len().checked_mul(size_of::<Node<T>>()).filter(|&bytes| bytes < u32::MAX as usize);
        assert!(bytes.is_some(), "{} places", places.len());
        let leaves = weights.starts.len() - 1;
        assert!(leaves < 1 << 31, "{leaves} leaves");
        assert!(weights.starts.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(weights.starts[leaves] as usize == weights.weights.len());
        assert!(weights.targets.len() == weights.weights.len());
        assert!(weights.targets.iter().all(|&target| (target as usize) < weights.target_count));
        assert!(roots.iter().all(|&root| (root as usize) < places.len()));
        let (mut feature_count, mut tests_nan) = (0, false);
        let node = |(at, place): (usize, &Place<T>)| match *place {
            Place::Leaf { number } => {
                assert!((number as usize) < leaves, "leaf {number} of {leaves}");
                Node { split: nan, feature: 0, child: at as u32 * Node::<T>::BYTES, tag: number << 1 }
            }
            Place::Test { feature, split, child, nan_holds } => {
                assert!((child as usize) + 1 < places.len(), "child {child} of {} places", places.len());
                feature_count = feature_count.max(feature as usize + 1);
                tests_nan |= nan_holds;
                Node { split, feature, child: child * Node::<T>::BYTES, tag: u32::from(nan_holds) }
            }
        };
        let nodes = places.iter().enumerate().map(node).collect();
        let form = form(&weights);
        let seen = seen(places, roots, &weights, form);
        let roots = roots.iter().map(|&root| root * Node::<T>::BYTES).collect();
        // A leaf tests feature 0.
        let feature_count = feature_count.max(1);
        Trees { nodes, roots, depth, feature_count, tests_nan, weights, form, seen }
    }

    /// Features that a row must have.
    pub fn feature_count(&self) -> usize {
        self.feature_count
    }

    /// Whether a row reaches a leaf with a weight for each target; `None` where that is not the same for every row.
    pub fn seen(&self) -> Option<&[bool]> {
        self.seen.as_deref()
    }

    /// What it takes in memory.
    pub fn bytes(&self) -> usize {
        let weights = size_of_val(&*self.weights.weights) + size_of_val(&*self.weights.targets);
        size_of_val(&*self.nodes) + size_of_val(&*self.roots) + size_of_val(&*self.weights.starts) + weights
    }

    /// The scores of `rows` of `x` (`[n, features]`): `[rows, targets]`. `seen`, as long where [`Trees::seen`] is `None`, says which targets
    /// had a weight (1, else 0); otherwise it is not looked at. Trees are added in their order, so that a row's scores depend on nothing but the row.
    pub fn score(&self, x: &[T], features: usize, rows: Range<usize>, scores: &mut [T], seen: &mut [u8]) {
        let targets = self.weights.target_count;
        assert!(features >= self.feature_count && x.len() >= rows.end * features, "{rows:?} of {features} features");
        assert!(scores.len() >= rows.len() * targets);
        assert!(self.seen.is_some() || seen.len() >= rows.len() * targets);
        scores[..rows.len() * targets].fill(T::default());
        if self.seen.is_none() {
            seen[..rows.len() * targets].fill(0);
        }
        // SAFETY: the rows are inside `x`, and have the features that nodes test.
        unsafe {
            match self.tests_nan {
                true => self.score_all::<true>(x, features, rows, scores, seen),
                false => self.score_all::<false>(x, features, rows, scores, seen),
            }
        }
    }

    /// # Safety
    /// `rows` of `features` are in `x`, and nodes test no other features.
    unsafe fn score_all<const NAN: bool>(
        &self,
        x: &[T],
        features: usize,
        rows: Range<usize>,
        scores: &mut [T],
        seen: &mut [u8],
    ) {
        let count = rows.len();
        // SAFETY: the caller; of a last row that is there again nothing is kept.
        let row = |i: usize| unsafe { x.as_ptr().add((rows.start + i.min(count - 1)) * features) };
        if count < ROWS_MIN {
            for i in 0..count {
                for (first, roots) in self.roots.chunks(LANES).enumerate() {
                    let at = std::array::from_fn(|lane| roots[lane.min(roots.len() - 1)]);
                    // SAFETY: the caller.
                    let leaves = unsafe { self.reach::<NAN>(at, [row(i); LANES]) };
                    for (lane, &leaf) in leaves[..roots.len()].iter().enumerate() {
                        self.take(leaf, first == 0 && lane == 0, i, scores, seen);
                    }
                }
            }
            return;
        }
        for (tree, &root) in self.roots.iter().enumerate() {
            for start in (0..count).step_by(LANES) {
                // SAFETY: the caller.
                let leaves = unsafe { self.reach::<NAN>([root; LANES], std::array::from_fn(|lane| row(start + lane))) };
                for (lane, &leaf) in leaves[..LANES.min(count - start)].iter().enumerate() {
                    self.take(leaf, tree == 0, start + lane, scores, seen);
                }
            }
        }
    }

    /// The leaves that `rows` reach from the places `at` (byte offsets).
    ///
    /// # Safety
    /// Each row has the features that nodes test; each offset is a node's.
    #[inline(always)]
    unsafe fn reach<const NAN: bool>(&self, mut at: [u32; LANES], rows: [*const T; LANES]) -> [u32; LANES] {
        let nodes = self.nodes.as_ptr().cast::<u8>();
        for _ in 0..self.depth.div_ceil(STRIDE) {
            let before = at;
            for _ in 0..STRIDE {
                for lane in 0..LANES {
                    // SAFETY: offsets are of nodes: roots, and children, which `new` checked.
                    let node = unsafe { &*nodes.add(at[lane] as usize).cast::<Node<T>>() };
                    // SAFETY: the caller.
                    let x = unsafe { *rows[lane].add(node.feature as usize) };
                    let mut holds = u32::from(x <= node.split);
                    if NAN {
                        holds |= u32::from(x.partial_cmp(&x).is_none()) & node.tag;
                    }
                    at[lane] = node.child + holds * Node::<T>::BYTES;
                }
            }
            if at == before {
                break;
            }
        }
        // SAFETY: as above.
        at.map(|at| unsafe { (*nodes.add(at as usize).cast::<Node<T>>()).tag >> 1 })
    }

    /// Adds the weights of `leaf` to the scores of row `i`.
    #[inline(always)]
    fn take(&self, leaf: u32, is_first: bool, i: usize, scores: &mut [T], seen: &mut [u8]) {
        let Weights { starts, targets, weights, target_count, aggregation } = &self.weights;
        let (leaf, scores) = (leaf as usize, &mut scores[i * target_count..][..*target_count]);
        match (self.form, aggregation) {
            (Form::Single, Aggregation::Sum) if self.seen.is_some() => {
                let target = targets[leaf] as usize;
                scores[target] = scores[target] + weights[leaf];
            }
            (Form::Dense, Aggregation::Sum) => {
                for (score, &weight) in scores.iter_mut().zip(&weights[leaf * target_count..][..*target_count]) {
                    *score = *score + weight;
                }
            }
            (Form::Dense, _) => {
                for (score, &weight) in scores.iter_mut().zip(&weights[leaf * target_count..][..*target_count]) {
                    *score = aggregation.join(*score, weight, is_first);
                }
            }
            _ => {
                let of = starts[leaf] as usize..starts[leaf + 1] as usize;
                for (&target, &weight) in targets[of.clone()].iter().zip(&weights[of]) {
                    let target = target as usize;
                    let is_new = match seen.get_mut(i * target_count + target) {
                        Some(seen) => std::mem::replace(seen, 1) == 0,
                        None => is_first,
                    };
                    scores[target] = aggregation.join(scores[target], weight, is_new);
                }
            }
        }
    }
}

impl Aggregation {
    #[inline(always)]
    fn join<T: Number>(self, score: T, weight: T, is_first: bool) -> T {
        match self {
            Aggregation::Sum => score + weight,
            _ if is_first => weight,
            Aggregation::Min if weight < score => weight,
            Aggregation::Max if weight > score => weight,
            _ => score,
        }
    }
}

fn form<T>(weights: &Weights<T>) -> Form {
    let Weights { starts, targets, target_count, .. } = weights;
    if starts.iter().enumerate().all(|(leaf, &start)| start as usize == leaf) {
        return Form::Single;
    }
    let in_order = |(i, &target): (usize, &u32)| target as usize == i % target_count;
    let is_dense = starts.iter().enumerate().all(|(leaf, &start)| start as usize == leaf * target_count)
        && targets.iter().enumerate().all(in_order);
    if is_dense { Form::Dense } else { Form::Any }
}

/// For each target whether every row sees a weight for it, if none else sees one: a tree all of whose leaves have one is enough.
fn seen<T>(places: &[Place<T>], roots: &[u32], weights: &Weights<T>, form: Form) -> Option<Vec<bool>> {
    let Weights { starts, targets, target_count, aggregation, .. } = weights;
    // Extremes need to know which weight of a target is the first, which is plain where all leaves have the same.
    let is_plain = form == Form::Dense || form == Form::Single && *target_count == 1;
    if *aggregation != Aggregation::Sum && !is_plain {
        return None;
    }
    let mut ever = vec![false; *target_count];
    targets.iter().for_each(|&target| ever[target as usize] = true);
    let mut always = vec![false; *target_count];
    let mut visited = vec![u32::MAX; places.len()];
    // By target the leaves of a tree that have a weight for it, and which of them was the last: one may have several.
    let mut counts = vec![(0usize, u32::MAX); *target_count];
    let (mut waiting, mut touched) = (Vec::new(), Vec::new());
    for (tree, &root) in roots.iter().enumerate() {
        let mut leaves = 0;
        waiting.push(root as usize);
        while let Some(at) = waiting.pop() {
            if std::mem::replace(&mut visited[at], tree as u32) == tree as u32 {
                continue;
            }
            match places[at] {
                Place::Test { child, .. } => waiting.extend([child as usize, child as usize + 1]),
                Place::Leaf { number } => {
                    leaves += 1;
                    let of = starts[number as usize] as usize..starts[number as usize + 1] as usize;
                    for &target in &targets[of] {
                        let (count, last) = &mut counts[target as usize];
                        // By its place: a leaf of one number may stand at several.
                        if std::mem::replace(last, at as u32) != at as u32 || *count == 0 {
                            touched.extend((*count == 0).then_some(target as usize));
                            *count += 1;
                        }
                    }
                }
            }
        }
        for target in touched.drain(..) {
            always[target] |= counts[target].0 == leaves;
            counts[target].0 = 0;
        }
    }
    (always == ever).then_some(always)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Random;
    use super::*;

    fn odd_number(random: &mut Random) -> f32 {
        let usual = random.unit();
        random.pick(&[usual, usual, 0.0, f32::INFINITY, f32::NAN])
    }

    /// Trees of random shapes, each as a list of places in the order in which they were made.
    fn random_trees(random: &mut Random, trees: usize, features: usize) -> (Vec<Place<f32>>, Vec<u32>, usize, u32) {
        let (mut places, mut roots, mut deepest, mut leaves) = (Vec::new(), Vec::new(), 0, 0);
        for _ in 0..trees {
            roots.push(places.len() as u32);
            places.push(Place::Leaf { number: 0 });
            let mut open = vec![(places.len() - 1, 0)];
            while let Some((at, depth)) = open.pop() {
                if depth < random.between(0, 12) {
                    let child = places.len();
                    places.extend([Place::Leaf { number: 0 }; 2]);
                    places[at] = Place::Test {
                        feature: random.between(0, features - 1) as u32,
                        split: odd_number(random),
                        child: child as u32,
                        nan_holds: random.between(0, 3) == 0,
                    };
                    open.extend([(child, depth + 1), (child + 1, depth + 1)]);
                    deepest = deepest.max(depth + 1);
                } else {
                    places[at] = Place::Leaf { number: leaves };
                    leaves += 1;
                }
            }
        }
        (places, roots, deepest, leaves)
    }

    fn reach(places: &[Place<f32>], root: u32, row: &[f32]) -> usize {
        let mut at = root as usize;
        loop {
            match places[at] {
                Place::Leaf { number } => return number as usize,
                Place::Test { feature, split, child, nan_holds } => {
                    let x = row[feature as usize];
                    at = child as usize + usize::from(x <= split || x.is_nan() && nan_holds);
                }
            }
        }
    }

    #[test]
    fn every_row_gets_the_weights_of_its_leaves_whatever_the_batch() {
        let mut random = Random::new(1);
        for (round, form) in [Form::Single, Form::Dense, Form::Any].into_iter().cycle().take(60).enumerate() {
            let (features, target_count) = (random.between(1, 9), random.between(1, 4));
            let tree_count = random.between(0, 21);
            let (places, roots, depth, leaves) = random_trees(&mut random, tree_count, features);
            let (mut starts, mut targets) = (vec![0], Vec::new());
            for _ in 0..leaves {
                match form {
                    Form::Single => targets.push(random.between(0, target_count - 1) as u32),
                    Form::Dense => targets.extend(0..target_count as u32),
                    Form::Any => targets.extend((0..target_count as u32).filter(|_| random.between(0, 2) > 0)),
                }
                starts.push(targets.len() as u32);
            }
            let aggregation = random.pick(&[Aggregation::Sum, Aggregation::Min, Aggregation::Max]);
            let weights = random.units(targets.len());
            let weights = Weights { starts, targets, weights, target_count, aggregation };
            let trees = Trees::new(&places, &roots, depth, f32::NAN, weights.clone());
            let rows = random.between(1, 40);
            let x: Vec<f32> = (0..rows * features).map(|_| odd_number(&mut random)).collect();
            let (mut expected, mut saw) = (vec![0f32; rows * target_count], vec![false; rows * target_count]);
            for (i, row) in x.chunks(features).enumerate() {
                for &root in &roots {
                    let leaf = reach(&places, root, row);
                    for at in weights.starts[leaf] as usize..weights.starts[leaf + 1] as usize {
                        let target = i * target_count + weights.targets[at] as usize;
                        let is_first = !std::mem::replace(&mut saw[target], true);
                        expected[target] = aggregation.join(expected[target], weights.weights[at], is_first);
                    }
                }
            }
            for range in [0..rows, 0..1, rows / 2..rows, rows..rows] {
                let len = range.len() * target_count;
                let (mut scores, mut seen) = (vec![9f32; len], vec![1u8; len]);
                trees.score(&x, features.max(1), range.clone(), &mut scores, &mut seen);
                let of = range.start * target_count..range.end * target_count;
                assert_eq!(scores, expected[of.clone()], "round {round}, {form:?}, {aggregation:?}, {range:?}");
                let known: Vec<bool> = match trees.seen() {
                    Some(known) => (0..range.len()).flat_map(|_| known.to_vec()).collect(),
                    None => seen.into_iter().map(|seen| seen != 0).collect(),
                };
                assert_eq!(known, saw[of], "round {round}, {form:?}, {aggregation:?}, {range:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "child 1 of 2 places")]
    fn a_child_outside_is_refused() {
        let places = [Place::Test { feature: 0, split: 0f32, child: 1, nan_holds: false }, Place::Leaf { number: 0 }];
        let weights = Weights {
            starts: vec![0, 0],
            targets: vec![],
            weights: vec![],
            target_count: 1,
            aggregation: Aggregation::Sum,
        };
        Trees::new(&places, &[0], 1, f32::NAN, weights);
    }
}
