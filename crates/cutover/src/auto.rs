//! `Device::Auto`: the backend that is fastest for a model, by measuring, where there is more than the CPU.
//!
//! A model is compiled for the CPU and timed on made-up inputs. What its steps have to do, and what another device can do at most, give the least
//! time that the other needs; where that does not beat the CPU by [`WIN`], nothing else is tried. Where it might, the model is compiled for the other
//! too, and the two take turns. Nobody leaves the CPU on a prediction. What was found is kept ([`Choices`]), and the next load does not measure.
//! A device that is lost later is replaced by the CPU until it is there again ([`lost`]).

mod lost;

use crate::choices::{Choices, Kept};
use cutover_backend::{
    Backend, Choice, CompileError, CompileOptions, DeviceInfo, Executable, Footprint, Input, OpTiming, Output, Peak,
    Placement, Profiler, ResourceError, RunContext, RunError, Session, SessionMemory, Signature, Support, Tried, Work,
};
use cutover_graph::{Bindings, Graph, Identity, Node, Plan};
use cutover_tensor::{Tensor, Value};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

/// What another backend's time must be of the CPU's, at most, to be chosen: 10 % less.
const WIN: f64 = 0.9;
/// Turns that two backends take; the first warms up.
const TURNS: usize = 7;
/// After so long no further turn begins.
const MEASURING: Duration = Duration::from_millis(500);
/// Extents for what varies, tried in turn: those of a first axis, of images, of everything else.
const EXTENTS: [(i64, i64, i64); 3] = [(1, 224, 32), (1, 64, 128), (1, 32, 8)];
/// Made-up inputs take no more than this.
const INPUT_BYTES_MAX: usize = 256 << 20;

/// What time it is: a test has its own.
pub(crate) trait Clock: Send + Sync {
    fn now(&self) -> Duration;
}

pub(crate) struct Wall(Instant);

impl Wall {
    pub fn new() -> Arc<Wall> {
        Arc::new(Wall(Instant::now()))
    }
}

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// Opens a device, which was open before, once more.
pub(crate) type Open = Box<dyn Fn() -> Option<Arc<dyn Backend>> + Send + Sync>;

/// `cpu`, or one of `others` for models that it is faster for; beside each, what opens it again.
pub(crate) fn fastest(
    cpu: Arc<dyn Backend>,
    others: Vec<(Arc<dyn Backend>, Open)>,
    choices: Choices,
    clock: Arc<dyn Clock>,
) -> Arc<dyn Backend> {
    let others = others.into_iter().map(|(backend, open)| Arc::new(Other::new(backend, open))).collect();
    Arc::new(Fastest { cpu, others, choices, clock })
}

struct Fastest {
    cpu: Arc<dyn Backend>,
    others: Vec<Arc<Other>>,
    choices: Choices,
    clock: Arc<dyn Clock>,
}

struct Other {
    /// As it was opened last.
    backend: Mutex<Arc<dyn Backend>>,
    open: Open,
    limits: OnceLock<Limits>,
}

impl Other {
    fn new(backend: Arc<dyn Backend>, open: Open) -> Other {
        Other { backend: Mutex::new(backend), open, limits: OnceLock::new() }
    }

    fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.backend.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The device in place of `lost`, opened again by whoever asks first.
    fn again(&self, lost: &Arc<dyn Backend>) -> Option<Arc<dyn Backend>> {
        let mut backend = self.backend.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(&backend, lost) {
            *backend = (self.open)()?;
        }
        Some(Arc::clone(&backend))
    }
}

/// What no run on a device does without.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Of a run that computes next to nothing.
    run: Duration,
    peak: Option<Peak>,
}

impl Backend for Fastest {
    /// The CPU's: which one a model runs on, its executable says.
    fn describe(&self) -> DeviceInfo {
        self.cpu.describe()
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        self.cpu.supports(graph, node)
    }

    fn measure_peak(&self) -> Option<Peak> {
        self.cpu.measure_peak()
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        let key = self.key(plan, options);
        if let Some(kept) = self.choices.find(&key)
            && let Some(executable) = self.compile_kept(&kept, plan, options)
        {
            return Ok(executable);
        }
        let on_cpu = self.cpu.compile(plan, options)?;
        let (winner, choice) = self.measured(on_cpu, plan, options);
        self.choices.keep(&key, &choice);
        Ok(Arc::new(Chosen { executable: winner, choice }))
    }
}

impl Fastest {
    /// What `device`, which is `other`'s, compiled, with the CPU for when it is lost.
    fn surviving(
        &self,
        device: Arc<dyn Backend>,
        other: &Arc<Other>,
        executable: Arc<dyn Executable>,
        plan: &Plan,
        options: &CompileOptions,
    ) -> Arc<dyn Executable> {
        lost::Surviving::new([Arc::clone(&self.cpu), device], Arc::clone(other), executable, plan, options, None)
    }

    /// Everything that a choice depends on: the model's structure, what it is compiled for, and on what. Weights' values do not make it faster.
    fn key(&self, plan: &Plan, options: &CompileOptions) -> Identity {
        let graph = plan.graph();
        let mut text = format!("{} {options:?}", env!("CARGO_PKG_VERSION"));
        for backend in self.all() {
            text += &format!("\n{:?} {:?}", backend.describe(), backend.driver());
        }
        for &id in plan.order() {
            let node = graph.node(id);
            let fact = |value| format!("{} {}", graph.value(value).fact, graph.constant(value).is_some());
            let inputs: Vec<String> = node.inputs.iter().flatten().map(|&value| fact(value)).collect();
            text += &format!("\n{}: {}", node.op.name(), inputs.join(", "));
            let attributes = format!("{:?}", node.op);
            // Of what holds tables, as a forest, the start tells enough.
            text.extend(attributes.chars().take(2000));
        }
        Identity::derived(&text, &[])
    }

    /// The CPU, then the others.
    fn all(&self) -> Vec<Arc<dyn Backend>> {
        std::iter::once(Arc::clone(&self.cpu)).chain(self.others.iter().map(|other| other.backend())).collect()
    }

    /// What was chosen before, where it is still there.
    fn compile_kept(&self, kept: &Kept, plan: &Plan, options: &CompileOptions) -> Option<Arc<dyn Executable>> {
        let all = self.all();
        let at = all.iter().position(|backend| backend.describe().backend == kept.backend)?;
        let backend = &all[at];
        let mut executable = backend.compile(plan, options).ok()?;
        if let Some(other) = at.checked_sub(1).map(|at| &self.others[at]) {
            executable = self.surviving(Arc::clone(backend), other, executable, plan, options);
        }
        let tried = kept.tried.iter().map(|tried| {
            let device = all.iter().map(|b| b.describe()).find(|device| device.backend == tried.backend);
            let name = device.map_or(String::new(), |device| device.device);
            Tried { backend: tried.backend.clone(), device: name, ..tried.clone() }
        });
        let choice = Choice { device: backend.describe(), tried: tried.collect(), was_kept: true };
        Some(Arc::new(Chosen { executable, choice }))
    }

    fn measured(
        &self,
        on_cpu: Arc<dyn Executable>,
        plan: &Plan,
        options: &CompileOptions,
    ) -> (Arc<dyn Executable>, Choice) {
        let mut device = self.cpu.describe();
        let tried = |info: &DeviceInfo| Tried {
            backend: info.backend.to_string(),
            device: info.device.clone(),
            predicted: None,
            measured: None,
            note: String::new(),
        };
        let mut all = vec![tried(&device)];
        let inputs = match made_up(&on_cpu) {
            Some(inputs) => inputs,
            None => {
                all[0].note = "no inputs could be made up to measure with".to_string();
                return (on_cpu, Choice { device, tried: all, was_kept: false });
            }
        };
        let Some((mut on_cpu_takes, work)) = self.time_on_cpu(&on_cpu, &inputs) else {
            all[0].note = "it does not run on made-up inputs".to_string();
            return (on_cpu, Choice { device, tried: all, was_kept: false });
        };
        let mut best: Option<(Arc<dyn Executable>, Duration)> = None;
        for other in &self.others {
            let backend = other.backend();
            let info = backend.describe();
            let mut entry = tried(&info);
            let predicted = other.limits.get_or_init(|| self.limits(&*backend)).least(&work);
            entry.predicted = Some(predicted);
            let most = best.as_ref().map_or(on_cpu_takes.mul_f64(WIN), |(_, takes)| *takes);
            if predicted > most {
                entry.note = "not tried: even at its peak it would not win".to_string();
                all.push(entry);
                continue;
            }
            let compiled = backend.compile(plan, options).map_err(|error| error.to_string());
            let turns = compiled.and_then(|executable| {
                let times = self.take_turns(&on_cpu, &executable, &inputs).map_err(|error| error.to_string())?;
                Ok((executable, times))
            });
            match turns {
                Err(error) => entry.note = error,
                Ok((executable, [cpu, there])) => {
                    on_cpu_takes = cpu;
                    entry.measured = Some(there);
                    if there <= cpu.mul_f64(WIN) && best.as_ref().is_none_or(|(_, takes)| there < *takes) {
                        best = Some((self.surviving(backend, other, executable, plan, options), there));
                        device = info;
                    }
                }
            }
            all.push(entry);
        }
        all[0].measured = Some(on_cpu_takes);
        let winner = best.map_or(on_cpu, |(executable, _)| executable);
        (winner, Choice { device, tried: all, was_kept: false })
    }

    /// The time of a run on the CPU, and what its steps had to do.
    fn time_on_cpu(&self, on_cpu: &Arc<dyn Executable>, inputs: &[Value]) -> Option<(Duration, Vec<Work>)> {
        let mut session = Arc::clone(on_cpu).session(SessionMemory::default()).ok()?;
        let counted = Counted::default();
        run(&mut *session, on_cpu, inputs, &RunContext { profiler: Some(&counted), ..RunContext::default() }).ok()?;
        let mut times = Vec::new();
        let begun = self.clock.now();
        while times.is_empty() || (times.len() < TURNS && self.clock.now() - begun < MEASURING) {
            let start = self.clock.now();
            run(&mut *session, on_cpu, inputs, &RunContext::default()).ok()?;
            times.push(self.clock.now() - start);
        }
        Some((median(times), counted.0.into_inner().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Median times of both, run in turn so that what else the machine does falls on both alike.
    fn take_turns(
        &self,
        one: &Arc<dyn Executable>,
        other: &Arc<dyn Executable>,
        inputs: &[Value],
    ) -> Result<[Duration; 2], RunError> {
        let both = [one, other];
        let mut sessions = Vec::new();
        for executable in both {
            sessions.push(Arc::clone(executable).session(SessionMemory::default())?);
        }
        let mut times = [Vec::new(), Vec::new()];
        let begun = self.clock.now();
        for turn in 0..=TURNS {
            if turn > 1 && self.clock.now() - begun >= MEASURING {
                break;
            }
            for ((session, executable), times) in sessions.iter_mut().zip(both).zip(&mut times) {
                let start = self.clock.now();
                run(&mut **session, executable, inputs, &RunContext::default())?;
                if turn > 0 {
                    times.push(self.clock.now() - start);
                }
            }
        }
        Ok(times.map(median))
    }

    /// What a device's runs cost before they compute anything, and its peak.
    fn limits(&self, backend: &dyn Backend) -> Limits {
        let nothing = || -> Option<Duration> {
            let executable = backend.compile(&next_to_nothing()?, &CompileOptions::default()).ok()?;
            let inputs = made_up(&executable)?;
            let mut session = Arc::clone(&executable).session(SessionMemory::default()).ok()?;
            let mut times = Vec::new();
            for turn in 0..=TURNS {
                let start = self.clock.now();
                run(&mut *session, &executable, &inputs, &RunContext::default()).ok()?;
                if turn > 0 {
                    times.push(self.clock.now() - start);
                }
            }
            times.into_iter().min()
        };
        Limits { run: nothing().unwrap_or_default(), peak: backend.measure_peak() }
    }
}

impl Limits {
    /// The least time of a run whose steps have so much to do.
    fn least(&self, work: &[Work]) -> Duration {
        // Steps that a device fuses read less than the CPU counted; products have to be computed anywhere.
        let total = Work {
            operations: work.iter().map(|work| work.operations).sum(),
            integer_operations: work.iter().map(|work| work.integer_operations).sum(),
            bytes: 0,
        };
        let computing = self.peak.and_then(|peak| peak.share(total, 1.0)).unwrap_or(0.0);
        self.run + Duration::try_from_secs_f64(computing).unwrap_or(Duration::MAX / 4)
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or(Duration::MAX)
}

#[derive(Default)]
struct Counted(Mutex<Vec<Work>>);

impl Profiler for Counted {
    fn record(&self, timing: OpTiming<'_>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(timing.work);
    }
}

fn run(
    session: &mut dyn Session,
    executable: &Arc<dyn Executable>,
    inputs: &[Value],
    context: &RunContext<'_>,
) -> Result<(), RunError> {
    let inputs: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let mut outputs: Vec<Output<'_>> = executable.signature().outputs.iter().map(|_| Output::Allocate(None)).collect();
    session.run(&inputs, &mut outputs, context)
}

/// Zeros that the model runs on; `None` where it takes something else than tensors, or refuses them.
fn made_up(executable: &Arc<dyn Executable>) -> Option<Vec<Value>> {
    EXTENTS.iter().find_map(|&extents| {
        let inputs = zeros(executable.signature(), extents)?;
        let mut session = Arc::clone(executable).session(SessionMemory::default()).ok()?;
        run(&mut *session, executable, &inputs, &RunContext::default()).ok()?;
        Some(inputs)
    })
}

fn zeros(signature: &Signature, (first, spatial, other): (i64, i64, i64)) -> Option<Vec<Value>> {
    let mut bound = Bindings::new();
    let mut bytes = 0usize;
    let mut inputs = Vec::new();
    for binding in &signature.inputs {
        let fact = binding.fact.as_tensor()?;
        let dims = fact.shape.as_deref()?;
        for (axis, dim) in dims.iter().enumerate() {
            let mut symbols = BTreeSet::new();
            dim.collect_symbols(&mut symbols);
            let extent = match (dims.len(), axis) {
                (_, 0) => first,
                (4, _) => spatial,
                _ => other,
            };
            for symbol in symbols {
                bound.entry(symbol).or_insert(extent);
            }
        }
        let shape: Vec<usize> = dims.iter().map(|d| usize::try_from(d.eval(&bound)?).ok()).collect::<Option<_>>()?;
        let size = shape.iter().try_fold(fact.dtype.bits().div_ceil(8), |n, &d| n.checked_mul(d))?;
        bytes = bytes.checked_add(size).filter(|&bytes| bytes <= INPUT_BYTES_MAX)?;
        inputs.push(Value::Tensor(Tensor::zeros(fact.dtype, shape).ok()?));
    }
    Some(inputs)
}

/// A model of one small step.
fn next_to_nothing() -> Option<Plan> {
    use cutover_graph::{
        TensorFact,
        ops::{Unary, UnaryFunction},
    };
    let mut graph = Graph::new("next to nothing");
    let x = graph.add_input("x", TensorFact::of_constant_shape(cutover_tensor::DType::F32, &[16]));
    let node =
        graph.add_node("exp", Unary { function: UnaryFunction::Exp }.into(), vec![Some(x)], vec!["y".into()]).ok()?;
    graph.set_outputs(graph.node(node).outputs.clone());
    Plan::new(graph).ok()
}

/// An executable that knows why it is the one.
struct Chosen {
    executable: Arc<dyn Executable>,
    choice: Choice,
}

impl Executable for Chosen {
    fn signature(&self) -> &Signature {
        self.executable.signature()
    }

    fn footprint(&self) -> Footprint {
        self.executable.footprint()
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        self.executable.weights(visit);
    }

    fn placement(&self) -> &Placement {
        self.executable.placement()
    }

    fn choice(&self) -> Option<&Choice> {
        Some(&self.choice)
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        Arc::clone(&self.executable).session(memory)
    }
}

#[cfg(test)]
mod tests;
