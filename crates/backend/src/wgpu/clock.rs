//! The device's own clock: what a submission's steps took, without what the host takes to hand them over and to hear of their end.

use super::gpu::Gpu;
use crate::{ResourceError, RunError};
use ::wgpu::{self as api, BufferUsages, Features};
use std::time::Duration;

/// What a device must have so that its clock is read between passes.
pub(super) const FEATURES: Features = Features::TIMESTAMP_QUERY.union(Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

/// When something in a submission was done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mark {
    Begin,
    Steps,
    Copies,
}

const MARKS: u32 = 3;
const BYTES: u64 = 8 * MARKS as u64;

/// A session's marks of one submission at a time.
pub(super) struct Clock {
    marks: api::QuerySet,
    resolved: api::Buffer,
    staging: api::Buffer,
    nanoseconds_per_tick: f64,
}

impl Clock {
    /// # Errors
    /// The device has no memory for it.
    pub fn new(gpu: &Gpu) -> Result<Clock, ResourceError> {
        let descriptor = api::QuerySetDescriptor { label: None, ty: api::QueryType::Timestamp, count: MARKS };
        Ok(Clock {
            marks: gpu.scoped("a clock", || gpu.device.create_query_set(&descriptor))?,
            resolved: gpu.buffer("a clock", BYTES, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)?,
            staging: gpu.buffer("a clock", BYTES, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?,
            nanoseconds_per_tick: f64::from(gpu.queue.get_timestamp_period()),
        })
    }

    /// Notes when everything before in `encoder` is done.
    pub fn note(&self, encoder: &mut api::CommandEncoder, mark: Mark) {
        encoder.write_timestamp(&self.marks, mark as u32);
        if let Mark::Copies = mark {
            encoder.resolve_query_set(&self.marks, 0..MARKS, &self.resolved, 0);
            encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.staging, 0, BYTES);
        }
    }

    /// Waits, and says what the steps took that were submitted last, and the copies after them.
    ///
    /// # Errors
    /// A lost device, and whatever failed.
    pub fn read(&self, gpu: &Gpu) -> Result<[Duration; 2], RunError> {
        let slice = self.staging.slice(..);
        slice.map_async(api::MapMode::Read, |_| {});
        gpu.idle()?;
        let mapped = slice.get_mapped_range().map_err(|error| RunError::DeviceLost(error.to_string()))?;
        let (words, _) = mapped.as_chunks();
        let ticks: Vec<u64> = words.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
        drop(mapped);
        self.staging.unmap();
        let between = |from: Mark, to: Mark| {
            let ticks = ticks[to as usize].saturating_sub(ticks[from as usize]);
            Duration::from_nanos((ticks as f64 * self.nanoseconds_per_tick) as u64)
        };
        Ok([between(Mark::Begin, Mark::Steps), between(Mark::Steps, Mark::Copies)])
    }
}
