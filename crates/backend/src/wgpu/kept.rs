//! Compiled kernels on disk, in the user's cache folder, so that the next process need not compile them. Whoever deletes them loses time.
//!
//! One file for each device, driver, set of features and version of this crate; which kernel is which the driver knows by its text. A file is
//! written whole under another name first, and begins with a digest of the rest: what is torn or of another hand is not read.

use ::wgpu as api;
use cutover_graph::Identity;
use cutover_tensor::{DType, Tensor};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::SystemTime,
};

/// A larger cache is not written.
const FILE_BYTES: usize = 64 << 20;
/// Files of other devices, drivers and versions that stay; the oldest go first.
const FILES: usize = 8;
const DIGEST_BYTES: usize = 32;

/// Where what is kept of `what` for this device is; `None` where the user has no cache folder.
pub(super) fn path_of(what: &str, info: &api::AdapterInfo, features: api::Features) -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = match std::env::consts::OS {
        "windows" => folder("LOCALAPPDATA"),
        "macos" => folder("HOME").map(|home| home.join("Library/Caches")),
        _ => folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache"))),
    };
    let key = Identity::derived(&format!("{info:?} {features:?} {}", env!("CARGO_PKG_VERSION")), &[]);
    let name: String = key.0[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    Some(cache?.join("cutover").join(what).join(name))
}

/// What [`write`] wrote there, if it is whole.
pub(super) fn read(path: &Path) -> Option<Vec<u8>> {
    let length = fs::metadata(path).ok()?.len();
    if length > (FILE_BYTES + DIGEST_BYTES) as u64 {
        return None;
    }
    let bytes = fs::read(path).ok()?;
    let (digest, data) = bytes.split_at_checked(DIGEST_BYTES)?;
    (digest == digest_of(data)?).then(|| data.to_vec())
}

/// # Errors
/// The disk's. More than fits is not written.
pub(super) fn write(path: &Path, data: &[u8]) -> io::Result<()> {
    let (Some(folder), Some(digest)) = (path.parent(), digest_of(data)) else { return Ok(()) };
    if data.len() > FILE_BYTES {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    // Of this write alone, whoever else writes.
    static WRITES: AtomicUsize = AtomicUsize::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let unfinished = path.with_extension(format!("{}.{number}.new", std::process::id()));
    let written = fs::write(&unfinished, [&digest[..], data].concat()).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written?;
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    let excess = files.len().saturating_sub(FILES);
    files.drain(..excess).try_for_each(|(_, path)| fs::remove_file(path))
}

fn digest_of(data: &[u8]) -> Option<[u8; DIGEST_BYTES]> {
    Some(Identity::of_tensor(&Tensor::from_bytes(DType::U8, [data.len()], data).ok()?).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_torn_is_not_read() {
        let folder = std::env::temp_dir().join(format!("cutover-kernels-{}", std::process::id()));
        let path = folder.join("a");
        assert_eq!(read(&path), None);
        write(&path, b"kernels").unwrap();
        assert_eq!(read(&path).as_deref(), Some(&b"kernels"[..]));
        let whole = fs::read(&path).unwrap();
        for torn in [&whole[..0], &whole[..20], &whole[..whole.len() - 1]] {
            fs::write(&path, torn).unwrap();
            assert_eq!(read(&path), None);
        }
        for name in 0..2 * FILES {
            write(&folder.join(format!("{name}")), b"others").unwrap();
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), FILES);
        fs::remove_dir_all(&folder).unwrap();
    }
}
