//! What is known of every model, in `redb`.

use super::{disk::Disk, io_error};
use crate::{
    checklist::{Check, Item},
    error::StoreError,
    rollout::Rollout,
    status::HistoryEntry,
    swap::{Trial, lock},
};
use cutover_monitor::Evidence;
use cutover_package::Manifest;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

pub const DATABASE: &str = "state.redb";
const UNFINISHED: &str = "state.new";

/// Raised when older software could not read what is written, or would lose some of it. 2: answers that labels may still come for, evidence
/// of admission, what was counted of a rollout.
const FORMAT: u64 = 2;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// JSON of [`ModelRecord`], by the model's name.
const MODELS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("models");
/// JSON of [`HistoryEntry`], by model and number.
const HISTORY: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("history");

/// Answers that labels may still come for, by the model's name.
const ANSWERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("answers");

/// Of the database's pages in memory: its own bound is a gigabyte, and all of a store's state is a few hundred kilobytes.
const CACHE_BYTES: usize = 1 << 20;

/// Entries kept for each model; the oldest go first.
const HISTORY_MAX: u64 = 4096;

/// One model's versions and who serves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ModelRecord {
    pub active: Option<String>,
    /// Where a rollback goes.
    pub previous: Option<String>,
    pub candidate: Option<CandidateRecord>,
    pub versions: BTreeMap<String, VersionRecord>,
    /// Number of rollouts so far.
    pub rollouts: u64,
    /// What the checklist of a version must have before it is rolled out; the host's own policy where absent.
    #[serde(default)]
    pub required: Option<BTreeSet<Item>>,
    /// What the version in service was promoted by.
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// Who signed versions off, by version.
    #[serde(default)]
    pub sign_offs: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CandidateRecord {
    pub version: String,
    pub rollout: Rollout,
    /// Serving time so far, in seconds.
    pub serving_s: f64,
    /// How often the host was started with it.
    pub starts: u32,
    /// What was counted so far.
    #[serde(default)]
    pub trials: Option<Trials>,
}

/// What both arms counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trials {
    pub incumbent: Trial,
    pub candidate: Trial,
}

/// One version's files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VersionRecord {
    /// Digest of the model file.
    pub model: String,
    /// Digests of its large tensors.
    pub objects: BTreeSet<String>,
    /// Digest of the tokenizer, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    pub manifest: Manifest,
    /// What its admission showed.
    #[serde(default)]
    pub checks: Vec<Check>,
}

impl VersionRecord {
    /// Digests of all it needs.
    pub fn all_objects(&self) -> impl Iterator<Item = &String> {
        self.objects.iter().chain([&self.model]).chain(&self.tokenizer)
    }
}

impl ModelRecord {
    /// Forgets every version that has no role.
    pub fn prune(&mut self) {
        let candidate = self.candidate.as_ref().map(|c| &c.version);
        let kept: BTreeSet<String> =
            [self.active.as_ref(), self.previous.as_ref(), candidate].into_iter().flatten().cloned().collect();
        self.versions.retain(|name, _| kept.contains(name));
    }
}

pub(super) struct State {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    /// Closed after an error: the database refuses everything from then on, and what it holds is known again once it is opened anew.
    database: Mutex<Option<Database>>,
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::State(error.to_string())
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(failed)
}

impl State {
    /// Opens the state in `folder`, or makes it where there is none.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path) -> Result<State, StoreError> {
        let state = State { disk, folder: folder.to_path_buf(), database: Mutex::default() };
        *lock(&state.database) = Some(state.database()?);
        Ok(state)
    }

    /// A database that was cut off while it was made can't be opened again: a new one takes its name only once it is whole.
    fn database(&self) -> Result<Database, StoreError> {
        let open = |path: &Path| {
            let file = self.disk.database(path).map_err(io_error(path))?;
            let database = Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(file).map_err(failed)?;
            prepare(&database, self.folder.display().to_string())?;
            Ok(database)
        };
        let path = self.folder.join(DATABASE);
        let names = self.disk.list(&self.folder).map_err(io_error(&self.folder))?;
        if names.iter().any(|name| name == DATABASE) {
            return open(&path);
        }
        let unfinished = self.folder.join(UNFINISHED);
        if names.iter().any(|name| name == UNFINISHED) {
            self.disk.remove(&unfinished).map_err(io_error(&unfinished))?;
        }
        let database = open(&unfinished)?;
        let named = self.disk.rename(&unfinished, &path).and_then(|()| self.disk.sync_folder(&self.folder));
        named.map_err(io_error(&path))?;
        Ok(database)
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut database = lock(&self.database);
        if database.is_none() {
            *database = Some(self.database()?);
        }
        let done = database.as_ref().map_or_else(|| Err(failed("closed")), work);
        if done.is_err() {
            *database = None;
        }
        done
    }

    pub fn format(&self) -> Result<u64, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            let meta = transaction.open_table(META).map_err(failed)?;
            Ok(meta.get("format").map_err(failed)?.map_or(0, |v| v.value()))
        })
    }

    pub fn models(&self) -> Result<BTreeMap<String, ModelRecord>, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            let table = transaction.open_table(MODELS).map_err(failed)?;
            let mut models = BTreeMap::new();
            for entry in table.iter().map_err(failed)? {
                let (name, record) = entry.map_err(failed)?;
                models.insert(name.value().to_string(), read(record.value())?);
            }
            Ok(models)
        })
    }

    pub fn save(&self, model: &str, record: &ModelRecord, entry: Option<&HistoryEntry>) -> Result<(), StoreError> {
        self.write(|transaction| {
            let bytes = serde_json::to_vec(record).map_err(failed)?;
            transaction.open_table(MODELS).map_err(failed)?.insert(model, bytes.as_slice()).map_err(failed)?;
            let Some(entry) = entry else { return Ok(()) };
            let mut history = transaction.open_table(HISTORY).map_err(failed)?;
            let (first, last) = {
                let range = history.range((model, 0)..=(model, u64::MAX)).map_err(failed)?;
                let mut numbers = range.map(|entry| entry.map(|(key, _)| key.value().1).map_err(failed));
                (numbers.next().transpose()?, numbers.next_back().transpose()?)
            };
            let next = last.or(first).map_or(0, |last| last + 1);
            let bytes = serde_json::to_vec(entry).map_err(failed)?;
            history.insert((model, next), bytes.as_slice()).map_err(failed)?;
            if let Some(first) = first.filter(|first| next - first >= HISTORY_MAX) {
                history.remove((model, first)).map_err(failed)?;
            }
            Ok(())
        })
    }

    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            let table = transaction.open_table(HISTORY).map_err(failed)?;
            let range = table.range((model, 0)..=(model, u64::MAX)).map_err(failed)?;
            range.map(|entry| read(entry.map_err(failed)?.1.value())).collect()
        })
    }

    pub fn answers(&self, model: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(|database| {
            let transaction = database.begin_read().map_err(failed)?;
            let table = transaction.open_table(ANSWERS).map_err(failed)?;
            Ok(table.get(model).map_err(failed)?.map(|bytes| bytes.value().to_vec()))
        })
    }

    pub fn save_answers(&self, model: &str, answers: &[u8]) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(ANSWERS).map_err(failed)?.insert(model, answers).map_err(failed)?;
            Ok(())
        })
    }

    fn write(&self, work: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>) -> Result<(), StoreError> {
        self.with(|database| {
            let mut transaction = database.begin_write().map_err(failed)?;
            // Names and labels come from outside: the checksums of a one-phase commit are not made against an author of its contents.
            transaction.set_two_phase_commit(true);
            work(&transaction)?;
            transaction.commit().map_err(failed)
        })
    }
}

/// Refuses what newer software wrote, without having changed it; brings what older software wrote to this format, in one transaction.
fn prepare(database: &Database, path: String) -> Result<(), StoreError> {
    let transaction = database.begin_write().map_err(failed)?;
    let found = {
        let meta = transaction.open_table(META).map_err(failed)?;
        meta.get("format").map_err(failed)?.map(|v| v.value())
    };
    match found {
        Some(FORMAT) => return transaction.abort().map_err(failed),
        Some(found) if found > FORMAT => return Err(StoreError::Format { path, found, newest: FORMAT }),
        // From 1 to 2 nothing is rewritten: what is new is absent in old records, and reads as such.
        Some(_) | None => {}
    }
    transaction.open_table(META).map_err(failed)?.insert("format", FORMAT).map_err(failed)?;
    transaction.open_table(MODELS).map_err(failed)?;
    transaction.open_table(HISTORY).map_err(failed)?;
    transaction.open_table(ANSWERS).map_err(failed)?;
    transaction.commit().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::Local;

    fn open(folder: &Path) -> Result<State, StoreError> {
        State::open(Arc::new(Local), folder)
    }

    #[test]
    fn a_newer_format_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path()).unwrap();
        let record = ModelRecord { active: Some("v1".to_string()), ..ModelRecord::default() };
        state.save("m", &record, None).unwrap();
        let set = |state: &State, format: u64| {
            state.write(|t| t.open_table(META).map_err(failed)?.insert("format", format).map_err(failed).map(drop))
        };
        set(&state, FORMAT + 1).unwrap();
        drop(state);
        for _ in 0..2 {
            let refused = open(folder.path()).map(drop).unwrap_err();
            assert!(matches!(refused, StoreError::Format { found, newest: FORMAT, .. } if found == FORMAT + 1));
            assert!(refused.to_string().contains("newer software"), "{refused}");
        }
        // As the newer software finds it again.
        let database = Database::open(folder.path().join(DATABASE)).unwrap();
        let transaction = database.begin_read().unwrap();
        let models = transaction.open_table(MODELS).unwrap();
        assert_eq!(read::<ModelRecord>(models.get("m").unwrap().unwrap().value()).unwrap(), record);
    }

    /// As format 1 wrote it.
    #[test]
    fn an_older_format_is_brought_forward_with_all_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::create(folder.path().join(DATABASE)).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let model = r#"{"active":"v1","previous":null,"versions":{},"rollouts":2,"candidate":{"version":"v2","serving_s":4.5,"starts":1,
                "rollout":{"strategy":{"canary":{"steps":[{"share":0.5,"dwell_s":1.0}],"deadline_s":9.0,"gates":{}}},
                "step":0,"step_began":{"secs":0,"nanos":0},"share":0.5,"evidence":[]}}}"#;
            let entry = serde_json::to_vec(&HistoryEntry::new("m", "started", "v2", "")).unwrap();
            transaction.open_table(META).unwrap().insert("format", 1).unwrap();
            transaction.open_table(MODELS).unwrap().insert("m", model.as_bytes()).unwrap();
            transaction.open_table(HISTORY).unwrap().insert(("m", 0), entry.as_slice()).unwrap();
        }
        transaction.commit().unwrap();
        drop(database);
        for _ in 0..2 {
            let state = open(folder.path()).unwrap();
            assert_eq!(state.format().unwrap(), FORMAT);
            let record = state.models().unwrap().remove("m").unwrap();
            assert_eq!((record.active.as_deref(), record.rollouts, record.required), (Some("v1"), 2, None));
            let candidate = record.candidate.unwrap();
            assert_eq!((candidate.version.as_str(), candidate.starts, candidate.trials), ("v2", 1, None));
            assert_eq!(state.history("m").unwrap()[0].event, "started");
            assert_eq!(state.answers("m").unwrap(), None);
        }
    }

    #[test]
    fn state_and_history_survive() {
        let folder = tempfile::tempdir().unwrap();
        let record = ModelRecord { active: Some("v1".to_string()), ..ModelRecord::default() };
        let entry = |event: &str| HistoryEntry::new("m", event, "v1", "");
        let state = open(folder.path()).unwrap();
        for event in ["deployed", "promoted"] {
            state.save("m", &record, Some(&entry(event))).unwrap();
        }
        state.save("other", &record, Some(&entry("deployed"))).unwrap();
        state.save("other", &record, None).unwrap();
        state.save_answers("m", b"answers").unwrap();
        drop(state);
        let state = open(folder.path()).unwrap();
        assert_eq!(state.models().unwrap()["m"], record);
        let events = |model| -> Vec<String> { state.history(model).unwrap().into_iter().map(|e| e.event).collect() };
        assert_eq!(events("m"), ["deployed", "promoted"]);
        assert_eq!(events("other"), ["deployed"]);
        assert_eq!(state.answers("m").unwrap().as_deref(), Some(&b"answers"[..]));
    }
}
