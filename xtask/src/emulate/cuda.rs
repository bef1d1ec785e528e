//! CUDA without a GPU: the CUDA backend's own code on an imitated driver and compiler, whose kernels the C++ compiler makes for the processor.
//!
//! They are shared objects with the names that the backend looks for, cuBLASLt's and NVML's too, so nothing in it knows that they are not NVIDIA's. What
//! they check and what they leave out is in `cuda/driver.cpp`.

use super::{SAMPLE, call};
use crate::{cargo, root};
use anyhow::{Context, Result, bail};
use std::{fs, path::PathBuf, process::Command};

/// What finds the imitation instead of NVIDIA's libraries, and the tests it.
pub fn environment() -> Result<Vec<(&'static str, String)>> {
    let folder = build()?;
    // No cache: what the imitation makes is nothing for a device that tells the same of itself, and what it takes is no measurement.
    let no_cache = ("XDG_CACHE_HOME", "/dev/null".to_string());
    Ok(vec![("LD_LIBRARY_PATH", folder.display().to_string()), ("CUTOVER_GPU", "cuda".to_string()), no_cache])
}

/// Whether there is a C++ compiler, which the imitation needs in a run too.
pub fn is_there() -> bool {
    Command::new(compiler()).arg("--version").output().is_ok_and(|done| done.status.success())
}

/// Runs the tests of the GPU whose names hold `only`, and with `build`'s program those of a driver that refuses this and that.
pub fn emulate(only: &str) -> Result<()> {
    let build = ["test", "--package", "cutover-backend", "--features", "cuda", "--test", "agreement"];
    run(&build, if only.is_empty() { "gpu" } else { only }, 1)
}

/// Runs `build`'s tests whose names hold `only`, on one of each `share` random cases: on a device as it should be, without graphs, lost, small, and with a
/// library that refuses.
pub fn run(build: &[&str], only: &str, share: usize) -> Result<()> {
    let mut environment = environment()?;
    environment.push((SAMPLE, share.to_string()));
    // What is no device for real graphs is one for its own test.
    let refuses = "what_a_driver_refuses_on_the_gpu";
    let library = "gpu_by_hand::large_products";
    for (refused, filter) in [
        ("", only),
        ("no-graphs", only),
        ("lost:3", refuses),
        ("memory:2500000", refuses),
        ("no-products", library),
        ("refused-products", library),
    ] {
        let told = environment.iter().map(|(name, value)| (*name, value.as_str())).chain([("IMITATED_CUDA", refused)]);
        cargo(&[build, &["--", filter]].concat(), &told.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Kernels that the imitated compiler was given: about `count` of them, for NVIDIA's own.
pub fn generated(count: usize) -> Result<Vec<PathBuf>> {
    let folder = root().join("target/emulate/cuda");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut all: Vec<PathBuf> = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    all.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    all.sort();
    let stride = (all.len() / count).max(1);
    Ok(all.into_iter().step_by(stride).collect())
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_string())
}

/// Builds the libraries; their folder.
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
    let libraries = [
        ("libcuda.so", "driver.cpp"),
        ("libnvrtc.so", "compiler.cpp"),
        ("libcublasLt.so", "cublaslt.cpp"),
        ("libnvidia-ml.so.1", "nvml.cpp"),
    ];
    for (library, source) in libraries {
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
