//! Whether strings match a regular expression.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use regex_lite::Regex;

/// Whether the whole of each string of `x` matches `pattern`, which is in RE2's syntax; booleans of the shape of `x`. Time is linear in a string's
/// length. Classes of characters are of ASCII, as in RE2; Unicode classes (`\p{Greek}`) are refused.
#[derive(Clone, Debug)]
pub struct RegexFullMatch {
    pattern: String,
    regex: Regex,
}

impl RegexFullMatch {
    /// # Errors
    /// What is wrong with the pattern.
    pub fn new(pattern: impl Into<String>) -> Result<RegexFullMatch, String> {
        let pattern = pattern.into();
        let regex = Regex::new(&format!(r"\A(?:{})\z", translated(&pattern))).map_err(|error| error.to_string())?;
        Ok(RegexFullMatch { pattern, regex })
    }
}

impl PartialEq for RegexFullMatch {
    fn eq(&self, other: &RegexFullMatch) -> bool {
        self.pattern == other.pattern
    }
}

/// An RE2 pattern as `regex_lite` spells it: quoted text (`\Q…\E`) escaped, braces that count nothing and brackets within a class literal.
pub(super) fn translated(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 8);
    let mut rest = pattern;
    // Characters seen of the class that is open.
    let mut class: Option<usize> = None;
    while let Some(next) = rest.chars().next() {
        let mut taken = next.len_utf8();
        let in_class = class.is_some();
        match next {
            '\\' if rest.starts_with(r"\Q") && !in_class => {
                let quoted = &rest[2..];
                let end = quoted.find(r"\E");
                out.push_str(&regex_lite::escape(&quoted[..end.unwrap_or(quoted.len())]));
                taken = end.map_or(rest.len(), |end| 2 + end + 2);
            }
            '\\' => {
                taken += rest[1..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&rest[..taken]);
            }
            '{' if !in_class && !counts(rest) => out.push_str(r"\{"),
            '}' if !in_class && !out.ends_with(|c: char| c.is_ascii_digit() || c == ',') => out.push_str(r"\}"),
            '[' if !in_class => {
                taken = if rest.starts_with("[^") { 2 } else { 1 };
                out.push_str(&rest[..taken]);
                class = Some(0);
                rest = &rest[taken..];
                continue;
            }
            '[' if rest.starts_with("[:") && rest.contains(":]") => {
                taken = rest.find(":]").map_or(1, |end| end + 2);
                out.push_str(&rest[..taken]);
            }
            // The first character of a class is itself, whichever it is.
            ']' if class == Some(0) => out.push_str(r"\]"),
            ']' if in_class => {
                out.push(']');
                class = None;
            }
            '[' => out.push_str(r"\["),
            '&' | '~' if in_class => {
                out.push('\\');
                out.push(next);
            }
            _ => out.push(next),
        }
        class = class.map(|seen| seen + 1);
        rest = &rest[taken..];
    }
    out
}

/// Whether `text` begins with a repetition: `{2}`, `{2,}` or `{2,3}`.
fn counts(text: &str) -> bool {
    let Some((inside, _)) = text[1..].split_once('}') else { return false };
    let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    match inside.split_once(',') {
        Some((least, most)) => is_number(least) && (most.is_empty() || is_number(most)),
        None => is_number(inside),
    }
}

impl Operator for RegexFullMatch {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let pattern = node.string("pattern", "")?;
        let op = RegexFullMatch::new(pattern.as_str());
        Ok(op.map_err(|error| node.unsupported(format!("the regular expression '{pattern}': {error}")))?.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("RegexFullMatch").with("pattern", self.pattern.as_str())
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let shape = inputs.strings(0)?.shape.clone();
        Ok(vec![TensorFact { dtype: DType::Bool, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let matches: Vec<bool> = x.strings()?.iter().map(|text| self.regex.is_match(text)).collect();
        Ok(vec![Tensor::from_bools(x.shape().clone(), &matches)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, strings};
    use cutover_tensor::Tensor;

    fn check(pattern: &str, texts: &[&str], expected: &[bool]) {
        let expected = Tensor::from_bools([texts.len()], expected).unwrap();
        let x = strings(&[texts.len()], texts);
        case("RegexFullMatch", 20).with("pattern", pattern).input(x).gives([expected]);
    }

    #[test]
    fn whole_strings_match() {
        check(r"www\.[\w.-]+\.\bcom\b", &["www.google.com", "www.bbc.co.uk", "www.a.com "], &[true, false, false]);
        let mail = r"(\W|^)[\w.\-]{0,25}@(yahoo|gmail)\.com(\W|$)";
        check(mail, &["account@gmail.com", "account@hotmail.com", "not email"], &[true, false, false]);
        // Whichever alternative comes first, all of the string must match.
        check("a|ab", &["a", "ab", "abb"], &[true, true, false]);
        check("", &["", "a"], &[true, false]);
        check("a.c", &["abc", "a\nc", "aüc"], &[true, false, true]);
        check("(?s)a.c", &["a\nc"], &[true]);
        check("^a$", &["a", "a\n"], &[true, false]);
        check(r"\w+", &["abc", "für"], &[true, false]);
        check("(?i)abc", &["aBC"], &[true]);
    }

    #[test]
    fn what_re2_reads_otherwise_is_translated() {
        check(r"\Qa.b\E+", &["a.b", "a.bb", "axb"], &[true, true, false]);
        check(r"\Qa[", &["a["], &[true]);
        check("a{,2}", &["a{,2}", "aa"], &[true, false]);
        check("{x}", &["{x}"], &[true]);
        check("a{2}b{1,}", &["aabb", "ab"], &[true, false]);
        check("[]a]+", &["]a", "b"], &[true, false]);
        check("[^]a]", &["b", "]"], &[true, false]);
        check("[[&&a]+", &["[&a", "b"], &[true, false]);
        check("[[:digit:]x]+", &["1x2", "y"], &[true, false]);
        check(r"[\]}{]+", &["]}{"], &[true]);
    }

    #[test]
    fn what_cannot_be_matched_is_refused() {
        let pattern = |pattern: &str| case("RegexFullMatch", 20).with("pattern", pattern).input(strings(&[1], &["a"]));
        pattern("(a").fails("regular expression '(a'");
        pattern(r"(a)\1").fails("regular expression");
        pattern("(?=a)").fails("regular expression");
        pattern("((a{1000}){1000}){1000}").fails("regular expression");
        pattern(&format!("{}a{}", "(".repeat(10_000), ")".repeat(10_000))).fails("regular expression");
        case("RegexFullMatch", 20).with("pattern", "a").input(f32s(&[1], &[1.0])).fails("must hold strings");
    }
}
