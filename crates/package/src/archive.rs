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

/// Writes the files of the archive at `path` into `folder`, which must be there.
pub(crate) fn unpack(path: &Path, folder: &Path) -> Result<(), PackageError> {
    let io = |path: &Path, source| PackageError::Io { path: path.display().to_string(), source };
    let corrupt = |message: String| PackageError::Corrupt { file: path.display().to_string(), message };
    let mut source = BufReader::new(File::open(path).map_err(|e| io(path, e))?);
    let listed = entries_listed(&mut source).map_err(|e| corrupt(format!("not a ZIP archive: {e}")))?;
    let mut archive = ZipArchive::new(source).map_err(|e| corrupt(format!("not a valid ZIP archive: {e}")))?;
    if listed != archive.len() as u64 {
        return Err(corrupt(format!("lists {listed} entries under {} names", archive.len())));
    }
    let mut seen = BTreeSet::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| corrupt(e.to_string()))?;
        let name = entry.name().map_err(|e| corrupt(e.to_string()))?.to_string();
        if !file::ALL.contains(&name.as_str()) || !seen.insert(name.clone()) {
            return Err(corrupt(format!("entry '{name}', which is no file of a package")));
        }
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(corrupt(format!("entry '{name}' is compressed or encrypted; entries are stored as they are")));
        }
        let size = entry.size();
        if size != entry.compressed_size() || size > ENTRY_BYTES {
            return Err(corrupt(format!("entry '{name}' claims {size} bytes, stored in {}", entry.compressed_size())));
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
    Ok(())
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
