//! What a backend is expected to fail, and why: `tests/onnx/expected.toml`.

use super::Outcome;
use std::collections::BTreeMap;

/// Reasons by case, or by family where the name ends with a star.
#[derive(Clone, Debug, Default)]
pub struct Expected(BTreeMap<String, String>);

impl Expected {
    /// Of `backend`, from the text of `expected.toml`.
    ///
    /// # Errors
    /// A text that is no table of tables of reasons.
    pub fn parse(text: &str, backend: &str) -> Result<Expected, String> {
        let mut all: BTreeMap<String, BTreeMap<String, String>> = toml::from_str(text).map_err(|e| e.to_string())?;
        Ok(Expected(all.remove(backend).unwrap_or_default()))
    }

    fn entry(&self, case: &str) -> Option<&str> {
        let matches = |name: &str| match name.strip_suffix('*') {
            Some(family) => case.starts_with(family),
            None => case == name,
        };
        self.0.keys().map(String::as_str).find(|name| matches(name))
    }

    /// What contradicts this: failures without a reason, and reasons for what passes.
    pub fn contradictions(&self, outcomes: &[Outcome]) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for Outcome { name, failure, .. } in outcomes {
            match (failure, self.entry(name)) {
                (Some(failure), None) => found.push(format!("{name} fails: {failure}")),
                (None, Some(entry)) if entry == name => found.push(format!("{name} passes, and is expected to fail")),
                _ => {}
            }
        }
        for family in self.0.keys().filter(|name| name.ends_with('*')) {
            let of_family = |o: &&Outcome| self.entry(&o.name) == Some(family);
            if !outcomes.iter().filter(of_family).any(|o| o.failure.is_some()) {
                found.push(format!("all of {family} passes, and is expected to fail"));
            }
        }
        found
    }

    /// The same for what failed now: reasons that are there stay, others are what the case said.
    pub fn updated(&self, outcomes: &[Outcome]) -> BTreeMap<String, String> {
        let failed = outcomes.iter().filter_map(|o| Some((&o.name, o.failure.as_ref()?)));
        let reason = |(name, failure): (&String, &String)| match self.entry(name) {
            Some(entry) => (entry.to_string(), self.0[entry].clone()),
            None => (name.clone(), failure.chars().take(160).collect()),
        };
        failed.map(reason).collect()
    }
}
