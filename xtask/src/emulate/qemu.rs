//! 64-bit Arm under QEMU's user mode.

use super::{LEVELS, SAMPLE, SUITES, build, call, install, output_of};
use anyhow::{Context, Result, bail};
use std::{path::Path, process::Command};

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// Where Debian's cross compiler keeps the libraries of the target.
const LIBRARIES: &str = "/usr/aarch64-linux-gnu";
/// Armv8.0 without any extension, one with products of bytes, and everything that QEMU knows; with the rung of the ladder that is theirs.
const PROCESSORS: [(&str, &str); 3] = [("cortex-a57", "neon"), ("cortex-a76", "neondot"), ("max", "neonbf16")];

pub fn emulate(only: &str) -> Result<()> {
    install(&["qemu-user-static", "gcc-aarch64-linux-gnu"])?;
    let mut environment = vec![("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc".to_string())];
    if !has_library("rustc")? {
        // Debian's compiler has a library for the target; artefacts of two compilers are kept apart by cargo itself.
        if !output_of("dpkg", &["--print-foreign-architectures"])?.lines().any(|line| line == "arm64") {
            call("dpkg", &["--add-architecture", "arm64"], Path::new("."))?;
        }
        install(&["rustc-web", "libstd-rust-web-dev:arm64"])?;
        environment.push(("RUSTC", "/usr/bin/rustc".to_string()));
    }
    let mut failed = Vec::new();
    for suite in SUITES {
        let program = build(suite, &["--target", TARGET], &environment)?;
        for (processor, level) in PROCESSORS {
            eprintln!("{} on {processor}", suite.package);
            let status = Command::new("qemu-aarch64-static")
                .args(["-cpu", processor, "-L", LIBRARIES])
                // Else a C library of this machine's own for the target, newer than the loader of that folder, would be found first.
                .args(["-E", &format!("LD_LIBRARY_PATH={LIBRARIES}/lib")])
                .arg(&program)
                .args(Some(only).filter(|only| !only.is_empty()))
                .env(SAMPLE, suite.under_qemu)
                .env(LEVELS, level)
                .current_dir(crate::root())
                .status()
                .context("cannot start qemu-aarch64-static")?;
            if !status.success() {
                failed.push(format!("{} on {processor}", suite.package));
            }
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Whether a compiler has the standard library for the target.
fn has_library(rustc: &str) -> Result<bool> {
    let folder = output_of(rustc, &["--print", "target-libdir", "--target", TARGET])?;
    Ok(Path::new(folder.trim()).is_dir())
}
