//! Rollouts in simulated worlds, replayable from a seed: the code that decides on a device is what is driven here.
//!
//! Every run is one world drawn from its seed: traffic, a strategy, a candidate that is good or bad in some way, and faults that come in any
//! mixture. After every event the invariants are checked. `CUTOVER_SOAK=N` runs N times as many; `CUTOVER_SEED=S` runs one seed again and
//! tells what happens in it.

mod world;

use std::{collections::BTreeMap, time::Instant};
use world::{Candidate, End, Faults, Run, World, run};

/// Runs of the tests' sample.
const SAMPLE: u64 = 2_000;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|v| v.parse().ok())
}

/// How runs of one kind of candidate under one strategy ended.
#[derive(Default)]
struct Tally {
    /// Whether these are to be promoted.
    deserves: bool,
    runs: u64,
    promoted: u64,
    rolled_back: u64,
    inconclusive: u64,
    alerts: u64,
    /// Requests until the decision, of those that ended with one.
    requests: Vec<u64>,
    /// Seeds whose end was the wrong one.
    wrong: Vec<u64>,
}

impl Tally {
    fn add(&mut self, seed: u64, run: &Run, wrong: bool) {
        self.runs += 1;
        self.alerts += u64::from(run.alerts > 0);
        match run.end {
            End::Promoted => self.promoted += 1,
            End::RolledBack => self.rolled_back += 1,
            End::Inconclusive => self.inconclusive += 1,
        }
        if run.end != End::Inconclusive {
            self.requests.push(run.requests);
        }
        if wrong {
            self.wrong.push(seed);
        }
    }

    fn rate(&self) -> f64 {
        self.wrong.len() as f64 / self.runs.max(1) as f64
    }

    /// What a rate of `declared` stays below in so many runs, but once in a thousand times.
    fn bound(&self, declared: f64) -> f64 {
        declared + 3.1 * (declared * (1.0 - declared) / self.runs.max(1) as f64).sqrt()
    }
}

#[test]
fn rollouts_decide_rightly_whatever_happens() {
    if let Some(seed) = number("CUTOVER_SEED") {
        let world = World::drawn(seed);
        println!("seed {seed}: {world:#?}");
        let run = run(&world, seed, true);
        println!("seed {seed}: {:?} after {} requests", run.end, run.requests);
        assert!(run.broken.is_empty(), "{:#?}", run.broken);
        return;
    }
    let runs = SAMPLE * number("CUTOVER_SOAK").unwrap_or(1);
    let start = Instant::now();
    let mut tallies: BTreeMap<(&'static str, Candidate), Tally> = BTreeMap::new();
    let mut broken = Vec::new();
    let (mut calm_runs, mut false_alerts) = (0u64, 0u64);
    let (mut requests, mut faults) = (0, BTreeMap::<&'static str, u64>::new());
    for seed in 0..runs {
        let world = World::drawn(seed);
        let run = run(&world, seed, false);
        requests += run.requests;
        world.faults.named().for_each(|name| *faults.entry(name).or_default() += 1);
        if let Some(what) = run.broken.first() {
            broken.push(format!("seed {seed}: {what}; replay: cargo xtask soak simulation --seed {seed}"));
        }
        // Nothing changed for both arms, and nothing was to be said of them.
        let calm = world.candidate.is_good() && !world.faults.drift_both;
        (calm_runs, false_alerts) = (calm_runs + u64::from(calm), false_alerts + u64::from(calm && run.alerts > 0));
        let tally = tallies.entry((world.strategy_name, world.candidate)).or_default();
        tally.deserves = world.deserves();
        tally.add(seed, &run, world.is_wrong(run.end));
    }
    println!("{runs} runs, {requests} requests in {:.1} s", start.elapsed().as_secs_f64());
    println!("faults: {}", faults.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", "));
    println!(
        "strategy    candidate            runs  promoted  rolled back  inconclusive  alerted  median requests  wrong rate"
    );
    for ((strategy, candidate), tally) in &mut tallies {
        tally.requests.sort();
        let median = tally.requests.get(tally.requests.len() / 2).map_or("-".to_string(), u64::to_string);
        println!(
            "{strategy:11} {:18} {:>6} {:>9} {:>12} {:>13} {:>8} {median:>16}  {:.4}",
            format!("{candidate:?}"),
            tally.runs,
            tally.promoted,
            tally.rolled_back,
            tally.inconclusive,
            tally.alerts,
            tally.rate()
        );
    }
    assert!(broken.is_empty(), "{} runs broke an invariant: {:#?}", broken.len(), &broken[..broken.len().min(5)]);
    let sum = |good: bool| {
        let mut sum = Tally::default();
        for tally in tallies.values() {
            if tally.deserves == good {
                sum.runs += tally.runs;
                sum.wrong.extend(&tally.wrong);
            }
        }
        sum
    };
    let (good, bad) = (sum(true), sum(false));
    let declared = world::DECLARED;
    println!("false rollback rate {:.4} of {} candidates to promote, declared {declared}", good.rate(), good.runs);
    println!("false promotion rate {:.4} of {} candidates to send away, declared {declared}", bad.rate(), bad.runs);
    for (name, tally) in [("rolled back", &good), ("promoted", &bad)] {
        let seeds = &tally.wrong[..tally.wrong.len().min(5)];
        assert!(
            tally.rate() <= tally.bound(declared),
            "{} of {} wrongly {name}, declared {declared}; replay: cargo xtask soak simulation --seed N, N of {seeds:?}",
            tally.wrong.len(),
            tally.runs
        );
    }
    let alert_rate = false_alerts as f64 / calm_runs.max(1) as f64;
    println!("false alert rate {alert_rate:.4} of {calm_runs} calm runs, declared {declared}");
    assert!(
        alert_rate <= Tally { runs: calm_runs, ..Tally::default() }.bound(declared),
        "{false_alerts} of {calm_runs}"
    );
    // Decisions are made at all: most good candidates come through, and next to all bad ones go.
    let decided = |good: bool, end: fn(&Tally) -> u64| {
        let of = tallies.values().filter(|tally| tally.deserves == good);
        let (n, total) = of.fold((0, 0), |(n, total), tally| (n + end(tally), total + tally.runs));
        n as f64 / f64::max(total as f64, 1.0)
    };
    let (kept, gone) = (decided(true, |t| t.promoted), decided(false, |t| t.rolled_back));
    println!("good candidates promoted {kept:.3}, bad ones rolled back {gone:.3}; the rest is inconclusive");
    assert!(kept > 0.5 && gone > 0.8, "{kept} {gone}");
}

/// The same seed gives the same run, or nothing could be replayed.
#[test]
fn a_seed_replays() {
    for seed in [1, 77, 4242] {
        let world = World::drawn(seed);
        let (a, b) = (run(&world, seed, false), run(&world, seed, false));
        assert_eq!((a.end, a.requests, a.alerts), (b.end, b.requests, b.alerts));
    }
}

/// What only one fault must not do, each on its own.
#[test]
fn faults_that_are_nobodys_alert_and_hold() {
    let mut alerted = 0;
    for seed in 0..60 {
        let mut world = World::drawn(seed);
        world.candidate = Candidate::Same;
        world.set_strategy("canary");
        world.faults = Faults { drift_both: true, ..Faults::default() };
        let run = run(&world, seed, false);
        assert_ne!(run.end, End::RolledBack, "seed {seed}: the data changed, not the candidate");
        alerted += u64::from(run.alerts > 0);
    }
    assert!(alerted >= 45, "{alerted} of 60 alerted");
}
