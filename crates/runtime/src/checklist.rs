//! The checklist of a deployment: what must be shown before a version takes traffic, and what must hold while it does, each with the
//! evidence it is ticked by.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// One line of the checklist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Item {
    /// Its files are what they say, its graph holds together, its golden answers are given on this device.
    Validation,
    /// What it takes here, in memory and time, and that it is within the limits.
    Benchmarks,
    /// Nobody changed it on its way, and it is not older than security allows.
    Security,
    /// Gates will watch it.
    Monitoring,
    /// There is a way back.
    RollbackPlan,
    /// It is watched.
    MonitoringActive,
    /// Whether anything calls for somebody.
    Alerts,
    /// Somebody wrote down what it is.
    Documentation,
    /// Somebody answers for it.
    SignOff,
    /// It does what it was made for.
    SuccessMetrics,
}

impl Item {
    pub const ALL: [Item; 10] = [
        Item::Validation,
        Item::Benchmarks,
        Item::Security,
        Item::Monitoring,
        Item::RollbackPlan,
        Item::MonitoringActive,
        Item::Alerts,
        Item::Documentation,
        Item::SignOff,
        Item::SuccessMetrics,
    ];

    /// Those that can be ticked before a version takes traffic: the ones that a policy may require.
    pub const REQUIRABLE: [Item; 7] = [
        Item::Validation,
        Item::Benchmarks,
        Item::Security,
        Item::Monitoring,
        Item::RollbackPlan,
        Item::Documentation,
        Item::SignOff,
    ];

    /// As it is written on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Item::Validation => "validation",
            Item::Benchmarks => "benchmarks",
            Item::Security => "security",
            Item::Monitoring => "monitoring",
            Item::RollbackPlan => "rollback-plan",
            Item::MonitoringActive => "monitoring-active",
            Item::Alerts => "alerts",
            Item::Documentation => "documentation",
            Item::SignOff => "sign-off",
            Item::SuccessMetrics => "success-metrics",
        }
    }

    /// Whether it is asked before the version takes traffic.
    pub fn is_before(self) -> bool {
        self <= Item::RollbackPlan
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Item {
    type Err = String;

    /// One that a policy may require.
    fn from_str(name: &str) -> Result<Item, String> {
        let names = || Item::REQUIRABLE.map(Item::name).join(", ");
        Item::REQUIRABLE
            .into_iter()
            .find(|item| item.name() == name)
            .ok_or_else(|| format!("'{name}' can't be required; what can is {}", names()))
    }
}

/// What one step of an admission showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub item: Item,
    /// `digests`, `graph`, `signature`, `golden`, `footprint`, `warm-up`, `latency`, `epoch`.
    pub step: String,
    pub passed: bool,
    pub evidence: String,
}

impl Check {
    pub(crate) fn passed(item: Item, step: &str, evidence: impl Into<String>) -> Check {
        Check { item, step: step.to_string(), passed: true, evidence: evidence.into() }
    }
}

/// One line with its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecklistLine {
    pub item: Item,
    /// `before` or `after` the version takes traffic.
    pub phase: String,
    /// A strategy does not start without it.
    pub required: bool,
    pub ticked: bool,
    pub evidence: Vec<String>,
}

/// The checklist of one version of a model: of the candidate where there is one, else of the version in service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checklist {
    pub model: String,
    pub version: String,
    /// Whether every required line is ticked.
    pub complete: bool,
    pub lines: Vec<ChecklistLine>,
}

/// What is known of a version when its checklist is made.
pub(crate) struct Known<'a> {
    pub checks: &'a [Check],
    /// How gates watch it; `None` where none do.
    pub gates: Option<String>,
    /// Where a rollback goes; `None` where nowhere.
    pub way_back: Option<String>,
    pub description: Option<&'a str>,
    pub signed_by: Option<&'a String>,
    /// What can be said only of a version that takes traffic.
    pub watched: Option<Watched>,
}

pub(crate) struct Watched {
    pub active: Result<String, String>,
    pub alerts: Result<String, String>,
    pub success: Result<String, String>,
}

impl Known<'_> {
    /// Whether a line is ticked, and by what.
    pub fn line(&self, item: Item) -> (bool, Vec<String>) {
        let of = |found: Result<String, String>| match found {
            Ok(evidence) => (true, vec![evidence]),
            Err(missing) => (false, vec![missing]),
        };
        let watched = |of_watched: fn(&Watched) -> &Result<String, String>| match &self.watched {
            Some(watched) => of(of_watched(watched).clone()),
            None => of(Err("it takes no traffic yet".to_string())),
        };
        match item {
            Item::Validation | Item::Benchmarks | Item::Security => {
                let checks: Vec<&Check> = self.checks.iter().filter(|check| check.item == item).collect();
                let evidence = checks.iter().map(|check| format!("{}: {}", check.step, check.evidence)).collect();
                (!checks.is_empty() && checks.iter().all(|check| check.passed), evidence)
            }
            Item::Monitoring => of(self.gates.clone().ok_or_else(|| "no gate watches it".to_string())),
            Item::RollbackPlan => {
                of(self.way_back.clone().ok_or_else(|| "there is no version to go back to".to_string()))
            }
            Item::Documentation => of(match self.description {
                Some(description) => Ok(description.to_string()),
                None => Err("its manifest has no description (cutover pack --description)".to_string()),
            }),
            Item::SignOff => of(match self.signed_by {
                Some(by) => Ok(format!("by {by}")),
                None => Err("nobody did (cutover checklist NAME --sign-off VERSION --by WHO)".to_string()),
            }),
            Item::MonitoringActive => watched(|watched| &watched.active),
            Item::Alerts => watched(|watched| &watched.alerts),
            Item::SuccessMetrics => watched(|watched| &watched.success),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for item in Item::REQUIRABLE {
            assert_eq!(item.name().parse::<Item>(), Ok(item));
            assert_eq!(serde_json::to_string(&item).unwrap(), format!("\"{item}\""));
        }
        assert!("alerts".parse::<Item>().unwrap_err().contains("sign-off"));
        assert_eq!(Item::ALL.into_iter().filter(|item| item.is_before()).count(), 5);
    }

    #[test]
    fn a_failed_check_is_no_tick() {
        let mut checks = vec![Check::passed(Item::Validation, "digests", "4 files")];
        let line = |checks: &[Check], item| {
            let known =
                Known { checks, gates: None, way_back: None, description: None, signed_by: None, watched: None };
            known.line(item)
        };
        assert_eq!(line(&checks, Item::Validation), (true, vec!["digests: 4 files".to_string()]));
        assert!(!line(&checks, Item::Security).0, "nothing was shown");
        checks[0].passed = false;
        assert!(Item::ALL.into_iter().all(|item| !line(&checks, item).0));
    }
}
