//! What the store asks of a file system: the one seam of everything that is written, synced, renamed, mapped or locked, few enough effects
//! that a test can cut the power, or fail, at every one of them.

use super::mapping;
use cutover_tensor::Buffer;
use redb::{BackendError, StorageBackend, backends::FileBackend};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    ops::Bound,
    path::Path,
    sync::Arc,
};

/// Effects become visible in the order of the calls, and durable only as each says.
pub(crate) trait Disk: Send + Sync {
    /// Makes `folder` and what it lies in, where they are missing; durable when this returns.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;

    /// Locks `path`, which is made where it is missing, for whoever holds what is returned; `None` where somebody else does.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>>;

    /// Writes a new file, read-only from then on. Its bytes are durable when this returns, its name is not.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Durable once the folder is synced, or both are.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Durable once the folder is synced.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in `folder` durable.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// The names in `folder`.
    fn list(&self, folder: &Path) -> io::Result<Vec<String>>;

    /// Bytes of a file.
    fn size(&self, path: &Path) -> io::Result<u64>;

    /// The BLAKE3 digest of a file's bytes.
    fn digest(&self, path: &Path) -> io::Result<blake3::Hash>;

    /// The bytes of a file that nobody writes to any more.
    fn map(&self, path: &Path) -> io::Result<Arc<Buffer>>;

    /// The file of a database, made where it is missing: its reads, writes, syncs and locks.
    fn database(&self, path: &Path) -> io::Result<DatabaseFile>;
}

/// The file system of this machine.
pub(crate) struct Local;

impl Disk for Local {
    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        if folder.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(folder)?;
        for parent in folder.ancestors().skip(1).take_while(|parent| !parent.as_os_str().is_empty()) {
            // A folder that may be entered but not read can't be synced by us.
            if self.sync_folder(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Send + Sync>>> {
        let file = File::options().create(true).write(true).truncate(false).open(path)?;
        match file.try_lock() {
            // The system lets go of it when the process ends in whatever way.
            Ok(()) => Ok(Some(Box::new(file))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        file.write_all(bytes)?;
        // Mapped while it is in use: nobody is to write to it by accident.
        let mut permissions = file.metadata()?.permissions();
        permissions.set_readonly(true);
        file.set_permissions(permissions)?;
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        // A name that is no UTF-8 is none of the store's, and is shown as such.
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn digest(&self, path: &Path) -> io::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(hasher.finalize())
    }

    fn map(&self, path: &Path) -> io::Result<Arc<Buffer>> {
        mapping::map(&File::open(path)?)
    }

    fn database(&self, path: &Path) -> io::Result<DatabaseFile> {
        let file = File::options().create(true).read(true).write(true).truncate(false).open(path)?;
        let backend = FileBackend::new(file).map_err(io::Error::other)?;
        Ok(DatabaseFile(Box::new(backend)))
    }
}

/// A database's file, whatever disk it lies on.
#[derive(Debug)]
pub(crate) struct DatabaseFile(pub Box<dyn StorageBackend>);

impl StorageBackend for DatabaseFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.query_lock_range(start, end)
    }
}
