//! CUDA's driver and NVRTC, held by values that give back what they hold.
//!
//! Nothing is linked: both libraries are looked for when a device is opened, and what is missing is a sentence. Every call binds the
//! device's context to its thread first. There is no unified memory, and no event but for what is timed: what is freed is idle, since a session
//! waits before it goes.
#![allow(unsafe_code)] // a foreign interface

use crate::{CompileError, ResourceError, RunError, gpu::lock};
use cudarc::{
    driver::{
        result::{self, DriverError},
        sys::{self, CUdevice_attribute as Attribute, CUresult},
    },
    nvrtc,
};
use std::{
    ffi::{CStr, CString, c_int, c_void},
    ptr,
    sync::{Arc, Mutex},
    time::Duration,
};

/// The oldest CUDA whose driver we run on, as the driver tells it: 1000 · major + 10 · minor.
const OLDEST_DRIVER: i32 = 12000;

/// The oldest that tells how much time passed between two events by the name that the bindings know.
const OLDEST_CLOCK: i32 = 12080;

/// The oldest compute capability that kernels are compiled for, as `major · 10 + minor`.
const OLDEST_DEVICE: i32 = 75;

/// Dynamic shared memory that a kernel may have without asking.
const FREE_SHARED_BYTES: u32 = 48 << 10;

/// What is known of a device without running anything.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Facts {
    pub name: String,
    /// `major · 10 + minor`.
    pub capability: i32,
    pub memory_bytes: u64,
    pub multiprocessors: i32,
    pub clock_khz: i32,
    pub invocations: i32,
    pub shared_bytes: i32,
    /// And where its kernel asks for it.
    pub most_shared_bytes: i32,
    /// Of the driver and of NVRTC, as 1000 · major + 10 · minor.
    pub driver: i32,
    pub compiler: i32,
}

fn options(message: impl Into<String>) -> CompileError {
    CompileError::Options(message.into())
}

/// The devices there are, in the driver's order.
///
/// # Errors
/// What is missing: a library, a driver that is new enough, a device.
pub(super) fn devices() -> Result<Vec<Facts>, CompileError> {
    // SAFETY: loading NVIDIA's libraries runs their initialisers, which is what whoever asks for CUDA asks for.
    let [has_driver, has_compiler] = unsafe { [sys::is_culib_present(), nvrtc::sys::is_culib_present()] };
    if !has_driver {
        return Err(options("no CUDA: there is no libcuda, which comes with NVIDIA's driver"));
    }
    let mut driver: c_int = 0;
    // SAFETY: may be called before anything else; writes one number.
    let told = unsafe { sys::cuDriverGetVersion(&mut driver) };
    if told != CUresult::CUDA_SUCCESS || driver < OLDEST_DRIVER {
        return Err(options(format!(
            "no CUDA: the driver is for CUDA {}, {} is the oldest that will do",
            version(driver),
            version(OLDEST_DRIVER)
        )));
    }
    if !has_compiler {
        return Err(options(
            "no CUDA: there is no libnvrtc, which compiles kernels; it comes with the CUDA toolkit, or as nvidia-cuda-nvrtc",
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let told = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    let compiler = 1000 * major + 10 * minor;
    if told != nvrtc::sys::nvrtcResult::NVRTC_SUCCESS || compiler < OLDEST_DRIVER {
        return Err(options(format!(
            "no CUDA: NVRTC is of CUDA {}, {} is the oldest that will do",
            version(compiler),
            version(OLDEST_DRIVER)
        )));
    }
    if compiler / 1000 > driver / 1000 {
        let (compiler, driver) = (version(compiler), version(driver));
        return Err(options(format!(
            "no CUDA: NVRTC is of CUDA {compiler}, and the driver is for {driver}, which does not load what it makes"
        )));
    }
    let failed = |error: DriverError| options(format!("no CUDA: {}", describe(error)));
    result::init().map_err(failed)?;
    let count = result::device::get_count().map_err(failed)?;
    let all = (0..count).map(|ordinal| facts(ordinal, driver, compiler)).collect::<Result<Vec<_>, _>>();
    match all.map_err(failed)? {
        none if none.is_empty() => Err(options("no CUDA: the driver sees no device")),
        all => Ok(all),
    }
}

fn facts(ordinal: c_int, driver: i32, compiler: i32) -> Result<Facts, DriverError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: of a device that the driver has just given.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok(Facts {
        name: result::device::get_name(device)?,
        capability: major * 10 + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        // SAFETY: of a device that the driver has just given.
        memory_bytes: unsafe { result::device::total_mem(device)? } as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        invocations: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK)?,
        most_shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver,
        compiler,
    })
}

/// `13.0` of 13000.
pub(super) fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

fn describe(error: DriverError) -> String {
    let text = |text: Result<&CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned()).ok();
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(message)) => format!("{message} ({name}, {})", error.0 as u32),
        _ => format!("error {}", error.0 as u32),
    }
}

/// Whether nothing can be done with the context any more.
fn is_lost(error: CUresult) -> bool {
    matches!(
        error,
        CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_NO_DEVICE
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// A device's primary context, which others in the process may share.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub facts: Facts,
    /// Why the device is lost, once it is.
    lost: Mutex<Option<String>>,
}

// SAFETY: a context may be current on any number of threads at once, and the driver locks what it must.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The device number `ordinal` of [`devices`].
    ///
    /// # Errors
    /// A device that is too old, or that the driver gives no context on.
    pub fn open(ordinal: usize, facts: Facts) -> Result<Arc<Context>, CompileError> {
        if facts.capability < OLDEST_DEVICE {
            let capability = f64::from(facts.capability) / 10.0;
            return Err(options(format!(
                "GPU '{}' has compute capability {capability:.1}; kernels need 7.5",
                facts.name
            )));
        }
        let failed = |error: DriverError| options(format!("GPU '{}': {}", facts.name, describe(error)));
        let device = result::device::get(ordinal as c_int).map_err(failed)?;
        // SAFETY: of a device that the driver has just given; released when the value goes.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed)?;
        let context = Context { device, context, facts: facts.clone(), lost: Mutex::default() };
        context.bind().map_err(failed)?;
        Ok(Arc::new(context))
    }

    /// Makes this thread's calls its own.
    pub fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained for as long as this value is.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// Does `call` on this context; a device that it finds lost is remembered.
    fn call<T>(&self, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DriverError> {
        let result = self.bind().and_then(|()| call());
        if let Err(error) = &result
            && is_lost(error.0)
        {
            lock(&self.lost).get_or_insert_with(|| describe(DriverError(error.0)));
        }
        result
    }

    /// As [`Context::call`], with the error of a run.
    fn run<T>(&self, call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, RunError> {
        self.call(call).map_err(|error| match is_lost(error.0) {
            true => RunError::DeviceLost(describe(error)),
            false => RunError::Resource(resource("the GPU", error)),
        })
    }

    /// # Errors
    /// A device that was found lost.
    pub fn check(&self) -> Result<(), RunError> {
        match &*lock(&self.lost) {
            Some(message) => Err(RunError::DeviceLost(message.clone())),
            None => Ok(()),
        }
    }

    /// Gives back, where an error changes nothing any more.
    fn release(&self, call: impl FnOnce() -> Result<(), DriverError>) {
        if let Err(error) = self.call(call) {
            tracing::debug!("giving back on '{}': {}", self.facts.name, describe(error));
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, and released once. Whatever was made on it holds it.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

fn resource(what: &'static str, error: DriverError) -> ResourceError {
    ResourceError::System { what, message: describe(error) }
}

/// A range of device memory.
pub(super) struct Memory {
    context: Arc<Context>,
    pub address: u64,
    pub bytes: u64,
}

impl Memory {
    /// # Errors
    /// The device has less.
    pub fn new(context: &Arc<Context>, what: &'static str, bytes: u64) -> Result<Memory, ResourceError> {
        // SAFETY: what was not written is read by no kernel, and would be but numbers.
        let address = context.call(|| unsafe { result::malloc_sync(bytes.max(1) as usize) });
        let address = address.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let available = context.call(result::mem_get_info).map_or(0, |(free, _)| free as u64);
                ResourceError::Memory { what, needed: bytes, available }
            }
            _ => resource(what, error),
        })?;
        Ok(Memory { context: Arc::clone(context), address, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated once and freed once; `cuMemFree` waits for kernels that may use it.
        self.context.release(|| unsafe { result::free_sync(self.address) });
    }
}

/// Memory of the host that a device copies from and to by itself.
pub(super) struct Pinned {
    context: Arc<Context>,
    bytes: *mut u8,
    length: usize,
}

// SAFETY: it is memory like any other, owned by the value.
unsafe impl Send for Pinned {}

impl Pinned {
    /// # Errors
    /// The system pins no more.
    pub fn new(context: &Arc<Context>, what: &'static str, length: usize) -> Result<Pinned, ResourceError> {
        // SAFETY: without flags: cached, so that the processor reads it fast.
        let bytes = context.call(|| unsafe { result::malloc_host(length.max(1), 0) });
        let bytes = bytes.map_err(|error| resource(what, error))?.cast::<u8>();
        // SAFETY: of that length, and just allocated.
        unsafe { ptr::write_bytes(bytes, 0, length) };
        Ok(Pinned { context: Arc::clone(context), bytes, length })
    }

    /// Nothing on the device may be writing it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: written in full when it was made; who asks has waited for the stream.
        unsafe { std::slice::from_raw_parts(self.bytes, self.length) }
    }

    /// Nothing on the device may be reading it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.bytes, self.length) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: allocated once and freed once.
        self.context.release(|| unsafe { result::free_host(self.bytes.cast()) });
    }
}

/// A kernel on the device.
pub(super) struct Module {
    context: Arc<Context>,
    module: sys::CUmodule,
    functions: Vec<sys::CUfunction>,
}

// SAFETY: handles that the driver takes from any thread.
unsafe impl Send for Module {}
// SAFETY: as above; nothing here changes it.
unsafe impl Sync for Module {}

impl Module {
    /// The kernels `entries` of `image`, a cubin or PTX, each with the most dynamic shared memory that it is launched with.
    ///
    /// # Errors
    /// An image that this driver does not load, or without one of the kernels; more shared memory than there is.
    pub fn load(context: &Arc<Context>, image: &[u8], entries: &[(&str, u32)]) -> Result<Module, String> {
        // PTX ends with a zero.
        let image: Vec<u8> = image.iter().copied().chain([0]).collect();
        // SAFETY: the image is read before the call returns, and its length stands in it.
        let module = context.call(|| unsafe { result::module::load_data(image.as_ptr().cast()) });
        let mut loaded =
            Module { context: Arc::clone(context), module: module.map_err(describe)?, functions: Vec::new() };
        for &(entry, shared_bytes) in entries {
            let entry = CString::new(entry).map_err(|error| error.to_string())?;
            // SAFETY: of a module that is loaded.
            let function = context.call(|| unsafe { result::module::get_function(loaded.module, entry) });
            let function = function.map_err(describe)?;
            if shared_bytes > FREE_SHARED_BYTES {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: of a function that the driver has just given.
                let set =
                    || unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) };
                context.call(set).map_err(describe)?;
            }
            loaded.functions.push(function);
        }
        Ok(loaded)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once and unloaded once.
        self.context.release(|| unsafe { result::module::unload(self.module) });
    }
}

/// One launch of a kernel, whose arguments lie in memory already.
pub(super) struct Launch<'a> {
    pub module: &'a Module,
    /// Which of the module's kernels.
    pub entry: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub arguments: &'a Arguments,
}

/// What a kernel is called with.
#[derive(Debug, PartialEq)]
pub(super) enum Arguments {
    /// One after the other.
    Each(Vec<Argument>),
    /// Addresses, as the members of one struct.
    Struct(Vec<u64>),
}

/// An argument of a kernel: an address, or a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Argument {
    Address(u64),
    Number(u32),
}

/// Work in order, apart from that of other streams.
pub(super) struct Stream {
    context: Arc<Context>,
    stream: sys::CUstream,
}

// SAFETY: a handle that the driver takes from any thread; who has the stream uses it alone.
unsafe impl Send for Stream {}

impl Stream {
    /// # Errors
    /// The device gives no more.
    pub fn new(context: &Arc<Context>) -> Result<Stream, ResourceError> {
        let stream = context.call(|| result::stream::create(result::stream::StreamKind::NonBlocking));
        let stream = stream.map_err(|error| resource("a stream of the GPU", error))?;
        Ok(Stream { context: Arc::clone(context), stream })
    }

    /// As libraries take it.
    pub fn raw(&self) -> sys::CUstream {
        self.stream
    }

    /// Copies `from` to `to`, in time. Both must be there until the stream is waited for, or a graph that was recorded is gone.
    pub fn upload(&self, to: &Memory, offset: u64, from: &[u8]) -> Result<(), RunError> {
        assert!(offset + from.len() as u64 <= to.bytes, "beyond the memory copied to");
        // SAFETY: within the memory; the caller keeps both.
        self.context.run(|| unsafe { result::memcpy_htod_async(to.address + offset, from, self.stream) })
    }

    /// As [`Stream::upload`], the other way: `at` of `to` gets `bytes` from `from`.
    pub fn download(
        &self,
        to: &mut Pinned,
        at: usize,
        from: &Memory,
        offset: u64,
        bytes: usize,
    ) -> Result<(), RunError> {
        assert!(offset + bytes as u64 <= from.bytes, "beyond the memory copied from");
        let to = &mut to.bytes_mut()[at..at + bytes];
        // SAFETY: within the memory; the caller keeps both.
        self.context.run(|| unsafe { result::memcpy_dtoh_async(to, from.address + offset, self.stream) })
    }

    /// Zeroes the first `bytes` of `memory`, in time.
    pub fn clear(&self, memory: &Memory, bytes: u64) -> Result<(), RunError> {
        assert!(bytes <= memory.bytes, "beyond the memory cleared");
        // SAFETY: within the memory; the caller keeps it.
        self.context.run(|| unsafe { result::memset_d8_async(memory.address, 0, bytes as usize, self.stream) })
    }

    /// Runs a kernel, in time.
    pub fn launch(&self, launch: &Launch<'_>) -> Result<(), RunError> {
        let mut arguments: Vec<*mut c_void> = match launch.arguments {
            Arguments::Each(arguments) => arguments.iter().map(Argument::pointer).collect(),
            Arguments::Struct(addresses) => vec![addresses.as_ptr().cast_mut().cast()],
        };
        let (grid, block) = (launch.grid.into(), launch.block.into());
        // SAFETY: the driver copies the arguments as the kernel's parameters are typed: those of a translated kernel are an address and a
        // number of words for each binding, that of one written by hand is a struct of addresses. Kernels check their indices; the caller keeps what the addresses are of.
        self.context.run(|| unsafe {
            result::launch_kernel(
                launch.module.functions[launch.entry],
                grid,
                block,
                launch.shared_bytes,
                self.stream,
                &mut arguments,
            )
        })
    }

    /// From here on what is asked for is recorded instead of done, until [`Stream::end`].
    pub fn begin(&self) -> Result<(), RunError> {
        // Of this thread alone: others may allocate meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours.
        self.context.run(|| unsafe { result::stream::begin_capture(self.stream, mode) })
    }

    /// What was recorded. The stream does again what is asked for, whatever came.
    ///
    /// # Errors
    /// Something that can't be recorded.
    pub fn end(&self) -> Result<Graph, RunError> {
        // SAFETY: the stream is ours.
        let graph = self.context.run(|| unsafe { result::stream::end_capture(self.stream) })?;
        if graph.is_null() {
            let message = "nothing was recorded".to_string();
            return Err(RunError::Resource(ResourceError::System { what: "the GPU", message }));
        }
        let none = sys::CUgraphInstantiate_flags(0);
        // SAFETY: ended above.
        let instance = self.context.run(|| unsafe { result::graph::instantiate(graph, none) });
        // SAFETY: the instance is apart from what it was made of.
        self.context.release(|| unsafe { result::graph::destroy(graph) });
        Ok(Graph { context: Arc::clone(&self.context), instance: instance? })
    }

    /// Does what was recorded, in time.
    pub fn replay(&self, graph: &Graph) -> Result<(), RunError> {
        // SAFETY: the caller keeps what was recorded of; a stream runs one at a time.
        self.context.run(|| unsafe { result::graph::launch(graph.instance, self.stream) })
    }

    /// The moment when all that was asked for before is done.
    pub fn mark(&self, event: &Event) -> Result<(), RunError> {
        // SAFETY: both are ours, and of one context.
        self.context.run(|| unsafe { result::event::record(event.event, self.stream) })
    }

    /// Waits until everything is done.
    pub fn wait(&self) -> Result<(), RunError> {
        // SAFETY: the stream is ours.
        self.context.run(|| unsafe { result::stream::synchronize(self.stream) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        self.context.release(|| unsafe { result::stream::destroy(self.stream) });
    }
}

/// A moment in a stream's order, by the device's clock.
pub(super) struct Event {
    context: Arc<Context>,
    event: sys::CUevent,
}

// SAFETY: a handle that the driver takes from any thread; one thread has it at a time.
unsafe impl Send for Event {}

impl Event {
    /// `None` of a driver that is too old to tell what passed between two.
    ///
    /// # Errors
    /// The device gives no more.
    pub fn new(context: &Arc<Context>) -> Result<Option<Event>, ResourceError> {
        if context.facts.driver < OLDEST_CLOCK {
            return Ok(None);
        }
        let event = context.call(|| result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let event = event.map_err(|error| resource("an event of the GPU", error))?;
        Ok(Some(Event { context: Arc::clone(context), event }))
    }

    /// What passed between `earlier` and this, both of which are over.
    ///
    /// # Errors
    /// A lost device.
    pub fn since(&self, earlier: &Event) -> Result<Duration, RunError> {
        // SAFETY: both are there, and marked in one stream.
        let ms = self.context.run(|| unsafe { result::event::elapsed(earlier.event, self.event) })?;
        Ok(Duration::try_from_secs_f64(f64::from(ms) / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        self.context.release(|| unsafe { result::event::destroy(self.event) });
    }
}

impl Argument {
    fn pointer(&self) -> *mut c_void {
        match self {
            Argument::Address(address) => ptr::from_ref(address).cast_mut().cast(),
            Argument::Number(number) => ptr::from_ref(number).cast_mut().cast(),
        }
    }
}

/// A run that was recorded.
pub(super) struct Graph {
    context: Arc<Context>,
    instance: sys::CUgraphExec,
}

// SAFETY: a handle that the driver takes from any thread; one thread has it at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once.
        self.context.release(|| unsafe { result::graph::exec_destroy(self.instance) });
    }
}

/// Compiles CUDA C for a device of this compute capability: a cubin, or PTX where NVRTC does not know the device. Where it may not contract, a
/// product and a sum are rounded one by one unless the text says `fma`.
///
/// # Errors
/// What the compiler says.
pub(super) fn compile(source: &str, capability: i32, contracts: bool) -> Result<Vec<u8>, String> {
    let source = CString::new(source).map_err(|error| error.to_string())?;
    let newest = newest_architecture(capability)?;
    let kind = if newest == capability { "sm" } else { "compute" };
    let arguments =
        [format!("--gpu-architecture={kind}_{newest}"), "--std=c++17".to_string(), format!("--fmad={contracts}")];
    let program = nvrtc::result::create_program(&source, None).map_err(|error| error.to_string())?;
    let compiled = compiled(program, &arguments, kind == "sm");
    // SAFETY: made above, and destroyed once.
    let _ = unsafe { nvrtc::result::destroy_program(program) };
    compiled
}

fn compiled(program: nvrtc::sys::nvrtcProgram, arguments: &[String], is_binary: bool) -> Result<Vec<u8>, String> {
    use nvrtc::{result, sys};
    // SAFETY: the program is there, in this and in what follows.
    if let Err(error) =
        unsafe { result::compile_program(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>()) }
    {
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
        return Err(format!("{error}: {}", String::from_utf8_lossy(&log).trim()));
    }
    let failed = |error: nvrtc::result::NvrtcError| error.to_string();
    if !is_binary {
        // SAFETY: as above.
        let text = unsafe { result::get_ptx(program) }.map_err(failed)?;
        return Ok(text.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect());
    }
    let mut length = 0usize;
    // SAFETY: writes one number.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut length) }.result().map_err(failed)?;
    let mut image = vec![0u8; length];
    // SAFETY: writes as many bytes as it has just told.
    unsafe { sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) }.result().map_err(failed)?;
    Ok(image)
}

/// The newest architecture that NVRTC compiles for and a device of `capability` runs.
fn newest_architecture(capability: i32) -> Result<i32, String> {
    let mut count: c_int = 0;
    // SAFETY: writes one number.
    unsafe { nvrtc::sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(|error| error.to_string())?;
    let mut known = vec![0 as c_int; count.max(0) as usize];
    // SAFETY: writes as many numbers as it has just told.
    unsafe { nvrtc::sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(|error| error.to_string())?;
    let newest = known.into_iter().filter(|&known| known <= capability).max();
    newest
        .ok_or_else(|| format!("NVRTC compiles for nothing that a device of {:.1} runs", f64::from(capability) / 10.0))
}
