//! Who serves, and how that changes: restoring after a start, moving rollouts on, going back.
//!
//! Locks are taken in the order `deploying`, `changing`. Loading a version is slow and happens under `deploying` alone, so that the gates
//! of other models act, and status is told, meanwhile. A change is committed to the store before traffic follows it; only a roll back
//! moves traffic first.

use crate::{
    admission,
    error::HostError,
    host::{Inner, Model, Ongoing, POLL},
    rollout::{Action, Event, served},
    router::{COMPARISONS_MAX, Candidate, Comparison, Predictions, Routing, shadow_gates},
    status::HistoryEntry,
    store::{ModelRecord, StoreRepair, Trials, VersionRecord, strip_lost},
    swap::{Instances, Version, lock},
};
use cutover_monitor::Gates;
use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::{Arc, TryLockError, atomic::Ordering, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

/// Time that comparing rests for each unit of time it ran: it never takes more than a fifth of a core, and less when the device is busy.
const COMPARISON_REST: u32 = 4;
/// The same while requests keep all cores busy.
const COMPARISON_REST_MAX: u32 = 64;
/// Serving time that a power cut may lose, in seconds.
const PROGRESS_S: f64 = 10.0;
/// After a transition could not be committed.
const RETRY: Duration = Duration::from_secs(1);

/// The two ends of a rollout after which the incumbent stays.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    RolledBack,
    Inconclusive,
}

impl End {
    /// As the history says it.
    fn event(self) -> &'static str {
        match self {
            End::RolledBack => "rolled back",
            End::Inconclusive => "inconclusive",
        }
    }
}

impl Inner {
    /// Puts what the store holds in service.
    pub(crate) fn restore(&self) -> Result<(), HostError> {
        let mut changing = lock(&self.changing);
        for (name, record) in self.store.models()? {
            let mut ongoing = Ongoing::new(record);
            if self.restore_active(&name, &mut ongoing)? {
                self.restore_candidate(&name, &mut ongoing)?;
            }
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
            return self.end(name, ongoing, End::RolledBack, &reason);
        }
        candidate.starts += 1;
        let (version, rollout, trials) =
            (candidate.version.clone(), candidate.rollout.clone(), candidate.trials.clone());
        // Counted before it is loaded: loading it may be what ends the process.
        let entry = HistoryEntry::new(name, "resumed", &version, "the host was started again");
        self.store.save(name, &ongoing.record, Some(&entry))?;
        match self.load_recorded(name, &version, &ongoing.record) {
            Ok(loaded) => {
                let shadow = shadow_gates(&rollout.strategy);
                let salt = ongoing.record.rollouts;
                self.start_candidate(name, Candidate { version: loaded, share: rollout.share, salt, shadow });
                if let (Ok(model), Some(trials)) = (self.model(name), trials) {
                    let routing = model.routing.load();
                    routing.active.resume(trials.incumbent);
                    routing.candidate.iter().for_each(|candidate| candidate.version.resume(trials.candidate.clone()));
                }
                Ok(())
            }
            Err(error) => self.end(name, ongoing, End::RolledBack, &error.to_string()),
        }
    }

    /// The host ends as it should: that it was started says nothing against a candidate.
    pub(crate) fn close(&self) {
        for (name, ongoing) in lock(&self.changing).iter_mut() {
            self.save_answers(name);
            self.note_trials(name, ongoing);
            let Some(candidate) = ongoing.record.candidate.as_mut() else { continue };
            candidate.starts = 0;
            if let Err(error) = self.store.save(name, &ongoing.record, None) {
                tracing::warn!(model = name, %error, "the rollout's progress was not saved");
            }
        }
    }

    /// Labels may come days later, to another process.
    fn save_answers(&self, name: &str) {
        let Ok(model) = self.model(name) else { return };
        let answers = lock(&model.predictions).save();
        if let Some(Err(error)) = answers.map(|answers| self.store.save_answers(name, &answers)) {
            tracing::warn!(model = name, %error, "labels for what was answered lately may find nothing after a restart");
        }
    }

    /// Notes in the record what both arms counted so far.
    fn note_trials(&self, name: &str, ongoing: &mut Ongoing) {
        let (Ok(model), Some(record)) = (self.model(name), ongoing.record.candidate.as_mut()) else { return };
        let routing = model.routing.load();
        if let Some(candidate) = &routing.candidate {
            record.trials = Some(Trials { incumbent: routing.active.trial(), candidate: candidate.version.trial() });
        }
    }

    pub(crate) fn load_recorded(
        &self,
        model: &str,
        version: &str,
        record: &ModelRecord,
    ) -> Result<Arc<Version>, HostError> {
        let missing = || crate::StoreError::State(format!("model '{model}' has no record of its version {version}"));
        self.load(model, version, record.versions.get(version).ok_or_else(missing)?)
    }

    pub(crate) fn load(&self, model: &str, version: &str, record: &VersionRecord) -> Result<Arc<Version>, HostError> {
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.to_string(), source };
        let began = Instant::now();
        let executable = admission::compile(self.store.load(record)?, &self.options.backends).map_err(refused)?;
        let instances = Instances::new(self.options.instances(), self.options.waiting_max);
        let preprocessor = self.store.preprocessor(record, executable.signature())?;
        Ok(Arc::new(Version::new(version.to_string(), executable, instances, preprocessor, began.elapsed())))
    }

    /// Bytes of every version that may take requests, what they share counted once, and the addresses of what was counted; without the
    /// version before of `model`.
    pub(crate) fn resident(&self, model: Option<&str>) -> (u64, HashSet<usize>) {
        let mut counted = HashSet::new();
        let mut bytes = 0u64;
        for found in self.models.load().values() {
            let without_previous = model == Some(found.name.as_str());
            for (version, is_previous) in found.routing.load().roles() {
                if !(is_previous && without_previous) {
                    bytes = bytes.saturating_add(version.bytes_beside(&mut counted));
                }
            }
        }
        (bytes, counted)
    }

    pub(crate) fn resident_bytes(&self, model: Option<&str>) -> u64 {
        self.resident(model).0
    }

    pub(crate) fn put_in_service(&self, name: &str, version: Arc<Version>) {
        let capacity = self.options.feedback_window;
        let key = || {
            let mut key = [0; 32];
            // Seeded by the system.
            let words = key.chunks_exact_mut(8).zip(0u64..);
            words.for_each(|(word, i)| word.copy_from_slice(&RandomState::new().hash_one(i).to_le_bytes()));
            key
        };
        let saved = self.store.answers(name).unwrap_or_default();
        let predictions = saved.and_then(|saved| Predictions::restore(capacity, &saved).ok());
        let predictions = predictions.unwrap_or_else(|| Predictions::new(capacity, key()));
        let mut models = HashMap::clone(&self.models.load());
        models.insert(name.to_string(), Arc::new(Model::new(name, version, predictions)));
        self.models.store(Arc::new(models));
        self.swaps.fetch_add(1, Ordering::Relaxed);
    }

    /// Replaces who serves. Versions that no longer have a role go to the reaper.
    pub(crate) fn route(&self, name: &str, change: impl FnOnce(&Routing) -> Routing) {
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
    pub(crate) fn start_candidate(&self, name: &str, candidate: Candidate) {
        self.route(name, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: Some(candidate),
            previous: before.previous.clone(),
        });
        let Ok(model) = self.model(name) else { return };
        model.begin_rollout();
        let (sender, receiver) = sync_channel::<Comparison>(COMPARISONS_MAX);
        let watched = Arc::downgrade(&model);
        let on_trial = move |version: &Arc<Version>| {
            let is = |candidate: &Candidate| Arc::ptr_eq(&candidate.version, version);
            watched.upgrade().is_some_and(|model| model.routing.load().candidate.as_ref().is_some_and(is))
        };
        let (watched, queue) = (Arc::downgrade(&model), Arc::clone(&self.queue));
        let cores = thread::available_parallelism().map_or(1, |n| n.get());
        let is_busy = move |model: &Model| {
            let routing = model.routing.load();
            let in_flight: usize = routing.roles().map(|(version, _)| version.in_flight.load(Ordering::Relaxed)).sum();
            queue.waiting() > 0 || in_flight >= cores
        };
        // What still waits when its rollout ends is dropped: it holds versions that are to give their memory back.
        let compare = move || {
            let mut rest = COMPARISON_REST;
            while let Some(comparison) = receiver.recv().ok().filter(|comparison| on_trial(&comparison.candidate)) {
                let compared = comparison.run();
                let Some(model) = watched.upgrade() else { return };
                if let Some(message) = compared.crashed {
                    model.crashed(&comparison.candidate, &message);
                }
                if let Some(classes) = compared.classes.filter(|_| comparison.shadow.is_some()) {
                    let labelled = lock(&model.predictions).add_copy(&comparison.id, classes);
                    comparison.candidate.count_trial(|window| {
                        let pairs = labelled.into_iter().flatten();
                        pairs.for_each(|(incumbent, candidate)| window.pairs.settle(incumbent, candidate));
                    });
                }
                rest = match is_busy(&model) {
                    true => (rest * 2).min(COMPARISON_REST_MAX),
                    false => (rest / 2).max(COMPARISON_REST),
                };
                drop(model);
                let rested = Instant::now() + compared.took * rest;
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
        self.sweep_streams(now);
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

    /// Streams whose time is over must not keep their version's memory.
    fn sweep_streams(&self, now: Instant) {
        for model in self.models.load().values() {
            let mut streams = lock(&model.streams);
            if streams.len() > 0 {
                let routing = model.routing.load();
                streams.sweep(now, self.stream_limits(), |version| routing.serves(version));
            }
        }
    }

    /// Judges one rollout by what was counted up to now.
    fn look(&self, name: &str, ongoing: &mut Ongoing, now: Instant) -> Result<(), HostError> {
        ongoing.retry_at = None;
        if let Some((end, reason)) = ongoing.ending.clone() {
            return self.end(name, ongoing, end, &reason);
        }
        let passed = ongoing.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        ongoing.looked = Some(now);
        let Some(candidate) = ongoing.record.candidate.as_mut() else { return Ok(()) };
        candidate.serving_s += served(passed).as_secs_f64();
        let Ok(model) = self.model(name) else { return Ok(()) };
        let routing = model.routing.load_full();
        let Some(arm) = &routing.candidate else { return Ok(()) };
        let (incumbent, observed) = (routing.active.window(), arm.version.window());
        let crash = model.take_crash(&arm.version.name);
        let event = match &crash {
            Some(reason) => Event::Crashed { reason },
            None => Event::Observed { incumbent: &incumbent, candidate: &observed },
        };
        let mut rollout = candidate.rollout.clone();
        let actions = rollout.handle(Duration::from_secs_f64(candidate.serving_s), event);
        if !actions.iter().any(|action| matches!(action, Action::Share(_))) {
            candidate.rollout = rollout;
        } else {
            // The step is made when it is committed; positive evidence ends the count of starts.
            let mut record = ongoing.record.clone();
            let committed = record.candidate.as_mut().expect("as above");
            (committed.rollout, committed.starts, committed.trials) = (rollout, 0, None);
            let (step, share) = (committed.rollout.step + 1, committed.rollout.share);
            let reason = format!("{}, step {step}, share {share}", committed.rollout.strategy.name());
            let entry = HistoryEntry::new(name, "share", &committed.version, &reason);
            self.store.save(name, &record, Some(&entry))?;
            ongoing.record = record;
            ongoing.saved_s = ongoing.serving_s();
        }
        for action in actions {
            self.act(name, ongoing, action)?;
        }
        if ongoing.record.candidate.is_some() && ongoing.serving_s() - ongoing.saved_s >= PROGRESS_S {
            self.note_trials(name, ongoing);
            self.store.save(name, &ongoing.record, None)?;
            ongoing.saved_s = ongoing.serving_s();
            self.save_answers(name);
        }
        Ok(())
    }

    /// Does what a strategy decided; a share is committed already.
    pub(crate) fn act(&self, name: &str, ongoing: &mut Ongoing, action: Action) -> Result<(), HostError> {
        match action {
            Action::Promote { reason } => self.promote(name, ongoing, &reason),
            Action::RollBack { reason } => self.end(name, ongoing, End::RolledBack, &reason),
            Action::Inconclusive { reason } => self.end(name, ongoing, End::Inconclusive, &reason),
            Action::Alert { reason } => {
                tracing::warn!(model = name, reason, "both arms fail alike: the rollout holds");
                let version = ongoing.record.candidate.as_ref().map_or("", |c| c.version.as_str());
                let entry = HistoryEntry::new(name, "alert", version, &format!("it is not the candidate: {reason}"));
                Ok(self.store.save(name, &ongoing.record, Some(&entry))?)
            }
            Action::Share(share) => {
                let shadow: Option<Gates> =
                    ongoing.record.candidate.as_ref().and_then(|c| shadow_gates(&c.rollout.strategy));
                self.route(name, |before| Routing {
                    active: Arc::clone(&before.active),
                    candidate: before.candidate.clone().map(|c| Candidate { share, shadow, ..c }),
                    previous: before.previous.clone(),
                });
                if let Ok(model) = self.model(name) {
                    model.begin_step();
                }
                Ok(())
            }
        }
    }

    pub(crate) fn promote_by_hand(&self, model: &str) -> Result<(), HostError> {
        let mut changing = lock(&self.changing);
        let ongoing = changing.get_mut(model).ok_or_else(|| HostError::UnknownModel(model.to_string()))?;
        self.not_in_outage(model)?;
        self.promote(model, ongoing, "asked for")
    }

    pub(crate) fn promote(&self, name: &str, ongoing: &mut Ongoing, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        if let Some((_, reason)) = &ongoing.ending {
            return Err(HostError::Strategy(format!("the candidate's rollout is being ended: {reason}")));
        }
        record.previous = record.active.replace(candidate.version.clone());
        record.evidence = candidate.rollout.evidence;
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

    /// Ends a rollout, the incumbent staying.
    pub(crate) fn end(&self, name: &str, ongoing: &mut Ongoing, end: End, reason: &str) -> Result<(), HostError> {
        let mut record = ongoing.record.clone();
        let candidate = record.candidate.take().ok_or_else(|| HostError::NoRollout(name.to_string()))?;
        record.prune();
        // Traffic first: the sooner the candidate gets none the better, and a power cut before the commit only resumes it.
        ongoing.ending = Some((end, reason.to_string()));
        self.stop_comparing(name);
        self.route(name, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: None,
            previous: before.previous.clone(),
        });
        let entry = HistoryEntry::new(name, end.event(), &candidate.version, reason);
        self.store.save(name, &record, Some(&entry))?;
        ongoing.record = record;
        ongoing.ending = None;
        self.collect_garbage();
        Ok(())
    }

    fn not_in_outage(&self, model: &str) -> Result<(), HostError> {
        let outage = self.models.load().get(model).and_then(|found| found.outage.load_full());
        match outage {
            Some(outage) => Err(HostError::Busy { model: model.to_string(), candidate: outage.version.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn rollback(&self, model: &str) -> Result<(), HostError> {
        let mut changing = lock(&self.changing);
        let ongoing = changing.get_mut(model).ok_or_else(|| HostError::UnknownModel(model.to_string()))?;
        self.not_in_outage(model)?;
        if ongoing.record.candidate.is_some() {
            return self.end(model, ongoing, End::RolledBack, "asked for");
        }
        self.go_back(model, ongoing)
    }

    /// From the version in service to the one before.
    fn go_back(&self, name: &str, ongoing: &mut Ongoing) -> Result<(), HostError> {
        let previous = ongoing.record.previous.clone().ok_or_else(|| HostError::NothingBefore(name.to_string()))?;
        let resident = self.models.load().get(name).and_then(|m| m.routing.load().previous.clone());
        let version = match resident.filter(|v| v.name == previous) {
            Some(version) => version,
            None => self.load_recorded(name, &previous, &ongoing.record)?,
        };
        let mut record = ongoing.record.clone();
        record.previous = record.active.replace(previous.clone());
        record.evidence = Vec::new();
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

    /// Moves what is damaged aside. Versions that serve go on from memory.
    pub(crate) fn repair_store(&self) -> Result<StoreRepair, HostError> {
        let _deploying = lock(&self.deploying);
        let mut changing = lock(&self.changing);
        let lost = self.store.quarantine()?;
        let mut changes = Vec::new();
        for (name, ongoing) in changing.iter_mut() {
            let mut record = ongoing.record.clone();
            for (version, change) in strip_lost(name, &mut record, &lost, true) {
                self.store.save(name, &record, Some(&HistoryEntry::new(name, "lost", &version, &change)))?;
                changes.push(format!("{name} {version}: {change}"));
            }
            let (had, has) = (ongoing.record.candidate.is_some(), record.candidate.is_some());
            if had && !has {
                self.stop_comparing(name);
            }
            let keeps_previous = record.previous.is_some();
            ongoing.record = record;
            self.route(name, |before| Routing {
                active: Arc::clone(&before.active),
                candidate: before.candidate.clone().filter(|_| has),
                previous: before.previous.clone().filter(|_| keeps_previous),
            });
        }
        Ok(StoreRepair { lost, changes, removed: self.store.collect_garbage()? })
    }

    /// Removes objects without use, unless a deploy is writing some that have none yet: it collects when it ends.
    pub(crate) fn collect_garbage(&self) {
        match self.deploying.try_lock() {
            Err(TryLockError::WouldBlock) => {}
            Ok(_) | Err(TryLockError::Poisoned(_)) => self.remove_unused(),
        }
    }

    /// Only while deploying, or with nobody else to deploy.
    pub(crate) fn remove_unused(&self) {
        if let Err(error) = self.store.collect_garbage() {
            tracing::warn!(%error, "objects without use could not be removed");
        }
    }
}
