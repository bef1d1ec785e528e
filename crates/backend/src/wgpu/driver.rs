//! The device as plans are run on it: an arena and a bind group for every step, and a submission for every run.

use super::{
    clock::{Clock, Mark},
    devices,
    gpu::{Gpu, Pipeline},
    texels::{Constant, Texels},
};
use crate::{
    DeviceInfo, Peak, ResourceError, RunError,
    gpu::{Beside, Candidate, Driver, FAULT_BYTES, Limits, Place, Ready, ShapePlan, Source, Step, Times},
};
use ::wgpu::{self as api, BufferUsages};
use std::{num::NonZero, ops::Range, sync::Mutex, time::Instant};

/// A plan's memory in a session.
pub(super) struct Memory {
    arena: api::Buffer,
    staging: api::Buffer,
    groups: Vec<api::BindGroup>,
    texels: Texels,
    /// Once it was asked for.
    clock: Option<Clock>,
}

impl Driver for Gpu {
    const NAME: &'static str = "wgpu";
    type Buffer = Constant;
    type Pipeline = Pipeline;
    type Memory = Memory;

    fn describe(&self) -> DeviceInfo {
        let (device, isa) = (self.info.name.clone(), self.info.backend.to_string());
        DeviceInfo { backend: Gpu::NAME, device, isa, threads: 1 }
    }

    fn version(&self) -> Option<String> {
        Some([self.info.driver.as_str(), self.info.driver_info.as_str()].join(" ").trim().to_string())
    }

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn measure_peak(&self) -> Option<Peak> {
        devices::peak(self)
    }

    fn check(&self) -> Result<(), RunError> {
        self.fault()
    }

    fn constant(&self, bytes: &[u8]) -> Result<Constant, ResourceError> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        // Whole texels of four words.
        let buffer = self.buffer("a weight", (bytes.len() as u64).next_multiple_of(16), usage)?;
        self.queue.write_buffer(&buffer, 0, bytes);
        Ok(Constant { buffer, textures: Mutex::default() })
    }

    fn compile(&self, source: &str, read_only: &[bool]) -> Result<Pipeline, String> {
        self.pipeline(source, read_only)
    }

    fn fastest_kernel(&self, candidates: &[Candidate]) -> Option<usize> {
        self.tuned.as_ref()?.fastest(candidates, |candidate| self.time(candidate))
    }

    fn beside(&self, ready: &Ready<Gpu>) -> Beside {
        Texels::beside(ready)
    }

    fn memory(&self, ready: &Ready<Gpu>) -> Result<Memory, ResourceError> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let arena_bytes = ready.plan.arena_bytes.next_multiple_of(16);
        let arena = self.buffer("a session's arena", arena_bytes, usage)?;
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        let staging = self.buffer("a session's results", ready.plan.staging_bytes, usage)?;
        let texels = Texels::new(self, ready)?;
        let group = |(at, step): (usize, &Step)| {
            let pipeline = &ready.pipelines[step.pipeline];
            let weights = step.bindings.iter().zip(&pipeline.formats).map(|(place, format)| match (*place, *format) {
                (Place::Weight(at), Some(format)) => ready.weights[at].buffer.texture(self, format).map(Some),
                _ => Ok(None),
            });
            let weights = weights.collect::<Result<Vec<_>, ResourceError>>()?;
            let mut of_arena = texels.of_step(at);
            let entry = |(binding, place): (usize, &Place)| {
                let resource = match (*place, pipeline.formats[binding], &weights[binding]) {
                    (_, _, Some(texture)) => api::BindingResource::TextureView(texture),
                    (Place::Weight(at), _, None) => ready.weights[at].buffer.buffer.as_entire_binding(),
                    (Place::PartOfWeight(at, range), _, None) => api::BindingResource::Buffer(api::BufferBinding {
                        buffer: &ready.weights[at].buffer.buffer,
                        offset: range.offset,
                        size: NonZero::new(range.bytes),
                    }),
                    (Place::Arena(range), None, None) => api::BindingResource::Buffer(api::BufferBinding {
                        buffer: &arena,
                        offset: range.offset,
                        size: NonZero::new(range.bytes),
                    }),
                    (Place::Arena(_), Some(_), None) => {
                        api::BindingResource::TextureView(of_arena.next().expect("a texture for every such binding"))
                    }
                };
                api::BindGroupEntry { binding: binding as u32, resource }
            };
            let entries: Vec<api::BindGroupEntry<'_>> = step.bindings.iter().enumerate().map(entry).collect();
            let descriptor = api::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
            Ok(self.device.create_bind_group(&descriptor))
        };
        let groups = ready.plan.steps.iter().enumerate().map(group).collect::<Result<_, ResourceError>>()?;
        // A plan's kernels are all compiled now.
        self.keep();
        Ok(Memory { groups, arena, staging, texels, clock: None })
    }

    fn write(&self, plan: &ShapePlan, memory: &mut Memory, input: usize, bytes: &[u8]) -> Result<(), RunError> {
        if let Some(range) = &plan.inputs[input] {
            self.queue.write_buffer(&memory.arena, range.offset, bytes);
        }
        Ok(())
    }

    fn submit(&self, ready: &Ready<Gpu>, memory: &mut Memory, steps: Range<usize>) -> Result<(), RunError> {
        self.submit_marked(ready, memory, steps, None);
        Ok(())
    }

    fn timed(&self, ready: &Ready<Gpu>, memory: &mut Memory, steps: Range<usize>) -> Result<Option<Times>, RunError> {
        if !self.has_clock {
            return Ok(None);
        }
        let clock = match memory.clock.take() {
            Some(clock) => clock,
            None => Clock::new(self)?,
        };
        // Inputs are copied by what is submitted next, before anything that could note when: by the host's clock, then, alone.
        let start = Instant::now();
        if steps.start == 0 {
            self.queue.submit([]);
            self.idle()?;
        }
        let copies_in = start.elapsed();
        self.submit_marked(ready, memory, steps, Some(&clock));
        let [kernels, copies_out] = clock.read(self)?;
        memory.clock = Some(clock);
        Ok(Some(Times { copies_in, kernels, copies_out }))
    }

    fn wait(&self, _memory: &mut Memory) -> Result<(), RunError> {
        self.idle()
    }

    fn read(
        &self,
        memory: &mut Memory,
        hand_out: &mut dyn FnMut(&[u8]) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let slice = memory.staging.slice(..);
        slice.map_async(api::MapMode::Read, |_| {});
        self.idle()?;
        let mapped = slice.get_mapped_range().map_err(|error| RunError::DeviceLost(error.to_string()))?;
        let result = hand_out(&mapped);
        drop(mapped);
        memory.staging.unmap();
        result
    }
}

impl Gpu {
    /// [`Driver::submit`], with the marks of `clock`.
    fn submit_marked(&self, ready: &Ready<Gpu>, memory: &Memory, steps: Range<usize>, clock: Option<&Clock>) {
        let plan = &ready.plan;
        let mut encoder = self.device.create_command_encoder(&api::CommandEncoderDescriptor::default());
        if steps.start == 0 {
            encoder.clear_buffer(&memory.arena, 0, Some(FAULT_BYTES as u64));
        }
        let is_last = steps.end == plan.steps.len();
        let note =
            |encoder: &mut api::CommandEncoder, mark: Mark| clock.iter().for_each(|clock| clock.note(encoder, mark));
        note(&mut encoder, Mark::Begin);
        let mut pass: Option<api::ComputePass<'static>> = None;
        for at in steps {
            if memory.texels.is_copied_before(at) {
                // Copies stand between passes.
                drop(pass.take());
                memory.texels.copy(&mut encoder, &memory.arena, at);
            }
            let pass = pass.get_or_insert_with(|| {
                encoder.begin_compute_pass(&api::ComputePassDescriptor::default()).forget_lifetime()
            });
            let step = &plan.steps[at];
            pass.set_pipeline(&ready.pipelines[step.pipeline].pipeline);
            pass.set_bind_group(0, &memory.groups[at], &[]);
            let [x, y, z] = step.groups;
            pass.dispatch_workgroups(x, y, z);
        }
        drop(pass);
        note(&mut encoder, Mark::Steps);
        if is_last {
            encoder.copy_buffer_to_buffer(&memory.arena, 0, &memory.staging, 0, FAULT_BYTES as u64);
            for output in &plan.outputs {
                if let Source::Device { place, staged_at, bytes } = output.from
                    && bytes > 0
                {
                    let (buffer, offset) = match place {
                        Place::Arena(range) => (&memory.arena, range.offset),
                        Place::Weight(at) => (&ready.weights[at].buffer.buffer, 0),
                        Place::PartOfWeight(at, range) => (&ready.weights[at].buffer.buffer, range.offset),
                    };
                    encoder.copy_buffer_to_buffer(buffer, offset, &memory.staging, staged_at, bytes);
                }
            }
        }
        note(&mut encoder, Mark::Copies);
        self.queue.submit([encoder.finish()]);
    }
}
