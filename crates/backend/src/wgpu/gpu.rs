//! The device: how it is opened, its memory and pipelines, and what goes wrong with it.
#![allow(unsafe_code)] // shaders without a bound on loops

use crate::{CompileError, ResourceError, RunError};
use ::wgpu::{
    self as api, Adapter, Backends, BindGroupLayout, Buffer, BufferUsages, ComputePipeline, DeviceType, Features,
    Limits, ShaderRuntimeChecks,
};
use cutover_graph::Identity;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

/// Pipelines that are kept though nothing uses them.
const IDLE_PIPELINES: usize = 512;

/// An opened device, shared by everything that is compiled for it.
pub(super) struct Gpu {
    pub device: api::Device,
    pub queue: api::Queue,
    pub info: api::AdapterInfo,
    pub limits: Limits,
    pub has_f16: bool,
    pub has_i64: bool,
    /// A subgroup is 8 invocations, the lanes of a vector of the processor that imitates the device.
    pub has_lanes: bool,
    pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    weights: Mutex<HashMap<(Identity, &'static str), Weak<Weight>>>,
    fault: Arc<Mutex<Option<Fault>>>,
}

/// A compiled kernel.
pub(super) struct Pipeline {
    pub pipeline: ComputePipeline,
    pub layout: BindGroupLayout,
}

/// A constant on the device.
pub(super) struct Weight {
    pub buffer: Buffer,
    pub bytes: u64,
}

#[derive(Clone, Debug)]
enum Fault {
    Lost(String),
    Memory(String),
    Other(String),
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every adapter of this machine, GPUs before those that a processor imitates.
pub(super) fn adapters() -> Vec<Adapter> {
    let descriptor = api::InstanceDescriptor::new_without_display_handle();
    let instance = api::Instance::new(api::InstanceDescriptor { backends: Backends::PRIMARY, ..descriptor });
    let mut adapters = pollster::block_on(instance.enumerate_adapters(Backends::PRIMARY));
    // What GL reaches, others reach better.
    if adapters.is_empty() {
        let instance = api::Instance::new(api::InstanceDescriptor::new_without_display_handle());
        adapters = pollster::block_on(instance.enumerate_adapters(Backends::SECONDARY));
    }
    let rank = |adapter: &Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    adapters.sort_by_key(rank);
    adapters
}

impl Gpu {
    /// Opens the first adapter whose name has `named` in it, in any case; the first of all without it.
    ///
    /// # Errors
    /// No such adapter; one that gives no device.
    pub fn open(named: Option<&str>) -> Result<Gpu, CompileError> {
        let all = adapters();
        let names: Vec<String> = all.iter().map(|adapter| adapter.get_info().name).collect();
        let is_named = |name: &str| named.is_none_or(|part| name.to_lowercase().contains(&part.to_lowercase()));
        let Some(adapter) = all.into_iter().zip(&names).find(|(_, name)| is_named(name)).map(|(adapter, _)| adapter)
        else {
            return Err(CompileError::Options(match named {
                Some(named) if !names.is_empty() => format!("no GPU '{named}': there is {}", names.join(", ")),
                _ => "no GPU that Vulkan, Metal, DX12 or GL reaches".to_string(),
            }));
        };
        Gpu::of(&adapter)
    }

    /// # Errors
    /// An adapter that gives no device.
    pub fn of(adapter: &Adapter) -> Result<Gpu, CompileError> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let wanted = Features::SHADER_F16 | Features::SHADER_INT64 | Features::SUBGROUP;
        let features = adapter.features() & wanted;
        let descriptor = api::DeviceDescriptor {
            label: Some("cutover"),
            required_features: features,
            required_limits: limits.clone(),
            memory_hints: api::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (device, queue) = opened.map_err(|error| CompileError::Options(format!("GPU '{}': {error}", info.name)))?;
        let fault = Arc::new(Mutex::new(None));
        let (lost, failed) = (Arc::clone(&fault), Arc::clone(&fault));
        device.set_device_lost_callback(move |_, message| *lock(&lost) = Some(Fault::Lost(message)));
        device.on_uncaptured_error(Arc::new(move |error: api::Error| {
            let mut fault = lock(&failed);
            if !matches!(*fault, Some(Fault::Lost(_))) {
                *fault = Some(match error {
                    api::Error::OutOfMemory { .. } => Fault::Memory(error.to_string()),
                    other => Fault::Other(other.to_string()),
                });
            }
        }));
        Ok(Gpu {
            has_f16: features.contains(Features::SHADER_F16),
            has_i64: features.contains(Features::SHADER_INT64),
            has_lanes: features.contains(Features::SUBGROUP)
                && info.device_type == DeviceType::Cpu
                && (info.subgroup_min_size, info.subgroup_max_size) == (8, 8),
            device,
            queue,
            info,
            limits,
            pipelines: Mutex::default(),
            weights: Mutex::default(),
            fault,
        })
    }

    /// Bytes of the largest range that a kernel reads or writes.
    pub fn binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// Alignment of ranges in a buffer.
    pub fn alignment(&self) -> usize {
        (self.limits.min_storage_buffer_offset_alignment as usize).max(256)
    }

    /// Whether a processor imitates it, so that a subgroup is a vector of it.
    pub fn is_imitated(&self) -> bool {
        self.info.device_type == DeviceType::Cpu
    }

    /// What went wrong since the last time, out of order; a lost device stays lost.
    pub fn check(&self) -> Result<(), RunError> {
        let mut fault = lock(&self.fault);
        match fault.clone() {
            None => Ok(()),
            Some(Fault::Lost(message)) => Err(RunError::DeviceLost(message)),
            Some(Fault::Memory(message) | Fault::Other(message)) => {
                *fault = None;
                Err(RunError::Resource(ResourceError::System { what: "the GPU", message }))
            }
        }
    }

    /// A buffer of `bytes`, rounded up to whole words.
    ///
    /// # Errors
    /// The device has less.
    pub fn buffer(&self, what: &'static str, bytes: u64, usage: BufferUsages) -> Result<Buffer, ResourceError> {
        let size = bytes.max(4).next_multiple_of(4);
        if size > self.limits.max_buffer_size {
            return Err(ResourceError::Memory { what, needed: size, available: self.limits.max_buffer_size });
        }
        let scopes = [api::ErrorFilter::OutOfMemory, api::ErrorFilter::Validation, api::ErrorFilter::Internal];
        let scopes = scopes.map(|filter| self.device.push_error_scope(filter));
        let descriptor = api::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        let buffer = self.device.create_buffer(&descriptor);
        let failures = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop()));
        match failures.last() {
            None => Ok(buffer),
            Some(error) => Err(ResourceError::System { what, message: error.to_string() }),
        }
    }

    /// The constant of this identity as `recipe` holds it, uploaded once while anything uses it. `bytes` makes them.
    pub fn weight(
        &self,
        identity: Identity,
        recipe: &'static str,
        bytes: impl FnOnce() -> Vec<u8>,
    ) -> Result<Arc<Weight>, ResourceError> {
        if let Some(weight) = lock(&self.weights).get(&(identity, recipe)).and_then(Weak::upgrade) {
            return Ok(weight);
        }
        let mut bytes = bytes();
        bytes.resize(bytes.len().max(4).next_multiple_of(4), 0);
        let buffer = self.buffer("a weight", bytes.len() as u64, BufferUsages::STORAGE | BufferUsages::COPY_DST)?;
        self.queue.write_buffer(&buffer, 0, &bytes);
        let weight = Arc::new(Weight { buffer, bytes: bytes.len() as u64 });
        let mut weights = lock(&self.weights);
        weights.retain(|_, weight| weight.strong_count() > 0);
        weights.insert((identity, recipe), Arc::downgrade(&weight));
        Ok(weight)
    }

    /// The kernel of this text, compiled once. `read_only` says it of every binding of group 0, in order.
    ///
    /// # Errors
    /// What the driver's compiler says.
    pub fn pipeline(&self, source: &str, read_only: &[bool]) -> Result<Arc<Pipeline>, String> {
        if let Some(pipeline) = lock(&self.pipelines).get(source) {
            return Ok(Arc::clone(pipeline));
        }
        let scopes = [api::ErrorFilter::OutOfMemory, api::ErrorFilter::Validation, api::ErrorFilter::Internal];
        let scopes = scopes.map(|filter| self.device.push_error_scope(filter));
        let pipeline = self.compile(source, read_only);
        let failures = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop()));
        if let Some(error) = failures.last() {
            tracing::debug!("{error}\n{source}");
            return Err(error.to_string());
        }
        let pipeline = Arc::new(pipeline);
        let mut pipelines = lock(&self.pipelines);
        if pipelines.len() >= IDLE_PIPELINES {
            pipelines.retain(|_, pipeline| Arc::strong_count(pipeline) > 1);
        }
        pipelines.insert(source.to_string(), Arc::clone(&pipeline));
        Ok(pipeline)
    }

    fn compile(&self, source: &str, read_only: &[bool]) -> Pipeline {
        let entries: Vec<api::BindGroupLayoutEntry> = (0..)
            .zip(read_only)
            .map(|(binding, &read_only)| api::BindGroupLayoutEntry {
                binding,
                visibility: api::ShaderStages::COMPUTE,
                ty: api::BindingType::Buffer {
                    ty: api::BufferBindingType::Storage { read_only },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout =
            self.device.create_bind_group_layout(&api::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let groups = [Some(&layout)];
        let pipeline_layout = self.device.create_pipeline_layout(&api::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &groups,
            immediate_size: 0,
        });
        let descriptor =
            api::ShaderModuleDescriptor { label: None, source: api::ShaderSource::Wgsl(source.to_string().into()) };
        let checks = ShaderRuntimeChecks { force_loop_bounding: false, ..ShaderRuntimeChecks::checked() };
        // SAFETY: what is left out is the bound on loops. Every loop of our kernels ends after a number of rounds that a constant of its
        // text or the length of a dimension gives.
        let module = unsafe { self.device.create_shader_module_trusted(descriptor, checks) };
        let pipeline = self.device.create_compute_pipeline(&api::ComputePipelineDescriptor {
            label: None,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: api::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    }

    /// Waits until everything that was submitted is done.
    pub fn wait(&self) -> Result<(), RunError> {
        let waited = self.device.poll(api::PollType::wait_indefinitely());
        self.check()?;
        match waited {
            Ok(_) => Ok(()),
            Err(error) => Err(RunError::DeviceLost(error.to_string())),
        }
    }
}
