//! How other processes of this user reach the host that holds a store: a socket in the store's folder that nobody else may open.
//!
//! A line of JSON is a [`Call`], and a line of JSON answers it: `{"ok": …}` or `{"error": "…"}`. One process holds a store at a time; whatever
//! else looks at it, or changes it, asks the holder.

use crate::{checklist::Item, host::Inner, request::Label, rollout::Strategy, store::io_error};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value as Json, json};
use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

const NAME: &str = "socket";
/// A call is a name, a path and parameters; many labels at once are the longest.
const CALL_BYTES: u64 = 4 << 20;
/// Callers at once.
const CALLERS_MAX: usize = 16;
/// How soon a connection sees that the host ends.
const LOOK: Duration = Duration::from_millis(100);

/// What may be asked of the holder of a store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "call")]
pub enum Call {
    Status,
    History {
        model: String,
    },
    Checklist {
        model: String,
    },
    Deploy {
        model: String,
        package: PathBuf,
        strategy: Box<Strategy>,
    },
    Promote {
        model: String,
    },
    Rollback {
        model: String,
    },
    /// Right classes by request id.
    Feedback {
        model: String,
        labels: Vec<(String, Vec<u32>)>,
    },
    Require {
        model: String,
        required: Option<BTreeSet<Item>>,
    },
    SignOff {
        model: String,
        version: String,
        by: String,
    },
    CheckStore,
    RepairStore,
}

/// Another process that holds a store.
#[derive(Debug)]
pub struct Client {
    stream: os::Stream,
}

impl Client {
    /// Whoever holds the store in `folder`; `None` where nobody listens there.
    pub fn connect(folder: &Path) -> Option<Client> {
        Some(Client { stream: os::connect(&folder.join(NAME)).ok()? })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The holder's own words; a connection that breaks.
    pub fn call<T: DeserializeOwned>(&mut self, call: &Call) -> io::Result<T> {
        let mut line = serde_json::to_vec(call)?;
        line.push(b'\n');
        self.stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(&mut self.stream).read_line(&mut answer)?;
        let answer: Json = serde_json::from_str(&answer).map_err(|_| {
            io::Error::new(io::ErrorKind::UnexpectedEof, "the process that holds the store ended without an answer")
        })?;
        match answer.get("error").and_then(Json::as_str) {
            Some(message) => Err(io::Error::other(message.to_string())),
            None => Ok(serde_json::from_value(answer["ok"].clone())?),
        }
    }
}

/// The listener of a host, until it is dropped.
pub(crate) struct Socket {
    path: PathBuf,
    stopping: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Socket {
    /// Listens in the store in `folder`, which this process holds.
    pub fn start(folder: &Path, host: Weak<Inner>) -> Result<Socket, crate::StoreError> {
        let path = folder.join(NAME);
        let listener = os::listen(folder, NAME).map_err(io_error(&path))?;
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let listen = move || {
            let callers = AtomicUsize::new(0);
            thread::scope(|scope| {
                while let Ok(mut stream) = os::accept(&listener) {
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    if callers.load(Ordering::Relaxed) >= CALLERS_MAX {
                        let _ = stream.write_all(b"{\"error\":\"too many callers at once\"}\n");
                        continue;
                    }
                    callers.fetch_add(1, Ordering::Relaxed);
                    let (host, stop, callers) = (host.clone(), &*stop, &callers);
                    let serve = move || {
                        serve(stream, &host, stop);
                        callers.fetch_sub(1, Ordering::Relaxed);
                    };
                    let _ = thread::Builder::new().name("cutover-caller".to_string()).spawn_scoped(scope, serve);
                }
            });
        };
        let thread = thread::Builder::new().name("cutover-socket".to_string()).spawn(listen);
        Ok(Socket { thread: Some(thread.map_err(io_error(&path))?), path, stopping })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Wakes the listener; it ends once every caller has its answer.
        let woken = os::connect(&self.path);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take())
            && thread.thread().id() != thread::current().id()
        {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

/// Answers the calls of one connection.
fn serve(stream: os::Stream, host: &Weak<Inner>, stop: &AtomicBool) {
    let Ok(mut answers) = stream.try_clone() else { return };
    let mut calls = BufReader::new(stream);
    let mut line = Vec::new();
    while !stop.load(Ordering::Acquire) {
        match (&mut calls).take(CALL_BYTES - line.len() as u64).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            Err(_) => return,
            Ok(_) if !line.ends_with(b"\n") && (line.len() as u64) < CALL_BYTES => continue,
            Ok(_) => {}
        }
        let answer = match (serde_json::from_slice(&line), host.upgrade()) {
            (Err(error), _) => Err(format!("no call of this version's: {error}")),
            (_, None) => Err("the host is shutting down".to_string()),
            (Ok(call), Some(host)) => answer(&host, call),
        };
        let answer = match answer {
            Ok(value) => json!({ "ok": value }),
            Err(message) => json!({ "error": message }),
        };
        if writeln!(answers, "{answer}").is_err() {
            return;
        }
        line.clear();
    }
}

pub(crate) fn answer(host: &Inner, call: Call) -> Result<Json, String> {
    let active = |model: &str| {
        let found = host.models.load().get(model).map(|found| found.routing.load().active.name.clone());
        json!({ "active": found })
    };
    let done = |result: Result<Json, crate::HostError>| result.map_err(|error| error.to_string());
    match call {
        Call::Status => Ok(json!(host.status())),
        Call::History { model } => done(host.history(&model).map(|entries| json!(entries))),
        Call::Checklist { model } => done(host.checklist(&model).map(|list| json!(list))),
        Call::Deploy { model, package, strategy } => {
            done(host.deploy(&model, &package, *strategy).map(|id| json!({ "rollout": id })))
        }
        Call::Promote { model } => done(host.promote_by_hand(&model).map(|()| active(&model))),
        Call::Rollback { model } => done(host.rollback(&model).map(|()| active(&model))),
        Call::Require { model, required } => done(host.require(&model, required).map(|()| json!({}))),
        Call::SignOff { model, version, by } => done(host.sign_off(&model, &version, &by).map(|()| json!({}))),
        Call::CheckStore => host.store.check().map(|check| json!(check)).map_err(|error| error.to_string()),
        Call::RepairStore => done(host.repair_store().map(|repair| json!(repair))),
        Call::Feedback { model, labels } => {
            let total = labels.len();
            let count = |(id, classes): (String, Vec<u32>)| host.feedback(&model, &id, &Label { classes }).err();
            let refused: Vec<String> = labels.into_iter().filter_map(count).map(|e| e.to_string()).collect();
            Ok(json!({ "counted": total - refused.len(), "refused": refused }))
        }
    }
}

#[cfg(unix)]
mod os {
    use super::LOOK;
    use std::{
        fs, io,
        os::unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
        path::{Path, PathBuf},
    };

    pub type Stream = UnixStream;

    /// A path that fits into a socket's address: long ones are reached through a descriptor of their folder, where the system has such names.
    fn short(path: &Path) -> io::Result<(PathBuf, Option<fs::File>)> {
        use std::os::fd::AsRawFd;
        const ADDRESS_BYTES: usize = 100;
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok((path.to_path_buf(), None));
        };
        if path.as_os_str().len() < ADDRESS_BYTES {
            return Ok((path.to_path_buf(), None));
        }
        let folder = fs::File::open(folder)?;
        Ok((Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name), Some(folder)))
    }

    pub fn connect(path: &Path) -> io::Result<Stream> {
        let (short, _folder) = short(path)?;
        UnixStream::connect(short)
    }

    /// At no time can anybody but this user open it: it is made in a folder of its own, and moved when it is closed to others.
    pub fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
        let private = folder.join(".socket");
        let _ = fs::remove_dir_all(&private);
        fs::DirBuilder::new().mode(0o700).create(&private)?;
        let made = private.join(name);
        let (address, _folder) = short(&made)?;
        let listener = UnixListener::bind(address)?;
        fs::set_permissions(&made, fs::Permissions::from_mode(0o600))?;
        fs::rename(&made, folder.join(name))?;
        fs::remove_dir(&private)?;
        Ok(listener)
    }

    pub fn accept(listener: &UnixListener) -> io::Result<Stream> {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LOOK))?;
        Ok(stream)
    }
}

#[cfg(not(unix))]
mod os {
    use std::{
        io,
        net::{TcpListener, TcpStream},
        path::Path,
    };

    pub type Stream = TcpStream;

    fn unsupported<T>() -> io::Result<T> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this system has no sockets in folders"))
    }

    pub fn connect(_: &Path) -> io::Result<Stream> {
        unsupported()
    }

    pub fn listen(_: &Path, _: &str) -> io::Result<TcpListener> {
        unsupported()
    }

    pub fn accept(_: &TcpListener) -> io::Result<Stream> {
        unsupported()
    }
}
