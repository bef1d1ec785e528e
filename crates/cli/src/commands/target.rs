//! Whom commands about versions talk to: a server, the process that holds a store, or the store itself.

use super::serve::open_host;
use anyhow::{Context, Result, bail};
use cutover::{
    Device, DeviceOptions, Host,
    runtime::{Call, Client},
};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use std::{fs, path::PathBuf, time::Duration};

#[derive(clap::Args)]
pub(crate) struct Target {
    /// The store's folder. Where another process of this user holds it, that one is asked. Deploying makes it if it is not there.
    #[arg(long, default_value = "models")]
    pub store: PathBuf,
    /// A server, e.g. http://127.0.0.1:8080.
    #[arg(long, conflicts_with = "store")]
    server: Option<String>,
}

pub(crate) enum Connection {
    Server(String),
    Holder(Client),
    Store(Box<Host>),
}

impl Target {
    /// Whoever holds the store, if anybody does: a server that was named, or a process that listens in the store.
    pub fn holder(&self) -> Option<Connection> {
        match &self.server {
            Some(url) => Some(Connection::Server(url.trim_end_matches('/').to_string())),
            None => Client::connect(&self.store).map(Connection::Holder),
        }
    }

    /// Fails where there is no store.
    pub fn must_exist(&self) -> Result<()> {
        if !Host::has_store(&self.store) {
            bail!("there is no store at {}; give --store, or --server", self.store.display());
        }
        Ok(())
    }

    /// Whom to ask; `create` makes a store where none is, in a folder that is empty or not there.
    pub fn connect(&self, create: bool) -> Result<Connection> {
        if let Some(holder) = self.holder() {
            return Ok(holder);
        }
        // A folder of something else must not be littered with a store.
        let is_free = || fs::read_dir(&self.store).map_or(!self.store.exists(), |mut entries| entries.next().is_none());
        if !(create && is_free()) {
            self.must_exist()?;
        }
        Ok(Connection::Store(Box::new(open_host(&self.store, Device::Auto, &DeviceOptions::default(), 0)?)))
    }
}

impl Connection {
    /// Asks, and waits for the answer.
    pub fn call<T: DeserializeOwned>(&mut self, call: &Call) -> Result<T> {
        match self {
            Connection::Server(url) => post(url, call),
            Connection::Holder(client) => Ok(client.call(call)?),
            Connection::Store(host) => {
                let answer = host.call(call.clone()).map_err(anyhow::Error::msg)?;
                Ok(serde_json::from_value(answer)?)
            }
        }
    }
}

/// The answer's body; any status but 200 is an error with the server's message.
fn post<T: DeserializeOwned>(url: &str, call: &Call) -> Result<T> {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(600)));
    let agent: ureq::Agent = config.build().into();
    let url = format!("{url}/cutover/v1/call");
    let mut answer = agent.post(&url).send_json(call).with_context(|| format!("no answer from {url}"))?;
    let (status, text) = (answer.status(), answer.body_mut().read_to_string()?);
    if status != 200 {
        let message = serde_json::from_str::<Json>(&text).ok().and_then(|j| j["error"].as_str().map(str::to_string));
        bail!("{}", message.unwrap_or(format!("{url}: {status}")));
    }
    serde_json::from_str(&text).with_context(|| format!("{url} gave no answer of this version's"))
}
