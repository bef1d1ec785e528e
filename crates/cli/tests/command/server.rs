//! `cutover serve` as a child process, and a client of it.

use crate::Folder;
use serde_json::Value as Json;
use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

/// Ended when dropped.
pub struct Server {
    child: Child,
    pub url: String,
    /// What `serve --json` printed.
    pub document: Json,
}

/// An answer's status and body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub text: String,
}

impl Server {
    /// Serves `models` from the store `store` of the folder, on a port that is free.
    #[track_caller]
    pub fn start(folder: &Folder, models: &[&str]) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cutover"));
        command.args(["serve", "--json", "--listen", "127.0.0.1:0", "--threads", "1"]);
        command.args(["--store", &folder.path("store")]).args(models).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the command");
        let mut text = String::new();
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        // The document ends at the brace that closes it, the stream only with the server.
        for line in lines.map_while(Result::ok) {
            text += &line;
            if line == "}" {
                break;
            }
        }
        let document: Json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e} in '{text}'"));
        let url = document["url"].as_str().expect("where it listens").to_string();
        Server { child, url, document }
    }

    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Answer {
        let config = ureq::Agent::config_builder().http_status_as_error(false);
        let agent: ureq::Agent = config.timeout_global(Some(Duration::from_secs(30))).build().into();
        let url = format!("{}{path}", self.url);
        let answer = match (method, body) {
            ("GET", _) => agent.get(&url).call(),
            ("DELETE", _) => agent.delete(&url).call(),
            (_, Some(body)) => agent.post(&url).send(body),
            (_, None) => agent.post(&url).send_empty(),
        };
        let mut answer = answer.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        Answer { status: answer.status().as_u16(), text: answer.body_mut().read_to_string().expect("text") }
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, None)
    }

    #[track_caller]
    pub fn post(&self, path: &str, body: &Json) -> Answer {
        self.ask("POST", path, Some(&body.to_string()))
    }

    /// Asks the server to end as a service manager does.
    pub fn terminate(mut self) -> ExitStatus {
        Command::new("kill").arg(self.child.id().to_string()).status().expect("kill");
        self.child.wait().expect("a child")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    #[track_caller]
    pub fn json(&self, status: u16) -> Json {
        assert_eq!(self.status, status, "{self:?}");
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    /// `{"error": "…"}` and nothing else, with every one of `parts` in it.
    #[track_caller]
    pub fn refuses(&self, status: u16, parts: &[&str]) {
        let body = self.json(status);
        assert_eq!(body.as_object().map(serde_json::Map::len), Some(1), "{self:?}");
        let message = body["error"].as_str().unwrap_or_else(|| panic!("{self:?}"));
        for part in parts {
            assert!(message.contains(part), "expected '{part}' in {message}");
        }
    }
}
