//! Long runs of what the tests sample, with evidence that says when, on what, and what came out.

use crate::root;
use anyhow::{Context, Result, bail};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

/// A test binary that does more when `CUTOVER_SOAK` says how many times its sample.
struct Soak {
    name: &'static str,
    package: &'static str,
    test: &'static str,
    /// Which functions of it, by a part of their names; all if empty.
    only: &'static str,
    /// How many times the sample that `cargo xtask test` runs.
    factor: &'static str,
    about: &'static str,
}

const SOAKS: &[Soak] = &[
    Soak {
        name: "rollout",
        package: "cutover-runtime",
        test: "simulation",
        only: "",
        factor: "100",
        about: "rollouts in simulated worlds: drift, faults, late labels, restarts",
    },
    Soak {
        name: "kill",
        package: "cutover-runtime",
        test: "crash",
        only: "",
        factor: "100",
        about: "the process killed while versions change, and what is opened afterwards",
    },
    Soak {
        name: "swap",
        package: "cutover-runtime",
        test: "host",
        only: "",
        factor: "20",
        about: "swaps under load from four clients, every answer compared",
    },
    Soak {
        name: "package",
        package: "cutover-package",
        test: "hostile",
        only: "",
        factor: "100",
        about: "packages with bytes changed",
    },
    Soak {
        name: "import",
        package: "cutover-graph",
        test: "mutations",
        only: "",
        factor: "1000",
        about: "models with bytes changed, read, decluttered and planned",
    },
    Soak {
        name: "fuzz-import",
        package: "cutover-graph",
        test: "fuzz",
        only: "files",
        factor: "1000",
        about: "the ONNX project's cases with fields changed: read, decluttered and planned",
    },
    Soak {
        name: "fuzz-operators",
        package: "cutover-graph",
        test: "fuzz",
        only: "operators",
        factor: "1000",
        about: "nodes of every operator with made-up attributes and inputs: results against facts, bounds on time and memory",
    },
];

pub fn soak(name: Option<&str>) -> Result<()> {
    let Some(soak) = SOAKS.iter().find(|s| Some(s.name) == name) else {
        for soak in SOAKS {
            println!("{:12} {}", soak.name, soak.about);
        }
        match name {
            None => return Ok(()),
            Some(name) => bail!("there is no soak '{name}'; the list is above"),
        }
    };
    let date = time::OffsetDateTime::now_utc().date();
    let folder = root().join("docs/evidence");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(format!("{}-{date}.txt", soak.name));
    let mut evidence = fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let commit = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()).output();
    let commit = commit.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    writeln!(evidence, "cargo xtask soak {}\ncommit {commit}\ndate {date}\nthreads {threads}\n", soak.name)?;
    let test = ["test", "--release", "--all-features", "--package", soak.package, "--test", soak.test];
    let only = Some(soak.only).filter(|only| !only.is_empty());
    let mut child = Command::new(env!("CARGO"))
        .args(test)
        .args(["--", "--nocapture", "--test-threads=1"])
        .args(only)
        .env("CUTOVER_SOAK", soak.factor)
        // A sum that wraps is a finding.
        .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true")
        .current_dir(root())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo")?;
    let output = child.stdout.take().context("the soak's output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        writeln!(evidence, "{line}")?;
    }
    let status = child.wait()?;
    writeln!(evidence, "\n{}", if status.success() { "passed" } else { "FAILED" })?;
    println!("evidence: {}", path.display());
    if !status.success() {
        bail!("soak {} failed", soak.name);
    }
    Ok(())
}
