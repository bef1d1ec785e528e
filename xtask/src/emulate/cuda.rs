//! CUDA without a GPU: the CUDA backend's own code on an imitated driver and compiler, whose kernels the C++ compiler makes for the processor.
//!
//! The two are shared objects with the names that the backend looks for, so nothing in it knows that they are not NVIDIA's. What they check
//! and what they leave out is in `cuda/driver.cpp`.

use super::call;
use crate::{cargo, root};
use anyhow::{Context, Result, bail};
use std::{fs, path::PathBuf, process::Command};

/// What finds the imitation instead of NVIDIA's libraries, and the tests it.
pub fn environment() -> Result<Vec<(&'static str, String)>> {
    let folder = build()?;
    Ok(vec![("LD_LIBRARY_PATH", folder.display().to_string()), ("CUTOVER_GPU", "cuda".to_string())])
}

/// Whether there is a C++ compiler, which the imitation needs in a run too.
pub fn is_there() -> bool {
    Command::new(compiler()).arg("--version").output().is_ok_and(|done| done.status.success())
}

/// Runs the tests of the GPU whose names hold `only`.
pub fn emulate(only: &str) -> Result<()> {
    let environment = environment()?;
    let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let arguments = ["test", "--package", "cutover-backend", "--features", "cuda", "--test", "agreement"];
    let filter = if only.is_empty() { "gpu" } else { only };
    cargo(&[&arguments[..], &["--", filter]].concat(), &environment)
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_string())
}

/// Builds both libraries; their folder.
fn build() -> Result<PathBuf> {
    if !is_there() {
        bail!("the imitation of CUDA needs a C++ compiler: there is no '{}'", compiler());
    }
    let folder = root().join("target/emulate/cuda");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let sources = root().join("xtask/src/emulate/cuda");
    let define = |name: &str, path: PathBuf| format!("-D{name}=\"{}\"", path.display());
    let folders = [
        define("FOLDER", folder.clone()),
        define("HEADERS", sources.clone()),
        define("HOST_FOLDER", root().join("kernels/cuda")),
    ];
    for (library, source) in [("libcuda.so", "driver.cpp"), ("libnvrtc.so", "compiler.cpp")] {
        // Whole or not at all: another process may have it loaded.
        let part = folder.join(format!("{library}.{}", std::process::id()));
        let (part_path, source) = (part.display().to_string(), sources.join(source).display().to_string());
        let flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror"];
        let files = ["-o", &part_path, &source, "-ldl"];
        let definitions = folders.iter().map(String::as_str);
        let arguments: Vec<&str> = flags.into_iter().chain(definitions).chain(files).collect();
        call(&compiler(), &arguments, &root())?;
        fs::rename(&part, folder.join(library)).with_context(|| format!("cannot write {library}"))?;
    }
    Ok(folder)
}
