//! The device: how it is opened, its memory and pipelines, and what goes wrong with it.
#![allow(unsafe_code)] // shaders without a bound on loops, and pipelines that were compiled before

use super::{clock, kept, texels, tuned::Tuned};
use crate::{
    CompileError, ResourceError, RunError,
    gpu::{Limits, lock},
};
use ::wgpu::{
    self as api, Adapter, Backends, BindGroupLayout, Buffer, BufferUsages, ComputePipeline, DeviceType, Features,
    ShaderRuntimeChecks,
};
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// An opened device, shared by everything that is compiled for it.
pub(super) struct Gpu {
    pub device: api::Device,
    pub queue: api::Queue,
    pub info: api::AdapterInfo,
    /// What our kernels go by.
    pub limits: Limits,
    /// Whether it tells when something was done.
    pub has_clock: bool,
    kept: Option<Kept>,
    /// What is measured of kernels that there are several of; of what a processor imitates nothing is.
    pub tuned: Option<Tuned>,
    fault: Arc<Mutex<Option<Fault>>>,
}

/// Pipelines as the driver keeps them, and the file that they are in between processes.
struct Kept {
    pipelines: api::PipelineCache,
    path: PathBuf,
    is_new: AtomicBool,
}

/// A compiled kernel.
pub(super) struct Pipeline {
    pub pipeline: ComputePipeline,
    pub layout: BindGroupLayout,
    /// By binding: of the texture that it is, `None` for a buffer.
    pub formats: Vec<Option<api::TextureFormat>>,
}

#[derive(Clone, Debug)]
enum Fault {
    Lost(String),
    Memory(String),
    Other(String),
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

impl Kept {
    fn open(device: &api::Device, info: &api::AdapterInfo, features: Features) -> Option<Kept> {
        if !features.contains(Features::PIPELINE_CACHE) {
            return None;
        }
        let path = kept::path_of("kernels", info, features)?;
        let data = kept::read(&path);
        let descriptor = api::PipelineCacheDescriptor { label: None, data: data.as_deref(), fallback: true };
        // SAFETY: the data is what `get_data` gave for this device and driver, whole: the file's name and the digest in it say so. It lies
        // in the user's own cache folder, as much trusted as the program.
        let pipelines = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Kept { pipelines, path, is_new: AtomicBool::new(false) })
    }
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
        Gpu::within(adapter, adapter.limits())
    }

    /// The device with these limits, which are no more than the adapter's.
    ///
    /// # Errors
    /// An adapter that gives no such device.
    pub fn within(adapter: &Adapter, limits: api::Limits) -> Result<Gpu, CompileError> {
        let info = adapter.get_info();
        let is_imitated = info.device_type == DeviceType::Cpu;
        let mut wanted = Features::SHADER_F16 | Features::SHADER_INT64 | Features::SUBGROUP | Features::PIPELINE_CACHE;
        wanted |= clock::FEATURES;
        // Of what it reads through textures a kernel may read anything.
        wanted.set(Features::TEXTURE_ADAPTER_SPECIFIC_FORMAT_FEATURES, is_imitated);
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
        let limits = Limits {
            has_f16: features.contains(Features::SHADER_F16),
            has_i64: features.contains(Features::SHADER_INT64),
            has_lanes: features.contains(Features::SUBGROUP | Features::TEXTURE_ADAPTER_SPECIFIC_FORMAT_FEATURES)
                && limits.max_storage_textures_per_shader_stage >= limits.max_storage_buffers_per_shader_stage
                && (info.subgroup_min_size, info.subgroup_max_size) == (8, 8),
            is_imitated,
            written: None,
            buffer_bytes: limits.max_buffer_size,
            binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
            alignment: (limits.min_storage_buffer_offset_alignment as usize).max(256),
            bindings: limits.max_storage_buffers_per_shader_stage as usize,
            groups: limits.max_compute_workgroups_per_dimension,
            invocations: limits.max_compute_invocations_per_workgroup as usize,
        };
        let kept = Kept::open(&device, &info, features);
        let tuned = (!is_imitated).then(|| Tuned::open(kept::path_of("tuned", &info, features)));
        let has_clock = features.contains(clock::FEATURES);
        Ok(Gpu { device, queue, info, limits, has_clock, kept, tuned, fault })
    }

    /// Writes what was compiled since the last time to where the next process finds it.
    pub fn keep(&self) {
        if let Some(tuned) = &self.tuned {
            tuned.keep();
        }
        let Some(kept) = &self.kept else { return };
        if !kept.is_new.swap(false, Ordering::Relaxed) {
            return;
        }
        let Some(data) = kept.pipelines.get_data() else { return };
        if let Err(error) = kept::write(&kept.path, &data) {
            tracing::debug!("compiled kernels are not kept in '{}': {error}", kept.path.display());
        }
    }

    /// What went wrong since the last time, out of order; a lost device stays lost.
    pub fn fault(&self) -> Result<(), RunError> {
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
        if size > self.limits.buffer_bytes {
            return Err(ResourceError::Memory { what, needed: size, available: self.limits.buffer_bytes });
        }
        let descriptor = api::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: false };
        self.scoped(what, || self.device.create_buffer(&descriptor))
    }

    /// What `make` makes, unless the device refuses it.
    ///
    /// # Errors
    /// It has no memory for it, or does not take it.
    pub fn scoped<T>(&self, what: &'static str, make: impl FnOnce() -> T) -> Result<T, ResourceError> {
        let scopes = [api::ErrorFilter::OutOfMemory, api::ErrorFilter::Validation, api::ErrorFilter::Internal];
        let scopes = scopes.map(|filter| self.device.push_error_scope(filter));
        let made = make();
        let failures = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop()));
        match failures.last() {
            None => Ok(made),
            Some(error) => Err(ResourceError::System { what, message: error.to_string() }),
        }
    }

    /// The kernel of this text. `read_only` says it of every binding of group 0, in order.
    ///
    /// # Errors
    /// What the driver's compiler says.
    pub fn pipeline(&self, source: &str, read_only: &[bool]) -> Result<Pipeline, String> {
        self.scoped("a kernel", || self.compile(source, read_only)).map_err(|error| match error {
            ResourceError::System { message, .. } => message,
            error => error.to_string(),
        })
    }

    fn compile(&self, source: &str, read_only: &[bool]) -> Pipeline {
        let formats: Vec<_> = (0..read_only.len()).map(|at| texels::format_of(source, at)).collect();
        let ty = |read_only: bool, format: &Option<api::TextureFormat>| match *format {
            Some(format) => api::BindingType::StorageTexture {
                access: api::StorageTextureAccess::ReadOnly,
                format,
                view_dimension: api::TextureViewDimension::D2,
            },
            None => api::BindingType::Buffer {
                ty: api::BufferBindingType::Storage { read_only },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
        };
        let entries: Vec<api::BindGroupLayoutEntry> = (0..)
            .zip(read_only.iter().zip(&formats))
            .map(|(binding, (&read_only, format))| api::BindGroupLayoutEntry {
                binding,
                visibility: api::ShaderStages::COMPUTE,
                ty: ty(read_only, format),
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
            cache: self.kept.as_ref().map(|kept| &kept.pipelines),
        });
        if let Some(kept) = &self.kept {
            kept.is_new.store(true, Ordering::Relaxed);
        }
        Pipeline { pipeline, layout, formats }
    }

    /// Waits until everything that was submitted is done.
    pub fn idle(&self) -> Result<(), RunError> {
        let waited = self.device.poll(api::PollType::wait_indefinitely());
        self.fault()?;
        match waited {
            Ok(_) => Ok(()),
            Err(error) => Err(RunError::DeviceLost(error.to_string())),
        }
    }
}
