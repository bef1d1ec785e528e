//! Files named by the digest of their bytes.

use super::{disk::Disk, io_error};
use crate::error::StoreError;
use cutover_tensor::Buffer;
use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

/// Ends the names of files that are being written.
const TEMPORARY: &str = ".tmp";

pub(super) struct Objects {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    temporary: AtomicU64,
    /// An object is mapped once, however many versions use it.
    mapped: Mutex<HashMap<String, Weak<Buffer>>>,
}

/// What an object of these bytes is called.
pub(super) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

impl Objects {
    /// Opens the folder, and removes what a power cut left half-written.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path) -> Result<Objects, StoreError> {
        disk.create_folder(folder).map_err(io_error(folder))?;
        let objects =
            Objects { disk, folder: folder.to_path_buf(), temporary: AtomicU64::new(0), mapped: Mutex::default() };
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
        // Whoever maps it from here on gets the new file.
        self.lock().remove(&digest);
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

    /// An object's bytes.
    pub fn map(&self, digest: &str) -> std::io::Result<Arc<Buffer>> {
        let mut mapped = self.lock();
        if let Some(buffer) = mapped.get(digest).and_then(Weak::upgrade) {
            return Ok(buffer);
        }
        let buffer = self.disk.map(&self.path(digest))?;
        mapped.retain(|_, buffer| buffer.strong_count() > 0);
        mapped.insert(digest.to_string(), Arc::downgrade(&buffer));
        Ok(buffer)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Weak<Buffer>>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of one object; 0 where it is not there.
    pub fn size(&self, digest: &str) -> u64 {
        self.disk.size(&self.path(digest)).unwrap_or(0)
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

    /// Moves an object to `folder`, where somebody may still look at it.
    pub fn move_to(&self, digest: &str, folder: &Path) -> Result<(), StoreError> {
        let (from, to) = (self.path(digest), folder.join(digest));
        self.disk.create_folder(folder).map_err(io_error(folder))?;
        self.disk.rename(&from, &to).map_err(io_error(&from))?;
        self.lock().remove(digest);
        self.disk.sync_folder(folder).map_err(io_error(folder))?;
        self.sync()
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

    #[test]
    fn an_object_is_mapped_once_and_let_go() {
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects::open(Arc::new(Local), folder.path()).unwrap();
        let (a, empty) = (objects.put(b"bytes").unwrap(), objects.put(b"").unwrap());
        let first = objects.map(&a).unwrap();
        assert!(Arc::ptr_eq(&first, &objects.map(&a).unwrap()));
        assert_eq!((&first[..], objects.map(&empty).unwrap().len()), (&b"bytes"[..], 0));
        drop(first);
        assert!(objects.lock()[&a].upgrade().is_none());
    }
}
