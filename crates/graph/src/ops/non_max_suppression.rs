//! The best of boxes that overlap.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// Inputs `boxes [batch, n, 4]` and `scores [batch, classes, n]`, and scalars: the most boxes per batch and class (0), the overlap above
/// which a box gives way to a better one (0) and the score that a box must be above (any). Gives `[selected, 3]` (i64): batch, class and
/// box, of every class from the best score down; of equal scores the first box first.
#[derive(Clone, Debug, PartialEq)]
pub struct NonMaxSuppression {
    /// Boxes are `[x, y, width, height]` around a centre; without it two opposite corners `[y, x, y, x]`.
    pub center_point_box: bool,
}

/// Corners, in the precision that ONNX Runtime compares overlaps in: what is exactly at the threshold stays.
#[derive(Clone, Copy)]
struct Area {
    low: [f32; 2],
    high: [f32; 2],
    size: f32,
}

impl Area {
    fn new(values: &[f32], center_point_box: bool) -> Area {
        let (a, b) = ([values[0], values[1]], [values[2], values[3]]);
        let (low, high) = if center_point_box {
            let half = [b[0] / 2.0, b[1] / 2.0];
            ([a[0] - half[0], a[1] - half[1]], [a[0] + half[0], a[1] + half[1]])
        } else {
            ([a[0].min(b[0]), a[1].min(b[1])], [a[0].max(b[0]), a[1].max(b[1])])
        };
        Area { low, high, size: (high[0] - low[0]) * (high[1] - low[1]) }
    }
}

/// Boxes that a candidate is compared with at once.
const LANES: usize = 16;

/// The boxes of one class that stay, by [`LANES`]: corners and sizes side by side, those that are not there yet of no size.
#[derive(Default)]
struct Kept {
    blocks: Vec<Block>,
    len: usize,
}

#[derive(Default)]
struct Block {
    low: [[f32; LANES]; 2],
    high: [[f32; LANES]; 2],
    size: [f32; LANES],
}

impl Kept {
    fn push(&mut self, area: &Area) {
        let lane = self.len % LANES;
        if lane == 0 {
            self.blocks.push(Block::default());
        }
        let block = self.blocks.last_mut().expect("one was pushed for the first lane");
        for axis in 0..2 {
            block.low[axis][lane] = area.low[axis];
            block.high[axis][lane] = area.high[axis];
        }
        block.size[lane] = area.size;
        self.len += 1;
    }

    /// Whether intersection over union with any of them is above `threshold`; never for boxes without an area.
    fn overlaps(&self, area: &Area, threshold: f32) -> bool {
        let covers = |block: &Block, lane: usize| {
            let side =
                |axis: usize| block.high[axis][lane].min(area.high[axis]) - block.low[axis][lane].max(area.low[axis]);
            let (a, b, size) = (side(0), side(1), block.size[lane]);
            let intersection = a * b;
            let union = size + area.size - intersection;
            (a > 0.0) & (b > 0.0) & (size > 0.0) & (union > 0.0) & (intersection / union > threshold)
        };
        let any = |block: &Block| (0..LANES).fold(false, |any, lane| any | covers(block, lane));
        area.size > 0.0 && self.blocks.iter().any(any)
    }
}

fn scalar<T: Copy>(
    inputs: Inputs<'_>,
    index: usize,
    read: impl Fn(&Tensor) -> Result<Vec<T>, OpError>,
) -> Result<Option<T>, OpError> {
    let Some(tensor) = inputs.optional_tensor(index)? else { return Ok(None) };
    match read(tensor)?.as_slice() {
        [value] => Ok(Some(*value)),
        values => Err(OpError::input(format!("input {index} must be one number, got {}", values.len()))),
    }
}

impl Operator for NonMaxSuppression {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=5)?;
        Ok(NonMaxSuppression { center_point_box: node.flag("center_point_box", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("NonMaxSuppression").with("center_point_box", i64::from(self.center_point_box))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        for (index, expected) in [(0, "boxes [batch, n, 4]"), (1, "scores [batch, classes, n]")] {
            let fact = inputs.tensor(index)?;
            if fact.dtype != DType::F32 || fact.rank().is_some_and(|rank| rank != 3) {
                return Err(OpError::input(format!("expected {expected} of type f32, got {fact}")));
            }
        }
        Ok(vec![TensorFact::new(DType::I64, vec![context.fresh("selected"), Dim::Const(3)]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (boxes, scores) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (&[batches, n, 4], &[score_batches, classes, score_n]) = (boxes.shape().dims(), scores.shape().dims())
        else {
            let (boxes, scores) = (boxes.shape(), scores.shape());
            return Err(OpError::input(format!(
                "expected [batch, n, 4] and [batch, classes, n], got {boxes} and {scores}"
            )));
        };
        if (batches, n) != (score_batches, score_n) {
            return Err(OpError::input(format!("boxes {} and scores {} differ", boxes.shape(), scores.shape())));
        }
        let most = scalar(inputs, 2, |t| Ok(t.to_vec::<i64>()?))?.unwrap_or(0);
        let most = usize::try_from(most).unwrap_or(0).min(n);
        let overlap = scalar(inputs, 3, |t| Ok(t.to_vec::<f32>()?))?.unwrap_or(0.0);
        let least = scalar(inputs, 4, |t| Ok(t.to_vec::<f32>()?))?;
        if !(0.0..=1.0).contains(&overlap) {
            return Err(OpError::input(format!("an overlap threshold of {overlap}, expected 0 to 1")));
        }
        let (boxes, scores) = (boxes.to_vec::<f32>()?, scores.to_vec::<f32>()?);
        let areas: Vec<Area> = boxes.chunks_exact(4).map(|values| Area::new(values, self.center_point_box)).collect();
        let mut selected: Vec<i64> = Vec::new();
        // Without a box or without a result there is nothing to look at, however many classes there are.
        let pairs = if most == 0 { 0 } else { batches * classes };
        for pair in 0..pairs {
            let (batch, class) = (pair / classes, pair % classes);
            let (areas, scores) = (&areas[batch * n..][..n], &scores[pair * n..][..n]);
            let mut candidates: Vec<usize> = (0..n).filter(|&i| least.is_none_or(|least| scores[i] > least)).collect();
            // What is not a number is worse than all numbers.
            let nan = |i: usize| scores[i].is_nan();
            let better =
                |&a: &usize, &b: &usize| scores[b].partial_cmp(&scores[a]).unwrap_or_else(|| nan(a).cmp(&nan(b)));
            candidates.sort_by(better);
            let mut kept = Kept::default();
            for candidate in candidates {
                if kept.len == most {
                    break;
                }
                if !kept.overlaps(&areas[candidate], overlap) {
                    kept.push(&areas[candidate]);
                    selected.extend([batch as i64, class as i64, candidate as i64]);
                }
            }
        }
        let to = [selected.len() / 3, 3];
        context.bounded_len(&to)?;
        Ok(vec![Tensor::from_vec(to, selected)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};
    use cutover_tensor::Tensor;

    fn boxes() -> Tensor {
        let rows = [
            [0., 0., 1., 1.],
            [0., 0.1, 1., 1.1],
            [0., -0.1, 1., 0.9],
            [0., 10., 1., 11.],
            [1., 11.1, 0., 10.1],
            [0., 100., 1., 101.],
        ];
        f32s(&[1, 6, 4], rows.as_flattened())
    }

    fn node(most: i64, overlap: f32) -> Case {
        let scores = f32s(&[1, 1, 6], &[0.9, 0.75, 0.6, 0.95, 0.5, 0.3]);
        let node = case("NonMaxSuppression", 11).input(boxes()).input(scores).input(tensor::<i64>(&[1], &[most]));
        node.input(f32s(&[1], &[overlap]))
    }

    fn selected(rows: &[[i64; 3]]) -> [Tensor; 1] {
        [tensor(&[rows.len(), 3], rows.as_flattened())]
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        node(3, 0.5).input(f32s(&[1], &[0.0])).gives(selected(&[[0, 0, 3], [0, 0, 0], [0, 0, 5]]));
        node(3, 0.5).input(Tensor::scalar(0.6f32)).gives(selected(&[[0, 0, 3], [0, 0, 0]]));
        node(2, 0.0).gives(selected(&[[0, 0, 3], [0, 0, 0]]));
        node(0, 0.5).gives(selected(&[]));
        node(-3, 0.5).gives(selected(&[]));
        let scores = [0.9, 0.75, 0.6, 0.95, 0.5, 0.3, 0.3, 0.5, 0.95, 0.6, 0.75, 0.9];
        let classes = case("NonMaxSuppression", 10).input(boxes()).input(f32s(&[1, 2, 6], &scores));
        let classes = classes.input(Tensor::scalar(2i64)).input(Tensor::scalar(0.5f32));
        classes.gives(selected(&[[0, 0, 3], [0, 0, 0], [0, 1, 2], [0, 1, 5]]));
    }

    #[test]
    fn boxes_around_a_centre_and_equal_scores() {
        let rows = [[0.5, 0.5, 1., 1.], [0.5, 0.6, 1., 1.], [0.5, -5., 1., 1.]];
        let node =
            case("NonMaxSuppression", 11).with("center_point_box", 1).input(f32s(&[1, 3, 4], rows.as_flattened()));
        let node = node.input(f32s(&[1, 1, 3], &[0.7, 0.7, 0.1])).input(Tensor::scalar(5i64));
        node.input(Tensor::scalar(0.5f32)).gives(selected(&[[0, 0, 0], [0, 0, 2]]));
    }

    #[test]
    fn more_boxes_than_are_compared_at_once() {
        // Forty boxes apart, each with another one on it that is worse, and one of no area.
        let rows: Vec<[f32; 4]> =
            (0..80).map(|i| [0.0, (i % 40) as f32 * 2.0, 1.0, (i % 40) as f32 * 2.0 + 1.0]).collect();
        let rows = [rows, vec![[5.0, 5.0, 5.0, 9.0]]].concat();
        let scores: Vec<f32> = (0..81).map(|i| 1.0 - i as f32 / 100.0).collect();
        let kept: Vec<[i64; 3]> = (0..40).chain([80]).map(|i| [0, 0, i]).collect();
        case("NonMaxSuppression", 11)
            .input(f32s(&[1, 81, 4], rows.as_flattened()))
            .input(f32s(&[1, 1, 81], &scores))
            .input(Tensor::scalar(100i64))
            .input(Tensor::scalar(0.5f32))
            .gives(selected(&kept));
    }

    #[test]
    fn nothing_is_selected_of_nothing() {
        case("NonMaxSuppression", 11)
            .wave(&[1, 0, 4])
            .wave(&[1, 2, 0])
            .input(Tensor::scalar(5i64))
            .gives(selected(&[]));
        case("NonMaxSuppression", 11).input(boxes()).wave(&[1, 1, 6]).gives(selected(&[]));
    }

    #[test]
    fn refuses_what_does_not_agree() {
        node(1, 1.5).fails("an overlap threshold of 1.5");
        case("NonMaxSuppression", 11)
            .wave(&[1, 3, 4])
            .wave(&[1, 1, 2])
            .fails("boxes [1, 3, 4] and scores [1, 1, 2] differ");
        case("NonMaxSuppression", 11).wave(&[1, 3, 5]).wave(&[1, 1, 3]).fails("expected [batch, n, 4]");
    }
}
