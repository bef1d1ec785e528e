//! The device as plans are run on it: an arena at a fixed address, and a run that is recorded once and replayed.

use super::{
    api::{self, Argument, Arguments, Context, Graph, Launch, Module, Pinned, Stream},
    cache::{self, Cache},
    write,
};
use crate::{
    CompileError, DeviceInfo, Peak, ResourceError, RunError,
    gpu::{self, Driver, FAULT_BYTES, Limits, Place, Ready, ShapePlan, Source, lock},
};
use cutover_kernels::cuda as written;
use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex},
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
}

/// A compiled kernel.
pub(super) struct Kernel {
    module: Module,
    form: Form,
}

/// How it is launched.
enum Form {
    /// In blocks of so many threads, with each binding's address and words.
    Generated { block: [u32; 3] },
    /// One launch after the other, with the bindings' addresses as one struct.
    Written(Vec<written::Launch>),
}

/// A plan's memory in a session. Its stream is idle before anything of it goes.
pub(super) struct Session {
    /// What the run is from its second time on; `Err` where it can't be recorded.
    graph: Option<Result<Graph, ()>>,
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
    arguments: Vec<Arguments>,
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
        Ok(Cuda { context, limits, cache: cache.map(Cache::new), upload: Mutex::new(upload) })
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
        let plan = &ready.plan;
        let Session { stream, arena, entering, entries, leaving, arguments, .. } = session;
        if steps.start == 0 {
            stream.clear(arena, FAULT_BYTES as u64)?;
            for (range, &at) in plan.inputs.iter().zip(entries.iter()) {
                if let Some(range) = range {
                    stream.upload(arena, range.offset, &entering.bytes()[at..at + range.bytes as usize])?;
                }
            }
        }
        let is_last = steps.end == plan.steps.len();
        for at in steps {
            let (step, kernel) = (&plan.steps[at], &ready.pipelines[plan.steps[at].pipeline]);
            let Kernel { module, form } = &**kernel;
            let arguments = &arguments[at];
            match form {
                Form::Generated { block } => stream.launch(&Launch {
                    module,
                    entry: 0,
                    grid: step.groups,
                    block: *block,
                    shared_bytes: 0,
                    arguments,
                })?,
                Form::Written(launches) => {
                    for (entry, &written::Launch { grid, block, shared_bytes, .. }) in launches.iter().enumerate() {
                        stream.launch(&Launch {
                            module,
                            entry,
                            grid,
                            block: [block, 1, 1],
                            shared_bytes,
                            arguments,
                        })?;
                    }
                }
            }
        }
        if is_last {
            stream.download(leaving, 0, arena, 0, FAULT_BYTES)?;
            for output in &plan.outputs {
                if let Source::Device { place, staged_at, bytes } = output.from
                    && bytes > 0
                {
                    let (memory, offset) = match place {
                        Place::Arena(range) => (&*arena, range.offset),
                        Place::Weight(at) => (&ready.weights[at].buffer, 0),
                    };
                    stream.download(leaving, staged_at as usize, memory, offset, bytes as usize)?;
                }
            }
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
        let arguments = &Arguments::Each(arguments.to_vec());
        let Form::Generated { block } = kernel.form else { return None };
        let launch =
            Launch { module: &kernel.module, entry: 0, grid: [groups, 1, 1], block, shared_bytes: 0, arguments };
        let mut best = f64::INFINITY;
        for round in 0..4 {
            stream.wait().ok()?;
            let start = Instant::now();
            stream.launch(&launch).ok()?;
            stream.wait().ok()?;
            if round > 0 {
                best = best.min(start.elapsed().as_secs_f64());
            }
        }
        Some(best)
    }
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
        Ok(Kernel { module, form: Form::Generated { block } })
    }

    fn functions(&self, source: &str, counts: &[usize]) -> Result<written::Functions, String> {
        write::functions(source, counts)
    }

    fn compile_written(&self, kernel: &written::Kernel) -> Result<Kernel, String> {
        let entries: Vec<(&str, u32)> =
            kernel.launches.iter().map(|launch| (launch.entry.as_str(), launch.shared_bytes)).collect();
        let module = Module::load(&self.context, &self.image(&kernel.source, true)?, &entries)?;
        Ok(Kernel { module, form: Form::Written(kernel.launches.clone()) })
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
        };
        let arguments = plan.steps.iter().map(|step| {
            let bound = step.bindings.iter().map(bound);
            match ready.pipelines[step.pipeline].form {
                Form::Generated { .. } => Arguments::Each(
                    bound
                        .flat_map(|(at, bytes)| [Argument::Address(at), Argument::Number((bytes / 4) as u32)])
                        .collect(),
                ),
                Form::Written(_) => Arguments::Struct(bound.map(|(at, _)| at).collect()),
            }
        });
        Ok(Session {
            graph: None,
            runs: 0,
            is_busy: false,
            stream: Stream::new(&self.context)?,
            arguments: arguments.collect(),
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
            session.graph = Some(self.record(ready, session)?.ok_or(()));
        }
        session.is_busy = true;
        match &session.graph {
            Some(Ok(graph)) => session.stream.replay(graph),
            _ => self.enqueue(ready, session, steps),
        }
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
    /// The whole run, recorded; `None` where that can't be.
    ///
    /// # Errors
    /// A lost device.
    fn record(&self, ready: &Ready<Cuda>, session: &mut Session) -> Result<Option<Graph>, RunError> {
        let recorded = session.stream.begin().and_then(|()| {
            let enqueued = self.enqueue(ready, session, 0..ready.plan.steps.len());
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
