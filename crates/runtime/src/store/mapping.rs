//! Objects as shared bytes.
#![allow(unsafe_code)] // memory mapping

use cutover_tensor::Buffer;
use std::{fs::File, io, sync::Arc};

/// Maps a file of the store.
pub(super) fn map(file: &File) -> io::Result<Arc<Buffer>> {
    if file.metadata()?.len() == 0 {
        return Ok(Arc::new(Buffer::from_owner(Vec::new())));
    }
    // SAFETY: the bytes are only read. Objects are written once, before they have their name, and are read-only from then on; the store
    // removes them and never truncates or overwrites them, and whoever else writes into its folder breaks what it says of itself.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(Arc::new(Buffer::from_owner(map)))
}
