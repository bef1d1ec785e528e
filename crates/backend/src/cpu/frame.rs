//! Where a run's buffers are, and the steps' access to them.
//!
//! A shape plan numbers its buffers. Steps of one run execute one after the other (the barrier sees to that), and within a step the
//! threads write disjoint parts of its outputs; the plan places buffers so that what is alive together does not overlap.

use super::{pool::Barrier, weights::Packed};
use crate::RunError;
use cutover_kernels::cpu::{Output, movement::Word};
use cutover_tensor::Tensor;
use std::sync::{Arc, Mutex, PoisonError};

/// Index of a buffer in its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Buffer(pub u32);

/// Where a buffer lies.
#[derive(Clone)]
pub(super) enum Place {
    /// Byte offset.
    Arena(usize),
    /// The caller's input of this index.
    Input(usize),
    /// Where the output of this index goes.
    Output(usize),
    Constant(Tensor),
    Packed(Arc<Packed>),
}

/// A buffer and its length in bytes.
#[derive(Clone)]
pub(super) struct Placed {
    pub place: Place,
    pub bytes: usize,
}

/// One run's memory.
pub(super) struct Frame<'a> {
    pub placed: &'a [Placed],
    /// 64-byte aligned; as many bytes as the plan asks for.
    pub arena: *mut u8,
    pub inputs: &'a [*const u8],
    pub outputs: &'a [*mut u8],
    /// The first error of any thread.
    pub error: Mutex<Option<RunError>>,
}

// SAFETY: the pointers are to memory that the run borrows for its whole time; the plan keeps threads apart in it.
unsafe impl Sync for Frame<'_> {}

impl Frame<'_> {
    fn pointer(&self, buffer: Buffer) -> (*mut u8, usize) {
        let Placed { place, bytes } = &self.placed[buffer.0 as usize];
        let pointer = match place {
            // SAFETY: the plan's offsets lie inside the arena it asked for.
            Place::Arena(offset) => unsafe { self.arena.add(*offset) },
            Place::Input(index) => self.inputs[*index].cast_mut(),
            Place::Output(index) => self.outputs[*index],
            Place::Constant(tensor) => tensor.bytes().as_ptr().cast_mut(),
            Place::Packed(packed) => packed.as_slice().as_ptr().cast_mut().cast(),
        };
        (pointer, *bytes)
    }

    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        let (pointer, bytes) = self.pointer(buffer);
        // SAFETY: the buffer is `bytes` long and alive; its writers finished in an earlier step.
        unsafe { std::slice::from_raw_parts(pointer, bytes) }
    }

    /// # Panics
    /// If the buffer is not aligned for f32, which the plan sees to.
    pub fn floats(&self, buffer: Buffer) -> &[f32] {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(pointer.cast::<f32>().is_aligned());
        // SAFETY: as in `bytes`; every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(pointer.cast(), bytes / size_of::<f32>()) }
    }

    /// The buffer as words of another size, or as integers.
    ///
    /// # Panics
    /// If the buffer is not aligned for them, which the plan sees to.
    pub fn words<T: Word>(&self, buffer: Buffer) -> &[T] {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(pointer.cast::<T>().is_aligned());
        // SAFETY: as in `bytes`; every bit pattern is a word.
        unsafe { std::slice::from_raw_parts(pointer.cast(), bytes / size_of::<T>()) }
    }

    /// As [`Frame::output`], of words.
    pub fn words_output<T: Word>(&self, buffer: Buffer) -> Output<'_, T> {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(pointer.cast::<T>().is_aligned());
        // SAFETY: as in `output`.
        unsafe { Output::from_raw(pointer.cast(), bytes / size_of::<T>()) }
    }

    /// The buffer for kernels to write. Steps give each thread a part of its own.
    pub fn output(&self, buffer: Buffer) -> Output<'_> {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(pointer.cast::<f32>().is_aligned());
        // SAFETY: alive and writable (the plan writes to arena and outputs alone); threads write disjoint parts.
        unsafe { Output::from_raw(pointer.cast(), bytes / size_of::<f32>()) }
    }

    /// Part of the buffer for kernels to write, from float `start`.
    pub fn output_at(&self, buffer: Buffer, start: usize, len: usize) -> Output<'_> {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(pointer.cast::<f32>().is_aligned() && (start + len) * size_of::<f32>() <= bytes);
        // SAFETY: as in `output`, inside the buffer.
        unsafe { Output::from_raw(pointer.cast::<f32>().add(start), len) }
    }

    /// For a step that only one thread runs, or that cuts it into parts.
    #[inline]
    pub fn write(&self, buffer: Buffer, at: usize, from: &[u8]) {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(at + from.len() <= bytes, "{} bytes at {at} of {bytes}", from.len());
        // SAFETY: inside the buffer; this thread alone writes there, and `from` is another buffer or not in the frame.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), pointer.add(at), from.len()) }
    }

    /// As [`Frame::write`], floats from float `at`.
    pub fn write_floats(&self, buffer: Buffer, at: usize, from: &[f32]) {
        let (pointer, bytes) = self.pointer(buffer);
        assert!((at + from.len()) * size_of::<f32>() <= bytes, "{} floats at {at} of {bytes} bytes", from.len());
        // SAFETY: inside the buffer; this thread alone writes there, and `from` is another buffer or not in the frame.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().cast(), pointer.add(at * size_of::<f32>()), size_of_val(from))
        }
    }

    /// As [`Frame::write`], zeros.
    pub fn zero(&self, buffer: Buffer, at: usize, count: usize) {
        let (pointer, bytes) = self.pointer(buffer);
        assert!(at + count <= bytes, "{count} bytes at {at} of {bytes}");
        // SAFETY: inside the buffer; this thread alone writes there.
        unsafe { std::ptr::write_bytes(pointer.add(at), 0, count) }
    }

    /// Keeps the error if it is the first, and ends the run at the next meeting.
    pub fn fail(&self, error: RunError, barrier: &Barrier) {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        barrier.break_up();
    }
}

/// What of a step a thread runs, and its own memory.
pub(super) struct Worker<'a> {
    /// Of `parts`, each of which one thread runs.
    pub part: usize,
    pub parts: usize,
    /// Floats that nobody else uses.
    pub workspace: &'a mut [f32],
}

impl Worker<'_> {
    /// This part of `count` units.
    pub fn share(&self, count: usize) -> std::ops::Range<usize> {
        super::pool::share(count, self.part, self.parts)
    }

    /// The workspace, for positions.
    pub fn indices(&mut self) -> &mut [u32] {
        // SAFETY: of one size and alignment, and every bit pattern is both.
        unsafe { std::slice::from_raw_parts_mut(self.workspace.as_mut_ptr().cast(), self.workspace.len()) }
    }
}
