//! Requests that come by a clock, whether or not the ones before are answered.
//!
//! A request's latency counts from when it was due, so that a slow answer is paid for by everyone who waited behind it, and nothing is
//! measured less often for being slow (no coordinated omission).

use super::document::Arrivals;
use crate::made_up::Random;
use anyhow::Result;
use std::time::{Duration, Instant};

/// Less than this is waited for awake: a sleeping thread comes late.
const AWAKE: Duration = Duration::from_micros(200);

/// What became of the requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Served {
    /// From due to answered; of those without an answer, what they had waited.
    pub latencies_ms: Vec<f64>,
    pub answered: usize,
    pub unanswered: usize,
    /// From the first's time to the last answer.
    pub seconds: f64,
}

/// When requests are due: for `seconds`, `rate` a second, at most `most`.
pub(super) fn schedule(rate: f64, arrivals: Arrivals, seconds: f64, most: usize, random: &mut Random) -> Vec<Duration> {
    let mut due = Vec::new();
    let mut at = 0.0;
    while at < seconds && due.len() < most {
        due.push(Duration::from_secs_f64(at));
        at += match arrivals {
            Arrivals::Constant => 1.0 / rate,
            Arrivals::Poisson => -(1.0 - random.unit()).ln() / rate,
        };
    }
    due
}

/// What time it is, and waiting: a test has its own.
pub(super) trait Clock {
    fn now(&self) -> Duration;
    fn wait_until(&self, time: Duration);
}

pub(super) struct Wall(pub Instant);

impl Clock for Wall {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wait_until(&self, time: Duration) {
        if let Some(long) = time.checked_sub(self.now()).and_then(|left| left.checked_sub(AWAKE)) {
            std::thread::sleep(long);
        }
        while self.now() < time {
            std::hint::spin_loop();
        }
    }
}

/// Answers requests one after the other, in order, and gives up on all that is left when it is `end`.
pub(super) fn serve(
    due: &[Duration],
    end: Duration,
    clock: &impl Clock,
    mut answer: impl FnMut() -> Result<()>,
) -> Result<Served> {
    let mut served = Served::default();
    for (number, &time) in due.iter().enumerate() {
        clock.wait_until(time);
        let now = clock.now();
        if now >= end {
            served.unanswered = due.len() - number;
            served.latencies_ms.extend(due[number..].iter().map(|due| ms(now.saturating_sub(*due))));
            break;
        }
        answer()?;
        served.answered += 1;
        served.latencies_ms.push(ms(clock.now().saturating_sub(time)));
    }
    served.seconds = clock.now().as_secs_f64();
    Ok(served)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Fake(Cell<Duration>);

    impl Clock for Fake {
        fn now(&self) -> Duration {
            self.0.get()
        }

        fn wait_until(&self, time: Duration) {
            self.0.set(self.now().max(time));
        }
    }

    fn served(due_ms: &[u64], end_ms: u64, took_ms: &[u64]) -> Served {
        let due: Vec<Duration> = due_ms.iter().copied().map(Duration::from_millis).collect();
        let clock = Fake(Cell::new(Duration::ZERO));
        let mut took = took_ms.iter();
        let answer = || {
            clock.0.set(clock.now() + Duration::from_millis(*took.next().unwrap()));
            Ok(())
        };
        serve(&due, Duration::from_millis(end_ms), &clock, answer).unwrap()
    }

    #[test]
    fn who_waits_behind_a_slow_answer_pays_for_it() {
        let served = served(&[0, 10, 20, 30, 100], 1000, &[35, 2, 2, 2, 2]);
        assert_eq!(served.latencies_ms, [35.0, 27.0, 19.0, 11.0, 2.0]);
        assert_eq!((served.answered, served.unanswered, served.seconds), (5, 0, 0.102));
    }

    #[test]
    fn what_is_never_answered_counts_with_what_it_waited() {
        let served = served(&[0, 1, 2, 3], 25, &[20, 20]);
        assert_eq!((served.answered, served.unanswered), (2, 2));
        assert_eq!(served.latencies_ms, [20.0, 39.0, 38.0, 37.0]);
    }

    #[test]
    fn arrivals_have_their_rate() {
        let mut random = Random::new(5);
        let constant = schedule(100.0, Arrivals::Constant, 1.0, 1000, &mut random);
        assert!((100..=101).contains(&constant.len()) && constant[1] == Duration::from_millis(10), "{constant:?}");
        let poisson = schedule(1000.0, Arrivals::Poisson, 10.0, 100_000, &mut random);
        // 10,000, give or take five deviations.
        assert!((9_500..=10_500).contains(&poisson.len()) && poisson.is_sorted(), "{}", poisson.len());
        let gaps: Vec<f64> = poisson.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((0.9..1.1).contains(&(deviation / mean)), "{}", deviation / mean);
        assert_eq!(schedule(1e9, Arrivals::Constant, 1.0, 7, &mut random).len(), 7);
    }
}
