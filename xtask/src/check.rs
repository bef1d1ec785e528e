//! What needs no run: formatting, the workspace's rules, clippy and rustdoc, cheapest first.

use crate::{cargo, root, rules};
use anyhow::{Context, Result, bail};
use std::process::Command;

pub fn check() -> Result<()> {
    cargo(&["fmt", "--all", "--check"], &[])?;
    format_of_operators()?;
    rules::check()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"], &[])?;
    // What is off by default: training, and the GPU.
    let packages = ["--package", "cutover-shrink", "--package", "cutover-backend", "--package", "xtask"];
    let features = [
        "--features",
        "cutover-shrink/train,cutover-backend/wgpu,cutover-backend/cuda,cutover-graph/image,xtask/train",
    ];
    let rest = ["--all-targets", "--", "--deny", "warnings"];
    cargo(&[&["clippy"], &packages[..], &features[..], &rest[..]].concat(), &[])?;
    // Private items are documented here, so links to them resolve.
    let flags = "--deny warnings --allow rustdoc::private_intra_doc_links";
    cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"], &[("RUSTDOCFLAGS", flags)])
}

/// The operators' modules are declared inside a macro, where `cargo fmt` does not find them.
fn format_of_operators() -> Result<()> {
    let folder = root().join("crates/graph/src/ops");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    eprintln!("$ rustfmt --check crates/graph/src/ops/*.rs");
    let status = Command::new("rustfmt")
        .args(["--check", "--edition", "2024"])
        .args(&files)
        .current_dir(root())
        .status()
        .context("cannot start rustfmt")?;
    if !status.success() {
        bail!("operators are not formatted: run `rustfmt --edition 2024 crates/graph/src/ops/*.rs`");
    }
    Ok(())
}
