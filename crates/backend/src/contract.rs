//! What a backend promises: compile a plan once, run it many times.

use crate::{CompileError, ResourceError, RunError};
use cutover_graph::{Fact, Graph, Node, Plan, ops::EvalContext};
use cutover_tensor::{DType, TensorView, TensorViewMut, Value};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Something that runs plans.
pub trait Backend: Send + Sync {
    fn describe(&self) -> DeviceInfo;

    /// Whether this backend runs `node` of `graph`, and how; if not, why not.
    fn supports(&self, graph: &Graph, node: &Node) -> Support;

    /// What the device can do at most, measured now, in some ten milliseconds; `None` where nobody knows how.
    fn measure_peak(&self) -> Option<Peak> {
        None
    }

    /// Name and version of what drives the device, where there is such a thing: with another one, what was measured is no longer true.
    fn driver(&self) -> Option<String> {
        None
    }

    /// Chooses layouts and kernels and packs the weights.
    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError>;
}

/// A compiled plan: immutable, shared, and the unit that is swapped.
pub trait Executable: Send + Sync {
    fn signature(&self) -> &Signature;

    /// Bytes it holds, and that one session will need.
    fn footprint(&self) -> Footprint;

    /// Hands each part of its weights to `visit`, by its address and bytes: a part at one address is held once, however many executables
    /// have it.
    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        visit(std::ptr::from_ref(self).cast::<()>() as usize, self.footprint().weight_bytes);
    }

    /// Which kernel runs each node, and why.
    fn placement(&self) -> &Placement;

    /// Why it is this backend's, where several were asked.
    fn choice(&self) -> Option<&Choice> {
        None
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError>;
}

/// One worker's memory for running an executable.
pub trait Session: Send {
    /// Runs the model. `inputs` and `outputs` are in the order of the signature.
    ///
    /// # Errors
    /// An input or output that contradicts the signature, an operator's error on these values, a passed deadline. The
    /// session can be used again after any of them but [`RunError::DeviceLost`].
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError>;
}

/// The inputs and outputs of a model, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature {
    pub inputs: Vec<Binding>,
    pub outputs: Vec<Binding>,
}

/// A named input or output.
#[derive(Clone, Debug, PartialEq)]
pub struct Binding {
    pub name: String,
    pub fact: Fact,
}

impl Binding {
    /// The types of keys and values, where the value is a map or a sequence of maps.
    pub fn table(&self) -> Option<(DType, DType)> {
        let map = if let Fact::Sequence(of) = &self.fact { &**of } else { &self.fact };
        match map {
            Fact::Map { key, value } => Some((*key, value.as_tensor()?.dtype)),
            _ => None,
        }
    }
}

impl Signature {
    pub fn of(graph: &Graph) -> Signature {
        let bind = |ids: &[cutover_graph::ValueId]| {
            let values = ids.iter().map(|&id| graph.value(id));
            values.map(|v| Binding { name: v.name.clone(), fact: v.fact.clone() }).collect()
        };
        Signature { inputs: bind(graph.inputs()), outputs: bind(graph.outputs()) }
    }

    /// The type of the elements of the input `name`, where that is a tensor.
    pub fn input_dtype(&self, name: &str) -> Option<DType> {
        let binding = self.inputs.iter().find(|binding| binding.name == name)?;
        Some(binding.fact.as_tensor()?.dtype)
    }
}

/// What the caller hands in.
#[derive(Clone, Debug)]
pub enum Input<'a> {
    /// The caller's memory, read during the run and not copied where its alignment allows.
    View(TensorView<'a>),
    Value(&'a Value),
}

/// Where a result goes.
#[derive(Debug)]
pub enum Output<'a> {
    /// Into the caller's buffer, whose type and shape must be those of the result.
    Write(TensorViewMut<'a>),
    /// Into a new value that the run leaves here.
    Allocate(Option<Value>),
    /// Nobody reads it.
    Discard,
}

/// What may differ from run to run.
#[derive(Clone, Copy, Default)]
pub struct RunContext<'a> {
    pub deadline: Option<Instant>,
    pub cancellation: Option<&'a Cancellation>,
    pub limits: RunLimits,
    /// Told how long every node took; measuring costs two clock reads a node.
    pub profiler: Option<&'a dyn Profiler>,
    /// Told where a run's time went, by a backend whose device is apart from the host; such a run waits for the device between its phases.
    pub phases: Option<&'a dyn PhaseObserver>,
}

impl RunContext<'_> {
    /// Between nodes: whether the run must stop before `node`.
    pub fn check(&self, node: &str) -> Result<(), RunError> {
        if self.cancellation.is_some_and(Cancellation::is_cancelled) {
            return Err(RunError::Cancelled { node: node.to_string() });
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(RunError::Deadline { node: node.to_string() });
        }
        Ok(())
    }
}

/// Set from any thread to stop a run at its next node.
#[derive(Debug, Default)]
pub struct Cancellation(AtomicBool);

impl Cancellation {
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Bounds on what a run may take.
#[derive(Clone, Copy, Debug)]
pub struct RunLimits {
    /// Bytes of one session's arena for one set of input shapes.
    pub arena_bytes: u64,
    /// Elements of one result whose shape only data decides.
    pub elements: usize,
    /// How often graphs inside of nodes may run: the iterations of all loops together, those of loops in loops each time.
    pub trips: u64,
}

impl Default for RunLimits {
    fn default() -> Self {
        let EvalContext { max_elements, max_trips, .. } = EvalContext::default();
        RunLimits { arena_bytes: 16 << 30, elements: max_elements, trips: max_trips }
    }
}

/// Receives measurements while a model runs.
pub trait Profiler: Sync {
    fn record(&self, timing: OpTiming<'_>);
}

/// Receives what the parts of a run took, where the device is apart from the host.
pub trait PhaseObserver: Sync {
    fn record(&self, phase: Phase, duration: Duration);
}

/// A part of a run on a device of its own; what is none of these is the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Inputs to the device.
    CopyIn,
    /// From the first kernel to the last: by the device's clock where it has one, else until the host hears of its end.
    Kernels,
    /// Outputs to the host.
    CopyOut,
}

/// How long one step took.
#[derive(Clone, Copy, Debug)]
pub struct OpTiming<'a> {
    pub node: &'a str,
    pub op: &'a str,
    pub kernel: &'a str,
    pub duration: Duration,
    pub work: Work,
}

/// What a step has to do, counted from its sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiplications and additions of its products of floats; 0 where it has none.
    pub operations: u64,
    /// Of its products of bytes, which are exact.
    pub integer_operations: u64,
    /// What it reads and writes, once each; 0 where nobody counted.
    pub bytes: u64,
}

impl Work {
    /// Multiplications and additions of whatever products.
    pub fn products(&self) -> u64 {
        self.operations + self.integer_operations
    }
}

/// What a device can do at most, on all its threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Multiplications and additions of f32 in registers.
    pub operations_per_second: f64,
    /// Of bytes, with exact sums.
    pub integer_operations_per_second: f64,
    /// Read from the caches of the threads' cores.
    pub bytes_per_second: f64,
}

impl Peak {
    /// The part of the device's peak that so much work in `seconds` makes use of: of what it computes or of what it reads and writes, whichever is
    /// more. `None` where nothing was counted.
    pub fn share(&self, work: Work, seconds: f64) -> Option<f64> {
        let computing = work.operations as f64 / self.operations_per_second
            + work.integer_operations as f64 / self.integer_operations_per_second;
        let least = computing.max(work.bytes as f64 / self.bytes_per_second);
        (least > 0.0 && seconds > 0.0).then(|| least / seconds)
    }
}

/// Where sessions get their memory from.
#[derive(Clone, Debug, Default)]
pub struct SessionMemory {
    /// Bytes the session may hold; `None` for no bound of its own.
    pub budget_bytes: Option<u64>,
}

/// What a plan is compiled for.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompileOptions {
    pub precision: Precision,
    pub numerics: Numerics,
}

/// The type that the weights of floating-point products are held in, and the products computed in where a processor does so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As the model says.
    #[default]
    F32,
    BF16,
    F16,
    /// 10 bits of fraction and f32's range, in products alone, on NVIDIA's tensor cores; nothing is held in it.
    Tf32,
}

/// How far a backend may rearrange arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Numerics {
    /// Fewer multiplications where the rounding error stays about a direct sum's: convolution by Winograd's F(2×2, 3×3) and F(4×4, 3×3).
    #[default]
    Default,
    /// Every output of a product or convolution is one direct sum.
    Strict,
    /// Algorithms too whose rounding error is about ten times a direct sum's: F(6×6, 3×3).
    Relaxed,
}

/// The device behind a backend.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// As written on command lines: `cpu`, `reference`.
    pub backend: &'static str,
    /// E.g. the processor's name.
    pub device: String,
    /// Instruction set or interface in use: `avx512`, `avx2`, `scalar`.
    pub isa: String,
    pub threads: usize,
}

/// Which of several backends a plan was compiled for, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The one that was chosen.
    pub device: DeviceInfo,
    pub tried: Vec<Tried>,
    /// Whether it was measured at an earlier load.
    pub was_kept: bool,
}

impl fmt::Display for Choice {
    /// `cpu, of cpu (…) 3.20 ms, wgpu (…) 5.10 ms, at least 1.00 ms; measured now`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, of ", self.device.backend)?;
        for (number, tried) in self.tried.iter().enumerate() {
            let separator = if number > 0 { ", " } else { "" };
            write!(f, "{separator}{} ({})", tried.backend, tried.device)?;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            if let Some(measured) = tried.measured {
                write!(f, " {:.3} ms", ms(measured))?;
            }
            if let Some(predicted) = tried.predicted {
                write!(f, " (predicted: at least {:.3} ms)", ms(predicted))?;
            }
            if !tried.note.is_empty() {
                write!(f, " {}", tried.note)?;
            }
        }
        write!(f, "; measured {}", if self.was_kept { "at an earlier load" } else { "now" })
    }
}

/// A backend that a plan could be compiled for.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    pub backend: String,
    pub device: String,
    /// The least time of a run, by what the plan has to do and the device can do at most.
    pub predicted: Option<Duration>,
    /// The median time of a run on made-up inputs.
    pub measured: Option<Duration>,
    /// Why it was not measured; empty where it was.
    pub note: String,
}

/// Whether a backend runs a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Support {
    /// With a kernel of its own.
    Native {
        kernel: &'static str,
    },
    /// By the reference evaluation of the operator.
    Fallback {
        reason: String,
    },
    No {
        reason: String,
    },
}

/// Bytes, counted before the executable takes traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Weights as this executable holds them, packed or mapped.
    pub weight_bytes: u64,
    /// The part of `weight_bytes` that other executables of this backend hold too, at this moment.
    pub shared_bytes: u64,
    /// One session's arena, where every shape is static or was declared; otherwise for symbols at 1.
    pub session_bytes: u64,
}

/// Where each node runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placement {
    pub nodes: Vec<PlacedNode>,
}

/// One node of the plan as it was compiled.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedNode {
    pub node: String,
    pub op: String,
    pub backend: &'static str,
    /// Name of the kernel, `fused into NODE`, `view`, or `reference`.
    pub kernel: String,
    pub dtype: String,
    /// Why a fallback is used; empty otherwise.
    pub reason: String,
}
