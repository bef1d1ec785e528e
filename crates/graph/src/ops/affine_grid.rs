//! Where the pixels of an image lie in another one.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs `theta [n, 2, 3]` and `size` (n, c, h, w): `[n, h, w, 2]`, for every pixel `theta · (x, y, 1)`, where `x` and `y` go from −1 to 1 over
/// the image. In three dimensions `theta [n, 3, 4]` and (n, c, d, h, w): `[n, d, h, w, 3]`.
#[derive(Clone, Debug, PartialEq)]
pub struct AffineGrid {
    /// −1 and 1 are the centres of the outermost pixels; without it their outer edges.
    pub align_corners: bool,
}

impl AffineGrid {
    /// The centre of pixel `i`; the only one of an axis lies at 0.
    fn centre(&self, i: usize, extent: usize) -> f64 {
        match self.align_corners {
            true if extent == 1 => 0.0,
            true => 2.0 * i as f64 / (extent - 1) as f64 - 1.0,
            false => (2 * i + 1) as f64 / extent as f64 - 1.0,
        }
    }
}

impl Operator for AffineGrid {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        Ok(AffineGrid { align_corners: node.flag("align_corners", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("AffineGrid").with("align_corners", i64::from(self.align_corners))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (theta, size) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let known = movement::known_integers(inputs, 1)?;
        if let Some(theta) = theta.constant_shape() {
            let rank = size.constant_count().unwrap_or(theta.get(1).map_or(0, |axes| axes + 2));
            check_theta(&theta, rank)?;
        }
        known.iter().flatten().try_for_each(|&extent| checked(extent).map(drop))?;
        let shape = match (&size.value, size.constant_count()) {
            (Some(value), _) => Some(value.clone()),
            (None, Some(rank @ (4 | 5))) => Some((0..rank).map(|axis| context.fresh(&format!("axis{axis}"))).collect()),
            _ => None,
        };
        let shape = match shape.as_deref() {
            Some([n, _, spatial @ ..]) if [2, 3].contains(&spatial.len()) => {
                Some([[n.clone()].as_slice(), spatial, &[Dim::from(spatial.len())]].concat())
            }
            Some(_) => return Err(OpError::input(format!("expected 4 or 5 extents, got {size}"))),
            None => None,
        };
        Ok(vec![TensorFact { dtype: theta.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (theta, shape) = movement::source(inputs)?;
        let size = inputs.integers(1)?.into_iter().map(checked).collect::<Result<Vec<usize>, _>>()?;
        check_theta(shape, size.len())?;
        if shape[0] != size[0] {
            return Err(OpError::input(format!("{} transformations for {} images", shape[0], size[0])));
        }
        let (n, spatial) = (size[0], &size[2..]);
        let axes = spatial.len();
        let to: Vec<usize> = [[n].as_slice(), spatial, &[axes]].concat();
        let mut y = Vec::with_capacity(context.bounded_len(&to)?);
        if y.capacity() == 0 || to.contains(&0) {
            return Ok(vec![Tensor::zeros(theta.dtype(), to)?.into()]);
        }
        let values = Wide::floats(theta)?;
        for theta in values.chunks_exact(axes * (axes + 1)) {
            for index in super::indices(spatial) {
                // The last axis is x, the first of a row of theta.
                let mut position = [0.0; 3];
                index.iter().zip(spatial).rev().zip(&mut position).for_each(|((&i, &e), p)| *p = self.centre(i, e));
                for row in theta.chunks_exact(axes + 1) {
                    let moved: f64 = row.iter().zip(&position[..axes]).map(|(t, p)| t * p).sum();
                    y.push(moved + row[axes]);
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(theta.dtype(), to)?.into()])
    }
}

fn check_theta(theta: &[usize], size: usize) -> Result<(), OpError> {
    match (theta, size) {
        ([_, 2, 3], 4) | ([_, 3, 4], 5) => Ok(()),
        _ => Err(OpError::input(format!(
            "expected [n, 2, 3] and 4 extents or [n, 3, 4] and 5, got {theta:?} and {size}"
        ))),
    }
}

fn checked(extent: i64) -> Result<usize, OpError> {
    usize::try_from(extent).map_err(|_| OpError::input(format!("an extent of {extent}")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn node(theta: [f32; 6], size: &[i64]) -> Case {
        case("AffineGrid", 20).input(f32s(&[1, 2, 3], &theta)).input(tensor::<i64>(&[size.len()], size))
    }

    const MOVED: [f32; 6] = [1., 0., 10., 0., 2., 20.];

    #[test]
    fn agrees_with_torch() {
        let edges = [9.5, 19., 10.5, 19., 9.5, 21., 10.5, 21.];
        node(MOVED, &[1, 3, 2, 2]).gives([f32s(&[1, 2, 2, 2], &edges)]);
        let centres = [9., 20., 10., 20., 11., 20.];
        node(MOVED, &[1, 1, 1, 3]).with("align_corners", 1).gives([f32s(&[1, 1, 3, 2], &centres)]);
        node(MOVED, &[1, 1, 0, 3]).gives([f32s(&[1, 0, 3, 2], &[])]);
        let identity = f32s(&[1, 3, 4], &[1., 0., 0., 0., 0., 1., 0., 0., 0., 0., 1., 0.]);
        let deep = case("AffineGrid", 20).input(identity).input(tensor::<i64>(&[5], &[1, 1, 2, 1, 1]));
        deep.gives([f32s(&[1, 2, 1, 1, 3], &[0., 0., -0.5, 0., 0., 0.5])]);
    }

    #[test]
    fn refuses_extents_that_do_not_fit() {
        node(MOVED, &[2, 3, 2, 2]).fails("1 transformations for 2 images");
        node(MOVED, &[1, 3, 2]).fails("[1, 2, 3] and 3");
        node(MOVED, &[1, 3, -2, 2]).fails("an extent of -2");
        node(MOVED, &[1, 3, 1 << 40, 1 << 20]).fails("resource limit");
    }
}
