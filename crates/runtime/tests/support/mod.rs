//! Small models, packages of them, and a backend that can be told to fail: what the suites of this crate share.

#![allow(dead_code)]

use cutover_backend::{
    Backend, CompileError, CompileOptions, DeviceInfo, Executable, Footprint, Input, Output, Placement, ResourceError,
    RunContext, RunError, Session, SessionMemory, Signature, Support, reference,
};
use cutover_graph::{
    Constant, Graph, Node, Plan, TensorFact,
    ops::{MatMul, Softmax, SoftmaxFunction},
};
use cutover_package::{Contents, Golden, Manifest};
use cutover_runtime::{Answer, Host, HostOptions, Request};
use cutover_tensor::{DType, Tensor, Value};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

pub const MODEL: &str = "classifier";
pub const CLASSES: usize = 10;
/// Makes both weights large enough to be objects of their own.
const HIDDEN: usize = 2050;

/// What a version does.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub version: &'static str,
    /// Of the logits: gives every version outputs of its own.
    pub scale: f32,
    /// Classes from this one on are taken for the next.
    pub wrong_from: usize,
    /// `fail`, `slow` or `panic`, for [`faulty`].
    pub behaviour: &'static str,
    pub security_epoch: u64,
    /// Written into the golden outputs, so that they are wrong by it.
    pub golden_error: f32,
}

pub fn good(version: &'static str, scale: f32) -> Recipe {
    Recipe { version, scale, wrong_from: CLASSES, behaviour: "", security_epoch: 0, golden_error: 0.0 }
}

/// Right on four classes of five.
pub fn bad(version: &'static str, scale: f32) -> Recipe {
    Recipe { wrong_from: 8, ..good(version, scale) }
}

impl Recipe {
    /// `softmax(image · W1 · W2)` of a `[1, CLASSES]` image that is hot at its class.
    pub fn graph(&self) -> Graph {
        let mut graph = Graph::new(MODEL);
        graph.metadata.insert("behaviour".to_string(), self.behaviour.to_string());
        let per_class = (HIDDEN / CLASSES) as f32;
        let answer = |class: usize| if class < self.wrong_from { class } else { (class + 1) % CLASSES };
        let cell = |on: bool, value: f32| if on { value } else { 0.0 };
        let first = (0..CLASSES * HIDDEN).map(|i| cell(i / HIDDEN == i % HIDDEN % CLASSES, self.scale));
        let share = (1.0 + self.scale / 100.0) / per_class;
        let second = (0..HIDDEN * CLASSES).map(|i| cell(answer(i / CLASSES % CLASSES) == i % CLASSES, share));
        let mut constant = |name: &str, shape: [usize; 2], values: Vec<f32>| {
            graph.add_constant(name, Constant::new(Tensor::from_vec(shape, values).unwrap()))
        };
        let w1 = constant("w1", [CLASSES, HIDDEN], first.collect());
        let w2 = constant("w2", [HIDDEN, CLASSES], second.collect());
        let x = graph.add_input("image", TensorFact::of_constant_shape(DType::F32, &[1, CLASSES]));
        let mut add = |op: cutover_graph::Op, inputs: Vec<Option<cutover_graph::ValueId>>, name: &str| {
            let node = graph.add_node(name, op, inputs, vec![name.to_string()]).unwrap();
            graph.node(node).outputs[0]
        };
        let hidden = add(MatMul { activation: None }.into(), vec![Some(x), Some(w1)], "hidden");
        let logits = add(MatMul { activation: None }.into(), vec![Some(hidden), Some(w2)], "logits");
        let softmax = Softmax { function: SoftmaxFunction::Softmax, axis: -1, coerced: false };
        let probabilities = add(softmax.into(), vec![Some(logits)], "probabilities");
        graph.set_outputs(vec![probabilities]);
        graph
    }

    /// What it answers to every class, computed beside any host.
    pub fn answers(&self) -> Vec<Vec<f32>> {
        let executable = reference().compile(&Plan::new(self.graph()).unwrap(), &CompileOptions::default()).unwrap();
        let mut session = executable.session(SessionMemory::default()).unwrap();
        let answer = |class| {
            let image = image(class);
            let mut outputs = [Output::Allocate(None)];
            session.run(&[Input::View(image.view())], &mut outputs, &RunContext::default()).unwrap();
            let [Output::Allocate(Some(Value::Tensor(tensor)))] = outputs else { panic!("no answer") };
            tensor.to_vec().unwrap()
        };
        (0..CLASSES).map(answer).collect()
    }

    /// The package as one file in `folder`.
    pub fn package(&self, folder: &Path) -> PathBuf {
        self.package_as(MODEL, folder)
    }

    /// The same, of a model of another name.
    pub fn package_as(&self, name: &str, folder: &Path) -> PathBuf {
        let graph = self.graph();
        let mut manifest = Manifest::of(&graph, name, self.version).unwrap();
        manifest.security_epoch = self.security_epoch;
        let mut expected = self.answers().swap_remove(3);
        expected[0] += self.golden_error;
        let golden = Golden {
            inputs: vec![("image".to_string(), image(3))],
            outputs: vec![("probabilities".to_string(), Tensor::from_vec([1, CLASSES], expected).unwrap())],
        };
        let file = if name == MODEL { String::new() } else { format!("{name}-") };
        let path = folder.join(format!("{file}{}-{}.cutover", self.version, self.scale));
        cutover_package::write(
            &Contents { graph: &graph, manifest, golden: &golden, profile: None, tokenizer: None },
            &path,
        )
        .unwrap();
        path
    }
}

pub fn image(class: usize) -> Tensor {
    Tensor::from_vec([1, CLASSES], (0..CLASSES).map(|i| f32::from(i == class)).collect()).unwrap()
}

pub fn request(id: impl Into<String>, class: usize) -> Request {
    let inputs = vec![("image".to_string(), Value::from(image(class)))];
    Request { id: Some(id.into()), inputs, ..Request::default() }
}

pub fn probabilities(answer: &Answer) -> Vec<f32> {
    assert_eq!(answer.outputs[0].0, "probabilities");
    answer.outputs[0].1.as_tensor().unwrap().to_vec().unwrap()
}

pub fn options() -> HostOptions {
    HostOptions { backends: vec![faulty()], workers: 2, ..HostOptions::default() }
}

/// Waits until `done`, at most for `seconds`.
pub fn wait(seconds: u64, what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen in {seconds} s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The events of the classifier's history.
pub fn events(host: &Host) -> Vec<String> {
    host.history(MODEL).unwrap().into_iter().map(|e| format!("{} {}", e.event, e.version)).collect()
}

/// The reference backend, but that it does what the model's metadata calls for.
pub fn faulty() -> Arc<dyn Backend> {
    Arc::new(Faulty(reference()))
}

struct Faulty(Arc<dyn Backend>);

struct FaultyExecutable {
    inner: Arc<dyn Executable>,
    behaviour: String,
}

struct FaultySession {
    inner: Box<dyn Session>,
    behaviour: String,
    runs: u64,
}

impl Backend for Faulty {
    fn describe(&self) -> DeviceInfo {
        self.0.describe()
    }

    fn supports(&self, graph: &Graph, node: &Node) -> Support {
        self.0.supports(graph, node)
    }

    fn compile(&self, plan: &Plan, options: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        let behaviour = plan.graph().metadata.get("behaviour").cloned().unwrap_or_default();
        if behaviour == "abort" && std::env::var_os("CUTOVER_ABORTS").is_some() {
            std::process::abort();
        }
        Ok(Arc::new(FaultyExecutable { inner: self.0.compile(plan, options)?, behaviour }))
    }
}

impl Executable for FaultyExecutable {
    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        self.inner.weights(visit);
    }

    fn placement(&self) -> &Placement {
        self.inner.placement()
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        let inner = Arc::clone(&self.inner).session(memory)?;
        Ok(Box::new(FaultySession { inner, behaviour: self.behaviour.clone(), runs: 0 }))
    }
}

impl Session for FaultySession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        self.runs += 1;
        // The first runs of a session are those of the admission.
        match self.behaviour.as_str() {
            "fail" if self.runs > 16 && self.runs.is_multiple_of(4) => {
                let message = "told to fail".to_string();
                return Err(RunError::Resource(ResourceError::System { what: "the faulty backend", message }));
            }
            "panic" if self.runs > 16 && self.runs.is_multiple_of(4) => panic!("told to panic"),
            "slow" => std::thread::sleep(Duration::from_millis(8)),
            _ => {}
        }
        self.inner.run(inputs, outputs, context)
    }
}

/// Whether the last word of a history begins as `expected` says: `EVENT: REASON`, where several reasons that would do are set apart by `|`.
pub fn says(last: &str, expected: &str) -> bool {
    let (event, reasons) = expected.split_once(": ").unwrap_or((expected, ""));
    let reason = last.strip_prefix(event).map(|rest| rest.strip_prefix(": ").unwrap_or(rest));
    reason.is_some_and(|reason| reasons.split('|').any(|one| reason.starts_with(one)))
}
