//! What a plan needs of a device, and what everything that is compiled for one shares.

use super::plan::{Ready, ShapePlan};
use crate::{DeviceInfo, Peak, ResourceError, RunError};
use cutover_graph::Identity;
use cutover_kernels::cuda::{Argument, Element, Functions, Kernel, Order};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// Pipelines that are kept though nothing uses them.
const IDLE_PIPELINES: usize = 512;

/// One way to a GPU: how kernels are compiled for it, and memory is had and kernels are run.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// The backend's name, as written on command lines.
    const NAME: &'static str;

    /// A constant on the device.
    type Buffer: Send + Sync;
    /// A compiled kernel.
    type Pipeline: Send + Sync;
    /// What a session holds for one plan: the arena, what results come back through, and whatever is recorded once.
    type Memory: Send;

    fn describe(&self) -> DeviceInfo;

    /// Name and version of what drives the device.
    fn version(&self) -> Option<String> {
        None
    }

    fn limits(&self) -> &Limits;

    fn measure_peak(&self) -> Option<Peak>;

    /// What went wrong since the last time, out of order; a lost device stays lost.
    fn check(&self) -> Result<(), RunError>;

    /// A constant of these bytes, whole words.
    ///
    /// # Errors
    /// The device has no memory for it.
    fn constant(&self, bytes: &[u8]) -> Result<Self::Buffer, ResourceError>;

    /// The kernel of this text, WGSL with the entry `main`. `read_only` says it of every binding of group 0, in order.
    ///
    /// # Errors
    /// What the compiler says.
    fn compile(&self, source: &str, read_only: &[bool]) -> Result<Self::Pipeline, String>;

    /// Functions of `source`, WGSL whose bindings have `counts` elements, in the form that kernels written by hand call them.
    ///
    /// # Errors
    /// A device that has no such kernels; what can't be said so.
    fn functions(&self, _source: &str, _counts: &[usize]) -> Result<Functions, String> {
        Err("no kernels are written for this device".to_string())
    }

    /// A problem's kernels that were written by hand, or a library's.
    ///
    /// # Errors
    /// What the compiler says, or the library; a device that has neither.
    fn solve(&self, _solution: &Solution) -> Result<Self::Pipeline, String> {
        Err("no kernels are written for this device".to_string())
    }

    /// Memory that a launch of what [`Driver::solve`] gave needs for itself, in bytes.
    fn workspace_bytes(&self, _pipeline: &Self::Pipeline) -> usize {
        0
    }

    /// Which of `solutions` is fastest, as measured now or before; `None` where nothing is measured. `bytes` says how much memory an argument
    /// is of.
    fn fastest(&self, _solutions: &[Solution], _bytes: &dyn Fn(&Argument) -> usize) -> Option<usize> {
        None
    }

    /// Which of `candidates`, which give the same, is fastest, as measured now or before; `None` where nothing is measured.
    fn fastest_kernel(&self, _candidates: &[Candidate]) -> Option<usize> {
        None
    }

    /// What a plan takes beside its weights, arena and results.
    fn beside(&self, _plan: &Ready<Self>) -> Beside {
        Beside::default()
    }

    /// A session's memory for `plan`.
    ///
    /// # Errors
    /// The device has less.
    fn memory(&self, plan: &Ready<Self>) -> Result<Self::Memory, ResourceError>;

    /// The run that is submitted next reads `bytes`, whole words, as input number `input` of the plan.
    ///
    /// # Errors
    /// A lost device.
    fn write(&self, plan: &ShapePlan, memory: &mut Self::Memory, input: usize, bytes: &[u8]) -> Result<(), RunError>;

    /// Submits some of a plan's steps; before the first the faults are cleared, after the last the outputs are copied to where
    /// [`Driver::read`] finds them.
    ///
    /// # Errors
    /// A lost device.
    fn submit(&self, plan: &Ready<Self>, memory: &mut Self::Memory, steps: Range<usize>) -> Result<(), RunError>;

    /// Runs steps as [`Driver::submit`] does, waits, and says what that took by the device's own clock; `None`, and nothing done, where it has none.
    ///
    /// # Errors
    /// As [`Driver::wait`].
    fn timed(
        &self,
        _plan: &Ready<Self>,
        _memory: &mut Self::Memory,
        _steps: Range<usize>,
    ) -> Result<Option<Times>, RunError> {
        Ok(None)
    }

    /// Waits until everything that was submitted with `memory` is done.
    ///
    /// # Errors
    /// A lost device, and whatever failed.
    fn wait(&self, memory: &mut Self::Memory) -> Result<(), RunError>;

    /// Waits, and hands out what came back: the faults, then the outputs, as the plan lays them out.
    ///
    /// # Errors
    /// As [`Driver::wait`], and those of `hand_out`.
    fn read(
        &self,
        memory: &mut Self::Memory,
        hand_out: &mut dyn FnMut(&[u8]) -> Result<(), RunError>,
    ) -> Result<(), RunError>;
}

/// What some of a plan's steps took, and the copies before the first and after the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub copies_in: Duration,
    pub kernels: Duration,
    pub copies_out: Duration,
}

/// One way to solve a problem that is not for generated kernels.
#[derive(Clone, Debug)]
pub(crate) enum Solution {
    /// By kernels that were written by hand.
    Written(Kernel),
    Library(LibraryProduct),
}

impl Solution {
    pub fn arguments(&self) -> Vec<Argument> {
        match self {
            Solution::Written(kernel) => kernel.arguments.clone(),
            Solution::Library(product) => product.arguments(),
        }
    }
}

/// A matrix product as libraries take it: `C[z, m, n] = max?(alpha · Σ_k A[z, m, k] · B[z, k, n] + bias?[n], 0)`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LibraryProduct {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Matrices.
    pub count: usize,
    pub a: LibraryFactor,
    pub b: LibraryFactor,
    /// Of A and B.
    pub element: Element,
    /// Of C and the bias.
    pub result: Element,
    pub tf32: bool,
    pub alpha: f32,
    pub has_bias: bool,
    pub relu: bool,
}

/// Where a factor's elements lie: rows or columns `leading` elements apart, matrices `stride`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LibraryFactor {
    pub order: Order,
    pub leading: usize,
    pub stride: usize,
}

impl LibraryProduct {
    /// A, B, C, a workspace, and the bias (input 2) if there is one.
    pub fn arguments(&self) -> Vec<Argument> {
        let all =
            [Argument::Input(0), Argument::Input(1), Argument::Output(0), Argument::Workspace, Argument::Input(2)];
        all[..if self.has_bias { 5 } else { 4 }].to_vec()
    }
}

/// A kernel that might be compiled.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub source: String,
    /// By binding.
    pub read_only: Vec<bool>,
    pub groups: [u32; 3],
    /// By binding.
    pub bytes: Vec<u64>,
}

/// Bytes of copies that kernels read through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Beside {
    pub weight_bytes: u64,
    pub session_bytes: u64,
}

/// What kernels are made for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Limits {
    pub has_f16: bool,
    pub has_i64: bool,
    /// A subgroup is 8 invocations, the lanes of a vector of the processor that imitates the device, and kernels read through textures.
    pub has_lanes: bool,
    /// A processor imitates the device, so that a subgroup is a vector of it.
    pub is_imitated: bool,
    /// What kernels written by hand go by, where there are some for the device.
    pub written: Option<cutover_kernels::cuda::Device>,
    /// Of the largest buffer.
    pub buffer_bytes: u64,
    /// Of the largest range that a kernel reads or writes.
    pub binding_bytes: u64,
    /// Of ranges in a buffer, in bytes.
    pub alignment: usize,
    /// Ranges that one kernel reads and writes.
    pub bindings: usize,
    /// Groups of a dispatch along one dimension.
    pub groups: u32,
    /// Invocations of a group.
    pub invocations: usize,
}

impl Limits {
    /// Bindings that a tensor is bound as at most.
    const PARTS: u64 = 8;

    /// Of the largest tensor that kernels reach: indices are words, and so are places in bytes.
    pub fn tensor_bytes(&self) -> u64 {
        (self.binding_bytes / self.alignment as u64 * self.alignment as u64 * Limits::PARTS)
            .max(self.binding_bytes)
            .min(self.buffer_bytes)
            .min(u64::from(u32::MAX / 2))
    }
}

/// An opened device, shared by everything that is compiled for it.
pub(crate) struct Device<D: Driver> {
    pub driver: D,
    pipelines: Mutex<HashMap<String, Arc<D::Pipeline>>>,
    weights: Mutex<HashMap<(Identity, &'static str), Weak<Weight<D>>>>,
}

/// A constant on the device.
pub(crate) struct Weight<D: Driver> {
    pub buffer: D::Buffer,
    pub bytes: u64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Driver> Device<D> {
    pub fn new(driver: D) -> Device<D> {
        Device { driver, pipelines: Mutex::default(), weights: Mutex::default() }
    }

    /// The constant of this identity as `recipe` holds it, uploaded once while anything uses it. `bytes` makes them.
    pub fn weight(
        &self,
        identity: Identity,
        recipe: &'static str,
        bytes: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<Arc<Weight<D>>, ResourceError> {
        if let Some(weight) = lock(&self.weights).get(&(identity, recipe)).and_then(Weak::upgrade) {
            return Ok(weight);
        }
        let mut bytes = bytes();
        bytes.resize(bytes.len().max(4).next_multiple_of(4), 0);
        let weight = Arc::new(Weight { buffer: self.driver.constant(&bytes)?, bytes: bytes.len() as u64 });
        let mut weights = lock(&self.weights);
        weights.retain(|_, weight| weight.strong_count() > 0);
        weights.insert((identity, recipe), Arc::downgrade(&weight));
        Ok(weight)
    }

    /// The kernel of this text, compiled once; see [`Driver::compile`].
    pub fn pipeline(&self, source: &str, read_only: &[bool]) -> Result<Arc<D::Pipeline>, String> {
        if let Some(pipeline) = lock(&self.pipelines).get(source) {
            return Ok(Arc::clone(pipeline));
        }
        self.keep(source.to_string(), self.driver.compile(source, read_only))
    }

    /// What solves a problem, made once; see [`Driver::solve`].
    pub fn solved(&self, solution: &Solution) -> Result<Arc<D::Pipeline>, String> {
        let key = match solution {
            Solution::Written(kernel) => format!("{:?}\n{}", kernel.launches, kernel.source),
            Solution::Library(product) => format!("{product:?}"),
        };
        if let Some(pipeline) = lock(&self.pipelines).get(&key) {
            return Ok(Arc::clone(pipeline));
        }
        self.keep(key, self.driver.solve(solution))
    }

    fn keep(&self, key: String, compiled: Result<D::Pipeline, String>) -> Result<Arc<D::Pipeline>, String> {
        let pipeline = Arc::new(compiled.inspect_err(|error| tracing::debug!("{error}\n{key}"))?);
        let mut pipelines = lock(&self.pipelines);
        if pipelines.len() >= IDLE_PIPELINES {
            pipelines.retain(|_, pipeline| Arc::strong_count(pipeline) > 1);
        }
        pipelines.insert(key, Arc::clone(&pipeline));
        Ok(pipeline)
    }
}
