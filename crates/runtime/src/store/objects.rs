//! Files named by the digest of their bytes.

use super::io_error;
use crate::error::StoreError;
use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

pub(super) struct Objects {
    folder: PathBuf,
    temporary: AtomicU64,
}

/// What an object of these bytes is called.
pub(super) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Makes the names in `folder` durable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(io_error(folder))
}

/// Makes `folder` if it is not there, durably.
pub(super) fn create_folder(folder: &Path) -> Result<(), StoreError> {
    if !folder.is_dir() {
        fs::create_dir_all(folder).map_err(io_error(folder))?;
        for parent in folder.ancestors().skip(1).take_while(|parent| !parent.as_os_str().is_empty()) {
            // A folder that may be entered but not read can't be synced by us.
            if sync_folder(parent).is_err() {
                break;
            }
        }
    }
    Ok(())
}

impl Objects {
    /// Opens the folder, and removes what a power cut left half-written.
    pub fn open(folder: &Path) -> Result<Objects, StoreError> {
        create_folder(folder)?;
        for entry in fs::read_dir(folder).map_err(io_error(folder))? {
            let path = entry.map_err(io_error(folder))?.path();
            if path.extension().is_some_and(|e| e == "tmp") {
                fs::remove_file(&path).map_err(io_error(&path))?;
            }
        }
        Ok(Objects { folder: folder.to_path_buf(), temporary: AtomicU64::new(0) })
    }

    pub fn path(&self, digest: &str) -> PathBuf {
        self.folder.join(digest)
    }

    /// Writes `bytes` unless they are there, and gives their digest. The name appears only once all bytes are on the disk; that the
    /// name itself is, [`Objects::sync`] sees to.
    pub fn put(&self, bytes: &[u8]) -> Result<String, StoreError> {
        let digest = digest(bytes);
        let path = self.path(&digest);
        // A name is no proof of its bytes: a damaged object is written again.
        if self.check(&digest).is_ok() {
            return Ok(digest);
        }
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.folder.join(format!("{number}.tmp"));
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary)?;
            file.write_all(bytes)?;
            // Mapped while it is in use: nobody is to write to it by accident.
            let mut permissions = file.metadata()?.permissions();
            permissions.set_readonly(true);
            file.set_permissions(permissions)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&temporary);
            StoreError::Io { path: path.display().to_string(), source }
        })?;
        Ok(digest)
    }

    /// Makes the names of all objects durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        sync_folder(&self.folder)
    }

    /// Reads an object through and compares it with its name.
    pub fn check(&self, digest: &str) -> Result<(), StoreError> {
        let damaged = |message: String| StoreError::Damaged { digest: digest.to_string(), message };
        let mut hasher = blake3::Hasher::new();
        let read = File::open(self.path(digest)).and_then(|file| hasher.update_reader(file).map(|_| ()));
        read.map_err(|e| damaged(e.to_string()))?;
        let actual = hasher.finalize().to_hex();
        if actual.as_str() == digest { Ok(()) } else { Err(damaged(format!("its bytes have digest {actual}"))) }
    }

    /// Removes every object but those in `used`; gives how many went.
    pub fn retain(&self, used: &BTreeSet<String>) -> Result<usize, StoreError> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.folder).map_err(io_error(&self.folder))? {
            let entry = entry.map_err(io_error(&self.folder))?;
            if !entry.file_name().to_str().is_some_and(|name| used.contains(name)) {
                fs::remove_file(entry.path()).map_err(io_error(&entry.path()))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_written_once_checked_and_collected() {
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects::open(folder.path()).unwrap();
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
        Objects::open(folder.path()).unwrap().check(&a).unwrap();
        assert!(!folder.path().join("7.tmp").exists());
    }
}
