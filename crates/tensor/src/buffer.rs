//! Bytes that tensors are views of: owned and 64-byte aligned, or borrowed from whoever maps or holds them.
#![allow(unsafe_code)] // raw allocation with an alignment, and views into an owner that the buffer keeps alive

use memmap2::MmapMut;
use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    any::Any,
    fmt,
    ops::Deref,
    ptr::NonNull,
};

/// Alignment of owned buffers, in bytes: one AVX-512 register, one cache line.
pub const ALIGNMENT: usize = 64;

/// Owned buffers from this length on are mappings of their own: the system has their memory back at once when they go, where an allocator
/// would keep it or hold the hole. The weights of a version that comes and goes leave no trace.
const MAPPED_FROM: usize = 256 << 10;

/// Immutable bytes with an owner. Shared as `Arc<Buffer>`.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
}

enum Owner {
    /// Allocated here with [`ALIGNMENT`].
    Heap,
    /// Anonymous memory, mapped here; kept so that `start` stays valid.
    Mapped(#[allow(dead_code)] MmapMut),
    /// Kept only so that `start` stays valid: a mapping, a `Bytes`, a `Vec`.
    Shared(#[allow(dead_code)] Box<dyn Any + Send + Sync>),
}

// SAFETY: the bytes are never written through a shared `Buffer`, and both owners may be dropped on any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above; `&Buffer` gives out only `&[u8]`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes, 64-byte aligned.
    pub fn zeroed(len: usize) -> Buffer {
        Self::try_zeroed(len).unwrap_or_else(|| handle_alloc_error(Self::layout(len)))
    }

    /// As [`Buffer::zeroed`]; `None` where the system has no such memory. For lengths that a model decides.
    pub fn try_zeroed(len: usize) -> Option<Buffer> {
        if len == 0 {
            return Some(Buffer { start: NonNull::<Aligned>::dangling().cast(), len: 0, owner: Owner::Heap });
        }
        if len >= MAPPED_FROM {
            let mut map = MmapMut::map_anon(len).ok()?;
            return Some(Buffer { start: NonNull::new(map.as_mut_ptr())?, len, owner: Owner::Mapped(map) });
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc_zeroed(layout) };
        NonNull::new(start).map(|start| Buffer { start, len, owner: Owner::Heap })
    }

    /// A 64-byte aligned copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::zeroed(bytes.len());
        buffer.as_mut_owned().expect("just allocated here").copy_from_slice(bytes);
        buffer
    }

    /// The bytes of `owner`, not copied: a memory mapping, a `bytes::Bytes`, a `Vec<u8>`. The owner's bytes must stay where
    /// they are while it is moved, which `StableBytes` types do.
    pub fn from_owner<T: StableBytes>(owner: T) -> Buffer {
        let owner = Box::new(owner);
        let bytes: &[u8] = owner.stable_bytes();
        let start = NonNull::from(bytes).cast();
        let len = bytes.len();
        Buffer { start, len, owner: Owner::Shared(owner) }
    }

    /// The bytes for writing, where this buffer allocated them itself.
    pub fn as_mut_owned(&mut self) -> Option<&mut [u8]> {
        if let Owner::Shared(_) = self.owner {
            return None;
        }
        // SAFETY: `start` is a live allocation or mapping of `len` bytes, and `&mut self` makes this the only view.
        Some(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, ALIGNMENT).expect("a length below isize::MAX")
    }
}

#[repr(align(64))]
struct Aligned(#[allow(dead_code)] u8);

/// Owners whose bytes don't move when the owner does.
///
/// Sealed to types this is known of; wrap others in an `Arc`.
pub trait StableBytes: Send + Sync + 'static {
    fn stable_bytes(&self) -> &[u8];
}

impl StableBytes for Vec<u8> {
    fn stable_bytes(&self) -> &[u8] {
        self
    }
}
impl StableBytes for memmap2::Mmap {
    fn stable_bytes(&self) -> &[u8] {
        self
    }
}
impl<T: AsRef<[u8]> + Send + Sync + 'static> StableBytes for std::sync::Arc<T> {
    fn stable_bytes(&self) -> &[u8] {
        self.as_ref().as_ref()
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start + len` is valid while the owner lives, and the owner lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Owner::Heap, 1..) = (&self.owner, self.len) {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocated_and_mapped_bytes_are_zero_aligned_and_writable() {
        for len in [0, 1, 63, MAPPED_FROM - 1, MAPPED_FROM, MAPPED_FROM + 1] {
            let mut buffer = Buffer::zeroed(len);
            assert!(buffer.len() == len && buffer.iter().all(|&b| b == 0));
            assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGNMENT));
            buffer.as_mut_owned().unwrap().fill(7);
            assert!(Buffer::copy_of(&buffer).iter().all(|&b| b == 7));
        }
        assert!(Buffer::try_zeroed(isize::MAX as usize - ALIGNMENT).is_none());
        assert!(Buffer::from_owner(vec![1u8]).as_mut_owned().is_none());
    }
}
