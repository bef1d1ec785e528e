//! Files as shared bytes, mapped or read.
#![allow(unsafe_code)] // memory mapping

use crate::ImportError;
use cutover_tensor::Buffer;
use prost::bytes::Bytes;
use std::{fs::File, io::Read, path::Path, sync::Arc};

/// The bytes of a file, which every tensor in it is a view of.
#[derive(Clone)]
pub(super) struct FileBytes(pub Arc<Buffer>);

impl AsRef<[u8]> for FileBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl FileBytes {
    pub fn open(path: &Path, map: bool, limit: u64) -> Result<FileBytes, ImportError> {
        let io = |source| ImportError::Io { path: path.display().to_string(), source };
        let mut file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(io(std::io::Error::other("not a regular file")));
        }
        let len = metadata.len();
        if len > limit {
            let place = path.display().to_string();
            return Err(ImportError::Limit { place, what: "the file's size in bytes", actual: len, limit });
        }
        if map && len > 0 {
            // SAFETY: the bytes are only read. That nobody truncates or overwrites the file while it is mapped is the
            // caller's promise: `ImportOptions::map` says so, and a host maps only files that its store owns.
            let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
            return Ok(FileBytes(Arc::new(Buffer::from_owner(map))));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        file.by_ref().take(limit).read_to_end(&mut bytes).map_err(io)?;
        Ok(FileBytes(Arc::new(Buffer::from_owner(bytes))))
    }

    pub fn of(bytes: Bytes) -> FileBytes {
        FileBytes(Arc::new(Buffer::from_owner(Arc::new(bytes))))
    }

    /// For decoding: every slice of it stays a view.
    pub fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.clone())
    }

    /// Where `part`, a slice of [`FileBytes::bytes`], begins; `None` where it lies elsewhere.
    pub fn offset_of(&self, part: &[u8]) -> Option<usize> {
        let offset = (part.as_ptr() as usize).checked_sub(self.0.as_ptr() as usize)?;
        (offset.checked_add(part.len())? <= self.0.len()).then_some(offset)
    }
}
