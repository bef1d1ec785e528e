//! Convolution whose window is bent by its inputs.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window, WindowAxis,
    conv::{differ, infer_shape},
    indices, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Tensor, Value};

/// `Y[p] = B + Σ W[k] · mask[k, p] · X(p·stride − pad + k·dilation + offset[k, p])`, with `X` linear between its elements and zero outside (Zhu et
/// al., Deformable ConvNets v2, 2019). Inputs: `X [n, c, …]`, `W [m, c/group, …]`, `offset [n, offset_group · Π kernel · axes, …]` (of each
/// kernel element one number per axis), optional `B [m]` and `mask [n, offset_group · Π kernel, …]`.
#[derive(Clone, Debug, PartialEq)]
pub struct DeformConv {
    pub window: Window,
    pub group: usize,
    /// Channels of `X` are divided into as many groups with an offset and mask of their own each.
    pub offset_group: usize,
}

impl Operator for DeformConv {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=5)?;
        if node.has_attribute("auto_pad") {
            return Err(node.corrupt("has attribute 'auto_pad', which it does not define"));
        }
        let window = Window::read(node)?;
        let (group, offset_group) = (node.count("group", 1)?, node.count("offset_group", 1)?);
        Ok(DeformConv { window, group, offset_group }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = self.window.spell(Spelling::new("DeformConv"));
        spelling.with("group", self.group as i64).with("offset_group", self.offset_group as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, w) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.tensor(2)?;
        (1..inputs.len()).try_for_each(|index| inputs.same_dtype(0, index))?;
        let shape = infer_shape(&self.window, self.group, x, w, inputs.optional_tensor(3)?)?;
        if let (Some(xs), Some(ws), Some(shape)) = (&x.shape, &w.shape, &shape) {
            if xs[1].as_const().is_some_and(|c| c % self.offset_group as i64 != 0) {
                return Err(OpError::input(format!(
                    "{} channels do not divide into {} groups",
                    xs[1], self.offset_group
                )));
            }
            let taps = ws[2..].iter().fold(Dim::from(self.offset_group), |taps, extent| taps * extent.clone());
            let axes = Dim::from(ws.len() - 2);
            for (index, channels) in [(2, taps.clone() * axes), (4, taps)] {
                let expected: Vec<&Dim> = [&xs[0], &channels].into_iter().chain(&shape[2..]).collect();
                if let Some(fact) = inputs.optional_tensor(index)?
                    && let Some(dims) = &fact.shape
                    && (dims.len() != expected.len() || dims.iter().zip(&expected).any(|(a, b)| differ(a, b)))
                {
                    return Err(OpError::input(format!("input {index} must be {expected:?}, got {fact}")));
                }
            }
        }
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, w, offset) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let (bias, mask) = (inputs.optional_tensor(3)?, inputs.optional_tensor(4)?);
        // The definition's checks, on shapes that are all known here.
        let facts = [Some(x), Some(w), Some(offset), bias, mask];
        let facts = facts.map(|tensor| tensor.map(|t| Fact::from(TensorFact::of_constant_shape(t.dtype(), t.shape()))));
        let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
        self.infer(Facts(&facts), &InferContext { node: "", outputs: 1 })?;
        let axes = self.window.axes(&x.shape()[2..], &w.shape()[2..])?;
        let (n, m) = (x.shape()[0], w.shape()[0]);
        let to: Shape = [n, m].into_iter().chain(axes.iter().map(|axis| axis.output)).collect();
        let mut y = vec![0.0; context.bounded_len(&to)?];
        if y.is_empty() {
            return Ok(vec![Tensor::zeros(x.dtype(), to)?.into()]);
        }
        if x.shape()[1] == 0 {
            let bias = bias.map(Wide::floats).transpose()?.unwrap_or_else(|| vec![0.0; m]);
            let plane = y.len() / (n * m);
            y.chunks_exact_mut(plane).zip(bias.iter().cycle()).for_each(|(y, bias)| y.fill(*bias));
            return Ok(vec![Wide::Float(y).narrow(x.dtype(), to)?.into()]);
        }
        let sampler = Sampler::new(self.offset_group, x, offset, mask, &axes)?;
        let weights = Wide::floats(w)?;
        let bias = bias.map(Wide::floats).transpose()?;
        let (channels, places) = (x.shape()[1], sampler.places);
        // Of one place, all channels' samples.
        let mut samples = vec![0.0; channels * sampler.taps];
        let of_group = samples.len() / self.group;
        for batch in 0..n {
            for (place, index) in indices(&to[2..]).enumerate() {
                sampler.sample(&axes, batch, (place, &index), &mut samples);
                for output in 0..m {
                    let group = output / (m / self.group);
                    let weights = weights[output * of_group..][..of_group].iter();
                    let sum: f64 = weights.zip(&samples[group * of_group..]).map(|(w, x)| w * x).sum();
                    y[(batch * m + output) * places + place] = sum + bias.as_ref().map_or(0.0, |bias| bias[output]);
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(x.dtype(), to)?.into()])
    }
}

/// `X` between its elements.
struct Sampler {
    x: Vec<f64>,
    offset: Vec<f64>,
    mask: Option<Vec<f64>>,
    extents: Vec<usize>,
    strides: Vec<usize>,
    plane: usize,
    channels: usize,
    offset_group: usize,
    taps: usize,
    /// Elements of a plane of the result.
    places: usize,
    kernel: Vec<Vec<usize>>,
}

impl Sampler {
    fn new(
        offset_group: usize,
        x: &Tensor,
        offset: &Tensor,
        mask: Option<&Tensor>,
        axes: &[WindowAxis],
    ) -> Result<Sampler, OpError> {
        let extents = x.shape()[2..].to_vec();
        let kernel: Vec<usize> = axes.iter().map(|axis| axis.kernel).collect();
        let kernel: Vec<Vec<usize>> = indices(&kernel).collect();
        Ok(Sampler {
            x: Wide::floats(x)?,
            offset: Wide::floats(offset)?,
            mask: mask.map(Wide::floats).transpose()?,
            strides: movement::strides(&extents),
            plane: extents.iter().product(),
            extents,
            channels: x.shape()[1],
            offset_group,
            taps: kernel.len(),
            places: axes.iter().map(|axis| axis.output).product(),
            kernel,
        })
    }

    /// What the window at `index`, the result's element `place` of its plane, sees: channel after channel.
    fn sample(&self, axes: &[WindowAxis], batch: usize, (place, index): (usize, &[usize]), samples: &mut [f64]) {
        let of_group = self.channels / self.offset_group;
        let rank = axes.len();
        let mut position = vec![0.0; rank];
        for group in 0..self.offset_group {
            for (tap, kernel) in self.kernel.iter().enumerate() {
                let tap_of_all = (batch * self.offset_group + group) * self.taps + tap;
                for (at, axis) in axes.iter().enumerate() {
                    let offset = self.offset[(tap_of_all * rank + at) * self.places + place];
                    let regular = (index[at] * axis.stride + kernel[at] * axis.dilation) as f64;
                    position[at] = regular - axis.pad_begin as f64 + offset;
                }
                let mask = self.mask.as_ref().map_or(1.0, |mask| mask[tap_of_all * self.places + place]);
                for channel in group * of_group..(group + 1) * of_group {
                    let plane = &self.x[(batch * self.channels + channel) * self.plane..][..self.plane];
                    samples[channel * self.taps + tap] = mask * self.between(plane, &position);
                }
            }
        }
    }

    /// `plane` at `position`, from the elements round it that there are.
    fn between(&self, plane: &[f64], position: &[f64]) -> f64 {
        let Some((&at, rest)) = position.split_first() else { return plane[0] };
        let axis = self.extents.len() - position.len();
        if !at.is_finite() {
            return 0.0;
        }
        let low = at.floor();
        let corner = |at: f64, weight: f64| match at >= 0.0 && at < self.extents[axis] as f64 && weight != 0.0 {
            true => weight * self.between(&plane[at as usize * self.strides[axis]..], rest),
            false => 0.0,
        };
        corner(low, 1.0 - (at - low)) + corner(low + 1.0, at - low)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s};

    fn node(offset: [f32; 8]) -> Case {
        let x = f32s(&[1, 1, 3, 3], &[0., 1., 2., 3., 4., 5., 6., 7., 8.]);
        case("DeformConv", 19)
            .input(x)
            .input(f32s(&[1, 1, 2, 2], &[1., 2., 3., 4.]))
            .input(f32s(&[1, 8, 1, 1], &offset))
    }

    fn corners(node: Case) -> Case {
        node.with("strides", vec![2i64, 2])
    }

    #[test]
    fn agrees_with_torchvision() {
        corners(node([0.; 8])).gives([f32s(&[1, 1, 1, 1], &[27.])]);
        // Half a pixel down; a quarter to the left, half of it beside the map; far outside.
        corners(node([0.5, 0., 0., -1.25, 0., 0., 0., 9.])).gives([f32s(&[1, 1, 1, 1], &[10.5])]);
        let masked = corners(node([0.; 8])).input(f32s(&[1], &[10.])).input(f32s(&[1, 4, 1, 1], &[1., 0., 0.5, 0.]));
        masked.gives([f32s(&[1, 1, 1, 1], &[14.5])]);
        corners(node([f32::NAN; 8])).gives([f32s(&[1, 1, 1, 1], &[0.])]);
    }

    #[test]
    fn groups_and_lines() {
        let x = f32s(&[1, 2, 3], &[1., 2., 3., 10., 20., 30.]);
        let w = f32s(&[2, 1, 2], &[1., 1., 1., 1.]);
        let offset = f32s(&[1, 4, 2], &[0., 0., 0., 0., 1., 1., 0., 0.5]);
        let node = case("DeformConv", 22).with("group", 2).with("offset_group", 2).input(x).input(w).input(offset);
        node.gives([f32s(&[1, 2, 2], &[3., 5., 40., 45.])]);
    }

    #[test]
    fn refuses_offsets_of_another_shape() {
        node([0.; 8]).fails("input 2 must be [1, 8, 2, 2]");
        corners(node([0.; 8])).with("offset_group", 2).fails("do not divide into 2 groups");
    }
}
