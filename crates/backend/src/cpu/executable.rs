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
        Ok(Measures { footprint: footprint(&self.program, first.as_deref()), placement })
    }

    /// Found when somebody asks, where shapes vary.
    fn measures(&self) -> &Measures {
        self.measures.get_or_init(|| {
            self.measure().unwrap_or_else(|_| {
                let mut placement = Placement::default();
                self.program.place(&mut placement.nodes);
                Measures { footprint: footprint(&self.program, None), placement }
            })
        })
    }
}

/// What a program's weights take: packed ones, and those that are used as they are.
fn footprint(program: &Program, first: Option<&ShapePlan>) -> Footprint {
    let session_bytes = first.map_or(0, |plan| plan.arena_bytes as u64);
    let Some(plan) = first.filter(|_| program.is_whole()) else {
        return Footprint { weight_bytes: program.constant_bytes(), session_bytes, ..Footprint::default() };
    };
    let mut footprint = Footprint { session_bytes, ..Footprint::default() };
    for placed in &plan.placed {
        match &placed.place {
            Place::Packed(packed) => {
                footprint.weight_bytes += packed.bytes();
                // This plan holds one reference; another executable's plan would hold one more.
                if Arc::strong_count(packed) > 1 {
                    footprint.shared_bytes += packed.bytes();
                }
            }
            Place::Constant(tensor) => footprint.weight_bytes += tensor.bytes().len() as u64,
            _ => {}
        }
    }
    let forests = plan.steps.iter().filter_map(|step| match &step.lowered {
        Lowered::Trees(step) => Some(step),
        _ => None,
    });
    for step in forests {
        footprint.weight_bytes += step.bytes();
        footprint.shared_bytes += if step.is_shared() { step.bytes() } else { 0 };
    }
    footprint
}

impl Executable for CpuExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        self.measures().footprint
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
