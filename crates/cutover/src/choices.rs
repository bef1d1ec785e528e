//! What `Device::Auto` chose before: a small file of lines in the user's cache, which may be deleted at any time.
//!
//! A line is `KEY BACKEND TRIED…`, each tried one as `backend:predicted_ns:measured_ns` with `-` for what is not known. A line that can't be read is as if it was
//! not there, and so is the whole file. The last write of two processes wins: what is lost is measured again.

use cutover_backend::{Choice, Tried};
use cutover_graph::Identity;
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

const HEAD: &str = "cutover choices 1";
/// Choices that are kept, the newest.
const KEPT_MAX: usize = 512;
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where choices are kept; nowhere without a file.
pub(crate) struct Choices(Option<PathBuf>);

/// A choice as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kept {
    pub backend: String,
    pub tried: Vec<Tried>,
}

impl Choices {
    #[cfg(test)]
    pub fn at(path: Option<PathBuf>) -> Choices {
        Choices(path)
    }

    /// `cutover/choices` in the user's cache: `$XDG_CACHE_HOME`, or `$HOME/.cache`.
    pub fn of_user() -> Choices {
        let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        Choices(cache.map(|cache| cache.join("cutover").join("choices")))
    }

    pub fn find(&self, key: &Identity) -> Option<Kept> {
        let key = key.to_string();
        lines(self.0.as_deref()?).iter().rev().find_map(|line| parse(line.strip_prefix(&key)?.strip_prefix(' ')?))
    }

    /// Keeps a choice. A place that can't be written is no error: the next load measures again.
    pub fn keep(&self, key: &Identity, choice: &Choice) {
        let Some(path) = &self.0 else { return };
        let key = key.to_string();
        let mut all = lines(path);
        all.retain(|line| !line.starts_with(&key));
        let time = |time: Option<Duration>| time.map_or("-".to_string(), |time| time.as_nanos().to_string());
        let tried = |t: &Tried| format!("{}:{}:{}", t.backend, time(t.predicted), time(t.measured));
        let tried: Vec<String> = choice.tried.iter().map(tried).collect();
        all.push(format!("{key} {} {}", choice.device.backend, tried.join(" ")));
        let kept = &all[all.len().saturating_sub(KEPT_MAX)..];
        let _ = replace(path, &format!("{HEAD}\n{}\n", kept.join("\n")));
    }
}

fn lines(path: &Path) -> Vec<String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
    let mut lines = text.lines();
    match read.is_ok() && lines.next() == Some(HEAD) {
        true => lines.map(str::to_string).collect(),
        false => Vec::new(),
    }
}

fn parse(rest: &str) -> Option<Kept> {
    let mut words = rest.split(' ');
    let backend = words.next()?.to_string();
    let time = |text: &str| match text {
        "-" => Some(None),
        nanos => nanos.parse().ok().map(|nanos| Some(Duration::from_nanos(nanos))),
    };
    let tried = words.filter(|word| !word.is_empty()).map(|word| {
        let mut parts = word.split(':');
        let (backend, predicted, measured) = (parts.next()?, parts.next()?, parts.next()?);
        let (predicted, measured) = (time(predicted)?, time(measured)?);
        let (backend, device, note) = (backend.to_string(), String::new(), String::new());
        Some(Tried { backend, device, predicted, measured, note })
    });
    Some(Kept { backend, tried: tried.collect::<Option<_>>()? })
}

/// Writes a file beside it and renames that: a reader finds the old one or the new.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension(std::process::id().to_string());
    let written = File::create(&beside).and_then(|mut file| file.write_all(text.as_bytes()));
    let done = written.and_then(|()| fs::rename(&beside, path));
    if done.is_err() {
        let _ = fs::remove_file(&beside);
    }
    done
}
