//! The device, as a plan is made: what a plan asks it for, and its kernels and weights by number.

use super::device::{Candidate, Device, Driver, Solution, Weight};
use crate::ResourceError;
use cutover_graph::Identity;
use cutover_kernels::cuda::{Argument, Functions, Refused};
use std::sync::Arc;

/// Solutions of a problem that are measured at most.
const MEASURED: usize = 4;

/// The ways to solve a problem, best first: at most as many as are asked for, but at least one.
pub(super) type Solutions<'a> = &'a dyn Fn(Functions, usize) -> Result<Vec<Solution>, Refused>;

/// A problem as the stock is asked for it.
pub(super) struct Problem<'a> {
    pub functions: &'a str,
    /// Elements of the functions' bindings.
    pub counts: Vec<usize>,
    pub solutions: Solutions<'a>,
    /// Bytes of an argument.
    pub bytes: &'a dyn Fn(&Argument) -> usize,
    pub may_measure: bool,
}

pub(super) struct Solved {
    pub pipeline: usize,
    pub solution: Solution,
    pub workspace_bytes: usize,
}

/// Kernels and weights by number, the same for the same.
pub(super) trait Stock {
    fn pipeline(&mut self, source: &str, read_only: &[bool]) -> Result<usize, String>;

    /// Which of several kernels to take.
    fn fastest(&self, candidates: &[Candidate]) -> usize;

    /// What solves a problem, with what its kernels call (see [`Driver::functions`]), and the memory that it needs for itself.
    fn solve(&mut self, problem: &Problem<'_>) -> Result<Solved, String>;

    /// And its length in bytes.
    fn weight(
        &mut self,
        identity: Identity,
        recipe: &'static str,
        bytes: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<(usize, u64), ResourceError>;
}

/// A device, and what a plan has of it.
pub(super) struct Stocked<'a, D: Driver> {
    pub device: &'a Device<D>,
    pub pipelines: Vec<Arc<D::Pipeline>>,
    pub weights: Vec<Arc<Weight<D>>>,
}

impl<D: Driver> Stock for Stocked<'_, D> {
    fn pipeline(&mut self, source: &str, read_only: &[bool]) -> Result<usize, String> {
        let pipeline = self.device.pipeline(source, read_only)?;
        Ok(number(&mut self.pipelines, pipeline))
    }

    fn fastest(&self, candidates: &[Candidate]) -> usize {
        self.device.driver.fastest_kernel(candidates).unwrap_or(0)
    }

    fn solve(&mut self, problem: &Problem<'_>) -> Result<Solved, String> {
        let driver = &self.device.driver;
        let functions = driver.functions(problem.functions, &problem.counts)?;
        let most = if problem.may_measure { MEASURED } else { 1 };
        let mut solutions = (problem.solutions)(functions, most).map_err(|refused| refused.to_string())?;
        if problem.may_measure
            && let Some(fastest) = driver.fastest(&solutions, &problem.bytes)
        {
            solutions.swap(0, fastest);
        }
        let mut error = "nothing solves it".to_string();
        for solution in solutions {
            match self.device.solved(&solution) {
                Ok(pipeline) => {
                    let workspace_bytes = self.device.driver.workspace_bytes(&pipeline);
                    return Ok(Solved { pipeline: number(&mut self.pipelines, pipeline), solution, workspace_bytes });
                }
                Err(message) => error = message,
            }
        }
        Err(error)
    }

    fn weight(
        &mut self,
        identity: Identity,
        recipe: &'static str,
        bytes: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<(usize, u64), ResourceError> {
        let weight = self.device.weight(identity, recipe, bytes)?;
        let bytes = weight.bytes;
        Ok((number(&mut self.weights, weight), bytes))
    }
}

fn number<T>(all: &mut Vec<Arc<T>>, one: Arc<T>) -> usize {
    all.iter().position(|other| Arc::ptr_eq(other, &one)).unwrap_or_else(|| {
        all.push(one);
        all.len() - 1
    })
}
