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
    /// The test binary; the package's own tests if empty.
    test: &'static str,
    /// Which functions of it, by a part of their names; all if empty.
    only: &'static str,
    /// How many times the sample that `cargo xtask test` runs.
    factor: &'static str,
    about: &'static str,
}

const SOAKS: &[Soak] = &[
    Soak {
        name: "simulation",
        package: "cutover-runtime",
        test: "simulation",
        only: "rollouts",
        factor: "50",
        about: "100,000 rollouts in simulated worlds: bad candidates, drift, crashes, late labels, clock jumps, full disks; --seed N replays one",
    },
    Soak {
        name: "kill",
        package: "cutover-runtime",
        test: "crash",
        only: "",
        factor: "100",
        about: "the process killed 1,200 times while versions change, and what is opened afterwards",
    },
    Soak {
        name: "power",
        package: "cutover-runtime",
        test: "",
        only: "power_cut",
        factor: "100",
        about: "the power cut at every effect of the store, recovery included, and every effect failing",
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

impl Soak {
    /// Of cargo.
    fn arguments(&self) -> Vec<String> {
        // A package's own tests lie in its library.
        let target: &[&str] = if self.test.is_empty() { &["--lib"] } else { &["--test", self.test] };
        let test = ["test", "--release", "--all-features", "--package", self.package];
        let all = test.iter().chain(target).chain(&["--", "--nocapture", "--test-threads=1"]);
        let only = Some(self.only).filter(|only| !only.is_empty());
        all.copied().chain(only).map(str::to_string).collect()
    }
}

/// Runs a soak; with a `seed`, that one run of its alone, without evidence.
pub fn soak(name: Option<&str>, seed: Option<u64>) -> Result<()> {
    let Some(soak) = SOAKS.iter().find(|s| Some(s.name) == name) else {
        for soak in SOAKS {
            println!("{:12} {}", soak.name, soak.about);
        }
        match name {
            None => return Ok(()),
            Some(name) => bail!("there is no soak '{name}'; the list is above"),
        }
    };
    if let Some(seed) = seed {
        if soak.name != "simulation" {
            bail!("--seed replays a run of the simulation alone");
        }
        let arguments = soak.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        return crate::cargo(&arguments, &[("CUTOVER_SEED", &seed.to_string())]);
    }
    let date = time::OffsetDateTime::now_utc().date();
    let folder = root().join("docs/evidence");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(format!("{}-{date}.txt", soak.name));
    let mut evidence = fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let commit = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()).output();
    let commit = commit.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_string()).unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    writeln!(evidence, "cargo xtask soak {}\ncommit {commit}\ndate {date}\nthreads {threads}\n", soak.name)?;
    let mut child = Command::new(env!("CARGO"))
        .args(soak.arguments())
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
