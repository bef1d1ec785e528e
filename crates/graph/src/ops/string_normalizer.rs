//! Stop words taken out of a list, and the case of the rest changed.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::{borrow::Cow, collections::HashSet};

/// `x [c]` or `[1, c]` without the strings that are stop words, the rest in `case`; one empty string where none is left. Case is Unicode's own,
/// whatever the locale.
#[derive(Clone, Debug, PartialEq)]
pub struct StringNormalizer {
    pub case: Case,
    /// Whether stop words are told from others by their case.
    pub case_sensitive: bool,
    pub stop_words: Vec<String>,
    /// Kept for other runtimes.
    pub locale: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    None,
    Lower,
    Upper,
}

impl Case {
    const NAMES: [(&'static str, Case); 3] = [("NONE", Case::None), ("LOWER", Case::Lower), ("UPPER", Case::Upper)];

    fn apply(self, text: &str) -> Cow<'_, str> {
        match self {
            Case::None => Cow::Borrowed(text),
            Case::Lower => Cow::Owned(text.to_lowercase()),
            Case::Upper => Cow::Owned(text.to_uppercase()),
        }
    }
}

impl Operator for StringNormalizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let name = node.string("case_change_action", "NONE")?;
        let case = Case::NAMES.iter().find(|(n, _)| *n == name);
        let case = case.ok_or_else(|| node.corrupt(format!("case_change_action is '{name}', not one of ONNX's")))?.1;
        Ok(StringNormalizer {
            case,
            case_sensitive: node.flag("is_case_sensitive", false)?,
            stop_words: node.optional_strings("stopwords")?.unwrap_or_default(),
            locale: node.optional_string("locale")?,
        }
        .into())
    }

    fn export(&self) -> Spelling {
        let name = Case::NAMES.iter().find(|(_, case)| *case == self.case).map_or("NONE", |(name, _)| name);
        let mut spelling = Spelling::new("StringNormalizer")
            .with("case_change_action", name)
            .with("is_case_sensitive", i64::from(self.case_sensitive));
        if !self.stop_words.is_empty() {
            spelling = spelling.with("stopwords", self.stop_words.clone());
        }
        match &self.locale {
            Some(locale) => spelling.with("locale", locale.as_str()),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.strings(0)?;
        let left = || context.fresh("words");
        let shape = match x.shape.as_deref() {
            None => None,
            Some([_]) => Some(vec![left()]),
            Some([one, _]) if one.as_const().is_none_or(|n| n == 1) => Some(vec![Dim::Const(1), left()]),
            Some(_) => return Err(OpError::input(format!("expected [c] or [1, c], got {x}"))),
        };
        Ok(vec![TensorFact { dtype: DType::String, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let rank = match x.shape().dims() {
            [_] => 1,
            [1, _] => 2,
            _ => return Err(OpError::input(format!("expected [c] or [1, c], got {}", x.shape()))),
        };
        let compared = match (self.case_sensitive, self.case) {
            (true, _) => Case::None,
            (false, Case::None) => Case::Lower,
            (false, case) => case,
        };
        let stop_words: HashSet<Cow<'_, str>> = self.stop_words.iter().map(|word| compared.apply(word)).collect();
        let words = x.strings()?.iter().filter(|word| !stop_words.contains(&compared.apply(word)));
        let mut words: Vec<String> = words.map(|word| self.case.apply(word).into_owned()).collect();
        if words.is_empty() {
            words.push(String::new());
        }
        let mut shape = vec![1; rank];
        shape[rank - 1] = words.len();
        Ok(vec![Tensor::from_strings(shape, words)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings};

    #[test]
    fn stop_words_go_and_case_changes() {
        let x = || strings(&[4], &["Monday", "monday", "Äpfel", "DAY"]);
        let node = |action: &str, sensitive: i64, words: &[&str]| -> Case {
            let words: Vec<String> = words.iter().map(|w| w.to_string()).collect();
            let node = case("StringNormalizer", 10).with("case_change_action", action).with("stopwords", words);
            node.with("is_case_sensitive", sensitive).input(x())
        };
        node("NONE", 1, &["monday"]).gives([strings(&[3], &["Monday", "Äpfel", "DAY"])]);
        node("LOWER", 1, &["monday"]).gives([strings(&[3], &["monday", "äpfel", "day"])]);
        node("UPPER", 0, &["mondaY", "äpfel"]).gives([strings(&[1], &["DAY"])]);
        node("NONE", 0, &["MONDAY"]).gives([strings(&[2], &["Äpfel", "DAY"])]);
        node("LOWER", 0, &["monday", "day", "äpfel"]).gives([strings(&[1], &[""])]);
        node("SHOUT", 0, &[]).fails("'SHOUT'");
        let plain = || case("StringNormalizer", 10).with("locale", "en_US");
        plain().input(strings(&[1, 2], &["a", "b"])).gives([strings(&[1, 2], &["a", "b"])]);
        plain().input(strings(&[1, 0], &[])).gives([strings(&[1, 1], &[""])]);
        plain().input(strings(&[0], &[])).gives([strings(&[1], &[""])]);
        plain().input(strings(&[2, 1], &["a", "b"])).fails("expected [c] or [1, c]");
        plain().input(strings(&[], &["a"])).fails("expected [c] or [1, c]");
        plain().input(f32s(&[1], &[1.0])).fails("must hold strings");
    }
}
