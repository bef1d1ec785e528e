//! One request on one version, and the comparison of both arms' answers.

use crate::{
    error::InferError,
    request::{Request, prediction},
    swap::Version,
};
use cutover_backend::{Input, Output, RunContext, RunError};
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
    pub inputs: Vec<(String, Value)>,
    pub other: Arc<Version>,
    pub candidate: Arc<Version>,
    /// What was answered.
    pub classes: Vec<u32>,
}

impl Comparison {
    /// Lets the other arm answer, counts whether they agree, and gives the time it took.
    pub fn run(&self) -> Duration {
        let start = Instant::now();
        let _in_flight = self.other.in_flight();
        if let Ok((outputs, _)) = self.other.run(&self.inputs, None, None)
            && let Some((classes, _)) = prediction(&outputs, self.other.scores())
        {
            self.candidate.count_agreement(classes.iter().zip(&self.classes).map(|(a, b)| a == b));
        }
        start.elapsed()
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
        let answer = self.run(&request.inputs, request.outputs.as_deref(), request.deadline);
        if let Err(InferError::Failed { .. } | InferError::Deadline) = &answer {
            self.count(request.version.is_none(), |window| window.failed());
        }
        answer
    }

    pub fn run(
        &self,
        given: &[(String, Value)],
        wanted: Option<&[String]>,
        deadline: Option<Instant>,
    ) -> Result<(Vec<(String, Value)>, Duration), InferError> {
        let signature = self.executable.signature();
        let failed = |message: String| InferError::Failed { version: self.name.clone(), message };
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
