//! The largest elements of the cells of regions.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};
use std::ops::Range;

/// Inputs `x [n, c, h, w]` and `regions [r, 5]` (batch, x, y, x, y, both ends within): `[r, c, height, width]`. A region's corners are scaled and
/// rounded to pixels, and it is divided into `height × width` cells that overlap where pixels don't divide; one without a pixel of the map is 0
/// (Girshick, Fast R-CNN, 2015).
#[derive(Clone, Debug, PartialEq)]
pub struct MaxRoiPool {
    pub height: usize,
    pub width: usize,
    pub spatial_scale: f32,
}

/// The pixels of a cell along one axis: of the region's `first` to `last`, divided into `cells`, those on a map of `extent` pixels.
fn pixels(first: i64, last: i64, cell: usize, cells: usize, extent: usize) -> Range<usize> {
    let (length, cell, cells) = (i128::from(last) - i128::from(first) + 1, cell as i128, cells as i128);
    let length = length.max(1);
    let on_map = |at: i128| (at + i128::from(first)).clamp(0, extent as i128) as usize;
    let start = on_map(cell * length / cells);
    start..on_map(((cell + 1) * length + cells - 1) / cells).max(start)
}

impl Operator for MaxRoiPool {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let extents = node.optional_ints("pooled_shape")?;
        let &[height @ 1..=0x7fff_ffff, width @ 1..=0x7fff_ffff] = extents.as_deref().unwrap_or_default() else {
            return Err(node.corrupt("attribute 'pooled_shape' must be a height and a width"));
        };
        let spatial_scale = node.float("spatial_scale", 1.0)?;
        Ok(MaxRoiPool { height: height as usize, width: width as usize, spatial_scale }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MaxRoiPool")
            .with("pooled_shape", vec![self.height as i64, self.width as i64])
            .with("spatial_scale", self.spatial_scale)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, regions) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        for (fact, rank, expected) in [(x, 4, "[n, c, h, w]"), (regions, 2, "[regions, 5]")] {
            if fact.rank().is_some_and(|actual| actual != rank) {
                return Err(OpError::input(format!("expected {expected}, got {fact}")));
            }
        }
        let extent = |fact: &TensorFact, axis: usize, name: &str| {
            fact.shape.as_ref().map_or_else(|| context.fresh(name), |shape| shape[axis].clone())
        };
        let dims = vec![extent(regions, 0, "regions"), extent(x, 1, "channels"), self.height.into(), self.width.into()];
        Ok(vec![TensorFact::new(x.dtype, dims).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, regions) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (&[n, channels, height, width], &[count, 5]) = (x.shape().dims(), regions.shape().dims()) else {
            let (x, regions) = (x.shape(), regions.shape());
            return Err(OpError::input(format!("expected [n, c, h, w] and [regions, 5], got {x} and {regions}")));
        };
        let to = [count, channels, self.height, self.width];
        let mut y = Vec::with_capacity(context.bounded_len(&to)?);
        let (map, plane) = (Wide::floats(x)?, height * width);
        let scale = f64::from(self.spatial_scale);
        if y.capacity() == 0 || to.contains(&0) {
            return Ok(vec![Tensor::zeros(x.dtype(), to)?.into()]);
        }
        for (region, corners) in Wide::floats(regions)?.chunks_exact(5).enumerate() {
            if corners.iter().any(|corner| !corner.is_finite()) || corners[0] < 0.0 || corners[0] as usize >= n {
                let message = format!("region {region} is {corners:?}, and there are {n} images");
                return Err(OpError::input(message));
            }
            // A cast to an integer stops at its largest and smallest.
            let pixel = |corner: f64| ((corner * scale).round() as i64).clamp(-(1 << 40), 1 << 40);
            let [left, top, right, bottom] = [1, 2, 3, 4].map(|at| pixel(corners[at]));
            for channel in 0..channels {
                let map = &map[(corners[0] as usize * channels + channel) * plane..][..plane];
                for row in 0..self.height {
                    let rows = pixels(top, bottom, row, self.height, height);
                    for column in 0..self.width {
                        let columns = pixels(left, right, column, self.width, width);
                        let cell = rows.clone().flat_map(|y| columns.clone().map(move |x| y * width + x));
                        let largest = cell.map(|at| map[at]).reduce(|a, b| if b > a || b.is_nan() { b } else { a });
                        y.push(largest.unwrap_or(0.0));
                    }
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), to)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s};

    fn node(region: [f32; 5], shape: [i64; 2]) -> Case {
        let map: Vec<f32> = (0..20).map(|i| (i * 7 % 20) as f32).collect();
        let node = case("MaxRoiPool", 1).with("pooled_shape", shape.to_vec());
        node.input(f32s(&[1, 1, 4, 5], &map)).input(f32s(&[1, 5], &region))
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        node([0., 0., 0., 4., 3.], [2, 2]).gives([f32s(&[1, 1, 2, 2], &[15., 16., 19., 19.])]);
        node([0., 1., 1., 3., 2.], [1, 2]).gives([f32s(&[1, 1, 1, 2], &[17., 16.])]);
        node([0., 2., 2., 8., 8.], [2, 2])
            .with("spatial_scale", 0.5f32)
            .gives([f32s(&[1, 1, 2, 2], &[17., 18., 19., 13.])]);
        // A region of negative extent has one pixel; one beside the map has none.
        node([0., 3., 3., 1., 1.], [1, 1]).gives([f32s(&[1, 1, 1, 1], &[6.])]);
        node([0., 30., 30., 31., 31.], [1, 1]).gives([f32s(&[1, 1, 1, 1], &[0.])]);
    }

    #[test]
    fn no_region_is_too_large() {
        node([0., -3e38, -3e38, 3e38, 3e38], [1, 1]).gives([f32s(&[1, 1, 1, 1], &[19.])]);
        node([0., f32::NAN, 0., 1., 1.], [1, 1]).fails("region 0");
        node([1., 0., 0., 1., 1.], [1, 1]).fails("there are 1 images");
        node([0., 0., 0., 1., 1.], [1 << 30, 1 << 30]).fails("resource limit");
        node([0., 0., 0., 1., 1.], [0, 1]).fails("a height and a width");
    }
}
