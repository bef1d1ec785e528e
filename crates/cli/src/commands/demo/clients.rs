//! The demo's clients: they ask without pause, know every version's right answer beforehand, and post labels a little late.

use super::digits::HeldOut;
use serde_json::{Value as Json, json};
use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How long after an answer its label is posted.
const LABEL_DELAY: Duration = Duration::from_millis(150);
/// Two versions' probabilities differ by far more; the same version's by nothing but their spelling as decimals.
const SAME_ANSWER: f32 = 1e-5;

/// What every version must answer to every image.
pub struct Expected {
    pub version: &'static str,
    /// `[images, 10]`.
    pub probabilities: Vec<f32>,
}

/// One answered request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answered {
    /// Seconds since the clients started, when the answer was complete.
    pub at_s: f32,
    pub latency_ms: f32,
    /// Index in the list of expectations.
    pub version: u8,
    pub right: bool,
}

/// What the clients saw. Shared by all of them; each holds its own records until it ends.
pub struct Clients<'a> {
    pub url: String,
    pub held_out: &'a HeldOut,
    pub expected: &'a [Expected],
    pub start: Instant,
    stop: AtomicBool,
    /// Requests answered so far, for the progress line.
    pub answered: AtomicU64,
    pub failed: AtomicU64,
    pub wrong_version: AtomicU64,
    pub labels: AtomicU64,
    /// The first few things that went wrong, word for word.
    pub complaints: Mutex<Vec<String>>,
    due: Mutex<VecDeque<(Instant, String, usize)>>,
}

impl<'a> Clients<'a> {
    pub fn new(url: String, held_out: &'a HeldOut, expected: &'a [Expected]) -> Clients<'a> {
        Clients {
            url,
            held_out,
            expected,
            start: Instant::now(),
            stop: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            wrong_version: AtomicU64::new(0),
            labels: AtomicU64::new(0),
            complaints: Mutex::new(Vec::new()),
            due: Mutex::new(VecDeque::new()),
        }
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// One client: image after image, until it is stopped. `records` is what it fills, and no longer than it was made.
    pub fn ask(&self, client: usize, records: &mut Vec<Answered>) {
        let agent = agent();
        let infer = format!("{}/v2/models/digits/infer", self.url);
        let images = self.held_out.labels.len();
        let mut image = client * images / 7 % images;
        for number in 0u64.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // Steps through every image in an order of its own: 599 is prime.
            image = (image + 17 + 2 * client) % images;
            let id = format!("{client}-{number}");
            let body = json!({
                "id": id,
                "inputs": [{ "name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": self.held_out.image(image) }],
            });
            let asked = Instant::now();
            let answer = post(&agent, &infer, &body);
            let latency = asked.elapsed();
            match answer.and_then(|answer| self.judge(image, &answer)) {
                Ok((version, right)) => {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                    if records.len() < records.capacity() {
                        let at_s = self.start.elapsed().as_secs_f32();
                        let latency_ms = latency.as_secs_f32() * 1e3;
                        records.push(Answered { at_s, latency_ms, version: version as u8, right });
                    }
                    let due = Instant::now() + LABEL_DELAY;
                    self.due.lock().expect("no thread panics with it").push_back((due, id, image));
                }
                Err(message) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.complain(format!("request {id}: {message}"));
                }
            }
        }
    }

    /// Which version answered, by what it said, and whether the digit is right. An answer that is not what the version it
    /// names must say counts as the wrong version's.
    fn judge(&self, image: usize, answer: &Json) -> Result<(usize, bool), String> {
        let claimed = answer["model_version"].as_str().unwrap_or_default();
        let data = answer["outputs"][0]["data"].as_array().ok_or_else(|| format!("no output in {answer}"))?;
        let said: Vec<f32> = data.iter().map(|v| v.as_f64().unwrap_or(f64::NAN) as f32).collect();
        let same = |expected: &Expected| {
            let must = &expected.probabilities[image * 10..][..10];
            said.len() == 10 && must.iter().zip(&said).all(|(a, b)| (a - b).abs() <= SAME_ANSWER)
        };
        let version = self.expected.iter().position(|e| e.version == claimed);
        let Some(version) = version else { return Err(format!("the server names version '{claimed}'")) };
        if !same(&self.expected[version]) {
            self.wrong_version.fetch_add(1, Ordering::Relaxed);
            let really = self.expected.iter().find(|e| same(e)).map_or("of no version", |e| e.version);
            self.complain(format!("image {image}: the answer says {claimed}, its numbers are {really}"));
        }
        let best = (0..said.len()).max_by(|&a, &b| said[a].total_cmp(&said[b]));
        Ok((version, best == Some(self.held_out.labels[image] as usize)))
    }

    /// Posts the labels that are due, until the clients stop.
    pub fn post_labels(&self) {
        let agent = agent();
        let feedback = format!("{}/cutover/v1/models/digits/feedback", self.url);
        while !self.stop.load(Ordering::Relaxed) {
            let mut labels = Vec::new();
            {
                let mut due = self.due.lock().expect("no thread panics with it");
                while due.front().is_some_and(|(at, ..)| *at <= Instant::now()) && labels.len() < 500 {
                    let (_, id, image) = due.pop_front().expect("looked at above");
                    labels.push(json!({ "id": id, "label": self.held_out.labels[image] }));
                }
            }
            if labels.is_empty() {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            match post(&agent, &feedback, &json!({ "labels": labels })) {
                Ok(_) => drop(self.labels.fetch_add(labels.len() as u64, Ordering::Relaxed)),
                Err(message) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.complain(format!("feedback: {message}"));
                }
            }
        }
    }

    fn complain(&self, message: String) {
        let mut complaints = self.complaints.lock().expect("no thread panics with it");
        if complaints.len() < 5 {
            complaints.push(message);
        }
    }
}

pub fn agent() -> ureq::Agent {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(10)));
    config.build().into()
}

/// The answer's JSON; any status but 200 is an error that quotes it.
pub fn post(agent: &ureq::Agent, url: &str, body: &Json) -> Result<Json, String> {
    read(agent.post(url).send_json(body))
}

pub fn get(agent: &ureq::Agent, url: &str) -> Result<Json, String> {
    read(agent.get(url).call())
}

fn read(answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Json, String> {
    let mut answer = answer.map_err(|e| e.to_string())?;
    let status = answer.status();
    let text = answer.body_mut().read_to_string().map_err(|e| e.to_string())?;
    if status != 200 {
        return Err(format!("{status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|e| format!("{e} in {text}"))
}
