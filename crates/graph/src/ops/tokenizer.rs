//! Strings cut into tokens.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, regex_full_match::translated,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use regex_lite::Regex;

/// Around the tokens of a string that is marked.
const MARKS: [&str; 2] = ["\u{2}", "\u{3}"];

/// The tokens of each string of `x` (`[c]` or `[n, c]`), one more axis of as many as the longest has; after a shorter one's stands `pad`. That
/// of ONNX Runtime's own domain.
///
/// Patterns are RE2's, with the longest of matches taken, and any character but none for `.`. Patterns in which the first match that is found
/// may not be the longest (alternatives, groups, reluctant repetitions) are refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenizer {
    pub cut: Cut,
    /// Control characters stand before and after the tokens of each string.
    pub mark: bool,
    pub pad: String,
    /// Shorter tokens, in characters, are left out.
    pub least: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Cut {
    /// A token is what matches.
    Tokens(Pattern),
    /// A token is what is between matches of any, cut by one after the other.
    Separators(Vec<Pattern>),
    /// A token is a character.
    Characters,
}

#[derive(Clone, Debug)]
pub struct Pattern {
    source: String,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.source == other.source
    }
}

impl Pattern {
    fn read(node: &NodeReader, source: String) -> Result<Pattern, ImportError> {
        if !is_longest(&source) {
            return Err(
                node.unsupported(format!("the pattern '{source}', of which several matches may begin together"))
            );
        }
        match Regex::new(&format!("(?s){}", translated(&source))) {
            Ok(regex) => Ok(Pattern { source, regex }),
            Err(error) => Err(node.unsupported(format!("the regular expression '{source}': {error}"))),
        }
    }
}

/// Whether greedy matching is sure to find the longest match: there are no alternatives, groups and reluctant repetitions.
fn is_longest(pattern: &str) -> bool {
    let mut characters = pattern.chars().peekable();
    let (mut in_class, mut before) = (false, ' ');
    while let Some(c) = characters.next() {
        match c {
            '\\' => {
                characters.next();
            }
            '[' => in_class = true,
            ']' => in_class = false,
            '|' | '(' if !in_class => return false,
            '?' if !in_class && matches!(before, '*' | '+' | '?' | '}') => return false,
            _ => {}
        }
        before = c;
    }
    true
}

impl Tokenizer {
    fn tokens<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let long_enough = |token: &&str| !token.is_empty() && token.chars().count() >= self.least;
        match &self.cut {
            Cut::Characters => text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]).collect(),
            Cut::Tokens(pattern) => pattern.regex.find_iter(text).map(|m| m.as_str()).filter(long_enough).collect(),
            Cut::Separators(separators) => separators.iter().fold(vec![text], |texts, separator| {
                texts.iter().flat_map(|text| separator.regex.split(text)).filter(long_enough).collect()
            }),
        }
    }
}

impl Operator for Tokenizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let mark = node.flag("mark", false)?;
        let pad = node.string("pad_value", "")?;
        let least = node.int("mincharnum", 1)?;
        let Ok(least) = usize::try_from(least) else { return Err(node.corrupt(format!("mincharnum {least}"))) };
        let separators = node.optional_strings("separators")?.unwrap_or_default();
        let expression = node.optional_string("tokenexp")?;
        let cut = match (&separators[..], expression) {
            ([], Some(expression)) if !expression.is_empty() => Cut::Tokens(Pattern::read(node, expression)?),
            ([one], None) if one.is_empty() => Cut::Characters,
            ([_, ..], None) => {
                let separators = separators.into_iter().map(|separator| Pattern::read(node, separator));
                let separators = separators.collect::<Result<Vec<_>, _>>()?;
                if let Some(empty) = separators.iter().find(|separator| separator.regex.is_match("")) {
                    return Err(node.unsupported(format!("separators of no length, as '{}'", empty.source)));
                }
                Cut::Separators(separators)
            }
            _ => return Err(node.corrupt("must have one of 'separators' and 'tokenexp'")),
        };
        if cut == Cut::Characters && least > 1 {
            return Err(node.corrupt(format!("mincharnum {least} for tokens of a character")));
        }
        Ok(Tokenizer { cut, mark, pad, least }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("Tokenizer")
            .in_domain("com.microsoft")
            .with("mark", i64::from(self.mark))
            .with("pad_value", self.pad.as_str())
            .with("mincharnum", self.least as i64);
        match &self.cut {
            Cut::Characters => spelling.with("separators", vec![String::new()]),
            Cut::Tokens(pattern) => spelling.with("tokenexp", pattern.source.as_str()),
            Cut::Separators(separators) => {
                spelling.with("separators", separators.iter().map(|s| s.source.clone()).collect::<Vec<_>>())
            }
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.strings(0)?;
        if x.rank().is_some_and(|rank| !matches!(rank, 1 | 2)) {
            return Err(OpError::input(format!("expected strings of one or two axes, got {x}")));
        }
        let shape = x.shape.as_ref().map(|shape| [&shape[..], &[context.fresh("tokens")]].concat());
        Ok(vec![TensorFact { dtype: DType::String, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        if !matches!(x.shape().rank(), 1 | 2) {
            return Err(OpError::input(format!("expected strings of one or two axes, got {}", x.shape())));
        }
        let rows: Vec<Vec<&str>> = x.strings()?.iter().map(|text| self.tokens(text)).collect();
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = if longest > 0 && self.mark { longest + 2 } else { longest };
        let shape = [x.shape().dims(), &[width]].concat();
        let mut tokens: Vec<String> = Vec::with_capacity(context.bounded_len(&shape)?);
        for row in rows.into_iter().filter(|_| width > 0) {
            let [before, after] = if self.mark { [&MARKS[..1], &MARKS[1..]] } else { [&[][..]; 2] };
            let all = before.iter().chain(&row).chain(after).copied();
            let all = all.chain(std::iter::repeat(self.pad.as_str())).take(width);
            tokens.extend(all.map(str::to_string));
        }
        Ok(vec![Tensor::from_strings(shape, tokens)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings};

    fn tokenizer() -> Case {
        case("com.microsoft.Tokenizer", 1).with("mark", 0).with("pad_value", "#").with("mincharnum", 1)
    }

    fn separated(separators: &[&str]) -> Case {
        tokenizer().with("separators", separators.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn tokens_are_what_matches() {
        let words = || tokenizer().with("tokenexp", "[a-z]+");
        let x = || strings(&[2], &["a bc", "def"]);
        words().input(x()).gives([strings(&[2, 2], &["a", "bc", "def", "#"])]);
        let marked = strings(&[2, 4], &["\u{2}", "a", "bc", "\u{3}", "\u{2}", "def", "\u{3}", "#"]);
        words().with("mark", 1).input(x()).gives([marked]);
        let long = words().with("mincharnum", 2).input(strings(&[1, 2], &["a bc", "def"]));
        long.gives([strings(&[1, 2, 1], &["bc", "def"])]);
        let some = tokenizer().with("tokenexp", "b*").input(strings(&[2], &["a bc", "x"]));
        some.gives([strings(&[2, 1], &["b", "#"])]);
        let any = tokenizer().with("tokenexp", ".").input(strings(&[2], &["a\nb", "\u{e9}x"]));
        any.gives([strings(&[2, 3], &["a", "\n", "b", "\u{e9}", "x", "#"])]);
        let none = words().with("mark", 1).input(strings(&[2], &["", "1"]));
        none.gives([strings(&[2, 0], &[])]);
    }

    #[test]
    fn tokens_are_what_is_between_separators() {
        let x = || strings(&[2], &["a,bc d", "x, ,y"]);
        separated(&[",", " "]).input(x()).gives([strings(&[2, 3], &["a", "bc", "d", "x", "y", "#"])]);
        let long = separated(&[",", " "]).with("mincharnum", 2).with("mark", 1).input(x());
        long.gives([strings(&[2, 3], &["\u{2}", "bc", "\u{3}", "\u{2}", "\u{3}", "#"])]);
        let digits = separated(&["[0-9]+"]).input(strings(&[2], &["a12b", "1"]));
        digits.gives([strings(&[2, 2], &["a", "b", "#", "#"])]);
        separated(&["ab", "c"]).input(strings(&[1], &["abcabd"])).gives([strings(&[1, 1], &["d"])]);
        let characters = separated(&[""]).input(strings(&[2], &["ab", "\u{e9}"]));
        characters.gives([strings(&[2, 2], &["a", "b", "\u{e9}", "#"])]);
    }

    #[test]
    fn what_may_mean_something_else_is_refused() {
        tokenizer().input(strings(&[1], &["a"])).fails("must have one of");
        tokenizer().with("tokenexp", "a|ab").input(strings(&[1], &["a"])).fails("several matches");
        tokenizer().with("tokenexp", ".+?").input(strings(&[1], &["a"])).fails("several matches");
        tokenizer().with("tokenexp", "a{2").input(strings(&[1, 1, 1], &["a"])).fails("one or two axes");
        separated(&["[0-9]*"]).input(strings(&[1], &["a"])).fails("separators of no length");
        separated(&[""]).with("mincharnum", 2).input(strings(&[1], &["a"])).fails("mincharnum 2");
        separated(&[","]).input(f32s(&[1], &[0.0])).fails("must hold strings");
    }
}
