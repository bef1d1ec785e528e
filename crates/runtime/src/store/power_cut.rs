//! The store on a simulated disk whose power is cut before every effect in turn, with what was not synced kept, lost or torn; and on one that
//! fails, or is full, at every effect in turn.
//!
//! A file's bytes and its folder's names are durable only once synced; what is pending at the cut survives in any combination. Every write,
//! sync, rename, lock and mapping of objects and of the database is an effect.

use super::{
    disk::{DatabaseFile, Disk},
    *,
};
use cutover_graph::{Constant, TensorFact, ops::MatMul};
use cutover_tensor::Buffer;
use cutover_tensor::{DType, Tensor};
use redb::StorageBackend;
use std::{
    io,
    sync::{Mutex, MutexGuard},
};

const FOLDER: &str = "/store";

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 31
}

/// What becomes of the effects that were pending at a cut.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Lost,
    Kept,
    /// Each kept, lost or (of writes) torn.
    Any(u64),
}

#[derive(Clone, Debug)]
enum Write {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

impl Write {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Write::Length(len) => bytes.resize(*len as usize, 0),
            Write::Bytes(at, written) => {
                let end = *at as usize + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*at as usize..end].copy_from_slice(written);
            }
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Write>,
}

#[derive(Clone, Debug)]
enum Naming {
    Add(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl Naming {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Naming::Add(path, inode) => drop(names.insert(path.clone(), *inode)),
            Naming::Remove(path) => drop(names.remove(path)),
            Naming::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }

    fn folder(&self) -> Option<&Path> {
        let (Naming::Add(path, _) | Naming::Rename(_, path) | Naming::Remove(path)) = self;
        path.parent()
    }
}

#[derive(Debug, Default)]
struct Contents {
    inodes: Vec<Inode>,
    now: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, usize>,
    pending: Vec<Naming>,
    effects: usize,
    locked: bool,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The power goes before this effect: it and all after it do not happen.
    Cut(usize),
    /// This effect fails; with `for_good`, all after it too, as on a disk that stays full.
    Error {
        at: usize,
        kind: io::ErrorKind,
        for_good: bool,
    },
    None,
}

#[derive(Clone, Debug)]
struct Simulated {
    contents: Arc<Mutex<Contents>>,
    fault: Fault,
}

impl Simulated {
    fn new(fault: Fault) -> Simulated {
        Simulated { contents: Arc::default(), fault }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap()
    }

    fn effect(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.lock();
        let number = contents.effects;
        match self.fault {
            Fault::Cut(at) if number >= at => return Err(io::Error::other("the power is gone")),
            Fault::Error { at, kind, for_good } if number == at || (for_good && number > at) => {
                contents.effects += 1;
                return Err(io::Error::from(kind));
            }
            _ => contents.effects += 1,
        }
        Ok(contents)
    }

    /// The disk as the next start finds it.
    fn after(&self, pending: Pending, fault: Fault) -> Simulated {
        let contents = self.lock();
        let mut seed = if let Pending::Any(seed) = pending { seed } else { 0 };
        let mut fate = |kept: &mut dyn FnMut(Option<usize>), len: usize| match pending {
            Pending::Lost => {}
            Pending::Kept => kept(None),
            Pending::Any(_) => match random(&mut seed) % 4 {
                0 | 1 => kept(None),
                2 => {}
                _ => kept(Some(random(&mut seed) as usize % (len + 1))),
            },
        };
        let mut names = contents.durable.clone();
        for naming in &contents.pending {
            // A name is there or not: it does not tear.
            fate(
                &mut |torn| {
                    if torn.is_none() {
                        naming.apply(&mut names)
                    }
                },
                0,
            );
        }
        let inodes = contents.inodes.iter().map(|inode| {
            let mut bytes = inode.durable.clone();
            for write in &inode.pending {
                let len = if let Write::Bytes(_, written) = write { written.len() } else { 0 };
                let mut keep = |torn: Option<usize>| match (write, torn) {
                    (Write::Bytes(at, written), Some(len)) => {
                        Write::Bytes(*at, written[..len].to_vec()).apply(&mut bytes)
                    }
                    _ => write.apply(&mut bytes),
                };
                fate(&mut keep, len);
            }
            Inode { now: bytes.clone(), durable: bytes, pending: Vec::new() }
        });
        let contents = Contents { inodes: inodes.collect(), now: names.clone(), durable: names, ..Contents::default() };
        Simulated { contents: Arc::new(Mutex::new(contents)), fault }
    }

    fn open(&self) -> Result<Store, StoreError> {
        Store::open_on(Arc::new(self.clone()), Path::new(FOLDER))
    }

    /// The file at `path`, made where it is missing.
    fn file(&self, path: &Path) -> io::Result<SimulatedFile> {
        if let Some(&inode) = self.lock().now.get(path) {
            return Ok(SimulatedFile { disk: self.clone(), inode });
        }
        let mut contents = self.effect()?;
        let inode = contents.inodes.len();
        contents.inodes.push(Inode::default());
        contents.name(Naming::Add(path.to_path_buf(), inode));
        Ok(SimulatedFile { disk: self.clone(), inode })
    }
}

impl Contents {
    fn bytes(&self, path: &Path) -> io::Result<Vec<u8>> {
        let inode = self.now.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.inodes[*inode].now.clone())
    }

    fn name(&mut self, naming: Naming) {
        naming.apply(&mut self.now);
        self.pending.push(naming);
    }
}

#[derive(Debug)]
struct SimulatedFile {
    disk: Simulated,
    inode: usize,
}

impl SimulatedFile {
    fn pend(&self, write: Write) -> io::Result<()> {
        let mut contents = self.disk.effect()?;
        let inode = &mut contents.inodes[self.inode];
        write.apply(&mut inode.now);
        inode.pending.push(write);
        Ok(())
    }
}

impl StorageBackend for SimulatedFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.lock().inodes[self.inode].now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let contents = self.disk.lock();
        let at = offset as usize;
        let bytes = contents.inodes[self.inode].now.get(at..at + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.pend(Write::Length(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut contents = self.disk.effect()?;
        let inode = &mut contents.inodes[self.inode];
        inode.durable = inode.now.clone();
        inode.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pend(Write::Bytes(offset, data.to_vec()))
    }
}

impl Disk for Simulated {
    fn create_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = self.file(path)?;
        StorageBackend::write(&file, 0, bytes)?;
        file.sync_data()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.effect()?.name(Naming::Rename(from.to_path_buf(), to.to_path_buf()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.effect()?.name(Naming::Remove(path.to_path_buf()));
        Ok(())
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut guard = self.effect()?;
        let contents = &mut *guard;
        let (synced, rest) =
            std::mem::take(&mut contents.pending).into_iter().partition(|n| n.folder() == Some(folder));
        contents.pending = rest;
        let synced: Vec<Naming> = synced;
        synced.iter().for_each(|naming| naming.apply(&mut contents.durable));
        Ok(())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        let contents = self.lock();
        let inside = contents.now.keys().filter(|path| path.parent() == Some(folder));
        Ok(inside.filter_map(|path| Some(path.file_name()?.to_str()?.to_string())).collect())
    }

    fn digest(&self, path: &Path) -> io::Result<blake3::Hash> {
        Ok(blake3::hash(&self.lock().bytes(path)?))
    }

    fn size(&self, path: &Path) -> io::Result<u64> {
        Ok(self.lock().bytes(path)?.len() as u64)
    }

    fn map(&self, path: &Path) -> io::Result<Arc<Buffer>> {
        Ok(Arc::new(Buffer::from_owner(self.effect()?.bytes(path)?)))
    }

    fn lock(&self, _: &Path) -> io::Result<Option<Box<dyn Send + Sync>>> {
        let mut contents = self.effect()?;
        if std::mem::replace(&mut contents.locked, true) {
            return Ok(None);
        }
        Ok(Some(Box::new(Unlock(Arc::clone(&self.contents)))))
    }

    fn database(&self, path: &Path) -> io::Result<DatabaseFile> {
        Ok(DatabaseFile(Box::new(self.file(path)?)))
    }
}

/// Lets go of the store's lock.
struct Unlock(Arc<Mutex<Contents>>);

impl Drop for Unlock {
    fn drop(&mut self) {
        self.0.lock().unwrap().locked = false;
    }
}

/// A model with one large tensor that all versions share and one of its own.
pub(super) fn graph(version: u8) -> Graph {
    let mut graph = Graph::new("m");
    let mut tensor = |name: &str, shape: [usize; 2], value: f32| {
        let values = vec![value; shape.iter().product()];
        graph.add_constant(name, Constant::new(Tensor::from_vec(shape, values).unwrap()))
    };
    let shared = tensor("shared", [4, 4096], 1.0);
    let own = tensor("own", [4096, 5], f32::from(version));
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[1, 4]));
    let mut product = |a, b, name: &str| {
        let op = MatMul { activation: None }.into();
        let node = graph.add_node(name, op, vec![Some(a), Some(b)], vec![name.to_string()]).unwrap();
        graph.node(node).outputs[0]
    };
    let h = product(x, shared, "h");
    let y = product(h, own, "y");
    graph.set_outputs(vec![y]);
    graph
}

pub(super) fn manifest(version: u8) -> Manifest {
    Manifest::of(&graph(version), "m", &format!("v{version}")).unwrap()
}

/// One version comes into service, and is loaded as the next start would.
fn serve(store: &Store, number: u8) -> Result<(), StoreError> {
    let version = format!("v{number}");
    let added = store.add(&graph(number), &manifest(number), Some(version.as_bytes()), None)?;
    store.load(&added)?;
    let mut record = store.models()?.remove("m").unwrap_or_default();
    record.previous = record.active.replace(version.clone());
    record.versions.insert(version.clone(), added);
    record.prune();
    store.save("m", &record, Some(&HistoryEntry::new("m", "promoted", &version, "")))?;
    store.save_answers("m", version.as_bytes())
}

/// Three versions come into service one after the other; gives those whose commit was acknowledged, and the one under way.
fn serve_three(disk: &Simulated) -> (Vec<String>, Option<String>) {
    let mut acknowledged = Vec::new();
    let Ok(store) = disk.open() else { return (acknowledged, None) };
    for number in 1..=3u8 {
        let version = format!("v{number}");
        if serve(&store, number).is_err() {
            return (acknowledged, Some(version));
        }
        acknowledged.push(version);
        let _ = store.collect_garbage();
    }
    (acknowledged, None)
}

/// What must hold of the state that is found after a cut or an error; gives the versions in its history.
fn check_state(case: &str, store: &Store, acknowledged: &[String], under_way: Option<&String>) -> Vec<String> {
    let models = store.models().unwrap_or_else(|e| panic!("{case}: {e}"));
    let record = models.get("m").cloned().unwrap_or_default();
    let active = record.active.as_ref();
    assert!(
        active == acknowledged.last() || (active == under_way && active.is_some()),
        "{case}: {active:?} serves, acknowledged {acknowledged:?}, under way {under_way:?}"
    );
    for (version, files) in &record.versions {
        for object in files.all_objects() {
            store.objects.check(object).unwrap_or_else(|e| panic!("{case}: version {version}: {e}"));
        }
    }
    if let Some(previous) = &record.previous {
        assert!(record.versions.contains_key(previous), "{case}: the version before is gone");
    }
    let history: Vec<String> = store.history("m").unwrap().into_iter().map(|e| e.version).collect();
    // What was tried again may be there twice, and only that.
    let mut once = history.clone();
    once.dedup();
    let expected: Vec<&String> = acknowledged.iter().chain(under_way.filter(|_| active == under_way)).collect();
    assert!(once.iter().eq(expected), "{case}: history {history:?}, acknowledged {acknowledged:?}");
    history
}

fn check(case: &str, store: &Store, acknowledged: &[String], under_way: Option<&String>) {
    let history = check_state(case, store, acknowledged, under_way);
    assert!(history.windows(2).all(|pair| pair[0] != pair[1]), "{case}: twice in {history:?}");
    let record = store.models().unwrap().remove("m").unwrap_or_default();
    store.collect_garbage().unwrap_or_else(|e| panic!("{case}: {e}"));
    let used: BTreeSet<&String> = record.versions.values().flat_map(|v| v.all_objects()).collect();
    let left = store.objects.names().unwrap();
    assert!(left.iter().collect::<BTreeSet<_>>() == used, "{case}: {left:?} on the disk, {used:?} in use");
}

fn factor() -> u64 {
    std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1)
}

#[test]
fn a_power_cut_leaves_old_or_new() {
    let calm = Simulated::new(Fault::None);
    assert_eq!(serve_three(&calm).0, ["v1", "v2", "v3"]);
    let effects = calm.lock().effects;
    let mut images = 0;
    for cut_at in 0..effects {
        let cut = Simulated::new(Fault::Cut(cut_at));
        let (acknowledged, under_way) = serve_three(&cut);
        let any = (0..2 * factor()).map(|round| Pending::Any(cut_at as u64 * 1000 + round));
        for pending in [Pending::Lost, Pending::Kept].into_iter().chain(any) {
            let case = format!("cut before effect {cut_at} of {effects}, pending {pending:?}");
            // The power may go again while the store recovers, and once more while it recovers from that.
            let again = cut.after(pending, Fault::Cut(cut_at % 13));
            drop(again.open());
            let twice = again.after(pending, Fault::Cut(cut_at % 7));
            drop(twice.open());
            let found = twice.after(pending, Fault::None);
            let store = found.open().unwrap_or_else(|e| panic!("{case}: {e}"));
            check(&case, &store, &acknowledged, under_way.as_ref());
            images += 1;
        }
    }
    println!("power cuts: {effects} effects, {images} disks, each with two more cuts during recovery");
}

/// Recovery itself is cut at every one of its effects.
#[test]
fn a_power_cut_during_recovery_leaves_old_or_new() {
    let calm = Simulated::new(Fault::None);
    serve_three(&calm);
    let effects = calm.lock().effects;
    let mut images = 0;
    for cut_at in (0..effects).step_by((17 / factor().min(17)) as usize) {
        let cut = Simulated::new(Fault::Cut(cut_at));
        let (acknowledged, under_way) = serve_three(&cut);
        for pending in [Pending::Lost, Pending::Kept, Pending::Any(cut_at as u64)] {
            for recovery_cut_at in 0.. {
                let again = cut.after(pending, Fault::Cut(recovery_cut_at));
                let recovered = again.open().is_ok();
                let case = format!("cut before {cut_at}, then before {recovery_cut_at} of recovery, {pending:?}");
                let found = again.after(pending, Fault::None);
                let store = found.open().unwrap_or_else(|e| panic!("{case}: {e}"));
                check(&case, &store, &acknowledged, under_way.as_ref());
                images += 1;
                if recovered {
                    break;
                }
            }
        }
    }
    println!("power cuts during recovery: {images} disks");
}

/// A disk that fails or is full: every error is clean, what was acknowledged stays, and once there is room again all goes on, in the same
/// process too.
#[test]
fn an_error_of_the_disk_loses_nothing() {
    let calm = Simulated::new(Fault::None);
    serve_three(&calm);
    let effects = calm.lock().effects;
    let mut errors = 0;
    for at in 0..effects {
        for (kind, for_good) in [
            (io::ErrorKind::StorageFull, false),
            (io::ErrorKind::StorageFull, true),
            (io::ErrorKind::Other, false),
            (io::ErrorKind::Other, true),
        ] {
            let case = format!("{kind:?} at effect {at} of {effects}, for good: {for_good}");
            let disk = Simulated::new(Fault::Error { at, kind, for_good });
            let (mut acknowledged, mut under_way) = (Vec::new(), None);
            if let Ok(store) = disk.open() {
                for number in 1..=3 {
                    // Once more after an error, as a host does.
                    let served = serve(&store, number).or_else(|error| {
                        errors += 1;
                        assert!(!error.to_string().is_empty());
                        serve(&store, number)
                    });
                    let version = format!("v{number}");
                    match served {
                        Ok(()) => acknowledged.push(version),
                        Err(error) => {
                            assert!(for_good, "{case}: it did not go on: {error}");
                            under_way = Some(version);
                            break;
                        }
                    }
                    let _ = store.collect_garbage();
                }
            } else {
                errors += 1;
            }
            let found = disk.after(Pending::Lost, Fault::None);
            let store = found.open().unwrap_or_else(|e| panic!("{case}: {e}"));
            check_state(&case, &store, &acknowledged, under_way.as_ref());
        }
    }
    println!("errors of the disk: {} injected, {errors} seen and told", effects * 4);
}
