//! Which of several kernels is fastest, measured once and kept in the user's cache folder: a file for each device, driver and version, a line for each
//! choice. Whoever deletes it loses milliseconds.

use super::{gpu::Gpu, kept};
use crate::gpu::{Candidate, lock};
use ::wgpu::{self as api, BufferUsages};
use cutover_graph::Identity;
use std::{
    collections::HashMap,
    fmt::Write,
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Choices of a device that are kept; then all are made anew.
const CHOICES: usize = 4096;
/// What a process spends on measuring. Then the first of several is taken.
const MEASURING: Duration = Duration::from_secs(2);
/// Kernels of more memory are not measured.
const MEASURED_BYTES: u64 = 256 << 20;

/// The choices of a device.
pub(super) struct Tuned {
    path: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    choices: HashMap<String, usize>,
    measuring: Duration,
    is_new: bool,
}

impl Tuned {
    pub fn open(path: Option<PathBuf>) -> Tuned {
        let text = path.as_ref().and_then(|path| String::from_utf8(kept::read(path)?).ok()).unwrap_or_default();
        let line = |line: &str| {
            let (key, choice) = line.split_once(' ')?;
            Some((key.to_string(), choice.parse().ok()?))
        };
        let choices = text.lines().take(CHOICES).filter_map(line).collect();
        Tuned { path, state: Mutex::new(State { choices, ..State::default() }) }
    }

    /// Writes what was chosen since the last time.
    pub fn keep(&self) {
        let mut state = lock(&self.state);
        let Some(path) = self.path.as_ref().filter(|_| std::mem::take(&mut state.is_new)) else { return };
        let mut text = String::new();
        for (key, choice) in &state.choices {
            let _ = writeln!(text, "{key} {choice}");
        }
        if let Err(error) = kept::write(path, text.as_bytes()) {
            tracing::debug!("what is fastest is not kept in '{}': {error}", path.display());
        }
    }

    /// The fastest of `candidates`, by what was measured before or by `measure`, which gives seconds.
    pub fn fastest(&self, candidates: &[Candidate], measure: impl Fn(&Candidate) -> Option<f64>) -> Option<usize> {
        let sources = candidates.iter().map(|of| format!("{} {:?} {:?}", of.source, of.groups, of.bytes));
        let key = Identity::derived(&sources.collect::<Vec<_>>().join("\n"), &[]).to_string();
        {
            let state = lock(&self.state);
            if let Some(&choice) = state.choices.get(&key) {
                return (choice < candidates.len()).then_some(choice);
            }
            let too_large = candidates.iter().any(|of| of.bytes.iter().sum::<u64>() > MEASURED_BYTES);
            if state.measuring >= MEASURING || too_large {
                return None;
            }
        }
        let start = Instant::now();
        let taken = candidates.iter().map(|candidate| measure(candidate).unwrap_or(f64::INFINITY));
        let taken: Vec<f64> = taken.collect();
        let fastest = (0..taken.len()).min_by(|&a, &b| taken[a].total_cmp(&taken[b]))?;
        let mut state = lock(&self.state);
        state.measuring += start.elapsed();
        if state.choices.len() >= CHOICES {
            state.choices.clear();
        }
        state.choices.insert(key, fastest);
        state.is_new = true;
        Some(fastest)
    }
}

impl Gpu {
    /// Seconds of a run of the kernel over memory of its own, the best of three after one that nobody counts.
    pub fn time(&self, candidate: &Candidate) -> Option<f64> {
        let pipeline = self.pipeline(&candidate.source, &candidate.read_only).ok()?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let buffers = candidate.bytes.iter().map(|&bytes| self.buffer("a measurement", bytes, usage));
        let buffers = buffers.collect::<Result<Vec<_>, _>>().ok()?;
        let entries: Vec<api::BindGroupEntry<'_>> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| api::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let group = self.device.create_bind_group(&api::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout,
            entries: &entries,
        });
        let mut best = f64::INFINITY;
        for round in 0..4 {
            let start = Instant::now();
            let mut encoder = self.device.create_command_encoder(&api::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&api::ComputePassDescriptor::default());
                pass.set_pipeline(&pipeline.pipeline);
                pass.set_bind_group(0, &group, &[]);
                let [x, y, z] = candidate.groups;
                pass.dispatch_workgroups(x, y, z);
            }
            self.queue.submit([encoder.finish()]);
            self.idle().ok()?;
            if round > 0 {
                best = best.min(start.elapsed().as_secs_f64());
            }
        }
        Some(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_fastest_is_measured_once_and_kept() {
        let folder = std::env::temp_dir().join(format!("cutover-tuned-{}", std::process::id()));
        let path = folder.join("device");
        let candidate = |source: &str, bytes: u64| Candidate {
            source: source.to_string(),
            read_only: vec![false],
            groups: [1; 3],
            bytes: vec![bytes],
        };
        let candidates = [candidate("slow", 4), candidate("fast", 4), candidate("broken", 4)];
        let measured = Cell::new(0);
        let measure = |candidate: &Candidate| {
            measured.set(measured.get() + 1);
            match candidate.source.as_str() {
                "slow" => Some(2.0),
                "fast" => Some(1.0),
                _ => None,
            }
        };
        let tuned = Tuned::open(Some(path.clone()));
        assert_eq!((tuned.fastest(&candidates, measure), measured.get()), (Some(1), 3));
        assert_eq!((tuned.fastest(&candidates, measure), measured.get()), (Some(1), 3));
        tuned.keep();
        let again = Tuned::open(Some(path.clone()));
        assert_eq!((again.fastest(&candidates, measure), measured.get()), (Some(1), 3));
        // Other sizes are another choice; what is large is not measured, and neither is what comes after the time for it.
        assert_eq!(
            (again.fastest(&[candidate("slow", 8), candidate("fast", 8)], measure), measured.get()),
            (Some(1), 5)
        );
        assert_eq!(again.fastest(&[candidate("slow", MEASURED_BYTES + 4)], measure), None);
        lock(&again.state).measuring = MEASURING;
        assert_eq!((again.fastest(&candidates[..2], measure), measured.get()), (None, 5));
        // What is torn is as nothing.
        std::fs::write(&path, b"garbage").unwrap();
        assert_eq!((Tuned::open(Some(path)).fastest(&candidates, measure), measured.get()), (Some(1), 8));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
