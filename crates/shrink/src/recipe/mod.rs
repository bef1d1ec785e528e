//! Recipes: what is done to a model, step after step, as TOML.
//!
//! ```toml
//! seed = 1
//!
//! [[step]]
//! do = "prune"
//! operations = 0.5
//!
//! [[step]]
//! do = "fine-tune"
//! epochs = 3
//!
//! [[step]]
//! do = "quantize"
//! method = "static"
//!
//! [[step]]
//! do = "verify"
//! budget = ["accuracy>=-0.5%"]
//!
//! [[step]]
//! do = "pack"
//! name = "digits"
//! version = "2"
//! output = "digits-2.cutover"
//! ```
//!
//! [`Recipe::parse`] refuses what it does not know, with the line; [`run()`] carries a recipe out and keeps what each step made in a [`Cache`].

mod cache;
mod pack;
mod run;
mod steps;

pub use cache::Cache;
pub use run::{About, Detail, Done, Measured, Outcome, run};
pub use steps::{MethodName, PackStep, PruneStep, QuantizeStep, SparsifyStep, StudentStep, VerifyStep};

use crate::{ShrinkError, train::Fit};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Steps of a recipe; more are refused.
const STEPS_MAX: usize = 32;

/// What is done to a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Recipe {
    /// Of all that is drawn at random.
    pub seed: u64,
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Step {
    Student(StudentStep),
    Prune(PruneStep),
    Sparsify(SparsifyStep),
    FineTune(Box<Fit>),
    Quantize(QuantizeStep),
    Verify(VerifyStep),
    Pack(PackStep),
}

/// The steps there are.
const NAMES: &[&str] = &["student", "prune", "sparsify", "fine-tune", "quantize", "verify", "pack"];

impl Step {
    /// As a recipe calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Student(_) => "student",
            Step::Prune(_) => "prune",
            Step::Sparsify(_) => "sparsify",
            Step::FineTune(_) => "fine-tune",
            Step::Quantize(_) => "quantize",
            Step::Verify(_) => "verify",
            Step::Pack(_) => "pack",
        }
    }
}

/// What every step's table begins with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    seed: u64,
    #[serde(default, rename = "step")]
    _steps: Vec<toml::Table>,
}

impl Recipe {
    /// Reads a recipe; `source` is what errors call it.
    ///
    /// # Errors
    /// No TOML, an unknown step or key, a value of the wrong type or out of range, all with their line and what is allowed; `pack` before the end.
    pub fn parse(text: &str, source: &str) -> Result<Recipe, ShrinkError> {
        let refuse = |message: String| ShrinkError::Option(format!("{source}: {message}"));
        let refused = |error: toml::de::Error| refuse(error.to_string());
        let file: File = toml::from_str(text).map_err(refused)?;
        let tables = tables(text);
        if tables.len() != file._steps.len() {
            return Err(refuse("every step begins with a line [[step]] of its own".to_string()));
        }
        if !(1..=STEPS_MAX).contains(&tables.len()) {
            return Err(refuse(format!("holds {} steps; expected 1 to {STEPS_MAX}, each a [[step]]", tables.len())));
        }
        let mut steps = Vec::new();
        for (table, own) in file._steps.iter().zip(tables) {
            let kind = table.get("do").and_then(toml::Value::as_str).unwrap_or_default();
            let mut step = match kind {
                "student" => Step::Student(read(text, &own).map_err(refused)?),
                "prune" => Step::Prune(read(text, &own).map_err(refused)?),
                "sparsify" => Step::Sparsify(read(text, &own).map_err(refused)?),
                "fine-tune" => Step::FineTune(read(text, &own).map_err(refused)?),
                "quantize" => Step::Quantize(read(text, &own).map_err(refused)?),
                "verify" => Step::Verify(read(text, &own).map_err(refused)?),
                "pack" => Step::Pack(read(text, &own).map_err(refused)?),
                _ => {
                    let got =
                        if kind.is_empty() { "a step without do".to_string() } else { format!("do = \"{kind}\"") };
                    let message = format!("line {}: {got}; expected do = one of {}", own.line(text), NAMES.join(", "));
                    return Err(refuse(message));
                }
            };
            if let (Step::FineTune(fit), None) = (&mut step, table.get("seed")) {
                fit.seed = file.seed;
            }
            step.check().map_err(|message| refuse(format!("line {}: {kind}: {message}", own.line(text))))?;
            steps.push(step);
        }
        let recipe = Recipe { seed: file.seed, steps };
        recipe.check().map_err(refuse)?;
        Ok(recipe)
    }

    /// What a recipe that was not read from text has to keep to.
    ///
    /// # Errors
    /// Options out of range, `pack` before the end, no steps.
    pub fn check(&self) -> Result<(), String> {
        for (number, step) in self.steps.iter().enumerate() {
            step.check().map_err(|message| format!("step {} ({}): {message}", number + 1, step.name()))?;
        }
        if !(1..=STEPS_MAX).contains(&self.steps.len()) {
            return Err(format!("{} steps; expected 1 to {STEPS_MAX}", self.steps.len()));
        }
        let last = self.steps.len().saturating_sub(1);
        match self.steps.iter().position(|step| matches!(step, Step::Pack(_))) {
            Some(at) if at < last => Err(format!("step {} is pack: expected at the end only", at + 1)),
            _ => Ok(()),
        }
    }
}

impl Step {
    fn check(&self) -> Result<(), String> {
        match self {
            Step::Student(step) => step.check(),
            Step::Prune(step) => step.options().map(|_| ()),
            Step::Sparsify(step) => step.sparsity().map(|_| ()),
            Step::FineTune(fit) => fit.check(),
            Step::Quantize(step) => step.check(),
            Step::Verify(step) => step.check(),
            Step::Pack(step) => step.check(),
        }
    }
}

/// Where a step's table lies in the text.
struct Table {
    /// From the header's line to the next step's.
    bytes: std::ops::Range<usize>,
}

impl Table {
    /// Of the header, from 1.
    fn line(&self, text: &str) -> usize {
        text[..self.bytes.start].matches('\n').count() + 1
    }
}

fn tables(text: &str) -> Vec<Table> {
    let mut starts = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let header: String = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        if header == "[[step]]" {
            starts.push(at);
        }
        at += line.len();
    }
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    starts.iter().zip(ends).map(|(&start, end)| Table { bytes: start..end }).collect()
}

/// Reads one step where it stands: all other text is blank, so that errors count its lines as the file does.
fn read<T: DeserializeOwned>(text: &str, table: &Table) -> Result<T, toml::de::Error> {
    let blank = |text: &str| text.chars().map(|c| if c == '\n' { c } else { ' ' }).collect::<String>();
    let own = &text[table.bytes.clone()];
    let mut left = blank(&text[..table.bytes.start]);
    for (number, line) in own.split_inclusive('\n').enumerate() {
        let key = line.split('=').next().unwrap_or_default().trim();
        if number == 0 || key == "do" {
            left += &blank(line);
        } else if line.trim_start().trim_start_matches('[').starts_with("step.") {
            left += &line.replacen("step.", "     ", 1);
        } else {
            left += line;
        }
    }
    toml::from_str(&left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Recipe::parse(text, "recipe.toml").err().unwrap().to_string()
    }

    #[test]
    fn a_recipe_is_read() {
        let text = "seed = 3\n[[step]]\ndo = \"prune\"\nchannels = 0.25\nscope = \"global\"\n\n[[step]] # then\ndo = \"fine-tune\"\n\
            epochs = 2\n[step.losses]\nlabels = 1.0\n[[step]]\ndo = \"quantize\"\nbudget = \"sqnr>=20\"\n[[step]]\ndo = \"verify\"\n\
            budget = [\"cosine>=0.9\"]\n";
        let recipe = Recipe::parse(text, "recipe.toml").unwrap();
        let names: Vec<&str> = recipe.steps.iter().map(Step::name).collect();
        assert_eq!(names, ["prune", "fine-tune", "quantize", "verify"]);
        let Step::FineTune(fit) = &recipe.steps[1] else { panic!("{recipe:?}") };
        assert_eq!((fit.epochs, fit.seed, fit.losses.labels), (2, 3, 1.0));
    }

    #[test]
    fn what_is_wrong_has_its_line() {
        let step = |body: &str| format!("\n[[step]]\n{body}\n");
        for (text, parts) in [
            (step("do = \"prun\""), &["line 2", "\"prun\"", "student, prune, sparsify, fine-tune"][..]),
            (step("ratio = 1"), &["line 2", "without do"]),
            (step("do = \"prune\"\nchannels = 0.5\nrate = 1"), &["line 5", "unknown field `rate`", "`channels`"]),
            (step("do = \"prune\"\nchannels = \"half\""), &["line 4", "invalid type"]),
            (step("do = \"prune\"\nchannels = 1.5"), &["line 2", "1.5", "below 1"]),
            (step("do = \"prune\"\nchannels = nan"), &["line 2", "NaN", "below 1"]),
            (step("do = \"prune\""), &["line 2", "channels, operations or latency"]),
            (step("do = \"prune\"\nchannels = 0.5\nlatency = 0.5"), &["line 2", "one of"]),
            (step("do = \"quantize\"\nmethod = \"int3\""), &["line 4", "int3", "`static`"]),
            (step("do = \"quantize\"\nmethod = \"f16\"\ngptq = true"), &["line 2", "gptq"]),
            (step("do = \"quantize\"\nmethod = \"f16\"\ntarget = \"memory\""), &["line 2", "target size"]),
            (step("do = \"quantize\"\nbudget = \"sqnr\""), &["line 4", "sqnr>=20"]),
            (step("do = \"sparsify\"\npattern = \"5:4\""), &["line 2", "5:4"]),
            (step("do = \"student\""), &["line 2", "layers"]),
            (step("do = \"student\"\nlayers = [3, 1]"), &["line 2", "[3, 1]"]),
            (step("do = \"fine-tune\"\nheld-out = 1.0"), &["line 2", "held-out = 1"]),
            (step("do = \"fine-tune\"\nrate = -1.0"), &["line 2", "above 0"]),
            (step("do = \"verify\""), &["line 2", "budget"]),
            (step("do = \"pack\"\nname = \"x\"\noutput = \"\""), &["line 2", "output"]),
            (
                step("do = \"pack\"\noutput = \"x\"") + &step("do = \"verify\"\nbudget = [\"sqnr>=1\"]"),
                &["step 1 is pack"],
            ),
            ("seed = 1\nsteps = 3".to_string(), &["line 2", "unknown field `steps`"]),
            ("seed = 1".to_string(), &["0 steps"]),
            ("step = [{ do = \"prune\" }]".to_string(), &["[[step]]"]),
            ("seed = ".to_string(), &["line 1"]),
        ] {
            let message = refused(&text);
            for part in parts {
                assert!(message.contains(part), "{text}\nno '{part}' in: {message}");
            }
        }
    }
}
