//! The rules of the workspace, read off `cargo metadata` and the sources: who may depend on whom, which licences and
//! crates may come in, where `unsafe` may live.

use crate::root;
use anyhow::{Context, Result, bail};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Which member packages each member may depend on, outside tests.
const EDGES: &[(&str, &[&str])] = &[
    ("cutover-kernels", &[]),
    ("cutover-tensor", &[]),
    ("cutover-monitor", &[]),
    ("cutover-graph", &["cutover-tensor"]),
    ("cutover-input", &["cutover-tensor"]),
    ("cutover-backend", &["cutover-graph", "cutover-tensor", "cutover-kernels"]),
    ("cutover-package", &["cutover-graph", "cutover-input", "cutover-tensor", "cutover-monitor"]),
    ("cutover-shrink", &["cutover-graph", "cutover-backend", "cutover-kernels", "cutover-package", "cutover-tensor"]),
    ("cutover-runtime", &["cutover-graph", "cutover-backend", "cutover-package", "cutover-monitor", "cutover-tensor"]),
    ("cutover-server", &["cutover-runtime"]),
    (
        "cutover",
        &[
            "cutover-tensor",
            "cutover-graph",
            "cutover-backend",
            "cutover-input",
            "cutover-package",
            "cutover-monitor",
            "cutover-runtime",
            "cutover-shrink",
        ],
    ),
    ("cutover-cli", &["cutover", "cutover-server", "cutover-shrink"]),
    ("cutover-capi", &["cutover"]),
    ("cutover-benches", &["cutover", "cutover-kernels"]),
    ("cutover-tests", &["cutover", "cutover-cli"]),
    ("xtask", &["cutover", "cutover-shrink"]),
];

/// Packages only these members may name, in any kind of dependency.
const RESERVED: &[(&str, &[&str])] = &[
    ("tokio", &["cutover-server", "cutover-cli"]),
    ("axum", &["cutover-server"]),
    ("candle-core", &["cutover-shrink"]),
    ("candle-nn", &["cutover-shrink"]),
    ("wgpu", &["cutover-backend"]),
    ("cudarc", &["cutover-backend"]),
    ("naga", &["cutover-backend"]),
    ("anyhow", &["cutover-cli", "xtask"]),
];

/// Never in the tree of the library as `cargo add cutover` gives it.
const NOT_IN_LIBRARY: &[&str] =
    &["tokio", "candle-core", "candle-nn", "wgpu", "cudarc", "naga", "axum", "clap", "anyhow"];

/// Never anywhere.
const BANNED: &[(&str, &str)] = &[
    ("openssl", "needs a C library on every machine; rustls serves"),
    ("protobuf", "prost is the one protobuf library here"),
    ("native-tls", "rustls serves"),
];

const LICENCES: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates that may be there in several versions, and on whose account.
const DOUBLED: &[(&str, &str)] = &[
    ("base64", "tokenizers is behind; behind the feature 'text'"),
    ("constant_time_eq", "blake3 and zip are on different ones"),
    ("getrandom", "tokenizers' hasher is behind; behind the features 'text' and 'train'"),
    ("hashbrown", "safetensors and indexmap are on different ones"),
    ("itertools", "criterion is behind prost's; benchmarks and build time only"),
    ("miniz_oxide", "png's decoder and encoder are on different ones; behind the feature 'image'"),
    ("r-efi", "comes with getrandom; on UEFI alone"),
    ("rand", "candle and tokenizers are behind; behind the features 'text' and 'train'"),
    ("rand_core", "comes with rand"),
    ("syn", "derive macros are moving to syn 3; build time only"),
    ("winnow", "the toml crate of cbindgen uses both; a test only"),
];

/// Files that may hold `unsafe`, by prefix.
const UNSAFE: &[&str] = &[
    "kernels/src/",
    "crates/tensor/src/buffer.rs",
    "crates/graph/src/onnx/mapping.rs",
    "crates/package/src/mapping.rs",
    "crates/runtime/src/store/mapping.rs",
    "crates/backend/src/cpu/",
    "crates/backend/src/cuda/api.rs",
    "crates/backend/src/cuda/energy.rs",
    "crates/backend/src/cuda/library.rs",
    "crates/backend/src/wgpu/gpu.rs",
    "crates/backend/tests/no_alloc.rs",
    "crates/graph/tests/fuzz/watch.rs",
    "crates/capi/src/",
];

const MARKERS: &[&str] = &["todo!(", "unimplemented!(", "#[ignore", "dbg!("];

pub fn check() -> Result<()> {
    let metadata = MetadataCommand::new().current_dir(root()).exec().context("cargo metadata")?;
    let mut broken = Vec::new();
    edges(&metadata, &mut broken);
    licences(&metadata, &mut broken);
    banned_and_doubled(&metadata, &mut broken);
    library_tree(&mut broken)?;
    sources(&mut broken)?;
    if broken.is_empty() {
        println!("rules: {} packages, all hold", metadata.packages.len());
        return Ok(());
    }
    for line in &broken {
        eprintln!("rule broken: {line}");
    }
    bail!("{} rules of the workspace are broken", broken.len())
}

fn edges(metadata: &Metadata, broken: &mut Vec<String>) {
    let members: BTreeSet<&str> = metadata.workspace_packages().iter().map(|p| p.name.as_str()).collect();
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let Some((_, allowed)) = EDGES.iter().find(|(n, _)| *n == name) else {
            broken.push(format!("package {name} has no line in the table of edges (xtask/src/rules.rs)"));
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            let test_only = dependency.kind == DependencyKind::Development;
            if members.contains(to) && !allowed.contains(&to) && !test_only {
                broken.push(format!("{name} depends on {to}, which the table of edges does not allow"));
            }
            if let Some((_, owners)) = RESERVED.iter().find(|(n, _)| *n == to)
                && !owners.contains(&name)
                && !test_only
            {
                broken.push(format!("{name} depends on {to}, which only {} may", owners.join(", ")));
            }
        }
    }
}

fn licences(metadata: &Metadata, broken: &mut Vec<String>) {
    for package in &metadata.packages {
        let Some(licence) = &package.license else {
            broken.push(format!("{} {} states no licence", package.name, package.version));
            continue;
        };
        let accepted = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX).is_ok_and(|expression| {
            expression.evaluate(|requirement| LICENCES.contains(&requirement.to_string().as_str()))
        });
        if !accepted {
            broken.push(format!("{} {} is licensed {licence}", package.name, package.version));
        }
    }
}

fn banned_and_doubled(metadata: &Metadata, broken: &mut Vec<String>) {
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in &metadata.packages {
        versions.entry(package.name.as_str()).or_default().insert(package.version.to_string());
    }
    for (name, reason) in BANNED {
        if versions.contains_key(name) {
            broken.push(format!("{name} is in the tree: {reason}"));
        }
    }
    for (name, versions) in versions.iter().filter(|(_, v)| v.len() > 1) {
        if !DOUBLED.iter().any(|(n, _)| n == name) {
            let list: Vec<_> = versions.iter().map(String::as_str).collect();
            broken.push(format!("{name} is in the tree in versions {}", list.join(" and ")));
        }
    }
    for (name, _) in DOUBLED {
        if versions.get(name).is_none_or(|v| v.len() < 2) {
            broken.push(format!("{name} is no longer doubled: take it off the list in xtask/src/rules.rs"));
        }
    }
}

fn library_tree(broken: &mut Vec<String>) -> Result<()> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--package",
            "cutover",
            "--edges",
            "normal,no-proc-macro",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .current_dir(root())
        .output()
        .context("cargo tree")?;
    if !output.status.success() {
        bail!("cargo tree failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let tree = String::from_utf8(output.stdout)?;
    for line in tree.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if NOT_IN_LIBRARY.contains(&name) {
            broken.push(format!("the library's default tree holds {name}"));
        }
    }
    Ok(())
}

fn sources(broken: &mut Vec<String>) -> Result<()> {
    let mut files = Vec::new();
    for folder in ["kernels", "crates", "benches", "tests", "xtask"] {
        rust_files(&root().join(folder), &mut files)?;
    }
    for path in files {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let relative = path.strip_prefix(root()).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        if !text.trim_start().starts_with("//!") {
            broken.push(format!("{relative} does not open with //! saying what it is for"));
        }
        let names_it = relative != "xtask/src/rules.rs" && text.contains("allow(unsafe_code)");
        if names_it && !UNSAFE.iter().any(|prefix| relative.starts_with(prefix)) {
            broken.push(format!("{relative} allows unsafe code, and is not on the list in xtask/src/rules.rs"));
        }
        for (number, line) in text.lines().enumerate().filter(|_| relative != "xtask/src/rules.rs") {
            if let Some(marker) = MARKERS.iter().find(|m| line.contains(**m)) {
                broken.push(format!("{relative}:{} holds {marker})", number + 1));
            }
        }
    }
    Ok(())
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|n| n != "target") {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
