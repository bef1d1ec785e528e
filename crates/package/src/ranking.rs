//! Rows of equal rank: a detector sorts its boxes by score, and which of two equal scores comes first is nobody's promise.

use crate::numbers;
use cutover_tensor::{Shape, Tensor};
use std::ops::Range;

/// More rows that disagree than these are no ties, and pairing them would take long.
const ROWS_MAX: usize = 4096;

struct Pair {
    shape: Shape,
    actual: Vec<f64>,
    expected: Vec<f64>,
}

/// Where to take each row of the actual outputs from, so that rows of equal rank lie as expected.
pub struct Reordering {
    /// Rows of an output that are not where they were expected.
    pub moved: usize,
    /// Entry `i` is the row that belongs at `i`.
    order: Vec<usize>,
}

/// Looks for the order of rows in which all outputs agree, where the expected ones are ranked: one of them is a falling column of scores that the
/// actual scores agree with as they stand. Rows are then free to change places, whole and in all outputs of as many rows, if each agrees
/// with the one expected there. None where nothing has to move, or moving does not make the rows agree.
///
/// `outputs` are pairs of the actual and the expected tensor, of one type and shape. One whose elements are no numbers may belong to the rows that would
/// move, so then nothing does.
pub fn reorder(outputs: &[(Tensor, &Tensor)], within: impl Fn(f64, f64) -> bool) -> Option<Reordering> {
    let pair = |(actual, expected): &(Tensor, &Tensor)| {
        Some(Pair { shape: expected.shape().clone(), actual: numbers(actual)?, expected: numbers(expected)? })
    };
    let pairs: Vec<Pair> = outputs.iter().map(pair).collect::<Option<_>>()?;
    let agree = |pair: &Pair, actual: Range<usize>, expected: Range<usize>| {
        pair.actual[actual].iter().zip(&pair.expected[expected]).all(|(&a, &e)| within(a, e))
    };
    let whole = |pair: &Pair| 0..pair.expected.len();
    let scores = |pair: &&Pair| {
        let falls = pair.expected.windows(2).all(|pair| pair[0] >= pair[1]);
        rows(&pair.shape).is_some_and(|rows| rows >= 2 && rows == pair.expected.len())
            && falls
            && agree(pair, whole(pair), whole(pair))
    };
    let count = rows(&pairs.iter().find(scores)?.shape)?;
    let pairs: Vec<&Pair> = pairs.iter().filter(|pair| rows(&pair.shape) == Some(count)).collect();
    let row = |pair: &Pair, at: usize| {
        let width = pair.expected.len() / count;
        at * width..(at + 1) * width
    };
    let fits = |actual, expected| pairs.iter().all(|pair| agree(pair, row(pair, actual), row(pair, expected)));

    let astray: Vec<usize> = (0..count).filter(|&at| !fits(at, at)).collect();
    if astray.is_empty() || astray.len() > ROWS_MAX {
        return None;
    }
    let mut order: Vec<usize> = (0..count).collect();
    let mut free = astray.clone();
    for &at in &astray {
        let found = free.iter().position(|&from| fits(from, at))?;
        order[at] = free.remove(found);
    }
    Some(Reordering { moved: astray.len(), order })
}

impl Reordering {
    /// `tensor` with its rows in order, if it has as many as were ordered.
    pub fn apply(&self, tensor: &mut Tensor) {
        if rows(tensor.shape()) != Some(self.order.len()) {
            return;
        }
        let bytes = tensor.bytes().to_vec();
        let width = bytes.len() / self.order.len();
        for (row, &from) in tensor.bytes_mut().chunks_exact_mut(width.max(1)).zip(&self.order) {
            row.copy_from_slice(&bytes[from * width..(from + 1) * width]);
        }
    }
}

/// The first extent other than a batch's 1: `[rows, …]` or `[1, rows, …]`.
fn rows(shape: &[usize]) -> Option<usize> {
    shape.iter().copied().find(|&extent| extent != 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each output as its shape, the actual and the expected elements.
    fn order(outputs: &[(&[usize], &[f64], &[f64])]) -> Option<Reordering> {
        let tensor = |shape: &[usize], values: &[f64]| Tensor::from_vec(shape, values.to_vec()).unwrap();
        let expected: Vec<Tensor> = outputs.iter().map(|(shape, _, expected)| tensor(shape, expected)).collect();
        let actual = outputs.iter().map(|(shape, actual, _)| tensor(shape, actual));
        reorder(&actual.zip(&expected).collect::<Vec<_>>(), |a, e| (a - e).abs() <= 1e-3)
    }

    #[test]
    fn equal_scores_may_change_places_and_others_may_not() {
        let moved = |scores: [&[f64]; 2], labels: &[f64]| {
            let labels = (&[3][..], labels, &[7.0, 8.0, 9.0][..]);
            order(&[(&[3], scores[0], scores[1]), labels]).map(|reordering| reordering.moved)
        };
        let tied: [&[f64]; 2] = [&[0.9, 0.5, 0.5]; 2];
        assert_eq!(moved(tied, &[7.0, 9.0, 8.0]), Some(2));
        assert_eq!(moved(tied, &[7.0, 8.0, 9.0]), None, "nothing to move");
        assert_eq!(moved(tied, &[8.0, 7.0, 9.0]), None, "0.9 is before 0.5");
        assert_eq!(moved(tied, &[7.0, 9.0, 9.0]), None, "8 is missing");
        assert_eq!(moved([&[0.9, 0.4, 0.5], &[0.9, 0.5, 0.4]], &[7.0, 9.0, 8.0]), None, "the scores disagree");
        assert_eq!(moved([&[0.1, 0.5, 0.5]; 2], &[7.0, 9.0, 8.0]), None, "no ranking");
    }

    #[test]
    fn whole_rows_move_in_every_output() {
        let scores: (&[usize], &[f64], &[f64]) = (&[1, 3], &[0.5, 0.5, 0.2], &[0.5, 0.5, 0.2]);
        let boxes = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let reordering = order(&[scores, (&[1, 3, 2], &[3.0, 4.0, 1.0, 2.0, 5.0, 6.0], &boxes)]).unwrap();
        let applied = |shape: &[usize], values: &[i64]| {
            let mut tensor = Tensor::from_vec(shape, values.to_vec()).unwrap();
            reordering.apply(&mut tensor);
            tensor.to_vec::<i64>().unwrap()
        };
        assert_eq!(applied(&[1, 3, 2], &[3, 4, 1, 2, 5, 6]), [1, 2, 3, 4, 5, 6]);
        assert_eq!(applied(&[2], &[3, 4]), [3, 4], "not as many rows");
        let torn = order(&[scores, (&[1, 3, 2], &[3.0, 2.0, 1.0, 4.0, 5.0, 6.0], &boxes)]);
        assert!(torn.is_none(), "halves of rows");
    }
}
