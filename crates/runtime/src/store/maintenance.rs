//! Whether all of a store is there, and what to do where it is not.

use super::{DAMAGED, ModelRecord, Store, io_error};
use crate::{error::StoreError, status::HistoryEntry};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::Path};

/// What `store check` found. Nothing was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCheck {
    pub format: u64,
    pub models: usize,
    pub versions: usize,
    /// Objects that were read through.
    pub objects: usize,
    pub bytes: u64,
    /// Bytes that versions would take if they shared nothing.
    pub bytes_unshared: u64,
    /// Objects that no version refers to; the next deploy removes them.
    pub unused: usize,
    pub lost: Vec<Lost>,
}

/// An object that is damaged or missing, and who is without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub digest: String,
    pub reason: String,
    /// As `MODEL VERSION`.
    pub versions: Vec<String>,
}

/// What `store repair` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRepair {
    /// Objects that were damaged or missing. Damaged ones lie in the store's folder `damaged` now.
    pub lost: Vec<Lost>,
    /// What became of the versions that were without them, a sentence each.
    pub changes: Vec<String>,
    /// Objects without use that were removed.
    pub removed: usize,
}

impl Store {
    /// Reads every object through and compares it with its name.
    pub fn check(&self) -> Result<StoreCheck, StoreError> {
        let models = self.models()?;
        let mut check = StoreCheck { format: self.state.format()?, models: models.len(), ..StoreCheck::default() };
        let mut users: std::collections::BTreeMap<String, Vec<String>> = Default::default();
        for (name, record) in &models {
            for (version, files) in &record.versions {
                check.versions += 1;
                for digest in files.all_objects() {
                    users.entry(digest.clone()).or_default().push(format!("{name} {version}"));
                    check.bytes_unshared += self.objects.size(digest);
                }
            }
            // Every entry must be readable.
            self.history(name)?;
        }
        for (digest, versions) in &users {
            check.objects += 1;
            check.bytes += self.objects.size(digest);
            if let Err(StoreError::Damaged { digest, message }) = self.objects.check(digest) {
                check.lost.push(Lost { digest, reason: message, versions: versions.clone() });
            }
        }
        check.unused = self.objects.names()?.iter().filter(|name| !users.contains_key(*name)).count();
        Ok(check)
    }

    /// Moves damaged objects aside; gives what is lost.
    pub fn quarantine(&self) -> Result<Vec<Lost>, StoreError> {
        let lost = self.check()?.lost;
        let folder = self.folder.join(DAMAGED);
        let present: BTreeSet<String> = self.objects.names()?.into_iter().collect();
        for lost in lost.iter().filter(|lost| present.contains(&lost.digest)) {
            self.objects.move_to(&lost.digest, &folder)?;
        }
        Ok(lost)
    }

    /// Repairs a store that nobody serves from.
    pub fn repair(&self) -> Result<StoreRepair, StoreError> {
        let lost = self.quarantine()?;
        let mut changes = Vec::new();
        for (name, mut record) in self.models()? {
            for change in strip_lost(&name, &mut record, &lost, false) {
                self.save(&name, &record, Some(&HistoryEntry::new(&name, "lost", &change.0, &change.1)))?;
                changes.push(format!("{name} {}: {}", change.0, change.1));
            }
        }
        let removed = self.collect_garbage()?;
        Ok(StoreRepair { lost, changes, removed })
    }
}

/// Takes versions without all of their objects out of `record`; gives each with what that means. What is `serving` from memory stays until
/// the host is started again.
pub(crate) fn strip_lost(name: &str, record: &mut ModelRecord, lost: &[Lost], serving: bool) -> Vec<(String, String)> {
    let digests: BTreeSet<&String> = lost.iter().map(|lost| &lost.digest).collect();
    let without: Vec<String> = record
        .versions
        .iter()
        .filter(|(_, files)| files.all_objects().any(|digest| digests.contains(digest)))
        .map(|(version, _)| version.clone())
        .collect();
    let mut changes = Vec::new();
    for version in &without {
        let is = |role: &Option<String>| role.as_ref() == Some(version);
        let change = if is(&record.active) && serving {
            "it serves from memory; deploy it again before the host is started again".to_string()
        } else if is(&record.active) {
            let previous = record.previous.take().filter(|previous| !without.contains(previous));
            record.active = previous.clone();
            match previous {
                Some(previous) => format!("it was in service; {previous} is now"),
                None => format!("it was in service, and nothing else of '{name}' is whole: deploy it again"),
            }
        } else if record.candidate.as_ref().is_some_and(|c| c.version == *version) {
            record.candidate = None;
            "its rollout ended".to_string()
        } else {
            if is(&record.previous) {
                record.previous = None;
            }
            "there is no way back to it".to_string()
        };
        changes.push((version.clone(), change));
    }
    record.prune();
    changes
}

fn existing(folder: &Path) -> Result<Store, StoreError> {
    if !Store::is_in(folder) {
        return Err(io_error(folder)(std::io::Error::new(std::io::ErrorKind::NotFound, "there is no store")));
    }
    Store::open(folder)
}

/// Checks the store in `folder`, which nobody else may hold.
pub fn check_store(folder: &Path) -> Result<StoreCheck, StoreError> {
    existing(folder)?.check()
}

/// Repairs the store in `folder`, which nobody else may hold.
pub fn repair_store(folder: &Path) -> Result<StoreRepair, StoreError> {
    existing(folder)?.repair()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::power_cut::{graph, manifest};
    use std::fs;

    fn store_of(folder: &Path, versions: u8) -> Store {
        let store = Store::open(folder).unwrap();
        let mut record = ModelRecord::default();
        for number in 1..=versions {
            let added = store.add(&graph(number), &manifest(number), None, None).unwrap();
            record.previous = record.active.replace(format!("v{number}"));
            record.versions.insert(format!("v{number}"), added);
        }
        store.save("m", &record, None).unwrap();
        store
    }

    fn damage(store: &Store, digest: &str) {
        let path = store.objects.path(digest);
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn what_is_lost_is_said_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(folder.path(), 2);
        let check = store.check().unwrap();
        assert_eq!((check.models, check.versions, check.objects, check.lost.len()), (1, 2, 5, 0));
        assert!(check.bytes < check.bytes_unshared, "{check:?}");
        let own = |store: &Store, version: &str| store.models().unwrap()["m"].versions[version].model.clone();
        damage(&store, &own(&store, "v2"));
        fs::write(store.objects.path("stray"), b"x").unwrap();
        let check = store.check().unwrap();
        assert_eq!((check.lost.len(), check.unused), (1, 1));
        assert_eq!(check.lost[0].versions, ["m v2"]);
        let repair = store.repair().unwrap();
        assert!(repair.changes[0].contains("v1 is now") && repair.removed >= 1, "{repair:?}");
        assert!(folder.path().join(DAMAGED).join(&repair.lost[0].digest).exists());
        assert_eq!(store.check().unwrap().lost, []);
        let record = &store.models().unwrap()["m"];
        assert_eq!((record.active.as_deref(), record.previous.as_deref()), (Some("v1"), None));
        store.load(&record.versions["v1"]).unwrap();
        assert_eq!(store.history("m").unwrap()[0].event, "lost");
        // What is shared is lost to all.
        let shared = record.versions["v1"].objects.first().unwrap().clone();
        fs::remove_file(store.objects.path(&shared)).unwrap();
        let repair = store.repair().unwrap();
        assert!(repair.changes[0].contains("deploy it again"), "{repair:?}");
        assert_eq!(store.models().unwrap()["m"].active, None);
    }

    #[test]
    fn a_quota_is_respected_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(folder.path(), 1);
        let before = store.stored_bytes().unwrap();
        let error = store.add(&graph(2), &manifest(2), None, Some(before + 1000)).unwrap_err();
        let StoreError::Quota { needed, stored, quota } = error else { panic!("{error}") };
        assert_eq!((stored, quota, store.stored_bytes().unwrap()), (before, before + 1000, before));
        // The shared tensor is not counted again.
        assert!(needed < before * 7 / 10, "{needed} of {before}");
        store.add(&graph(2), &manifest(2), None, Some(before + needed)).unwrap();
        assert_eq!(store.stored_bytes().unwrap(), before + needed);
    }

    #[test]
    fn nothing_is_repaired_where_there_is_no_store() {
        let folder = tempfile::tempdir().unwrap();
        assert!(repair_store(folder.path()).is_err() && check_store(&folder.path().join("x")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
