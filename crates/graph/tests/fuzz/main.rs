//! Files and values that somebody made up: whatever they are, reading, inference, decluttering and evaluation end in results that the
//! facts don't contradict, or in an error; within bounds of time and memory.
//!
//! What they are made from are the cases of the ONNX project (`tests/onnx/`), which spell every operator. Iteration by iteration a seed gives
//! the same: `CUTOVER_FUZZ=N` runs that one, `CUTOVER_SOAK=N` as many times the sample.

#[path = "../random/mod.rs"]
mod random;

mod cases;
mod operators;
mod watch;
mod wire;

use cases::Cases;
use cutover_graph::{
    Plan,
    onnx::{ImportOptions, Limits, import_bytes},
    passes::{PassOptions, declutter},
};
use random::Random;
use std::time::Instant;
use watch::Watch;
use wire::{Field, Message};

#[global_allocator]
static COUNTING: watch::Counting = watch::Counting;

impl Random {
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}

/// Evaluation may make results of so many elements; everything else follows from it.
const ELEMENTS_MAX: usize = 1 << 16;

const SECONDS_MAX: u64 = 10;
const BYTES_MAX: isize = 256 << 20;

fn options() -> ImportOptions {
    let limits = Limits { nodes: 1 << 12, values: 1 << 14, sparse_bytes: 1 << 20, ..Limits::default() };
    ImportOptions { limits, ..ImportOptions::default() }
}

/// Runs iterations and fails with what they found.
fn fuzz(name: &str, sample: u64, mut work: impl FnMut(&mut Random) -> Result<(), String>) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let iterations = match number("CUTOVER_FUZZ") {
        Some(one) => one..one + 1,
        None => number("CUTOVER_FUZZ_FROM").unwrap_or(0)..sample * number("CUTOVER_SOAK").unwrap_or(1),
    };
    let (mut watch, started) = (Watch::start(SECONDS_MAX, BYTES_MAX), Instant::now());
    let count = iterations.end - iterations.start;
    for iteration in iterations {
        watch.run(iteration, || work(&mut Random(iteration.wrapping_mul(0x2545_f491_4f6c_dd1d))));
        if iteration % (1 << 16) == 1 << 15 {
            let (seconds, found) = (started.elapsed().as_secs(), watch.findings.0.len());
            println!("{name}: {iteration} iterations in {seconds} s, {found} findings");
        }
    }
    let (seconds, longest, most) = (started.elapsed().as_secs(), watch.longest, watch.most_bytes);
    println!("{name}: {count} executions in {seconds} s; the longest {longest:?}, the largest {most} bytes");
    let findings = &watch.findings.0;
    findings.iter().for_each(|(what, (first, times))| println!("{times} × from iteration {first}: {what}"));
    assert!(findings.is_empty(), "{name}: {} findings", findings.len());
}

#[test]
fn files_are_read_or_refused() {
    let cases = Cases::load();
    fuzz("fuzz-import", 4_000, |random| {
        let case = cases.pick(random);
        let other = cases.pick(random);
        let mut file = case.model.clone();
        for _ in 0..=random.below(4) {
            change(&mut file, &other.model, random, 0);
        }
        let Ok(graph) = import_bytes(file.encode().into(), None, &options()) else { return Ok(()) };
        let options = PassOptions { stop_after: Some(50), ..PassOptions::default() };
        if let Ok((graph, _)) = declutter(graph, &options) {
            let _ = Plan::new(graph).map(|plan| plan.verify());
        }
        Ok(())
    });
}

/// Changes one field of `message`, or of a message in it.
fn change(message: &mut Message, other: &Message, random: &mut Random, depth: usize) {
    if message.0.is_empty() {
        return;
    }
    let at = random.below(message.0.len());
    let from_other = (!other.0.is_empty()).then(|| random.of(&other.0).clone());
    if depth < 12
        && !random.one_in(8)
        && let Field::Bytes(bytes) = &message.0[at].1
        && let Some(mut inner) = Message::parse(bytes)
        && !inner.0.is_empty()
    {
        let of_other = other.messages(message.0[at].0);
        let of_other = if of_other.is_empty() { other.clone() } else { random.of(&of_other).clone() };
        change(&mut inner, &of_other, random, depth + 1);
        message.0[at].1 = inner.into();
        return;
    }
    match random.below(8) {
        0 => drop(message.0.remove(at)),
        1 => {
            let copy = message.0[at].clone();
            message.0.push(copy);
        }
        2 => {
            let with = random.below(message.0.len());
            message.0.swap(at, with);
        }
        3 => message.0.extend(from_other),
        4 => message.0[at].0 = 1 + random.below(26) as u32,
        _ => match &mut message.0[at].1 {
            Field::Varint(value) => *value = cases::integer(random) as u64,
            Field::Eight(value) => *value = random.next().to_le_bytes(),
            Field::Four(value) => *value = cases::float(random).to_le_bytes(),
            Field::Bytes(bytes) => match random.below(4) {
                0 => bytes.truncate(random.below(bytes.len() + 1)),
                1 if !bytes.is_empty() => {
                    let at = random.below(bytes.len());
                    bytes[at] = random.next() as u8;
                }
                2 => bytes.extend(random.next().to_le_bytes()),
                _ => {
                    if let Some((_, Field::Bytes(other))) = from_other {
                        *bytes = other;
                    }
                }
            },
        },
    }
}

#[test]
fn operators_give_what_their_facts_say() {
    let cases = Cases::load();
    fuzz("fuzz-operators", 4_000, |random| operators::attempt(&cases, random));
}
