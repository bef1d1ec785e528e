//! Models with bytes changed at random: whatever is in a file, reading it, deriving its facts, decluttering and planning end in
//! a graph or in an error.
//!
//! `CUTOVER_SOAK=N` tries N times as many.

mod random;

use cutover_graph::{
    Plan,
    onnx::{ImportOptions, Limits, import, import_bytes},
    passes::{PassOptions, declutter},
};
use random::Random;
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

/// The models of the conformance suite, with their weights cut down to what keeps most bytes structure.
fn seeds() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/conformance/models");
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "onnx"));
    paths.sort();
    assert!(paths.len() >= 4, "the conformance suite has models");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// Ranges of the file that are not raw tensor data: a mutation there changes structure, not a weight.
fn structure(bytes: &[u8]) -> Vec<usize> {
    fn walk(bytes: &[u8], from: usize, to: usize, depth: usize, places: &mut Vec<usize>) -> bool {
        let number = |at: &mut usize| {
            let (mut value, mut shift) = (0u64, 0);
            while *at < to && shift < 64 {
                let byte = bytes[*at];
                *at += 1;
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    return Some(value);
                }
                shift += 7;
            }
            None
        };
        let kept = places.len();
        let mut at = from;
        while at < to {
            let start = at;
            let Some(key) = number(&mut at) else { break };
            let end = match key & 7 {
                0 => number(&mut at).map(|_| at),
                1 => Some(at + 8),
                5 => Some(at + 4),
                2 => number(&mut at).and_then(|len| at.checked_add(usize::try_from(len).ok()?)),
                _ => None,
            };
            let Some(end) = end.filter(|&end| end <= to && key >> 3 != 0) else {
                places.truncate(kept);
                return false;
            };
            places.extend(start..at);
            if key & 7 == 2 && end > at && !(depth < 8 && walk(bytes, at, end, depth + 1, places)) && end - at <= 64 {
                places.extend(at..end);
            }
            at = end;
        }
        at == to
    }
    let mut places = Vec::new();
    walk(bytes, 0, bytes.len(), 0, &mut places);
    places
}

fn mutate(bytes: &mut Vec<u8>, places: &[usize], other: &[u8], random: &mut Random) {
    let at = places[random.below(places.len())].min(bytes.len().saturating_sub(1));
    if bytes.is_empty() {
        return;
    }
    match random.below(9) {
        0 => bytes.truncate(random.below(bytes.len())),
        1 | 2 => bytes[at] ^= 1 << random.below(8),
        3 => bytes[at] = random.next() as u8,
        4 => {
            let extremes = [0, 1, 127, 128, u64::from(u32::MAX), i64::MAX as u64, i64::MIN as u64, u64::MAX];
            let end = (at..bytes.len()).find(|&i| bytes[i] < 0x80).map_or(bytes.len(), |i| i + 1);
            bytes.splice(at..end, varint(extremes[random.below(extremes.len())]));
        }
        // One more or one less: another axis, another length, another field.
        5 => bytes[at] = bytes[at].wrapping_add(if random.below(2) == 0 { 1 } else { 255 }),
        6 => {
            let len = random.below(64.min(bytes.len() - at)) + 1;
            bytes.drain(at..(at + len).min(bytes.len()));
        }
        7 => {
            let from = random.below(other.len());
            let to = (from + random.below(64)).min(other.len());
            bytes.splice(at..at, other[from..to].iter().copied());
        }
        // Swaps of equal lengths leave all sizes true: what remains is wrong in meaning alone.
        _ => {
            let (len, from) = (random.below(12) + 1, places[random.below(places.len())]);
            for i in 0..len {
                if from + i < bytes.len() && at + i < bytes.len() {
                    bytes.swap(from + i, at + i);
                }
            }
        }
    }
}

/// How far a file came.
#[derive(Default, Debug)]
struct Outcomes {
    refused: usize,
    read: usize,
    planned: usize,
}

fn attempt(bytes: Vec<u8>, outcomes: &mut Outcomes) {
    let limits = Limits { nodes: 1 << 12, values: 1 << 14, ..Limits::default() };
    let Ok(graph) = import_bytes(bytes.into(), None, &ImportOptions { limits, ..ImportOptions::default() }) else {
        outcomes.refused += 1;
        return;
    };
    outcomes.read += 1;
    let options = PassOptions { stop_after: Some(50), ..PassOptions::default() };
    if let Ok((graph, _)) = declutter(graph, &options)
        && Plan::new(graph).is_ok_and(|plan| plan.verify().is_ok())
    {
        outcomes.planned += 1;
    }
}

#[test]
fn no_mutation_of_a_model_panics() {
    let factor: usize = std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1);
    let seeds = seeds();
    let places: Vec<Vec<usize>> = seeds.iter().map(|bytes| structure(bytes)).collect();
    let mut outcomes = Outcomes::default();
    for iteration in 0..ATTEMPTS * factor {
        let mut random = Random(iteration as u64);
        let which = random.below(seeds.len());
        let other = &seeds[random.below(seeds.len())];
        let mut bytes = seeds[which].clone();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &places[which], other, &mut random);
        }
        let tried = catch_unwind(AssertUnwindSafe(|| attempt(bytes.clone(), &mut outcomes)));
        if tried.is_err() {
            let path = std::env::temp_dir().join(format!("cutover-mutation-{iteration}.onnx"));
            fs::write(&path, bytes).unwrap();
            panic!("iteration {iteration} panics: {}", path.display());
        }
    }
    println!("{outcomes:?}");
    // A mutation that nobody notices would say that the test does not reach the importer's checks, and the other way round.
    assert!(outcomes.refused * 10 > outcomes.read && outcomes.read * 100 > outcomes.refused, "{outcomes:?}");
    assert!(outcomes.planned * 2 > outcomes.read, "{outcomes:?}");
}

/// About four seconds in the test profile.
const ATTEMPTS: usize = 8_000;

#[test]
fn every_prefix_of_a_model_is_an_error_or_a_smaller_model() {
    for bytes in seeds() {
        // Every length would take minutes: every one near the ends, and a sample between.
        let step = bytes.len() / 60;
        for len in (0..200).chain((200..bytes.len()).step_by(step.max(1))).chain(bytes.len() - 200..bytes.len()) {
            let _ = import_bytes(bytes[..len].to_vec().into(), None, &ImportOptions::default());
        }
    }
}

#[test]
fn models_that_are_read_from_mapped_and_from_copied_files_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for bytes in seeds() {
        let path = folder.path().join("model.onnx");
        fs::write(&path, &bytes).unwrap();
        let [mapped, copied] = [true, false].map(|map| {
            let graph = import(&path, &ImportOptions { map, ..ImportOptions::default() }).unwrap();
            format!("{graph:?}")
        });
        assert!(mapped == copied);
    }
}
