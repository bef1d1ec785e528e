//! Files named by the digest of their bytes.

use super::{disk::Disk, io_error};
use crate::error::StoreError;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Ends the names of files that are being written.
const TEMPORARY: &str = ".tmp";

pub(super) struct Objects {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    temporary: AtomicU64,
}

/// What an object of these bytes is called.
pub(super) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

impl Objects {
    /// Opens the folder, and removes what a power cut left half-written.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path) -> Result<Objects, StoreError> {
        disk.create_folder(folder).map_err(io_error(folder))?;
        let objects = Objects { disk, folder: folder.to_path_buf(), temporary: AtomicU64::new(0) };
        for name in objects.names()?.iter().filter(|name| name.ends_with(TEMPORARY)) {
            objects.remove(name)?;
        }
        Ok(objects)
    }

    pub fn path(&self, digest: &str) -> PathBuf {
        self.folder.join(digest)
    }

    /// Writes `bytes` unless they are there, and gives their digest. The name appears only once all bytes are on the disk; that the
    /// name itself is, [`Objects::sync`] sees to.
    pub fn put(&self, bytes: &[u8]) -> Result<String, StoreError> {
        let digest = digest(bytes);
        // A name is no proof of its bytes: a damaged object is written again.
        if self.check(&digest).is_ok() {
            return Ok(digest);
        }
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let (temporary, path) = (self.path(&format!("{number}{TEMPORARY}")), self.path(&digest));
        let written = self.disk.write(&temporary, bytes).and_then(|()| self.disk.rename(&temporary, &path));
        written.map_err(|error| {
            let _ = self.disk.remove(&temporary);
            io_error(&path)(error)
        })?;
        Ok(digest)
    }

    /// Makes the names of all objects durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.disk.sync_folder(&self.folder).map_err(io_error(&self.folder))
    }

    /// Reads an object through and compares it with its name.
    pub fn check(&self, digest: &str) -> Result<(), StoreError> {
        let damaged = |message: String| StoreError::Damaged { digest: digest.to_string(), message };
        let actual = self.disk.digest(&self.path(digest)).map_err(|e| damaged(e.to_string()))?.to_hex();
        if actual.as_str() == digest { Ok(()) } else { Err(damaged(format!("its bytes have digest {actual}"))) }
    }

    /// Removes every object but those in `used`; gives how many went.
    pub fn retain(&self, used: &BTreeSet<String>) -> Result<usize, StoreError> {
        let mut removed = 0;
        for name in self.names()?.iter().filter(|name| !used.contains(*name)) {
            self.remove(name)?;
            removed += 1;
        }
        Ok(removed)
    }

    pub(super) fn names(&self) -> Result<Vec<String>, StoreError> {
        self.disk.list(&self.folder).map_err(io_error(&self.folder))
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name);
        self.disk.remove(&path).map_err(io_error(&path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::Local;
    use std::fs;

    #[test]
    fn objects_are_written_once_checked_and_collected() {
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects::open(Arc::new(Local), folder.path()).unwrap();
        let a = objects.put(b"a").unwrap();
        let modified = fs::metadata(objects.path(&a)).unwrap().modified().unwrap();
        let b = objects.put(b"b").unwrap();
        assert_eq!(objects.put(b"a").unwrap(), a);
        assert_eq!(fs::metadata(objects.path(&a)).unwrap().modified().unwrap(), modified);
        objects.check(&a).unwrap();
        fs::remove_file(objects.path(&b)).unwrap();
        fs::write(objects.path(&b), b"c").unwrap();
        assert!(matches!(objects.check(&b), Err(StoreError::Damaged { .. })));
        objects.put(b"b").unwrap();
        objects.check(&b).unwrap();
        assert_eq!(objects.retain(&BTreeSet::from([a.clone()])).unwrap(), 1);
        assert!(matches!(objects.check(&b), Err(StoreError::Damaged { .. })));
        fs::write(folder.path().join("7.tmp"), b"half").unwrap();
        Objects::open(Arc::new(Local), folder.path()).unwrap().check(&a).unwrap();
        assert!(!folder.path().join("7.tmp").exists());
    }
}
