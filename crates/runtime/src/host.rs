//! The host: models in service, and everything that may be done to them.
//!
//! Requests touch an atomic pointer, a session list and counters, each for O(1); they never wait for a deploy, a load or a drop. Whatever
//! changes who serves takes one lock of its own, commits to the store, and then replaces the routing.

use crate::{
    error::{FeedbackError, HostError, InferError},
    request::{Answer, Label, Request, prediction},
    rollout::Strategy,
    router::{Comparison, Predictions, Routing},
    status::{HistoryEntry, Metrics, ModelStatus, RolloutStatus, Status, VersionMetrics, VersionStatus},
    store::{ModelRecord, Store},
    swap::{Reaper, Version, lock},
};
use arc_swap::ArcSwap;
use cutover_backend::Backend;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
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
    /// Requests that may wait for a worker; more are refused at once.
    pub waiting_max: usize,
    /// Bytes that resident versions may take together; `None` for no bound.
    pub memory_bytes: Option<u64>,
    /// Answers that feedback may still refer to, per model.
    pub feedback_window: usize,
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
            waiting_max: 1024,
            memory_bytes: None,
            feedback_window: 1 << 16,
            drive: true,
            candidate_starts_max: 3,
        }
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
    queue: Mutex<VecDeque<Job>>,
    queued: Condvar,
    stopping: AtomicBool,
    pub swaps: AtomicU64,
    next_id: AtomicU64,
    /// Makes request ids of this start of the host differ from those of others.
    boot: u64,
}

pub(crate) struct Model {
    pub name: String,
    pub routing: ArcSwap<Routing>,
    pub predictions: Mutex<Predictions>,
    /// Where both arms' answers to one request are compared; `None` outside of rollouts.
    pub comparisons: Mutex<Option<SyncSender<Comparison>>>,
}

impl Model {
    /// Both arms are counted anew. An incumbent that gets no traffic keeps what was counted of it: it stands for it.
    pub fn begin_windows(&self) {
        let routing = self.routing.load();
        if let Some(candidate) = &routing.candidate {
            candidate.version.begin_window();
            if candidate.share < 1.0 {
                routing.active.begin_window();
            }
        }
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
    /// Why the candidate gets no more traffic, until that is committed.
    pub rolling_back: Option<String>,
}

impl Ongoing {
    pub fn new(record: ModelRecord) -> Ongoing {
        let mut ongoing = Ongoing { record, looked: None, saved_s: 0.0, retry_at: None, rolling_back: None };
        ongoing.saved_s = ongoing.serving_s();
        ongoing
    }

    pub fn serving_s(&self) -> f64 {
        self.record.candidate.as_ref().map_or(0.0, |candidate| candidate.serving_s)
    }
}

type Completion = Box<dyn FnOnce(Result<Answer, InferError>) + Send>;

struct Job {
    model: String,
    request: Request,
    completion: Completion,
}

struct Threads {
    inner: Arc<Inner>,
    handles: Mutex<Vec<thread::JoinHandle<()>>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::Release);
        self.inner.queued.notify_all();
        let current = thread::current().id();
        for handle in std::mem::take(&mut *lock(&self.handles)) {
            // The last clone may go on a worker's thread, in a completion.
            if handle.thread().id() != current {
                let _ = handle.join();
            }
        }
        for job in std::mem::take(&mut *lock(&self.inner.queue)) {
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
            queue: Mutex::default(),
            queued: Condvar::new(),
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
        let threads = Threads { inner: Arc::clone(&inner), handles: Mutex::new(handles) };
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
        let mut queue = lock(&self.inner.queue);
        let waiting = queue.len();
        if waiting >= self.inner.options.waiting_max {
            drop(queue);
            return completion(Err(InferError::Overloaded { waiting }));
        }
        queue.push_back(Job { model: model.to_string(), request, completion: Box::new(completion) });
        drop(queue);
        self.inner.queued.notify_one();
    }

    /// Counts the truth about an answer given lately.
    pub fn feedback(&self, model: &str, id: &str, label: &Label) -> Result<(), FeedbackError> {
        let found = self.inner.models.load();
        let found = found.get(model).ok_or_else(|| FeedbackError::UnknownModel(model.to_string()))?;
        let settled = lock(&found.predictions).settle(id, label)?;
        let routing = found.routing.load_full();
        // A version that is gone by now has no window to count for.
        if let Some(version) = routing.named(&settled.version) {
            version.count_labels(settled.window, &settled.right);
        }
        Ok(())
    }

    /// Ends the rollout under way against its candidate, or else puts the version before back in service.
    pub fn rollback(&self, model: &str) -> Result<(), HostError> {
        let mut changing = lock(&self.inner.changing);
        let ongoing = changing.get_mut(model).ok_or_else(|| HostError::UnknownModel(model.to_string()))?;
        if ongoing.record.candidate.is_some() {
            return self.inner.roll_back(model, ongoing, "asked for");
        }
        self.inner.go_back(model, ongoing)
    }

    /// Ends the rollout under way in favour of its candidate, whatever the gates say.
    pub fn promote(&self, model: &str) -> Result<(), HostError> {
        let mut changing = lock(&self.inner.changing);
        let ongoing = changing.get_mut(model).ok_or_else(|| HostError::UnknownModel(model.to_string()))?;
        self.inner.promote(model, ongoing, "asked for")
    }

    pub fn status(&self) -> Status {
        let changing = lock(&self.inner.changing);
        let models = self.inner.models.load();
        let of = |(name, ongoing): (&String, &Ongoing)| {
            let routing = models.get(name)?.routing.load();
            let rollout =
                ongoing.record.candidate.as_ref().zip(routing.candidate.as_ref()).map(|(record, candidate)| {
                    RolloutStatus {
                        id: format!("{name}#{}", ongoing.record.rollouts),
                        strategy: record.rollout.strategy.name().to_string(),
                        candidate: VersionStatus::of(&candidate.version),
                        step: record.rollout.step + 1,
                        share: candidate.share,
                        serving_s: record.serving_s,
                        evidence: record.rollout.evidence.clone(),
                    }
                });
            let active = VersionStatus::of(&routing.active);
            Some(ModelStatus { name: name.clone(), active, previous: ongoing.record.previous.clone(), rollout })
        };
        Status { models: changing.iter().filter_map(of).collect() }
    }

    /// Every transition of a model, oldest first.
    ///
    /// # Errors
    /// A model that never was here; a store that can't be read.
    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, HostError> {
        let entries = self.inner.store.history(model)?;
        match entries.is_empty() && !self.inner.models.load().contains_key(model) {
            true => Err(HostError::UnknownModel(model.to_string())),
            false => Ok(entries),
        }
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
        let waiting = lock(&self.inner.queue).len();
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

    /// Leaves word, as JSON, for whoever finds the store held: e.g. where a server listens.
    pub fn announce(&self, holder: &str) -> Result<(), HostError> {
        Ok(self.inner.store.announce(holder)?)
    }

    /// Drives rollouts, and says when it wants to be called next; `None` where none is under way. Needed only without
    /// [`HostOptions::drive`].
    pub fn poll(&self, now: Instant) -> Option<Instant> {
        self.inner.poll(now)
    }
}

impl Inner {
    pub fn model(&self, name: &str) -> Result<Arc<Model>, InferError> {
        self.models.load().get(name).cloned().ok_or_else(|| InferError::UnknownModel(name.to_string()))
    }

    fn infer(&self, name: &str, request: Request) -> Result<Answer, InferError> {
        let model = self.model(name)?;
        let id = request
            .id
            .clone()
            .unwrap_or_else(|| format!("{:x}-{}", self.boot, self.next_id.fetch_add(1, Ordering::Relaxed)));
        // Of the routing only what may serve this request is held: other versions can go while it runs.
        let (mut served_by, incumbent) = {
            let routing = model.routing.load();
            let version = match &request.version {
                Some(version) => routing
                    .named(version)
                    .ok_or_else(|| InferError::UnknownVersion { model: name.to_string(), version: version.clone() })?,
                None => routing.pick(request.key.as_deref().unwrap_or(&id)),
            };
            let on_trial = request.version.is_none() && !Arc::ptr_eq(version, &routing.active);
            (Arc::clone(version), on_trial.then(|| Arc::clone(&routing.active)))
        };
        let mut answer = served_by.answer(&request);
        // A candidate on trial that fails costs no request: the incumbent answers.
        if let (Err(InferError::Failed { .. }), Some(incumbent)) = (&answer, incumbent) {
            served_by = incumbent;
            answer = served_by.answer(&request);
        }
        let (outputs, latency) = answer?;
        let seen = prediction(&outputs, served_by.scores());
        let confidence = seen.as_ref().map(|(_, confidence)| *confidence);
        // Requests that ask for a version are not chance's choice of an arm: they count for the version, not for the rollout.
        let trial = request.version.is_none();
        let window = served_by.count(trial, |window| window.answered(latency, confidence));
        if let Some((classes, _)) = seen {
            if trial {
                self.compare(&model, &served_by, &request, &classes);
            }
            lock(&model.predictions).remember(&id, &served_by.name, window, classes);
        }
        Ok(Answer { id, version: served_by.name.clone(), outputs, latency })
    }

    /// Lets the other arm answer too, later and elsewhere, if there is time for it.
    fn compare(&self, model: &Model, served_by: &Arc<Version>, request: &Request, classes: &[u32]) {
        let routing = model.routing.load();
        let Some(candidate) = &routing.candidate else { return };
        let other = match served_by {
            version if Arc::ptr_eq(version, &routing.active) => &candidate.version,
            version if Arc::ptr_eq(version, &candidate.version) => &routing.active,
            _ => return,
        };
        let sender = lock(&model.comparisons).clone();
        let Some(sender) = sender else { return };
        // A full queue means that the device is busy: this request is not compared.
        let _ = sender.try_send(Comparison {
            inputs: request.inputs.clone(),
            other: Arc::clone(other),
            candidate: Arc::clone(&candidate.version),
            classes: classes.to_vec(),
        });
    }

    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let job = loop {
                if let Some(job) = queue.pop_front() {
                    break job;
                }
                if self.stopping.load(Ordering::Acquire) {
                    return;
                }
                queue = self.queued.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
            };
            drop(queue);
            let expired = job.request.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let answer = if expired { Err(InferError::Deadline) } else { self.infer(&job.model, job.request) };
            // A completion that panics must not take the worker with it.
            if catch_unwind(AssertUnwindSafe(|| (job.completion)(answer))).is_err() {
                tracing::error!(model = job.model, "a completion panicked");
            }
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut models: Vec<String> = self.inner.models.load().keys().cloned().collect::<Vec<_>>();
        models.sort();
        f.debug_struct("Host").field("models", &models).finish()
    }
}
