//! Bytes that tensors are views of: owned and 64-byte aligned, or borrowed from whoever maps or holds them.
#![allow(unsafe_code)] // raw allocation with an alignment, and views into an owner that the buffer keeps alive

use memmap2::MmapMut;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::{Deref, Range},
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
    Shared(Box<dyn StableBytes>),
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

    /// Hints that nobody needs these of the bytes for now; see [`StableBytes::give_back`].
    pub fn give_back(&self, bytes: Range<usize>) {
        if let Owner::Shared(owner) = &self.owner {
            owner.give_back(bytes);
        }
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

    /// Lets go of the memory that holds these of the bytes, if they can be had again when they are read.
    fn give_back(&self, _bytes: Range<usize>) {}
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

    #[cfg(unix)]
    fn give_back(&self, bytes: Range<usize>) {
        // SAFETY: the mapping is of a file and only read: pages that go are those of the file again when they are read.
        let _ = unsafe { self.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
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

    #[test]
    fn what_was_given_back_is_there_when_it_is_read() {
        let path = std::env::temp_dir().join(format!("cutover-buffer-{}", std::process::id()));
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        // SAFETY: nobody else knows the file.
        let map = unsafe { memmap2::Mmap::map(&std::fs::File::open(&path).unwrap()) }.unwrap();
        std::fs::remove_file(&path).unwrap();
        for buffer in [Buffer::from_owner(map), Buffer::from_owner(bytes.clone()), Buffer::copy_of(&bytes)] {
            [0..100_000, 5..50_000, 99_999..100_000, 7..7].into_iter().for_each(|range| buffer.give_back(range));
            assert!(*buffer == *bytes);
        }
    }
}
