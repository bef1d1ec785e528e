//! What steps made, kept by what they were made from: a rerun finds it, and so does a run that was killed.

use super::Detail;
use cutover_graph::Graph;
use cutover_graph::onnx::{ImportOptions, import_bytes};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::SystemTime,
};

/// Entries that are kept; those written longest ago go first.
const ENTRIES_MAX: usize = 128;

const MODEL: &str = "model.onnx";
const STEP: &str = "step.json";

/// A folder of finished steps, or none.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    folder: Option<PathBuf>,
}

/// `step.json`: written last, so that an entry that has it is whole.
#[derive(Serialize, Deserialize)]
struct Entry {
    /// BLAKE3 of the model, where the step made one.
    model: Option<String>,
    detail: Detail,
}

/// The name of an entry: a digest of all that a step's result depends on.
#[derive(Clone, Debug)]
pub(super) struct Key(blake3::Hasher);

impl Key {
    /// Begins with this program: another build's results are not this one's.
    pub fn new() -> Key {
        static PROGRAM: OnceLock<[u8; 32]> = OnceLock::new();
        let program = PROGRAM.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
            // Where it can't be read, the version has to do.
            if let Ok(file) = std::env::current_exe().and_then(fs::File::open) {
                let _ = hasher.update_reader(file);
            }
            *hasher.finalize().as_bytes()
        });
        Key(blake3::Hasher::new()).and(program)
    }

    /// With this part too; parts do not run into each other.
    pub fn and(mut self, part: &[u8]) -> Key {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    pub fn name(&self) -> String {
        self.0.finalize().to_hex()[..32].to_string()
    }
}

impl Cache {
    /// In `folder`, which is made when something is written.
    pub fn new(folder: impl Into<PathBuf>) -> Cache {
        Cache { folder: Some(folder.into()) }
    }

    /// Keeps nothing.
    pub fn none() -> Cache {
        Cache::default()
    }

    /// A folder that belongs to the step of `key` while it runs.
    pub(super) fn work(&self, key: &Key) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{}.work", key.name())))
    }

    /// What the step of `key` made. An entry that is not whole is none.
    pub(super) fn load(&self, key: &Key) -> Option<(Option<Graph>, Detail)> {
        let folder = self.folder.as_ref()?.join(key.name());
        let entry: Entry = serde_json::from_slice(&fs::read(folder.join(STEP)).ok()?).ok()?;
        let graph = match entry.model {
            None => None,
            Some(digest) => {
                let bytes = fs::read(folder.join(MODEL)).ok()?;
                if blake3::hash(&bytes).to_hex().as_str() != digest {
                    return None;
                }
                Some(import_bytes(bytes.into(), None, &ImportOptions::default()).ok()?)
            }
        };
        Some((graph, entry.detail))
    }

    /// Keeps what a step made, in a folder that gets its name when it is whole.
    pub(super) fn store(&self, key: &Key, model: Option<&[u8]>, detail: &Detail) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        fs::create_dir_all(folder)?;
        let work = folder.join(format!(".{}.{}", key.name(), std::process::id()));
        let _ = fs::remove_dir_all(&work);
        fs::create_dir(&work)?;
        if let Some(bytes) = model {
            fs::write(work.join(MODEL), bytes)?;
        }
        let entry =
            Entry { model: model.map(|bytes| blake3::hash(bytes).to_hex().to_string()), detail: detail.clone() };
        fs::write(work.join(STEP), serde_json::to_vec(&entry)?)?;
        let place = folder.join(key.name());
        let _ = fs::remove_dir_all(&place);
        fs::rename(&work, &place)?;
        if let Some(own) = self.work(key) {
            let _ = fs::remove_dir_all(own);
        }
        self.tidy(folder)
    }

    fn tidy(&self, folder: &Path) -> io::Result<()> {
        let written = |entry: fs::DirEntry| {
            let modified = entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            (modified, entry.path())
        };
        let mut entries: Vec<_> = fs::read_dir(folder)?.filter_map(Result::ok).map(written).collect();
        entries.sort();
        for (_, path) in entries.iter().take(entries.len().saturating_sub(ENTRIES_MAX)) {
            let _ = fs::remove_dir_all(path);
        }
        Ok(())
    }
}
