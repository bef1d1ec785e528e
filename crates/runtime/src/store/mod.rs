//! Versions on disk, and what is known of them, across power cuts.
//!
//! A tensor of 64 KiB or more is an object of its own, named by the BLAKE3 digest of its bytes and mapped when it is used: versions share
//! what they have in common. The model file, with the small tensors in it, is an object too. Objects are written, synced, and then
//! renamed to their name; state is one transaction of `redb`. At any instant the store is as before or as after.

mod disk;
mod objects;
#[cfg(test)]
mod power_cut;
mod state;

pub(crate) use state::{CandidateRecord, ModelRecord, VersionRecord};

use crate::{error::StoreError, status::HistoryEntry};
use cutover_graph::{
    Graph,
    onnx::{self, ImportOptions},
};
use cutover_package::Manifest;
use disk::{Disk, Local};
use objects::Objects;
use redb::Database;
use state::State;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Tensors of at least this many bytes are objects of their own.
const LARGE_BYTES: usize = onnx::safetensors::LARGE_BYTES;
const HOLDER: &str = "holder.json";
const LOCK: &str = "lock";

pub(crate) struct Store {
    folder: PathBuf,
    objects: Objects,
    state: State,
    /// Held as long as the store is open; the system lets go of it when the process ends in whatever way.
    _lock: Option<File>,
}

pub(crate) fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Io { path: path.display().to_string(), source }
}

/// Locks the store in `folder` for this process. The locked file is never replaced nor removed.
fn hold(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join(LOCK);
    let file = File::options().create(true).write(true).truncate(false).open(&path).map_err(io_error(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let holder = fs::read_to_string(folder.join(HOLDER)).unwrap_or_default();
            let holder = if holder.is_empty() { String::new() } else { format!(": {}", holder.trim()) };
            Err(StoreError::Held { path: folder.display().to_string(), holder })
        }
        Err(TryLockError::Error(source)) => Err(StoreError::Io { path: path.display().to_string(), source }),
    }
}

impl Store {
    /// Opens the store in `folder`, which is made if it is not there. One process holds it at a time.
    pub fn open(folder: &Path) -> Result<Store, StoreError> {
        Local.create_folder(folder).map_err(io_error(folder))?;
        let lock = hold(folder)?;
        let state = State::open(&Local, folder, |path| Database::create(path))?;
        let mut store = Store::of(Arc::new(Local), folder, state)?;
        store._lock = Some(lock);
        store.announce(&format!("{{\"pid\":{}}}", std::process::id()))?;
        Ok(store)
    }

    /// Whether there is a store in `folder`. Nothing is opened, and nothing made.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(state::DATABASE).is_file()
    }

    fn of(disk: Arc<dyn Disk>, folder: &Path, state: State) -> Result<Store, StoreError> {
        let objects = Objects::open(disk, &folder.join("objects"))?;
        Ok(Store { folder: folder.to_path_buf(), objects, state, _lock: None })
    }

    /// Leaves word for whoever finds the store held: JSON.
    pub fn announce(&self, holder: &str) -> Result<(), StoreError> {
        let path = self.folder.join(HOLDER);
        File::create(&path).and_then(|mut f| f.write_all(holder.as_bytes())).map_err(io_error(&path))
    }

    /// Writes what the store does not have yet of `graph`, and gives the record to keep.
    pub fn add(&self, graph: &Graph, manifest: &Manifest) -> Result<VersionRecord, StoreError> {
        let mut objects = BTreeSet::new();
        for (id, _) in graph.values() {
            let Some(constant) = graph.constant(id) else { continue };
            let bytes = constant.tensor.bytes();
            if bytes.len() >= LARGE_BYTES {
                objects.insert(self.objects.put(bytes)?);
            }
        }
        let place = |constant: &cutover_graph::Constant| {
            let bytes = constant.tensor.bytes();
            (bytes.len() >= LARGE_BYTES).then(|| objects::digest(bytes))
        };
        let model = self.objects.put(&onnx::encode_with(graph, place)?)?;
        self.objects.sync()?;
        Ok(VersionRecord { model, objects, manifest: manifest.clone() })
    }

    /// The model of `record`, its tensors mapped.
    pub fn load(&self, record: &VersionRecord) -> Result<Graph, StoreError> {
        for digest in record.objects.iter().chain([&record.model]) {
            self.objects.check(digest)?;
        }
        Ok(onnx::import(&self.objects.path(&record.model), &ImportOptions::default())?)
    }

    pub fn models(&self) -> Result<BTreeMap<String, ModelRecord>, StoreError> {
        self.state.models()
    }

    /// Makes `record` the state of `model`, and adds `entry` to the history, together: both are durable when this returns.
    pub fn save(&self, model: &str, record: &ModelRecord, entry: Option<&HistoryEntry>) -> Result<(), StoreError> {
        self.state.save(model, record, entry)
    }

    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, StoreError> {
        self.state.history(model)
    }

    /// Removes objects that no version refers to. What is mapped stays readable until it is unmapped.
    pub fn collect_garbage(&self) -> Result<usize, StoreError> {
        let models = self.models()?;
        let versions = models.values().flat_map(|m| m.versions.values());
        let used = versions.flat_map(|v| v.objects.iter().chain([&v.model]).cloned()).collect();
        self.objects.retain(&used)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.folder.join(HOLDER));
    }
}
