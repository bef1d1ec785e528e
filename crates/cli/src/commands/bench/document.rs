//! The file of a matrix: what ran on which machine, every cell with its rounds, and what follows from them.

use super::{
    machine::Machine,
    statistics::{median, median_interval, quantile},
};
use crate::output::write_whole;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, fs::File, io::Read, path::Path};

pub(super) const FORMAT: &str = "cutover-bench";
const VERSION: u32 = 1;
/// A file is not read past these.
const FILE_BYTES_MAX: u64 = 64 << 20;
pub(super) const CELLS_MAX: usize = 10_000;
pub(super) const ROUNDS_MAX: usize = 1000;
/// Of the interval of a median.
const CONFIDENCE: f64 = 0.95;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Document {
    pub format: String,
    pub version: u32,
    /// The version of the program.
    pub cutover: String,
    pub command: Vec<String>,
    pub started_unix_ms: u64,
    pub settings: Settings,
    /// `false` where it was interrupted, or is not done yet.
    pub complete: bool,
    pub rounds_done: usize,
    pub machine: Machine,
    pub cells: Vec<Cell>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub rounds: usize,
    /// Of measuring, of a cell, in all rounds together.
    pub seconds: f64,
    /// Requests a second, where they come by a clock.
    pub rate: Option<f64>,
    pub arrivals: Arrivals,
    pub seed: u64,
}

/// When requests come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Arrivals {
    /// Independent of each other, as those of many callers.
    #[default]
    Poisson,
    /// At equal distances, as frames of a camera.
    Constant,
}

/// What makes a cell one of its kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct Key {
    pub model: String,
    pub backend: String,
    pub precision: String,
    /// `None` for the model's own.
    pub batch: Option<usize>,
    /// `None` where the CPU's threads make no difference.
    pub threads: Option<usize>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.model, self.setting())
    }
}

impl Key {
    /// All but the model.
    pub fn setting(&self) -> String {
        let batch = self.batch.map_or(String::new(), |batch| format!(" batch {batch}"));
        let threads = self.threads.map_or(String::new(), |threads| format!(" threads {threads}"));
        format!("{} {}{batch}{threads}", self.backend, self.precision)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Cell {
    #[serde(flatten)]
    pub key: Key,
    /// How it came to its precision, what was assumed.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Why there are no figures.
    #[serde(default)]
    pub gap: Option<String>,
    #[serde(default)]
    pub figures: Option<Figures>,
    #[serde(default)]
    pub inputs: BTreeMap<String, Vec<usize>>,
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Latencies of all rounds, which the file does not hold.
    #[serde(skip)]
    pub latencies_ms: Vec<f64>,
    /// Of a run, as the first round counted it.
    #[serde(skip)]
    pub work: Option<WorkDone>,
}

/// One process that measured a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Round {
    pub runs: usize,
    pub median_ms: f64,
    pub open_ms: f64,
    pub compile_ms: f64,
    pub first_ms: f64,
    pub warm_up_runs: usize,
    /// Whether the level was steady when measuring began.
    pub is_steady: bool,
    pub seconds: f64,
    pub peak_rss_bytes: u64,
    /// Of the whole processor package while measuring, others' work included.
    pub energy_j: Option<f64>,
    /// Of the GPU that the cell ran on, others' work included.
    #[serde(default)]
    pub gpu_energy_j: Option<f64>,
    /// Requests that came by the clock and had no answer when the round was given up.
    pub unanswered: usize,
}

/// What the rounds of a cell say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Figures {
    pub device: String,
    pub isa: String,
    /// Items in a run.
    pub batch: usize,
    pub runs: usize,
    pub steady_rounds: usize,
    pub latency_ms: Latency,
    /// Of answers, by the time that all took.
    pub items_per_second: f64,
    pub open_ms: f64,
    pub compile_ms: f64,
    pub first_ms: f64,
    pub peak_rss_bytes: u64,
    /// Of the package, for an item; `None` where the system does not tell.
    pub energy_j_per_item: Option<f64>,
    #[serde(default)]
    pub gpu_energy_j_per_item: Option<f64>,
    pub unanswered: usize,
    pub work: Option<Rates>,
    pub phases: Option<Phases>,
    /// Nodes of the plan, and those that another backend than asked for runs.
    pub nodes: usize,
    pub nodes_elsewhere: usize,
}

/// Of a run, or with a rate from when a request was due to its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Latency {
    pub min: f64,
    pub p25: f64,
    /// The median of the rounds' medians.
    pub median: f64,
    /// An order-statistic interval of the median over rounds.
    pub median_low: f64,
    pub median_high: f64,
    pub coverage: f64,
    pub mean: f64,
    pub p75: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// What a run does in its median time, and how near that is to what the device can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Rates {
    pub gflop: f64,
    pub gbyte: f64,
    pub gflops_per_second: f64,
    pub gbytes_per_second: f64,
    pub peak_gflops_per_second: Option<f64>,
    pub peak_gbytes_per_second: Option<f64>,
    /// The time that every node would take at the device's peak, whichever binds it, over the time of a run.
    pub of_roofline: Option<f64>,
}

/// Where the time of a run goes, in ms, where the backend tells.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Phases {
    pub copy_in_ms: Option<f64>,
    pub kernels_ms: Option<f64>,
    pub copy_out_ms: Option<f64>,
    /// The rest of the run.
    pub host_ms: Option<f64>,
}

/// What a process that measured a cell tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    pub device: String,
    pub isa: String,
    pub batch: usize,
    pub inputs: BTreeMap<String, Vec<usize>>,
    pub notes: Vec<String>,
    pub nodes: usize,
    pub nodes_elsewhere: usize,
    pub latencies_ms: Vec<f64>,
    /// The round but for its median.
    pub round: Round,
    /// Of the first round.
    pub work: Option<WorkDone>,
    pub phases: Option<Phases>,
}

/// What a run has to do, counted, and the least time for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct WorkDone {
    pub operations: u64,
    pub bytes: u64,
    pub peak_operations_per_second: Option<f64>,
    pub peak_bytes_per_second: Option<f64>,
    pub least_seconds: Option<f64>,
}

impl Cell {
    pub fn new(key: Key) -> Cell {
        Cell {
            key,
            notes: Vec::new(),
            gap: None,
            figures: None,
            inputs: BTreeMap::new(),
            rounds: Vec::new(),
            latencies_ms: Vec::new(),
            work: None,
        }
    }

    /// Takes another round in.
    pub fn add(&mut self, measured: Measured) {
        let mut latencies = measured.latencies_ms;
        latencies.sort_by(f64::total_cmp);
        let median_ms = quantile(&latencies, 0.5);
        self.latencies_ms.extend(&latencies);
        self.rounds.push(Round { median_ms, ..measured.round });
        self.inputs = measured.inputs;
        for note in measured.notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        self.work = self.work.take().or(measured.work);
        let phases = self.figures.take().and_then(|figures| figures.phases).or(measured.phases);
        let latency = Latency::of(&self.latencies_ms, &self.rounds);
        let of_rounds = |value: &dyn Fn(&Round) -> f64| median(&self.rounds.iter().map(value).collect::<Vec<_>>());
        let runs: usize = self.rounds.iter().map(|r| r.runs).sum();
        let seconds: f64 = self.rounds.iter().map(|r| r.seconds).sum();
        let items = (runs * measured.batch) as f64;
        let energy: Option<f64> = self.rounds.iter().map(|r| r.energy_j).sum();
        let gpu_energy: Option<f64> = self.rounds.iter().map(|r| r.gpu_energy_j).sum();
        let work = self.work.as_ref().map(|work| Rates::of(work, latency.median));
        self.figures = Some(Figures {
            device: measured.device,
            isa: measured.isa,
            batch: measured.batch,
            runs,
            steady_rounds: self.rounds.iter().filter(|r| r.is_steady).count(),
            items_per_second: items / seconds.max(1e-12),
            open_ms: of_rounds(&|r| r.open_ms),
            compile_ms: of_rounds(&|r| r.compile_ms),
            first_ms: of_rounds(&|r| r.first_ms),
            peak_rss_bytes: of_rounds(&|r| r.peak_rss_bytes as f64) as u64,
            energy_j_per_item: energy.map(|energy| energy / items.max(1.0)),
            gpu_energy_j_per_item: gpu_energy.map(|energy| energy / items.max(1.0)),
            unanswered: self.rounds.iter().map(|r| r.unanswered).sum(),
            work,
            phases,
            nodes: measured.nodes,
            nodes_elsewhere: measured.nodes_elsewhere,
            latency_ms: latency,
        });
    }
}

impl Latency {
    fn of(all: &[f64], rounds: &[Round]) -> Latency {
        let mut sorted = all.to_vec();
        sorted.sort_by(f64::total_cmp);
        let medians: Vec<f64> = rounds.iter().map(|r| r.median_ms).collect();
        let median = median(&medians);
        let interval = median_interval(&medians, CONFIDENCE);
        let q = |q| quantile(&sorted, q);
        Latency {
            min: q(0.0),
            p25: q(0.25),
            median,
            median_low: interval.map_or(median, |i| i.low),
            median_high: interval.map_or(median, |i| i.high),
            coverage: interval.map_or(0.0, |i| i.coverage),
            mean: sorted.iter().sum::<f64>() / sorted.len().max(1) as f64,
            p75: q(0.75),
            p90: q(0.9),
            p99: q(0.99),
            p999: q(0.999),
            max: q(1.0),
        }
    }
}

impl Rates {
    fn of(work: &WorkDone, median_ms: f64) -> Rates {
        let (gflop, gbyte, seconds) = (work.operations as f64 / 1e9, work.bytes as f64 / 1e9, median_ms / 1e3);
        Rates {
            gflop,
            gbyte,
            gflops_per_second: gflop / seconds,
            gbytes_per_second: gbyte / seconds,
            peak_gflops_per_second: work.peak_operations_per_second.map(|peak| peak / 1e9),
            peak_gbytes_per_second: work.peak_bytes_per_second.map(|peak| peak / 1e9),
            of_roofline: work.least_seconds.map(|least| least / seconds),
        }
    }
}

impl Document {
    pub fn new(settings: Settings, machine: Machine, started_unix_ms: u64, cells: Vec<Cell>) -> Document {
        Document {
            format: FORMAT.to_string(),
            version: VERSION,
            cutover: env!("CARGO_PKG_VERSION").to_string(),
            command: std::env::args().collect(),
            started_unix_ms,
            settings,
            complete: false,
            rounds_done: 0,
            machine,
            cells,
        }
    }

    /// Reads a file that anyone may have written.
    ///
    /// # Errors
    /// What is no such file, claims more than a matrix can hold, or has figures that no clock gives.
    pub fn read(path: &Path) -> Result<Document> {
        let at = || format!("cannot read {}", path.display());
        let mut text = Vec::new();
        File::open(path).with_context(at)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).with_context(at)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            bail!("{}: more than {FILE_BYTES_MAX} bytes are no file of a matrix", path.display());
        }
        /// What says whether the rest can be understood.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let is_none = || format!("{}: no file that `cutover bench --matrix --json` wrote", path.display());
        let head: Head = serde_json::from_slice(&text).with_context(is_none)?;
        if head.format != FORMAT {
            bail!("{}: its format is '{}'", is_none(), head.format);
        }
        if head.version != VERSION {
            bail!("{}: version {} of the format, this program reads {VERSION}", path.display(), head.version);
        }
        let document: Document = serde_json::from_slice(&text).with_context(is_none)?;
        document.check().with_context(|| path.display().to_string())?;
        Ok(document)
    }

    fn check(&self) -> Result<()> {
        if self.cells.len() > CELLS_MAX {
            bail!("{} cells, expected at most {CELLS_MAX}", self.cells.len());
        }
        let mut keys = std::collections::HashSet::new();
        for cell in &self.cells {
            if !keys.insert(&cell.key) {
                bail!("cell '{}' is there twice", cell.key);
            }
            if cell.rounds.len() > ROUNDS_MAX {
                bail!("cell '{}': {} rounds, expected at most {ROUNDS_MAX}", cell.key, cell.rounds.len());
            }
            if let Some(round) = cell.rounds.iter().find(|r| !(r.median_ms > 0.0 && r.median_ms.is_finite())) {
                bail!("cell '{}': a round's median is {} ms", cell.key, round.median_ms);
            }
            if cell.figures.is_some() == cell.rounds.is_empty() {
                bail!("cell '{}': it has figures or rounds, and not the other", cell.key);
            }
        }
        Ok(())
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        write_whole(path, &text)
    }
}
