//! What a machine with an NVIDIA GPU runs, in a folder that needs neither Rust nor a compiler there: programs, the compiler's libraries, and
//! `benches/gpu.py`, which starts them.

use crate::{cuda, root};
use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Builds everything into `folder`.
pub fn gpu(folder: &Path, profile: &str) -> Result<()> {
    let bin = folder.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    // One build, so that both have the same of everything.
    let packages = ["--package", "cutover-cli", "--package", "cutover-backend"];
    let features = ["--features", "cutover-cli/cuda,cutover-cli/wgpu,cutover-backend/cuda,cutover-backend/wgpu"];
    let targets = ["--bin", "cutover", "--test", "agreement"];
    for (name, path) in built(&[&packages[..], &features, &targets].concat(), profile)? {
        let to = bin.join(&name);
        fs::copy(&path, &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    for script in ["gpu.py", "gpu_torch.py"] {
        fs::copy(root().join("benches").join(script), folder.join(script))?;
    }
    let libraries = folder.join("lib");
    fs::create_dir_all(&libraries)?;
    match cuda::tools(&root().join("target/cuda"))? {
        None => eprintln!("no wheel of NVRTC can be had here: the machine needs one of its own"),
        Some(tools) => {
            for entry in fs::read_dir(tools.join("lib"))? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().to_string();
                if name.starts_with("libnvrtc") && name.contains(".so") {
                    fs::copy(&path, libraries.join(name))?;
                }
            }
        }
    }
    println!("{0}: copy it to the machine, and run `python3 gpu.py --models FOLDER` there", folder.display());
    Ok(())
}

/// What cargo builds with these arguments: names and paths of programs.
fn built(arguments: &[&str], profile: &str) -> Result<Vec<(String, PathBuf)>> {
    eprintln!("$ cargo build --profile {profile} {}", arguments.join(" "));
    let mut cargo = Command::new(env!("CARGO"))
        .args(["build", "--profile", profile, "--message-format=json-render-diagnostics"])
        .args(arguments)
        .current_dir(root())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let told = std::io::BufReader::new(cargo.stdout.take().context("cargo tells nothing")?);
    let mut programs = Vec::new();
    for message in Message::parse_stream(told) {
        if let Message::CompilerArtifact(artifact) = message?
            && let Some(path) = artifact.executable
        {
            programs.push((artifact.target.name, path.into_std_path_buf()));
        }
    }
    if !cargo.wait()?.success() {
        bail!("cargo build failed");
    }
    Ok(programs)
}
