//! The store on a simulated disk whose power is cut before every effect in turn, with what was not synced kept, lost or torn.
//!
//! A file's bytes and its folder's names are durable only once synced; what is pending at the cut survives in any combination.

use super::{disk::Disk, state::State, *};
use cutover_graph::{Constant, TensorFact, ops::MatMul};
use cutover_tensor::{DType, Tensor};
use redb::{Builder, StorageBackend};
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
}

#[derive(Clone, Debug)]
struct Simulated {
    contents: Arc<Mutex<Contents>>,
    /// The power goes before this effect.
    cut_at: usize,
}

impl Simulated {
    fn new(cut_at: usize) -> Simulated {
        Simulated { contents: Arc::default(), cut_at }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap()
    }

    fn effect(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.lock();
        if contents.effects >= self.cut_at {
            return Err(io::Error::other("the power is gone"));
        }
        contents.effects += 1;
        Ok(contents)
    }

    /// The disk as the next start finds it.
    fn after(&self, pending: Pending, cut_at: usize) -> Simulated {
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
        let contents =
            Contents { inodes: inodes.collect(), now: names.clone(), durable: names, pending: Vec::new(), effects: 0 };
        Simulated { contents: Arc::new(Mutex::new(contents)), cut_at }
    }

    fn open(&self) -> Result<Store, StoreError> {
        let open = |path: &Path| {
            let file = self.file(path).map_err(redb::StorageError::Io)?;
            Builder::new().create_with_backend(file)
        };
        let state = State::open(self, Path::new(FOLDER), open)?;
        Store::of(Arc::new(self.clone()), Path::new(FOLDER), state)
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
        let contents = self.lock();
        let inode = contents.now.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(blake3::hash(&contents.inodes[*inode].now))
    }
}

/// A model with one large tensor that all versions share and one of its own.
fn graph(version: u8) -> Graph {
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

/// Three versions come into service one after the other; gives those whose commit was acknowledged, and the one under way.
fn serve_three(disk: &Simulated) -> (Vec<String>, Option<String>) {
    let mut acknowledged = Vec::new();
    let Ok(store) = disk.open() else { return (acknowledged, None) };
    for number in 1..=3u8 {
        let version = format!("v{number}");
        let done = (|| {
            let graph = graph(number);
            let added = store.add(&graph, &Manifest::of(&graph, "m", &version).unwrap())?;
            let mut record = store.models()?.remove("m").unwrap_or_default();
            record.previous = record.active.replace(version.clone());
            record.versions.insert(version.clone(), added);
            record.prune();
            store.save("m", &record, Some(&HistoryEntry::new("m", "promoted", &version, "")))
        })();
        if done.is_err() {
            return (acknowledged, Some(version));
        }
        acknowledged.push(version);
        let _ = store.collect_garbage();
    }
    (acknowledged, None)
}

/// What must hold of whatever is found after a cut.
fn check(case: &str, store: &Store, acknowledged: &[String], under_way: Option<&String>) {
    let models = store.models().unwrap_or_else(|e| panic!("{case}: {e}"));
    let record = models.get("m").cloned().unwrap_or_default();
    let active = record.active.as_ref();
    assert!(
        active == acknowledged.last() || (active == under_way && active.is_some()),
        "{case}: {active:?} serves, acknowledged {acknowledged:?}, under way {under_way:?}"
    );
    for (version, files) in &record.versions {
        for object in files.objects.iter().chain([&files.model]) {
            store.objects.check(object).unwrap_or_else(|e| panic!("{case}: version {version}: {e}"));
        }
    }
    if let Some(previous) = &record.previous {
        assert!(record.versions.contains_key(previous), "{case}: the version before is gone");
    }
    let history: Vec<String> = store.history("m").unwrap().into_iter().map(|e| e.version).collect();
    let expected: Vec<&String> = acknowledged.iter().chain(under_way.filter(|_| active == under_way)).collect();
    assert!(history.iter().eq(expected), "{case}: history {history:?}, acknowledged {acknowledged:?}");
    store.collect_garbage().unwrap_or_else(|e| panic!("{case}: {e}"));
    let used: BTreeSet<&String> = record.versions.values().flat_map(|v| v.objects.iter().chain([&v.model])).collect();
    let left = store.objects.names().unwrap();
    assert!(left.iter().collect::<BTreeSet<_>>() == used, "{case}: {left:?} on the disk, {used:?} in use");
}

#[test]
fn a_power_cut_leaves_old_or_new() {
    let calm = Simulated::new(usize::MAX);
    assert_eq!(serve_three(&calm).0, ["v1", "v2", "v3"]);
    let effects = calm.lock().effects;
    let factor: u64 = std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    let mut images = 0;
    for cut_at in 0..effects {
        let cut = Simulated::new(cut_at);
        let (acknowledged, under_way) = serve_three(&cut);
        let any = (0..2 * factor).map(|round| Pending::Any(cut_at as u64 * 1000 + round));
        for pending in [Pending::Lost, Pending::Kept].into_iter().chain(any) {
            let case = format!("cut before effect {cut_at} of {effects}, pending {pending:?}");
            // The power may go again while the store recovers.
            let again = cut.after(pending, cut_at % 7);
            drop(again.open());
            let found = again.after(pending, usize::MAX);
            let store = found.open().unwrap_or_else(|e| panic!("{case}: {e}"));
            check(&case, &store, &acknowledged, under_way.as_ref());
            images += 1;
        }
    }
    println!("{effects} effects, {images} disks");
}
