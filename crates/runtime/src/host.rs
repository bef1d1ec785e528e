//! The host: models in service, and everything that may be done to them.
//!
//! Requests touch an atomic pointer, a session list and counters, each for O(1); they never wait for a deploy, a load or a drop. Whatever
//! changes who serves takes one lock of its own, commits to the store, and then replaces the routing.

use crate::{
    admission,
    error::{FeedbackError, HostError, InferError},
    request::{Answer, Label, Request, prediction},
    rollout::{Action, Event, Rollout, Strategy},
    router::{Candidate, Predictions, Routing},
    status::{HistoryEntry, Metrics, ModelStatus, RolloutStatus, Status, VersionMetrics, VersionStatus},
    store::{CandidateRecord, ModelRecord, Store, VersionRecord},
    swap::{Reaper, Version, lock},
};
use arc_swap::ArcSwap;
use cutover_backend::{Backend, Input, Output, RunContext, RunError};
use cutover_package::Package;
use cutover_tensor::Value;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
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
    /// Starts of the host with one candidate before it is taken for the reason of the restarts, and rolled back.
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
const POLL: Duration = Duration::from_millis(20);
/// Comparisons of both arms that may wait; more are skipped.
const COMPARISONS_MAX: usize = 16;
/// Time that comparing rests for each unit of time it ran, so that it never takes more than a fifth of a core.
const COMPARISON_REST: u32 = 4;

/// Models and their versions in one store. Clones are the same host; the last one to go closes the store.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
    /// Ends the threads when the last clone of the host goes; they hold `inner` alone.
    _threads: Arc<Threads>,
}

struct Inner {
    options: HostOptions,
    store: Store,
    reaper: Reaper,
    models: ArcSwap<HashMap<String, Arc<Model>>>,
    /// Taken by whoever changes who serves, and by nobody else.
    changing: Mutex<BTreeMap<String, Ongoing>>,
    queue: Mutex<VecDeque<Job>>,
    queued: Condvar,
    stopping: AtomicBool,
    swaps: AtomicU64,
    next_id: AtomicU64,
    /// Makes request ids of this start of the host differ from those of others.
    boot: u64,
}

struct Model {
    name: String,
    routing: ArcSwap<Routing>,
    predictions: Mutex<Predictions>,
    /// Where both arms' answers to one request are compared; `None` outside of rollouts.
    comparisons: Mutex<Option<SyncSender<Comparison>>>,
}

/// A model's record, and when its rollout was last looked at.
struct Ongoing {
    record: ModelRecord,
    looked: Option<Instant>,
}

struct Comparison {
    inputs: Vec<(String, Value)>,
    answered_by: Arc<Version>,
    other: Arc<Version>,
    candidate: Arc<Version>,
    classes: Vec<u32>,
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
    }
}

impl Host {
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

    /// Answers on a worker's thread, which calls `completion`. Refused at once when too many are waiting.
    pub fn submit(
        &self,
        model: &str,
        request: Request,
        completion: impl FnOnce(Result<Answer, InferError>) + Send + 'static,
    ) {
        let mut queue = lock(&self.inner.queue);
        let waiting = queue.len();
        if waiting >= self.inner.options.waiting_max || self.inner.options.workers == 0 {
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
        let (version, right) = lock(&found.predictions).settle(id, label)?;
        let routing = found.routing.load_full();
        // A version that is gone by now has no window to count for.
        if let Some(version) = routing.named(&version) {
            version.count(|window| right.iter().for_each(|&r| window.accuracy.add(r)));
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
    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, HostError> {
        Ok(self.inner.store.history(model)?)
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
    fn model(&self, name: &str) -> Result<Arc<Model>, InferError> {
        self.models.load().get(name).cloned().ok_or_else(|| InferError::UnknownModel(name.to_string()))
    }

    fn infer(&self, name: &str, request: Request) -> Result<Answer, InferError> {
        let model = self.model(name)?;
        let routing = model.routing.load_full();
        let id = request
            .id
            .clone()
            .unwrap_or_else(|| format!("{:x}-{}", self.boot, self.next_id.fetch_add(1, Ordering::Relaxed)));
        let version = match &request.version {
            Some(version) => routing
                .named(version)
                .ok_or_else(|| InferError::UnknownVersion { model: name.to_string(), version: version.clone() })?,
            None => routing.pick(request.key.as_deref().unwrap_or(&id)),
        };
        let mut served_by = Arc::clone(version);
        let mut answer = served_by.answer(&request);
        // A candidate on trial that fails costs no request: the incumbent answers.
        if let (Err(InferError::Failed { .. }), None) = (&answer, &request.version)
            && !Arc::ptr_eq(&served_by, &routing.active)
        {
            served_by = Arc::clone(&routing.active);
            answer = served_by.answer(&request);
        }
        let (outputs, latency) = answer?;
        let seen = prediction(&outputs);
        served_by.count(|window| window.answered(latency, seen.as_ref().map(|(_, confidence)| *confidence)));
        if let Some((classes, _)) = seen {
            self.compare(&model, &routing, &served_by, &request, &classes);
            lock(&model.predictions).remember(&id, &served_by.name, classes);
        }
        Ok(Answer { id, version: served_by.name.clone(), outputs, latency })
    }

    /// Lets the other arm answer too, later and elsewhere, if there is time for it.
    fn compare(&self, model: &Model, routing: &Routing, served_by: &Arc<Version>, request: &Request, classes: &[u32]) {
        let Some(candidate) = &routing.candidate else { return };
        let sender = lock(&model.comparisons).clone();
        let Some(sender) = sender else { return };
        let other = if Arc::ptr_eq(served_by, &routing.active) { &candidate.version } else { &routing.active };
        // A full queue means that the device is busy: this request is not compared.
        let _ = sender.try_send(Comparison {
            inputs: request.inputs.clone(),
            answered_by: Arc::clone(served_by),
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
            let _ = catch_unwind(AssertUnwindSafe(|| (job.completion)(answer)));
        }
    }

    /// Puts what the store holds in service.
    fn restore(&self) -> Result<(), HostError> {
        let mut changing = lock(&self.changing);
        for (name, mut record) in self.store.models()? {
            let Some(active) = record.active.clone() else { continue };
            let active = self.load(&name, &active, &record.versions[&active])?;
            self.put_in_service(&name, active);
            let crashed = record.candidate.as_mut().map(|candidate| {
                candidate.starts += 1;
                (candidate.version.clone(), candidate.starts > self.options.candidate_starts_max)
            });
            let mut ongoing = Ongoing { record, looked: None };
            if let Some((version, crashed)) = crashed {
                let loaded = self.load(&name, &version, &ongoing.record.versions[&version]);
                match (loaded, crashed) {
                    (Ok(candidate), false) => {
                        let entry = HistoryEntry::new(&name, "resumed", &version, "the host was started again");
                        self.store.save(&name, &ongoing.record, &entry)?;
                        let share = ongoing.record.candidate.as_ref().map_or(0.0, |c| c.rollout.share);
                        self.start_candidate(&name, candidate, share, ongoing.record.rollouts);
                    }
                    (Err(error), _) => self.roll_back(&name, &mut ongoing, &error.to_string())?,
                    (_, true) => {
                        let reason =
                            format!("the host was started {} times with it", self.options.candidate_starts_max + 1);
                        self.roll_back(&name, &mut ongoing, &reason)?;
                    }
                }
            }
            changing.insert(name, ongoing);
        }
        self.store.collect_garbage()?;
        Ok(())
    }

    fn load(&self, model: &str, version: &str, record: &VersionRecord) -> Result<Arc<Version>, HostError> {
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.to_string(), source };
        let executable = admission::compile(self.store.load(record)?, &self.options.backends).map_err(refused)?;
        Ok(Arc::new(Version::new(version.to_string(), executable, self.options.workers.max(1))))
    }

    fn deploy(&self, model: &str, path: &Path, strategy: Strategy) -> Result<RolloutId, HostError> {
        strategy.check().map_err(HostError::Strategy)?;
        let package = Package::open(path)?;
        let version = package.manifest.version.clone();
        if package.manifest.name != model {
            return Err(HostError::WrongModel { asked: model.to_string(), package: package.manifest.name.clone() });
        }
        let mut changing = lock(&self.changing);
        let before = changing.get(model).map(|o| o.record.clone()).unwrap_or_default();
        if let Some(candidate) = &before.candidate {
            return Err(HostError::Busy { model: model.to_string(), candidate: candidate.version.clone() });
        }
        if before.active.as_ref() == Some(&version) {
            return Err(HostError::AlreadyServing { model: model.to_string(), version });
        }
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.clone(), source };
        let graph = package.graph(&Default::default())?;
        let added = self.store.add(&graph, &package.manifest)?;
        drop(graph);
        let admitted = self.load(model, &version, &added).and_then(|loaded| {
            let serving = self.models.load().get(model).map(|m| m.routing.load_full());
            if let Some(serving) = &serving {
                let signature = serving.active.executable.signature();
                admission::same_signature(signature, loaded.executable.signature()).map_err(refused)?;
            }
            admission::fits(&*loaded.executable, self.resident_bytes(), self.options.memory_bytes).map_err(refused)?;
            let golden = package.golden()?;
            admission::golden(&loaded.executable, &golden, package.manifest.golden).map_err(refused)?;
            Ok(loaded)
        });
        let loaded = match admitted {
            Ok(loaded) => loaded,
            Err(error) => {
                self.store.collect_garbage()?;
                if before.active.is_some() {
                    let entry = HistoryEntry::new(model, "refused", &version, &error.to_string());
                    self.store.save(model, &before, &entry)?;
                }
                return Err(error);
            }
        };
        let mut record = before;
        record.rollouts += 1;
        record.versions.insert(version.clone(), added);
        let id = RolloutId(format!("{model}#{}", record.rollouts));
        if record.active.is_none() {
            record.active = Some(version.clone());
            self.store.save(model, &record, &HistoryEntry::new(model, "deployed", &version, "the first version"))?;
            self.put_in_service(model, loaded);
            changing.insert(model.to_string(), Ongoing { record, looked: None });
            return Ok(id);
        }
        let mut strategy = strategy;
        if let Some(gates) = package.manifest.gates {
            strategy.set_gates(gates);
        }
        let mut rollout = Rollout::new(strategy);
        let actions = rollout.handle(Duration::ZERO, Event::Admitted);
        let reason = format!("by {}, share {}", rollout.strategy.name(), rollout.share);
        let share = rollout.share;
        record.candidate = Some(CandidateRecord { version: version.clone(), rollout, serving_s: 0.0, starts: 0 });
        self.store.save(model, &record, &HistoryEntry::new(model, "started", &version, &reason))?;
        self.start_candidate(model, loaded, share, record.rollouts);
        let mut ongoing = Ongoing { record, looked: Some(Instant::now()) };
        for action in actions {
            self.act(model, &mut ongoing, action)?;
        }
        changing.insert(model.to_string(), ongoing);
        Ok(id)
    }

    /// Bytes of every version that may take requests, and one session for each.
    fn resident_bytes(&self) -> u64 {
        let models = self.models.load();
        let versions = models.values().flat_map(|model| {
            let routing = model.routing.load_full();
            let candidate = routing.candidate.as_ref().map(|c| Arc::clone(&c.version));
            [Some(Arc::clone(&routing.active)), candidate, routing.previous.clone()].into_iter().flatten()
        });
        versions.map(|v| v.executable.footprint()).map(|f| f.weight_bytes + f.session_bytes).sum()
    }

    fn put_in_service(&self, name: &str, version: Arc<Version>) {
        let model = Arc::new(Model {
            name: name.to_string(),
            routing: ArcSwap::from_pointee(Routing { active: version, candidate: None, previous: None }),
            predictions: Mutex::new(Predictions::new(self.options.feedback_window)),
            comparisons: Mutex::new(None),
        });
        let mut models = HashMap::clone(&self.models.load());
        models.insert(name.to_string(), model);
        self.models.store(Arc::new(models));
        self.swaps.fetch_add(1, Ordering::Relaxed);
    }

    /// Replaces who serves. Versions that no longer have a role go to the reaper.
    fn route(&self, name: &str, change: impl FnOnce(&Routing) -> Routing) {
        let models = self.models.load();
        let Some(model) = models.get(name) else { return };
        let before = model.routing.load_full();
        let after = Arc::new(change(&before));
        let roles = |routing: &Routing| {
            let candidate = routing.candidate.as_ref().map(|c| Arc::clone(&c.version));
            [Some(Arc::clone(&routing.active)), candidate, routing.previous.clone()]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        };
        model.routing.store(Arc::clone(&after));
        for version in roles(&before) {
            if !roles(&after).iter().any(|kept| Arc::ptr_eq(kept, &version)) {
                self.reaper.retire(version);
            }
        }
        self.swaps.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives a candidate its share, both windows beginning now, and starts to compare.
    fn start_candidate(&self, name: &str, version: Arc<Version>, share: f64, salt: u64) {
        self.route(name, |before| {
            // A blue-green incumbent gets no traffic to be counted in: what it did before stands for it.
            if share < 1.0 {
                *lock(&before.active.window) = Default::default();
            }
            let active = Arc::clone(&before.active);
            Routing { active, candidate: Some(Candidate { version, share, salt }), previous: before.previous.clone() }
        });
        if let Ok(model) = self.model(name) {
            let (sender, receiver) = sync_channel::<Comparison>(COMPARISONS_MAX);
            let compare = move || {
                while let Ok(comparison) = receiver.recv() {
                    let took = comparison.run();
                    drop(comparison);
                    thread::sleep(took * COMPARISON_REST);
                }
            };
            match thread::Builder::new().name("cutover-compare".to_string()).spawn(compare) {
                Ok(_) => *lock(&model.comparisons) = Some(sender),
                Err(error) => tracing::warn!(model = model.name, %error, "answers of both arms are not compared"),
            }
        }
    }

    fn stop_comparing(&self, name: &str) {
        if let Ok(model) = self.model(name) {
            *lock(&model.comparisons) = None;
        }
    }

    fn poll(&self, now: Instant) -> Option<Instant> {
        let mut changing = lock(&self.changing);
        let mut rolling = false;
        for (name, ongoing) in changing.iter_mut() {
            let Some(candidate) = ongoing.record.candidate.as_mut() else { continue };
            rolling = true;
            let passed = ongoing.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
            ongoing.looked = Some(now);
            candidate.serving_s += passed.as_secs_f64();
            let Some(routing) = self.models.load().get(name).map(|m| m.routing.load_full()) else { continue };
            let Some(arm) = &routing.candidate else { continue };
            let (incumbent, observed) = (lock(&routing.active.window).clone(), lock(&arm.version.window).clone());
            let event = Event::Observed { incumbent: &incumbent, candidate: &observed };
            let actions = candidate.rollout.handle(Duration::from_secs_f64(candidate.serving_s), event);
            for action in actions {
                if let Err(error) = self.act(name, ongoing, action) {
                    tracing::error!(model = name, %error, "a rollout could not move on; it is tried again");
                }
            }
        }
        rolling.then(|| now + POLL)
    }

    fn act(&self, name: &str, ongoing: &mut Ongoing, action: Action) -> Result<(), HostError> {
        match action {
            Action::Promote { reason } => self.promote(name, ongoing, &reason),
            Action::RollBack { reason } => self.roll_back(name, ongoing, &reason),
            Action::Share(share) => {
                let Some(candidate) = &ongoing.record.candidate else { return Ok(()) };
                let reason = format!("step {}, share {share}", candidate.rollout.step + 1);
                let entry = HistoryEntry::new(name, "share", &candidate.version, &reason);
                self.store.save(name, &ongoing.record, &entry)?;
                self.route(name, |before| Routing {
                    active: Arc::clone(&before.active),
                    candidate: before.candidate.as_ref().map(|c| Candidate {
                        version: Arc::clone(&c.version),
                        share,
                        salt: c.salt,
                    }),
                    previous: before.previous.clone(),
                });
                Ok(())
            }
        }
    }

    fn promote(&self, name: &str, ongoing: &mut Ongoing, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        record.previous = record.active.replace(candidate.version.clone());
        record.prune();
        self.store.save(name, &record, &HistoryEntry::new(name, "promoted", &candidate.version, reason))?;
        ongoing.record = record;
        self.stop_comparing(name);
        self.route(name, |before| match &before.candidate {
            Some(candidate) => Routing {
                active: Arc::clone(&candidate.version),
                candidate: None,
                previous: Some(Arc::clone(&before.active)),
            },
            None => Routing { active: Arc::clone(&before.active), candidate: None, previous: before.previous.clone() },
        });
        self.store.collect_garbage()?;
        Ok(())
    }

    fn roll_back(&self, name: &str, ongoing: &mut Ongoing, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        record.prune();
        // Traffic first: the sooner the candidate gets none the better, and a power cut before the commit only resumes it.
        self.stop_comparing(name);
        self.route(name, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: None,
            previous: before.previous.clone(),
        });
        self.store.save(name, &record, &HistoryEntry::new(name, "rolled back", &candidate.version, reason))?;
        ongoing.record = record;
        self.store.collect_garbage()?;
        Ok(())
    }

    /// From the version in service to the one before.
    fn go_back(&self, name: &str, ongoing: &mut Ongoing) -> Result<(), HostError> {
        let nothing = || HostError::NothingBefore(name.to_string());
        let previous = ongoing.record.previous.clone().ok_or_else(nothing)?;
        let resident = self.models.load().get(name).and_then(|m| m.routing.load().previous.clone());
        let version = match resident.filter(|v| v.name == previous) {
            Some(version) => version,
            None => self.load(name, &previous, ongoing.record.versions.get(&previous).ok_or_else(nothing)?)?,
        };
        let mut record = ongoing.record.clone();
        record.previous = record.active.replace(previous.clone());
        self.store.save(
            name,
            &record,
            &HistoryEntry::new(name, "rolled back", &previous, "asked for; it serves again"),
        )?;
        ongoing.record = record;
        self.route(name, |before| Routing {
            active: version,
            candidate: None,
            previous: Some(Arc::clone(&before.active)),
        });
        Ok(())
    }
}

impl Version {
    /// Runs the request, and counts it if this version could not answer.
    fn answer(&self, request: &Request) -> Result<(Vec<(String, Value)>, Duration), InferError> {
        let _in_flight = self.in_flight();
        let answer = self.run(&request.inputs, request.outputs.as_deref(), request.deadline);
        if let Err(InferError::Failed { .. }) = &answer {
            self.count(|window| window.failed());
        }
        answer
    }

    fn run(
        &self,
        given: &[(String, Value)],
        wanted: Option<&[String]>,
        deadline: Option<Instant>,
    ) -> Result<(Vec<(String, Value)>, Duration), InferError> {
        let signature = self.executable.signature();
        let failed = |message: String| InferError::Failed { version: self.name.clone(), message };
        if let Some((unknown, _)) = given.iter().find(|(name, _)| !signature.inputs.iter().any(|b| b.name == *name)) {
            let names: Vec<_> = signature.inputs.iter().map(|b| b.name.as_str()).collect();
            return Err(InferError::Input(format!(
                "input '{unknown}' is not one of the model's: {}",
                names.join(", ")
            )));
        }
        let mut inputs = Vec::with_capacity(signature.inputs.len());
        for binding in &signature.inputs {
            let mut found = given.iter().filter(|(name, _)| *name == binding.name);
            match (found.next(), found.next()) {
                (Some((_, value)), None) => inputs.push(Input::Value(value)),
                (None, _) => {
                    return Err(InferError::Input(format!("input '{}' ({}) is missing", binding.name, binding.fact)));
                }
                (Some(_), Some(_)) => {
                    return Err(InferError::Input(format!("input '{}' is there twice", binding.name)));
                }
            }
        }
        let names: Vec<&str> = signature.outputs.iter().map(|b| b.name.as_str()).collect();
        if let Some(unknown) = wanted.unwrap_or_default().iter().find(|w| !names.contains(&w.as_str())) {
            return Err(InferError::Input(format!(
                "output '{unknown}' is not one of the model's: {}",
                names.join(", ")
            )));
        }
        let is_wanted = |name: &str| wanted.is_none_or(|wanted| wanted.iter().any(|w| w == name));
        let place = |name: &&str| if is_wanted(name) { Output::Allocate(None) } else { Output::Discard };
        let mut outputs: Vec<Output<'_>> = names.iter().map(place).collect();
        let mut session = self.session().map_err(|e| failed(e.to_string()))?;
        let context = RunContext { deadline, ..RunContext::default() };
        let start = Instant::now();
        let run = catch_unwind(AssertUnwindSafe(|| session.run(&inputs, &mut outputs, &context)));
        let latency = start.elapsed();
        match run {
            // A session whose run panicked is not used again.
            Err(_) => return Err(failed("panicked".to_string())),
            Ok(Err(error @ RunError::DeviceLost(_))) => return Err(InferError::of_run(error, &self.name)),
            Ok(Err(error)) => {
                self.give_back(session);
                return Err(InferError::of_run(error, &self.name));
            }
            Ok(Ok(())) => self.give_back(session),
        }
        let mut values: Vec<(String, Value)> = Vec::with_capacity(names.len());
        for (name, output) in names.iter().zip(outputs) {
            if let Output::Allocate(Some(value)) = output {
                values.push((name.to_string(), value));
            }
        }
        if let Some(wanted) = wanted {
            values.sort_by_key(|(name, _)| wanted.iter().position(|w| w == name));
        }
        Ok((values, latency))
    }
}

impl Comparison {
    /// Lets the other arm answer, counts whether they agree, and gives the time it took.
    fn run(&self) -> Duration {
        let start = Instant::now();
        if let Ok((outputs, _)) = self.other.run(&self.inputs, None, None)
            && let Some((classes, _)) = prediction(&outputs)
            && !Arc::ptr_eq(&self.answered_by, &self.other)
        {
            for (a, b) in classes.iter().zip(&self.classes) {
                lock(&self.candidate.window).agreement.add(a == b);
            }
        }
        start.elapsed()
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut models: Vec<String> = self.inner.models.load().keys().cloned().collect::<Vec<_>>();
        models.sort();
        f.debug_struct("Host").field("models", &models).finish()
    }
}
