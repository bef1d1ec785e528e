//! A package as one file: a ZIP whose entries are stored, not compressed, and start on pages.

use crate::{PackageError, file};
use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

const PAGE: u16 = 4096;
/// Largest entry that is unpacked.
const ENTRY_BYTES: u64 = 64 << 30;

/// Writes the files of `folder` into the archive at `path`.
pub(crate) fn pack(folder: &Path, path: &Path) -> Result<(), PackageError> {
    let io = |path: &Path, source| PackageError::Io { path: path.display().to_string(), source };
    let zip = |e: zip::result::ZipError| io(path, io::Error::other(e));
    let mut archive = ZipWriter::new(BufWriter::new(File::create(path).map_err(|e| io(path, e))?));
    for name in file::ALL {
        let from = folder.join(name);
        if file::OPTIONAL.contains(name) && !from.exists() {
            continue;
        }
        let mut source = File::open(&from).map_err(|e| io(&from, e))?;
        let large = source.metadata().map_err(|e| io(&from, e))?.len() >= u64::from(u32::MAX);
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment(PAGE)
            .large_file(large)
            .unix_permissions(0o644);
        archive.start_file(*name, options).map_err(zip)?;
        io::copy(&mut source, &mut archive).map_err(|e| io(path, e))?;
    }
    let mut file = archive.finish().map_err(zip)?;
    file.flush().and_then(|()| file.get_ref().sync_all()).map_err(|e| io(path, e))
}

/// Writes the files of the archive at `path` into `folder`, which must be there; gives the names of entries that this version does not know,
/// which are left out.
pub(crate) fn unpack(path: &Path, folder: &Path) -> Result<Vec<String>, PackageError> {
    let io = |path: &Path, source| PackageError::Io { path: path.display().to_string(), source };
    let corrupt = |message: String| PackageError::Corrupt { file: path.display().to_string(), message };
    let mut source = BufReader::new(File::open(path).map_err(|e| io(path, e))?);
    let listed = entries_listed(&mut source).map_err(|e| corrupt(format!("not a ZIP archive: {e}")))?;
    let mut archive = ZipArchive::new(source).map_err(|e| corrupt(format!("not a valid ZIP archive: {e}")))?;
    if listed != archive.len() as u64 {
        return Err(corrupt(format!("lists {listed} entries under {} names", archive.len())));
    }
    let (mut seen, mut skipped) = (BTreeSet::new(), Vec::new());
    let mut headers = File::open(path).map_err(|e| io(path, e))?;
    let mut extents: Vec<(u64, u64, String)> = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| corrupt(e.to_string()))?;
        let name = entry.name().map_err(|e| corrupt(e.to_string()))?.to_string();
        let is_plain = !name.contains(['/', '\\']) && !name.starts_with('.');
        if !is_plain || !seen.insert(name.clone()) {
            return Err(corrupt(format!("entry '{name}', which is no file of a package")));
        }
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(corrupt(format!("entry '{name}' is compressed or encrypted; entries are stored as they are")));
        }
        let size = entry.size();
        if size != entry.compressed_size() || size > ENTRY_BYTES {
            return Err(corrupt(format!("entry '{name}' claims {size} bytes, stored in {}", entry.compressed_size())));
        }
        let local = LocalHeader::read(&mut headers, entry.header_start())
            .map_err(|e| corrupt(format!("entry '{name}': {e}")))?;
        local.agrees(&name, size).map_err(|e| corrupt(format!("the header before entry '{name}' {e}")))?;
        let data = entry.data_start().ok_or_else(|| corrupt(format!("entry '{name}' has no data")))?;
        extents.push((entry.header_start(), data.saturating_add(size), name.clone()));
        if !file::ALL.contains(&name.as_str()) {
            skipped.push(name);
            continue;
        }
        let to = folder.join(&name);
        let mut target = BufWriter::new(File::create(&to).map_err(|e| io(&to, e))?);
        let copied = io::copy(&mut entry.by_ref().take(size), &mut target)
            .map_err(|e| corrupt(format!("entry '{name}': {e}")))?;
        target.flush().map_err(|e| io(&to, e))?;
        if copied != size {
            return Err(corrupt(format!("entry '{name}' ends after {copied} of {size} bytes")));
        }
    }
    extents.sort();
    if let Some(pair) = extents.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        return Err(corrupt(format!("entries '{}' and '{}' lie over each other", pair[0].2, pair[1].2)));
    }
    Ok(skipped)
}

/// What stands before an entry's bytes. Readers that go by it, rather than by the central directory, must see the same archive.
struct LocalHeader {
    method: u64,
    flags: u64,
    stored: u64,
    size: u64,
    name: Vec<u8>,
}

impl LocalHeader {
    /// Bytes before the name.
    const BYTES: usize = 30;

    fn read(file: &mut File, at: u64) -> io::Result<LocalHeader> {
        let mut fixed = [0; LocalHeader::BYTES];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut fixed)?;
        let number = |at: usize, n: usize| fixed[at..at + n].iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
        let mut name = vec![0; number(26, 2) as usize];
        file.read_exact(&mut name)?;
        Ok(LocalHeader { flags: number(6, 2), method: number(8, 2), stored: number(18, 4), size: number(22, 4), name })
    }

    fn agrees(&self, name: &str, size: u64) -> Result<(), String> {
        /// The true size follows in an extra field.
        const ZIP64: u64 = u32::MAX as u64;
        /// The sizes follow the entry's bytes.
        const DATA_DESCRIPTOR: u64 = 1 << 3;
        if self.name != name.as_bytes() {
            return Err(format!("names '{}'", String::from_utf8_lossy(&self.name)));
        }
        if self.method != 0 || self.flags & DATA_DESCRIPTOR != 0 {
            return Err(format!(
                "has method {} and flags {:#x}; entries are stored, their size before them",
                self.method, self.flags
            ));
        }
        match [self.stored, self.size].into_iter().find(|&found| found != size && found != ZIP64) {
            Some(found) => Err(format!("claims {found} bytes, the directory {size}")),
            None => Ok(()),
        }
    }
}

/// The number of entries that the end of the central directory claims: names that come twice are counted twice there.
fn entries_listed(source: &mut (impl Read + Seek)) -> io::Result<u64> {
    let len = source.seek(SeekFrom::End(0))?;
    let tail = len.min(22 + u64::from(u16::MAX));
    source.seek(SeekFrom::Start(len - tail))?;
    let mut bytes = Vec::new();
    source.by_ref().take(tail).read_to_end(&mut bytes)?;
    let find = |signature: [u8; 4]| bytes.windows(4).rposition(|w| w == signature);
    let missing = || io::Error::other("it has no end of central directory");
    let number = |at: usize, n: usize| -> io::Result<u64> {
        let field = bytes.get(at..at + n).ok_or_else(missing)?;
        Ok(field.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b)))
    };
    let end = find([0x50, 0x4b, 5, 6]).ok_or_else(missing)?;
    match number(end + 10, 2)? {
        0xffff => number(find([0x50, 0x4b, 6, 6]).ok_or_else(missing)? + 32, 8),
        entries => Ok(entries),
    }
}
