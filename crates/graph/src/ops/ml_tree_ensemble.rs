//! Ensembles of decision trees: `TreeEnsembleRegressor`, `TreeEnsembleClassifier` and `TreeEnsemble`.

use super::{
    Attribute, EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    ml::{ClassLabels, ML_DOMAIN, PostTransform, Rows, logistic, probit, row_dim},
    ml_forest::{Branch, Forest, MODES, Mode, Source, Target},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value, f16};
use std::{collections::HashMap, sync::Arc};

/// The last version of the domain that has the forms with numbered trees.
const NUMBERED_UNTIL: i64 = 4;

/// Each row of `x` (`[n, features]`) reaches a leaf in every tree; the weights of those leaves are aggregated by target, base values
/// added, and each row of scores transformed (`[n, targets]`).
///
/// Scores are computed in the type of `x`, where that is f32 or f64, else in f32; transforms in f32. Integers are compared as f32.
/// Trees are added in their order, so that a row's result depends on nothing but the row.
#[derive(Clone, Debug, PartialEq)]
pub struct TreeEnsemble {
    pub forest: Arc<Forest>,
    pub aggregate: Aggregate,
    pub post_transform: PostTransform,
    /// Added to the scores; none, or as many as [`EnsembleOutput`] can use.
    pub base_values: Arc<[f64]>,
    /// Type of splits and weights in files: f32, f64 or f16.
    pub table: DType,
    pub output: EnsembleOutput,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aggregate {
    Average,
    Sum,
    Min,
    Max,
}

/// In the order of their codes.
const AGGREGATES: [(Aggregate, &str); 4] =
    [(Aggregate::Average, "AVERAGE"), (Aggregate::Sum, "SUM"), (Aggregate::Min, "MIN"), (Aggregate::Max, "MAX")];

/// What the scores become.
#[derive(Clone, Debug, PartialEq)]
pub enum EnsembleOutput {
    /// Scores in f32, of the form with numbered trees.
    Regression { targets: usize },
    /// Labels (`[n]`) and scores in f32.
    Classification(Classification),
    /// Scores in the type of `x`.
    Scores { targets: usize },
}

/// How scores of classes are read. ONNX leaves two classes open; this is what ONNX Runtime does, and exporters count on.
#[derive(Clone, Debug, PartialEq)]
pub struct Classification {
    pub labels: ClassLabels,
    /// Two classes, and weights for one of them alone: the other's score is the complement.
    pub complement: bool,
    /// No weight is below 0: a complement is `1 - s` and the border 0.5, else `-s` and 0.
    pub nonnegative: bool,
}

/// The class of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Winner {
    Class(usize),
    /// The number 0 or 1 where labels are integers, and the label there where they are strings.
    Sign(bool),
}

impl Winner {
    /// Where labels are integers.
    pub fn label(self, labels: &[i64]) -> i64 {
        match self {
            Winner::Class(class) => labels[class],
            Winner::Sign(positive) => i64::from(positive),
        }
    }
}

/// The scores of one row while they are made and read; in f64, but rounded as `single` says after every operation.
#[derive(Debug)]
pub struct RowScores<'a> {
    pub scores: &'a mut [f64],
    /// Targets that some leaf had a weight for are not 0.
    pub seen: &'a mut [u8],
    /// In f32.
    pub single: bool,
}

impl RowScores<'_> {
    fn round(&self, x: f64) -> f64 {
        // A sum, product or quotient of two f32 that is rounded to f64 first rounds to the same f32.
        if self.single { f64::from(x as f32) } else { x }
    }

    fn add(&mut self, target: usize, x: f64) {
        self.scores[target] = self.round(self.scores[target] + x);
    }

    /// Of several targets those without a weight are 0, whatever their base value.
    fn clear_unseen(&mut self) {
        self.scores.iter_mut().zip(&*self.seen).filter(|(_, seen)| **seen == 0).for_each(|(score, _)| *score = 0.0);
    }
}

impl TreeEnsemble {
    /// Number of classes or targets.
    pub fn targets(&self) -> usize {
        match &self.output {
            EnsembleOutput::Regression { targets } | EnsembleOutput::Scores { targets } => *targets,
            EnsembleOutput::Classification(classes) => classes.labels.len(),
        }
    }

    /// The scores of `row`, before base values.
    fn aggregate(&self, row: &[f64], scores: &mut RowScores<'_>) {
        scores.scores.fill(0.0);
        scores.seen.fill(0);
        for &root in &self.forest.roots {
            for (target, weight) in self.forest.reach(root, row) {
                let target = target as usize;
                let weight = scores.round(weight);
                match (self.aggregate, scores.seen[target] != 0) {
                    (Aggregate::Sum | Aggregate::Average, _) => scores.add(target, weight),
                    (_, false) => scores.scores[target] = weight,
                    (Aggregate::Min, true) if weight < scores.scores[target] => scores.scores[target] = weight,
                    (Aggregate::Max, true) if weight > scores.scores[target] => scores.scores[target] = weight,
                    _ => {}
                }
                scores.seen[target] = 1;
            }
        }
    }

    /// From aggregated scores of a row to its results, and of a classifier the class.
    pub fn finish(&self, scores: &mut RowScores<'_>) -> Winner {
        match &self.output {
            EnsembleOutput::Classification(classes) => self.classify(classes, scores),
            EnsembleOutput::Regression { .. } | EnsembleOutput::Scores { .. } => {
                self.regress(scores);
                Winner::Class(0)
            }
        }
    }

    fn regress(&self, scores: &mut RowScores<'_>) {
        let targets = scores.scores.len();
        if self.aggregate == Aggregate::Average {
            let trees = self.forest.roots.len() as f64;
            (0..targets).for_each(|t| scores.scores[t] = scores.round(scores.scores[t] / trees));
        }
        for (target, &base) in self.base_values.iter().enumerate() {
            scores.add(target, base);
        }
        match (targets, self.post_transform) {
            (1, PostTransform::Probit) => scores.scores[0] = f64::from(probit(scores.scores[0] as f32)),
            // Of one target every other transform is the identity.
            (1, _) => {}
            (_, transform) => {
                scores.clear_unseen();
                transform.apply(scores.scores);
            }
        }
    }

    fn classify(&self, classes: &Classification, scores: &mut RowScores<'_>) -> Winner {
        match scores.scores.len() {
            1 => {
                self.base_values.iter().for_each(|&base| scores.add(0, base));
                let winner = Winner::Sign(scores.scores[0] > 0.0);
                if self.post_transform == PostTransform::Probit {
                    scores.scores[0] = f64::from(probit(scores.scores[0] as f32));
                }
                winner
            }
            2 => self.classify_two(classes, scores),
            _ => {
                for (class, &base) in self.base_values.iter().enumerate() {
                    scores.add(class, base);
                    scores.seen[class] = 1;
                }
                let seen = (0..scores.scores.len()).filter(|&class| scores.seen[class] != 0);
                let best = seen.reduce(|best, c| if scores.scores[c] > scores.scores[best] { c } else { best });
                self.post_transform.apply(scores.scores);
                Winner::Class(best.unwrap_or(0))
            }
        }
    }

    fn classify_two(&self, classes: &Classification, scores: &mut RowScores<'_>) -> Winner {
        let second_seen = scores.seen[1] != 0;
        match *self.base_values {
            [_, second] if second_seen => {
                scores.scores[1] = scores.round(second + scores.scores[0]);
                scores.scores[0] = -scores.scores[1];
            }
            [first, second] => {
                scores.add(0, first);
                scores.add(1, second);
            }
            [first] => scores.add(0, first),
            _ => {}
        }
        scores.clear_unseen();
        let alone = !second_seen && self.base_values.len() < 2;
        let positive = scores.scores[usize::from(second_seen)];
        let (border, winner): (f64, fn(bool) -> Winner) = match (classes.complement, classes.nonnegative) {
            (true, true) => (0.5, |above| Winner::Class(usize::from(above))),
            (true, false) => (0.0, |above| Winner::Class(usize::from(above))),
            (false, _) => (0.0, Winner::Sign),
        };
        let winner = winner(positive > border);
        if !alone {
            self.post_transform.apply(scores.scores);
            return winner;
        }
        let score = scores.scores[0];
        let both = |f: fn(f32) -> f32, first: f64| [f64::from(f(first as f32)), f64::from(f(score as f32))];
        let pair = match (self.post_transform, classes.complement) {
            (PostTransform::Probit, _) => both(probit, score),
            (_, false) if !self.base_values.is_empty() => [score, 0.0],
            (PostTransform::Logistic, _) => both(logistic, -score),
            (_, true) if classes.nonnegative => [scores.round(1.0 - score), score],
            _ => [-score, score],
        };
        scores.scores.copy_from_slice(&pair);
        winner
    }

    /// The labels of `winners`; `None` for what is no classifier.
    fn labels(&self, winners: &[Winner]) -> Result<Option<Tensor>, OpError> {
        let EnsembleOutput::Classification(classes) = &self.output else { return Ok(None) };
        let count = classes.labels.len();
        Ok(Some(match &classes.labels {
            ClassLabels::Ints(labels) => {
                Tensor::from_vec([winners.len()], winners.iter().map(|winner| winner.label(labels)).collect())?
            }
            labels @ ClassLabels::Strings(_) => {
                let class = |winner: &Winner| match winner {
                    Winner::Class(class) => *class,
                    Winner::Sign(positive) => usize::from(*positive).min(count - 1),
                };
                labels.tensor(&winners.iter().map(class).collect::<Vec<_>>())?
            }
        }))
    }

    /// The element type of the scores, for rows of `x`.
    pub fn score_dtype(&self, x: DType) -> DType {
        if let EnsembleOutput::Scores { .. } = self.output { x } else { DType::F32 }
    }

    fn check_dtype(&self, x: DType) -> Result<(), OpError> {
        let admitted: &[DType] = match self.output {
            EnsembleOutput::Scores { .. } => &[DType::F32, DType::F64, DType::F16],
            _ => &[DType::F32, DType::F64, DType::I64, DType::I32],
        };
        match admitted.contains(&x) {
            true => Ok(()),
            false => Err(OpError::input(format!("expected one of {admitted:?}, got {x}"))),
        }
    }

    fn check_features(&self, features: i64) -> Result<(), OpError> {
        match self.forest.feature_count() {
            needed if needed as i64 <= features => Ok(()),
            needed => Err(OpError::input(format!("rows have {features} features, and the trees test {needed}"))),
        }
    }
}

impl Operator for TreeEnsemble {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        match node.op_type.as_str() {
            "TreeEnsemble" => by_index(node),
            _ => numbered(node),
        }
        .map(Op::from)
    }

    fn export(&self) -> Spelling {
        let source = self.forest.source();
        match &self.output {
            EnsembleOutput::Scores { .. } => self.spell_by_index(&source),
            _ => self.spell_numbered(&source),
        }
        .in_domain(ML_DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        self.check_dtype(x.dtype)?;
        let rows = row_dim(x, None, context)?;
        let features = x.shape.as_ref().and_then(|shape| shape.last()).and_then(Dim::as_const);
        features.map_or(Ok(()), |features| self.check_features(features))?;
        let scores = TensorFact::new(self.score_dtype(x.dtype), vec![rows.clone(), Dim::from(self.targets())]).into();
        Ok(match &self.output {
            EnsembleOutput::Classification(classes) => {
                vec![TensorFact::new(classes.labels.dtype(), vec![rows]).into(), scores]
            }
            _ => vec![scores],
        })
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        self.check_dtype(x.dtype())?;
        let rows = Rows::of(x)?;
        self.check_features(rows.features as i64)?;
        let targets = self.targets();
        let shape = [rows.count, targets];
        let mut results = Vec::with_capacity(context.bounded_len(&shape)?);
        let values = match Wide::of(x)? {
            Wide::Float(values) => values,
            Wide::Int(values) => values.into_iter().map(|v| f64::from(v as f32)).collect(),
            Wide::Bool(_) => return Err(OpError::input("expected numbers, got bool")),
        };
        let single = x.dtype() != DType::F64;
        let (mut scores, mut seen) = (vec![0.0; targets], vec![0; targets]);
        let mut scores = RowScores { scores: &mut scores, seen: &mut seen, single };
        let mut winners = Vec::with_capacity(rows.count);
        for row in 0..rows.count {
            self.aggregate(&values[row * rows.features..][..rows.features], &mut scores);
            winners.push(self.finish(&mut scores));
            results.extend_from_slice(scores.scores);
        }
        let scores = Wide::Float(results).narrow(self.score_dtype(x.dtype()), shape)?;
        Ok(self.labels(&winners)?.into_iter().chain([scores]).map(Value::Tensor).collect())
    }
}

/// A list of numbers that files hold as floats, or with `_as_tensor` in another type.
fn table(node: &mut NodeReader, name: &str) -> Result<(Vec<f64>, DType), ImportError> {
    let floats = node.optional_floats(name)?;
    let tensor_name = format!("{name}_as_tensor");
    match (floats, node.optional_tensor(&tensor_name)?) {
        (Some(floats), Some(_)) if !floats.is_empty() => {
            Err(node.corrupt(format!("has both '{name}' and '{tensor_name}', one expected")))
        }
        (_, Some(tensor)) => floats_of(node, &tensor_name, &tensor),
        (floats, None) => Ok((floats.unwrap_or_default().into_iter().map(f64::from).collect(), DType::F32)),
    }
}

fn floats_of(node: &NodeReader, name: &str, tensor: &Tensor) -> Result<(Vec<f64>, DType), ImportError> {
    let floats = matches!(tensor.dtype(), DType::F32 | DType::F64 | DType::F16).then(|| Wide::floats(tensor));
    match floats {
        Some(Ok(values)) => Ok((values, tensor.dtype())),
        _ => Err(node.corrupt(format!("attribute '{name}' is of type {}, expected f32, f64 or f16", tensor.dtype()))),
    }
}

/// Lists of one length, or an error that names the one that differs.
fn same_length(node: &NodeReader, expected: usize, lists: &[(&str, usize)]) -> Result<(), ImportError> {
    match lists.iter().find(|(_, len)| *len != expected) {
        Some((name, len)) => Err(node.corrupt(format!("attribute '{name}' has {len} elements, expected {expected}"))),
        None => Ok(()),
    }
}

fn index(node: &NodeReader, name: &str, value: i64, count: usize) -> Result<usize, ImportError> {
    usize::try_from(value)
        .ok()
        .filter(|&i| i < count)
        .ok_or_else(|| node.corrupt(format!("attribute '{name}' holds {value}, expected 0 to {}", count as i64 - 1)))
}

/// Features are numbered in 32 bits; a row has as many as its tensor, which inference and evaluation check.
fn feature(node: &NodeReader, value: i64) -> Result<usize, ImportError> {
    index(node, "nodes_featureids", value, 1 << 31)
}

fn target_count(node: &mut NodeReader) -> Result<usize, ImportError> {
    match node.optional_int("n_targets")? {
        Some(count @ 1..=0x0100_0000) => Ok(count as usize),
        other => Err(node.corrupt(format!("attribute 'n_targets' is {other:?}, expected 1 to {}", 1 << 24))),
    }
}

/// The forms of opsets 1 and 3: nodes and weights name the tree and the node in it that they belong to.
fn numbered(node: &mut NodeReader) -> Result<TreeEnsemble, ImportError> {
    let is_classifier = node.op_type == "TreeEnsembleClassifier";
    let prefix = if is_classifier { "class" } else { "target" };
    let mut ints = |name: &str| Ok::<_, ImportError>(node.optional_ints(name)?.unwrap_or_default());
    let (trees, ids, features) = (ints("nodes_treeids")?, ints("nodes_nodeids")?, ints("nodes_featureids")?);
    let (holds, fails) = (ints("nodes_truenodeids")?, ints("nodes_falsenodeids")?);
    let missing = ints("nodes_missing_value_tracks_true")?;
    let weight_ids = ints(&format!("{prefix}_ids"))?;
    let (weight_trees, weight_nodes) = (ints(&format!("{prefix}_treeids"))?, ints(&format!("{prefix}_nodeids"))?);
    let modes = node.optional_strings("nodes_modes")?.unwrap_or_default();
    let (splits, splits_table) = table(node, "nodes_values")?;
    let (weights, weights_table) = table(node, &format!("{prefix}_weights"))?;
    let (base_values, base_table) = table(node, "base_values")?;
    // How often training data came by a node; inference does not need it.
    table(node, "nodes_hitrates")?;
    let aggregate = match node.optional_string("aggregate_function")?.as_deref() {
        None => Aggregate::Sum,
        Some(_) if is_classifier => {
            return Err(node.corrupt("has attribute 'aggregate_function', as no classifier does"));
        }
        Some(name) => match AGGREGATES.iter().find(|(_, n)| *n == name) {
            Some((aggregate, _)) => *aggregate,
            None => return Err(node.corrupt(format!("aggregate_function '{name}'"))),
        },
    };
    let post_transform = PostTransform::import(node)?;
    let labels = match is_classifier {
        true => Some(ClassLabels::import(node, "classlabels_int64s", "classlabels_strings")?),
        false => None,
    };
    let targets = match &labels {
        Some(labels) if labels.is_empty() => return Err(node.corrupt("has no class labels")),
        Some(labels) => labels.len(),
        None => target_count(node)?,
    };
    let count = trees.len();
    let lists = [
        ("nodes_nodeids", ids.len()),
        ("nodes_featureids", features.len()),
        ("nodes_truenodeids", holds.len()),
        ("nodes_falsenodeids", fails.len()),
        ("nodes_modes", modes.len()),
        ("nodes_values", splits.len()),
    ];
    same_length(node, count, &lists)?;
    let lists = [("weights", weights.len()), ("treeids", weight_trees.len()), ("nodeids", weight_nodes.len())];
    same_length(node, weight_ids.len(), &lists)?;
    let may_have = match (targets, is_classifier) {
        (1, _) => [0, 1],
        (2, true) => [base_values.len().min(2), 0],
        _ => [0, targets],
    };
    if !may_have.contains(&base_values.len()) {
        return Err(node.corrupt(format!("has {} base values for {targets} targets", base_values.len())));
    }

    let mut places = HashMap::with_capacity(count);
    let (mut branch_count, mut leaves) = (0, Vec::new());
    for (at, mode) in modes.iter().enumerate() {
        let place = if mode == "LEAF" {
            leaves.push(Vec::new());
            Target::Leaf(leaves.len() - 1)
        } else {
            branch_count += 1;
            Target::Node(branch_count - 1)
        };
        if places.insert((trees[at], ids[at]), place).is_some() {
            return Err(node.corrupt(format!("has node {} of tree {} twice", ids[at], trees[at])));
        }
    }
    let place = |tree: i64, id: i64| match places.get(&(tree, id)) {
        Some(place) => Ok(*place),
        None => Err(node.corrupt(format!("leads to node {id} of tree {tree}, which it does not have"))),
    };
    let mut branches = Vec::with_capacity(branch_count);
    let mut roots = Vec::new();
    let mut rooted = std::collections::HashSet::new();
    for (at, name) in modes.iter().enumerate() {
        // The first node of a tree is its root.
        if rooted.insert(trees[at]) {
            roots.push(places[&(trees[at], ids[at])]);
        }
        if name == "LEAF" {
            continue;
        }
        let mode = MODES.iter().find(|(mode, n)| n == name && *mode != Mode::Member);
        let Some(&(mode, _)) = mode else { return Err(node.corrupt(format!("has a node of mode '{name}'"))) };
        branches.push(Branch {
            feature: feature(node, features[at])?,
            mode,
            split: splits[at],
            missing_holds: missing.get(at).is_some_and(|&m| m == 1),
            holds: place(trees[at], holds[at])?,
            fails: place(trees[at], fails[at])?,
            set: 0,
        });
    }
    for (at, &weight) in weights.iter().enumerate() {
        let target = index(node, &format!("{prefix}_ids"), weight_ids[at], targets)?;
        // Some converters give inner nodes weights too, which nothing reads.
        if let Target::Leaf(leaf) = place(weight_trees[at], weight_nodes[at])? {
            leaves[leaf].push((target as u32, weight));
        }
    }
    let output = match labels {
        None => EnsembleOutput::Regression { targets },
        Some(labels) => EnsembleOutput::Classification(Classification {
            complement: targets == 2 && !weight_ids.is_empty() && weight_ids.iter().all(|id| *id == weight_ids[0]),
            nonnegative: weights.iter().all(|&w| w >= 0.0),
            labels,
        }),
    };
    let wide = [splits_table, weights_table, base_table].contains(&DType::F64);
    let source = Source { branches, leaves, sets: Vec::new(), roots };
    Ok(TreeEnsemble {
        forest: Arc::new(Forest::lay_out(&source).map_err(|message| node.corrupt(message))?),
        aggregate,
        post_transform,
        base_values: base_values.into(),
        table: if wide { DType::F64 } else { DType::F32 },
        output,
    })
}

/// The form of opset 5: nodes and leaves name each other by index.
fn by_index(node: &mut NodeReader) -> Result<TreeEnsemble, ImportError> {
    let mut ints = |name: &str| Ok::<_, ImportError>(node.optional_ints(name)?.unwrap_or_default());
    let (features, roots) = (ints("nodes_featureids")?, ints("tree_roots")?);
    let (holds, fails) = (ints("nodes_truenodeids")?, ints("nodes_falsenodeids")?);
    let (holds_leaf, fails_leaf) = (ints("nodes_trueleafs")?, ints("nodes_falseleafs")?);
    let missing = ints("nodes_missing_value_tracks_true")?;
    let leaf_targets = ints("leaf_targetids")?;
    let mut tensor = |name: &str| match node.optional_tensor(name)? {
        Some(tensor) => floats_of(node, name, &tensor).map(Some),
        None => Ok(None),
    };
    let (Some((splits, splits_table)), Some((weights, weights_table))) =
        (tensor("nodes_splits")?, tensor("leaf_weights")?)
    else {
        return Err(node.corrupt("must have attributes 'nodes_splits' and 'leaf_weights'"));
    };
    let members = tensor("membership_values")?.map(|(values, _)| values).unwrap_or_default();
    tensor("nodes_hitrates")?;
    let modes = match node.optional_tensor("nodes_modes")? {
        Some(modes) if modes.dtype() == DType::U8 => modes.bytes().to_vec(),
        _ => return Err(node.corrupt("attribute 'nodes_modes' must be a tensor of u8")),
    };
    let targets = target_count(node)?;
    let code = node.int("aggregate_function", 1)?;
    let aggregate = AGGREGATES[index(node, "aggregate_function", code, AGGREGATES.len())?].0;
    let code = node.int("post_transform", 0)?;
    let post_transform = PostTransform::from_code(code);
    let post_transform =
        post_transform.ok_or_else(|| node.corrupt(format!("post_transform {code}, expected 0 to 4")))?;
    let count = modes.len();
    let lists = [
        ("nodes_featureids", features.len()),
        ("nodes_truenodeids", holds.len()),
        ("nodes_falsenodeids", fails.len()),
        ("nodes_trueleafs", holds_leaf.len()),
        ("nodes_falseleafs", fails_leaf.len()),
        ("nodes_splits", splits.len()),
    ];
    same_length(node, count, &lists)?;
    same_length(node, weights.len(), &[("leaf_targetids", leaf_targets.len())])?;
    let mut leaves = Vec::with_capacity(weights.len());
    for (&target, &weight) in leaf_targets.iter().zip(&weights) {
        leaves.push(vec![(index(node, "leaf_targetids", target, targets)? as u32, weight)]);
    }
    // The members of each set, which NaN ends.
    let mut sets: Vec<Vec<f64>> = members.split(|m| m.is_nan()).map(<[f64]>::to_vec).collect();
    if sets.last().is_some_and(Vec::is_empty) {
        sets.pop();
    }
    let branch = |name: &str, at: usize, to: i64, is_leaf: i64| match is_leaf {
        0 => index(node, name, to, count).map(Target::Node),
        1 => index(node, name, to, leaves.len()).map(Target::Leaf),
        other => {
            Err(node.corrupt(format!("node {at} says {other} where 0 or 1 is expected: whether '{name}' is a leaf")))
        }
    };
    let mut branches = Vec::with_capacity(count);
    let mut next_set = 0;
    for at in 0..count {
        let (mode, _) = MODES[index(node, "nodes_modes", modes[at].into(), MODES.len())?];
        let set = next_set;
        next_set += usize::from(mode == Mode::Member);
        branches.push(Branch {
            feature: feature(node, features[at])?,
            mode,
            split: splits[at],
            missing_holds: missing.get(at).is_some_and(|&m| m == 1),
            holds: branch("nodes_truenodeids", at, holds[at], holds_leaf[at])?,
            fails: branch("nodes_falsenodeids", at, fails[at], fails_leaf[at])?,
            set,
        });
    }
    if sets.len() != next_set {
        let sets = sets.len();
        return Err(node.corrupt(format!("'membership_values' holds {sets} sets, and {next_set} nodes test for one")));
    }
    let roots = roots.iter().map(|&root| index(node, "tree_roots", root, count).map(Target::Node));
    let roots = roots.collect::<Result<Vec<_>, _>>()?;
    let table = if [splits_table, weights_table].contains(&DType::F64) { DType::F64 } else { splits_table };
    let source = Source { branches, leaves, sets, roots };
    Ok(TreeEnsemble {
        forest: Arc::new(Forest::lay_out(&source).map_err(|message| node.corrupt(message))?),
        aggregate,
        post_transform,
        base_values: [].into(),
        table,
        output: EnsembleOutput::Scores { targets },
    })
}

/// Floats in the type that the file has them in.
fn spelled_tensor(values: &[f64], dtype: DType) -> Tensor {
    let shape = [values.len()];
    let tensor = match dtype {
        DType::F64 => Tensor::from_vec(shape, values.to_vec()),
        DType::F16 => Tensor::from_vec(shape, values.iter().map(|&v| f16::from_f64(v)).collect()),
        _ => Tensor::from_vec(shape, values.iter().map(|&v| v as f32).collect()),
    };
    tensor.expect("as many values as the shape has elements")
}

impl TreeEnsemble {
    fn with_table(&self, spelling: Spelling, names: [&'static str; 2], values: &[f64]) -> Spelling {
        let [floats, as_tensor] = names;
        match self.table {
            _ if values.is_empty() => spelling,
            DType::F64 => spelling.with(as_tensor, spelled_tensor(values, DType::F64)),
            _ => spelling.with(floats, values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
        }
    }

    fn spell_numbered(&self, source: &Source) -> Spelling {
        let mut nodes: [Vec<i64>; 6] = Default::default();
        let (mut modes, mut splits) = (Vec::new(), Vec::new());
        let mut weight_places: [Vec<i64>; 3] = Default::default();
        let mut weights = Vec::new();
        for (tree, &root) in source.roots.iter().enumerate() {
            let mut ids: HashMap<(bool, usize), i64> = HashMap::new();
            let mut waiting = std::collections::VecDeque::new();
            let mut id_of = |target: Target, waiting: &mut std::collections::VecDeque<Target>| {
                let key = match target {
                    Target::Node(node) => (false, node),
                    Target::Leaf(leaf) => (true, leaf),
                };
                let next = ids.len() as i64;
                *ids.entry(key).or_insert_with(|| {
                    waiting.push_back(target);
                    next
                })
            };
            id_of(root, &mut waiting);
            while let Some(target) = waiting.pop_front() {
                let id = id_of(target, &mut waiting);
                let (row, mode, split) = match target {
                    Target::Leaf(leaf) => {
                        for &(target, weight) in &source.leaves[leaf] {
                            let place = [tree as i64, id, i64::from(target)];
                            weight_places.iter_mut().zip(place).for_each(|(list, value)| list.push(value));
                            weights.push(weight);
                        }
                        ([0; 4], "LEAF", 0.0)
                    }
                    Target::Node(node) => {
                        let branch = &source.branches[node];
                        let (holds, fails) = (id_of(branch.holds, &mut waiting), id_of(branch.fails, &mut waiting));
                        let missing = i64::from(branch.missing_holds);
                        ([branch.feature as i64, holds, fails, missing], MODES[branch.mode as usize].1, branch.split)
                    }
                };
                let row = [tree as i64, id, row[0], row[1], row[2], row[3]];
                nodes.iter_mut().zip(row).for_each(|(list, value)| list.push(value));
                modes.push(mode.to_string());
                splits.push(split);
            }
        }
        let (name, names, weight_names, count) = match &self.output {
            EnsembleOutput::Classification(_) => (
                "TreeEnsembleClassifier",
                ["class_treeids", "class_nodeids", "class_ids"],
                ["class_weights", "class_weights_as_tensor"],
                None,
            ),
            _ => (
                "TreeEnsembleRegressor",
                ["target_treeids", "target_nodeids", "target_ids"],
                ["target_weights", "target_weights_as_tensor"],
                Some(self.targets() as i64),
            ),
        };
        let mut spelling = Spelling::new(name).until(NUMBERED_UNTIL);
        let node_names = [
            "nodes_treeids",
            "nodes_nodeids",
            "nodes_featureids",
            "nodes_truenodeids",
            "nodes_falsenodeids",
            "nodes_missing_value_tracks_true",
        ];
        for (name, list) in node_names.into_iter().zip(nodes).chain(names.into_iter().zip(weight_places)) {
            spelling = spelling.with(name, list);
        }
        spelling = self.with_table(spelling, ["nodes_values", "nodes_values_as_tensor"], &splits);
        spelling = self.with_table(spelling, weight_names, &weights);
        spelling = self.with_table(spelling, ["base_values", "base_values_as_tensor"], &self.base_values);
        spelling = spelling.with("nodes_modes", modes).with("post_transform", self.post_transform.name());
        if let Some(count) = count {
            let aggregate = AGGREGATES[self.aggregate as usize].1;
            spelling = spelling.with("n_targets", count).with("aggregate_function", aggregate);
        }
        match &self.output {
            EnsembleOutput::Classification(classes) => {
                classes.labels.export(spelling, "classlabels_int64s", "classlabels_strings")
            }
            _ => spelling,
        }
    }

    fn spell_by_index(&self, source: &Source) -> Spelling {
        let branches = &source.branches;
        let ints = |f: &dyn Fn(&Branch) -> i64| branches.iter().map(f).collect::<Vec<i64>>();
        let to = |target: Target| match target {
            Target::Node(index) | Target::Leaf(index) => index as i64,
        };
        let is_leaf = |target: Target| i64::from(matches!(target, Target::Leaf(_)));
        let splits: Vec<f64> = branches.iter().map(|b| b.split).collect();
        let modes: Vec<u8> = branches.iter().map(|b| b.mode as u8).collect();
        let members = branches.iter().filter(|b| b.mode == Mode::Member);
        let members: Vec<f64> = members.flat_map(|b| source.sets[b.set].iter().copied().chain([f64::NAN])).collect();
        let weights: Vec<f64> = source.leaves.iter().flatten().map(|(_, weight)| *weight).collect();
        let targets: Vec<i64> = source.leaves.iter().flatten().map(|(target, _)| i64::from(*target)).collect();
        let modes = Tensor::from_vec([modes.len()], modes).expect("as many values as the shape has elements");
        let spelling = Spelling::new("TreeEnsemble")
            .with("aggregate_function", self.aggregate as i64)
            .with("post_transform", self.post_transform as i64)
            .with("n_targets", self.targets() as i64)
            .with("tree_roots", source.roots.iter().map(|&root| to(root)).collect::<Vec<_>>())
            .with("nodes_featureids", ints(&|b| b.feature as i64))
            .with("nodes_modes", Attribute::Tensor(modes))
            .with("nodes_splits", spelled_tensor(&splits, self.table))
            .with("nodes_truenodeids", ints(&|b| to(b.holds)))
            .with("nodes_trueleafs", ints(&|b| is_leaf(b.holds)))
            .with("nodes_falsenodeids", ints(&|b| to(b.fails)))
            .with("nodes_falseleafs", ints(&|b| is_leaf(b.fails)))
            .with("nodes_missing_value_tracks_true", ints(&|b| b.missing_holds.into()))
            .with("leaf_targetids", targets)
            .with("leaf_weights", spelled_tensor(&weights, self.table));
        match members.is_empty() {
            true => spelling,
            false => spelling.with("membership_values", spelled_tensor(&members, self.table)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{Case, case, f32s, strings, tensor};

    /// Two stumps, `x₀ ≤ 0` and `x₁ ≤ 1`, over three rows; `ids` and `weights` are those of the four leaves.
    fn stumps(op: &'static str, prefix: &str, ids: &[i64], weights: &[f32]) -> Case {
        let each = ids.len() as i64 / 4;
        let per_leaf = |values: [i64; 4]| values.iter().flat_map(|&v| vec![v; each as usize]).collect::<Vec<i64>>();
        let modes = ["BRANCH_LEQ", "LEAF", "LEAF"].repeat(2);
        case(op, 3)
            .input(f32s(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0]))
            .with("nodes_treeids", vec![0, 0, 0, 1, 1, 1])
            .with("nodes_nodeids", vec![0, 1, 2, 0, 1, 2])
            .with("nodes_featureids", vec![0, 0, 0, 1, 0, 0])
            .with("nodes_modes", modes.iter().map(ToString::to_string).collect::<Vec<String>>())
            .with("nodes_values", vec![0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
            .with("nodes_truenodeids", vec![1, 0, 0, 1, 0, 0])
            .with("nodes_falsenodeids", vec![2, 0, 0, 2, 0, 0])
            .with(&format!("{prefix}_treeids"), per_leaf([0, 0, 1, 1]))
            .with(&format!("{prefix}_nodeids"), per_leaf([1, 2, 1, 2]))
            .with(&format!("{prefix}_ids"), ids.to_vec())
            .with(&format!("{prefix}_weights"), weights.to_vec())
    }

    fn regressor(targets: i64, ids: &[i64], weights: &[f32], aggregate: &str) -> Case {
        let case = stumps("ai.onnx.ml.TreeEnsembleRegressor", "target", ids, weights);
        case.with("n_targets", targets).with("aggregate_function", aggregate)
    }

    /// Values from ONNX Runtime.
    #[test]
    fn one_target_is_aggregated_and_only_probit_transforms_it() {
        for (aggregate, plain, probit) in [
            ("SUM", [0.7, 0.5, 0.5], [0.524_445_9, 0.0, 0.0]),
            ("AVERAGE", [0.4, 0.3, 0.3], [-0.253_353_5, -0.524_445_9, -0.524_445_9]),
            ("MIN", [0.3, 0.2, 0.2], [-0.524_445_9, -0.841_756_1, -0.841_756_1]),
            ("MAX", [0.5, 0.4, 0.4], [0.0, -0.253_353_5, -0.253_353_5]),
        ] {
            let model = || regressor(1, &[0; 4], &[0.1, 0.2, 0.3, 0.4], aggregate).with("base_values", vec![0.1]);
            model().gives([f32s(&[3, 1], &plain)]);
            model().with("post_transform", "LOGISTIC").gives([f32s(&[3, 1], &plain)]);
            model().with("post_transform", "PROBIT").gives([f32s(&[3, 1], &probit)]);
        }
    }

    #[test]
    fn several_targets_are_aggregated_apart() {
        let (ids, weights) = ([0, 1, 0, 1, 0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4, -0.1, -0.2, -0.3, 0.5]);
        for (aggregate, expected) in [
            ("SUM", [0.1, 1.9, 0.1, 1.0, 0.1, 1.0]),
            ("AVERAGE", [0.1, 1.45, 0.1, 1.0, 0.1, 1.0]),
            ("MIN", [-0.2, 1.4, 0.0, 0.8, 0.0, 0.8]),
            ("MAX", [0.4, 1.5, 0.2, 1.2, 0.2, 1.2]),
        ] {
            let model = regressor(2, &ids, &weights, aggregate).with("base_values", vec![0.1, 1.0]);
            model.gives([f32s(&[3, 2], &expected)]);
        }
        let zero = regressor(3, &ids, &weights, "AVERAGE").with("base_values", vec![0.1, 0.2, 0.3]);
        let expected = [0.365_864_4, 0.634_135_6, 0.0, 0.475_020_8, 0.524_979_2, 0.0, 0.475_020_8, 0.524_979_2, 0.0];
        let expected = f32s(&[3, 3], &expected);
        zero.with("post_transform", "SOFTMAX_ZERO").gives([expected]);
    }

    fn classifier(ids: &[i64], weights: &[f32], base: &[f32], transform: &str) -> Case {
        let case = stumps("ai.onnx.ml.TreeEnsembleClassifier", "class", ids, weights);
        let case = case.with("base_values", base.to_vec()).with("post_transform", transform);
        case.with("classlabels_int64s", vec![5, 6])
    }

    #[test]
    fn two_classes_are_read_as_onnx_runtime_reads_them() {
        const UP: [f32; 4] = [0.1, 0.2, 0.3, 0.4];
        const MIXED: [f32; 4] = [0.1, -0.2, 0.3, -0.4];
        let check = |ids: [i64; 4], weights: &[f32], base: &[f32], transform: &str, labels: [i64; 3], z: [f32; 6]| {
            let labels = tensor::<i64>(&[3], &labels);
            classifier(&ids, weights, base, transform).gives([labels, f32s(&[3, 2], &z)]);
        };
        check([0; 4], &UP, &[], "NONE", [6, 5, 5], [0.4, 0.6, 0.6, 0.4, 0.6, 0.4]);
        check([0; 4], &UP, &[], "SOFTMAX", [6, 5, 5], [0.4, 0.6, 0.6, 0.4, 0.6, 0.4]);
        let logistic = [0.354_343_7, 0.645_656_3, 0.401_312_4, 0.598_687_6, 0.401_312_4, 0.598_687_6];
        check([0; 4], &UP, &[], "LOGISTIC", [6, 5, 5], logistic);
        check([1; 4], &UP, &[], "NONE", [6, 5, 5], [0.0, 0.6, 0.0, 0.4, 0.0, 0.4]);
        check([0, 1, 0, 1], &UP, &[], "NONE", [1, 1, 1], [0.0, 0.6, -0.4, 0.4, -0.4, 0.4]);
        check([0; 4], &MIXED, &[], "NONE", [5, 6, 6], [0.6, -0.6, -0.4, 0.4, -0.4, 0.4]);
        check([0; 4], &UP, &[0.1], "NONE", [6, 5, 5], [0.3, 0.7, 0.5, 0.5, 0.5, 0.5]);
        check([0; 4], &UP, &[0.1, -0.7], "NONE", [6, 5, 5], [0.7, 0.0, 0.5, 0.0, 0.5, 0.0]);
        check([1; 4], &UP, &[0.1, -0.7], "NONE", [5, 5, 5], [0.0, -0.7, 0.0, -0.7, 0.0, -0.7]);
        check([0, 1, 0, 1], &MIXED, &[0.1, -0.7], "NONE", [0, 1, 1], [0.0, -0.7, 0.5, 0.0, 0.5, 0.0]);
        let softmax = [0.645_656_3, 0.354_343_7, 0.401_312_3, 0.598_687_6, 0.401_312_3, 0.598_687_6];
        check([1; 4], &MIXED, &[], "SOFTMAX", [5, 6, 6], softmax);
    }

    #[test]
    fn several_classes_and_names_of_classes() {
        let model = stumps("ai.onnx.ml.TreeEnsembleClassifier", "class", &[0, 1, 2, 0], &[0.1, 0.2, 0.3, 0.4]);
        let names = ["a", "b", "c"].map(str::to_string).to_vec();
        let scores = f32s(&[3, 3], &[0.4, 0.2, 0.0, 0.1, 0.0, 0.3, 0.1, 0.0, 0.3]);
        model.with("classlabels_strings", names).gives([Value::Tensor(strings(&[3], &["a", "c", "c"])), scores.into()]);
    }

    fn by_index() -> Case {
        let modes = tensor::<u8>(&[3], &[0, 6, 6]);
        case("ai.onnx.ml.TreeEnsemble", 5)
            .with("n_targets", 2)
            .with("aggregate_function", 1)
            .with("tree_roots", vec![0])
            .with("nodes_modes", modes)
            .with("nodes_featureids", vec![0, 1, 1])
            .with("nodes_splits", f32s(&[3], &[1.5, 0.0, 0.0]))
            .with("nodes_truenodeids", vec![1, 0, 1])
            .with("nodes_trueleafs", vec![0, 1, 1])
            .with("nodes_falsenodeids", vec![2, 2, 3])
            .with("nodes_falseleafs", vec![0, 1, 1])
            .with("membership_values", f32s(&[7], &[3.0, 1.0, 2.0, f32::NAN, 40.5, 7.0, f32::NAN]))
            .with("leaf_targetids", vec![0, 1, 0, 1])
            .with("leaf_weights", f32s(&[4], &[1.0, 10.0, 100.0, 1000.0]))
    }

    #[test]
    fn sets_are_tested_by_membership() {
        let x = [0.0, 2.0, 0.0, 2.5, 2.0, 40.5, 2.0, f32::NAN];
        let expected = [1.0, 0.0, 100.0, 0.0, 0.0, 10.0, 0.0, 1000.0];
        by_index().input(f32s(&[4, 2], &x)).gives([f32s(&[4, 2], &expected)]);
        let wide = tensor::<f64>(&[4, 2], &x.map(f64::from));
        by_index().input(wide).gives([tensor::<f64>(&[4, 2], &expected.map(f64::from))]);
        by_index().input(f32s(&[2], &x[..2])).gives([f32s(&[1, 2], &expected[..2])]);
        by_index().input(f32s(&[0, 2], &[])).gives([f32s(&[0, 2], &[])]);
    }

    #[test]
    fn hostile_trees_are_refused() {
        let model = || regressor(1, &[0; 4], &[0.1, 0.2, 0.3, 0.4], "SUM");
        model().with("nodes_truenodeids", vec![0, 0, 0, 1, 0, 0]).fails("cycle");
        model().with("nodes_truenodeids", vec![7, 0, 0, 1, 0, 0]).fails("node 7 of tree 0");
        model().with("nodes_nodeids", vec![0, 1, 1, 0, 1, 2]).fails("node 1 of tree 0 twice");
        model().with("nodes_featureids", vec![9, 0, 0, 1, 0, 0]).fails("rows have 2 features, and the trees test 10");
        model().with("nodes_featureids", vec![-1, 0, 0, 1, 0, 0]).fails("holds -1");
        model().with("target_ids", vec![0, 0, 0, 1]).fails("target_ids");
        model().with("nodes_values", vec![0.0]).fails("nodes_values");
        model().with("n_targets", 1 << 40).fails("n_targets");
        model().with("base_values", vec![0.0, 1.0]).fails("2 base values for 1 targets");
        let modes = ["BRANCH_MEMBER", "LEAF", "LEAF"].repeat(2).iter().map(ToString::to_string).collect::<Vec<_>>();
        model().with("nodes_modes", modes).fails("BRANCH_MEMBER");
        by_index().with("nodes_truenodeids", vec![0, 0, 1]).wave(&[1, 2]).fails("cycle");
        by_index().with("tree_roots", vec![3]).wave(&[1, 2]).fails("tree_roots");
        by_index().with("nodes_trueleafs", vec![0, 2, 1]).wave(&[1, 2]).fails("0 or 1");
        by_index().with("membership_values", f32s(&[1], &[1.0])).wave(&[1, 2]).fails("1 sets, and 2 nodes");
    }
}
