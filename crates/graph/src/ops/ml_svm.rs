//! Support vector machines: regression, detection of outliers, and classification by votes of pairs.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling,
    ml::{ClassLabels, ML_DOMAIN, PostTransform, Rows, f32_values, largest, logistic, numeric, row_dim},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::sync::Arc;

/// Kernel values `K(x, v)` of each row of `x` (`[n, features]`, taken as f32) with every vector `v`, and what is made of them.
///
/// Sums are widened; the probabilities of a classifier are iterated in f32, as ONNX Runtime has them, since the rounding decides when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Svm {
    pub kernel: SvmKernel,
    /// `[vectors, features]`.
    pub vectors: Arc<[f32]>,
    pub features: usize,
    pub machine: SvmMachine,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SvmKernel {
    /// `x·v`
    Linear,
    /// `(gamma · x·v + coef0)^degree`
    Polynomial { gamma: f32, coef0: f32, degree: f32 },
    /// `exp(-gamma · |x - v|²)`
    Radial { gamma: f32 },
    /// `tanh(gamma · x·v + coef0)`
    Sigmoid { gamma: f32, coef0: f32 },
}

#[derive(Clone, Debug, PartialEq)]
pub enum SvmMachine {
    /// `y = Σ coefficient · K + rho` (`[n, 1]`), of a one-class machine 1 where that is above 0, else -1.
    Regression { coefficients: Arc<[f32]>, rho: f32, one_class: bool },
    /// Labels (`[n]`) and scores `K + rho`, transformed (`[n, classes]`): a linear machine of one vector a class. The largest score wins, but
    /// of two classes without probabilities it is the second if the largest is above 0 (0.5 where no coefficient is below 0), as ONNX Runtime
    /// has it.
    Classes { labels: ClassLabels, rho: f32, probabilities: Option<Probabilities>, transform: PostTransform },
    /// Labels (`[n]`) and scores (`[n, classes]` or `[n, pairs]`): a machine for every pair of classes.
    Pairs(Pairs),
}

/// Machines that each tell two classes apart: those of 0 and 1, 0 and 2, … 1 and 2, …; the class with most votes wins, the first of several.
///
/// With probabilities scores are one of each class. Without they are the decisions, of two classes `[-s, s]`, or with a
/// transform `[1 - s, s]`, or `[1 - logistic(s), logistic(s)]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pairs {
    pub labels: ClassLabels,
    /// Where the vectors of each class begin, and where those of the last end.
    pub starts: Vec<usize>,
    /// `[classes - 1, vectors]`: of a vector of class `i` its weight against `j` is in row `j` if `j < i`, else `j - 1`.
    pub coefficients: Arc<[f32]>,
    /// One a pair.
    pub rho: Arc<[f32]>,
    pub probabilities: Option<Probabilities>,
    pub transform: PostTransform,
}

/// `P(the first of a pair) = 1 - logistic(a·s + b)` (Platt 1999), one `a` and `b` a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Probabilities {
    pub a: Arc<[f32]>,
    pub b: Arc<[f32]>,
}

impl SvmKernel {
    fn import(node: &mut NodeReader) -> Result<SvmKernel, ImportError> {
        let name = node.string("kernel_type", "LINEAR")?;
        let parameters = node.optional_floats("kernel_params")?.unwrap_or_default();
        let (gamma, coef0, degree) = match parameters[..] {
            [] => (0.0, 0.0, 0.0),
            [gamma, coef0, degree, ..] => (gamma, coef0, degree),
            _ => return Err(node.corrupt(format!("has {} kernel_params, 3 expected", parameters.len()))),
        };
        match name.as_str() {
            "LINEAR" => Ok(SvmKernel::Linear),
            "POLY" => Ok(SvmKernel::Polynomial { gamma, coef0, degree }),
            "RBF" => Ok(SvmKernel::Radial { gamma }),
            "SIGMOID" => Ok(SvmKernel::Sigmoid { gamma, coef0 }),
            other => Err(node.corrupt(format!("kernel_type '{other}', expected LINEAR, POLY, RBF or SIGMOID"))),
        }
    }

    fn export(self, spelling: Spelling) -> Spelling {
        let (name, parameters) = match self {
            SvmKernel::Linear => ("LINEAR", vec![0.0, 0.0, 0.0]),
            SvmKernel::Polynomial { gamma, coef0, degree } => ("POLY", vec![gamma, coef0, degree]),
            SvmKernel::Radial { gamma } => ("RBF", vec![gamma, 0.0, 0.0]),
            SvmKernel::Sigmoid { gamma, coef0 } => ("SIGMOID", vec![gamma, coef0, 0.0]),
        };
        spelling.with("kernel_type", name).with("kernel_params", parameters)
    }

    fn of(self, x: &[f32], v: &[f32]) -> f64 {
        let pairs = x.iter().zip(v).map(|(&x, &v)| (f64::from(x), f64::from(v)));
        if let SvmKernel::Radial { gamma } = self {
            return (-f64::from(gamma) * pairs.map(|(x, v)| (x - v) * (x - v)).sum::<f64>()).exp();
        }
        let product: f64 = pairs.map(|(x, v)| x * v).sum();
        match self {
            SvmKernel::Polynomial { gamma, coef0, degree } => {
                (f64::from(gamma) * product + f64::from(coef0)).powf(degree.into())
            }
            SvmKernel::Sigmoid { gamma, coef0 } => (f64::from(gamma) * product + f64::from(coef0)).tanh(),
            _ => product,
        }
    }
}

impl Pairs {
    fn classes(&self) -> usize {
        self.labels.len()
    }

    /// The decision of each pair, and the votes of each class; the class that wins.
    fn decide<K: Copy + Into<f64>>(&self, kernels: &[K], decisions: &mut [f32], votes: &mut [f32]) -> usize {
        let vectors = kernels.len();
        let sum = |row: usize, class: usize| -> f64 {
            let of = self.starts[class]..self.starts[class + 1];
            let coefficients = &self.coefficients[row * vectors..][..vectors];
            let pairs = coefficients[of.clone()].iter().zip(&kernels[of]);
            pairs.map(|(&c, &k)| f64::from(c) * k.into()).sum()
        };
        votes.fill(0.0);
        let mut pair = 0;
        for i in 0..self.classes() {
            for j in i + 1..self.classes() {
                let decision = sum(j - 1, i) + sum(i, j) + f64::from(self.rho[pair]);
                decisions[pair] = decision as f32;
                votes[if decision > 0.0 { i } else { j }] += 1.0;
                pair += 1;
            }
        }
        largest(votes)
    }

    /// The scores from the decisions; `scratch` is as long as [`Svm::scratch_len`] says.
    fn score(&self, decisions: &[f32], scratch: &mut [f32], scores: &mut [f32]) {
        match &self.probabilities {
            Some(probabilities) => {
                probabilities.of_classes(decisions, scratch, scores);
                self.transform.apply(scores);
            }
            None if self.classes() == 2 => {
                let s = decisions[0];
                let pair = match self.transform {
                    PostTransform::None => [-s, s],
                    PostTransform::Logistic => [logistic(-s), logistic(s)],
                    _ => [1.0 - s, s],
                };
                scores.copy_from_slice(&pair);
            }
            None => {
                scores.copy_from_slice(decisions);
                self.transform.apply(scores);
            }
        }
    }
}

impl Probabilities {
    fn import(node: &mut NodeReader) -> Result<Option<Probabilities>, ImportError> {
        let (a, b) = (node.optional_floats("prob_a")?, node.optional_floats("prob_b")?);
        let (a, b) = (a.unwrap_or_default(), b.unwrap_or_default());
        match a.len() == b.len() {
            true if a.is_empty() => Ok(None),
            true => Ok(Some(Probabilities { a: a.into(), b: b.into() })),
            false => Err(node.corrupt(format!("has {} values of prob_a and {} of prob_b", a.len(), b.len()))),
        }
    }

    fn export(this: &Option<Probabilities>, spelling: Spelling) -> Spelling {
        match this {
            Some(Probabilities { a, b }) => spelling.with("prob_a", a.to_vec()).with("prob_b", b.to_vec()),
            None => spelling,
        }
    }

    /// Couples the pairs' probabilities to those of classes: the second method of Wu, Lin and Weng (2004), as LIBSVM iterates it.
    fn of_classes(&self, decisions: &[f32], scratch: &mut [f32], p: &mut [f32]) {
        const LEAST: f32 = 1e-7;
        let n = p.len();
        let (r, rest) = scratch.split_at_mut(n * n);
        let (q, rest) = rest.split_at_mut(n * n);
        let qp = &mut rest[..n];
        let mut pair = 0;
        for i in 0..n {
            for j in i + 1..n {
                let first = 1.0 - logistic(decisions[pair] * self.a[pair] + self.b[pair]);
                let first = first.clamp(LEAST, 1.0 - LEAST);
                (r[i * n + j], r[j * n + i]) = (first, 1.0 - first);
                pair += 1;
            }
        }
        for i in 0..n {
            p[i] = 1.0 / n as f32;
            q[i * n + i] = 0.0;
            for j in (0..n).filter(|&j| j != i) {
                q[i * n + i] += r[j * n + i] * r[j * n + i];
                q[i * n + j] = if j < i { q[j * n + i] } else { -r[j * n + i] * r[i * n + j] };
            }
        }
        let enough = 0.005 / n as f32;
        for _ in 0..100 {
            let mut pqp = 0.0;
            for i in 0..n {
                qp[i] = 0.0;
                for j in 0..n {
                    qp[i] += q[i * n + j] * p[j];
                }
                pqp += p[i] * qp[i];
            }
            let error = qp.iter().fold(0.0f32, |most, &x| most.max((x - pqp).abs()));
            if error < enough {
                break;
            }
            for i in 0..n {
                let step = (pqp - qp[i]) / q[i * n + i];
                p[i] += step;
                pqp = (pqp + step * (step * q[i * n + i] + 2.0 * qp[i])) / (1.0 + step) / (1.0 + step);
                for j in 0..n {
                    qp[j] = (qp[j] + step * q[i * n + j]) / (1.0 + step);
                    p[j] /= 1.0 + step;
                }
            }
        }
    }
}

impl Svm {
    pub fn vector_count(&self) -> usize {
        self.vectors.len() / self.features
    }

    /// Scores a row has in the end.
    pub fn columns(&self) -> usize {
        match &self.machine {
            SvmMachine::Regression { .. } => 1,
            SvmMachine::Classes { labels, .. } => labels.len(),
            SvmMachine::Pairs(pairs) if pairs.probabilities.is_some() => pairs.classes(),
            SvmMachine::Pairs(pairs) => pairs.rho.len().max(2),
        }
    }

    /// Floats that [`Svm::finish`] works in.
    pub fn scratch_len(&self) -> usize {
        match &self.machine {
            SvmMachine::Pairs(pairs) => {
                let n = pairs.classes();
                pairs.rho.len() + n + if pairs.probabilities.is_some() { 2 * n * n + n } else { 0 }
            }
            _ => 0,
        }
    }

    /// From a row's kernel values (`[vectors]`) to its scores (`[columns]`) and, of a classifier, the class.
    pub fn finish<K: Copy + Into<f64>>(&self, kernels: &[K], scratch: &mut [f32], scores: &mut [f32]) -> usize {
        match &self.machine {
            SvmMachine::Regression { coefficients, rho, one_class } => {
                let sum: f64 = coefficients.iter().zip(kernels).map(|(&c, &k)| f64::from(c) * k.into()).sum();
                let y = (sum + f64::from(*rho)) as f32;
                scores[0] = match one_class {
                    true if y > 0.0 => 1.0,
                    true => -1.0,
                    false => y,
                };
                0
            }
            SvmMachine::Classes { labels, rho, probabilities, transform } => {
                for (score, &k) in scores.iter_mut().zip(kernels) {
                    *score = (k.into() + f64::from(*rho)) as f32;
                }
                let best = largest(scores);
                let above = match self.vectors.iter().all(|&c| c >= 0.0) {
                    true => scores[best] >= 0.5,
                    false => scores[best] > 0.0,
                };
                let second = labels.len() == 2 && probabilities.is_none() && above;
                match (labels.len(), transform) {
                    (1, PostTransform::Probit) | (2.., _) => transform.apply(scores),
                    // Of one score every other transform is the identity.
                    _ => {}
                }
                if second { 1 } else { best }
            }
            SvmMachine::Pairs(pairs) => {
                let (decisions, scratch) = scratch.split_at_mut(pairs.rho.len());
                let (votes, scratch) = scratch.split_at_mut(pairs.classes());
                let class = pairs.decide(kernels, decisions, votes);
                pairs.score(decisions, scratch, scores);
                class
            }
        }
    }

    /// The names of classes, of a classifier.
    pub fn class_labels(&self) -> Option<&ClassLabels> {
        match &self.machine {
            SvmMachine::Regression { .. } => None,
            SvmMachine::Classes { labels, .. } => Some(labels),
            SvmMachine::Pairs(pairs) => Some(&pairs.labels),
        }
    }
}

fn regressor(node: &mut NodeReader) -> Result<Svm, ImportError> {
    let kernel = SvmKernel::import(node)?;
    let count = node.int("n_supports", 0)?;
    let vectors = node.optional_floats("support_vectors")?.unwrap_or_default();
    let coefficients = node.optional_floats("coefficients")?.unwrap_or_default();
    let rho = node.optional_floats("rho")?.unwrap_or_default();
    let one_class = node.int("one_class", 0)? != 0;
    // ONNX Runtime applies none to a regressor.
    PostTransform::import(node)?;
    let Some(&rho) = rho.first() else { return Err(node.corrupt("has no rho")) };
    if coefficients.is_empty() {
        return Err(node.corrupt("has no coefficients"));
    }
    if count <= 0 {
        let (features, vectors) = (coefficients.len(), coefficients.into());
        let machine = SvmMachine::Regression { coefficients: [1.0].into(), rho, one_class };
        return Ok(Svm { kernel: SvmKernel::Linear, vectors, features, machine });
    }
    let features = features(node, vectors.len(), count as usize)?;
    if coefficients.len() != count as usize {
        return Err(node.corrupt(format!("has {} coefficients for {count} vectors", coefficients.len())));
    }
    let machine = SvmMachine::Regression { coefficients: coefficients.into(), rho, one_class };
    Ok(Svm { kernel, vectors: vectors.into(), features, machine })
}

fn features(node: &NodeReader, len: usize, vectors: usize) -> Result<usize, ImportError> {
    match len > 0 && vectors > 0 && len.is_multiple_of(vectors) {
        true => Ok(len / vectors),
        false => Err(node.corrupt(format!("has {len} elements for {vectors} vectors, expected a multiple"))),
    }
}

fn classifier(node: &mut NodeReader) -> Result<Svm, ImportError> {
    let kernel = SvmKernel::import(node)?;
    let labels = ClassLabels::import(node, "classlabels_ints", "classlabels_strings")?;
    let counts = node.optional_ints("vectors_per_class")?.unwrap_or_default();
    let vectors = node.optional_floats("support_vectors")?.unwrap_or_default();
    let mut coefficients = node.optional_floats("coefficients")?.unwrap_or_default();
    let mut rho = node.optional_floats("rho")?.unwrap_or_default();
    let probabilities = Probabilities::import(node)?;
    let transform = PostTransform::import(node)?;
    let classes = labels.len();
    if !(1..1 << 16).contains(&classes) {
        return Err(node.corrupt(format!("has {classes} class labels, expected 1 to {}", (1 << 16) - 1)));
    }
    let mut starts = vec![0usize];
    for &count in &counts {
        let last = starts[starts.len() - 1];
        let end = usize::try_from(count).ok().and_then(|count| last.checked_add(count));
        starts.push(end.ok_or_else(|| node.corrupt(format!("'vectors_per_class' holds {count}")))?);
    }
    let count = starts[starts.len() - 1];
    if count == 0 {
        let Some(&rho) = rho.first() else { return Err(node.corrupt("has no rho")) };
        let features = features(node, coefficients.len(), classes)?;
        let machine = SvmMachine::Classes { labels, rho, probabilities, transform };
        return Ok(Svm { kernel: SvmKernel::Linear, vectors: coefficients.into(), features, machine });
    }
    if counts.len() != classes || classes < 2 {
        return Err(node.corrupt(format!("has vectors of {} classes for {classes} class labels", counts.len())));
    }
    let features = features(node, vectors.len(), count)?;
    let pairs = classes * (classes - 1) / 2;
    let weights = (classes - 1).checked_mul(count).filter(|&weights| weights <= coefficients.len());
    let Some(weights) = weights else {
        let have = coefficients.len();
        return Err(node.corrupt(format!("has {have} coefficients for {classes} classes and {count} vectors")));
    };
    let few = probabilities.as_ref().is_some_and(|p| p.a.len() < pairs);
    if rho.len() < pairs || few {
        return Err(node.corrupt(format!("has {} rho, {pairs} expected, and as many prob_a if any", rho.len())));
    }
    if probabilities.is_none() && classes == 2 && transform == PostTransform::Probit {
        return Err(node.unsupported("PROBIT of two classes without probabilities"));
    }
    coefficients.truncate(weights);
    rho.truncate(pairs);
    let machine =
        Pairs { labels, starts, coefficients: coefficients.into(), rho: rho.into(), probabilities, transform };
    Ok(Svm { kernel, vectors: vectors.into(), features, machine: SvmMachine::Pairs(machine) })
}

impl Operator for Svm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        match node.op_type.as_str() {
            "SVMRegressor" => regressor(node),
            _ => classifier(node),
        }
        .map(Op::from)
    }

    fn export(&self) -> Spelling {
        let labelled = |spelling, labels: &ClassLabels, probabilities, transform: PostTransform| {
            let spelling = labels.export(spelling, "classlabels_ints", "classlabels_strings");
            Probabilities::export(probabilities, spelling).with("post_transform", transform.name())
        };
        let spelling = match &self.machine {
            SvmMachine::Regression { coefficients, rho, one_class } => Spelling::new("SVMRegressor")
                .with("n_supports", self.vector_count() as i64)
                .with("support_vectors", self.vectors.to_vec())
                .with("coefficients", coefficients.to_vec())
                .with("rho", vec![*rho])
                .with("one_class", i64::from(*one_class)),
            SvmMachine::Classes { labels, rho, probabilities, transform } => {
                let spelling = Spelling::new("SVMClassifier").with("coefficients", self.vectors.to_vec());
                labelled(spelling.with("rho", vec![*rho]), labels, probabilities, *transform)
            }
            SvmMachine::Pairs(pairs) => {
                let counts = pairs.starts.windows(2).map(|pair| (pair[1] - pair[0]) as i64).collect::<Vec<_>>();
                let spelling = Spelling::new("SVMClassifier")
                    .with("vectors_per_class", counts)
                    .with("support_vectors", self.vectors.to_vec())
                    .with("coefficients", pairs.coefficients.to_vec())
                    .with("rho", pairs.rho.to_vec());
                labelled(spelling, &pairs.labels, &pairs.probabilities, pairs.transform)
            }
        };
        self.kernel.export(spelling.in_domain(ML_DOMAIN))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let rows = row_dim(numeric(inputs, 0)?, Some(self.features), context)?;
        let scores = TensorFact::new(DType::F32, vec![rows.clone(), Dim::from(self.columns())]).into();
        Ok(match self.class_labels() {
            None => vec![scores],
            Some(labels) => vec![TensorFact::new(labels.dtype(), vec![rows]).into(), scores],
        })
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let rows = Rows::with_features(x, self.features)?;
        let columns = self.columns();
        let shape = [rows.count, columns];
        let mut result = vec![0f32; context.bounded_len(&shape)?];
        let mut scratch = vec![0f32; context.bounded_len(&[self.scratch_len()])?];
        let mut kernels = vec![0f64; self.vector_count()];
        let mut classes = Vec::with_capacity(rows.count);
        let values = f32_values(x)?;
        for (row, scores) in values.chunks_exact(self.features).zip(result.chunks_exact_mut(columns)) {
            for (kernel, vector) in kernels.iter_mut().zip(self.vectors.chunks_exact(self.features)) {
                *kernel = self.kernel.of(row, vector);
            }
            classes.push(self.finish(&kernels, &mut scratch, scores));
        }
        let scores = Tensor::from_vec(shape, result)?;
        let labels = self.class_labels().map(|labels| labels.tensor(&classes)).transpose()?;
        Ok(labels.into_iter().chain([scores]).map(Value::Tensor).collect())
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings, tensor};

    const VECTORS: [f32; 6] = [1.0, 0.0, 0.0, 1.0, -1.0, 0.5];

    fn svm(op: &'static str, kernel: &str, parameters: [f32; 3]) -> Case {
        let x = f32s(&[3, 2], &[1.0, 2.0, -3.0, 0.5, 0.0, 0.0]);
        case(op, 1).input(x).with("kernel_type", kernel).with("kernel_params", parameters.to_vec())
    }

    fn regressor(kernel: &str, vectors: i64, coefficients: &[f32]) -> Case {
        let model = svm("ai.onnx.ml.SVMRegressor", kernel, [0.5, 0.25, 3.0]).with("n_supports", vectors);
        model.with("coefficients", coefficients.to_vec()).with("rho", vec![0.1])
    }

    /// Values from ONNX Runtime.
    #[test]
    fn regression_sums_kernel_values() {
        let model = |kernel| regressor(kernel, 3, &[0.5, -1.0, 0.25]).with("support_vectors", VECTORS.to_vec());
        for (kernel, expected) in [
            ("LINEAR", [-1.4, -1.0875, 0.1]),
            ("POLY", [-1.638_281_2, 0.646_386_8, 0.096_093_8]),
            ("RBF", [-0.189_227_6, 0.124_178_2, -0.069_45]),
            ("SIGMOID", [-0.369_479_5, -0.547_747_6, 0.038_770_3]),
        ] {
            model(kernel).gives([f32s(&[3, 1], &expected)]);
        }
        model("RBF").with("one_class", 1).gives([f32s(&[3, 1], &[-1.0, 1.0, -1.0])]);
        let linear = || regressor("RBF", 0, &[0.5, -1.0]);
        linear().gives([f32s(&[3, 1], &[-1.4, -1.9, 0.1])]);
        linear().with("post_transform", "LOGISTIC").gives([f32s(&[3, 1], &[-1.4, -1.9, 0.1])]);
    }

    fn pair() -> Case {
        let model = svm("ai.onnx.ml.SVMClassifier", "RBF", [0.5, 0.0, 3.0]).with("classlabels_ints", vec![4, 9]);
        let model = model.with("vectors_per_class", vec![2, 1]).with("support_vectors", VECTORS.to_vec());
        model.with("coefficients", vec![0.5, 1.0, -1.5]).with("rho", vec![-0.1])
    }

    #[test]
    fn a_pair_of_classes_is_decided_by_the_sign() {
        let labels = || tensor::<i64>(&[3], &[4, 9, 4]);
        for (transform, expected) in [
            ("NONE", [-0.269_641_7, 0.269_641_7, 0.293_051_2, -0.293_051_2, -0.006_903_8, 0.006_903_8]),
            ("LOGISTIC", [0.432_995_1, 0.567_004_9, 0.572_743, 0.427_257, 0.498_274, 0.501_726]),
            ("SOFTMAX", [0.730_358_3, 0.269_641_7, 1.293_051_2, -0.293_051_2, 0.993_096_2, 0.006_903_8]),
        ] {
            pair().with("post_transform", transform).gives([labels(), f32s(&[3, 2], &expected)]);
        }
        let likely = || pair().with("prob_a", vec![-2.0]).with("prob_b", vec![0.25]);
        let expected = [0.571_646_2, 0.428_353_6, 0.302_356, 0.697_643_9, 0.441_120_9, 0.558_879];
        likely().gives([labels(), f32s(&[3, 2], &expected)]);
        let expected = [0.535_762, 0.464_238, 0.402_445, 0.597_555, 0.470_594_4, 0.529_405_6];
        likely().with("post_transform", "SOFTMAX").gives([labels(), f32s(&[3, 2], &expected)]);
    }

    fn three(coefficients: &[f32]) -> Case {
        let model = svm("ai.onnx.ml.SVMClassifier", "POLY", [0.5, 1.0, 2.0]).with("vectors_per_class", vec![1, 2, 1]);
        let model = model.with("support_vectors", [&VECTORS[..], &[2.0, 2.0]].concat());
        model.with("coefficients", coefficients.to_vec()).with("rho", vec![-0.1, 0.2, 0.3])
    }

    #[test]
    fn the_class_with_most_votes_wins() {
        let coefficients = [0.5, 1.0, -1.5, 0.3, -0.2, 0.7, 0.6, -0.9];
        let model = || three(&coefficients).with("classlabels_ints", vec![4, 9, 7]);
        let labels = || tensor::<i64>(&[3], &[4, 9, 9]);
        let decisions = [3.525, 4.55, -10.7, -8.748_438, 0.825, 3.503_125, -0.1, 0.3, 0.7];
        model().gives([labels(), f32s(&[3, 3], &decisions)]);
        let likely = [0.988_833_3, 0.000_606_3, 0.010_560_3, 0.028_196_4, 0.862_362_5, 0.109_441_1];
        let likely = [&likely[..], &[0.305_073_3, 0.417_196_6, 0.277_730_3]].concat();
        let with_probabilities = model().with("prob_a", vec![-2.0, -1.0, -0.5]).with("prob_b", vec![0.25, 0.0, 0.1]);
        with_probabilities.gives([labels(), f32s(&[3, 3], &likely)]);
        let names = ["a", "b", "c"].map(str::to_string).to_vec();
        let named = three(&coefficients).with("classlabels_strings", names);
        named.gives([strings(&[3], &["a", "b", "b"]), f32s(&[3, 3], &decisions)]);
    }

    #[test]
    fn a_linear_machine_has_a_vector_a_class() {
        let model = |coefficients: &[f32], labels: &[i64]| {
            let model = svm("ai.onnx.ml.SVMClassifier", "RBF", [0.5, 0.0, 3.0]).with("rho", vec![0.05]);
            model.with("coefficients", coefficients.to_vec()).with("classlabels_ints", labels.to_vec())
        };
        let two = || model(&[0.3, 0.1, -0.3, 0.2], &[4, 9]);
        let scores = || f32s(&[3, 2], &[0.55, 0.15, -0.8, 1.05, 0.05, 0.05]);
        two().gives([tensor::<i64>(&[3], &[9, 9, 9]), scores()]);
        let likely = two().with("prob_a", vec![1.0]).with("prob_b", vec![1.0]);
        likely.gives([tensor::<i64>(&[3], &[4, 9, 4]), scores()]);
        let logistic = [0.634_135_6, 0.537_429_8, 0.310_025_6, 0.740_774_8, 0.512_497_4, 0.512_497_4];
        two().with("post_transform", "LOGISTIC").gives([tensor::<i64>(&[3], &[9, 9, 9]), f32s(&[3, 2], &logistic)]);
        let upwards = f32s(&[3, 2], &[0.55, 0.75, -0.8, -0.75, 0.05, 0.05]);
        model(&[0.3, 0.1, 0.3, 0.2], &[4, 9]).gives([tensor::<i64>(&[3], &[9, 9, 4]), upwards]);
        let several = model(&[0.3, 0.1, -0.3, 0.2, 0.0, 0.1], &[4, 9, 7]).with("post_transform", "SOFTMAX");
        let softmax = [0.414_741_9, 0.278_009_8, 0.307_248_3, 0.101_839, 0.647_677_6, 0.250_483_5];
        let softmax = [&softmax[..], &[1.0 / 3.0; 3]].concat();
        several.gives([tensor::<i64>(&[3], &[4, 9, 4]), f32s(&[3, 3], &softmax)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        regressor("RBF", 3, &[0.5, -1.0]).with("support_vectors", VECTORS.to_vec()).fails("2 coefficients for 3");
        regressor("RBF", 4, &[0.5; 4]).with("support_vectors", VECTORS.to_vec()).fails("6 elements for 4 vectors");
        regressor("CUBIC", 0, &[0.5]).fails("kernel_type 'CUBIC'");
        regressor("LINEAR", 0, &[0.5; 3]).fails("expected 3");
        pair().with("vectors_per_class", vec![3]).fails("vectors of 1 classes for 2");
        pair().with("vectors_per_class", vec![4, -1]).fails("holds -1");
        pair().with("rho", vec![0.0; 0]).fails("0 rho, 1 expected");
        pair().with("prob_a", vec![1.0]).fails("1 values of prob_a and 0");
        pair().with("post_transform", "PROBIT").fails("PROBIT of two classes");
        three(&[0.5; 7]).with("classlabels_ints", vec![4, 9, 7]).fails("7 coefficients for 3 classes and 4 vectors");
    }
}
