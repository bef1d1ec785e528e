//! A simulated device: traffic, versions, labels, a clock and a disk that misbehave as a seed says. The host's rules are spelled out
//! once more here, on purpose: requests stay with their arm, a share counts once it is committed, a roll back moves traffic first.

use cutover_monitor::{Gates, Reference, Seen, Window};
use cutover_runtime::{
    AbTest, BlueGreen, Canary, Shadow, Strategy,
    rollout::{Action, Event, Rollout, Step, is_assigned, served},
};
use std::{collections::VecDeque, time::Duration};

/// Probability, over a whole rollout, of the wrong end: gates of `alpha = 0.01` each, of which a rollout has up to five that judge.
pub const DECLARED: f64 = 0.05;
const ALPHA: f64 = 0.01;

/// What the candidate is like beside the incumbent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Candidate {
    Same,
    Better,
    /// Wrong more often.
    Wrong,
    Failing,
    Slow,
    /// Panics in a kernel now and then.
    Panicking,
    /// Other classes win, and it is less sure.
    Drifted,
}

impl Candidate {
    pub fn is_good(self) -> bool {
        matches!(self, Candidate::Same | Candidate::Better)
    }
}

impl World {
    /// Whether this end is the wrong one. To an A/B test a candidate that is no better is one to send away.
    pub fn is_wrong(&self, end: End) -> bool {
        match end {
            End::Promoted => !self.deserves(),
            End::RolledBack => self.deserves(),
            End::Inconclusive => false,
        }
    }

    /// Whether the candidate is one to be promoted.
    pub fn deserves(&self) -> bool {
        match self.strategy_name {
            "ab" => self.candidate == Candidate::Better,
            _ => self.candidate.is_good(),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Loading takes minutes: requests go on meanwhile.
    pub slow_load: bool,
    /// The process ends and starts again every so often; what was not saved is lost.
    pub crashes: bool,
    /// Both arms see other data from some moment on.
    pub drift_both: bool,
    /// Labels come late, out of order, twice, or for nobody.
    pub late_labels: bool,
    /// The clock jumps forward, and the device sleeps.
    pub clock_jumps: bool,
    /// Commits fail for a while.
    pub full_disk: bool,
}

impl Faults {
    pub fn named(&self) -> impl Iterator<Item = &'static str> {
        [
            ("slow load", self.slow_load),
            ("crash", self.crashes),
            ("drift in both arms", self.drift_both),
            ("late labels", self.late_labels),
            ("clock jump", self.clock_jumps),
            ("full disk", self.full_disk),
        ]
        .into_iter()
        .filter_map(|(name, is)| is.then_some(name))
    }
}

#[derive(Clone, Debug)]
pub struct World {
    pub candidate: Candidate,
    pub strategy_name: &'static str,
    pub strategy: Strategy,
    pub faults: Faults,
    /// Requests a second.
    pub rate: u64,
    /// Share of answers whose label comes; 0 where none do.
    pub labelled: f64,
    pub accuracy: f64,
    pub salt: u64,
}

/// One version's behaviour.
#[derive(Clone, Copy)]
struct Arm {
    accuracy: f64,
    error_rate: f64,
    panic_rate: f64,
    latency_ms: f64,
    confidence: f64,
    /// How far its classes are from the usual ones.
    skew: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Promoted,
    RolledBack,
    Inconclusive,
}

pub struct Run {
    pub end: End,
    pub requests: u64,
    pub alerts: u64,
    /// Invariants that did not hold.
    pub broken: Vec<String>,
}

pub struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn is(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[(self.next() % all.len() as u64) as usize]
    }
}

fn gates() -> Gates {
    Gates {
        requests_min: 100,
        labels_min: 60,
        accuracy_drop_max: 0.05,
        labels_wait_s: 20.0,
        alpha: ALPHA,
        ..Gates::default()
    }
}

fn strategy(name: &str) -> Strategy {
    let gates = gates();
    let step = |share| Step { share, dwell_s: 10.0 };
    let canary = Canary { steps: vec![step(0.1), step(0.3), step(0.5)], deadline_s: 300.0, gates };
    match name {
        "canary" => Strategy::Canary(canary),
        "blue-green" => Strategy::BlueGreen(BlueGreen { observe_s: 240.0, gates }),
        "ab" => Strategy::AbTest(AbTest {
            minimum_effect: 0.02,
            alpha: 0.02,
            deadline_s: 300.0,
            gates,
            ..AbTest::default()
        }),
        _ => Strategy::Shadow(Shadow { observe_s: 10.0, deadline_s: 200.0, then: None, gates }),
    }
}

impl World {
    pub fn drawn(seed: u64) -> World {
        let mut random = Random(seed ^ 0x5eed);
        let strategy_name = random.of(&["canary", "canary", "ab", "shadow", "blue-green"]);
        let candidate = random.of(&[
            Candidate::Same,
            Candidate::Same,
            Candidate::Better,
            Candidate::Wrong,
            Candidate::Failing,
            Candidate::Slow,
            Candidate::Panicking,
            Candidate::Drifted,
        ]);
        let labelled = random.of(&[0.0, 0.6, 1.0]);
        let faults = Faults {
            slow_load: random.is(0.3),
            crashes: random.is(0.2),
            // What moves while all requests go to one arm can be told from the candidate's doing by nobody.
            drift_both: random.is(0.2) && strategy_name != "blue-green",
            late_labels: random.is(0.3),
            clock_jumps: random.is(0.3),
            full_disk: random.is(0.2),
        };
        let accuracy = random.of(&[0.85, 0.93, 0.97]);
        let mut world = World {
            candidate,
            strategy_name,
            strategy: strategy(strategy_name),
            faults,
            rate: random.of(&[20, 40, 60]),
            labelled,
            accuracy,
            salt: random.next(),
        };
        // Without labels an A/B test of accuracy has nothing to go by, and nobody can tell a better candidate.
        if strategy_name == "ab" {
            world.labelled = world.labelled.max(0.6);
        }
        if world.labelled == 0.0 && candidate == Candidate::Better {
            world.candidate = Candidate::Same;
        }
        world
    }

    pub fn set_strategy(&mut self, name: &'static str) {
        (self.strategy_name, self.strategy) = (name, strategy(name));
    }

    fn arms(&self) -> [Arm; 2] {
        let usual = Arm {
            accuracy: self.accuracy,
            error_rate: 0.002,
            panic_rate: 0.0,
            latency_ms: 6.0,
            confidence: 0.9,
            skew: 0.0,
        };
        let other = match self.candidate {
            Candidate::Same => usual,
            Candidate::Better => Arm { accuracy: (usual.accuracy + 0.12).min(0.995), ..usual },
            Candidate::Wrong => Arm { accuracy: usual.accuracy - 0.2, confidence: 0.75, ..usual },
            Candidate::Failing => Arm { error_rate: 0.12, ..usual },
            Candidate::Slow => Arm { latency_ms: 18.0, ..usual },
            Candidate::Panicking => Arm { panic_rate: 0.02, ..usual },
            Candidate::Drifted => Arm { accuracy: usual.accuracy - 0.3, confidence: 0.6, skew: 0.6, ..usual },
        };
        [usual, other]
    }

    /// How often both arms give the same class.
    fn agreement(&self) -> f64 {
        match self.candidate {
            Candidate::Wrong => self.accuracy - 0.17,
            Candidate::Drifted => self.accuracy - 0.3,
            Candidate::Better => self.accuracy.min(0.97),
            _ => 0.97,
        }
    }
}

/// One answer to a label that is still to come.
struct Due {
    at: u64,
    arm: usize,
    step: usize,
    right: [bool; 2],
    /// A second label for the same answer.
    again: bool,
    /// Of an answer before the rollout.
    before: bool,
}

/// What the device has of the rollout.
struct Device {
    rollout: Rollout,
    windows: [Window; 2],
    /// What a crash leaves.
    saved: (Rollout, [Window; 2], f64),
    serving_s: f64,
    share: f64,
    /// Steps so far: windows are begun anew with each.
    step: usize,
    /// A roll back moved traffic, and is not committed yet.
    ending: Option<End>,
    admitted: bool,
}

/// Runs a world to the end of its rollout; `tell` prints what happens.
pub fn run(world: &World, seed: u64, tell: bool) -> Run {
    let mut random = Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 7);
    let arms = world.arms();
    let shadow = world.strategy_name == "shadow";
    let mut out = Run { end: End::Inconclusive, requests: 0, alerts: 0, broken: Vec::new() };
    let rollout = Rollout::new(world.strategy.clone());
    let mut device = Device {
        saved: (rollout.clone(), Default::default(), 0.0),
        rollout,
        windows: Default::default(),
        serving_s: 0.0,
        share: 0.0,
        step: 0,
        ending: None,
        admitted: false,
    };
    let mut labels: VecDeque<Due> = VecDeque::new();
    let loaded_at = if world.faults.slow_load { 30 } else { 15 };
    let drift_at = loaded_at + 5 + random.next() % 20;
    // Candidates' requests of the present share, for its bounds.
    let (mut of_share, mut to_candidate) = (0u64, 0u64);
    let mut before = Window::default();
    for second in 0..3600u64 {
        let full = world.faults.full_disk && (second / 7) % 4 == 1;
        if second == loaded_at {
            device.rollout.reference = Some(Reference::of(&before));
            let actions = device.rollout.handle(Duration::ZERO, Event::Admitted);
            device.admitted = true;
            (of_share, to_candidate) = (0, 0);
            act(&mut device, actions, &mut out, false);
            device.step = 0;
            device.windows = [
                if world.strategy_name == "blue-green" { before.clone() } else { Window::default() },
                Window::default(),
            ];
            device.saved = (device.rollout.clone(), device.windows.clone(), 0.0);
        }
        if world.faults.crashes && device.admitted && second % 97 == 96 && device.ending.is_none() {
            // The share in force after the start is the one that was committed.
            let (rollout, windows, serving_s) = device.saved.clone();
            let text = serde_json::to_string(&rollout).unwrap();
            let same: Rollout = serde_json::from_str(&text).unwrap();
            if same != rollout {
                out.broken.push("a stored rollout is not what it was".to_string());
            }
            if device.share != rollout.share {
                (device.share, of_share, to_candidate) = (rollout.share, 0, 0);
            }
            (device.rollout, device.windows, device.serving_s) = (same, windows, serving_s);
        }
        let drift = world.faults.drift_both && second >= drift_at;
        let mut crashed = false;
        for number in 0..world.rate {
            out.requests += 1;
            let key = format!("{second}-{number}");
            let arm = usize::from(device.admitted && is_assigned(world.salt, &key, device.share));
            if is_assigned(world.salt, &key, device.share) && !device.admitted {
                out.broken.push(format!("request {key} went to a version that was not admitted"));
            }
            if device.ending.is_some() && arm == 1 {
                out.broken.push(format!("request {key} went to a candidate that had gone"));
            }
            (of_share, to_candidate) = (of_share + 1, to_candidate + arm as u64);
            let mut answers = 0;
            let right = [0, 1].map(|i| random.is(arms[i].accuracy - if drift { 0.15 } else { 0.0 }));
            let mut answer = |arm: usize, window: &mut Window, random: &mut Random| -> bool {
                let behaviour = arms[arm];
                if random.is(behaviour.panic_rate) {
                    crashed = true;
                    window.failed();
                    return false;
                }
                if random.is(behaviour.error_rate) {
                    window.failed();
                    return false;
                }
                let tail = if random.is(0.05) { 4.0 } else { 1.0 };
                let ms = behaviour.latency_ms * tail * (0.7 + 0.6 * random.unit());
                let sure =
                    (behaviour.confidence - if drift { 0.2 } else { 0.0 } + 0.1 * (random.unit() - 0.5)).min(1.0);
                let skewed = random.is(behaviour.skew.max(if drift { 0.5 } else { 0.0 }));
                let class = if skewed { random.next() % 3 } else { random.next() % 10 };
                let seen = Seen {
                    classes: vec![class as u32],
                    confidence: sure,
                    margin: 2.0 * sure - 1.0,
                    entropy: 1.0 - sure,
                };
                window.answered(Duration::from_secs_f64(ms / 1e3), Some(&seen));
                true
            };
            let target = if device.admitted { &mut device.windows[arm] } else { &mut before };
            let mut answered = answer(arm, target, &mut random);
            answers += usize::from(answered);
            if !answered && arm == 1 {
                // The incumbent answers.
                answered = answer(0, &mut device.windows[0], &mut random);
                answers += usize::from(answered);
            }
            if answers > 1 {
                out.broken.push(format!("request {key} was answered {answers} times"));
            }
            if device.admitted && device.ending.is_none() && random.is(if shadow { 0.5 } else { 0.1 }) {
                let agree = random.is(world.agreement());
                device.windows[1].agreement.add(agree);
                if shadow && answer(1, &mut device.windows[1], &mut random) {
                    let slower = arms[1].latency_ms > 1.5 * arms[0].latency_ms && random.is(0.9);
                    let margin = 2.0 * (arms[1].confidence - arms[0].confidence) + 0.2 * (random.unit() - 0.5);
                    device.windows[1].pairs.slower.add(slower || random.is(0.1));
                    device.windows[1].pairs.margin.add(margin);
                }
            }
            if answered && random.is(world.labelled) {
                let delay = if world.faults.late_labels { 1 + random.next() % 40 } else { 2 };
                let again = world.faults.late_labels && random.is(0.05);
                let before = !device.admitted;
                labels.push_back(Due { at: second + delay, arm, step: device.step, right, again, before });
            }
        }
        // Labels come in any order; the second for an answer counts for nothing, as the host has it.
        let mut later = VecDeque::with_capacity(labels.len());
        for due in labels.drain(..) {
            if due.at > second {
                later.push_back(due);
                continue;
            }
            if due.again {
                continue;
            }
            let counted = [due.right[due.arm]];
            match device.admitted {
                true if due.before => {}
                true => device.windows[due.arm].accuracy.add_to(due.step, &counted),
                false => before.accuracy.add_to(0, &counted),
            }
            if shadow && due.arm == 0 {
                device.windows[1].pairs.settle(due.right[0], due.right[1]);
            }
        }
        labels = later;
        if !device.admitted || second == loaded_at {
            continue;
        }
        let jump = if world.faults.clock_jumps && second % 41 == 40 { 7200.0 } else { 0.0 };
        device.serving_s += served(Duration::from_secs_f64(1.0 + jump)).as_secs_f64();
        if device.serving_s > (second - loaded_at) as f64 + 1e-6 {
            out.broken.push("more time was served than passed".to_string());
        }
        if let Some(end) = device.ending {
            if !full {
                out.end = end;
                return out;
            }
            continue;
        }
        let serving = Duration::from_secs_f64(device.serving_s);
        let mut next = device.rollout.clone();
        let actions = match crashed {
            true => next.handle(serving, Event::Crashed { reason: "panicked" }),
            false => {
                next.handle(serving, Event::Observed { incumbent: &device.windows[0], candidate: &device.windows[1] })
            }
        };
        let moves = actions.iter().any(|action| matches!(action, Action::Share(_) | Action::Promote { .. }));
        // A step or a promotion that can't be committed has not happened.
        if moves && full {
            continue;
        }
        device.rollout = next;
        if tell && !actions.is_empty() {
            println!("{second:>5} s  {actions:?}");
        }
        if moves {
            let p = device.share;
            let deviation = (of_share as f64 * p * (1.0 - p)).sqrt();
            if (to_candidate as f64 - of_share as f64 * p).abs() > 6.0 * deviation + 1.0 {
                out.broken.push(format!("a share of {p}: {to_candidate} of {of_share} requests"));
            }
        }
        if act(&mut device, actions, &mut out, true) {
            return out;
        }
        if moves {
            (of_share, to_candidate) = (0, 0);
        }
        if !full && (moves || second % 10 == 0) {
            device.saved = (device.rollout.clone(), device.windows.clone(), device.serving_s);
        }
    }
    out
}

/// Does what the strategy decided; whether that ends the run.
fn act(device: &mut Device, actions: Vec<Action>, out: &mut Run, counts: bool) -> bool {
    for action in actions {
        match action {
            Action::Share(share) => {
                if device.step > 0 && share < device.share {
                    out.broken.push(format!("the share fell from {} to {share}", device.share));
                }
                device.share = share;
                device.step += 1;
                if counts {
                    device.windows.iter_mut().for_each(Window::begin_step);
                }
            }
            Action::Promote { .. } => {
                out.end = End::Promoted;
                return true;
            }
            Action::RollBack { .. } => (device.ending, device.share) = (Some(End::RolledBack), 0.0),
            Action::Inconclusive { .. } => (device.ending, device.share) = (Some(End::Inconclusive), 0.0),
            Action::Alert { .. } => out.alerts += 1,
        }
    }
    false
}
