//! The host: models in service, and everything that may be done to them.
//!
//! Requests touch an atomic pointer, a session list and counters, each for O(1); they never wait for a deploy, a load or a drop. Whatever
//! changes who serves takes one lock of its own, commits to the store, and then replaces the routing.

use crate::{
    checklist::{Checklist, Item},
    control::End,
    error::{FeedbackError, HostError, InferError},
    request::{Answer, Label, Request},
    rollout::Strategy,
    router::{Comparison, Predictions, Queue, Routing, StreamLimits, Streams},
    socket::{self, Call, Socket},
    status::{HistoryEntry, Metrics, ModelStatus, OutageStatus, RolloutStatus, Status, VersionMetrics, VersionStatus},
    store::{ModelRecord, Store, StoreCheck, StoreRepair},
    swap::{Reaper, Version, lock},
};
use arc_swap::{ArcSwap, ArcSwapOption};
use cutover_backend::Backend;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    thread,
    time::{Duration, Instant},
};

/// How a host runs.
#[derive(Clone)]
pub struct HostOptions {
    /// In order of preference; a version is compiled by the first that can.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Threads that run requests of [`Host::submit`]. [`Host::infer`] runs on its caller's thread.
    pub workers: usize,
    /// Sessions of each version, and so its requests that run at once; `None` for as many as there are workers or cores.
    pub instances: Option<usize>,
    /// Requests of one model that may wait; more are refused at once.
    pub waiting_max: usize,
    /// Bytes that resident versions of all models may take together; `None` for no bound.
    pub memory_bytes: Option<u64>,
    /// Bytes that the store's objects may take; `None` for no bound.
    pub store_bytes: Option<u64>,
    /// Answers that feedback may still refer to, per model.
    pub feedback_window: usize,
    /// How long a stream may go on with a version that has left service.
    pub stream_grace: Duration,
    /// How long a stream may be silent before it must be started again.
    pub stream_idle: Duration,
    /// Streams of one model at once.
    pub streams_max: usize,
    /// What the checklist of a version must have before a strategy starts, where no policy of the model says otherwise.
    pub required: BTreeSet<Item>,
    /// Answers other processes of this user through a socket in the store, where the system has such sockets.
    pub socket: bool,
    /// Drives rollouts from a thread of the host's own; otherwise the caller calls [`Host::poll`].
    pub drive: bool,
    /// Starts of the host with one candidate, each after an end without being closed and without a step between, before the candidate is
    /// taken for the reason and rolled back.
    pub candidate_starts_max: u32,
}

impl Default for HostOptions {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        HostOptions {
            backends: Vec::new(),
            workers: cores,
            instances: None,
            waiting_max: 1024,
            memory_bytes: None,
            store_bytes: None,
            stream_grace: Duration::from_secs(30),
            stream_idle: Duration::from_secs(300),
            streams_max: 1024,
            required: [Item::Validation, Item::Benchmarks, Item::Security].into(),
            socket: true,
            feedback_window: 1 << 16,
            drive: true,
            candidate_starts_max: 3,
        }
    }
}

impl HostOptions {
    pub(crate) fn instances(&self) -> usize {
        let cores = || thread::available_parallelism().map_or(1, |n| n.get());
        self.instances.unwrap_or_else(|| self.workers.max(cores())).max(1)
    }
}

/// Names one rollout: `MODEL#NUMBER`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RolloutId(pub String);

impl fmt::Display for RolloutId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How often rollouts are looked at.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// Models and their versions in one store. Clones are the same host; the last one to go closes the store.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
    /// Ends the threads when the last clone of the host goes; they hold `inner` alone.
    _threads: Arc<Threads>,
}

pub(crate) struct Inner {
    pub options: HostOptions,
    pub store: Store,
    pub reaper: Reaper,
    pub models: ArcSwap<HashMap<String, Arc<Model>>>,
    /// One version is loaded at a time; objects are collected only in between.
    pub deploying: Mutex<()>,
    /// Taken, for no longer than a commit takes, by whoever changes who serves or tells of it.
    pub changing: Mutex<BTreeMap<String, Ongoing>>,
    pub queue: Arc<Queue<Job>>,
    stopping: AtomicBool,
    pub swaps: AtomicU64,
    pub next_id: AtomicU64,
    /// Makes request ids of this start of the host differ from those of others.
    pub boot: u64,
}

pub(crate) struct Model {
    pub name: String,
    pub routing: ArcSwap<Routing>,
    pub predictions: Mutex<Predictions>,
    /// Where both arms' answers to one request are compared; `None` outside of rollouts.
    pub comparisons: Mutex<Option<SyncSender<Comparison>>>,
    pub streams: Mutex<Streams>,
    /// Set while nothing of the model is in memory.
    pub outage: ArcSwapOption<Outage>,
    /// The candidate that crashed, and how, until the rollout is ended for it.
    crashed: Mutex<Option<(String, String)>>,
}

/// A time without answers that was announced.
#[derive(Debug)]
pub(crate) struct Outage {
    /// The version that comes.
    pub version: String,
    pub expected: Duration,
    pub began: Instant,
}

impl Outage {
    pub fn error(&self, model: &str) -> InferError {
        let expected_s = self.expected.saturating_sub(self.began.elapsed()).as_secs_f64();
        InferError::Outage { model: model.to_string(), version: self.version.clone(), expected_s }
    }
}

impl Model {
    pub fn new(name: &str, version: Arc<Version>, predictions: Predictions) -> Model {
        Model {
            name: name.to_string(),
            routing: ArcSwap::from_pointee(Routing { active: version, candidate: None, previous: None }),
            predictions: Mutex::new(predictions),
            comparisons: Mutex::new(None),
            streams: Mutex::default(),
            outage: ArcSwapOption::empty(),
            crashed: Mutex::default(),
        }
    }

    /// Both arms are counted anew. An incumbent that gets no traffic keeps what was counted of it: it stands for it.
    pub fn begin_rollout(&self) {
        self.begin(Version::begin_rollout);
    }

    /// The share changed: both arms are counted anew, but for labels, which are counted for each step.
    pub fn begin_step(&self) {
        self.begin(Version::begin_step);
    }

    fn begin(&self, begin: fn(&Version)) {
        let routing = self.routing.load();
        if let Some(candidate) = &routing.candidate {
            begin(&candidate.version);
            if candidate.share < 1.0 {
                begin(&routing.active);
            }
        }
    }

    /// Leaves word that `version` must go at once.
    pub fn crashed(&self, version: &Version, message: &str) {
        lock(&self.crashed).get_or_insert_with(|| (version.name.clone(), message.to_string()));
    }

    /// How the candidate `version` crashed, if it did.
    pub fn take_crash(&self, version: &str) -> Option<String> {
        lock(&self.crashed).take().filter(|(name, _)| name == version).map(|(_, message)| message)
    }
}

/// A model's record as it is committed, and where its rollout is since.
pub(crate) struct Ongoing {
    pub record: ModelRecord,
    /// When the rollout was last looked at.
    pub looked: Option<Instant>,
    /// The serving time that is committed, in seconds.
    pub saved_s: f64,
    /// Not before, after a failed commit.
    pub retry_at: Option<Instant>,
    /// How and why the candidate gets no more traffic, until that is committed.
    pub ending: Option<(End, String)>,
}

impl Ongoing {
    pub fn new(record: ModelRecord) -> Ongoing {
        let mut ongoing = Ongoing { record, looked: None, saved_s: 0.0, retry_at: None, ending: None };
        ongoing.saved_s = ongoing.serving_s();
        ongoing
    }

    pub fn serving_s(&self) -> f64 {
        self.record.candidate.as_ref().map_or(0.0, |candidate| candidate.serving_s)
    }
}

type Completion = Box<dyn FnOnce(Result<Answer, InferError>) + Send>;

pub(crate) struct Job {
    pub model: String,
    pub request: Request,
    pub completion: Completion,
}

struct Threads {
    inner: Arc<Inner>,
    handles: Mutex<Vec<thread::JoinHandle<()>>>,
    socket: Option<Socket>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.socket = None;
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.queue.close();
        let current = thread::current().id();
        for handle in std::mem::take(&mut *lock(&self.handles)) {
            // The last clone may go on a worker's thread, in a completion.
            if handle.thread().id() != current {
                let _ = handle.join();
            }
        }
        for job in self.inner.queue.drain() {
            (job.completion)(Err(InferError::ShuttingDown));
        }
        self.inner.close();
    }
}

impl Host {
    /// Whether there is a store in `folder`; [`Host::open`] makes one where there is none.
    pub fn has_store(folder: impl AsRef<Path>) -> bool {
        Store::is_in(folder.as_ref())
    }

    /// Opens the store in `folder` and puts every model's version back in service; a rollout that was under way goes on.
    ///
    /// # Errors
    /// A store that is held by another process, damaged or newer; a version that no longer loads.
    pub fn open(folder: impl AsRef<Path>, options: HostOptions) -> Result<Host, HostError> {
        let system = |source| HostError::Store(crate::StoreError::Io { path: "a thread".to_string(), source });
        let store = Store::open(folder.as_ref())?;
        let boot = Instant::now();
        let inner = Arc::new(Inner {
            store,
            reaper: Reaper::start().map_err(system)?,
            models: ArcSwap::default(),
            deploying: Mutex::default(),
            changing: Mutex::default(),
            queue: Arc::new(Queue::new()),
            stopping: AtomicBool::new(false),
            swaps: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
            boot: u64::from(std::process::id()) ^ HistoryEntry::new("", "", "", "").at_unix_ms,
            options,
        });
        inner.restore()?;
        tracing::info!(store = %folder.as_ref().display(), took = ?boot.elapsed(), "host opened");
        let mut handles = Vec::new();
        for number in 0..inner.options.workers {
            let worker = Arc::clone(&inner);
            let thread = thread::Builder::new().name(format!("cutover-worker-{number}"));
            handles.push(thread.spawn(move || worker.work()).map_err(system)?);
        }
        if inner.options.drive {
            let driver = Arc::clone(&inner);
            let thread = thread::Builder::new().name("cutover-rollouts".to_string());
            let drive = move || {
                while !driver.stopping.load(Ordering::Acquire) {
                    driver.poll(Instant::now());
                    thread::sleep(POLL);
                }
            };
            handles.push(thread.spawn(drive).map_err(system)?);
        }
        // Others find the host only once it is whole. That they can't is no reason not to serve.
        let socket = inner.options.socket.then(|| Socket::start(folder.as_ref(), Arc::downgrade(&inner)));
        let socket = socket.and_then(|started| {
            started.inspect_err(|error| tracing::warn!(%error, "other processes can't reach this host")).ok()
        });
        let threads = Threads { inner: Arc::clone(&inner), handles: Mutex::new(handles), socket };
        Ok(Host { inner, _threads: Arc::new(threads) })
    }

    /// Admits the version in `package` and starts to roll it out. A model's first version is in service when this returns. Nothing
    /// changes on an error.
    pub fn deploy(&self, model: &str, package: &Path, strategy: Strategy) -> Result<RolloutId, HostError> {
        self.inner.deploy(model, package, strategy)
    }

    /// Answers on this thread. All of an answer comes from the one version it names.
    pub fn infer(&self, model: &str, request: Request) -> Result<Answer, InferError> {
        self.inner.infer(model, request)
    }

    /// Answers on a worker's thread, which calls `completion`; on this thread if the host has no workers. Refused at once when too many
    /// are waiting.
    pub fn submit(
        &self,
        model: &str,
        request: Request,
        completion: impl FnOnce(Result<Answer, InferError>) + Send + 'static,
    ) {
        if self.inner.options.workers == 0 {
            return completion(self.inner.infer(model, request));
        }
        let job = Job { model: model.to_string(), request, completion: Box::new(completion) };
        // A lane for each model that there is, no more: names come from outside.
        if !self.inner.models.load().contains_key(model) {
            return (job.completion)(Err(InferError::UnknownModel(model.to_string())));
        }
        if let Err((job, waiting)) = self.inner.queue.push(model, job, self.inner.options.waiting_max) {
            (job.completion)(Err(InferError::Overloaded { waiting }));
        }
    }

    /// Counts the truth about an answer given lately.
    pub fn feedback(&self, model: &str, id: &str, label: &Label) -> Result<(), FeedbackError> {
        self.inner.feedback(model, id, label)
    }

    /// Ends the rollout under way against its candidate, or else puts the version before back in service.
    pub fn rollback(&self, model: &str) -> Result<(), HostError> {
        self.inner.rollback(model)
    }

    /// Ends the rollout under way in favour of its candidate, whatever the gates say.
    pub fn promote(&self, model: &str) -> Result<(), HostError> {
        self.inner.promote_by_hand(model)
    }

    /// The checklist of the candidate where a rollout is under way, else of the version in service.
    pub fn checklist(&self, model: &str) -> Result<Checklist, HostError> {
        self.inner.checklist(model)
    }

    /// What the checklists of this model's versions must have before a strategy starts; those of the host's options where `None`.
    pub fn require(&self, model: &str, required: Option<BTreeSet<Item>>) -> Result<(), HostError> {
        self.inner.require(model, required)
    }

    /// Notes that `by` answers for a version, which need not be here yet.
    pub fn sign_off(&self, model: &str, version: &str, by: &str) -> Result<(), HostError> {
        self.inner.sign_off(model, version, by)
    }

    /// Reads everything in the store through.
    pub fn check_store(&self) -> Result<StoreCheck, HostError> {
        Ok(self.inner.store.check()?)
    }

    /// Moves what is damaged in the store aside, and says what was lost.
    pub fn repair_store(&self) -> Result<StoreRepair, HostError> {
        self.inner.repair_store()
    }

    pub fn status(&self) -> Status {
        self.inner.status()
    }

    /// Does what another process asks for, and gives its answer as that process gets it.
    ///
    /// # Errors
    /// What went wrong, in words.
    pub fn call(&self, call: Call) -> Result<serde_json::Value, String> {
        socket::answer(&self.inner, call)
    }

    /// Every transition of a model, oldest first.
    ///
    /// # Errors
    /// A model that never was here; a store that can't be read.
    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, HostError> {
        self.inner.history(model)
    }

    pub fn metrics(&self) -> Metrics {
        let models = self.inner.models.load();
        let mut versions = Vec::new();
        let mut names: Vec<&String> = models.keys().collect();
        names.sort();
        for name in names {
            let routing = models[name].routing.load();
            let share = routing.candidate.as_ref().map_or(0.0, |c| c.share);
            versions.push(VersionMetrics::of(name, &routing.active, "active", 1.0 - share));
            if let Some(candidate) = &routing.candidate {
                versions.push(VersionMetrics::of(name, &candidate.version, "candidate", candidate.share));
            }
        }
        let waiting = self.inner.queue.waiting();
        Metrics { versions, swaps: self.inner.swaps.load(Ordering::Relaxed), waiting }
    }

    /// The inputs and outputs of a version in service; of the active one where none is named.
    pub fn signature(
        &self,
        model: &str,
        version: Option<&str>,
    ) -> Result<(String, cutover_backend::Signature), InferError> {
        let found = self.inner.model(model)?;
        let routing = found.routing.load_full();
        let version = match version {
            None => &routing.active,
            Some(name) => routing
                .named(name)
                .ok_or_else(|| InferError::UnknownVersion { model: model.to_string(), version: name.to_string() })?,
        };
        Ok((version.name.clone(), version.executable.signature().clone()))
    }

    /// Versions of a model that take requests now, the active one first.
    pub fn versions(&self, model: &str) -> Result<Vec<String>, InferError> {
        let routing = self.inner.model(model)?.routing.load_full();
        let candidate = routing.candidate.as_ref().map(|c| c.version.name.clone());
        Ok([Some(routing.active.name.clone()), candidate].into_iter().flatten().collect())
    }

    /// Drives rollouts, and says when it wants to be called next; `None` where none is under way. Needed only without
    /// [`HostOptions::drive`].
    pub fn poll(&self, now: Instant) -> Option<Instant> {
        self.inner.poll(now)
    }
}

impl Inner {
    pub(crate) fn stream_limits(&self) -> StreamLimits {
        let HostOptions { stream_grace, stream_idle, streams_max, .. } = self.options;
        StreamLimits { grace: stream_grace, idle: stream_idle, open_max: streams_max }
    }

    pub(crate) fn feedback(&self, model: &str, id: &str, label: &Label) -> Result<(), FeedbackError> {
        let found = self.models.load();
        let found = found.get(model).ok_or_else(|| FeedbackError::UnknownModel(model.to_string()))?;
        let routing = found.routing.load_full();
        let shadow = routing.candidate.as_ref().filter(|candidate| candidate.shadow.is_some());
        let settled = lock(&found.predictions).settle(id, label, shadow.is_some())?;
        // A version that is gone by now has no window to count for.
        if let Some(version) = routing.named(&settled.version) {
            version.count_labels(settled.window, &settled.right);
        }
        if let Some(candidate) = shadow {
            candidate.version.count_trial(|window| {
                let both = settled.right.iter().zip(&settled.copy_right);
                both.for_each(|(incumbent, candidate)| window.pairs.settle(*incumbent, *candidate));
            });
        }
        Ok(())
    }

    pub(crate) fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, HostError> {
        let entries = self.store.history(model)?;
        match entries.is_empty() && !self.models.load().contains_key(model) {
            true => Err(HostError::UnknownModel(model.to_string())),
            false => Ok(entries),
        }
    }

    pub(crate) fn status(&self) -> Status {
        let changing = lock(&self.changing);
        let models = self.models.load();
        let of = |(name, ongoing): (&String, &Ongoing)| {
            let model = models.get(name)?;
            let routing = model.routing.load();
            let rollout =
                ongoing.record.candidate.as_ref().zip(routing.candidate.as_ref()).map(|(record, candidate)| {
                    RolloutStatus {
                        id: format!("{name}#{}", ongoing.record.rollouts),
                        strategy: record.rollout.strategy.name().to_string(),
                        candidate: match candidate.shadow.is_some() {
                            true => VersionStatus::of_shadow(&candidate.version),
                            false => VersionStatus::of(&candidate.version),
                        },
                        step: record.rollout.step + 1,
                        share: candidate.share,
                        serving_s: record.serving_s,
                        holding: record.rollout.alerted,
                        evidence: record.rollout.evidence.clone(),
                    }
                });
            let outage = model.outage.load_full().map(|outage| OutageStatus {
                version: outage.version.clone(),
                expected_s: outage.expected.as_secs_f64(),
                so_far_s: outage.began.elapsed().as_secs_f64(),
            });
            Some(ModelStatus {
                name: name.clone(),
                active: VersionStatus::of(&routing.active),
                previous: ongoing.record.previous.clone(),
                rollout,
                outage,
                streams: lock(&model.streams).len(),
            })
        };
        let models = changing.iter().filter_map(of).collect();
        Status { models, memory_bytes: self.resident_bytes(None), memory_bytes_max: self.options.memory_bytes }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut models: Vec<String> = self.inner.models.load().keys().cloned().collect::<Vec<_>>();
        models.sort();
        f.debug_struct("Host").field("models", &models).finish()
    }
}
