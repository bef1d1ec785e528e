//! Everything that must pass before a change lands.

use crate::{cargo, check, root};
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
    // candle splits its sums by threads; on one, training gives the same bytes again.
    let training = ["test", "--package", "cutover-shrink", "--features", "train", "--lib", "--quiet", "train::"];
    cargo(&training, &[("RAYON_NUM_THREADS", "1")])?;
    let skipped = gpu()?;
    let missing = match skipped {
        0 => String::new(),
        skipped => format!(
            ", {skipped} skipped for want of a GPU (Debian's mesa-vulkan-drivers has one that the CPU imitates)"
        ),
    };
    println!("all tests passed in {} s{missing}", start.elapsed().as_secs());
    Ok(())
}

/// The tests of the GPU backend, which takes a build of its own; how many of them found no GPU.
fn gpu() -> Result<usize> {
    let arguments = [
        "test",
        "--package",
        "cutover-backend",
        "--features",
        "wgpu",
        "--lib",
        "--test",
        "agreement",
        "gpu",
        "--",
        "--nocapture",
    ];
    eprintln!("$ cargo {}", arguments.join(" "));
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{}", text.trim());
    if !output.status.success() {
        bail!("`cargo {}` failed", arguments.join(" "));
    }
    Ok(text.lines().filter(|line| line.contains("skipped: ")).count())
}
