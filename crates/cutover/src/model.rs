//! From a file to answers.

use crate::{
    Error,
    auto::{Open, Wall, fastest},
    choices::Choices,
};
use cutover_backend::{
    Backend, Choice, CompileError, CompileOptions, CpuOptions, Executable, Input, MemoryUse, Output, Placement,
    RunContext, SessionMemory, Signature,
};
use cutover_graph::{
    Graph, Plan,
    onnx::{self, ImportOptions},
    passes::{PassOptions, PassReport, declutter},
};
use cutover_input::{Preprocessing, Preprocessor};
use cutover_package::{Manifest, Package};
use cutover_tensor::{Tensor, TensorView, TensorViewMut, Value};
use std::{fmt, path::Path, str::FromStr, sync::Arc};

/// A model as it was loaded and decluttered, not yet bound to a device.
#[derive(Debug)]
pub struct Model {
    plan: Plan,
    report: PassReport,
    manifest: Option<Manifest>,
    preprocessor: Option<Preprocessor>,
}

/// How to open a model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    pub import: ImportOptions,
    pub passes: PassOptions,
}

impl Model {
    /// Opens a bare `.onnx`, a package folder or a `.cutover` archive. Files are mapped: nobody may truncate or overwrite them while the
    /// model is in use ([`ImportOptions::map`] reads them instead).
    pub fn open(path: impl AsRef<Path>) -> Result<Model, Error> {
        Model::open_with(path, &OpenOptions::default())
    }

    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Model, Error> {
        let path = path.as_ref();
        if !Package::is_one(path) {
            return Model::from_graph(onnx::import(path, &options.import)?, &options.passes);
        }
        let package = Package::open(path)?;
        let tokenizer = package.tokenizer()?;
        let model = Model::from_graph(package.graph(&options.import)?, &options.passes)?;
        let preprocessing = package.manifest.preprocessing.clone();
        let model = match preprocessing.is_empty() {
            true => model,
            false => model.with_preprocessing(preprocessing, tokenizer.as_deref())?,
        };
        Ok(Model { manifest: Some(package.manifest), ..model })
    }

    pub fn from_graph(graph: Graph, options: &PassOptions) -> Result<Model, Error> {
        let (graph, report) = declutter(graph, options)?;
        Ok(Model { plan: Plan::new(graph)?, report, manifest: None, preprocessor: None })
    }

    /// Says how pictures and texts become the model's inputs; `tokenizer` is a `tokenizer.json`.
    pub fn with_preprocessing(self, described: Preprocessing, tokenizer: Option<&[u8]>) -> Result<Model, Error> {
        let signature = self.signature();
        let preprocessor = Preprocessor::new(described, tokenizer, |name| signature.input_dtype(name))?;
        Ok(Model { preprocessor: Some(preprocessor), ..self })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn graph(&self) -> &Graph {
        self.plan.graph()
    }

    /// The rewrites that made the plan of the graph as imported.
    pub fn passes(&self) -> &PassReport {
        &self.report
    }

    /// Of a package.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// What makes the model's inputs of pictures and texts, where a package or [`Model::with_preprocessing`] says how.
    pub fn preprocessor(&self) -> Option<&Preprocessor> {
        self.preprocessor.as_ref()
    }

    pub fn signature(&self) -> Signature {
        Signature::of(self.graph())
    }

    pub fn compile(&self, device: Device) -> Result<CompiledModel, Error> {
        self.compile_with(device, &DeviceOptions::default())
    }

    pub fn compile_with(&self, device: Device, options: &DeviceOptions) -> Result<CompiledModel, Error> {
        self.compile_on(&*device.backend(options)?, &options.compile)
    }

    /// Compiles on a backend that is there already: models of one backend share its threads and packed weights.
    pub fn compile_on(&self, backend: &dyn Backend, options: &CompileOptions) -> Result<CompiledModel, Error> {
        Ok(CompiledModel { executable: backend.compile(&self.plan, options)? })
    }
}

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The one that is fastest for the model, by measuring when it is compiled ([`CompiledModel::choice`]); the CPU where there is no other.
    #[default]
    Auto,
    Cpu,
    /// A GPU through Vulkan, Metal, DX12 or GL, with the CPU for what it has no kernels for; in builds with the feature `wgpu`.
    Wgpu,
    /// An NVIDIA GPU through CUDA, with the CPU for what it has no kernels for; in builds with the feature `cuda`.
    Cuda,
    /// The slow and plain definition that everything else is tested against.
    Reference,
}

/// How the device is used.
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    /// Threads of the CPU, the caller's included; `None` for one per core.
    pub threads: Option<usize>,
    /// Instruction set, as the backend spells it; the best one there is if `None`.
    pub isa: Option<String>,
    /// What the CPU spends memory on.
    pub memory: MemoryUse,
    /// A node that would not run on the device asked for is an error.
    pub strict: bool,
    /// Which GPU, by a part of its name; the first that is listed if `None`.
    pub adapter: Option<String>,
    pub compile: CompileOptions,
}

impl Device {
    pub const NAMES: [&'static str; 5] = ["auto", "cpu", "cuda", "wgpu", "reference"];

    /// A new backend of this device.
    pub fn backend(self, options: &DeviceOptions) -> Result<Arc<dyn Backend>, Error> {
        match self {
            Device::Reference => Ok(cutover_backend::reference()),
            Device::Cpu => Ok(cutover_backend::cpu(cpu(options))?),
            Device::Auto => {
                let cpu = Device::Cpu.backend(options)?;
                let others = gpus(options);
                // Where there is nothing to choose, choosing costs nothing.
                match others.is_empty() {
                    true => Ok(cpu),
                    false => Ok(fastest(cpu, others, Choices::of_user(), Wall::new())),
                }
            }
            #[cfg(feature = "wgpu")]
            Device::Wgpu => {
                let gpu = cutover_backend::wgpu(cutover_backend::WgpuOptions { adapter: options.adapter.clone() })?;
                Ok(cutover_backend::partition(gpu, cutover_backend::cpu(cpu(options))?, options.strict))
            }
            #[cfg(feature = "cuda")]
            Device::Cuda => {
                let cuda = cutover_backend::CudaOptions { adapter: options.adapter.clone(), cache: cache_folder() };
                let gpu = cutover_backend::cuda(cuda)?;
                Ok(cutover_backend::partition(gpu, cutover_backend::cpu(cpu(options))?, options.strict))
            }
            #[cfg(not(feature = "wgpu"))]
            Device::Wgpu => Err(not_built("wgpu")),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda => Err(not_built("cuda")),
        }
    }
}

/// GPUs that answer, of those this build has backends for, and what opens each again.
fn gpus(options: &DeviceOptions) -> Vec<(Arc<dyn Backend>, Open)> {
    let devices: &[Device] = &[
        #[cfg(feature = "cuda")]
        Device::Cuda,
        #[cfg(feature = "wgpu")]
        Device::Wgpu,
    ];
    let opened = devices.iter().filter_map(|&device| {
        let options = options.clone();
        let open: Open = Box::new(move || device.backend(&options).ok());
        Some((open()?, open))
    });
    opened.collect()
}

#[cfg(not(all(feature = "wgpu", feature = "cuda")))]
fn not_built(feature: &str) -> Error {
    CompileError::Options(format!("this build has no GPU backend of that name: build it with the feature '{feature}'"))
        .into()
}

/// Where compiled kernels are kept, in the user's cache: what is there may be deleted at any time.
#[cfg(feature = "cuda")]
fn cache_folder() -> Option<std::path::PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(std::path::PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
    Some(cache?.join("cutover/cuda"))
}

fn cpu(options: &DeviceOptions) -> CpuOptions {
    CpuOptions { threads: options.threads.unwrap_or(0), isa: options.isa.clone(), memory: options.memory }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Device, Error> {
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda),
            "wgpu" => Ok(Device::Wgpu),
            "reference" => Ok(Device::Reference),
            _ => {
                let message = format!("there is no backend '{name}'; there is {}", Device::NAMES.join(", "));
                Err(CompileError::Options(message).into())
            }
        }
    }
}

/// A model compiled for a device: immutable and shared, for any number of sessions.
#[derive(Clone)]
pub struct CompiledModel {
    executable: Arc<dyn Executable>,
}

impl CompiledModel {
    pub fn session(&self) -> Result<Session, Error> {
        let session = self.executable.clone().session(SessionMemory::default())?;
        Ok(Session { executable: Arc::clone(&self.executable), session })
    }

    pub fn signature(&self) -> &Signature {
        self.executable.signature()
    }

    /// Which kernel runs each node, and why.
    pub fn placement(&self) -> &Placement {
        self.executable.placement()
    }

    /// Why it runs where it does, of a model compiled for [`Device::Auto`] where there was a choice.
    pub fn choice(&self) -> Option<&Choice> {
        self.executable.choice()
    }

    pub fn executable(&self) -> &Arc<dyn Executable> {
        &self.executable
    }
}

impl fmt::Debug for CompiledModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompiledModel").field("signature", self.signature()).finish()
    }
}

/// One worker's memory for running a model.
pub struct Session {
    executable: Arc<dyn Executable>,
    session: Box<dyn cutover_backend::Session>,
}

impl Session {
    /// Runs the model on inputs given by name, in any order.
    pub fn run<'a, 'n>(
        &mut self,
        inputs: impl IntoIterator<Item = (&'n str, TensorView<'a>)>,
    ) -> Result<Answers, Error> {
        self.run_with(inputs, &RunContext::default())
    }

    /// As [`Session::run`], with a deadline, a cancellation or a profiler.
    pub fn run_with<'a, 'n>(
        &mut self,
        inputs: impl IntoIterator<Item = (&'n str, TensorView<'a>)>,
        context: &RunContext<'_>,
    ) -> Result<Answers, Error> {
        self.run_named(inputs.into_iter().map(|(name, view)| (name, Input::View(view))), context)
    }

    /// As [`Session::run_with`], for values of every kind: strings, sequences and optionals too.
    pub fn run_values<'a, 'n>(
        &mut self,
        inputs: impl IntoIterator<Item = (&'n str, &'a Value)>,
        context: &RunContext<'_>,
    ) -> Result<Answers, Error> {
        self.run_named(inputs.into_iter().map(|(name, value)| (name, Input::Value(value))), context)
    }

    fn run_named<'a, 'n>(
        &mut self,
        inputs: impl Iterator<Item = (&'n str, Input<'a>)>,
        context: &RunContext<'_>,
    ) -> Result<Answers, Error> {
        let signature = self.executable.signature();
        let mut ordered: Vec<Option<Input<'a>>> = vec![None; signature.inputs.len()];
        for (name, input) in inputs {
            let Some(at) = signature.inputs.iter().position(|b| b.name == name) else {
                let names: Vec<_> = signature.inputs.iter().map(|b| b.name.as_str()).collect();
                return Err(Error::Name(format!("the model has no input '{name}'; it has {}", names.join(", "))));
            };
            ordered[at] = Some(input);
        }
        let missing = |(binding, input): (&cutover_backend::Binding, Option<Input<'a>>)| {
            input.ok_or_else(|| Error::Name(format!("input '{}' ({}) is missing", binding.name, binding.fact)))
        };
        let inputs = signature.inputs.iter().zip(ordered).map(missing).collect::<Result<Vec<_>, _>>()?;
        let mut outputs: Vec<Output<'_>> = signature.outputs.iter().map(|_| Output::Allocate(None)).collect();
        self.session.run(&inputs, &mut outputs, context)?;
        let names = signature.outputs.iter().map(|b| b.name.clone());
        let values = names.zip(outputs).filter_map(|(name, output)| match output {
            Output::Allocate(Some(value)) => Some((name, value)),
            _ => None,
        });
        Ok(Answers { values: values.collect() })
    }

    /// Runs the model on inputs, into buffers, both in the order of the signature. A model of static shapes that runs so again
    /// allocates nothing.
    pub fn run_into(&mut self, inputs: &[TensorView<'_>], outputs: Vec<TensorViewMut<'_>>) -> Result<(), Error> {
        let inputs: Vec<Input<'_>> = inputs.iter().map(|&view| Input::View(view)).collect();
        let mut outputs: Vec<Output<'_>> = outputs.into_iter().map(Output::Write).collect();
        Ok(self.session.run(&inputs, &mut outputs, &RunContext::default())?)
    }
}

/// What a run gave, in the order of the model's outputs.
#[derive(Clone, Debug)]
pub struct Answers {
    values: Vec<(String, Value)>,
}

impl Answers {
    /// The tensor of output `name`; `None` where there is no such output, or it is no tensor.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.values.iter().find(|(n, _)| n == name).and_then(|(_, value)| value.as_tensor())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl IntoIterator for Answers {
    type Item = (String, Value);
    type IntoIter = std::vec::IntoIter<(String, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.values.into_iter()
    }
}
