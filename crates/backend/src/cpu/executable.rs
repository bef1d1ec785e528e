//! A compiled plan, and its sessions.

use super::{
    Device,
    frame::Place,
    lower::Lowered,
    plan::ShapePlan,
    program::{Program, Run},
    segment::Memory,
};
use crate::{
    CompileError, CompileOptions, Executable, Footprint, Input, Output, Placement, ResourceError, RunContext, RunError,
    Session, SessionMemory, Signature, binding,
};
use cutover_graph::{Bindings, Plan};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

pub(super) struct CpuExecutable {
    program: Program,
    signature: Signature,
    measures: OnceLock<Measures>,
}

/// What it takes, and where its nodes run.
struct Measures {
    placement: Placement,
    footprint: Footprint,
    /// Address and bytes of each part of the weights.
    weights: Vec<(usize, u64)>,
}

impl CpuExecutable {
    pub fn new(device: Arc<Device>, plan: &Plan, options: CompileOptions) -> Result<Arc<CpuExecutable>, CompileError> {
        let program = Program::new(&device, plan, options, false)?;
        let executable = CpuExecutable { program, signature: Signature::of(plan.graph()), measures: OnceLock::new() };
        // What shapes decide waits for them: weights packed for a guess may be packed in vain.
        if executable.program.is_static() {
            let measures = executable.measure()?;
            let _ = executable.measures.set(measures);
        }
        Ok(Arc::new(executable))
    }

    fn measure(&self) -> Result<Measures, ResourceError> {
        let first = match self.program.prepare() {
            Ok(first) => first,
            Err(RunError::Resource(error)) => return Err(error),
            // A run will say it, with the shapes that it met.
            Err(_) => None,
        };
        let mut placement = Placement::default();
        self.program.place(&mut placement.nodes);
        Ok(Measures::of(&self.program, first.as_deref(), placement))
    }

    /// Found when somebody asks, where shapes vary.
    fn measures(&self) -> &Measures {
        self.measures.get_or_init(|| {
            self.measure().unwrap_or_else(|_| {
                let mut placement = Placement::default();
                self.program.place(&mut placement.nodes);
                Measures::of(&self.program, None, placement)
            })
        })
    }
}

impl Measures {
    /// Counts a program's weights: packed ones, and those that are used as they are.
    fn of(program: &Program, first: Option<&ShapePlan>, placement: Placement) -> Measures {
        let session_bytes = first.map_or(0, |plan| plan.arena_bytes as u64);
        let Some(plan) = first.filter(|_| program.is_whole()) else {
            let weight_bytes = program.constant_bytes();
            let footprint = Footprint { weight_bytes, session_bytes, ..Footprint::default() };
            return Measures {
                placement,
                footprint,
                weights: vec![(std::ptr::from_ref(program) as usize, weight_bytes)],
            };
        };
        // Address, bytes and whether others hold them: this plan holds one reference, another executable's plan would hold one more.
        let placed = plan.placed.iter().filter_map(|placed| match &placed.place {
            Place::Packed(packed) => {
                Some((packed.as_slice().as_ptr() as usize, packed.bytes(), Arc::strong_count(packed) > 1))
            }
            Place::Constant(tensor) => Some((tensor.bytes().as_ptr() as usize, tensor.bytes().len() as u64, false)),
            _ => None,
        });
        let forests = plan.steps.iter().filter_map(|step| match &step.lowered {
            Lowered::Trees(step) => Some((step.address(), step.bytes(), step.is_shared())),
            _ => None,
        });
        let parts: Vec<(usize, u64, bool)> = placed.chain(forests).collect();
        let sum = |parts: &mut dyn Iterator<Item = &(usize, u64, bool)>| parts.map(|(_, bytes, _)| bytes).sum();
        let footprint = Footprint {
            weight_bytes: sum(&mut parts.iter()),
            shared_bytes: sum(&mut parts.iter().filter(|(.., shared)| *shared)),
            session_bytes,
        };
        let weights = parts.into_iter().map(|(address, bytes, _)| (address, bytes)).collect();
        Measures { placement, footprint, weights }
    }
}

impl Executable for CpuExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.measures().footprint
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        self.measures().weights.iter().for_each(|&(address, bytes)| visit(address, bytes));
    }

    fn placement(&self) -> &Placement {
        &self.measures().placement
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        Ok(Box::new(CpuSession { executable: self, memory: Memory::new(memory), symbols: Bindings::new() }))
    }
}

struct CpuSession {
    executable: Arc<CpuExecutable>,
    memory: Memory,
    symbols: Bindings,
}

impl Session for CpuSession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        let CpuExecutable { program, signature, .. } = &*self.executable;
        binding::bind_inputs(signature, inputs, &mut self.symbols)?;
        binding::check_outputs(signature, outputs, &self.symbols)?;
        let mut run = Run { context, memory: &mut self.memory, held_bytes: 0, inside: Duration::ZERO, trips: 0 };
        program.run(inputs, outputs, &mut run)
    }
}
