//! Versions on disk, and what is known of them, across power cuts.
//!
//! A tensor of 64 KiB or more is an object of its own, named by the BLAKE3 digest of its bytes and mapped when it is used: versions share
//! what they have in common. The model file, with the small tensors in it, is an object too. Objects are written, synced, and then
//! renamed to their name; state is one transaction of `redb`. At any instant the store is as before or as after.

mod disk;
mod maintenance;
mod mapping;
mod objects;
#[cfg(test)]
mod power_cut;
mod state;

pub(crate) use maintenance::strip_lost;
pub use maintenance::{Lost, StoreCheck, StoreRepair, check_store, repair_store};
pub(crate) use state::{CandidateRecord, ModelRecord, Trials, VersionRecord};

use crate::{error::StoreError, status::HistoryEntry};
use cutover_backend::Signature;
use cutover_graph::{
    Graph,
    onnx::{self, ImportOptions},
};
use cutover_package::{Manifest, input::Preprocessor};
use disk::{Disk, Local};
use objects::Objects;
use state::State;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Tensors of at least this many bytes are objects of their own.
const LARGE_BYTES: usize = onnx::safetensors::LARGE_BYTES;
const HOLDER: &str = "holder.json";
const LOCK: &str = "lock";
/// Where [`Store::repair`] moves what is damaged.
const DAMAGED: &str = "damaged";

pub(crate) struct Store {
    folder: PathBuf,
    objects: Objects,
    state: State,
    /// Held as long as the store is open.
    lock: Option<Box<dyn Send + Sync>>,
}

pub(crate) fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |source| StoreError::Io { path: path.display().to_string(), source }
}

/// Locks the store in `folder` for this process. The locked file is never replaced nor removed.
fn hold(disk: &dyn Disk, folder: &Path) -> Result<Box<dyn Send + Sync>, StoreError> {
    let path = folder.join(LOCK);
    disk.lock(&path).map_err(io_error(&path))?.ok_or_else(|| {
        // Written by the holder a moment after it took the lock.
        let holder: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join(HOLDER)).unwrap_or_default()).unwrap_or_default();
        let holder = match (holder["pid"].as_u64(), holder["command"].as_str()) {
            (Some(pid), Some(command)) => format!(": process {pid} ({command})"),
            (Some(pid), None) => format!(": process {pid}"),
            _ => String::new(),
        };
        StoreError::Held { path: folder.display().to_string(), holder }
    })
}

impl Store {
    /// Opens the store in `folder`, which is made if it is not there. One process holds it at a time.
    pub fn open(folder: &Path) -> Result<Store, StoreError> {
        let store = Store::open_on(Arc::new(Local), folder)?;
        store.announce()?;
        Ok(store)
    }

    fn open_on(disk: Arc<dyn Disk>, folder: &Path) -> Result<Store, StoreError> {
        disk.create_folder(folder).map_err(io_error(folder))?;
        let lock = hold(&*disk, folder)?;
        // Read before anything else is touched: a newer store is left as it is.
        let state = State::open(Arc::clone(&disk), folder)?;
        let objects = Objects::open(disk, &folder.join("objects"))?;
        Ok(Store { folder: folder.to_path_buf(), objects, state, lock: Some(lock) })
    }

    /// Whether there is a store in `folder`. Nothing is opened, and nothing made.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(state::DATABASE).is_file()
    }

    /// Leaves word for whoever finds the store held. It is no part of the store: a power cut may leave it, or none.
    fn announce(&self) -> Result<(), StoreError> {
        let path = self.folder.join(HOLDER);
        let command = std::env::args().next().unwrap_or_default();
        let holder = serde_json::json!({ "pid": std::process::id(), "command": command }).to_string();
        File::create(&path).and_then(|mut f| f.write_all(holder.as_bytes())).map_err(io_error(&path))
    }

    /// Writes what the store does not have yet of `graph`, and gives the record to keep. What would exceed `quota`, in bytes of all objects
    /// together, is refused before any of it is written.
    pub fn add(
        &self,
        graph: &Graph,
        manifest: &Manifest,
        tokenizer: Option<&[u8]>,
        quota: Option<u64>,
    ) -> Result<VersionRecord, StoreError> {
        let large = || {
            let constants = graph.values().filter_map(|(id, _)| graph.constant(id));
            constants.map(|constant| constant.tensor.bytes()).filter(|bytes| bytes.len() >= LARGE_BYTES)
        };
        let place = |constant: &cutover_graph::Constant| {
            let bytes = constant.tensor.bytes();
            (bytes.len() >= LARGE_BYTES).then(|| objects::digest(bytes))
        };
        let model = onnx::encode_with(graph, place)?;
        if let Some(quota) = quota {
            let missing: BTreeMap<String, u64> = large()
                .chain([&model[..]])
                .chain(tokenizer)
                .map(|bytes| (objects::digest(bytes), bytes.len() as u64))
                .filter(|(digest, bytes)| self.objects.size(digest) != *bytes)
                .collect();
            let (needed, stored) = (missing.values().sum(), self.stored_bytes()?);
            if stored.saturating_add(needed) > quota {
                return Err(StoreError::Quota { needed, stored, quota });
            }
        }
        let objects = large().map(|bytes| self.objects.put(bytes)).collect::<Result<BTreeSet<_>, _>>()?;
        let model = self.objects.put(&model)?;
        let tokenizer = tokenizer.map(|bytes| self.objects.put(bytes)).transpose()?;
        self.objects.sync()?;
        Ok(VersionRecord { model, objects, tokenizer, manifest: manifest.clone(), checks: Vec::new() })
    }

    /// Bytes of one object; 0 where it is not there.
    pub fn object_bytes(&self, digest: &str) -> u64 {
        self.objects.size(digest)
    }

    /// Bytes of all objects.
    pub fn stored_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.objects.names()?.iter().map(|name| self.objects.size(name)).sum())
    }

    /// The model of `record`, its tensors mapped; versions share the mappings of what they have in common.
    pub fn load(&self, record: &VersionRecord) -> Result<Graph, StoreError> {
        for digest in record.all_objects() {
            self.objects.check(digest)?;
        }
        let path = self.objects.path(&record.model);
        let model = self.objects.map(&record.model).map_err(io_error(&path))?;
        Ok(onnx::import_files(model, &|name| self.objects.map(name), &ImportOptions::default())?)
    }

    /// How raw requests become inputs of the version of `record`, whose model has the inputs of `signature`.
    pub fn preprocessor(
        &self,
        record: &VersionRecord,
        signature: &Signature,
    ) -> Result<Option<Preprocessor>, StoreError> {
        let described = &record.manifest.preprocessing;
        if described.is_empty() {
            return Ok(None);
        }
        let map = |digest: &String| self.objects.map(digest).map_err(io_error(&self.objects.path(digest)));
        let tokenizer = record.tokenizer.as_ref().map(map).transpose()?;
        Ok(Some(Preprocessor::new(described.clone(), tokenizer.as_ref().map(|bytes| &bytes[..]), |name| {
            signature.input_dtype(name)
        })?))
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

    /// What [`Store::save_answers`] was given last.
    pub fn answers(&self, model: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.state.answers(model)
    }

    /// Keeps what was answered lately, for labels that come after a restart.
    pub fn save_answers(&self, model: &str, answers: &[u8]) -> Result<(), StoreError> {
        self.state.save_answers(model, answers)
    }

    /// Removes objects that no version refers to. What is mapped stays readable until it is unmapped.
    pub fn collect_garbage(&self) -> Result<usize, StoreError> {
        self.objects.retain(&self.used()?)
    }

    /// The objects that versions refer to.
    fn used(&self) -> Result<BTreeSet<String>, StoreError> {
        let models = self.models()?;
        let versions = models.values().flat_map(|m| m.versions.values());
        Ok(versions.flat_map(|v| v.all_objects().cloned()).collect())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Only while the lock is still held: the next holder's word is its own.
        if self.lock.is_some() {
            let _ = fs::remove_file(self.folder.join(HOLDER));
        }
    }
}
