//! One request on one version, and the comparison of both arms' answers.

use crate::{
    error::InferError,
    request::{Request, seen},
    swap::{NoInstance, Version},
};
use cutover_backend::{Cancellation, Input, Output, RunContext, RunError};
use cutover_monitor::{Gates, Seen};
use cutover_tensor::Value;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

/// Comparisons of both arms that may wait; more are skipped.
pub(crate) const COMPARISONS_MAX: usize = 16;

/// A request that the other arm is to answer too.
pub(crate) struct Comparison {
    pub id: String,
    pub inputs: Vec<(String, Value)>,
    pub other: Arc<Version>,
    pub candidate: Arc<Version>,
    /// What was answered, and how fast.
    pub seen: Seen,
    pub latency: Duration,
    /// Whether callers never see the candidate's answers: what it does with copies is all that can be counted of it.
    pub shadow: Option<Gates>,
}

/// What a comparison came to.
pub(crate) struct Compared {
    pub took: Duration,
    /// The other arm's classes.
    pub classes: Option<Vec<u32>>,
    /// Why the candidate must go at once.
    pub crashed: Option<String>,
}

impl Comparison {
    /// Lets the other arm answer, and counts how the answers compare.
    pub fn run(&self) -> Compared {
        let start = Instant::now();
        let _in_flight = self.other.in_flight();
        let answer = self.other.run(&self.inputs, None, None, None);
        let mut compared = Compared { took: start.elapsed(), classes: None, crashed: None };
        let (outputs, latency) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                if self.shadow.is_some() && error.is_versions() {
                    self.candidate.count_trial(|window| window.failed());
                }
                if let InferError::Crashed { message, .. } = error {
                    compared.crashed = Arc::ptr_eq(&self.other, &self.candidate).then_some(message);
                }
                return compared;
            }
        };
        let other = seen(&outputs, self.other.scores());
        self.candidate.count_trial(|window| {
            if let Some(other) = &other {
                other.classes.iter().zip(&self.seen.classes).for_each(|(a, b)| window.agreement.add(a == b));
            }
            if let Some(gates) = &self.shadow {
                let ms = |latency: Duration| latency.as_secs_f64() * 1e3;
                window.answered(latency, other.as_ref());
                window.pairs.slower.add(ms(latency) > gates.latency_bound_ms(ms(self.latency)));
                if let Some(other) = &other {
                    window.pairs.margin.add(other.margin - self.seen.margin);
                }
            }
        });
        compared.classes = other.map(|other| other.classes);
        compared
    }
}

impl Version {
    /// The output that holds the scores of classes, where there are any: the first.
    pub fn scores(&self) -> &str {
        self.executable.signature().outputs.first().map_or("", |output| output.name.as_str())
    }

    /// Runs the request, and counts it if this version could not answer it in time.
    pub fn answer(&self, request: &Request) -> Result<(Vec<(String, Value)>, Duration), InferError> {
        let _in_flight = self.in_flight();
        if request.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(InferError::Deadline);
        }
        let cancellation = request.cancellation.as_deref();
        let answer = self.run(&request.inputs, request.outputs.as_deref(), request.deadline, cancellation);
        if let Err(error) = &answer
            && (error.is_versions() || matches!(error, InferError::Deadline))
        {
            self.count(request.version.is_none(), |window| window.failed());
        }
        answer
    }

    pub fn run(
        &self,
        given: &[(String, Value)],
        wanted: Option<&[String]>,
        deadline: Option<Instant>,
        cancellation: Option<&Cancellation>,
    ) -> Result<(Vec<(String, Value)>, Duration), InferError> {
        let signature = self.executable.signature();
        let failed = |message: String| InferError::Failed { version: self.name.clone(), message };
        let prepared = match &self.preprocessor {
            Some(preprocessor) if preprocessor.is_raw(given) => {
                Some(preprocessor.prepare(given).map_err(|error| InferError::Input(error.to_string()))?)
            }
            _ => None,
        };
        let given = prepared.as_deref().unwrap_or(given);
        if let Some((unknown, _)) = given.iter().find(|(name, _)| !signature.inputs.iter().any(|b| b.name == *name)) {
            let names: Vec<_> = signature.inputs.iter().map(|b| b.name.as_str()).collect();
            let message = format!("input '{unknown}' is not one of the model's: {}", names.join(", "));
            return Err(InferError::Input(message));
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
            let message = format!("output '{unknown}' is not one of the model's: {}", names.join(", "));
            return Err(InferError::Input(message));
        }
        let is_wanted = |name: &str| wanted.is_none_or(|wanted| wanted.iter().any(|w| w == name));
        let place = |name: &&str| if is_wanted(name) { Output::Allocate(None) } else { Output::Discard };
        let mut outputs: Vec<Output<'_>> = names.iter().map(place).collect();
        let taken = self.instances.take(&self.executable, deadline, cancellation);
        let mut instance = taken.map_err(|none| match none {
            NoInstance::Overloaded { waiting } => InferError::Overloaded { waiting },
            NoInstance::Deadline => InferError::Deadline,
            NoInstance::Cancelled => InferError::Cancelled,
            NoInstance::Resource(error) => failed(error.to_string()),
        })?;
        let context = RunContext { deadline, cancellation, ..RunContext::default() };
        let start = Instant::now();
        let run = catch_unwind(AssertUnwindSafe(|| instance.session.run(&inputs, &mut outputs, &context)));
        let latency = start.elapsed();
        match run {
            // A session whose run panicked is not used again.
            Err(_) => {
                self.instances.lost();
                let message = "panicked".to_string();
                return Err(InferError::Crashed { version: self.name.clone(), message });
            }
            Ok(Err(error @ RunError::DeviceLost(_))) => {
                self.instances.lost();
                return Err(InferError::of_run(error, &self.name));
            }
            Ok(Err(error)) => {
                self.instances.give_back(instance, latency);
                return Err(InferError::of_run(error, &self.name));
            }
            Ok(Ok(())) => self.instances.give_back(instance, latency),
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
