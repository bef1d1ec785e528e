//! Strings cut at a delimiter.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `x` of any shape to the pieces of each string, `[.., n]` with `n` the most pieces of any (the rest are empty strings), and their number, i64 of
/// the shape of `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct StringSplit {
    /// Empty for runs of whitespace, which then makes no empty pieces.
    pub delimiter: String,
    /// Cuts made at most; the last piece is what is left.
    pub most: Option<usize>,
}

impl StringSplit {
    fn pieces<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let limit = self.most.map_or(usize::MAX, |most| most.saturating_add(1));
        if !self.delimiter.is_empty() {
            return text.splitn(limit, &self.delimiter).collect();
        }
        let mut pieces = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let end = if pieces.len() + 1 == limit { None } else { rest.find(char::is_whitespace) };
            let (piece, left) = rest.split_at(end.unwrap_or(rest.len()));
            pieces.push(piece);
            rest = left.trim_start();
        }
        pieces
    }
}

impl Operator for StringSplit {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        // A negative number of cuts bounds nothing, as an omitted one.
        let most = node.optional_int("maxsplit")?.and_then(|most| usize::try_from(most).ok());
        Ok(StringSplit { delimiter: node.string("delimiter", "")?, most }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("StringSplit").with("delimiter", self.delimiter.as_str());
        match self.most.and_then(|most| i64::try_from(most).ok()) {
            Some(most) => spelling.with("maxsplit", most),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let shape = &inputs.strings(0)?.shape;
        let mut pieces = shape.clone();
        if let Some(pieces) = &mut pieces {
            pieces.push(context.fresh("pieces"));
        }
        Ok(vec![
            TensorFact { dtype: DType::String, shape: pieces, value: None }.into(),
            TensorFact { dtype: DType::I64, shape: shape.clone(), value: None }.into(),
        ])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let split: Vec<Vec<&str>> = x.strings()?.iter().map(|text| self.pieces(text)).collect();
        let most = split.iter().map(Vec::len).max().unwrap_or(0);
        let mut shape = x.shape().to_vec();
        shape.push(most);
        context.bounded_len(&shape)?;
        let padded =
            split.iter().flat_map(|pieces| (0..most).map(|i| pieces.get(i).copied().unwrap_or("").to_string()));
        let counts = split.iter().map(|pieces| pieces.len() as i64).collect();
        Ok(vec![
            Tensor::from_strings(shape, padded.collect())?.into(),
            Tensor::from_vec(x.shape().clone(), counts)?.into(),
        ])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, strings, tensor};
    use cutover_tensor::Tensor;

    fn check(delimiter: Option<&str>, most: Option<i64>, x: Tensor, pieces: Tensor, counts: &[i64]) {
        let mut node = case("StringSplit", 20).input(x.clone());
        if let Some(delimiter) = delimiter {
            node = node.with("delimiter", delimiter);
        }
        if let Some(most) = most {
            node = node.with("maxsplit", most);
        }
        node.gives([pieces, tensor(x.shape(), counts)]);
    }

    #[test]
    fn strings_are_cut() {
        let x = || strings(&[2], &["o-n--x-", "ab"]);
        check(Some("-"), None, x(), strings(&[2, 5], &["o", "n", "", "x", "", "ab", "", "", "", ""]), &[5, 1]);
        check(Some("-"), Some(1), x(), strings(&[2, 2], &["o", "n--x-", "ab", ""]), &[2, 1]);
        check(Some("-"), Some(0), x(), strings(&[2, 1], &["o-n--x-", "ab"]), &[1, 1]);
        check(Some("--"), Some(-1), x(), strings(&[2, 2], &["o-n", "x-", "ab", ""]), &[2, 1]);
        let words = || strings(&[3], &["  a  bc\td ", "", "x"]);
        check(None, None, words(), strings(&[3, 3], &["a", "bc", "d", "", "", "", "x", "", ""]), &[3, 0, 1]);
        check(Some(""), Some(1), words(), strings(&[3, 2], &["a", "bc\td", "", "", "x", ""]), &[2, 0, 1]);
        check(None, Some(0), words(), strings(&[3, 1], &["a  bc\td", "", "x"]), &[1, 0, 1]);
        check(None, None, strings(&[], &["a b"]), strings(&[2], &["a", "b"]), &[2]);
        check(Some(","), None, strings(&[2, 0], &[]), strings(&[2, 0, 0], &[]), &[]);
        check(Some("日"), None, strings(&[1], &["a日b"]), strings(&[1, 2], &["a", "b"]), &[2]);
    }
}
