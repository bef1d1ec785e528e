//! The device as plans are run on it: an arena at a fixed address, and a run that is recorded once and replayed.

use super::{
    api::{self, Argument, Arguments, Context, Graph, Launch, Module, Pinned, Stream},
    cache::{self, Cache},
    library, write,
};
use crate::{
    CompileError, DeviceInfo, Peak, ResourceError, RunError,
    gpu::{self, Driver, FAULT_BYTES, Limits, Place, Ready, ShapePlan, Solution, Source, lock},
};
use cutover_kernels::cuda as written;
use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::Instant,
};

/// What constants go through to the device, at a time.
const UPLOAD_BYTES: usize = 16 << 20;

/// An opened device.
pub(super) struct Cuda {
    context: Arc<Context>,
    limits: Limits,
    cache: Option<Cache>,
    /// Of constants, one after the other.
    upload: Mutex<(Stream, Pinned)>,
    /// cuBLASLt, looked for when a product is large enough for it.
    library: OnceLock<Result<Arc<library::Library>, String>>,
}

/// A compiled kernel.
pub(super) struct Kernel {
    /// None where a library has its own.
    module: Option<Module>,
    form: Form,
    workspace_bytes: usize,
}

/// How it is launched.
enum Form {
    /// By a library.
    Library(library::Prepared),
    /// In blocks of so many threads, with each binding's address and words.
    Generated { block: [u32; 3] },
    /// One launch after the other, with the bindings' addresses as one struct.
    Written(Vec<written::Launch>),
}

/// A plan's memory in a session. Its stream is idle before anything of it goes.
pub(super) struct Session {
    /// What the run is from its second time on; `Err` where it can't be recorded.
    graph: Option<Result<Graph, ()>>,
    /// What runs are timed by.
    clock: Option<Clock>,
    runs: u64,
    /// Something may be on its way.
    is_busy: bool,
    stream: Stream,
    arena: api::Memory,
    /// Inputs as they go in, one behind the other, and where each begins.
    entering: Pinned,
    entries: Vec<usize>,
    /// The faults and outputs as they come back.
    leaving: Pinned,
    /// By step.
    arguments: Vec<Bound>,
}

/// When copies in begin, kernels, copies out, and when these end; and the kernels alone, recorded as in a run that nobody times.
struct Clock {
    events: [api::Event; 4],
    kernels: Option<Graph>,
}

/// What a step is called with.
enum Bound {
    Kernel(Arguments),
    Library(library::Call),
}

impl Cuda {
    /// The first device whose name has `named` in it, in any case; the first of all without it.
    ///
    /// # Errors
    /// What is missing, in words; no such device.
    pub fn open(named: Option<&str>, cache: Option<PathBuf>) -> Result<Cuda, CompileError> {
        let all = api::devices()?;
        let is_named = |name: &str| named.is_none_or(|part| name.to_lowercase().contains(&part.to_lowercase()));
        let Some(ordinal) = all.iter().position(|facts| is_named(&facts.name)) else {
            let names: Vec<&str> = all.iter().map(|facts| facts.name.as_str()).collect();
            let message = format!("no GPU '{}': there is {}", named.unwrap_or_default(), names.join(", "));
            return Err(CompileError::Options(message));
        };
        Cuda::of(ordinal, all[ordinal].clone(), cache)
    }

    /// # Errors
    /// A device that gives no context, stream or memory.
    pub fn of(ordinal: usize, facts: api::Facts, cache: Option<PathBuf>) -> Result<Cuda, CompileError> {
        let limits = Limits {
            has_f16: true,
            has_i64: true,
            has_lanes: false,
            is_imitated: false,
            written: Some(written::Device {
                sm: facts.capability as u32,
                multiprocessors: facts.multiprocessors.max(1) as u32,
                shared_bytes: facts.most_shared_bytes.max(0) as u32,
            }),
            buffer_bytes: facts.memory_bytes,
            // Kernels count in words of 32 bits.
            binding_bytes: facts.memory_bytes.min(u64::from(u32::MAX)) & !3,
            alignment: 256,
            bindings: 32,
            groups: 65535,
            invocations: facts.invocations.max(1) as usize,
        };
        let context = Context::open(ordinal, facts)?;
        let upload = (Stream::new(&context)?, Pinned::new(&context, "memory for uploads", UPLOAD_BYTES)?);
        Ok(Cuda { context, limits, cache: cache.map(Cache::new), upload: Mutex::new(upload), library: OnceLock::new() })
    }

    fn image(&self, source: &str, contracts: bool) -> Result<Vec<u8>, String> {
        let facts = &self.context.facts;
        let Some(cache) = &self.cache else { return api::compile(source, facts.capability, contracts) };
        let key = cache::key(source, facts.capability, facts.driver, facts.compiler, contracts);
        if let Some(image) = cache.get(&key) {
            return Ok(image);
        }
        let image = api::compile(source, facts.capability, contracts)?;
        cache.put(&key, &image);
        Ok(image)
    }

    /// Some of a plan's steps, and what goes before the first and after the last, in the session's stream.
    fn enqueue(&self, ready: &Ready<Cuda>, session: &mut Session, steps: Range<usize>) -> Result<(), RunError> {
        if steps.start == 0 {
            enter(&ready.plan, session)?;
        }
        launch_all(ready, session, steps.clone())?;
        if steps.end == ready.plan.steps.len() {
            leave(ready, session)?;
        }
        Ok(())
    }

    /// Seconds of one run of a kernel over `bytes`, after one that nobody counts; the best of three.
    fn timed(&self, source: &str, bytes: u64, groups: u32) -> Option<f64> {
        let kernel = self.compile(source, &[false]).ok()?;
        let memory = api::Memory::new(&self.context, "a measurement", bytes).ok()?;
        let stream = Stream::new(&self.context).ok()?;
        stream.clear(&memory, bytes).ok()?;
        let arguments = [Argument::Address(memory.address), Argument::Number((bytes / 4) as u32)];
        let arguments = &Bound::Kernel(Arguments::Each(arguments.to_vec()));
        seconds(&stream, 1, || launch(&stream, &kernel, [groups, 1, 1], arguments))
    }

    fn library(&self) -> Result<&Arc<library::Library>, String> {
        let opened = self.library.get_or_init(|| {
            let opened = library::Library::open(&self.context);
            opened.inspect_err(|reason| tracing::info!("large products are our own kernels': {reason}"))
        });
        opened.as_ref().map_err(Clone::clone)
    }

    /// Seconds of one launch of what solves a problem, on memory of its own.
    fn measured(&self, solution: &Solution, bytes: &dyn Fn(&written::Argument) -> usize) -> Option<f64> {
        let kernel = self.solve(solution).ok()?;
        let stream = Stream::new(&self.context).ok()?;
        let mut memories = Vec::new();
        for argument in solution.arguments() {
            let bytes = match argument {
                written::Argument::Workspace => kernel.workspace_bytes,
                argument => bytes(&argument),
            };
            let memory = api::Memory::new(&self.context, "a measurement", bytes.max(4) as u64).ok()?;
            stream.clear(&memory, memory.bytes).ok()?;
            memories.push(memory);
        }
        let arguments = bind(&kernel, memories.iter().map(|memory| (memory.address, memory.bytes))).ok()?;
        let taken = seconds(&stream, MEASURED_LAUNCHES, || launch(&stream, &kernel, [1; 3], &arguments));
        // Whatever happened: what is on its way uses what goes now.
        let _ = stream.wait();
        taken
    }
}

/// Launches that are timed together, so that what a wait takes does not count.
const MEASURED_LAUNCHES: u32 = 10;

/// Seconds of one of `count` runs of what `enqueue` asks for, the best of three such rounds after one that nobody counts.
fn seconds(stream: &Stream, count: u32, enqueue: impl Fn() -> Result<(), RunError>) -> Option<f64> {
    let mut best = f64::INFINITY;
    for round in 0..4 {
        stream.wait().ok()?;
        let start = Instant::now();
        for _ in 0..if round > 0 { count } else { 1 } {
            enqueue().ok()?;
        }
        stream.wait().ok()?;
        if round > 0 {
            best = best.min(start.elapsed().as_secs_f64() / f64::from(count));
        }
    }
    Some(best)
}

/// What a run begins with: no fault, and the inputs.
fn enter(plan: &ShapePlan, session: &mut Session) -> Result<(), RunError> {
    let Session { stream, arena, entering, entries, .. } = session;
    stream.clear(arena, FAULT_BYTES as u64)?;
    for (range, &at) in plan.inputs.iter().zip(entries.iter()) {
        if let Some(range) = range {
            stream.upload(arena, range.offset, &entering.bytes()[at..at + range.bytes as usize])?;
        }
    }
    Ok(())
}

fn launch_all(ready: &Ready<Cuda>, session: &mut Session, steps: Range<usize>) -> Result<(), RunError> {
    for at in steps {
        let step = &ready.plan.steps[at];
        launch(&session.stream, &ready.pipelines[step.pipeline], step.groups, &session.arguments[at])?;
    }
    Ok(())
}

/// What it ends with: the faults and the outputs come back.
fn leave(ready: &Ready<Cuda>, session: &mut Session) -> Result<(), RunError> {
    let Session { stream, arena, leaving, .. } = session;
    stream.download(leaving, 0, arena, 0, FAULT_BYTES)?;
    for output in &ready.plan.outputs {
        if let Source::Device { place, staged_at, bytes } = output.from
            && bytes > 0
        {
            let (memory, offset) = match place {
                Place::Arena(range) => (&*arena, range.offset),
                Place::Weight(at) => (&ready.weights[at].buffer, 0),
                Place::PartOfWeight(at, range) => (&ready.weights[at].buffer, range.offset),
            };
            stream.download(leaving, staged_at as usize, memory, offset, bytes as usize)?;
        }
    }
    Ok(())
}

/// Asks for a kernel, or for all that a problem's solution launches, in the stream's order.
fn launch(stream: &Stream, kernel: &Kernel, groups: [u32; 3], bound: &Bound) -> Result<(), RunError> {
    let (module, arguments) = match (bound, &kernel.module) {
        (Bound::Library(call), _) => return call.enqueue(stream),
        (Bound::Kernel(arguments), Some(module)) => (module, arguments),
        (Bound::Kernel(_), None) => unreachable!("kernels have a module"),
    };
    match &kernel.form {
        &Form::Generated { block } => {
            stream.launch(&Launch { module, entry: 0, grid: groups, block, shared_bytes: 0, arguments })
        }
        Form::Written(launches) => launches.iter().enumerate().try_for_each(|(entry, of)| {
            let &written::Launch { grid, block, shared_bytes, .. } = of;
            stream.launch(&Launch { module, entry, grid, block: [block, 1, 1], shared_bytes, arguments })
        }),
        Form::Library(_) => unreachable!("a library is called"),
    }
}

/// `kernel`'s arguments: addresses and bytes of what it is bound to.
fn bind(kernel: &Kernel, bound: impl Iterator<Item = (u64, u64)>) -> Result<Bound, ResourceError> {
    Ok(match &kernel.form {
        Form::Generated { .. } => Bound::Kernel(Arguments::Each(
            bound.flat_map(|(at, bytes)| [Argument::Address(at), Argument::Number((bytes / 4) as u32)]).collect(),
        )),
        Form::Written(_) => Bound::Kernel(Arguments::Struct(bound.map(|(at, _)| at).collect())),
        Form::Library(prepared) => Bound::Library(prepared.bind(&bound.map(|(at, _)| at).collect::<Vec<_>>())?),
    })
}

impl Driver for Cuda {
    const NAME: &'static str = "cuda";
    type Buffer = api::Memory;
    type Pipeline = Kernel;
    type Memory = Session;

    fn describe(&self) -> DeviceInfo {
        let facts = &self.context.facts;
        let isa = format!("sm_{}", facts.capability);
        DeviceInfo { backend: Cuda::NAME, device: facts.name.clone(), isa, threads: 1 }
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn measure_peak(&self) -> Option<Peak> {
        gpu::peak(&self.limits, |source, bytes, groups| self.timed(source, bytes, groups))
    }

    fn check(&self) -> Result<(), RunError> {
        self.context.check()
    }

    fn constant(&self, bytes: &[u8]) -> Result<api::Memory, ResourceError> {
        let memory = api::Memory::new(&self.context, "a weight", bytes.len() as u64)?;
        let mut upload = lock(&self.upload);
        let (stream, pinned) = &mut *upload;
        let mut offset = 0;
        for chunk in bytes.chunks(UPLOAD_BYTES) {
            let staged = &mut pinned.bytes_mut()[..chunk.len()];
            staged.copy_from_slice(chunk);
            stream
                .upload(&memory, offset, staged)
                .and_then(|()| stream.wait())
                .map_err(|error| ResourceError::System { what: "a weight", message: error.to_string() })?;
            offset += chunk.len() as u64;
        }
        Ok(memory)
    }

    fn compile(&self, source: &str, _read_only: &[bool]) -> Result<Kernel, String> {
        let write::Translated { source, block } = write::translate(source)?;
        let module = Module::load(&self.context, &self.image(&source, false)?, &[(write::ENTRY, 0)])?;
        Ok(Kernel { module: Some(module), form: Form::Generated { block }, workspace_bytes: 0 })
    }

    fn functions(&self, source: &str, counts: &[usize]) -> Result<written::Functions, String> {
        write::functions(source, counts)
    }

    fn solve(&self, solution: &Solution) -> Result<Kernel, String> {
        match solution {
            Solution::Written(kernel) => {
                let entries: Vec<(&str, u32)> =
                    kernel.launches.iter().map(|launch| (launch.entry.as_str(), launch.shared_bytes)).collect();
                let module = Module::load(&self.context, &self.image(&kernel.source, true)?, &entries)?;
                let form = Form::Written(kernel.launches.clone());
                Ok(Kernel { module: Some(module), form, workspace_bytes: kernel.workspace_bytes })
            }
            Solution::Library(product) => {
                let prepared = self.library()?.prepare(product)?;
                let workspace_bytes = prepared.workspace_bytes;
                Ok(Kernel { module: None, form: Form::Library(prepared), workspace_bytes })
            }
        }
    }

    fn workspace_bytes(&self, kernel: &Kernel) -> usize {
        kernel.workspace_bytes
    }

    /// Where nothing can be kept nothing is measured, so that the same is chosen every time.
    fn fastest(&self, solutions: &[Solution], bytes: &dyn Fn(&written::Argument) -> usize) -> Option<usize> {
        let cache = self.cache.as_ref().filter(|cache| solutions.len() > 1 && cache.can_keep())?;
        let facts = &self.context.facts;
        let all = format!("the fastest on {} of {solutions:?}", facts.name);
        let key = cache::key(&all, facts.capability, facts.driver, facts.compiler, true);
        let kept = cache.get(&key).and_then(|kept| String::from_utf8(kept).ok()?.parse().ok());
        if let Some(kept) = kept.filter(|&kept: &usize| kept < solutions.len()) {
            return Some(kept);
        }
        let taken = solutions.iter().map(|solution| self.measured(solution, bytes).unwrap_or(f64::INFINITY));
        let taken: Vec<f64> = taken.collect();
        let fastest = (0..taken.len()).min_by(|&a, &b| taken[a].total_cmp(&taken[b]))?;
        tracing::debug!("of {} solutions, number {fastest} is fastest: {taken:?} seconds", solutions.len());
        if taken[fastest].is_finite() {
            cache.put(&key, fastest.to_string().as_bytes());
        }
        Some(fastest)
    }

    fn memory(&self, ready: &Ready<Cuda>) -> Result<Session, ResourceError> {
        let plan = &ready.plan;
        let arena = api::Memory::new(&self.context, "a session's arena", plan.arena_bytes)?;
        let mut entering = 0;
        let entries = plan.inputs.iter().map(|range| {
            let at = entering;
            entering += range.as_ref().map_or(0, |range| (range.bytes as usize).next_multiple_of(64));
            at
        });
        let entries: Vec<usize> = entries.collect();
        let bound = |place: &Place| match *place {
            Place::Arena(range) => (arena.address + range.offset, range.bytes),
            Place::Weight(at) => (ready.weights[at].buffer.address, ready.weights[at].bytes),
            Place::PartOfWeight(at, range) => (ready.weights[at].buffer.address + range.offset, range.bytes),
        };
        let arguments =
            plan.steps.iter().map(|step| bind(&ready.pipelines[step.pipeline], step.bindings.iter().map(bound)));
        let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        Ok(Session {
            graph: None,
            clock: None,
            runs: 0,
            is_busy: false,
            stream: Stream::new(&self.context)?,
            arguments,
            arena,
            entering: Pinned::new(&self.context, "a session's inputs", entering)?,
            entries,
            leaving: Pinned::new(&self.context, "a session's results", plan.staging_bytes as usize)?,
        })
    }

    fn write(&self, _plan: &ShapePlan, session: &mut Session, input: usize, bytes: &[u8]) -> Result<(), RunError> {
        self.wait(session)?;
        let at = session.entries[input];
        session.entering.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn submit(&self, ready: &Ready<Cuda>, session: &mut Session, steps: Range<usize>) -> Result<(), RunError> {
        let is_whole = steps == (0..ready.plan.steps.len());
        if !is_whole {
            session.is_busy = true;
            return self.enqueue(ready, session, steps);
        }
        self.wait(session)?;
        session.runs += 1;
        // The first run loads whatever the driver has put off, which no recording may.
        if session.runs > 1 && session.graph.is_none() {
            let all = 0..ready.plan.steps.len();
            let graph = self.record(session, |session| self.enqueue(ready, session, all))?;
            session.graph = Some(graph.ok_or(()));
        }
        session.is_busy = true;
        match &session.graph {
            Some(Ok(graph)) => session.stream.replay(graph),
            _ => self.enqueue(ready, session, steps),
        }
    }

    fn timed(
        &self,
        ready: &Ready<Cuda>,
        session: &mut Session,
        steps: Range<usize>,
    ) -> Result<Option<gpu::Times>, RunError> {
        self.wait(session)?;
        let (is_first, is_last) = (steps.start == 0, steps.end == ready.plan.steps.len());
        if session.clock.is_none() {
            let new = || api::Event::new(&self.context);
            let (Some(a), Some(b), Some(c), Some(d)) = (new()?, new()?, new()?, new()?) else { return Ok(None) };
            session.clock = Some(Clock { events: [a, b, c, d], kernels: None });
        }
        let mut clock = session.clock.take();
        let Some(Clock { events: [begin, entered, computed, end], kernels }) = &mut clock else { return Ok(None) };
        // As in submit: from the second whole run on.
        if is_first && is_last {
            if session.runs > 0 && kernels.is_none() && !steps.is_empty() {
                *kernels = self.record(session, |session| launch_all(ready, session, steps.clone()))?;
            }
            session.runs += 1;
        }
        session.is_busy = true;
        session.stream.mark(begin)?;
        if is_first {
            enter(&ready.plan, session)?;
        }
        session.stream.mark(entered)?;
        match kernels {
            Some(graph) if is_first && is_last => session.stream.replay(graph)?,
            _ => launch_all(ready, session, steps)?,
        }
        session.stream.mark(computed)?;
        if is_last {
            leave(ready, session)?;
        }
        session.stream.mark(end)?;
        self.wait(session)?;
        let (copies_in, kernels, copies_out) = (entered.since(begin)?, computed.since(entered)?, end.since(computed)?);
        session.clock = clock;
        Ok(Some(gpu::Times { copies_in, kernels, copies_out }))
    }

    fn wait(&self, session: &mut Session) -> Result<(), RunError> {
        if session.is_busy {
            session.stream.wait()?;
            session.is_busy = false;
        }
        Ok(())
    }

    fn read(
        &self,
        session: &mut Session,
        hand_out: &mut dyn FnMut(&[u8]) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        self.wait(session)?;
        hand_out(session.leaving.bytes())
    }
}

impl Cuda {
    /// What `enqueue` asks for, recorded; `None` where that can't be.
    ///
    /// # Errors
    /// A lost device.
    fn record(
        &self,
        session: &mut Session,
        enqueue: impl FnOnce(&mut Session) -> Result<(), RunError>,
    ) -> Result<Option<Graph>, RunError> {
        let recorded = session.stream.begin().and_then(|()| {
            let enqueued = enqueue(session);
            // Ended whatever happened.
            let graph = session.stream.end();
            enqueued.and(graph)
        });
        match recorded {
            Ok(graph) => Ok(Some(graph)),
            Err(error @ RunError::DeviceLost(_)) => Err(error),
            Err(error) => {
                tracing::debug!("a run is not recorded: {error}");
                Ok(None)
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // What is on its way reads and writes what goes now.
        if self.is_busy {
            let _ = self.stream.wait();
        }
    }
}
