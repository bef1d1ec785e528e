//! Counts of known n-grams.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};
use std::collections::HashMap;

/// Tokens `[c]` or `[n, c]` to f32 `[width]` or `[n, width]`: how often each n-gram of the pool is in a row, weighted. An n-gram's tokens lie a
/// distance of 1 to `skips + 1` apart.
#[derive(Clone, Debug, PartialEq)]
pub struct TfIdfVectorizer {
    pub weighting: Weighting,
    /// Tokens that an n-gram has at least and at most.
    pub least_length: usize,
    pub most_length: usize,
    /// Tokens left out at most between two of an n-gram.
    pub skips: usize,
    /// All n-grams one after the other, short ones first.
    pub pool: Pool,
    /// Where in the pool those of 1, 2, … tokens begin.
    pub starts: Vec<usize>,
    /// The column of each n-gram.
    pub columns: Vec<usize>,
    /// Of each column; all 1 where empty.
    pub weights: Vec<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weighting {
    /// The count.
    Tf,
    /// The weight where the count is not 0.
    Idf,
    /// The count times the weight.
    TfIdf,
}

impl Weighting {
    const NAMES: [(&'static str, Weighting); 3] =
        [("TF", Weighting::Tf), ("IDF", Weighting::Idf), ("TFIDF", Weighting::TfIdf)];
}

#[derive(Clone, Debug, PartialEq)]
pub enum Pool {
    Ints(Vec<i64>),
    Strings(Vec<String>),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Token<'a> {
    Int(i64),
    Text(&'a str),
}

/// The n-grams as a tree: from a node by a token to a node, and the columns of the nodes at which n-grams end.
#[derive(Default)]
struct Tree<'a> {
    next: HashMap<(usize, Token<'a>), usize>,
    columns: HashMap<usize, usize>,
    nodes: usize,
}

impl<'a> Tree<'a> {
    fn insert(&mut self, tokens: impl Iterator<Item = Token<'a>>, column: usize) {
        let mut at = 0;
        for token in tokens {
            at = *self.next.entry((at, token)).or_insert_with(|| {
                self.nodes += 1;
                self.nodes
            });
        }
        self.columns.insert(at, column);
    }
}

impl TfIdfVectorizer {
    fn width(&self) -> usize {
        self.columns.iter().max().map_or(0, |last| last.saturating_add(1))
    }

    fn tree(&self) -> Tree<'_> {
        let mut tree = Tree::default();
        let pool: Vec<Token<'_>> = match &self.pool {
            Pool::Ints(pool) => pool.iter().map(|&v| Token::Int(v)).collect(),
            Pool::Strings(pool) => pool.iter().map(|v| Token::Text(v)).collect(),
        };
        let mut columns = self.columns.iter();
        for (index, &start) in self.starts.iter().enumerate() {
            let (length, end) = (index + 1, self.starts.get(index + 1).copied().unwrap_or(pool.len()));
            for (tokens, &column) in pool[start..end].chunks_exact(length).zip(&mut columns) {
                if (self.least_length..=self.most_length).contains(&length) {
                    tree.insert(tokens.iter().copied(), column);
                }
            }
        }
        tree
    }

    fn count(&self, tree: &Tree<'_>, tokens: &[Token<'_>], counts: &mut [f32]) {
        let mut least = self.least_length;
        for distance in 1..=self.skips.saturating_add(1) {
            // The first n-gram of the least length, and so any, must end within the row.
            let reach = distance.saturating_mul(least - 1);
            if reach >= tokens.len() {
                break;
            }
            for start in 0..tokens.len() - reach {
                let mut at = 0;
                for (index, token) in tokens[start..].iter().step_by(distance).take(self.most_length).enumerate() {
                    let Some(&next) = tree.next.get(&(at, *token)) else { break };
                    at = next;
                    if index + 1 >= least
                        && let Some(&column) = tree.columns.get(&at)
                    {
                        counts[column] += 1.0;
                    }
                }
            }
            // Single tokens have no distance: they count once.
            if least == 1 {
                least = 2;
                if least > self.most_length {
                    break;
                }
            }
        }
    }
}

impl Operator for TfIdfVectorizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let name = node.string("mode", "")?;
        let weighting = Weighting::NAMES.iter().find(|(n, _)| *n == name);
        let weighting = weighting.ok_or_else(|| node.corrupt(format!("mode is '{name}', not one of ONNX's")))?.1;
        let number = |node: &mut NodeReader, name: &str, least: i64| {
            let value = node.optional_int(name)?.filter(|&v| v >= least);
            let value = value.and_then(|v| usize::try_from(v).ok());
            value.ok_or_else(|| node.corrupt(format!("attribute '{name}' must be {least} or more")))
        };
        let least_length = number(node, "min_gram_length", 1)?;
        let most_length = number(node, "max_gram_length", least_length as i64)?;
        let skips = number(node, "max_skip_count", 0)?;
        let numbers = |node: &mut NodeReader, name: &str| {
            let given = node.optional_ints(name)?.unwrap_or_default();
            let numbers = given.iter().map(|&v| usize::try_from(v).ok()).collect::<Option<Vec<_>>>();
            numbers.ok_or_else(|| node.corrupt(format!("attribute '{name}' has a negative number")))
        };
        let starts = numbers(node, "ngram_counts")?;
        let columns = numbers(node, "ngram_indexes")?;
        let pool = match (node.optional_ints("pool_int64s")?, node.optional_strings("pool_strings")?) {
            (Some(ints), None) => Pool::Ints(ints),
            (None, Some(strings)) => Pool::Strings(strings),
            _ => return Err(node.corrupt("must have one of 'pool_int64s' and 'pool_strings'")),
        };
        let size = match &pool {
            Pool::Ints(pool) => pool.len(),
            Pool::Strings(pool) => pool.len(),
        };
        let ends = starts.iter().skip(1).copied().chain([size]);
        let lengths: Option<Vec<usize>> = starts.iter().zip(ends).map(|(&start, end)| end.checked_sub(start)).collect();
        let grams = lengths.and_then(|lengths| {
            let whole = lengths.iter().enumerate().all(|(index, length)| length % (index + 1) == 0);
            whole.then(|| lengths.iter().enumerate().map(|(index, length)| length / (index + 1)).sum::<usize>())
        });
        if starts.first() != Some(&0) || grams != Some(columns.len()) {
            let message = format!("ngram_counts {starts:?} and {} ngram_indexes for a pool of {size}", columns.len());
            return Err(node.corrupt(message));
        }
        let weights = node.optional_floats("weights")?.unwrap_or_default();
        let op = TfIdfVectorizer { weighting, least_length, most_length, skips, pool, starts, columns, weights };
        if !op.weights.is_empty() && op.weights.len() < op.width() {
            return Err(node.corrupt(format!("{} weights for {} columns", op.weights.len(), op.width())));
        }
        Ok(op.into())
    }

    fn export(&self) -> Spelling {
        let ints = |values: &[usize]| values.iter().map(|&v| v as i64).collect::<Vec<_>>();
        let name = Weighting::NAMES.iter().find(|(_, w)| *w == self.weighting).map_or("", |(name, _)| name);
        let spelling = Spelling::new("TfIdfVectorizer")
            .with("mode", name)
            .with("min_gram_length", self.least_length as i64)
            .with("max_gram_length", self.most_length as i64)
            .with("max_skip_count", self.skips as i64)
            .with("ngram_counts", ints(&self.starts))
            .with("ngram_indexes", ints(&self.columns));
        let spelling = match &self.pool {
            Pool::Ints(pool) => spelling.with("pool_int64s", pool.clone()),
            Pool::Strings(pool) => spelling.with("pool_strings", pool.clone()),
        };
        if self.weights.is_empty() { spelling } else { spelling.with("weights", self.weights.clone()) }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let fits = match self.pool {
            Pool::Ints(_) => matches!(x.dtype, DType::I32 | DType::I64),
            Pool::Strings(_) => x.dtype == DType::String,
        };
        if !fits {
            let pool = if let Pool::Ints(_) = self.pool { "integers" } else { "strings" };
            return Err(OpError::input(format!("a pool of {pool} for {x}")));
        }
        let width = Dim::from(self.width());
        let shape = match x.shape.as_deref() {
            None => None,
            Some([_]) => Some(vec![width]),
            Some([rows, _]) => Some(vec![rows.clone(), width]),
            Some(_) => return Err(OpError::input(format!("expected [c] or [n, c], got {x}"))),
        };
        Ok(vec![TensorFact { dtype: DType::F32, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (rows, length) = match *x.shape().dims() {
            [length] => (1, length),
            [rows, length] => (rows, length),
            _ => return Err(OpError::input(format!("expected [c] or [n, c], got {}", x.shape()))),
        };
        let ints;
        let tokens: Vec<Token<'_>> = match self.pool {
            Pool::Ints(_) => {
                ints = inputs.integers(0)?;
                ints.iter().map(|&v| Token::Int(v)).collect()
            }
            Pool::Strings(_) => x.strings()?.iter().map(|v| Token::Text(v)).collect(),
        };
        let width = self.width();
        let mut y = vec![0f32; context.bounded_len(&[rows, width])?];
        let tree = self.tree();
        for row in 0..rows {
            let counts = &mut y[row * width..(row + 1) * width];
            self.count(&tree, &tokens[row * length..(row + 1) * length], counts);
            for (column, count) in counts.iter_mut().enumerate() {
                let weight = self.weights.get(column).copied().unwrap_or(1.0);
                *count = match self.weighting {
                    Weighting::Tf => *count,
                    Weighting::Idf if *count > 0.0 => weight,
                    Weighting::Idf => 0.0,
                    Weighting::TfIdf => *count * weight,
                };
            }
        }
        let shape = if x.shape().rank() == 1 { vec![width] } else { vec![rows, width] };
        Ok(vec![Tensor::from_vec(shape, y)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, strings, tensor};
    use cutover_tensor::Tensor;

    fn node(mode: &str, least: i64, most: i64, skips: i64) -> Case {
        let node = case("TfIdfVectorizer", 9).with("mode", mode).with("min_gram_length", least);
        let node = node.with("max_gram_length", most).with("max_skip_count", skips);
        node.with("ngram_counts", vec![0, 4]).with("ngram_indexes", (0..7).collect::<Vec<i64>>())
    }

    fn ints(mode: &str, least: i64, most: i64, skips: i64) -> Case {
        node(mode, least, most, skips).with("pool_int64s", vec![2, 3, 5, 4, 5, 6, 7, 8, 6, 7])
    }

    fn x() -> Tensor {
        tensor(&[12], &[1i32, 1, 3, 3, 3, 7, 8, 6, 7, 5, 6, 8])
    }

    #[test]
    fn n_grams_are_counted() {
        ints("TF", 1, 2, 5).input(x()).gives([f32s(&[7], &[0.0, 3.0, 1.0, 0.0, 1.0, 3.0, 1.0])]);
        ints("TF", 2, 2, 0).input(x()).gives([f32s(&[7], &[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])]);
        ints("TF", 2, 2, 5).input(x()).gives([f32s(&[7], &[0.0, 0.0, 0.0, 0.0, 1.0, 3.0, 1.0])]);
        ints("TF", 1, 1, i64::MAX).input(x()).gives([f32s(&[7], &[0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0])]);
        let rows = f32s(&[2, 7], &[0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]);
        ints("TF", 1, 2, 5).input(x().reshape([2, 6]).unwrap()).gives([rows]);
        ints("TF", 1, 2, 5).input(tensor(&[0], &[0i64; 0])).gives([f32s(&[7], &[0.0; 7])]);
        ints("TF", 1, 2, 5).input(tensor(&[0, 3], &[0i64; 0])).gives([f32s(&[0, 7], &[])]);
        let texts = ["b", "c", "e", "d", "e", "f", "g", "h", "f", "g"].map(String::from).to_vec();
        let text = strings(&[12], &["a", "a", "c", "c", "c", "g", "h", "f", "g", "e", "f", "h"]);
        let expected = f32s(&[7], &[0.0, 3.0, 1.0, 0.0, 1.0, 3.0, 1.0]);
        node("TF", 1, 2, 5).with("pool_strings", texts).input(text).gives([expected]);
    }

    #[test]
    fn counts_are_weighted() {
        let weights = || (1..8).map(|v| v as f32).collect::<Vec<_>>();
        let weighted = |mode| ints(mode, 1, 2, 5).with("weights", weights()).input(x());
        weighted("TF").gives([f32s(&[7], &[0.0, 3.0, 1.0, 0.0, 1.0, 3.0, 1.0])]);
        weighted("IDF").gives([f32s(&[7], &[0.0, 2.0, 3.0, 0.0, 5.0, 6.0, 7.0])]);
        weighted("TFIDF").gives([f32s(&[7], &[0.0, 6.0, 3.0, 0.0, 5.0, 18.0, 7.0])]);
        ints("IDF", 1, 2, 5).input(x()).gives([f32s(&[7], &[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0])]);
    }

    #[test]
    fn contradictions_are_refused() {
        ints("TF", 0, 2, 0).input(x()).fails("'min_gram_length' must be 1 or more");
        ints("TF", 2, 1, 0).input(x()).fails("'max_gram_length' must be 2 or more");
        ints("TF", 1, 2, -1).input(x()).fails("'max_skip_count'");
        ints("PF", 1, 2, 0).input(x()).fails("'PF'");
        ints("TF", 1, 2, 0).input(f32s(&[1], &[1.0])).fails("a pool of integers for f32[1]");
        ints("TF", 1, 2, 0).input(tensor(&[], &[1i64])).fails("expected [c] or [n, c]");
        ints("TF", 1, 2, 0).with("ngram_counts", vec![0, 11]).input(x()).fails("for a pool of 10");
        ints("TF", 1, 2, 0).with("ngram_counts", vec![0, 5]).input(x()).fails("for a pool of 10");
        ints("TF", 1, 2, 0).with("ngram_indexes", vec![0, -1]).input(x()).fails("negative");
        let far = vec![0, 1, 2, 3, 4, 5, i64::MAX];
        ints("TF", 1, 2, 0).with("ngram_indexes", far).input(x()).fails("limit");
        ints("IDF", 1, 2, 0).with("weights", vec![1f32]).input(x()).fails("1 weights for 7 columns");
        node("TF", 1, 2, 0).input(x()).fails("one of 'pool_int64s'");
    }
}
