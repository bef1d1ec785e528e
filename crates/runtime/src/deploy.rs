//! How a version comes: admission with its evidence, the checklist that a strategy needs, and the swap of versions that do not fit together.

use crate::{
    admission,
    checklist::{Check, Checklist, ChecklistLine, Item, Known, Watched},
    error::{AdmissionError, HostError},
    host::{Inner, Ongoing, Outage, RolloutId},
    rollout::{Action, Event, Rollout, Strategy},
    router::{Candidate, Routing, shadow_gates},
    status::HistoryEntry,
    store::{CandidateRecord, ModelRecord, VersionRecord},
    swap::{Instances, Version, bytes_beside, lock},
};
use cutover_backend::{Executable, Footprint, Placement, ResourceError, Session, SessionMemory, Signature};
use cutover_monitor::{Classes, GateState, Reference};
use cutover_package::{Manifest, Package};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Requests after which what was seen of an incumbent is a measure of what is usual.
const REFERENCE_REQUESTS: u64 = 100;
/// How long requests of a version that is to be unloaded may take to end.
const DRAIN_MAX: Duration = Duration::from_secs(60);

impl Inner {
    pub(crate) fn deploy(&self, model: &str, path: &Path, mut strategy: Strategy) -> Result<RolloutId, HostError> {
        strategy.check().map_err(HostError::Strategy)?;
        let package = Package::open(path)?;
        let manifest = &package.manifest;
        let version = manifest.version.clone();
        if manifest.name != model {
            return Err(HostError::WrongModel { asked: model.to_string(), package: manifest.name.clone() });
        }
        if let Some(gates) = manifest.gates {
            strategy.set_gates(gates);
        }
        let _deploying = lock(&self.deploying);
        let record_now = || lock(&self.changing).get(model).map(|o| o.record.clone()).unwrap_or_default();
        may_deploy(model, manifest, &record_now())?;
        let admitted = match (&strategy, record_now().active) {
            (Strategy::Sequential(_), Some(_)) => match self.admit(model, &package) {
                Err(HostError::OnlySequential { .. }) => return self.deploy_sequentially(model, &package),
                admitted => admitted,
            },
            _ => self.admit(model, &package),
        };
        let mut changing = lock(&self.changing);
        let mut record = changing.get(model).map(|o| o.record.clone()).unwrap_or_default();
        // A version may have been rolled back while this one was loaded.
        let admitted = admitted.and_then(|(loaded, added)| {
            may_deploy(model, manifest, &record)?;
            self.require_checklist(model, &version, &added, &record, &strategy)?;
            Ok((loaded, added))
        });
        let (loaded, added) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                if record.active.is_some() {
                    let entry = HistoryEntry::new(model, "refused", &version, &error.to_string());
                    self.store.save(model, &record, Some(&entry))?;
                }
                drop(changing);
                self.remove_unused();
                return Err(error);
            }
        };
        record.rollouts += 1;
        record.versions.insert(version.clone(), added);
        let id = RolloutId(format!("{model}#{}", record.rollouts));
        if record.active.is_none() {
            record.active = Some(version.clone());
            let entry = HistoryEntry::new(model, "deployed", &version, "the first version");
            self.store.save(model, &record, Some(&entry))?;
            self.put_in_service(model, loaded);
            changing.insert(model.to_string(), Ongoing::new(record));
            return Ok(id);
        }
        let mut rollout = Rollout::new(strategy);
        rollout.reference = self.reference(model, &package)?;
        let actions = rollout.handle(Duration::ZERO, Event::Admitted);
        let share = rollout.share;
        let shadow = shadow_gates(&rollout.strategy);
        let reason = format!("by {}, share {share}", rollout.strategy.name());
        record.candidate =
            Some(CandidateRecord { version: version.clone(), rollout, serving_s: 0.0, starts: 0, trials: None });
        let salt = record.rollouts;
        self.store.save(model, &record, Some(&HistoryEntry::new(model, "started", &version, &reason)))?;
        self.start_candidate(model, Candidate { version: loaded, share, salt, shadow });
        let mut ongoing = Ongoing::new(record);
        for action in actions.into_iter().filter(|action| !matches!(action, Action::Share(_))) {
            self.act(model, &mut ongoing, action)?;
        }
        changing.insert(model.to_string(), ongoing);
        drop(changing);
        self.remove_unused();
        Ok(id)
    }

    /// What is usual: what was seen of the incumbent so far, or else what the training data looked like.
    fn reference(&self, model: &str, package: &Package) -> Result<Option<Reference>, HostError> {
        if let Some(found) = self.models.load().get(model) {
            let seen = Reference::of(&lock(&found.routing.load().active.total));
            if seen.errors.total >= REFERENCE_REQUESTS {
                return Ok(Some(seen));
            }
        }
        let profile = package.profile()?.filter(|profile| !profile.classes.is_empty());
        Ok(profile.map(|profile| Reference {
            classes: Classes::of_shares(&profile.classes, profile.samples.min(100_000)),
            ..Reference::default()
        }))
    }

    /// Stores the version in `package`, loads it from there, and lets it show what it must; gives what it showed with its record.
    fn admit(&self, model: &str, package: &Package) -> Result<(Arc<Version>, VersionRecord), HostError> {
        let version = &package.manifest.version;
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.clone(), source };
        let mut added = self.add(package)?;
        let serving = self.models.load().get(model).map(|m| m.routing.load_full());
        self.make_room(model, version, &added, serving.as_deref())?;
        let loaded = self.load(model, version, &added)?;
        let (resident, mut counted) = self.resident(None);
        let needed = bytes_beside(&*loaded.executable, loaded.instances.max(), &mut counted);
        self.fits(model, version, resident, needed, serving.as_deref())?;
        added.checks = self.show(&loaded, package, serving.as_deref()).map_err(refused)?;
        let budget = self.options.memory_bytes.map_or("no budget".to_string(), |b| format!("a budget of {b}"));
        let footprint = format!("{needed} bytes beside the {resident} in use, {budget}");
        added.checks.push(Check::passed(Item::Benchmarks, "footprint", footprint));
        Ok((loaded, added))
    }

    /// Refuses what surely does not fit before any of it is in memory; where it fits without the version before, which is kept in memory for
    /// a quick way back only, that one goes.
    fn add(&self, package: &Package) -> Result<VersionRecord, HostError> {
        let (graph, tokenizer) = (package.graph(&Default::default())?, package.tokenizer()?);
        Ok(self.store.add(&graph, &package.manifest, tokenizer.as_deref(), self.options.store_bytes)?)
    }

    fn make_room(
        &self,
        model: &str,
        version: &str,
        added: &VersionRecord,
        serving: Option<&Routing>,
    ) -> Result<(), HostError> {
        let Some(budget) = self.options.memory_bytes else { return Ok(()) };
        // What versions in memory have too may be shared.
        let shared: BTreeSet<String> = {
            let changing = lock(&self.changing);
            let versions = changing.values().flat_map(|ongoing| ongoing.record.versions.values());
            versions.flat_map(|files| files.objects.iter().cloned()).collect()
        };
        let needed = added.objects.difference(&shared).map(|digest| self.store.object_bytes(digest)).sum::<u64>();
        if self.resident_bytes(None).saturating_add(needed) <= budget {
            return Ok(());
        }
        self.fits(model, version, self.resident_bytes(Some(model)), needed, serving)?;
        self.route(model, |before| Routing {
            active: Arc::clone(&before.active),
            candidate: before.candidate.clone(),
            previous: None,
        });
        Ok(())
    }

    fn fits(
        &self,
        model: &str,
        version: &str,
        resident: u64,
        needed: u64,
        serving: Option<&Routing>,
    ) -> Result<(), HostError> {
        let Some(budget) = self.options.memory_bytes.filter(|&budget| resident.saturating_add(needed) > budget) else {
            return Ok(());
        };
        let (model, version) = (model.to_string(), version.to_string());
        match serving {
            Some(serving) if needed <= budget => {
                let outage_s = serving.active.load.as_secs_f64();
                Err(HostError::OnlySequential { model, version, needed, resident, budget, outage_s })
            }
            _ => {
                let source = AdmissionError::Memory { needed, resident, budget };
                Err(HostError::Admission { model, version, source })
            }
        }
    }

    /// Lets a version show, on this device, what it must; gives the evidence.
    fn show(
        &self,
        loaded: &Version,
        package: &Package,
        serving: Option<&Routing>,
    ) -> Result<Vec<Check>, AdmissionError> {
        let manifest = &package.manifest;
        let (executable, placement) = (&loaded.executable, loaded.executable.placement());
        let digests =
            format!("{} files and {} tensors are what the manifest says", manifest.files.len(), manifest.tensors.len());
        let epoch = format!("{} (not signed: packages carry digests, no signature yet)", manifest.security_epoch);
        let graph = format!("{} nodes, decluttered, verified and compiled", placement.nodes.len());
        let mut checks = vec![
            Check::passed(Item::Security, "digests", digests),
            Check::passed(Item::Security, "epoch", epoch),
            Check::passed(Item::Validation, "graph", graph),
        ];
        let signature = executable.signature();
        if let Some(serving) = serving {
            admission::same_signature(serving.active.executable.signature(), signature)?;
            admission::same_raw_inputs(serving.active.preprocessing(), loaded.preprocessing())?;
            let same = format!("the same as version {}'s", serving.active.name);
            checks.push(Check::passed(Item::Validation, "signature", same));
        }
        let backend = placement.nodes.first().map_or("", |node| node.backend);
        let (golden, tolerance) = (package.golden()?, manifest.tolerance(backend));
        let ran = admission::golden(executable, &golden, tolerance)?;
        let compared = format!(
            "{} outputs within {} + {} · |expected| on backend '{backend}'",
            golden.outputs.len(),
            tolerance.atol,
            tolerance.rtol
        );
        checks.push(Check::passed(Item::Validation, "golden", compared));
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let warm = format!("first run {:.3} ms, {} runs; loaded in {:.1} ms", ms(ran.first), ran.runs, ms(loaded.load));
        checks.push(Check::passed(Item::Benchmarks, "warm-up", warm));
        let (median_ms, limit) = (ms(ran.median), manifest.resources.and_then(|resources| resources.latency_ms_max));
        if let Some(limit_ms) = limit.filter(|&limit| median_ms > limit) {
            return Err(AdmissionError::Latency { median_ms, limit_ms });
        }
        let limit = limit.map_or("the package sets no limit".to_string(), |limit| format!("limit {limit} ms"));
        checks.push(Check::passed(Item::Benchmarks, "latency", format!("median {median_ms:.3} ms, {limit}")));
        loaded.instances.add(ran.session);
        Ok(checks)
    }

    /// Unloads the version in service before the next is loaded, since both do not fit; on any failure the old one comes back.
    fn deploy_sequentially(&self, model: &str, package: &Package) -> Result<RolloutId, HostError> {
        let version = package.manifest.version.clone();
        let refused = |source| HostError::Admission { model: model.to_string(), version: version.clone(), source };
        // All that can be done while the old one still answers.
        let mut added = self.add(package)?;
        let record_now = || lock(&self.changing).get(model).map(|o| o.record.clone()).unwrap_or_default();
        let record = record_now();
        may_deploy(model, &package.manifest, &record)?;
        let found = self.model(model).map_err(|_| HostError::UnknownModel(model.to_string()))?;
        let before = found.routing.load_full();
        let expected = before.active.load;
        let reason = format!(
            "about {:.1} s without answers: version {version} does not fit beside {}",
            expected.as_secs_f64(),
            before.active.name
        );
        tracing::warn!(model, reason, "an outage begins");
        self.store.save(model, &record, Some(&HistoryEntry::new(model, "outage", &version, &reason)))?;
        // From here on nobody else changes who serves this model; status says why.
        let began = Instant::now();
        found.outage.store(Some(Arc::new(Outage { version: version.clone(), expected, began })));
        let signature = before.active.executable.signature().clone();
        let preprocessing = before.active.preprocessing().cloned();
        let (absent, old) = (Absent::of(&before.active.name, signature.clone()), Arc::downgrade(&before.active));
        self.route(model, |_| Routing { active: absent, candidate: None, previous: None });
        *lock(&found.streams) = Default::default();
        drop(before);
        while old.strong_count() > 0 && began.elapsed() < DRAIN_MAX {
            thread::sleep(Duration::from_millis(1));
        }
        let came = self.load(model, &version, &added).and_then(|loaded| {
            let (resident, mut counted) = self.resident(None);
            let needed = bytes_beside(&*loaded.executable, loaded.instances.max(), &mut counted);
            self.fits(model, &version, resident, needed, None)?;
            admission::same_signature(&signature, loaded.executable.signature()).map_err(refused)?;
            admission::same_raw_inputs(preprocessing.as_ref(), loaded.preprocessing()).map_err(refused)?;
            added.checks = self.show(&loaded, package, None).map_err(refused)?;
            let footprint = format!("{needed} bytes beside the {resident} in use, swapped sequentially");
            added.checks.push(Check::passed(Item::Benchmarks, "footprint", footprint));
            self.require_checklist(model, &version, &added, &record_now(), &Strategy::sequential())?;
            Ok(loaded)
        });
        // Whichever serves next is in memory before anything is committed.
        let (serves, came) = match came {
            Ok(loaded) => (loaded, Ok(())),
            Err(error) => (self.load_recorded(model, &record.active.clone().unwrap_or_default(), &record)?, Err(error)),
        };
        let mut changing = lock(&self.changing);
        let mut record = changing.get(model).map(|o| o.record.clone()).unwrap_or_default();
        let took = format!("{:.3} s without answers", began.elapsed().as_secs_f64());
        let entry = match &came {
            Ok(()) => {
                record.rollouts += 1;
                record.versions.insert(version.clone(), added);
                record.previous = record.active.replace(version.clone());
                record.evidence = Vec::new();
                record.prune();
                HistoryEntry::new(model, "promoted", &version, &format!("sequentially, {took}"))
            }
            Err(error) => HistoryEntry::new(model, "rolled back", &version, &format!("{error}; {took}")),
        };
        // A state that can't be written is as it was; so is who serves at the next start.
        let saved = self.store.save(model, &record, Some(&entry));
        let id = RolloutId(format!("{model}#{}", record.rollouts));
        self.route(model, |_| Routing { active: serves, candidate: None, previous: None });
        found.outage.store(None);
        if saved.is_ok() {
            changing.insert(model.to_string(), Ongoing::new(record));
        }
        drop(changing);
        self.remove_unused();
        came?;
        saved?;
        Ok(id)
    }

    /// Refuses a strategy for a version that lacks what policy requires.
    fn require_checklist(
        &self,
        model: &str,
        version: &str,
        added: &VersionRecord,
        record: &ModelRecord,
        strategy: &Strategy,
    ) -> Result<(), HostError> {
        let gates = Some(format!("by {}", strategy.name()));
        let known = Known {
            checks: &added.checks,
            gates,
            way_back: way_back(record.active.as_ref()),
            description: added.manifest.description.as_deref(),
            signed_by: record.sign_offs.get(version),
            watched: None,
        };
        let missing: Vec<String> = self
            .required(record)
            .iter()
            .map(|&item| (item, known.line(item)))
            .filter(|(_, (ticked, _))| !ticked)
            .map(|(item, (_, evidence))| format!("{item}: {}", evidence.join("; ")))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join("; ");
        Err(HostError::Checklist { model: model.to_string(), version: version.to_string(), missing })
    }

    fn required(&self, record: &ModelRecord) -> BTreeSet<Item> {
        record.required.clone().unwrap_or_else(|| self.options.required.clone())
    }

    pub(crate) fn checklist(&self, model: &str) -> Result<Checklist, HostError> {
        let changing = lock(&self.changing);
        let unknown = || HostError::UnknownModel(model.to_string());
        let record = &changing.get(model).ok_or_else(unknown)?.record;
        let version = record.candidate.as_ref().map(|c| &c.version).or(record.active.as_ref());
        let version = version.cloned().ok_or_else(unknown)?;
        let routing = self.model(model).map_err(|_| unknown())?.routing.load_full();
        let loaded = routing.named(&version).ok_or_else(unknown)?;
        let files = record.versions.get(&version).ok_or_else(unknown)?;
        let rollout = record.candidate.as_ref().map(|candidate| &candidate.rollout);
        let evidence = rollout.map_or(&record.evidence, |rollout| &rollout.evidence);
        let failing: Vec<&str> =
            evidence.iter().filter(|e| e.state == GateState::BothArms).map(|e| e.gate.name()).collect();
        let success: Vec<String> = evidence
            .iter()
            .filter(|e| e.state == GateState::Passed)
            .map(|e| format!("{} passed after {} observations", e.gate.name(), e.observations))
            .collect();
        let requests = lock(&loaded.total).requests();
        let watched = Watched {
            active: match requests {
                0 => Err("it answered nothing yet".to_string()),
                n => Ok(format!("{n} requests counted")),
            },
            alerts: match failing[..] {
                [] => Ok("none".to_string()),
                _ => Err(format!("both arms fail {}: look at the data", failing.join(", "))),
            },
            success: match &success[..] {
                [] => Err("no gate has passed yet".to_string()),
                passed => Ok(passed.join("; ")),
            },
        };
        let behind = if rollout.is_some() { record.active.as_ref() } else { record.previous.as_ref() };
        let known = Known {
            checks: &files.checks,
            gates: Some(match rollout {
                Some(rollout) => format!("{} gates of its {} rollout", rollout.evidence.len(), rollout.strategy.name()),
                None => "counters and /metrics; gates compare it with the next candidate".to_string(),
            }),
            way_back: way_back(behind),
            description: files.manifest.description.as_deref(),
            signed_by: record.sign_offs.get(&version),
            watched: Some(watched),
        };
        let required = self.required(record);
        let line = |item: Item| {
            let (ticked, evidence) = known.line(item);
            let phase = if item.is_before() { "before" } else { "after" }.to_string();
            ChecklistLine { item, phase, required: required.contains(&item), ticked, evidence }
        };
        let lines = Item::ALL.map(line).to_vec();
        let complete = lines.iter().all(|line| line.ticked || !line.required);
        Ok(Checklist { model: model.to_string(), version, complete, lines })
    }

    pub(crate) fn require(&self, model: &str, required: Option<BTreeSet<Item>>) -> Result<(), HostError> {
        let named = required.as_ref().map_or("as the host has it".to_string(), |required| {
            required.iter().map(|item| item.name()).collect::<Vec<_>>().join(", ")
        });
        self.amend(model, "policy", "", &format!("required: {named}"), |record| record.required = required)
    }

    pub(crate) fn sign_off(&self, model: &str, version: &str, by: &str) -> Result<(), HostError> {
        /// Versions whose sign-offs are kept; those that are here are among them.
        const SIGN_OFFS_MAX: usize = 256;
        self.amend(model, "signed off", version, &format!("by {by}"), |record| {
            let known: BTreeSet<String> = record.versions.keys().cloned().collect();
            if record.sign_offs.len() >= SIGN_OFFS_MAX {
                record.sign_offs.retain(|version, _| known.contains(version));
            }
            record.sign_offs.insert(version.to_string(), by.to_string());
        })
    }

    /// Changes what is known of a model, which need not have a version yet.
    fn amend(
        &self,
        model: &str,
        event: &str,
        version: &str,
        reason: &str,
        change: impl FnOnce(&mut ModelRecord),
    ) -> Result<(), HostError> {
        cutover_package::check_name("the name", model)?;
        let mut changing = lock(&self.changing);
        let mut record = changing.get(model).map(|o| o.record.clone()).unwrap_or_default();
        change(&mut record);
        self.store.save(model, &record, Some(&HistoryEntry::new(model, event, version, reason)))?;
        match changing.get_mut(model) {
            Some(ongoing) => ongoing.record = record,
            None => drop(changing.insert(model.to_string(), Ongoing::new(record))),
        }
        Ok(())
    }
}

fn way_back(version: Option<&String>) -> Option<String> {
    version.map(|version| format!("to {version}: one switch while it is in memory, else from the store"))
}

/// Whether `manifest` may follow what `record` holds.
fn may_deploy(model: &str, manifest: &Manifest, record: &ModelRecord) -> Result<(), HostError> {
    let (model, version) = (model.to_string(), manifest.version.clone());
    if let Some(candidate) = &record.candidate {
        return Err(HostError::Busy { model, candidate: candidate.version.clone() });
    }
    if record.active.as_ref() == Some(&version) {
        return Err(HostError::AlreadyServing { model, version });
    }
    let known = record.versions.get(&version).map(|known| &known.manifest);
    if known.is_some_and(|known| known.files != manifest.files) {
        return Err(HostError::VersionTaken { model, version });
    }
    let active = record.active.as_ref().and_then(|active| record.versions.get(active));
    let device = active.map_or(0, |active| active.manifest.security_epoch);
    if manifest.security_epoch < device {
        return Err(HostError::SecurityEpoch { model, version, package: manifest.security_epoch, device });
    }
    Ok(())
}

/// Stands where a version was, while nothing of its model is in memory.
struct Absent {
    signature: Signature,
    placement: Placement,
}

impl Absent {
    fn of(name: &str, signature: Signature) -> Arc<Version> {
        let absent = Absent { signature, placement: Placement::default() };
        Arc::new(Version::new(name.to_string(), Arc::new(absent), Instances::new(1, 0), None, Duration::ZERO))
    }
}

impl Executable for Absent {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        Footprint::default()
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, _: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        let message = "it is being replaced".to_string();
        Err(ResourceError::System { what: "the model", message })
    }
}
