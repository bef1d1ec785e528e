//! Compiles every hand-made CUDA kernel, and some that were generated, for three GPUs, on a machine that needs none: NVRTC and ptxas come from PyPI's wheels. A kernel that
//! spills, or lacks an instruction that it was written for, fails.

use crate::{cargo, emulate, root};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// CUDA 13.0: what its NVRTC compiles runs with drivers from 580 on.
const WHEELS: [&str; 2] = ["nvidia-cuda-nvrtc==13.0.*", "nvidia-cuda-nvcc==13.0.*"];

/// Instructions that are counted, as PTX writes them.
const COUNTED: [&str; 5] = ["mma.sync", "ldmatrix", "cp.async.c", "ld.global.nc.v4", "fma.rn.f32"];

/// Generated kernels that are compiled too, of those that the imitated driver was given.
const GENERATED: usize = 12;

/// Compiles the kernels; `false` where the compiler can't be had. With `table`, prints a line for each as Markdown.
pub fn cuda(table: bool) -> Result<bool> {
    let folder = root().join("target/cuda");
    let sources = folder.join("sources");
    let Some(tools) = tools(&folder)? else {
        eprintln!("skipped: no Python with pip, or no wheel of NVRTC for it");
        return Ok(false);
    };
    fs::create_dir_all(&sources)?;
    let target = sources.to_string_lossy();
    cargo(&["run", "--quiet", "--package", "cutover-kernels", "--example", "cuda_sources", "--", &target], &[])?;
    // Kernels that the imitated driver was given, and what others put beside them, are compiled too.
    let generated = folder.join("generated");
    fs::create_dir_all(&generated)?;
    for path in emulate::cuda::generated(GENERATED)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_string();
        // Those that were written by hand are made for the device, which is imitated as one of 9.0; for other devices `sources` has their like.
        let is_written = fs::read_to_string(&path)?.contains("struct Operands");
        let all: &[&str] = if is_written { &["sm_90"] } else { &["sm_75", "sm_87", "sm_90"] };
        for architecture in all {
            let copy = generated.join(format!("{architecture}-{name}"));
            if !copy.exists() {
                fs::copy(&path, copy)?;
            }
        }
    }
    let script = folder.join("nvrtc.py");
    fs::write(&script, include_str!("nvrtc.py"))?;
    let library = tools.join("lib/libnvrtc.so.13");
    let mut files = Vec::new();
    for folder in [&sources, &generated].into_iter().filter(|folder| folder.exists()) {
        let status = Command::new("python3")
            .args([&script, &library, folder])
            .env("LD_LIBRARY_PATH", tools.join("lib"))
            .status()
            .context("cannot start python3")?;
        if !status.success() {
            bail!("NVRTC refused a kernel");
        }
        for entry in fs::read_dir(folder)? {
            files.push(entry?.path());
        }
    }
    files.retain(|path: &PathBuf| path.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    if table {
        println!(
            "| kernel | registers | spilled bytes | {} |\n|---|---|---|{}|",
            COUNTED.join(" | "),
            ["---"; 5].join("|")
        );
    }
    let mut bad = Vec::new();
    for path in &files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
        let ptx = path.with_extension("ptx");
        let text = fs::read_to_string(&ptx)?;
        let source = fs::read_to_string(path)?;
        let needs = source.lines().next().and_then(|line| line.strip_prefix("// needs")).unwrap_or_default();
        for need in needs.split_whitespace() {
            let (what, count) = need.split_once(':').context("a need without a count")?;
            let (found, count) = (text.matches(what).count(), count.parse::<usize>()?);
            if found < count {
                bad.push(format!("{name} has {found} of {what}, and should have {count}"));
            }
        }
        if text.contains("__local_depot") {
            bad.push(format!("{name} keeps an array in local memory"));
        }
        let (registers, spilled) = assembled(&tools, &ptx)?;
        if spilled > 0 {
            bad.push(format!("{name} spills {spilled} bytes"));
        }
        if table {
            let counts = COUNTED.map(|what| text.matches(what).count().to_string()).join(" | ");
            println!("| {name} | {registers} | {spilled} | {counts} |");
        }
    }
    if !bad.is_empty() {
        bail!("{} of {} kernels:\n{}", bad.len(), files.len(), bad.join("\n"));
    }
    println!("{} CUDA kernels compile, none spills", files.len());
    Ok(true)
}

/// The folder of the compiler's libraries and programs, fetched where it is not there.
pub fn tools(folder: &Path) -> Result<Option<PathBuf>> {
    let tools = folder.join("nvidia/cu13");
    if tools.join("lib/libnvrtc.so.13").exists() && tools.join("bin/ptxas").exists() {
        return Ok(Some(tools));
    }
    let wheels = folder.join("wheels");
    fs::create_dir_all(&wheels)?;
    let pip = |arguments: &[&str]| Command::new("python3").args(["-m", "pip"]).args(arguments).output();
    let target = wheels.to_string_lossy();
    let fetched = pip(&[&["download", "--quiet", "--no-deps", "--dest", &target], &WHEELS[..]].concat());
    if !fetched.is_ok_and(|done| done.status.success()) {
        return Ok(None);
    }
    for entry in fs::read_dir(&wheels)? {
        let unpacked = Command::new("python3").args(["-m", "zipfile", "-e"]).arg(entry?.path()).arg(folder).status()?;
        if !unpacked.success() {
            bail!("cannot unpack a wheel in {}", wheels.display());
        }
    }
    Ok(Some(tools))
}

/// Registers of the module's largest kernel and the bytes that it spills, as the assembler says; kept beside the text.
fn assembled(tools: &Path, ptx: &Path) -> Result<(usize, usize)> {
    let kept = ptx.with_extension("log");
    let is_newer = |a: &Path, b: &Path| Some(a.metadata().ok()?.modified().ok()? > b.metadata().ok()?.modified().ok()?);
    if is_newer(&kept, ptx) != Some(true) {
        let name = ptx.file_name().unwrap_or_default().to_string_lossy();
        let architecture = format!("-arch={}", name.split('-').next().unwrap_or_default());
        // Wheels unpack without the permission to run.
        let program = tools.join("bin/ptxas");
        #[cfg(unix)]
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let output = Command::new(program).args(["-v", &architecture, "-o", "/dev/null"]).arg(ptx).output()?;
        let text = String::from_utf8_lossy(&output.stderr).to_string();
        if !output.status.success() {
            bail!("ptxas refuses {name}:\n{text}");
        }
        fs::write(&kept, text)?;
    }
    let text = fs::read_to_string(&kept)?;
    let most = |before: &str, after: &str| {
        let each = text.split(after).filter_map(|part| part.rsplit_once(before)?.1.trim().parse::<usize>().ok());
        each.max().unwrap_or(0)
    };
    Ok((most("Used ", " registers"), most(", ", " bytes spill stores")))
}
