//! Which machine measured, as far as the system tells, and the energy it counts.

use cutover::backend::DeviceInfo;
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// What figures depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    pub processor: String,
    pub architecture: String,
    /// Of those that kernels are chosen by.
    pub features: Vec<String>,
    /// Logical ones, and those this process may use.
    pub cores: usize,
    pub usable_cores: usize,
    pub hypervisor: bool,
    pub memory_bytes: Option<u64>,
    pub system: String,
    pub kernel: Option<String>,
    /// How frequencies are chosen, and their bounds, where the system tells.
    pub governor: Option<String>,
    pub frequency_mhz: Option<[f64; 2]>,
    pub load_average: Option<f64>,
    pub adapters: Vec<Adapter>,
    /// Whether the processor's energy counters can be read.
    pub counts_energy: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Adapter {
    pub name: String,
    pub interface: String,
    pub driver: String,
}

const FEATURES: &[&str] = &[
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
];

impl Machine {
    pub fn here() -> Machine {
        Machine::of(Path::new("/"))
    }

    /// From the files that Linux has below `root`; elsewhere most stays unknown.
    fn of(root: &Path) -> Machine {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let line = |text: &str, name: &str| {
            let found = text.lines().filter_map(|l| l.split_once(':')).find(|(key, _)| key.trim() == name);
            found.map(|(_, value)| value.trim().to_string())
        };
        let info = read("proc/cpuinfo").unwrap_or_default();
        let flags = line(&info, "flags").or_else(|| line(&info, "Features")).unwrap_or_default();
        let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
        let frequency = |which: &str| {
            let khz = read(&format!("sys/devices/system/cpu/cpu0/cpufreq/{which}"))?;
            Some(khz.trim().parse::<f64>().ok()? / 1e3)
        };
        let usable = std::thread::available_parallelism().map_or(1, |n| n.get());
        let kib = |text: String| text.trim_end_matches(" kB").parse::<u64>().ok();
        Machine {
            processor: line(&info, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_string()),
            architecture: std::env::consts::ARCH.to_string(),
            features: FEATURES.iter().filter(|name| has(name)).map(|name| name.to_string()).collect(),
            cores: info.lines().filter(|l| l.starts_with("processor")).count().max(usable),
            usable_cores: usable,
            hypervisor: has("hypervisor"),
            memory_bytes: read("proc/meminfo").and_then(|m| line(&m, "MemTotal")).and_then(kib).map(|kib| kib * 1024),
            system: std::env::consts::OS.to_string(),
            kernel: read("proc/sys/kernel/osrelease").map(|text| text.trim().to_string()),
            governor: read("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map(|text| text.trim().to_string()),
            frequency_mhz: frequency("cpuinfo_min_freq").zip(frequency("cpuinfo_max_freq")).map(|(a, b)| [a, b]),
            load_average: read("proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
            adapters: adapters(),
            counts_energy: Energy::of(root).is_some(),
        }
    }

    /// Where this machine differs from `other` in what figures depend on: its name for each, and both values.
    pub fn differences(&self, other: &Machine) -> Vec<String> {
        let adapters = |m: &Machine| m.adapters.iter().map(|a| a.name.clone()).collect::<Vec<_>>().join(", ");
        let of = |m: &Machine| {
            [
                ("processor", m.processor.clone()),
                ("architecture", m.architecture.clone()),
                ("features", m.features.join(" ")),
                ("usable cores", m.usable_cores.to_string()),
                ("GPUs", adapters(m)),
            ]
        };
        let pairs = of(self).into_iter().zip(of(other));
        pairs.filter(|(a, b)| a != b).map(|((name, a), (_, b))| format!("{name}: '{a}' and '{b}'")).collect()
    }

    /// What says that figures of the time are not to be trusted much: others were at work when it began.
    pub fn was_busy(&self) -> Option<String> {
        let load = self.load_average.filter(|load| *load > 0.5 * self.usable_cores as f64)?;
        Some(format!("the machine was busy: {load} processes on {} cores when this began", self.usable_cores))
    }

    /// In a line, for people.
    pub fn summary(&self) -> String {
        let mut text = format!("{}, {} of {} cores", self.processor, self.usable_cores, self.cores);
        if self.hypervisor {
            text += ", virtual";
        }
        if let Some(governor) = &self.governor {
            text += &format!(", governor {governor}");
        }
        if let Some(kernel) = &self.kernel {
            text += &format!(", {} {kernel}", self.system);
        }
        for adapter in &self.adapters {
            text += &format!("; {} ({}, {})", adapter.name, adapter.interface, adapter.driver);
        }
        text
    }
}

#[cfg(feature = "wgpu")]
fn adapters() -> Vec<Adapter> {
    let all = cutover::backend::wgpu_adapters(false).into_iter();
    all.map(|(a, _)| Adapter { name: a.name, interface: a.interface, driver: a.driver }).collect()
}

#[cfg(not(feature = "wgpu"))]
fn adapters() -> Vec<Adapter> {
    Vec::new()
}

/// Joules since it was made, `None` where they can't be read any more.
pub(super) type GpuEnergy = Box<dyn Fn() -> Option<f64>>;

/// The energy counter of the GPU `device` is, or why there is none; `None` of what is no GPU.
#[cfg(feature = "cuda")]
pub(super) fn gpu_energy(device: &DeviceInfo) -> Option<Result<GpuEnergy, String>> {
    if !matches!(device.backend, "cuda" | "wgpu") {
        return None;
    }
    let energy = cutover::backend::GpuEnergy::start(&device.device);
    Some(energy.map(|energy| Box::new(move || energy.joules()) as GpuEnergy))
}

#[cfg(not(feature = "cuda"))]
pub(super) fn gpu_energy(device: &DeviceInfo) -> Option<Result<GpuEnergy, String>> {
    (device.backend == "wgpu")
        .then(|| Err("this program was built without the feature cuda, which reads NVIDIA's".to_string()))
}

/// The counters of all processor packages (Linux's powercap, RAPL), from when it was made.
pub(super) struct Energy {
    packages: Vec<Package>,
}

struct Package {
    file: std::path::PathBuf,
    /// Where the counter starts again.
    range_uj: u64,
    start_uj: u64,
}

impl Energy {
    /// `None` where there are no counters, or this user may not read them.
    pub fn start() -> Option<Energy> {
        Energy::of(Path::new("/"))
    }

    fn of(root: &Path) -> Option<Energy> {
        let folder = fs::read_dir(root.join("sys/class/powercap")).ok()?;
        let zones = folder.filter_map(|entry| {
            let path = entry.ok()?.path();
            // Domains inside a package are counted in it.
            let is_package = fs::read_to_string(path.join("name")).ok()?.starts_with("package");
            is_package.then_some(path)
        });
        let package = |zone: std::path::PathBuf| {
            let file = zone.join("energy_uj");
            Some(Package { range_uj: number(&zone.join("max_energy_range_uj"))?, start_uj: number(&file)?, file })
        };
        let packages: Vec<Package> = zones.map(package).collect::<Option<_>>()?;
        (!packages.is_empty()).then_some(Energy { packages })
    }

    /// Joules since the start.
    pub fn joules(&self) -> Option<f64> {
        let used = self.packages.iter().map(|package| {
            let now = number(&package.file)?;
            let wrapped = if now < package.start_uj { package.range_uj } else { 0 };
            Some((now + wrapped).saturating_sub(package.start_uj) as f64 / 1e6)
        });
        used.sum()
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_machine_is_read_from_the_systems_files() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let core = |n| format!("processor\t: {n}\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma hypervisor\n\n");
        write(root, "proc/cpuinfo", &(core(0) + &core(1)).repeat(512));
        write(root, "proc/meminfo", "MemTotal:       2048 kB\nMemFree: 1 kB\n");
        write(root, "proc/sys/kernel/osrelease", "6.1.0\n");
        write(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n");
        write(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_min_freq", "400000\n");
        write(root, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "3500000\n");
        let machine = Machine::of(root);
        assert_eq!((machine.processor.as_str(), machine.cores), ("Some CPU", 1024));
        assert_eq!(machine.features, ["fma", "avx2"]);
        assert!(machine.hypervisor && !machine.counts_energy);
        assert_eq!((machine.memory_bytes, machine.frequency_mhz), (Some(2 << 20), Some([400.0, 3500.0])));
        assert!(machine.summary().contains("governor performance"), "{}", machine.summary());
        assert_eq!(machine.was_busy(), None);
        let busy = Machine { load_average: Some(3.5), usable_cores: 2, ..machine.clone() };
        assert_eq!(busy.was_busy().unwrap(), "the machine was busy: 3.5 processes on 2 cores when this began");
        assert_eq!(machine.differences(&machine), [""; 0]);
        let other = Machine { features: vec!["avx2".into()], kernel: None, ..machine.clone() };
        assert_eq!(machine.differences(&other), ["features: 'fma avx2' and 'avx2'"]);
    }

    #[test]
    fn energy_is_that_of_packages_and_counters_start_again() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert!(Energy::of(root).is_none());
        for (zone, name) in [("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")] {
            write(root, &format!("sys/class/powercap/{zone}/name"), name);
            write(root, &format!("sys/class/powercap/{zone}/max_energy_range_uj"), "10000000");
            write(root, &format!("sys/class/powercap/{zone}/energy_uj"), "9000000");
        }
        let energy = Energy::of(root).unwrap();
        assert_eq!(energy.joules(), Some(0.0));
        write(root, "sys/class/powercap/intel-rapl:0/energy_uj", "9500000");
        write(root, "sys/class/powercap/intel-rapl:1/energy_uj", "1000000");
        write(root, "sys/class/powercap/intel-rapl:0:0/energy_uj", "9999999");
        assert_eq!(energy.joules(), Some(2.5));
        // A counter that can't be read is no zero.
        fs::remove_file(root.join("sys/class/powercap/intel-rapl:1/energy_uj")).unwrap();
        assert_eq!(energy.joules(), None);
    }
}
