//! Opening, checking and writing packages.

use crate::{FileEntry, Golden, Manifest, Profile, TensorSchema, archive, file};
use cutover_graph::{
    Graph, ImportError,
    onnx::{self, ExportError, ImportOptions, Weights},
};
use cutover_input::{InputError, Preprocessor};
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// A manifest or golden file above this is not read.
const SMALL_FILE_BYTES: u64 = 256 << 20;

/// Why a package can't be used or written.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("cannot read or write {path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{file}: {message}")]
    Corrupt { file: String, message: String },
    #[error("{file} has digest {actual}, the manifest says {expected}")]
    Digest { file: String, expected: String, actual: String },
    #[error("the package's format is '{found}', this build reads {expected}")]
    Format { found: String, expected: &'static str },
    #[error("{what} '{name}': expected 1 to 128 letters, digits or . _ - +, not starting with a dot")]
    Name { what: &'static str, name: String },
    #[error(transparent)]
    Import(#[from] ImportError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Input(#[from] InputError),
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PackageError + '_ {
    move |source| PackageError::Io { path: path.display().to_string(), source }
}

/// A package on disk whose files agree with its manifest.
#[derive(Debug)]
pub struct Package {
    pub manifest: Manifest,
    folder: PathBuf,
    /// Holds what an archive was unpacked to.
    _unpacked: Option<tempfile::TempDir>,
}

impl Package {
    /// Whether `path` looks like a package: a folder with a manifest, or a file that is no bare model.
    pub fn is_one(path: &Path) -> bool {
        if path.is_dir() {
            return path.join(file::MANIFEST).is_file();
        }
        let mut magic = [0; 4];
        File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"PK\x03\x04"
    }

    /// Opens the folder or archive at `path` and compares every file with its digest. An archive is unpacked to a temporary folder.
    pub fn open(path: &Path) -> Result<Package, PackageError> {
        if path.is_dir() {
            return Package::in_folder(path.to_path_buf(), None);
        }
        let unpacked = tempfile::Builder::new().prefix("cutover-").tempdir().map_err(io_error(path))?;
        let skipped = archive::unpack(path, unpacked.path())?;
        let package = Package::in_folder(unpacked.path().to_path_buf(), Some(unpacked))?;
        match skipped.first().filter(|_| !package.manifest.is_newer()) {
            Some(name) => {
                let message = format!("entry '{name}', which is no file of a package");
                Err(PackageError::Corrupt { file: path.display().to_string(), message })
            }
            None => Ok(package),
        }
    }

    fn in_folder(folder: PathBuf, unpacked: Option<tempfile::TempDir>) -> Result<Package, PackageError> {
        let manifest = Manifest::parse(&read_small(&folder.join(file::MANIFEST))?)?;
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            let len = fs::metadata(&path).map_err(io_error(&path))?.len();
            if len != entry.bytes {
                let message = format!("{len} bytes, the manifest says {}", entry.bytes);
                return Err(PackageError::Corrupt { file: name.clone(), message });
            }
            let actual = digest(&path)?;
            if actual != entry.blake3 {
                let (file, expected) = (name.clone(), entry.blake3.clone());
                return Err(PackageError::Digest { file, expected, actual });
            }
        }
        Ok(Package { manifest, folder, _unpacked: unpacked })
    }

    /// The model, its weights mapped where `options` say so.
    ///
    /// # Errors
    /// Those of importing; a tensor, input or output that the manifest contradicts.
    pub fn graph(&self, options: &ImportOptions) -> Result<Graph, PackageError> {
        let graph = onnx::import(&self.folder.join(file::MODEL), options)?;
        let corrupt = |message: String| PackageError::Corrupt { file: file::MANIFEST.to_string(), message };
        let found = Manifest::of(&graph, &self.manifest.name, &self.manifest.version)?;
        let alike =
            |a: &[TensorSchema], b: &[TensorSchema]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.is_like(b));
        if !(alike(&found.inputs, &self.manifest.inputs) && alike(&found.outputs, &self.manifest.outputs)) {
            return Err(corrupt("the inputs or outputs it lists are not those of the model".to_string()));
        }
        for (name, digest) in &found.tensors {
            match self.manifest.tensors.get(name) {
                Some(expected) if expected == digest => {}
                Some(_) => return Err(corrupt(format!("tensor '{name}' is not what its digest says"))),
                None => return Err(corrupt(format!("does not list tensor '{name}'"))),
            }
        }
        if let Some(name) = self.manifest.tensors.keys().find(|name| !found.tensors.contains_key(*name)) {
            return Err(corrupt(format!("lists tensor '{name}', which the model does not have")));
        }
        Ok(graph)
    }

    pub fn golden(&self) -> Result<Golden, PackageError> {
        Golden::decode(&read_small(&self.folder.join(file::GOLDEN))?)
    }

    /// What the training data looked like, where the package says so.
    pub fn profile(&self) -> Result<Option<Profile>, PackageError> {
        match self.manifest.files.contains_key(file::PROFILE) {
            true => Ok(Some(Profile::parse(&read_small(&self.folder.join(file::PROFILE))?)?)),
            false => Ok(None),
        }
    }

    /// By which texts become inputs, where they do.
    pub fn tokenizer(&self) -> Result<Option<Vec<u8>>, PackageError> {
        match self.manifest.files.contains_key(file::TOKENIZER) {
            true => Ok(Some(read_small(&self.folder.join(file::TOKENIZER))?)),
            false => Ok(None),
        }
    }

    /// Where the files lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// What a package is made of.
#[derive(Clone, Debug)]
pub struct Contents<'a> {
    pub graph: &'a Graph,
    pub manifest: Manifest,
    pub golden: &'a Golden,
    pub profile: Option<&'a Profile>,
    /// A `tokenizer.json`, which `manifest.preprocessing` of texts needs.
    pub tokenizer: Option<&'a [u8]>,
}

/// Writes a package as one file at `path`; what is there already is replaced only once all of it is written.
pub fn write(contents: &Contents<'_>, path: &Path) -> Result<Manifest, PackageError> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let work = tempfile::Builder::new().prefix(".cutover-").tempdir_in(parent).map_err(io_error(parent))?;
    let manifest = write_folder(contents, work.path())?;
    let archive = work.path().join("package.zip");
    archive::pack(work.path(), &archive)?;
    fs::rename(&archive, path).map_err(io_error(path))?;
    Ok(manifest)
}

/// Writes a package's files into `folder`, which must be there.
pub fn write_folder(contents: &Contents<'_>, folder: &Path) -> Result<Manifest, PackageError> {
    let weights = Weights::Safetensors { file_name: file::WEIGHTS.to_string() };
    onnx::export(contents.graph, &folder.join(file::MODEL), &weights)?;
    let golden = folder.join(file::GOLDEN);
    fs::write(&golden, contents.golden.encode()).map_err(io_error(&golden))?;
    let mut manifest = contents.manifest.clone();
    // Identities are those of the model as it is read back, which is what a device sees.
    let read = onnx::import(&folder.join(file::MODEL), &ImportOptions::default())?;
    let found = Manifest::of(&read, &manifest.name, &manifest.version)?;
    manifest.tensors = found.tensors;
    manifest.inputs = described(found.inputs, &manifest.inputs);
    manifest.outputs = described(found.outputs, &manifest.outputs);
    let dtype = |name: &str| {
        let id = contents.graph.inputs().iter().find(|&&id| contents.graph.value(id).name == name);
        Some(contents.graph.value(*id?).fact.as_tensor()?.dtype)
    };
    Preprocessor::new(manifest.preprocessing.clone(), contents.tokenizer, dtype)?;
    let mut names = vec![file::MODEL, file::WEIGHTS, file::GOLDEN];
    if let Some(tokenizer) = contents.tokenizer {
        let path = folder.join(file::TOKENIZER);
        fs::write(&path, tokenizer).map_err(io_error(&path))?;
        names.push(file::TOKENIZER);
    }
    if let Some(profile) = contents.profile {
        let path = folder.join(file::PROFILE);
        let text = serde_json::to_vec_pretty(profile).expect("a profile is plain data");
        fs::write(&path, text).map_err(io_error(&path))?;
        names.push(file::PROFILE);
    }
    for name in names {
        let path = folder.join(name);
        let bytes = fs::metadata(&path).map_err(io_error(&path))?.len();
        manifest.files.insert(name.to_string(), FileEntry { bytes, blake3: digest(&path)? });
    }
    let path = folder.join(file::MANIFEST);
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    fs::write(&path, text).map_err(io_error(&path))?;
    Ok(manifest)
}

/// `found` with the ranges and labels that `given` says of the same names.
fn described(mut found: Vec<TensorSchema>, given: &[TensorSchema]) -> Vec<TensorSchema> {
    for schema in &mut found {
        if let Some(given) = given.iter().find(|given| given.name == schema.name) {
            (schema.range, schema.labels) = (given.range, given.labels.clone());
        }
    }
    found
}

/// The BLAKE3 digest of a file, read in pieces.
fn digest(path: &Path) -> Result<String, PackageError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(io_error(path))?).map_err(io_error(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn read_small(path: &Path) -> Result<Vec<u8>, PackageError> {
    let file = File::open(path).map_err(io_error(path))?;
    let mut bytes = Vec::new();
    file.take(SMALL_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io_error(path))?;
    if bytes.len() as u64 > SMALL_FILE_BYTES {
        let message = format!("above {SMALL_FILE_BYTES} bytes");
        return Err(PackageError::Corrupt { file: path.display().to_string(), message });
    }
    Ok(bytes)
}
