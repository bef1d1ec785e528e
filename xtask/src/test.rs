//! Everything that must pass before a change lands.

use crate::{cargo, check, cuda, emulate, root};
use anyhow::{Context, Result, bail};
use std::{
    process::{Command, Stdio},
    time::Instant,
};

pub fn test() -> Result<()> {
    let start = Instant::now();
    check::check()?;
    // One build serves every suite: the dev profile keeps overflow checks and debug assertions, its kernels are optimised.
    cargo(&["test", "--workspace", "--quiet"], &[])?;
    let skipped = optional()?;
    let compiled = cuda::cuda(false)?;
    let missing = match skipped {
        0 => String::new(),
        skipped => format!(
            ", {skipped} skipped for want of a GPU (Debian's mesa-vulkan-drivers has one that the CPU imitates)"
        ),
    };
    let unimitated = if emulate::cuda::is_there() { "" } else { ", CUDA not imitated for want of a C++ compiler" };
    let uncompiled = if compiled { "" } else { ", CUDA kernels not compiled for want of NVRTC" };
    println!("all tests passed in {} s{missing}{unimitated}{uncompiled}", start.elapsed().as_secs());
    Ok(())
}

/// The GPU that a processor imitates, installed where this may be done without asking.
fn software_gpu() {
    let output = |program: &str, arguments: &[&str]| Command::new(program).args(arguments).output().ok();
    let is_root = output("id", &["-u"]).is_some_and(|id| id.stdout.trim_ascii() == b"0");
    let drivers = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let has_driver =
        drivers.iter().any(|folder| std::fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some()));
    if !is_root || has_driver {
        return;
    }
    let install = ["install", "--yes", "--no-install-recommends", "mesa-vulkan-drivers", "libvulkan1"];
    eprintln!("$ apt-get {}", install.join(" "));
    if !output("apt-get", &install).is_some_and(|done| done.status.success()) {
        let _ = output("apt-get", &["update"]);
        let _ = output("apt-get", &install);
    }
}

/// What is off by default, training and the GPU, in one build of its own; how many tests found no GPU.
fn optional() -> Result<usize> {
    software_gpu();
    let build =
        "test --package cutover-shrink --package cutover-backend --lib --test agreement --test prune --test recipe";
    // What the workspace's tests have switched on too is not built again.
    let features = "--features cutover-shrink/train,cutover-backend/wgpu,cutover-backend/cuda,cutover-graph/image";
    let tests = "-- --nocapture train gpu the_loss";
    let arguments: Vec<&str> = [build, features, tests].iter().flat_map(|part| part.split(' ')).collect();
    eprintln!("$ cargo {}", arguments.join(" "));
    let output = Command::new(env!("CARGO"))
        .args(&arguments)
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{}", text.trim());
    if !output.status.success() {
        bail!("`cargo {}` failed", arguments.join(" "));
    }
    if emulate::cuda::is_there() {
        // The same build: only what it finds for CUDA differs. Its compiler takes a second for a kernel, so a sample has to do.
        let build: Vec<&str> = [build, features].iter().flat_map(|part| part.split(' ')).collect();
        emulate::cuda::run(&build, "gpu", 4)?;
    }
    Ok(text.lines().filter(|line| line.contains("skipped: ")).count())
}
