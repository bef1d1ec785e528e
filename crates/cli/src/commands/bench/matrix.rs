//! Every combination of models and settings, in rounds: each round over all cells in another order, each cell in a process of its own.

use super::{
    Arguments,
    assertion::{Assertion, Metric, Unit},
    cell::Spec,
    document::{CELLS_MAX, Cell, Document, Key, Measured, ROUNDS_MAX, Settings},
    int8,
    machine::Machine,
    plot, tables,
};
use crate::{
    Verdict,
    commands::{DeviceDetails, memory_name, numerics_name},
    made_up::Random,
    output::{Printer, write_whole},
};
use anyhow::{Context, Result, bail};
use cutover::{Model, OpenOptions};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    collections::{BTreeMap, HashMap},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Backends there may be; whether this build has them, a cell finds out.
const BACKENDS: [&str; 5] = ["auto", "cpu", "wgpu", "cuda", "reference"];
const PRECISIONS: [&str; 5] = ["f32", "f16", "bf16", "tf32", "int8"];
const BATCH_MAX: usize = 65_536;
const THREADS_MAX: usize = 1024;
/// What a cell's process may print.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Rounds of all cells together: what a file of them takes is bounded.
const PROCESSES_MAX: usize = 100_000;
/// Latencies that a cell keeps, and a round of it.
const SAMPLES_MAX: usize = 200_000;
const ROUND_SAMPLES_MAX: usize = 20_000;
/// How often a running cell is looked after.
const LOOK: Duration = Duration::from_millis(50);

/// A matrix as it was asked for, checked.
pub(super) struct Plan {
    /// Files by the names that cells have.
    models: BTreeMap<String, PathBuf>,
    cells: Vec<Cell>,
    assertions: Vec<Assertion<Cell>>,
    details: DeviceDetails,
    shapes: Vec<String>,
    settings: Settings,
    timeout: Duration,
    csv: Option<PathBuf>,
    markdown: Option<PathBuf>,
    plot: Option<PathBuf>,
}

/// Metrics of a cell that may be asserted.
const METRICS: &[Metric<Cell>] = &[
    Metric { name: "min", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.min) },
    Metric { name: "p25", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.p25) },
    Metric { name: "p50", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.median) },
    Metric { name: "p75", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.p75) },
    Metric { name: "p90", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.p90) },
    Metric { name: "p99", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.p99) },
    Metric { name: "p999", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.p999) },
    Metric { name: "max", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.max) },
    Metric { name: "mean", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.latency_ms.mean) },
    Metric { name: "open", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.open_ms) },
    Metric { name: "compile", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.compile_ms) },
    Metric { name: "first", unit: Unit::Time, of: |c| Some(c.figures.as_ref()?.first_ms) },
    Metric { name: "throughput", unit: Unit::Count, of: |c| Some(c.figures.as_ref()?.items_per_second) },
    Metric { name: "gflops", unit: Unit::Count, of: |c| Some(c.figures.as_ref()?.work.as_ref()?.gflops_per_second) },
    Metric { name: "gbytes", unit: Unit::Count, of: |c| Some(c.figures.as_ref()?.work.as_ref()?.gbytes_per_second) },
    Metric { name: "roofline", unit: Unit::Share, of: |c| c.figures.as_ref()?.work.as_ref()?.of_roofline },
    Metric { name: "memory", unit: Unit::Bytes, of: |c| Some(c.figures.as_ref()?.peak_rss_bytes as f64) },
    Metric { name: "energy", unit: Unit::Joules, of: |c| c.figures.as_ref()?.energy_j_per_item },
    Metric { name: "gpu-energy", unit: Unit::Joules, of: |c| c.figures.as_ref()?.gpu_energy_j_per_item },
    Metric { name: "unanswered", unit: Unit::Count, of: |c| Some(c.figures.as_ref()?.unanswered as f64) },
    Metric { name: "elsewhere", unit: Unit::Count, of: |c| Some(c.figures.as_ref()?.nodes_elsewhere as f64) },
];

impl Plan {
    pub fn new(arguments: Arguments) -> Result<Plan> {
        let matrix = arguments.matrix;
        if !(1..=ROUNDS_MAX).contains(&matrix.rounds) {
            bail!("--rounds {}: expected 1 to {ROUNDS_MAX}", matrix.rounds);
        }
        if let Some(rate) = matrix.rate
            && !(rate > 0.0 && rate <= 1e6)
        {
            bail!("--rate {rate}: expected more than 0 and at most a million requests a second");
        }
        if !(matrix.timeout > 0.0 && matrix.timeout <= 86_400.0) {
            bail!("--timeout {}: expected more than 0 and at most 86400 seconds", matrix.timeout);
        }
        let backends = named("--backend", &arguments.backend, &BACKENDS)?;
        let precisions = named("--precision", &arguments.precision, &PRECISIONS)?;
        let batches = numbers("--batch", &arguments.batch, BATCH_MAX)?;
        let threads = numbers("--threads", &arguments.threads, THREADS_MAX)?;
        let models = names(&matrix.matrix)?;
        let mut keys = Vec::new();
        for model in models.keys() {
            for backend in &backends {
                // A reference run has one thread, a GPU its own.
                let threads = if matches!(backend.as_str(), "cpu" | "auto") { &threads[..] } else { &[None] };
                for precision in &precisions {
                    for &batch in &batches {
                        keys.extend(threads.iter().map(|&threads| Key {
                            model: model.clone(),
                            backend: backend.clone(),
                            precision: precision.clone(),
                            batch,
                            threads,
                        }));
                    }
                }
            }
        }
        if keys.len() > CELLS_MAX || keys.len() * matrix.rounds > PROCESSES_MAX {
            bail!(
                "{} cells in {} rounds, expected at most {CELLS_MAX} cells, and {PROCESSES_MAX} in all rounds",
                keys.len(),
                matrix.rounds
            );
        }
        if let Some(shape) = arguments.shapes.iter().find(|shape| !shape.contains('=')) {
            bail!("--shape {shape}: expected NAME=1x3x224x224, or MODEL:NAME=Nx3x224x224");
        }
        let assertions = matrix.assertions.iter().map(|text| Assertion::parse(text, METRICS)).collect::<Result<_>>()?;
        Ok(Plan {
            models,
            cells: keys.into_iter().map(Cell::new).collect(),
            assertions,
            details: arguments.details,
            shapes: arguments.shapes,
            settings: Settings {
                rounds: matrix.rounds,
                seconds: arguments.seconds,
                rate: matrix.rate,
                arrivals: matrix.arrivals,
                seed: arguments.seed,
            },
            timeout: Duration::from_secs_f64(matrix.timeout),
            csv: matrix.csv,
            markdown: matrix.markdown,
            plot: matrix.plot,
        })
    }

    pub fn run(mut self, printer: &Printer) -> Result<Verdict> {
        let interrupted = interrupts()?;
        let folder = tempfile::Builder::new().prefix("cutover-bench-").tempdir().context("a temporary folder")?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let cells = std::mem::take(&mut self.cells);
        let mut document = Document::new(self.settings.clone(), Machine::here(), started, cells);
        // Before hours of work: whether there will be a place for it.
        self.write(&document, printer)?;
        let bar = progress(document.cells.len() * self.settings.rounds, printer.json)?;
        let integers = self.integers(&mut document, folder.path(), &bar, &interrupted);
        let mut random = Random::new(self.settings.seed);
        for round in 0..self.settings.rounds {
            for at in shuffled(document.cells.len(), &mut random) {
                if interrupted.load(Ordering::Relaxed) {
                    break;
                }
                let cell = &mut document.cells[at];
                bar.set_message(cell.key.to_string());
                if cell.gap.is_none() {
                    let spec = self.spec(cell, &integers, round);
                    match measure(&spec, self.timeout, &interrupted) {
                        Ok(Some(measured)) => cell.add(measured),
                        Ok(None) => break,
                        Err(reason) => cell.fail(match round {
                            0 => reason,
                            _ => format!("in round {}: {reason}", round + 1),
                        }),
                    }
                }
                bar.inc(1);
            }
            if interrupted.load(Ordering::Relaxed) {
                break;
            }
            document.rounds_done = round + 1;
            document.complete = document.rounds_done == self.settings.rounds;
            self.write_json(&document, printer)?;
        }
        bar.finish_and_clear();
        self.write(&document, printer)?;
        printer.print(&serde_json::to_value(&document)?, || tables::text(&document))?;
        self.judge(&document)
    }

    fn judge(&self, document: &Document) -> Result<Verdict> {
        let measured = || document.cells.iter().filter(|c| c.figures.is_some()).map(|c| (&c.key, c));
        let broken: Vec<String> = self.assertions.iter().flat_map(|assertion| assertion.broken(measured())).collect();
        broken.iter().for_each(|line| eprintln!("assertion: {line}"));
        let gaps = document.cells.iter().filter(|c| c.gap.is_some()).count();
        Ok(match () {
            () if !document.complete => Verdict::Interrupted,
            () if !broken.is_empty() => Verdict::Broken,
            () if self.details.strict && gaps > 0 => Verdict::No,
            () => Verdict::Yes,
        })
    }

    fn write_json(&self, document: &Document, printer: &Printer) -> Result<()> {
        printer.file.as_ref().map_or(Ok(()), |path| document.write(path))
    }

    fn write(&self, document: &Document, printer: &Printer) -> Result<()> {
        self.write_json(document, printer)?;
        if let Some(path) = &self.csv {
            write_whole(path, &tables::csv(document)?)?;
        }
        if let Some(path) = &self.markdown {
            write_whole(path, tables::markdown(document).as_bytes())?;
        }
        if let Some(path) = &self.plot {
            write_whole(path, plot::draw(document, path)?.as_bytes())?;
        }
        Ok(())
    }

    /// Files of the models in integers, where cells ask for that; what can't be made is those cells' gap.
    fn integers(
        &self,
        document: &mut Document,
        folder: &Path,
        bar: &ProgressBar,
        interrupted: &AtomicBool,
    ) -> HashMap<String, PathBuf> {
        let mut files = HashMap::new();
        for (number, (name, path)) in self.models.iter().enumerate() {
            let mut cells: Vec<&mut Cell> =
                document.cells.iter_mut().filter(|c| c.key.model == *name && c.key.precision == "int8").collect();
            if cells.is_empty() || interrupted.load(Ordering::Relaxed) {
                continue;
            }
            bar.set_message(format!("{name}: to integers"));
            let target = folder.join(format!("{number}.onnx"));
            let shapes = shapes_of(&self.shapes, &self.models, name, 1);
            let made = Model::open_with(path, &OpenOptions::default())
                .map_err(anyhow::Error::from)
                .and_then(|model| int8::quantize(&model, &shapes, self.settings.seed, &target));
            for cell in &mut cells {
                match &made {
                    Ok(how) => cell.notes.push(how.clone()),
                    Err(error) => cell.fail(crate::chain(error)),
                }
            }
            files.insert(name.clone(), target);
        }
        files
    }

    fn spec(&self, cell: &Cell, integers: &HashMap<String, PathBuf>, round: usize) -> Spec {
        let Key { model, backend, precision, batch, threads } = &cell.key;
        let (path, precision) = match integers.get(model).filter(|_| precision == "int8") {
            Some(path) => (path, "f32"),
            None => (&self.models[model], precision.as_str()),
        };
        Spec {
            model: path.clone(),
            backend: backend.clone(),
            precision: precision.to_string(),
            numerics: numerics_name(self.details.numerics).to_string(),
            memory: memory_name(self.details.memory).to_string(),
            threads: *threads,
            isa: self.details.isa.clone().filter(|_| backend != "reference"),
            adapter: self.details.adapter.clone(),
            strict: self.details.strict,
            batch: *batch,
            shapes: shapes_of(&self.shapes, &self.models, model, batch.unwrap_or(1)),
            seed: self.settings.seed,
            seconds: self.settings.seconds / self.settings.rounds as f64,
            samples_max: (SAMPLES_MAX / self.settings.rounds).min(ROUND_SAMPLES_MAX),
            rate: self.settings.rate,
            arrivals: self.settings.arrivals,
            detail: round == 0,
        }
    }
}

impl Cell {
    fn fail(&mut self, reason: String) {
        self.gap = Some(reason);
        self.figures = None;
        self.rounds.clear();
    }
}

/// One round of a cell in a process of its own; `None` where the user interrupts.
fn measure(spec: &Spec, timeout: Duration, interrupted: &AtomicBool) -> Result<Option<Measured>, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let program = std::env::current_exe().map_err(|e| failed("this program's path", &e))?;
    let mut command = Command::new(program);
    command.args(["bench", "--cell", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // An interrupt from the terminal is for this process: it ends the other.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().map_err(|e| failed("its process", &e))?;
    let text = serde_json::to_vec(spec).map_err(|e| failed("its description", &e))?;
    // A process that died before it read says why below.
    let _ = child.stdin.take().map(|mut pipe| pipe.write_all(&text));
    let (answers, done) = mpsc::channel();
    let outputs = [child.stdout.take().map(bounded), child.stderr.take().map(bounded)];
    let reader = std::thread::spawn(move || {
        let read = outputs.map(|output| output.map_or(Vec::new(), |thread| thread.join().unwrap_or_default()));
        let _ = answers.send(read);
    });
    let begun = Instant::now();
    let outcome = loop {
        match done.recv_timeout(LOOK) {
            Ok(read) => break Some(read),
            Err(mpsc::RecvTimeoutError::Timeout) if begun.elapsed() < timeout => {
                if interrupted.load(Ordering::Relaxed) {
                    break None;
                }
            }
            Err(_) => break None,
        }
    };
    if outcome.is_none() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| failed("its process", &e))?;
    let _ = reader.join();
    let Some([answer, errors]) = outcome else {
        return match interrupted.load(Ordering::Relaxed) {
            true => Ok(None),
            false => Err(format!("a round took more than {} seconds", timeout.as_secs_f64())),
        };
    };
    match serde_json::from_slice::<Result<Measured, String>>(&answer) {
        Ok(Ok(measured)) => Ok(Some(measured)),
        Ok(Err(reason)) => Err(reason),
        Err(_) => {
            let errors = String::from_utf8_lossy(&errors);
            let mut lines = errors.lines().filter(|line| !line.trim().is_empty());
            let said = lines.clone().find(|line| line.contains("error") || line.contains("panicked"));
            let said = said.or_else(|| lines.next_back()).unwrap_or("it said nothing");
            Err(format!("its process ended ({status}): {}", said.chars().take(300).collect::<String>()))
        }
    }
}

/// Reads a pipe to its end, and keeps so much of it.
fn bounded(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        let _ = (&mut pipe).take(ANSWER_BYTES_MAX).read_to_end(&mut kept);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        kept
    })
}

/// Set when the user interrupts; a second interrupt ends this process as it would have.
fn interrupts() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("waiting for signals")?;
    let set = Arc::clone(&flag);
    std::thread::spawn(move || {
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                if set.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    });
    Ok(flag)
}

fn progress(steps: usize, hidden: bool) -> Result<ProgressBar> {
    let bar = if hidden { ProgressBar::hidden() } else { ProgressBar::new(steps as u64) };
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len}, {eta} left  {msg}").context("a template")?;
    bar.set_style(style);
    bar.enable_steady_tick(Duration::from_secs(1));
    Ok(bar)
}

/// 0 to `count`, in an order that the seed gives (Fisher–Yates).
fn shuffled(count: usize, random: &mut Random) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    order
}

/// Names without the repeated ones.
fn named(option: &str, names: &[String], known: &[&str]) -> Result<Vec<String>> {
    let mut kept: Vec<String> = Vec::new();
    for name in names.iter().map(|name| name.trim()) {
        if !known.contains(&name) {
            bail!("{option} '{name}': there is {}", known.join(", "));
        }
        if !kept.iter().any(|k| k == name) {
            kept.push(name.to_string());
        }
    }
    if kept.is_empty() {
        bail!("{option}: expected at least one of {}", known.join(", "));
    }
    Ok(kept)
}

/// Numbers without the repeated ones; nothing but `None` where none are given.
fn numbers(option: &str, numbers: &[usize], most: usize) -> Result<Vec<Option<usize>>> {
    let mut kept = Vec::new();
    for &number in numbers {
        if !(1..=most).contains(&number) {
            bail!("{option} {number}: expected 1 to {most}");
        }
        if !kept.contains(&Some(number)) {
            kept.push(Some(number));
        }
    }
    Ok(if kept.is_empty() { vec![None] } else { kept })
}

/// What models are called: their files' names, and as many of their folders' as tells them apart.
fn names(paths: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>> {
    let mut unique: Vec<PathBuf> = Vec::new();
    for path in paths {
        let whole = path.canonicalize().with_context(|| format!("--matrix {}", path.display()))?;
        if !unique.contains(&whole) {
            unique.push(whole);
        }
    }
    let name = |path: &Path, parts: usize| {
        let known = path.extension().is_some_and(|e| e == "onnx" || e == "cutover") && !path.is_dir();
        let path = if known { path.with_extension("") } else { path.to_path_buf() };
        let all: Vec<_> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let depth = unique.iter().map(|path| path.iter().count()).max().unwrap_or(1);
    let told_apart = |path: &Path| {
        let parts = (1..=depth).find(|&n| unique.iter().filter(|other| name(other, n) == name(path, n)).count() == 1);
        name(path, parts.unwrap_or(depth))
    };
    let mut named: BTreeMap<String, PathBuf> = BTreeMap::new();
    for path in &unique {
        // `m.onnx` beside `m.cutover` have one name less their endings.
        let short = told_apart(path);
        let taken = named.contains_key(&short);
        named.insert(if taken { path.display().to_string() } else { short }, path.clone());
    }
    Ok(named)
}

/// Shapes for `model`, with its batch for `N`. What stands before a colon is a model where one is called so, else a part of the input's name.
fn shapes_of(shapes: &[String], models: &BTreeMap<String, PathBuf>, model: &str, batch: usize) -> Vec<String> {
    let of_model = shapes.iter().filter_map(|text| match text.split_once(':') {
        Some((of, shape)) if models.contains_key(of) => (of == model).then_some(shape),
        _ => Some(text.as_str()),
    });
    let filled = of_model.map(|shape| {
        let (name, dims) = shape.rsplit_once('=').unwrap_or((shape, ""));
        let batch = batch.to_string();
        let dims: Vec<&str> = dims.split('x').map(|dim| if dim == "N" { batch.as_str() } else { dim }).collect();
        format!("{name}={}", dims.join("x"))
    });
    filled.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_the_shortest_names_that_tell_them_apart() {
        let folder = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        let paths = ["v1/model.onnx", "v2/model.onnx", "v2/other.q8.onnx"].map(make);
        let twice: Vec<PathBuf> = paths.iter().chain(&paths).cloned().collect();
        let names = names(&twice).unwrap();
        assert_eq!(names.keys().collect::<Vec<_>>(), ["other.q8", "v1/model", "v2/model"]);
        assert!(super::names(&[folder.path().join("none.onnx")]).is_err());
    }

    #[test]
    fn shapes_are_for_their_models_and_batches() {
        let models = ["a", "b"].map(|name| (name.to_string(), PathBuf::new())).into_iter().collect();
        let shapes = ["image=Nx3x8x8", "a:image=2x3x8x8", "b:x:0=Nx4", "y:0=3"].map(String::from);
        assert_eq!(shapes_of(&shapes, &models, "a", 8), ["image=8x3x8x8", "image=2x3x8x8", "y:0=3"]);
        assert_eq!(shapes_of(&shapes, &models, "b", 1), ["image=1x3x8x8", "x:0=1x4", "y:0=3"]);
    }

    #[test]
    fn every_round_has_every_cell_in_an_order_of_its_own() {
        let mut random = Random::new(3);
        let rounds: Vec<Vec<usize>> = (0..20).map(|_| shuffled(9, &mut random)).collect();
        for round in &rounds {
            let mut sorted = round.clone();
            sorted.sort();
            assert_eq!(sorted, (0..9).collect::<Vec<_>>());
        }
        // No cell is always at one place.
        assert!(
            (0..9).all(|at| rounds.iter().map(|round| round[at]).collect::<std::collections::HashSet<_>>().len() > 3)
        );
    }
}
