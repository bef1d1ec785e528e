//! Compiled kernels on disk, and which of several was fastest: a file for each, by what it was made of and for.
//!
//! A file that is torn, or of something else, is as good as none. Nothing depends on the folder: it may be deleted at any time.

use cutover_graph::Identity;
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

/// What all files together take at most; the ones that were used longest ago go first.
const BYTES_KEPT: u64 = 256 << 20;

const MAGIC: &[u8; 8] = b"cutover1";

/// A folder of compiled kernels.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    bytes_kept: u64,
}

/// What a file is found by: everything that its content follows from.
pub(super) fn key(source: &str, capability: i32, driver: i32, compiler: i32, contracts: bool) -> String {
    let of = format!("{contracts} {capability} {driver} {compiler} {} {source}", env!("CARGO_PKG_VERSION"));
    Identity::derived(&of, &[]).0.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Cache {
    pub fn new(folder: PathBuf) -> Cache {
        Cache { folder, bytes_kept: BYTES_KEPT }
    }

    /// Whether there is a folder to keep anything in.
    pub fn can_keep(&self) -> bool {
        fs::create_dir_all(&self.folder).is_ok()
    }

    /// What was kept under `key`; `None` for nothing, or nothing whole.
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key);
        let content = whole(fs::read(&path).ok()?)?;
        // When it was last used, as far as the file system keeps that.
        let _ = fs::File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(content)
    }

    /// Keeps `content`. Where the disk refuses, nothing is kept.
    pub fn put(&self, key: &str, content: &[u8]) {
        if let Err(error) = self.write(key, content) {
            tracing::debug!("a compiled kernel is not kept in {}: {error}", self.folder.display());
        }
    }

    fn write(&self, key: &str, content: &[u8]) -> io::Result<()> {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.folder)?;
        let name = format!("{}-{}.part", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
        let part = self.folder.join(name);
        let digest = blake3::hash(content);
        let written = fs::write(&part, [MAGIC.as_slice(), digest.as_bytes(), content].concat());
        let written = written.and_then(|()| fs::rename(&part, self.path(key)));
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written?;
        self.evict()
    }

    /// Removes what is more than may be kept, and parts that nobody finished.
    fn evict(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let path = entry.path();
            let Ok(metadata) = entry.metadata() else { continue };
            let age = metadata.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("kernel") => files.push((age, metadata.len(), path)),
                Some("part") if age.as_secs() > 3600 => fs::remove_file(path)?,
                _ => {}
            }
        }
        files.sort();
        let mut total = 0;
        for (_, bytes, path) in files {
            total += bytes;
            if total > self.bytes_kept {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(Path::new(key).with_extension("kernel"))
    }
}

fn whole(file: Vec<u8>) -> Option<Vec<u8>> {
    let rest = file.strip_prefix(MAGIC.as_slice())?;
    let (digest, content) = rest.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(content).as_bytes() == digest).then(|| content.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("cutover-cache-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn what_is_kept_comes_back_and_what_is_torn_does_not() {
        let folder = folder("torn");
        let cache = Cache::new(folder.clone());
        let key = key("kernel", 90, 13000, 13000, false);
        assert_eq!(cache.get(&key), None);
        assert!(cache.can_keep() && !Cache::new("/dev/null/cutover".into()).can_keep());
        cache.put(&key, b"image");
        assert_eq!(cache.get(&key).as_deref(), Some(b"image".as_slice()));
        let path = cache.path(&key);
        let bytes = fs::read(&path).unwrap();
        for length in [0, 7, 8, 20, 40, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            assert_eq!(cache.get(&key), None, "{length} bytes of {}", bytes.len());
        }
        cache.put(&key, b"image");
        assert_eq!(cache.get(&key).as_deref(), Some(b"image".as_slice()));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let folder = folder("old");
        let cache = Cache { folder: folder.clone(), bytes_kept: 3 * 48 };
        let hour = std::time::Duration::from_secs(3600);
        for (at, name) in ["a", "b", "c"].into_iter().enumerate() {
            cache.put(name, b"image...");
            let file = fs::File::open(cache.path(name)).unwrap();
            file.set_modified(SystemTime::now() - hour * (3 - at as u32)).unwrap();
        }
        assert!(cache.get("a").is_some());
        cache.put("d", b"image...");
        let kept = ["a", "b", "c", "d"].map(|name| cache.get(name).is_some());
        assert_eq!(kept, [true, false, true, true]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn another_device_driver_compiler_or_source_is_another_kernel() {
        let keys = [
            key("a", 90, 13000, 13000, true),
            key("a", 90, 13000, 13000, false),
            key("b", 90, 13000, 13000, false),
            key("a", 75, 13000, 13000, false),
            key("a", 90, 13010, 13000, false),
            key("a", 90, 13000, 12080, false),
        ];
        for (at, one) in keys.iter().enumerate() {
            assert!(keys[..at].iter().all(|other| other != one));
        }
    }
}
