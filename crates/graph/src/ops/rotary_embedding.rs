//! Rotation of vectors by their position.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    heads::{HeadDims, Heads},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Of each head, the elements of a pair become `(cos · a − sin · b, sin · a + cos · b)` with the angle of the pair at the vector's
/// position (Su et al., "RoFormer", 2021); `[b, n, s, h]` or `[b, s, n·h]` in and out.
///
/// Inputs: the vectors, cosines, sines, positions `[b, s]`; ONNX Runtime's own operator has the positions second, and may have one
/// position alone, that of the first vector. Cosines and sines are `[max, r / 2]`, or `[b, s, r / 2]` without positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryEmbedding {
    /// Of vectors `[b, s, n·h]`; without it as many as heads of twice the cosines' width.
    pub heads: Option<usize>,
    pub rotation: Rotation,
    /// The operator of ONNX Runtime.
    pub positions_second: bool,
}

/// How the elements of a vector pair up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// Number of elements that are rotated, from the first; all of them without it.
    pub size: Option<usize>,
    /// Neighbours pair up; otherwise the first half with the second.
    pub interleaved: bool,
}

impl Operator for RotaryEmbedding {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let positions_second = node.domain == "com.microsoft";
        node.expect_inputs(if positions_second { 4..=4 } else { 3..=4 })?;
        // 0 is as if it were not there.
        let mut count = |name: &str| match node.int(name, 0)? {
            0 => Ok(None),
            value @ 1..=0x7fff_ffff => Ok(Some(value as usize)),
            other => Err(node.corrupt(format!("attribute '{name}' must be 0 or more, got {other}"))),
        };
        let (heads, size) = (count("num_heads")?, count("rotary_embedding_dim")?);
        let rotation = Rotation { size, interleaved: node.flag("interleaved", false)? };
        if positions_second {
            if node.flag("is_packed_batching", false)? {
                return Err(node.unsupported("is_packed_batching 1"));
            }
            let scale = node.float("scale", 1.0)?;
            if scale != 1.0 {
                return Err(node.unsupported(format!("scale {scale} (only 1)")));
            }
        }
        Ok(RotaryEmbedding { heads, rotation, positions_second }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match self.positions_second {
            true => Spelling::new("RotaryEmbedding").in_domain("com.microsoft"),
            false => Spelling::new("RotaryEmbedding").since(23),
        };
        spelling
            .with("num_heads", self.heads.unwrap_or(0) as i64)
            .with("rotary_embedding_dim", self.rotation.size.unwrap_or(0) as i64)
            .with("interleaved", i64::from(self.rotation.interleaved))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let (cos, sin, positions) = self.angles();
        inputs.tensor(cos)?;
        inputs.tensor(sin)?;
        inputs.optional_tensor(positions)?;
        match (x.rank(), self.heads) {
            (Some(3), None) if self.positions_second => {}
            (Some(4), _) => drop(HeadDims::of(x, None)?),
            _ => drop(HeadDims::of(x, self.heads)?),
        }
        Ok(vec![TensorFact { value: None, ..x.clone() }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let (cos, sin, positions) = self.angles();
        let (cos, sin) = (inputs.tensor(cos)?, inputs.tensor(sin)?);
        let angles = Angles::new(cos, sin)?;
        let heads = match (x.shape().dims(), self.heads) {
            ([_, _, hidden], None) if self.positions_second => Some(hidden / (2 * angles.width).max(1)),
            ([_, _, _], heads) => heads,
            _ => None,
        };
        let mut vectors = Heads::of(x, heads)?;
        let (batch, length) = (vectors.batch, vectors.length);
        let positions = inputs.get(positions).map(|_| inputs.integers(positions)).transpose()?;
        let row = |sample: usize, at: usize| match &positions {
            // Each has an angle of its own.
            None => Ok((sample * length + at) as i64),
            Some(positions) if positions.len() == batch * length => Ok(positions[sample * length + at]),
            Some(positions) if positions.len() == 1 && self.positions_second => {
                Ok(positions[0].saturating_add(at as i64))
            }
            Some(positions) => {
                Err(OpError::input(format!("{} positions for {batch} samples of {length}", positions.len())))
            }
        };
        let own = cos.shape().dims() == [batch, length, angles.width];
        if positions.is_none() && !own {
            return Err(OpError::input(format!("cosines [{batch}, {length}, r / 2] expected, got {}", cos.shape())));
        }
        if positions.is_some() && cos.shape().rank() != 2 {
            return Err(OpError::input(format!("cosines [max, r / 2] expected, got {}", cos.shape())));
        }
        self.rotation.apply(&mut vectors, &angles, row)?;
        let y = if x.shape().rank() == 3 { vectors.by_position(x.dtype())? } else { vectors.by_head(x.dtype())? };
        Ok(vec![y])
    }
}

impl RotaryEmbedding {
    /// The inputs with cosines, sines and positions.
    pub fn angles(&self) -> (usize, usize, usize) {
        if self.positions_second { (2, 3, 1) } else { (1, 2, 3) }
    }
}

/// Cosines and sines of rows of `width` angles.
pub(super) struct Angles {
    cos: Vec<f64>,
    sin: Vec<f64>,
    pub width: usize,
}

impl Angles {
    pub fn new(cos: &Tensor, sin: &Tensor) -> Result<Angles, OpError> {
        let width = cos.shape().dims().last().copied();
        match width {
            Some(width) if cos.shape() == sin.shape() => {
                Ok(Angles { cos: Wide::floats(cos)?, sin: Wide::floats(sin)?, width })
            }
            _ => Err(OpError::input(format!("cosines {} and sines {}", cos.shape(), sin.shape()))),
        }
    }
}

impl Rotation {
    /// Rotates every vector by the angles of the row that `row(sample, position)` gives.
    pub(super) fn apply(
        self,
        vectors: &mut Heads,
        angles: &Angles,
        row: impl Fn(usize, usize) -> Result<i64, OpError>,
    ) -> Result<(), OpError> {
        let rotated = self.size.unwrap_or(vectors.size);
        let half = angles.width;
        if rotated > vectors.size || half.checked_mul(2) != Some(rotated) {
            let size = vectors.size;
            return Err(OpError::input(format!(
                "{half} angles for {rotated} of {size} elements: half as many expected"
            )));
        }
        if vectors.values.is_empty() {
            return Ok(());
        }
        for (at, vector) in vectors.values.chunks_exact_mut(vectors.size).enumerate() {
            let (sample, position) = (at / vectors.length / vectors.heads, at % vectors.length);
            let row = row(sample, position)?;
            let start = usize::try_from(row).ok().and_then(|row| row.checked_mul(half));
            let range = start.and_then(|start| Some(start..start.checked_add(half)?));
            let (Some(cos), Some(sin)) =
                (range.clone().and_then(|r| angles.cos.get(r)), range.and_then(|r| angles.sin.get(r)))
            else {
                let rows = angles.cos.len().checked_div(half).unwrap_or(0);
                return Err(OpError::input(format!("position {row}, and angles of {rows}")));
            };
            for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, half + i) };
                let (x, y) = (vector[a], vector[b]);
                (vector[a], vector[b]) = (cos * x - sin * y, sin * x + cos * y);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn quarter_turns(case: Case) -> Case {
        case.input(f32s(&[3, 1], &[1.0, 0.0, -1.0])).input(f32s(&[3, 1], &[0.0, 1.0, 0.0]))
    }

    #[test]
    fn pairs_turn_by_the_angle_of_their_position() {
        let x = || f32s(&[1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let of = || case("RotaryEmbedding", 23).with("num_heads", 1).with("rotary_embedding_dim", 2);
        let positions = || tensor::<i64>(&[1, 2], &[1, 2]);
        let turned = || f32s(&[1, 2, 3], &[-2.0, 1.0, 3.0, -4.0, -5.0, 6.0]);
        quarter_turns(of().input(x())).input(positions()).gives([turned()]);
        quarter_turns(of().with("interleaved", 1).input(x())).input(positions()).gives([turned()]);
        let own = of().input(x()).input(f32s(&[1, 2, 1], &[0.0, -1.0])).input(f32s(&[1, 2, 1], &[1.0, 0.0]));
        own.gives([turned()]);
        let first = tensor::<i64>(&[1], &[1]);
        let second = case("com.microsoft.RotaryEmbedding", 1).with("rotary_embedding_dim", 2).with("num_heads", 1);
        quarter_turns(second.input(x()).input(first)).gives([turned()]);
        let by_head = case("RotaryEmbedding", 23).input(f32s(&[1, 2, 1, 2], &[1.0, 2.0, 3.0, 4.0]));
        let one = tensor::<i64>(&[1, 1], &[1]);
        quarter_turns(by_head).input(one).gives([f32s(&[1, 2, 1, 2], &[-2.0, 1.0, -4.0, 3.0])]);
    }

    #[test]
    fn positions_have_angles() {
        let of = |at: i64| {
            let x = case("RotaryEmbedding", 23).input(f32s(&[1, 1, 1, 2], &[1.0, 2.0]));
            quarter_turns(x).input(tensor::<i64>(&[1, 1], &[at]))
        };
        of(3).fails("position 3, and angles of 3");
        of(-1).fails("position -1");
        quarter_turns(case("RotaryEmbedding", 23).wave(&[1, 1, 1, 2])).fails("cosines [1, 1, r / 2] expected");
    }
}
