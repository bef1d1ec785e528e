//! Sampling at given places.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ, resize::cubic,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// `X [n, c, …]` sampled at `grid [n, …, s]` to `[n, c, …]` with the grid's extents. Each of the grid's `s` coordinates, the last
/// spatial axis first, is −1 at the first element of its axis and 1 at the last.
#[derive(Clone, Debug, PartialEq)]
pub struct GridSample {
    pub mode: GridSampleMode,
    pub padding: GridSamplePadding,
    /// −1 and 1 are the centres of the outermost elements, not their outer edges.
    pub align_corners: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GridSampleMode {
    Nearest,
    Linear,
    Cubic,
}

/// What lies outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GridSamplePadding {
    Zeros,
    Border,
    Reflection,
}

/// Of the cubic filter, as the specification fixes it.
const CUBIC_COEFFICIENT: f64 = -0.75;

impl Operator for GridSample {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=2)?;
        let mode = match node.string("mode", "linear")?.as_str() {
            "nearest" => GridSampleMode::Nearest,
            "linear" | "bilinear" => GridSampleMode::Linear,
            "cubic" | "bicubic" => GridSampleMode::Cubic,
            other => return Err(node.corrupt(format!("mode '{other}' is not defined"))),
        };
        let padding = match node.string("padding_mode", "zeros")?.as_str() {
            "zeros" => GridSamplePadding::Zeros,
            "border" => GridSamplePadding::Border,
            "reflection" => GridSamplePadding::Reflection,
            other => return Err(node.corrupt(format!("padding_mode '{other}' is not defined"))),
        };
        Ok(GridSample { mode, padding, align_corners: node.flag("align_corners", false)? }.into())
    }

    fn export(&self) -> Spelling {
        let mode = match self.mode {
            GridSampleMode::Nearest => "nearest",
            GridSampleMode::Linear => "linear",
            GridSampleMode::Cubic => "cubic",
        };
        let padding = match self.padding {
            GridSamplePadding::Zeros => "zeros",
            GridSamplePadding::Border => "border",
            GridSamplePadding::Reflection => "reflection",
        };
        let spelling = Spelling::new("GridSample").with("mode", mode).with("padding_mode", padding);
        spelling.with("align_corners", i64::from(self.align_corners))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, grid) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let shape = match (&x.shape, &grid.shape) {
            (Some(xs), Some(gs)) => {
                let rank = xs.len();
                let fits = rank >= 3
                    && gs.len() == rank
                    && !differ(&gs[rank - 1], &Dim::from(rank - 2))
                    && !differ(&gs[0], &xs[0]);
                if !fits {
                    return Err(OpError::input(format!(
                        "expected [n, c, …] and a grid [n, …, axes], got {x} and {grid}"
                    )));
                }
                let mut shape = xs[..2].to_vec();
                shape.extend_from_slice(&gs[1..rank - 1]);
                Some(shape)
            }
            _ => None,
        };
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, grid) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (xs, gs) = (x.shape(), grid.shape());
        let rank = xs.rank();
        if rank < 3 || gs.rank() != rank || gs[rank - 1] != rank - 2 || gs[0] != xs[0] {
            return Err(OpError::input(format!("expected [n, c, …] and a grid [n, …, axes], got {xs} and {gs}")));
        }
        let output: Shape = xs[..2].iter().chain(&gs[1..rank - 1]).copied().collect();
        let mut y = vec![0.0; context.bounded_len(&output)?];
        let spatial = &xs[2..];
        let (from, to) = (spatial.iter().product::<usize>(), output[2..].iter().product::<usize>());
        if y.is_empty() {
            return Ok(vec![Wide::Float(y).narrow(x.dtype(), output)?.into()]);
        }
        if from == 0 {
            return Err(OpError::input(format!("there is nothing in {xs} to sample")));
        }
        let (values, places) = (Wide::floats(x)?, Wide::floats(grid)?);
        let channels = xs[1];
        for (index, place) in places.chunks_exact(rank - 2).enumerate() {
            let (n, within) = (index / to, index % to);
            // Every combination of one tap per axis: its offset in a plane, and the product of the weights.
            let mut taps = vec![(0usize, 1.0)];
            for (axis, &extent) in spatial.iter().enumerate() {
                let along = self.taps(place[rank - 3 - axis], extent);
                let combine = |&(offset, weight): &(usize, f64)| {
                    let along = along.iter();
                    along.map(move |&(i, w)| (offset * extent + i, weight * w)).collect::<Vec<_>>()
                };
                taps = taps.iter().flat_map(combine).collect();
            }
            for c in 0..channels {
                let plane = &values[(n * channels + c) * from..][..from];
                y[(n * channels + c) * to + within] = taps.iter().map(|&(i, weight)| plane[i] * weight).sum();
            }
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), output)?.into()])
    }
}

impl GridSample {
    /// The elements of an axis that `place` is made of, and their weights; none where only zeros are there.
    fn taps(&self, place: f64, extent: usize) -> Vec<(usize, f64)> {
        let last = extent as f64 - 1.0;
        let (low, high) = if self.align_corners { (0.0, last) } else { (-0.5, last + 0.5) };
        let mut x = match self.align_corners {
            true => (place + 1.0) / 2.0 * last,
            false => ((place + 1.0) * extent as f64 - 1.0) / 2.0,
        };
        if self.mode == GridSampleMode::Nearest {
            x = x.round_ties_even();
        }
        if !(low..=high).contains(&x) {
            match self.padding {
                GridSamplePadding::Zeros => {}
                // The elements a cubic is made of are clamped one by one below, not its place.
                GridSamplePadding::Border if self.mode == GridSampleMode::Cubic => {}
                GridSamplePadding::Border => x = x.clamp(0.0, last),
                GridSamplePadding::Reflection => x = reflect(x, low, high),
            }
        }
        let first = x.floor();
        let taps: Vec<(f64, f64)> = match self.mode {
            GridSampleMode::Nearest => vec![(x, 1.0)],
            GridSampleMode::Linear => vec![(first, 1.0 - (x - first)), (first + 1.0, x - first)],
            GridSampleMode::Cubic => (-1..3)
                .map(|i| (first + f64::from(i), cubic((x - first - f64::from(i)).abs(), CUBIC_COEFFICIENT)))
                .collect(),
        };
        let inside = |(at, weight): (f64, f64)| {
            let at = match self.padding {
                GridSamplePadding::Zeros => (0.0..=last).contains(&at).then_some(at)?,
                GridSamplePadding::Border => at.clamp(0.0, last),
                GridSamplePadding::Reflection if (0.0..=last).contains(&at) => at,
                GridSamplePadding::Reflection => reflect(at, low, high).clamp(0.0, last),
            };
            // A cast of NaN gives 0.
            Some((at as usize, weight))
        };
        taps.into_iter().filter_map(inside).collect()
    }
}

/// `x` mirrored at `low` and `high` until it lies between them.
fn reflect(x: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 {
        return low;
    }
    let beyond = if x < low { low - x } else { x - high };
    if beyond < 0.0 {
        return x;
    }
    let (turns, rest) = ((beyond / range).floor(), beyond % range);
    match (x < low, turns % 2.0 == 0.0) {
        (true, true) | (false, false) => low + rest,
        (true, false) | (false, true) => high - rest,
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("GridSample", 20)
            .with("mode", "linear")
            .wave(&[1, 1, 2, 3])
            .wave(&[1, 2, 2, 2])
            .gives([f32s(&[1, 1, 2, 2], &[0.25, 0.09375, -0.3125, 0.46875])]);
        case("GridSample", 20)
            .with("mode", "nearest")
            .with("padding_mode", "border")
            .wave(&[1, 2, 2, 2])
            .wave(&[1, 1, 3, 2])
            .gives([f32s(&[1, 2, 1, 3], &[-0.5, 0.5, 0.5, 1.0, -0.75, -0.75])]);
        case("GridSample", 20)
            .with("mode", "cubic")
            .with("padding_mode", "reflection")
            .with("align_corners", 1)
            .wave(&[1, 1, 3, 3])
            .wave(&[1, 2, 2, 2])
            .gives([f32s(&[1, 1, 2, 2], &[0.766388, 0.366245, -0.75, 1.11816])]);
        // A cubic clamps the elements it is made of, not its place.
        case("GridSample", 16)
            .with("mode", "bicubic")
            .with("padding_mode", "border")
            .with("align_corners", 1)
            .wave(&[1, 1, 3, 3])
            .input(f32s(&[1, 1, 3, 2], &[1.2, 0.3, -1.3, -1.1, 0.1, 1.5]))
            .gives([f32s(&[1, 1, 1, 3], &[-0.9433129, -1.6132312, -0.16618769])]);
        case("GridSample", 16)
            .with("mode", "bilinear")
            .with("padding_mode", "reflection")
            .wave(&[1, 1, 2, 2])
            .wave(&[1, 1, 3, 2])
            .gives([f32s(&[1, 1, 1, 3], &[-0.5, 0.0625, 0.875])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("GridSample", 20).wave(&[1, 1, 2, 3]).wave(&[1, 2, 2, 3]).fails("a grid [n, …, axes]");
    }
}
