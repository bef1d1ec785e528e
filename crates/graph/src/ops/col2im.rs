//! Blocks of columns back into images.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, Window, WindowAxis, movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Tensor, Value};

/// Inputs `x [n, c · Π block, blocks]`, the image's spatial extents and the block's: an image `[n, c, …]` in which every element is the sum of
/// the columns' elements that a window over it would have taken from there.
#[derive(Clone, Debug, PartialEq)]
pub struct Col2Im {
    pub window: Window,
}

impl Col2Im {
    /// `x`, the image and the block must agree: channels, and an axis of the window for each of the image.
    fn geometry(&self, x: [usize; 3], image: &[i64], block: &[i64]) -> Result<(usize, Vec<WindowAxis>), OpError> {
        let extents = |values: &[i64], least: i64| -> Result<Vec<usize>, OpError> {
            let wrong = values.iter().find(|&&v| v < least || v > i64::from(i32::MAX));
            match wrong {
                Some(v) => Err(OpError::input(format!("an extent of {v}"))),
                None => Ok(values.iter().map(|&v| v as usize).collect()),
            }
        };
        let (image, block) = (extents(image, 0)?, extents(block, 1)?);
        let axes = self.window.axes(&image, &block)?;
        let taps = Shape::new(&block).checked_len();
        let blocks = Shape::new(&axes.iter().map(|axis| axis.output).collect::<Vec<_>>()).checked_len();
        let [_, columns, count] = x;
        match taps.filter(|taps| columns % taps == 0) {
            Some(taps) if blocks == Some(count) => Ok((columns / taps, axes)),
            _ => Err(OpError::input(format!(
                "{columns} rows of {count} columns are no blocks of {block:?} of an image of {image:?}"
            ))),
        }
    }
}

impl Operator for Col2Im {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        let (kernel, automatic) = (node.has_attribute("kernel_shape"), node.has_attribute("auto_pad"));
        if kernel || automatic {
            return Err(node.corrupt("has attribute 'kernel_shape' or 'auto_pad', which it does not define"));
        }
        Ok(Col2Im { window: Window::read(node)? }.into())
    }

    fn export(&self) -> Spelling {
        self.window.spell(Spelling::new("Col2Im"))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.rank().is_some_and(|rank| rank != 3) {
            return Err(OpError::input(format!("expected [n, c · block, blocks], got {x}")));
        }
        let (image, block) = (movement::known_integers(inputs, 1)?, movement::known_integers(inputs, 2)?);
        let shape = x.constant_shape();
        if let (Some(&[n, columns, blocks]), Some(image), Some(block)) = (shape.as_deref(), &image, &block) {
            self.geometry([n, columns, blocks], image, block)?;
        }
        let spatial = match (&inputs.tensor(1)?.value, inputs.tensor(1)?.constant_count()) {
            (Some(value), _) => Some(value.clone()),
            (None, Some(rank)) if rank <= TensorFact::VALUE_LIMIT => {
                Some((0..rank).map(|axis| context.fresh(&format!("axis{axis}"))).collect())
            }
            _ => None,
        };
        let Some(spatial) = spatial else { return Ok(vec![TensorFact::unknown_rank(x.dtype).into()]) };
        let taps = block.and_then(|block| block.into_iter().try_fold(1i64, |taps, extent| taps.checked_mul(extent)));
        let dims = x.shape.as_ref();
        let channels = dims.zip(taps.filter(|&taps| taps > 0)).map(|(dims, taps)| dims[1].floor_div(&Dim::Const(taps)));
        let n = dims.map_or_else(|| context.fresh("n"), |dims| dims[0].clone());
        let shape = [vec![n, channels.unwrap_or_else(|| context.fresh("channels"))], spatial].concat();
        Ok(vec![TensorFact::new(x.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = inputs.tensor(0)?;
        let &[n, columns, blocks] = x.shape().dims() else {
            return Err(OpError::input(format!("expected [n, c · block, blocks], got {x:?}")));
        };
        let (image, block) = (inputs.integers(1)?, inputs.integers(2)?);
        let (channels, axes) = self.geometry([n, columns, blocks], &image, &block)?;
        let to: Vec<usize> = [n, channels].into_iter().chain(axes.iter().map(|axis| axis.input)).collect();
        context.bounded_len(&to)?;
        if x.element_count() == 0 {
            return Ok(vec![Tensor::zeros(x.dtype(), to)?.into()]);
        }
        let targets = targets(&axes);
        let plane: usize = to[2..].iter().product();
        let y = match Wide::of(x)? {
            Wide::Float(x) => Wide::Float(add(&x, &targets, plane, |y, x| *y += x)),
            Wide::Int(x) => Wide::Int(add(&x, &targets, plane, |y, x| *y = y.wrapping_add(x))),
            Wide::Bool(x) => Wide::Bool(add(&x, &targets, plane, |y, x| *y |= x)),
        };
        Ok(vec![y.narrow(x.dtype(), to)?.into()])
    }
}

/// For every element of a block, and every block, row-major: where in the image it lies, if not in the padding.
fn targets(axes: &[WindowAxis]) -> Vec<Option<usize>> {
    let mut all = (1, 1, vec![Some(0usize)]);
    for axis in axes {
        let (taps, blocks, before) = all;
        let mut targets = Vec::with_capacity(before.len() * axis.kernel * axis.output);
        for tap in 0..taps * axis.kernel {
            for block in 0..blocks * axis.output {
                let before = before[tap / axis.kernel * blocks + block / axis.output];
                let (tap, output) = (tap % axis.kernel, block % axis.output);
                let padded = output * axis.stride + tap * axis.dilation;
                let within = padded.checked_sub(axis.pad_begin).filter(|&at| at < axis.input);
                targets.push(before.zip(within).map(|(before, within)| before * axis.input + within));
            }
        }
        all = (taps * axis.kernel, blocks * axis.output, targets);
    }
    all.2
}

fn add<T: Copy + Default>(x: &[T], targets: &[Option<usize>], plane: usize, add: impl Fn(&mut T, T)) -> Vec<T> {
    let mut y = vec![T::default(); x.len() / targets.len() * plane];
    if plane > 0 {
        for (y, x) in y.chunks_exact_mut(plane).zip(x.chunks_exact(targets.len())) {
            for (&x, target) in x.iter().zip(targets) {
                if let Some(target) = target {
                    add(&mut y[*target], x);
                }
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};
    use cutover_tensor::Tensor;

    fn node(x: Tensor, image: &[i64], block: &[i64]) -> Case {
        let extents = |values: &[i64]| tensor::<i64>(&[values.len()], values);
        case("Col2Im", 18).input(x).input(extents(image)).input(extents(block))
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let x = || f32s(&[1, 4, 4], &[1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15., 16.]);
        let sums = [1., 7., 6., 12., 34., 22., 11., 27., 16.];
        node(x(), &[3, 3], &[2, 2]).gives([f32s(&[1, 1, 3, 3], &sums)]);
        let padded = node(x(), &[2, 2], &[2, 2]).with("strides", vec![2i64, 2]).with("pads", vec![1i64, 1, 1, 1]);
        padded.gives([f32s(&[1, 1, 2, 2], &[13., 10., 7., 4.])]);
        let dilated = node(x(), &[4, 4], &[2, 2]).with("dilations", vec![2i64, 2]);
        dilated.gives([f32s(&[1, 1, 4, 4], &DILATED)]);
        node(f32s(&[1, 2, 3], &[1., 2., 3., 4., 5., 6.]), &[4], &[2]).gives([f32s(&[1, 1, 4], &[1., 6., 8., 6.])]);
    }

    const DILATED: [f32; 16] = [1., 2., 5., 6., 3., 4., 7., 8., 9., 10., 13., 14., 11., 12., 15., 16.];

    #[test]
    fn refuses_blocks_that_do_not_cover_the_image() {
        let x = || f32s(&[1, 2, 3], &[0.; 6]);
        node(x(), &[5], &[2]).fails("no blocks of [2] of an image of [5]");
        node(x(), &[5], &[3]).fails("no blocks");
        node(x(), &[4], &[0]).fails("an extent of 0");
        node(x(), &[4, 4], &[2]).fails("the input has 2");
        node(x(), &[i64::MAX], &[2]).fails("an extent of");
    }
}
