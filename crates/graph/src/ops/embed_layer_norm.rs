//! The first layer of BERT, as ONNX Runtime fuses it: embeddings looked up, added and normalised.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    layer_norm::{normalise, scale_and_shift},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `s = word[id] + position[p] + segment[g]`, `y = (s − mean) / √(variance + epsilon) · gamma + beta` over the last axis.
///
/// Inputs: ids `[b, s]`; segments `[b, s]` or omitted; embeddings of words, positions and, with segments, those `[.., d]`; `gamma` and
/// `beta` `[d]`; a mask `[b, s]`; positions `[b, s]` or `[1, s]`, 0, 1, … where omitted. Outputs: `y [b, s, d]`; of each sample, how
/// many of its mask are 1 (0 without a mask), i32; `s`.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedLayerNorm {
    pub epsilon: f32,
    /// What shape inference is told of the second output; no result depends on it.
    pub mask_index_type: Option<i64>,
}

impl Operator for EmbedLayerNorm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(7..=9)?;
        if node.has_input(1) != node.has_input(4) {
            return Err(node.corrupt("expected segments with their embedding, or neither"));
        }
        let mask_index_type = node.optional_int("mask_index_type")?;
        Ok(EmbedLayerNorm { epsilon: node.float("epsilon", 1e-12)?, mask_index_type }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("EmbedLayerNormalization").in_domain("com.microsoft");
        if let Some(kind) = self.mask_index_type {
            spelling = spelling.with("mask_index_type", kind);
        }
        spelling.with("epsilon", self.epsilon)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (ids, words) = (inputs.tensor(0)?, inputs.tensor(2)?);
        for index in [3, 5, 6] {
            inputs.tensor(index)?;
        }
        let (sum, counts) = match (ids.shape.as_deref(), words.shape.as_deref()) {
            (Some([batch, length]), Some([_, width])) => (
                TensorFact::new(words.dtype, vec![batch.clone(), length.clone(), width.clone()]),
                TensorFact::new(DType::I32, vec![batch.clone()]),
            ),
            (None | Some([_, _]), None | Some([_, _])) => {
                (TensorFact::unknown_rank(words.dtype), TensorFact::unknown_rank(DType::I32))
            }
            _ => return Err(OpError::input(format!("expected ids [b, s] and words [.., d], got {ids} and {words}"))),
        };
        Ok(vec![sum.clone().into(), counts.into(), sum.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (ids, words) = (inputs.tensor(0)?, inputs.tensor(2)?);
        let (&[batch, length], &[_, width]) = (ids.shape().dims(), words.shape().dims()) else {
            let (ids, words) = (ids.shape(), words.shape());
            return Err(OpError::input(format!("expected ids [b, s] and words [.., d], got {ids} and {words}")));
        };
        let shape = [batch, length, width];
        let count = batch * length;
        let mut sum = vec![0.0; context.bounded_len(&shape)?];
        context.bounded_len(&[batch])?;
        let mut add = |table: &Tensor, of: &str, index: &dyn Fn(usize) -> i64| -> Result<(), OpError> {
            let &[rows, columns] = table.shape().dims() else {
                return Err(OpError::input(format!(
                    "embeddings of {of} are {}, [.., {width}] expected",
                    table.shape()
                )));
            };
            if columns != width {
                return Err(OpError::input(format!("embeddings of {of} have {columns} elements, {width} expected")));
            }
            let values = Wide::floats(table)?;
            for (at, sum) in sum.chunks_exact_mut(width.max(1)).enumerate() {
                let row = index(at);
                let row = usize::try_from(row).ok().filter(|&row| row < rows);
                let row = row.ok_or_else(|| OpError::input(format!("{of} {} of {rows}", index(at))))?;
                sum.iter_mut().zip(&values[row * width..(row + 1) * width]).for_each(|(sum, x)| *sum += x);
            }
            Ok(())
        };
        let of_all = |index: usize| -> Result<Vec<i64>, OpError> {
            let values = inputs.integers(index)?;
            match values.len() == count {
                true => Ok(values),
                false => Err(OpError::input(format!("input {index} has {} elements, {count} expected", values.len()))),
            }
        };
        let ids = of_all(0)?;
        add(words, "word", &|at| ids[at])?;
        let positions = inputs.get(8).map(|_| inputs.integers(8)).transpose()?;
        if positions.as_ref().is_some_and(|p| p.len() != count && p.len() != length) {
            return Err(OpError::input(format!("expected positions [{batch}, {length}] or [1, {length}]")));
        }
        add(inputs.tensor(3)?, "position", &|at| match &positions {
            Some(positions) => positions[at % positions.len()],
            None => (at % length) as i64,
        })?;
        if let Some(table) = inputs.optional_tensor(4)? {
            let segments = of_all(1)?;
            add(table, "segment", &|at| segments[at])?;
        }
        let counts = match inputs.get(7) {
            None => vec![0; batch],
            Some(_) if count == 0 => vec![0; batch],
            Some(_) => {
                let ones = |row: &[i64]| row.iter().filter(|&&m| m == 1).count() as i32;
                of_all(7)?.chunks_exact(length).map(ones).collect()
            }
        };
        let mut y = sum.clone();
        normalise(&mut y, (0, width), self.epsilon, true);
        scale_and_shift(&mut y, &shape.into(), inputs.tensor(5)?, inputs.optional_tensor(6)?)?;
        let dtype = words.dtype();
        let y = Wide::Float(y).narrow(dtype, shape)?;
        let sum = Wide::Float(sum).narrow(dtype, shape)?;
        Ok(vec![y.into(), Tensor::from_vec([batch], counts)?.into(), sum.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.EmbedLayerNormalization", 1)
            .with("epsilon", 0.01f32)
            .input(tensor::<i32>(&[2, 2], &[0, 2, 1, 1]))
            .input(tensor::<i32>(&[2, 2], &[0, 1, 1, 0]))
            .wave(&[3, 2])
            .wave(&[2, 2])
            .wave(&[2, 2])
            .wave(&[2])
            .wave(&[2])
            .input(tensor::<i32>(&[2, 2], &[1, 1, 1, 0]))
            .gives([
                f32s(&[2, 2, 2], &[0.304783, 0.476086, 0.749204, -1.74602, 0.250554, 0.747231, 0.749204, -1.74602]),
                tensor::<i32>(&[2], &[2, 1]),
                f32s(&[2, 2, 2], &[0.25, 0.0, -2.25, 0.25, 1.75, -1.25, -1.0, 1.5]),
            ]);
        case("com.microsoft.EmbedLayerNormalization", 1)
            .input(tensor::<i32>(&[1, 2], &[0, 2]))
            .omitted()
            .wave(&[3, 2])
            .wave(&[3, 2])
            .omitted()
            .wave(&[2])
            .wave(&[2])
            .omitted()
            .input(tensor::<i32>(&[1, 2], &[2, 1]))
            .gives([f32s(&[1, 2, 2], &[0.25, 0.75, 0.75, -1.75]), tensor::<i32>(&[1], &[0])]);
    }

    #[test]
    fn ids_have_embeddings() {
        let ids = tensor::<i32>(&[1, 1], &[3]);
        let of = case("com.microsoft.EmbedLayerNormalization", 1).input(ids).omitted().wave(&[3, 2]).wave(&[1, 2]);
        of.omitted().wave(&[2]).wave(&[2]).fails("word 3 of 3");
    }
}
