//! Who serves, and how that changes: restoring after a start, deploying, moving rollouts on.
//!
//! Locks are taken in the order `deploying`, `changing`. Loading a version is slow and happens under `deploying` alone, so that the gates
//! of other models act, and status is told, meanwhile. A change is committed to the store before traffic follows it; only a roll back
//! moves traffic first.

use crate::{
    admission,
    error::{AdmissionError, HostError},
    host::{Inner, Model, Ongoing, POLL, RolloutId},
    rollout::{Action, Event, Rollout, Strategy},
    router::{COMPARISONS_MAX, Candidate, Comparison, Predictions, Routing},
    status::HistoryEntry,
    store::{CandidateRecord, ModelRecord, VersionRecord},
    swap::{Version, lock},
};
use arc_swap::ArcSwap;
use cutover_package::{Manifest, Package};
use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, TryLockError, atomic::Ordering, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

/// Time that comparing rests for each unit of time it ran, so that it never takes more than a fifth of a core.
const COMPARISON_REST: u32 = 4;
/// Serving time that a power cut may lose, in seconds.
const PROGRESS_S: f64 = 10.0;
/// After a transition could not be committed.
const RETRY: Duration = Duration::from_secs(1);

impl Inner {
    /// Puts what the store holds in service.
    pub(crate) fn restore(&self) -> Result<(), HostError> {
        let mut changing = lock(&self.changing);
        for (name, record) in self.store.models()? {
            let mut ongoing = Ongoing::new(record);
            if !self.restore_active(&name, &mut ongoing)? {
                continue;
            }
            self.restore_candidate(&name, &mut ongoing)?;
            changing.insert(name, ongoing);
        }
        self.collect_garbage();
        Ok(())
    }

    /// A version in service that is damaged gives way to the one before. Whether the model has any.
    fn restore_active(&self, name: &str, ongoing: &mut Ongoing) -> Result<bool, HostError> {
        let Some(active) = ongoing.record.active.clone() else { return Ok(false) };
        let damaged = match self.load_recorded(name, &active, &ongoing.record) {
            Ok(version) => {
                self.put_in_service(name, version);
                return Ok(true);
            }
            Err(error) => error,
        };
        let Some(previous) = ongoing.record.previous.clone() else { return Err(damaged) };
        let Ok(version) = self.load_recorded(name, &previous, &ongoing.record) else { return Err(damaged) };
        tracing::error!(model = name, version = active, error = %damaged, "the version in service no longer loads");
        let mut record = ongoing.record.clone();
        record.active = Some(previous);
        record.previous = None;
        record.prune();
        let reason = format!("it no longer loads: {damaged}");
        self.store.save(name, &record, Some(&HistoryEntry::new(name, "rolled back", &active, &reason)))?;
        ongoing.record = record;
        self.put_in_service(name, version);
        Ok(true)
    }

    /// Goes on with the rollout that was under way, unless its candidate seems to be why the host was started again and again.
    fn restore_candidate(&self, name: &str, ongoing: &mut Ongoing) -> Result<(), HostError> {
        let Some(candidate) = ongoing.record.candidate.as_mut() else { return Ok(()) };
        let starts_max = self.options.candidate_starts_max;
        if candidate.starts >= starts_max {
            let reason = format!("the host ended {} times without being closed while it was tried", starts_max + 1);
            return self.roll_back(name, ongoing, &reason);
        }
        candidate.starts += 1;
        let (version, share) = (candidate.version.clone(), candidate.rollout.share);
        // Counted before it is loaded: loading it may be what ends the process.
        let entry = HistoryEntry::new(name, "resumed", &version, "the host was started again");
        self.store.save(name, &ongoing.record, Some(&entry))?;
        match self.load_recorded(name, &version, &ongoing.record) {
            Ok(loaded) => {
                self.start_candidate(name, loaded, share, ongoing.record.rollouts);
                Ok(())
            }
            Err(error) => self.roll_back(name, ongoing, &error.to_string()),
        }
    }

    /// The host ends as it should: that it was started says nothing against a candidate.
    pub(crate) fn close(&self) {
        for (name, ongoing) in lock(&self.changing).iter_mut() {
            let Some(candidate) = ongoing.record.candidate.as_mut() else { continue };
            candidate.starts = 0;
            if let Err(error) = self.store.save(name, &ongoing.record, None) {
                tracing::warn!(model = name, %error, "the rollout's progress was not saved");
            }
        }
    }

    fn load_recorded(&self, model: &str, version: &str, record: &ModelRecord) -> Result<Arc<Version>, HostError> {
        let missing = || crate::StoreError::State(format!("model '{model}' has no record of its version {version}"));
        self.load(model, version, record.versions.get(version).ok_or_else(missing)?)
    }

    fn load(&self, model: &str, version: &str, record: &VersionRecord) -> Result<Arc<Version>, HostError> {
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.to_string(), source };
        let executable = admission::compile(self.store.load(record)?, &self.options.backends).map_err(refused)?;
        Ok(Arc::new(Version::new(version.to_string(), executable, self.options.workers.max(1))))
    }

    pub(crate) fn deploy(&self, model: &str, path: &Path, mut strategy: Strategy) -> Result<RolloutId, HostError> {
        strategy.check().map_err(HostError::Strategy)?;
        let package = Package::open(path)?;
        let manifest = &package.manifest;
        let version = manifest.version.clone();
        if manifest.name != model {
            return Err(HostError::WrongModel { asked: model.to_string(), package: manifest.name.clone() });
        }
        if let Some(gates) = manifest.gates {
            strategy.set_gates(gates);
        }
        let _deploying = lock(&self.deploying);
        let record_now = || lock(&self.changing).get(model).map(|o| o.record.clone()).unwrap_or_default();
        may_deploy(model, manifest, &record_now())?;
        let admitted = self.admit(model, &package);
        let mut changing = lock(&self.changing);
        let mut record = changing.get(model).map(|o| o.record.clone()).unwrap_or_default();
        // A version may have been rolled back while this one was loaded.
        let admitted = admitted.and_then(|admitted| may_deploy(model, manifest, &record).map(|()| admitted));
        let (loaded, added) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                if record.active.is_some() {
                    let entry = HistoryEntry::new(model, "refused", &version, &error.to_string());
                    self.store.save(model, &record, Some(&entry))?;
                }
                drop(changing);
                self.remove_unused();
                return Err(error);
            }
        };
        record.rollouts += 1;
        record.versions.insert(version.clone(), added);
        let id = RolloutId(format!("{model}#{}", record.rollouts));
        if record.active.is_none() {
            record.active = Some(version.clone());
            let entry = HistoryEntry::new(model, "deployed", &version, "the first version");
            self.store.save(model, &record, Some(&entry))?;
            self.put_in_service(model, loaded);
            changing.insert(model.to_string(), Ongoing::new(record));
            return Ok(id);
        }
        let mut rollout = Rollout::new(strategy);
        let actions = rollout.handle(Duration::ZERO, Event::Admitted);
        let share = rollout.share;
        let reason = format!("by {}, share {share}", rollout.strategy.name());
        record.candidate = Some(CandidateRecord { version: version.clone(), rollout, serving_s: 0.0, starts: 0 });
        let salt = record.rollouts;
        self.store.save(model, &record, Some(&HistoryEntry::new(model, "started", &version, &reason)))?;
        self.start_candidate(model, loaded, share, salt);
        let mut ongoing = Ongoing::new(record);
        for action in actions.into_iter().filter(|action| !matches!(action, Action::Share(_))) {
            self.act(model, &mut ongoing, action)?;
        }
        changing.insert(model.to_string(), ongoing);
        drop(changing);
        self.remove_unused();
        Ok(id)
    }

    /// Stores the version in `package`, loads it from there, and lets it show what it must.
    fn admit(&self, model: &str, package: &Package) -> Result<(Arc<Version>, VersionRecord), HostError> {
        let version = &package.manifest.version;
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.clone(), source };
        let added = self.store.add(&package.graph(&Default::default())?, &package.manifest)?;
        let loaded = self.load(model, version, &added)?;
        let serving = self.models.load().get(model).map(|m| m.routing.load_full());
        if let Some(serving) = &serving {
            let signature = serving.active.executable.signature();
            admission::same_signature(signature, loaded.executable.signature()).map_err(refused)?;
        }
        let budget = self.options.memory_bytes;
        let fits = |resident| admission::fits(&*loaded.executable, resident, budget);
        if let Err(error @ AdmissionError::Memory { .. }) = fits(self.resident_bytes(None)) {
            // The version before is kept in memory for a quick way back only; the store keeps it too.
            fits(self.resident_bytes(Some(model))).map_err(|_| refused(error))?;
            self.route(model, |before| Routing {
                active: Arc::clone(&before.active),
                candidate: before.candidate.clone(),
                previous: None,
            });
        }
        admission::golden(&loaded.executable, &package.golden()?, package.manifest.golden).map_err(refused)?;
        Ok((loaded, added))
    }

    /// Bytes of every version that may take requests, and one session for each; without the version before of `model`.
    fn resident_bytes(&self, model: Option<&str>) -> u64 {
        let models = self.models.load();
        let bytes_of = |m: &Arc<Model>| {
            let without_previous = model == Some(m.name.as_str());
            let routing = m.routing.load();
            let counted = routing.roles().filter(|(_, is_previous)| !(*is_previous && without_previous));
            counted.map(|(version, _)| version.bytes()).sum::<u64>()
        };
        models.values().map(bytes_of).sum()
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
        // Held to the end: the reaper must not be the only one to hold a version that is still to be handed to it.
        let before = model.routing.load_full();
        let after = Arc::new(change(&before));
        model.routing.store(Arc::clone(&after));
        for (version, _) in before.roles() {
            if !after.roles().any(|(kept, _)| Arc::ptr_eq(kept, version)) {
                self.reaper.retire(Arc::clone(version));
            }
        }
        self.swaps.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives a candidate its share and starts to compare.
    fn start_candidate(&self, name: &str, version: Arc<Version>, share: f64, salt: u64) {
        self.route(name, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: Some(Candidate { version, share, salt }),
            previous: before.previous.clone(),
        });
        let Ok(model) = self.model(name) else { return };
        model.begin_windows();
        let (sender, receiver) = sync_channel::<Comparison>(COMPARISONS_MAX);
        let watched = Arc::downgrade(&model);
        let on_trial = move |version: &Arc<Version>| {
            let is = |candidate: &Candidate| Arc::ptr_eq(&candidate.version, version);
            watched.upgrade().is_some_and(|model| model.routing.load().candidate.as_ref().is_some_and(is))
        };
        // What still waits when its rollout ends is dropped: it holds versions that are to give their memory back.
        let compare = move || {
            while let Some(comparison) = receiver.recv().ok().filter(|comparison| on_trial(&comparison.candidate)) {
                let rested = Instant::now() + comparison.run() * COMPARISON_REST;
                while Instant::now() < rested && on_trial(&comparison.candidate) {
                    thread::sleep(rested.saturating_duration_since(Instant::now()).min(POLL));
                }
            }
        };
        match thread::Builder::new().name("cutover-compare".to_string()).spawn(compare) {
            Ok(_) => *lock(&model.comparisons) = Some(sender),
            Err(error) => tracing::warn!(model = model.name, %error, "answers of both arms are not compared"),
        }
    }

    fn stop_comparing(&self, name: &str) {
        if let Ok(model) = self.model(name) {
            *lock(&model.comparisons) = None;
        }
    }

    pub(crate) fn poll(&self, now: Instant) -> Option<Instant> {
        let mut changing = lock(&self.changing);
        let mut next: Option<Instant> = None;
        for (name, ongoing) in changing.iter_mut() {
            if ongoing.record.candidate.is_none() {
                continue;
            }
            let due = ongoing.retry_at.filter(|at| now < *at);
            if due.is_none()
                && let Err(error) = self.look(name, ongoing, now)
            {
                tracing::error!(model = name, %error, "a rollout could not move on; it is tried again");
                ongoing.retry_at = Some(now + RETRY);
            }
            let at = ongoing.retry_at.filter(|at| now < *at).unwrap_or(now + POLL);
            next = Some(next.map_or(at, |next| next.min(at)));
        }
        next
    }

    /// Judges one rollout by what was counted up to now.
    fn look(&self, name: &str, ongoing: &mut Ongoing, now: Instant) -> Result<(), HostError> {
        ongoing.retry_at = None;
        if let Some(reason) = ongoing.rolling_back.clone() {
            return self.roll_back(name, ongoing, &reason);
        }
        let passed = ongoing.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        ongoing.looked = Some(now);
        let Some(candidate) = ongoing.record.candidate.as_mut() else { return Ok(()) };
        candidate.serving_s += passed.as_secs_f64();
        let Some(routing) = self.models.load().get(name).map(|m| m.routing.load_full()) else { return Ok(()) };
        let Some(arm) = &routing.candidate else { return Ok(()) };
        let (incumbent, observed) = (routing.active.window(), arm.version.window());
        let event = Event::Observed { incumbent: &incumbent, candidate: &observed };
        let mut rollout = candidate.rollout.clone();
        let actions = rollout.handle(Duration::from_secs_f64(candidate.serving_s), event);
        if !actions.iter().any(|action| matches!(action, Action::Share(_))) {
            candidate.rollout = rollout;
        } else {
            // The step is made when it is committed; positive evidence ends the count of starts.
            let mut record = ongoing.record.clone();
            let committed = record.candidate.as_mut().expect("as above");
            (committed.rollout, committed.starts) = (rollout, 0);
            let (step, share) = (committed.rollout.step + 1, committed.rollout.share);
            let reason = format!("step {step}, share {share}");
            let entry = HistoryEntry::new(name, "share", &committed.version, &reason);
            self.store.save(name, &record, Some(&entry))?;
            ongoing.record = record;
            ongoing.saved_s = ongoing.serving_s();
        }
        for action in actions {
            self.act(name, ongoing, action)?;
        }
        if ongoing.record.candidate.is_some() && ongoing.serving_s() - ongoing.saved_s >= PROGRESS_S {
            self.store.save(name, &ongoing.record, None)?;
            ongoing.saved_s = ongoing.serving_s();
        }
        Ok(())
    }

    /// Does what a strategy decided; a share is committed already.
    fn act(&self, name: &str, ongoing: &mut Ongoing, action: Action) -> Result<(), HostError> {
        match action {
            Action::Promote { reason } => self.promote(name, ongoing, &reason),
            Action::RollBack { reason } => self.roll_back(name, ongoing, &reason),
            Action::Share(share) => {
                self.route(name, |before| Routing {
                    active: Arc::clone(&before.active),
                    candidate: before.candidate.clone().map(|c| Candidate { share, ..c }),
                    previous: before.previous.clone(),
                });
                if let Ok(model) = self.model(name) {
                    model.begin_windows();
                }
                Ok(())
            }
        }
    }

    pub(crate) fn promote(&self, name: &str, ongoing: &mut Ongoing, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        if let Some(reason) = &ongoing.rolling_back {
            return Err(HostError::Strategy(format!("the candidate is being rolled back: {reason}")));
        }
        record.previous = record.active.replace(candidate.version.clone());
        record.prune();
        self.store.save(name, &record, Some(&HistoryEntry::new(name, "promoted", &candidate.version, reason)))?;
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
        self.collect_garbage();
        Ok(())
    }

    pub(crate) fn roll_back(&self, name: &str, ongoing: &mut Ongoing, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        record.prune();
        // Traffic first: the sooner the candidate gets none the better, and a power cut before the commit only resumes it.
        ongoing.rolling_back = Some(reason.to_string());
        self.stop_comparing(name);
        self.route(name, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: None,
            previous: before.previous.clone(),
        });
        self.store.save(name, &record, Some(&HistoryEntry::new(name, "rolled back", &candidate.version, reason)))?;
        ongoing.record = record;
        ongoing.rolling_back = None;
        self.collect_garbage();
        Ok(())
    }

    /// From the version in service to the one before.
    pub(crate) fn go_back(&self, name: &str, ongoing: &mut Ongoing) -> Result<(), HostError> {
        let previous = ongoing.record.previous.clone().ok_or_else(|| HostError::NothingBefore(name.to_string()))?;
        let resident = self.models.load().get(name).and_then(|m| m.routing.load().previous.clone());
        let version = match resident.filter(|v| v.name == previous) {
            Some(version) => version,
            None => self.load_recorded(name, &previous, &ongoing.record)?,
        };
        let mut record = ongoing.record.clone();
        record.previous = record.active.replace(previous.clone());
        let entry = HistoryEntry::new(name, "rolled back", &previous, "asked for; it serves again");
        self.store.save(name, &record, Some(&entry))?;
        ongoing.record = record;
        self.route(name, |before| Routing {
            active: version,
            candidate: None,
            previous: Some(Arc::clone(&before.active)),
        });
        Ok(())
    }

    /// Removes objects without use, unless a deploy is writing some that have none yet: it collects when it ends.
    fn collect_garbage(&self) {
        match self.deploying.try_lock() {
            Err(TryLockError::WouldBlock) => {}
            Ok(_) | Err(TryLockError::Poisoned(_)) => self.remove_unused(),
        }
    }

    /// Only while deploying, or with nobody else to deploy.
    fn remove_unused(&self) {
        if let Err(error) = self.store.collect_garbage() {
            tracing::warn!(%error, "objects without use could not be removed");
        }
    }
}

/// Whether `manifest` may follow what `record` holds.
fn may_deploy(model: &str, manifest: &Manifest, record: &ModelRecord) -> Result<(), HostError> {
    let (model, version) = (model.to_string(), manifest.version.clone());
    if let Some(candidate) = &record.candidate {
        return Err(HostError::Busy { model, candidate: candidate.version.clone() });
    }
    if record.active.as_ref() == Some(&version) {
        return Err(HostError::AlreadyServing { model, version });
    }
    let known = record.versions.get(&version).map(|known| &known.manifest);
    if known.is_some_and(|known| known.files != manifest.files) {
        return Err(HostError::VersionTaken { model, version });
    }
    let active = record.active.as_ref().and_then(|active| record.versions.get(active));
    let device = active.map_or(0, |active| active.manifest.security_epoch);
    if manifest.security_epoch < device {
        return Err(HostError::SecurityEpoch { model, version, package: manifest.security_epoch, device });
    }
    Ok(())
}
