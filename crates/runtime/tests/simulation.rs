//! Rollouts in simulated worlds, replayable from a seed: the code that decides on a device is what is driven here.
//!
//! `CUTOVER_SOAK=N` runs N times as many worlds.

use cutover_monitor::{Gates, Window};
use cutover_runtime::{
    BlueGreen, Canary, Strategy,
    rollout::{Action, Event, Rollout},
};
use std::{collections::VecDeque, time::Duration};

/// What one version does in some weather.
#[derive(Clone, Copy)]
struct Arm {
    accuracy: f64,
    error_rate: f64,
    latency_ms: f64,
    confidence: f64,
}

const GOOD: Arm = Arm { accuracy: 0.97, error_rate: 0.002, latency_ms: 6.0, confidence: 0.93 };

#[derive(Clone, Copy)]
struct World {
    incumbent: Arm,
    candidate: Arm,
    /// Requests a second.
    rate: u64,
    /// Share of answers whose label comes, and how much later, in seconds.
    labelled: f64,
    label_delay_s: u64,
    /// Share of comparisons that agree; of a tenth of the requests.
    agreement: f64,
    /// From this second on both arms are wrong this much more often, and this many times slower.
    drift: Option<(u64, f64, f64)>,
    /// The process ends and starts again every so many seconds: what was counted is lost, what was committed is not.
    restart_s: Option<u64>,
}

const CALM: World = World {
    incumbent: GOOD,
    candidate: GOOD,
    rate: 100,
    labelled: 0.5,
    label_delay_s: 3,
    agreement: 0.96,
    drift: None,
    restart_s: None,
};

struct Random(u64);

impl Random {
    /// splitmix64, to a number in [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn is(&mut self, p: f64) -> bool {
        self.unit() < p
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Promoted,
    RolledBack(String),
    Undecided,
}

fn run(world: &World, strategy: Strategy, seed: u64) -> Outcome {
    let mut random = Random(seed);
    let mut windows = [Window::default(), Window::default()];
    let mut labels: VecDeque<(u64, usize, u64, bool)> = VecDeque::new();
    let mut rollout = Rollout::new(strategy);
    let (mut share, mut step) = (0.0, 0u64);
    let act = |actions: Vec<Action>, share: &mut f64, windows: &mut [Window; 2], step: &mut u64| {
        for action in actions {
            match action {
                Action::Share(to) => {
                    *share = to;
                    *step += 1;
                    windows[1] = Window::default();
                    // As the host has it: an incumbent without traffic keeps what was counted.
                    if to < 1.0 {
                        windows[0] = Window::default();
                    }
                }
                Action::Promote { .. } => return Some(Outcome::Promoted),
                Action::RollBack { reason } => return Some(Outcome::RolledBack(reason)),
            }
        }
        None
    };
    for second in 0..6 * 3600u64 {
        // The incumbent served for a minute before.
        if second == 60 {
            let actions = rollout.handle(Duration::ZERO, Event::Admitted);
            if let Some(outcome) = act(actions, &mut share, &mut windows, &mut step) {
                return outcome;
            }
        }
        if world.restart_s.is_some_and(|every| second > 60 && second % every == 0) {
            rollout = serde_json::from_str(&serde_json::to_string(&rollout).unwrap()).unwrap();
            windows = Default::default();
            labels.clear();
        }
        let drift = world.drift.filter(|(from, ..)| second >= *from);
        for _ in 0..world.rate {
            let index = usize::from(random.is(share));
            let arm = [world.incumbent, world.candidate][index];
            if random.is(arm.error_rate) {
                windows[index].failed();
                continue;
            }
            let slower = drift.map_or(1.0, |(_, _, slower)| slower);
            let tail = if random.is(0.05) { 4.0 } else { 1.0 };
            let ms = arm.latency_ms * slower * tail * (0.7 + 0.6 * random.unit());
            let sure = (arm.confidence + 0.1 * (random.unit() - 0.5)).min(1.0);
            windows[index].answered(Duration::from_secs_f64(ms / 1e3), Some(sure));
            if share > 0.0 && random.is(0.1) {
                windows[1].agreement.add(random.is(world.agreement));
            }
            if random.is(world.labelled) {
                let right = random.is(arm.accuracy - drift.map_or(0.0, |(_, worse, _)| worse));
                labels.push_back((second + world.label_delay_s, index, step, right));
            }
        }
        while labels.front().is_some_and(|(due, ..)| *due <= second) {
            let (_, index, of_step, right) = labels.pop_front().unwrap();
            if of_step == step || (share >= 1.0 && index == 0) {
                windows[index].accuracy.add(right);
            }
        }
        if second >= 60 {
            let event = Event::Observed { incumbent: &windows[0], candidate: &windows[1] };
            let actions = rollout.handle(Duration::from_secs(second - 59), event);
            if let Some(outcome) = act(actions, &mut share, &mut windows, &mut step) {
                return outcome;
            }
        }
    }
    Outcome::Undecided
}

/// Runs `worlds` seeds of one world; gives how many were promoted, rolled back, and the reasons.
fn tally(name: &str, world: World, strategy: impl Fn() -> Strategy, worlds: u64) -> (u64, u64, Vec<String>) {
    let (mut promoted, mut rolled_back, mut reasons) = (0, 0, Vec::new());
    for seed in 0..worlds {
        match run(&world, strategy(), seed * 7919 + 1) {
            Outcome::Promoted => promoted += 1,
            Outcome::RolledBack(reason) => {
                rolled_back += 1;
                reasons.push(format!("seed {seed}: {reason}"));
            }
            Outcome::Undecided => {}
        }
    }
    println!("{name:34} promoted {promoted}, rolled back {rolled_back} of {worlds}");
    (promoted, rolled_back, reasons)
}

#[test]
fn canaries_decide_rightly_in_every_weather() {
    let worlds = 24 * std::env::var("CUTOVER_SOAK").ok().and_then(|v| v.parse().ok()).unwrap_or(1u64);
    let with = |change: fn(&mut World)| {
        let mut world = CALM;
        change(&mut world);
        world
    };
    let good = [
        ("equal", with(|_| {})),
        ("equal, no labels", with(|w| w.labelled = 0.0)),
        ("equal, restarted every 5 minutes", with(|w| w.restart_s = Some(300))),
        ("better than a bad incumbent", with(|w| (w.incumbent.accuracy, w.agreement) = (0.8, 0.8))),
        ("both drift to be wrong", with(|w| w.drift = Some((100, 0.25, 1.0)))),
        ("both drift while it has half", with(|w| w.drift = Some((210, 0.25, 1.0)))),
        ("both drift to be slow", with(|w| w.drift = Some((130, 0.0, 3.0)))),
        ("better, labels late", with(|w| (w.incumbent.accuracy, w.agreement, w.label_delay_s) = (0.8, 0.8, 25))),
    ];
    for (name, world) in good {
        let (promoted, _, reasons) = tally(name, world, Strategy::canary, worlds);
        // In bad weather differences take longer to tell than a step may last; no gate may fail for it.
        let failed = reasons.iter().filter(|r| !r.contains("undecided")).count() as u64;
        assert!(failed * 50 <= worlds && promoted * 4 >= worlds * 3, "{name}: {promoted} promoted, {reasons:#?}");
    }
    let bad = [
        ("wrong more often", with(|w| (w.candidate.accuracy, w.agreement) = (0.85, 0.85))),
        ("failing", with(|w| w.candidate.error_rate = 0.05)),
        ("slow", with(|w| w.candidate.latency_ms = 15.0)),
        (
            "wrong and less sure, no labels",
            with(|w| (w.labelled, w.agreement, w.candidate.confidence) = (0.0, 0.8, 0.7)),
        ),
        ("wrong, both drift", with(|w| (w.candidate.accuracy, w.drift) = (0.85, Some((150, 0.2, 2.0))))),
        ("failing, restarted", with(|w| (w.candidate.error_rate, w.restart_s) = (0.05, Some(200)))),
    ];
    for (name, world) in bad {
        let (promoted, rolled_back, _) = tally(name, world, Strategy::canary, worlds);
        assert!(promoted == 0 && rolled_back == worlds, "{name}: {promoted} promoted, {rolled_back} rolled back");
    }
}

#[test]
fn fast_canaries_decide_in_seconds() {
    let fast = || Strategy::Canary(Canary::fast());
    let world = World { rate: 1500, labelled: 1.0, label_delay_s: 1, ..CALM };
    let (promoted, ..) = tally("fast: equal", world, fast, 8);
    assert!(promoted >= 7);
    let worse = World { candidate: Arm { accuracy: 0.9, ..GOOD }, agreement: 0.9, ..world };
    let (promoted, rolled_back, _) = tally("fast: worse", worse, fast, 8);
    assert!(promoted == 0 && rolled_back == 8);
}

#[test]
fn blue_green_switches_back_from_what_fails() {
    let strategy = || Strategy::BlueGreen(BlueGreen { observe_s: 120.0, gates: Gates::default() });
    let worlds = 16;
    let (promoted, ..) = tally("blue-green: equal", CALM, strategy, worlds);
    assert!(promoted * 10 >= worlds * 9);
    let failing = World { candidate: Arm { error_rate: 0.05, ..GOOD }, ..CALM };
    let (promoted, rolled_back, _) = tally("blue-green: failing", failing, strategy, worlds);
    assert!(promoted == 0 && rolled_back == worlds);
}
