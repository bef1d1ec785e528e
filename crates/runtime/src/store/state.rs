//! What is known of every model, in `redb`.

use super::{disk::Disk, io_error};
use crate::{error::StoreError, rollout::Rollout, status::HistoryEntry};
use cutover_package::Manifest;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

pub const DATABASE: &str = "state.redb";
const UNFINISHED: &str = "state.new";

/// Raised when older software could not read what is written.
const FORMAT: u64 = 1;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
/// JSON of [`ModelRecord`], by the model's name.
const MODELS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("models");
/// JSON of [`HistoryEntry`], by model and number.
const HISTORY: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("history");

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
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CandidateRecord {
    pub version: String,
    pub rollout: Rollout,
    /// Serving time so far, in seconds.
    pub serving_s: f64,
    /// How often the host was started with it.
    pub starts: u32,
}

/// One version's files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VersionRecord {
    /// Digest of the model file.
    pub model: String,
    /// Digests of its large tensors.
    pub objects: BTreeSet<String>,
    pub manifest: Manifest,
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
    database: Database,
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::State(error.to_string())
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(failed)
}

impl State {
    /// Opens the state in `folder` by `open`, which makes a database where there is none.
    ///
    /// A database that was cut off while it was made can't be opened again: a new one takes its name only once it is whole.
    pub fn open(
        disk: &dyn Disk,
        folder: &Path,
        open: impl Fn(&Path) -> Result<Database, DatabaseError>,
    ) -> Result<State, StoreError> {
        let open = |path: &Path| State::of(open(path).map_err(failed)?, folder.display().to_string());
        let path = folder.join(DATABASE);
        let names = disk.list(folder).map_err(io_error(folder))?;
        if names.iter().any(|name| name == DATABASE) {
            return open(&path);
        }
        let unfinished = folder.join(UNFINISHED);
        if names.iter().any(|name| name == UNFINISHED) {
            disk.remove(&unfinished).map_err(io_error(&unfinished))?;
        }
        let state = open(&unfinished)?;
        disk.rename(&unfinished, &path).and_then(|()| disk.sync_folder(folder)).map_err(io_error(&path))?;
        Ok(state)
    }

    /// What `database`, which lies at `path`, holds; its tables are made where they are missing.
    fn of(database: Database, path: String) -> Result<State, StoreError> {
        let transaction = database.begin_write().map_err(failed)?;
        {
            let mut meta = transaction.open_table(META).map_err(failed)?;
            let found = meta.get("format").map_err(failed)?.map(|v| v.value());
            match found {
                Some(found) if found > FORMAT => return Err(StoreError::Format { path, found, newest: FORMAT }),
                Some(_) => {}
                None => drop(meta.insert("format", FORMAT).map_err(failed)?),
            }
            transaction.open_table(MODELS).map_err(failed)?;
            transaction.open_table(HISTORY).map_err(failed)?;
        }
        transaction.commit().map_err(failed)?;
        Ok(State { database })
    }

    pub fn models(&self) -> Result<BTreeMap<String, ModelRecord>, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(MODELS).map_err(failed)?;
        let mut models = BTreeMap::new();
        for entry in table.iter().map_err(failed)? {
            let (name, record) = entry.map_err(failed)?;
            models.insert(name.value().to_string(), read(record.value())?);
        }
        Ok(models)
    }

    pub fn save(&self, model: &str, record: &ModelRecord, entry: Option<&HistoryEntry>) -> Result<(), StoreError> {
        let mut transaction = self.database.begin_write().map_err(failed)?;
        // Names and labels come from outside: the checksums of a one-phase commit are not made against an author of its contents.
        transaction.set_two_phase_commit(true);
        {
            let bytes = serde_json::to_vec(record).map_err(failed)?;
            transaction.open_table(MODELS).map_err(failed)?.insert(model, bytes.as_slice()).map_err(failed)?;
            if let Some(entry) = entry {
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
            }
        }
        transaction.commit().map_err(failed)
    }

    pub fn history(&self, model: &str) -> Result<Vec<HistoryEntry>, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let table = transaction.open_table(HISTORY).map_err(failed)?;
        let range = table.range((model, 0)..=(model, u64::MAX)).map_err(failed)?;
        range.map(|entry| read(entry.map_err(failed)?.1.value())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::Local;

    fn open(folder: &Path) -> Result<State, StoreError> {
        State::open(&Local, folder, |path| Database::create(path))
    }

    #[test]
    fn a_newer_format_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = open(folder.path()).unwrap();
        let transaction = state.database.begin_write().unwrap();
        transaction.open_table(META).unwrap().insert("format", FORMAT + 1).unwrap();
        transaction.commit().unwrap();
        drop(state);
        assert!(matches!(open(folder.path()), Err(StoreError::Format { found: 2, newest: 1, .. })));
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
        drop(state);
        let state = open(folder.path()).unwrap();
        assert_eq!(state.models().unwrap()["m"], record);
        let events = |model| -> Vec<String> { state.history(model).unwrap().into_iter().map(|e| e.event).collect() };
        assert_eq!(events("m"), ["deployed", "promoted"]);
        assert_eq!(events("other"), ["deployed"]);
    }
}
