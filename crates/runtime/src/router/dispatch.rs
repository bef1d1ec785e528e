//! From a request to the version that answers it.

use super::{Answered, Comparison, streams::Refused};
use crate::{
    error::InferError,
    host::{Inner, Model},
    request::{Answer, Request, seen},
    rollout::Strategy,
    swap::{Version, lock},
};
use cutover_monitor::Seen;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

impl Inner {
    pub fn model(&self, name: &str) -> Result<Arc<Model>, InferError> {
        self.models.load().get(name).cloned().ok_or_else(|| InferError::UnknownModel(name.to_string()))
    }

    pub(crate) fn infer(&self, name: &str, request: Request) -> Result<Answer, InferError> {
        let model = self.model(name)?;
        if let Some(outage) = &*model.outage.load() {
            return Err(outage.error(name));
        }
        let id = request
            .id
            .clone()
            .unwrap_or_else(|| format!("{:x}-{}", self.boot, self.next_id.fetch_add(1, Ordering::Relaxed)));
        // Of the routing only what may serve this request is held: other versions can go while it runs.
        let (mut served_by, incumbent) = self.choose(&model, &request, &id)?;
        let mut answer = served_by.answer(&request);
        // A candidate on trial that fails costs no request: the incumbent answers.
        if let Err(error) = &answer
            && error.is_versions()
            && let Some(incumbent) = incumbent
        {
            if let InferError::Crashed { message, .. } = error {
                model.crashed(&served_by, message);
            }
            if let Some(stream) = &request.stream {
                // But not from the candidate's state.
                lock(&model.streams).end(&stream.id);
                if !stream.start {
                    let reason = format!("version {} failed", served_by.name);
                    return Err(InferError::StreamRestart { stream: stream.id.clone(), reason });
                }
            }
            served_by = incumbent;
            answer = served_by.answer(&request);
            if let Some(stream) = request.stream.as_ref().filter(|_| answer.is_ok()) {
                let limits = self.stream_limits();
                let (now, version) = (Instant::now(), Arc::clone(&served_by));
                let _ = lock(&model.streams).pin(stream, now, limits, || version, |_| true);
            }
        }
        let (outputs, latency) = answer?;
        let seen = seen(&outputs, served_by.scores());
        // Requests that ask for a version are not chance's choice of an arm: they count for the version, not for the rollout.
        let trial = request.version.is_none();
        let window = served_by.answered(trial, latency, seen.as_ref());
        if let Some(seen) = seen {
            let classes = seen.classes.clone();
            let answered = Answered { id: &id, version: &served_by.name, window, classes };
            lock(&model.predictions).remember(answered);
            // A copy of a stream's request would meet a state that is not its version's.
            if trial && request.stream.is_none() {
                self.compare(&model, &served_by, &request, &id, seen, latency);
            }
        }
        Ok(Answer { id, version: served_by.name.clone(), outputs, latency })
    }

    /// The version of a request; where that is a candidate on trial, the incumbent too.
    fn choose(
        &self,
        model: &Model,
        request: &Request,
        id: &str,
    ) -> Result<(Arc<Version>, Option<Arc<Version>>), InferError> {
        let routing = model.routing.load();
        let version = match (&request.version, &request.stream) {
            (Some(version), _) => {
                Arc::clone(routing.named(version).ok_or_else(|| InferError::UnknownVersion {
                    model: model.name.clone(),
                    version: version.clone(),
                })?)
            }
            (None, None) => Arc::clone(routing.pick(request.key.as_deref().unwrap_or(id))),
            (None, Some(stream)) => {
                let pick = || Arc::clone(routing.pick(request.key.as_deref().unwrap_or(&stream.id)));
                let pinned = lock(&model.streams)
                    .pin(stream, Instant::now(), self.stream_limits(), pick, |version| routing.serves(version));
                pinned.map_err(|refused| match refused {
                    Refused::TooMany(open) => InferError::TooManyStreams { open },
                    Refused::Restart(reason) => {
                        InferError::StreamRestart { stream: stream.id.clone(), reason: reason.to_string() }
                    }
                })?
            }
        };
        let on_trial = request.version.is_none() && !Arc::ptr_eq(&version, &routing.active);
        let incumbent = on_trial.then(|| Arc::clone(&routing.active));
        Ok((version, incumbent))
    }

    /// Lets the other arm answer too, later and elsewhere, if there is time for it.
    fn compare(
        &self,
        model: &Model,
        served_by: &Arc<Version>,
        request: &Request,
        id: &str,
        seen: Seen,
        latency: Duration,
    ) {
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
            id: id.to_string(),
            inputs: request.inputs.clone(),
            other: Arc::clone(other),
            candidate: Arc::clone(&candidate.version),
            seen,
            latency,
            shadow: candidate.shadow,
        });
    }

    /// Runs jobs until the host ends.
    pub(crate) fn work(&self) {
        while let Some((lane, job)) = self.queue.take(self.options.instances()) {
            let expired = job.request.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let cancelled = job.request.cancellation.as_ref().is_some_and(|c| c.is_cancelled());
            let answer = match () {
                () if cancelled => Err(InferError::Cancelled),
                () if expired => Err(InferError::Deadline),
                () => self.infer(&job.model, job.request),
            };
            self.queue.done(&lane);
            // A completion that panics must not take the worker with it.
            if catch_unwind(AssertUnwindSafe(|| (job.completion)(answer))).is_err() {
                tracing::error!(model = job.model, "a completion panicked");
            }
        }
    }
}

/// The gates by which a shadow's pairs are counted; `None` for strategies whose candidates answer callers.
pub(crate) fn shadow_gates(strategy: &Strategy) -> Option<cutover_monitor::Gates> {
    match strategy {
        Strategy::Shadow(shadow) => Some(shadow.gates),
        _ => None,
    }
}
