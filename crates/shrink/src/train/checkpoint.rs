//! A training as it stands, in a safetensors file that is there whole or not at all.
//!
//! Files are called `step-00000042.safetensors`; the last two are kept, so that one that a disk tore leaves another.

use super::{Point, optimizer::Moments};
use crate::{ShrinkError, quantize::Range};
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

/// All that a run's further course follows from, beside what it was asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Checkpoint {
    pub state: State,
    pub weights: Vec<Vec<f32>>,
    pub moments: Vec<Moments>,
    /// The weights of the best evaluation; empty where there was none.
    pub best: Vec<Vec<f32>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Of what was asked for, the weights at the start and the data.
    pub fingerprint: String,
    /// Steps done.
    pub step: usize,
    /// Passes over the samples that are complete, and steps of the one that is not.
    pub epoch: usize,
    pub batch: usize,
    pub best_metric: Option<f64>,
    /// Evaluations since the best.
    pub worse: usize,
    pub curve: Vec<Point>,
    /// Since the last point.
    pub loss_sum: f64,
    pub losses: usize,
    pub seconds: f64,
    pub samples: u64,
    /// Bits of the ends of ranges that are learned, by value.
    pub ranges: BTreeMap<String, (u32, u32)>,
    pub best_ranges: BTreeMap<String, (u32, u32)>,
}

/// Ranges as they are stored: to the bit.
pub(super) fn bits(ranges: &[(String, Range)]) -> BTreeMap<String, (u32, u32)> {
    ranges.iter().map(|(name, range)| (name.clone(), (range.low.to_bits(), range.high.to_bits()))).collect()
}

pub(super) fn of_bits(ranges: &BTreeMap<String, (u32, u32)>) -> Vec<(String, Range)> {
    let range = |&(low, high): &(u32, u32)| Range { low: f32::from_bits(low), high: f32::from_bits(high) };
    ranges.iter().map(|(name, bits)| (name.clone(), range(bits))).collect()
}

const STATE: &str = "cutover.training";
const DIGEST: &str = "cutover.digest";

impl Checkpoint {
    /// Writes it into `folder` and forgets all but the last two.
    pub fn save(&self, folder: &Path) -> Result<(), ShrinkError> {
        let at = |path: &Path| {
            let path = path.display().to_string();
            move |error: std::io::Error| ShrinkError::Training(format!("checkpoint '{path}': {error}"))
        };
        fs::create_dir_all(folder).map_err(at(folder))?;
        let path = folder.join(format!("step-{:08}.safetensors", self.state.step));
        let temporary = path.with_extension("tmp");
        let mut file = File::create(&temporary).map_err(at(&temporary))?;
        file.write_all(&self.encode()?).map_err(at(&temporary))?;
        file.sync_all().map_err(at(&temporary))?;
        fs::rename(&temporary, &path).map_err(at(&path))?;
        // The name is on the disk when its folder is.
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))?;
        for old in files(folder).iter().rev().skip(2) {
            fs::remove_file(old).map_err(at(old))?;
        }
        Ok(())
    }

    /// The last one in `folder` that is whole and of this training. Others are passed over; those of another training are an error.
    pub fn load(folder: &Path, fingerprint: &str) -> Result<Option<Checkpoint>, ShrinkError> {
        for path in files(folder).into_iter().rev() {
            let Ok(bytes) = fs::read(&path) else { continue };
            let Some(checkpoint) = Checkpoint::decode(&bytes) else { continue };
            if checkpoint.state.fingerprint != fingerprint {
                let message = "is of another training: other options, weights or data; give another folder";
                return Err(ShrinkError::Training(format!("checkpoint '{}' {message}", path.display())));
            }
            return Ok(Some(checkpoint));
        }
        Ok(None)
    }

    fn tensors(&self) -> BTreeMap<String, &[f32]> {
        let mut tensors = BTreeMap::new();
        for (i, values) in self.weights.iter().enumerate() {
            tensors.insert(format!("weight.{i}"), &values[..]);
        }
        for (i, moments) in self.moments.iter().enumerate() {
            tensors.insert(format!("first.{i}"), &moments.first[..]);
            tensors.insert(format!("second.{i}"), &moments.second[..]);
        }
        for (i, values) in self.best.iter().enumerate() {
            tensors.insert(format!("best.{i}"), &values[..]);
        }
        tensors
    }

    fn encode(&self) -> Result<Vec<u8>, ShrinkError> {
        let wrong = |error: String| ShrinkError::Training(format!("a checkpoint can't be written: {error}"));
        let tensors = self.tensors();
        let state = serde_json::to_string(&self.state).map_err(|e| wrong(e.to_string()))?;
        let digest = digest(&state, tensors.values().copied());
        let bytes: Vec<(&String, Vec<u8>, usize)> =
            tensors.iter().map(|(name, v)| (name, v.iter().flat_map(|v| v.to_le_bytes()).collect(), v.len())).collect();
        let views = bytes.iter().map(|(name, bytes, len)| Ok((*name, TensorView::new(Dtype::F32, vec![*len], bytes)?)));
        let views =
            views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>().map_err(|e| wrong(e.to_string()))?;
        let metadata = HashMap::from([(STATE.to_string(), state), (DIGEST.to_string(), digest)]);
        safetensors::serialize(views, Some(metadata)).map_err(|e| wrong(e.to_string()))
    }

    /// `None` where any byte is not what was written.
    fn decode(bytes: &[u8]) -> Option<Checkpoint> {
        let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
        let metadata = header.metadata().as_ref()?;
        let (text, expected) = (metadata.get(STATE)?, metadata.get(DIGEST)?);
        let file = SafeTensors::deserialize(bytes).ok()?;
        let floats = |name: String| -> Option<Vec<f32>> {
            let tensor = file.tensor(&name).ok()?;
            Some(tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let list = |stem: &str| (0..).map_while(|i| floats(format!("{stem}.{i}"))).collect::<Vec<_>>();
        let moments = list("first").into_iter().zip(list("second"));
        let checkpoint = Checkpoint {
            state: serde_json::from_str(text).ok()?,
            weights: list("weight"),
            moments: moments.map(|(first, second)| Moments { first, second }).collect(),
            best: list("best"),
        };
        (digest(text, checkpoint.tensors().values().copied()) == *expected).then_some(checkpoint)
    }
}

fn digest<'a>(state: &str, tensors: impl Iterator<Item = &'a [f32]>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(state.as_bytes());
    let mut bytes = Vec::new();
    for tensor in tensors {
        bytes.clear();
        bytes.extend(tensor.iter().flat_map(|v| v.to_le_bytes()));
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// The checkpoints of a folder, by step.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("step-") && name.ends_with(".safetensors")
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_ours).collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: usize) -> Checkpoint {
        let point = Point { step, loss: 0.1, metric: Some(1.0 / 3.0), seconds: 0.7 };
        let state = State { fingerprint: "f".to_string(), step, curve: vec![point], ..State::default() };
        let moments = vec![Moments { first: vec![0.25, f32::MIN_POSITIVE], second: vec![3e-9, 0.0] }];
        Checkpoint { state, weights: vec![vec![1.0, -0.1]], moments, best: vec![vec![0.5, 0.5]] }
    }

    #[test]
    fn what_is_written_is_read_and_two_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        (1..=4).for_each(|step| checkpoint(step).save(folder.path()).unwrap());
        assert_eq!(files(folder.path()).len(), 2);
        let read = Checkpoint::load(folder.path(), "f").unwrap().unwrap();
        assert_eq!(read.state, checkpoint(4).state);
        assert_eq!((read.weights, read.best), (checkpoint(4).weights, checkpoint(4).best));
        assert_eq!(read.moments[0].first, checkpoint(4).moments[0].first);
        let error = Checkpoint::load(folder.path(), "g").unwrap_err().to_string();
        assert!(error.contains("another training"), "{error}");
        assert!(Checkpoint::load(&folder.path().join("none"), "f").unwrap().is_none());
    }

    #[test]
    fn a_torn_one_gives_way_to_the_one_before() {
        let whole = checkpoint(2).encode().unwrap();
        for damage in 0..whole.len() {
            let mut torn = whole.clone();
            match damage % 2 {
                0 => torn.truncate(damage),
                _ => torn[damage] ^= 0x10,
            }
            // A flipped bit in white space or in a name of the header may leave everything else as it was.
            if let Some(read) = Checkpoint::decode(&torn) {
                assert_eq!((read.state, read.weights), (checkpoint(2).state, checkpoint(2).weights));
            }
        }
        let folder = tempfile::tempdir().unwrap();
        checkpoint(1).save(folder.path()).unwrap();
        checkpoint(2).save(folder.path()).unwrap();
        let last = files(folder.path()).pop().unwrap();
        fs::write(&last, &whole[..whole.len() / 2]).unwrap();
        assert_eq!(Checkpoint::load(folder.path(), "f").unwrap().unwrap().state.step, 1);
    }
}
