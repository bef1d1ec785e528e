//! Regions of feature maps at one size, sampled between pixels.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, gather};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs `x [n, c, h, w]`, `regions [r, 4]` (x, y, x, y) and `batch_indices [r]`: `[r, c, height, width]`. A region is divided into
/// `height × width` bins, each of which is sampled bilinearly at a grid of points (He et al., Mask R-CNN, 2017).
#[derive(Clone, Debug, PartialEq)]
pub struct RoiAlign {
    /// The largest weighted pixel of all samples; without it the samples' mean.
    pub maximum: bool,
    pub height: usize,
    pub width: usize,
    /// Points per side of a bin; 0 for one per pixel that the bin covers.
    pub sampling_ratio: usize,
    pub spatial_scale: f32,
    /// Pixels have their centre at half coordinates; without it at whole ones, and a region has at least one pixel a side.
    pub half_pixel: bool,
}

/// One axis of a region.
#[derive(Clone, Copy)]
struct Side {
    start: f64,
    bin: f64,
    /// Samples per bin.
    samples: usize,
}

/// Two pixels of an axis between which a sample lies, and the weight of each.
type Between = [(usize, f64); 2];

impl Side {
    fn sample(&self, bin: usize, sample: usize) -> f64 {
        self.start + bin as f64 * self.bin + (sample as f64 + 0.5) * self.bin / self.samples as f64
    }

    /// The samples of a bin that lie on the map, which ends one pixel beyond its first and last; all others are zero.
    fn on_map(&self, bin: usize, extent: usize) -> Vec<Between> {
        let (origin, step) = (self.start + bin as f64 * self.bin, self.bin / self.samples as f64);
        if !origin.is_finite() || !step.is_finite() {
            return Vec::new();
        }
        // Samples that don't advance are all at one place. One more at either end covers the rounding.
        let position = |at: f64| if step == 0.0 { f64::INFINITY } else { (at - origin) / step - 0.5 };
        let ends = [position(-1.0), position(extent as f64)];
        let first = if step == 0.0 { 0.0 } else { ends[0].min(ends[1]).floor() - 1.0 };
        let last = ends[0].max(ends[1]).ceil() + 1.0;
        let range = first.max(0.0) as usize..(last.max(-1.0) + 1.0).min(self.samples as f64) as usize;
        let points = range.map(|sample| self.sample(bin, sample));
        points.filter(|&at| at >= -1.0 && at <= extent as f64).map(|at| between(at, extent)).collect()
    }
}

fn between(at: f64, extent: usize) -> Between {
    let at = at.max(0.0);
    let low = at as usize;
    if low >= extent - 1 {
        return [(extent - 1, 1.0), (extent - 1, 0.0)];
    }
    let fraction = at - low as f64;
    [(low, 1.0 - fraction), (low + 1, fraction)]
}

impl RoiAlign {
    /// Where the first of `bins` bins between two coordinates of a region starts on the map, how long each is, and its samples.
    pub fn side(&self, start: f64, end: f64, bins: usize) -> (f64, f64, usize) {
        let offset = if self.half_pixel { 0.5 } else { 0.0 };
        let scale = f64::from(self.spatial_scale);
        let (start, end) = (start * scale - offset, end * scale - offset);
        let length = if self.half_pixel { end - start } else { (end - start).max(1.0) };
        let bin = length / bins as f64;
        let samples = if self.sampling_ratio > 0 { self.sampling_ratio } else { bin.ceil() as usize };
        (start, bin, samples)
    }

    fn pool(&self, plane: &[f64], width: usize, rows: &[Between], columns: &[Between], samples: usize) -> f64 {
        // A sample that is not on the map is zero.
        let mut result = if self.maximum && rows.len() * columns.len() == samples { f64::NEG_INFINITY } else { 0.0 };
        for (row, column) in rows.iter().flat_map(|row| columns.iter().map(move |column| (row, column))) {
            for ((y, by_row), (x, by_column)) in row.iter().flat_map(|y| column.iter().map(move |x| (y, x))) {
                let value = by_row * by_column * plane[y * width + x];
                result = if self.maximum { result.max(value) } else { result + value };
            }
        }
        match self.maximum {
            true if samples == 0 => 0.0,
            true => result,
            false => result / samples.max(1) as f64,
        }
    }
}

impl Operator for RoiAlign {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        let maximum = match node.string("mode", "avg")?.as_str() {
            "avg" => false,
            "max" => true,
            other => return Err(node.corrupt(format!("attribute 'mode' must be avg or max, got '{other}'"))),
        };
        let default = if node.opset < 16 { "output_half_pixel" } else { "half_pixel" };
        let half_pixel = match node.string("coordinate_transformation_mode", default)?.as_str() {
            "half_pixel" => true,
            "output_half_pixel" => false,
            other => {
                let name = "coordinate_transformation_mode";
                return Err(
                    node.corrupt(format!("attribute '{name}' must be half_pixel or output_half_pixel, got '{other}'"))
                );
            }
        };
        let sampling_ratio = node.int("sampling_ratio", 0)?.clamp(0, i64::from(i32::MAX)) as usize;
        let (height, width) = (node.count("output_height", 1)?, node.count("output_width", 1)?);
        let spatial_scale = node.float("spatial_scale", 1.0)?;
        Ok(RoiAlign { maximum, height, width, sampling_ratio, spatial_scale, half_pixel }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("RoiAlign")
            .with("mode", if self.maximum { "max" } else { "avg" })
            .with("coordinate_transformation_mode", if self.half_pixel { "half_pixel" } else { "output_half_pixel" })
            .with("output_height", self.height as i64)
            .with("output_width", self.width as i64)
            .with("sampling_ratio", self.sampling_ratio as i64)
            .with("spatial_scale", self.spatial_scale)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, regions, batches) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        gather::check_indices(batches)?;
        inputs.same_dtype(0, 1)?;
        for (fact, rank, expected) in [(x, 4, "[n, c, h, w]"), (regions, 2, "[regions, 4]"), (batches, 1, "[regions]")]
        {
            if fact.rank().is_some_and(|actual| actual != rank) {
                return Err(OpError::input(format!("expected {expected}, got {fact}")));
            }
        }
        let extent = |fact: &TensorFact, axis: usize, name: &str| {
            fact.shape.as_ref().map_or_else(|| context.fresh(name), |shape| shape[axis].clone())
        };
        // Either input says how many regions there are; a number says more than a symbol.
        let count = match extent(regions, 0, "regions") {
            Dim::Const(count) => Dim::Const(count),
            count => Some(extent(batches, 0, "regions")).filter(|b| b.as_const().is_some()).unwrap_or(count),
        };
        let dims = vec![count, extent(x, 1, "channels"), self.height.into(), self.width.into()];
        Ok(vec![TensorFact::new(x.dtype, dims).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, regions) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let batches = inputs.integers(2)?;
        let (&[n, channels, height, width], &[count, 4]) = (x.shape().dims(), regions.shape().dims()) else {
            let (x, regions) = (x.shape(), regions.shape());
            return Err(OpError::input(format!("expected [n, c, h, w] and [regions, 4], got {x} and {regions}")));
        };
        if batches.len() != count {
            return Err(OpError::input(format!("{} batch indices for {count} regions", batches.len())));
        }
        let to = [count, channels, self.height, self.width];
        let len = context.bounded_len(&to)?;
        // What is asked for by attributes alone must stay within what a result may have.
        let ratio = self.sampling_ratio.max(1);
        context.bounded_len(&[count, channels, self.height, self.width, ratio, ratio])?;
        let (map, dtype) = (Wide::floats(x)?, x.dtype());
        let regions = Wide::floats(regions)?;
        let plane = height * width;
        let mut y = vec![0.0; len];
        if len == 0 || plane == 0 {
            return Ok(vec![Tensor::zeros(dtype, to)?.into()]);
        }
        for (region, (corners, &batch)) in regions.chunks_exact(4).zip(&batches).enumerate() {
            let batch = usize::try_from(batch).ok().filter(|&batch| batch < n);
            let batch =
                batch.ok_or_else(|| OpError::input(format!("region {region} is of an image outside 0 to {n}")))?;
            let side = |start: usize, bins: usize| {
                let (start, bin, samples) = self.side(corners[start], corners[start + 2], bins);
                Side { start, bin, samples }
            };
            let (rows, columns) = (side(1, self.height), side(0, self.width));
            let samples = rows.samples.saturating_mul(columns.samples);
            let column_samples: Vec<Vec<Between>> = (0..self.width).map(|bin| columns.on_map(bin, width)).collect();
            for bin_y in 0..self.height {
                let row_samples = rows.on_map(bin_y, height);
                for (bin_x, column_samples) in column_samples.iter().enumerate() {
                    for channel in 0..channels {
                        let map = &map[(batch * channels + channel) * plane..][..plane];
                        let at = ((region * channels + channel) * self.height + bin_y) * self.width + bin_x;
                        y[at] = self.pool(map, width, &row_samples, column_samples, samples);
                    }
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(dtype, to)?.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor, wave};

    fn node(opset: i64, height: i64, width: i64, ratio: i64) -> Case {
        let regions = [[0., 0., 3., 3.], [1., 1., 2., 4.], [-5., 0., 9., 2.], [2., 2., 1., 1.]];
        case("RoiAlign", opset)
            .with("output_height", height)
            .with("output_width", width)
            .with("sampling_ratio", ratio)
            .input(wave(&[1, 2, 4, 4], 0))
            .input(f32s(&[4, 4], regions.as_flattened()))
            .input(tensor::<i64>(&[4], &[0; 4]))
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let halves = [
            -0.683105, -0.302734, -0.183105, 0.197266, -0.507812, -0.113281, -0.007812, 0.386719, -0.03125, 0.070312,
            -0.125, -0.195312, -0.507812, -0.710938, -0.007812, -0.210938,
        ];
        node(16, 2, 1, 2).with("spatial_scale", 0.5f32).gives([f32s(&[4, 2, 2, 1], &halves)]);
        let whole = [
            -0.09375, 0.182292, 0.320312, -0.320312, 0.083333, 0.5, 0.125, -0.375, -0.080357, 0.022321, 0.035714,
            -0.080357, 0.25, -0.25, -0.28125, -0.09375,
        ];
        let output_half = |case: Case| case.with("coordinate_transformation_mode", "output_half_pixel");
        output_half(node(16, 1, 2, 0)).gives([f32s(&[4, 2, 1, 2], &whole)]);
        let old = [0.1875, 0.0, 0.3125, 0.125, 1.0, -1.25, 0.0, -0.1875];
        node(10, 1, 1, 1).gives([f32s(&[4, 2, 1, 1], &old)]);
    }

    #[test]
    fn largest_agrees_with_onnx_runtime() {
        let expected =
            [0.46875, 0.875, 0.78125, 0.78125, 0.5625, 0.5625, 0.9375, 0.9375, 0.5, 1.25, 1., 0.5, 0., 0., 0., 0.];
        node(16, 1, 2, 0).with("mode", "max").gives([f32s(&[4, 2, 1, 2], &expected)]);
    }

    #[test]
    fn no_region_is_too_large_to_sample() {
        let node = |corners: [f32; 4]| {
            let node = case("RoiAlign", 16).input(f32s(&[1, 1, 2, 2], &[1., 1., 1., 1.]));
            node.input(f32s(&[1, 4], &corners)).input(tensor::<i64>(&[1], &[0]))
        };
        // All but the samples on the map are zero.
        node([-1e30, -1e30, 1e30, 1e30]).gives([f32s(&[1, 1, 1, 1], &[0.0])]);
        node([0., 0., f32::INFINITY, 1.]).gives([f32s(&[1, 1, 1, 1], &[0.0])]);
        node([f32::NAN, 0., 1., 1.]).gives([f32s(&[1, 1, 1, 1], &[0.0])]);
        node([0., 0., 1., 1.]).with("sampling_ratio", i64::MAX).fails("resource limit");
    }

    #[test]
    fn refuses_images_that_are_not_there() {
        let node = case("RoiAlign", 16).wave(&[1, 1, 2, 2]).wave(&[1, 4]).input(tensor::<i64>(&[1], &[1]));
        node.fails("region 0 is of an image outside 0 to 1");
        case("RoiAlign", 16)
            .wave(&[1, 1, 2, 2])
            .wave(&[2, 4])
            .input(tensor::<i64>(&[1], &[0]))
            .fails("1 batch indices");
    }
}
