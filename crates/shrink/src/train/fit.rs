//! The loop: batches, losses, steps, evaluations, checkpoints.

use super::{
    Fit, Fitted, Point, Progress,
    batches::{batches, concatenated, stackable, stacked, uniform},
    checkpoint::{Checkpoint, State, bits, of_bits},
    differentiable::{Clear, Differentiable, Fault, Lens, from_host, read, trainable},
    fake_quantize::Rounding,
    loss::{Answers, Metric, Teacher, logits, loss},
    optimizer::{Moments, Step, clip_factor, rate},
};
use crate::{Data, Sample, ShrinkError, plain, quantize::Range, runner::Runner};
use candle_core::{DType as CandleType, Device, Tensor, Var};
use cutover_backend::{Backend, RunContext};
use cutover_graph::{Constant, Graph, ValueId};
use cutover_tensor::{DType, Tensor as Host, Value};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use std::{
    collections::{HashMap, hash_map::Entry},
    ops::ControlFlow,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

impl From<candle_core::Error> for ShrinkError {
    fn from(error: candle_core::Error) -> ShrinkError {
        ShrinkError::Training(error.to_string())
    }
}

impl From<Fault> for ShrinkError {
    fn from(fault: Fault) -> ShrinkError {
        ShrinkError::Training(fault.0)
    }
}

pub(super) fn fit(
    student: &Graph,
    teacher: Option<&Graph>,
    data: &Data,
    held_out: Option<&Data>,
    options: &Fit,
    backend: &Arc<dyn Backend>,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Fitted, ShrinkError> {
    check(teacher, data, held_out, options)?;
    let mut trainer = Trainer::new(student, teacher, data, held_out, options, backend)?;
    trainer.run(progress)?;
    trainer.finish()
}

fn check(teacher: Option<&Graph>, data: &Data, held_out: Option<&Data>, options: &Fit) -> Result<(), ShrinkError> {
    let wrong = |message: String| Err(ShrinkError::Option(message));
    options.check().map_err(ShrinkError::Option)?;
    let losses = &options.losses;
    if data.samples.is_empty() || held_out.is_some_and(|data| data.samples.is_empty()) {
        return Err(ShrinkError::NoSamples);
    }
    if losses.of_teacher() && teacher.is_none() {
        return wrong("soft, mse, cosine and features compare with a teacher, and there is none".to_string());
    }
    for (data, what) in [(Some(data), "the data"), (held_out, "what is held out")] {
        let Some(data) = data else { continue };
        match &data.labels {
            None if losses.labels > 0.0 => return wrong(format!("a loss of labels, and {what} has none")),
            Some(labels) if labels.len() != data.samples.len() => {
                return wrong(format!("{what} has labels for {} samples of {}", labels.len(), data.samples.len()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A graph and the values of it that losses look at.
struct Looked {
    graph: Graph,
    /// Floating-point outputs, the values that hold their logits, and the features.
    outputs: Vec<ValueId>,
    logits: Vec<ValueId>,
    features: Vec<ValueId>,
    /// All of them, each once.
    wanted: Vec<ValueId>,
}

impl Looked {
    fn new(graph: &Graph, features: impl Iterator<Item = String>, who: &str) -> Result<Looked, ShrinkError> {
        let graph = plain(graph.clone())?;
        let is_float = |v: &ValueId| graph.value(*v).fact.as_tensor().is_some_and(|f| f.dtype == DType::F32);
        let outputs: Vec<ValueId> = graph.outputs().iter().copied().filter(is_float).collect();
        if outputs.is_empty() {
            return Err(ShrinkError::Option(format!("the {who} has no output of f32")));
        }
        let find = |name: String| {
            let found = graph
                .values()
                .find(|(_, v)| v.name == name && v.fact.as_tensor().is_some_and(|f| f.dtype == DType::F32));
            found
                .map(|(id, _)| id)
                .ok_or_else(|| ShrinkError::Option(format!("the {who} has no value '{name}' of f32")))
        };
        let features = features.map(find).collect::<Result<Vec<_>, _>>()?;
        let logits: Vec<ValueId> = outputs.iter().map(|&output| logits(&graph, output)).collect();
        let mut wanted = [&outputs[..], &logits, &features].concat();
        wanted.sort();
        wanted.dedup();
        Ok(Looked { outputs, logits, features, wanted, graph })
    }

    /// The outputs, the logits and the features out of what is wanted.
    fn spread(&self, tensors: &[Tensor]) -> Vec<Tensor> {
        let values = self.outputs.iter().chain(&self.logits).chain(&self.features);
        let place = |value| self.wanted.binary_search(value).expect("wanted, as all are");
        values.map(|value| tensors[place(value)].clone()).collect()
    }
}

/// A teacher and what it answered so far.
struct Taught {
    looked: Looked,
    runner: Runner,
    answers: [HashMap<usize, Vec<Host>>; 2],
}

/// Which data a batch is of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Training,
    HeldOut,
}

struct Trainer<'a> {
    options: &'a Fit,
    data: &'a Data,
    held_out: Option<&'a Data>,
    student: Looked,
    differentiable: Differentiable,
    taught: Option<Taught>,
    parameters: Vec<ValueId>,
    /// The graph's, then the projections'.
    variables: Vec<Var>,
    /// Places among the variables, for each feature.
    projections: Vec<Option<usize>>,
    /// Where a feature's channels are on another axis than the last.
    channels_last: Vec<Option<Vec<usize>>>,
    moments: Vec<Moments>,
    rounding: Option<Rounding>,
    stack: bool,
    metric: Metric,
    state: State,
    best: Vec<Vec<f32>>,
    steps: usize,
    started: Instant,
}

impl<'a> Trainer<'a> {
    fn new(
        student: &Graph,
        teacher: Option<&Graph>,
        data: &'a Data,
        held_out: Option<&'a Data>,
        options: &'a Fit,
        backend: &Arc<dyn Backend>,
    ) -> Result<Trainer<'a>, ShrinkError> {
        let features = &options.losses.features;
        let student = Looked::new(student, features.iter().map(|f| f.student.clone()), "student")?;
        let mut parameters = trainable(&student.graph);
        for name in &options.frozen {
            let before = parameters.len();
            parameters.retain(|&p| student.graph.value(p).name != *name);
            if parameters.len() == before {
                return Err(ShrinkError::Option(format!(
                    "'{name}' is to stay as it is, and is no weight that is trained"
                )));
            }
        }
        if parameters.is_empty() {
            let message = "the model has no weights of f32 that can be trained; integers of a quantized one can't";
            return Err(ShrinkError::Option(message.to_string()));
        }
        let mut variables = Vec::new();
        for &parameter in &parameters {
            let constant = student.graph.constant(parameter).expect("a weight");
            variables.push(Var::from_tensor(&from_host(&constant.tensor)?)?);
        }
        let taught = teacher.map(|teacher| Trainer::taught(teacher, &student, options, backend)).transpose()?;
        let rounding = options.quantize.as_ref().map(|o| Rounding::new(&student.graph, o)).transpose()?;
        let differentiable = Differentiable::new(student.graph.clone(), &parameters)?;
        let stack = stackable(&student.graph) && taught.as_ref().is_none_or(|t| stackable(&t.looked.graph));
        let has_labels = held_out.unwrap_or(data).labels.is_some();
        let mut trainer = Trainer {
            metric: Metric::of(&options.losses, has_labels, taught.is_some()),
            projections: vec![None; features.len()],
            channels_last: vec![None; features.len()],
            moments: Vec::new(),
            state: State::default(),
            best: Vec::new(),
            steps: 0,
            started: Instant::now(),
            options,
            data,
            held_out,
            student,
            differentiable,
            taught,
            parameters,
            variables,
            rounding,
            stack,
        };
        let per_epoch = batches(&data.samples, options.batch, stack, options.seed, None).len();
        trainer.steps = options.steps.unwrap_or(options.epochs * per_epoch);
        trainer.add_projections()?;
        trainer.moments = trainer.variables.iter().map(|v| Moments::zeros(v.as_tensor().elem_count())).collect();
        trainer.state.fingerprint = trainer.fingerprint()?;
        trainer.resume()?;
        Ok(trainer)
    }

    fn taught(
        teacher: &Graph,
        student: &Looked,
        options: &Fit,
        backend: &Arc<dyn Backend>,
    ) -> Result<Taught, ShrinkError> {
        let looked = Looked::new(teacher, options.losses.features.iter().map(|f| f.teacher.clone()), "teacher")?;
        let names =
            |looked: &Looked| looked.outputs.iter().map(|&v| looked.graph.value(v).name.clone()).collect::<Vec<_>>();
        if names(&looked) != names(student) {
            let message = format!("student {:?} against teacher {:?}", names(student), names(&looked));
            return Err(ShrinkError::Signature(message));
        }
        let mut graph = looked.graph.clone();
        graph.set_outputs(looked.wanted.clone());
        Ok(Taught { runner: Runner::new(&graph, backend)?, looked, answers: Default::default() })
    }

    /// A matrix for every feature whose widths differ, drawn from the seed.
    fn add_projections(&mut self) -> Result<(), ShrinkError> {
        if self.options.losses.features.is_empty() {
            return Ok(());
        }
        let (outputs, features) = (self.student.outputs.len(), self.options.losses.features.len());
        let ours = self.forward(&self.data.samples[0], false)?.split_off(2 * outputs);
        let theirs = self.answers(Part::Training, &[0])?.split_off(2 * outputs);
        let mut random = ChaCha8Rng::seed_from_u64(self.options.seed ^ 0x7072_6f6a);
        for i in 0..features {
            let (a, b) = (ours[i].dims(), theirs[i].dims());
            if a == b {
                continue;
            }
            let differing: Vec<usize> = (0..a.len().min(b.len())).filter(|&axis| a[axis] != b[axis]).collect();
            let (&[axis], true) = (&differing[..], a.len() == b.len()) else {
                let feature = &self.options.losses.features[i];
                let message = format!("feature '{}' is {a:?}, '{}' is {b:?}", feature.student, feature.teacher);
                return Err(ShrinkError::Option(format!("{message}: they may differ along one axis")));
            };
            if axis + 1 < a.len() {
                let order = (0..a.len()).filter(|&other| other != axis).chain([axis]);
                self.channels_last[i] = Some(order.collect());
            }
            let bound = (3.0 / a[axis] as f64).sqrt();
            let values = (0..a[axis] * b[axis]).map(|_| ((2.0 * uniform(&mut random) - 1.0) * bound) as f32).collect();
            self.projections[i] = Some(self.variables.len());
            self.variables.push(Var::from_vec(values, (a[axis], b[axis]), &Device::Cpu)?);
        }
        Ok(())
    }

    fn fingerprint(&self) -> Result<String, ShrinkError> {
        let mut hasher = blake3::Hasher::new();
        let asked = Fit { checkpoints: None, minutes: None, ..self.options.clone() };
        let asked = serde_json::to_vec(&asked).map_err(|e| ShrinkError::Training(e.to_string()))?;
        hasher.update(&asked);
        for &parameter in &self.parameters {
            let value = self.student.graph.value(parameter);
            hasher.update(value.name.as_bytes());
            hasher.update(self.student.graph.constant(parameter).expect("a weight").tensor.bytes());
        }
        for data in [Some(self.data), self.held_out].into_iter().flatten() {
            for (name, value) in data.samples.iter().flatten() {
                hasher.update(name.as_bytes());
                hasher.update(value.as_tensor().map_or(&[][..], Host::bytes));
            }
            for label in data.labels.iter().flatten().flatten() {
                hasher.update(&label.to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn resume(&mut self) -> Result<(), ShrinkError> {
        let Some(folder) = &self.options.checkpoints else { return Ok(()) };
        let Some(checkpoint) = Checkpoint::load(folder, &self.state.fingerprint)? else { return Ok(()) };
        if checkpoint.weights.len() != self.variables.len() || checkpoint.moments.len() != self.variables.len() {
            return Err(ShrinkError::Training("the checkpoint has other weights".to_string()));
        }
        for (variable, values) in self.variables.iter().zip(checkpoint.weights) {
            variable.set(&Tensor::from_vec(values, variable.dims(), &Device::Cpu)?)?;
        }
        (self.moments, self.best, self.state) = (checkpoint.moments, checkpoint.best, checkpoint.state);
        let ranges = of_bits(&self.state.ranges);
        self.set_ranges(&ranges);
        Ok(())
    }

    fn set_ranges(&mut self, ranges: &[(String, Range)]) {
        let Some(rounding) = &mut self.rounding else { return };
        let by_name: HashMap<&str, Range> = ranges.iter().map(|(name, range)| (name.as_str(), *range)).collect();
        let values = self.student.graph.values();
        rounding.ranges = values.filter_map(|(id, v)| Some((id, *by_name.get(v.name.as_str())?))).collect();
    }

    fn ranges(&self) -> Vec<(String, Range)> {
        let Some(rounding) = &self.rounding else { return Vec::new() };
        let mut ranges: Vec<(String, Range)> =
            rounding.ranges.iter().map(|(&v, &range)| (self.student.graph.value(v).name.clone(), range)).collect();
        ranges.sort_by(|a, b| a.0.cmp(&b.0));
        ranges
    }

    fn save(&mut self) -> Result<(), ShrinkError> {
        let Some(folder) = &self.options.checkpoints else { return Ok(()) };
        self.state.ranges = bits(&self.ranges());
        let weights = self.weights(self.variables.len())?;
        let checkpoint =
            Checkpoint { state: self.state.clone(), weights, moments: self.moments.clone(), best: self.best.clone() };
        checkpoint.save(folder)
    }

    fn weights(&self, count: usize) -> Result<Vec<Vec<f32>>, ShrinkError> {
        Ok(self.variables[..count]
            .iter()
            .map(|v| read(v.as_tensor(), |view| view.data.to_vec()))
            .collect::<Result<_, _>>()?)
    }

    /// The student's outputs, logits and features.
    fn forward(&mut self, sample: &Sample, learning: bool) -> Result<Vec<Tensor>, ShrinkError> {
        let tensors: Vec<Tensor> =
            self.variables[..self.parameters.len()].iter().map(|v| v.as_tensor().clone()).collect();
        let mut clear = Clear;
        let lens: &mut dyn Lens = match &mut self.rounding {
            Some(rounding) => {
                rounding.begin(learning);
                rounding
            }
            None => &mut clear,
        };
        let found = self.differentiable.run(&tensors, sample, &self.student.wanted, lens)?;
        Ok(self.student.spread(&found))
    }

    fn part(&self, part: Part) -> &'a Data {
        match part {
            Part::Training => self.data,
            Part::HeldOut => self.held_out.unwrap_or(self.data),
        }
    }

    /// The teacher's outputs, logits and features of a batch; it is asked for each sample once.
    fn answers(&mut self, part: Part, batch: &[usize]) -> Result<Vec<Tensor>, ShrinkError> {
        let data = self.part(part);
        let Some(taught) = &mut self.taught else { return Ok(Vec::new()) };
        let known = &mut taught.answers[usize::from(part == Part::HeldOut)];
        for &sample in batch {
            if let Entry::Vacant(place) = known.entry(sample) {
                let values = taught.runner.run(&data.samples[sample], sample, &RunContext::default())?;
                place.insert(values.into_iter().filter_map(Value::into_tensor).collect());
            }
        }
        let stacked = |i: usize| -> Result<Tensor, ShrinkError> {
            let parts: Vec<&Host> = batch.iter().map(|sample| &known[sample][i]).collect();
            let whole =
                concatenated(&parts).map_err(|e| ShrinkError::Training(format!("the teacher's answers: {e}")))?;
            Ok(from_host(&whole)?)
        };
        let found = (0..taught.looked.wanted.len()).map(stacked).collect::<Result<Vec<_>, _>>()?;
        Ok(taught.looked.spread(&found))
    }

    /// The loss of samples that are run together, and what they add to the metric.
    fn judge(&mut self, part: Part, batch: &[usize], learning: bool) -> Result<(Tensor, (f64, usize)), ShrinkError> {
        let data = self.part(part);
        let samples: Vec<&Sample> = batch.iter().map(|&i| &data.samples[i]).collect();
        let mut ours = match samples[..] {
            [one] => self.forward(one, learning)?,
            _ => self.forward(&stacked(&samples)?, learning)?,
        };
        let mut theirs = self.answers(part, batch)?;
        for (i, order) in self.channels_last.iter().enumerate() {
            if let Some(order) = order {
                for tensors in [&mut ours, &mut theirs] {
                    let at = tensors.len() - self.channels_last.len() + i;
                    tensors[at] = tensors[at].permute(order.clone())?.contiguous()?;
                }
            }
        }
        let labels: Option<Vec<i64>> =
            data.labels.as_ref().map(|labels| batch.iter().flat_map(|&i| labels[i].iter().copied()).collect());
        let count = self.student.outputs.len();
        let teacher = self.taught.is_some().then(|| Teacher {
            outputs: &theirs[..count],
            logits: &theirs[count..2 * count],
            features: &theirs[2 * count..],
        });
        let answers = Answers {
            outputs: &ours[..count],
            logits: &ours[count..2 * count],
            features: &ours[2 * count..],
            teacher,
            labels: labels.as_deref(),
        };
        let projections: Vec<Option<Tensor>> =
            self.projections.iter().map(|p| p.map(|p| self.variables[p].as_tensor().clone())).collect();
        let loss = loss(&answers, &self.options.losses, self.options.temperature, &projections)?;
        let metric = match part {
            Part::HeldOut => self.metric.sum(&answers, &loss)?,
            Part::Training => (0.0, 0),
        };
        Ok((loss, metric))
    }

    /// One step of the optimizer over a batch; gives its mean loss.
    fn step(&mut self, batch: &[usize]) -> Result<f64, ShrinkError> {
        let freeze = self.options.quantize.as_ref().map_or(0.0, |o| o.freeze);
        let learning = (self.state.step as f64) < (freeze * self.steps as f64).max(1.0);
        let together: Vec<&[usize]> = if self.stack { vec![batch] } else { batch.chunks(1).collect() };
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.variables.len()];
        let mut sum = 0.0;
        for part in together.iter() {
            let (loss, _) = self.judge(Part::Training, part, learning)?;
            let share = part.len() as f64 / batch.len() as f64;
            sum += share * f64::from(loss.to_dtype(CandleType::F32)?.to_scalar::<f32>()?);
            let found = loss.affine(share, 0.0)?.backward()?;
            for (gradient, variable) in gradients.iter_mut().zip(&self.variables) {
                *gradient = match (gradient.take(), found.get(variable)) {
                    (Some(sum), Some(more)) => Some((sum + more)?),
                    (sum, more) => sum.or(more.cloned()),
                };
            }
        }
        if !sum.is_finite() {
            let message = format!("step {}: the loss is {sum}", self.state.step);
            return Err(ShrinkError::Training(format!("{message}: the rate is too high, or the data is not finite")));
        }
        let gradients =
            gradients.into_iter().map(|g| g.map(|g| g.contiguous()).transpose()).collect::<Result<Vec<_>, _>>()?;
        let factor = clip_factor(&gradients, self.options.clip_norm)?;
        let rate = rate(self.options, self.state.step, self.steps);
        for ((variable, gradient), moments) in self.variables.iter().zip(&gradients).zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            let decay = if variable.rank() >= 2 { self.options.weight_decay } else { 0.0 };
            let number = self.state.step + 1;
            Step { moments: Mutex::new(moments), rate, decay, number, factor }.take(variable, gradient)?;
        }
        Ok(sum)
    }

    /// The metric over what is held out.
    fn evaluate(&mut self) -> Result<Option<f64>, ShrinkError> {
        let Some(held_out) = self.held_out else { return Ok(None) };
        let size = if self.stack { self.options.batch } else { 1 };
        let (mut sum, mut count) = (0.0, 0);
        for batch in batches(&held_out.samples, size, self.stack, self.options.seed, None) {
            let (_, (more, rows)) = self.judge(Part::HeldOut, &batch, false)?;
            (sum, count) = (sum + more, count + rows);
        }
        Ok(Some(sum / count.max(1) as f64))
    }

    fn run(&mut self, progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<(), ShrinkError> {
        self.started = Instant::now();
        let (before, resumed, mut seen) = (self.state.seconds, self.state.step, 0u64);
        if self.is_impatient() {
            return Ok(());
        }
        while self.state.step < self.steps {
            let epoch =
                batches(&self.data.samples, self.options.batch, self.stack, self.options.seed, Some(self.state.epoch));
            while self.state.batch < epoch.len() && self.state.step < self.steps {
                let batch = &epoch[self.state.batch];
                let loss = self.step(batch)?;
                self.state.step += 1;
                self.state.batch += 1;
                self.state.loss_sum += loss;
                self.state.losses += 1;
                self.state.samples += batch.len() as u64;
                seen += batch.len() as u64;
                let elapsed = self.started.elapsed();
                let last = self.state.batch == epoch.len() || self.state.step == self.steps;
                let late = self.options.minutes.is_some_and(|m| elapsed.as_secs_f64() > 60.0 * m);
                let due = match self.options.every {
                    0 => last,
                    every => self.state.step.is_multiple_of(every) || self.state.step == self.steps,
                };
                let mut ends = late;
                if due || late {
                    if last && self.state.batch == epoch.len() {
                        (self.state.epoch, self.state.batch) = (self.state.epoch + 1, 0);
                    }
                    ends |= self.point(before)?;
                    self.save()?;
                }
                let done = (self.state.step - resumed) as f64 / (self.steps - resumed) as f64;
                let told = progress(&Progress {
                    step: self.state.step,
                    steps: self.steps,
                    loss,
                    metric: self.state.curve.last().and_then(|p| p.metric),
                    metric_name: self.metric.name(),
                    rate: rate(self.options, self.state.step.saturating_sub(1), self.steps),
                    samples_per_second: seen as f64 / elapsed.as_secs_f64().max(1e-9),
                    left: Some(Duration::from_secs_f64(elapsed.as_secs_f64() * (1.0 - done) / done.max(1e-9))),
                });
                if told.is_break() {
                    return Err(ShrinkError::Stopped { step: self.state.step });
                }
                if ends {
                    return Ok(());
                }
                if self.state.batch == 0 {
                    break;
                }
            }
            if self.state.batch >= epoch.len() {
                (self.state.epoch, self.state.batch) = (self.state.epoch + 1, 0);
            }
        }
        Ok(())
    }

    /// Evaluates, keeps the best weights, and says whether patience is at its end.
    fn point(&mut self, before: f64) -> Result<bool, ShrinkError> {
        let metric = self.evaluate()?;
        self.state.seconds = before + self.started.elapsed().as_secs_f64();
        let point = Point {
            step: self.state.step,
            loss: self.state.loss_sum / self.state.losses.max(1) as f64,
            metric,
            seconds: self.state.seconds,
        };
        (self.state.loss_sum, self.state.losses) = (0.0, 0);
        self.state.curve.push(point);
        let Some(metric) = metric else { return Ok(false) };
        if self.state.best_metric.is_none_or(|best| metric > best) {
            self.state.best_metric = Some(metric);
            self.state.worse = 0;
            self.best = self.weights(self.parameters.len())?;
            self.state.best_ranges = bits(&self.ranges());
        } else {
            self.state.worse += 1;
        }
        Ok(self.is_impatient())
    }

    fn is_impatient(&self) -> bool {
        self.options.patience > 0 && self.state.worse >= self.options.patience
    }

    fn finish(mut self) -> Result<Fitted, ShrinkError> {
        let weights = match self.best.is_empty() {
            true => self.weights(self.parameters.len())?,
            false => std::mem::take(&mut self.best),
        };
        let ranges = if self.state.best_metric.is_some() { of_bits(&self.state.best_ranges) } else { self.ranges() };
        let mut graph = self.student.graph;
        for (&parameter, values) in self.parameters.iter().zip(weights) {
            let name = graph.value(parameter).name.clone();
            let shape = graph.constant(parameter).expect("a weight").tensor.shape().clone();
            let tensor = Host::from_vec(shape, values).map_err(|source| ShrinkError::Tensor { name, source })?;
            graph.value_mut(parameter).source = cutover_graph::Source::Constant(Constant::new(tensor));
        }
        graph.verify()?;
        Ok(Fitted {
            graph,
            curve: self.state.curve,
            metric_name: self.metric.name(),
            ranges,
            samples_per_second: self.state.samples as f64 / self.state.seconds.max(1e-9),
        })
    }
}
