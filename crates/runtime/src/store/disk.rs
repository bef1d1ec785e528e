//! What the store asks of a file system: few enough effects that a test can cut the power between any two.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::Path,
};

/// Effects become visible in the order of the calls, and durable only as each says.
pub(crate) trait Disk: Send + Sync {
    /// Makes `folder` and what it lies in, where they are missing; durable when this returns.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;

    /// Writes a new file, read-only from then on. Its bytes are durable when this returns, its name is not.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Durable once the folder is synced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Durable once the folder is synced.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in `folder` durable.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// The names in `folder`.
    fn list(&self, folder: &Path) -> io::Result<Vec<String>>;

    /// The BLAKE3 digest of a file's bytes.
    fn digest(&self, path: &Path) -> io::Result<blake3::Hash>;
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

    fn digest(&self, path: &Path) -> io::Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(hasher.finalize())
    }
}
