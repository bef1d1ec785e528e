//! The mean over axes, from quantized values to quantized values.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Reduce, ReduceFunction, Spelling,
    qlinear::{DOMAIN, Quantized, Target, fact, quantized_fact, target_dtype},
};
use crate::{Fact, ImportError, OpError};
use cutover_tensor::{Tensor, Value};

/// `Y = quantize(mean(dequantize(X)))` over `axes` (all, where there are none), with f32 in between. Inputs `X`, its scale and zero point,
/// the scale and zero point of `Y`; zero points may be omitted.
#[derive(Clone, Debug, PartialEq)]
pub struct QLinearReduceMean {
    pub axes: Vec<i64>,
    /// Reduced axes stay, of extent 1.
    pub keep_dims: bool,
}

impl Operator for QLinearReduceMean {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=5)?;
        let axes = node.optional_ints("axes")?.unwrap_or_default();
        Ok(QLinearReduceMean { axes, keep_dims: node.flag("keepdims", true)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("QLinearReduceMean").in_domain(DOMAIN);
        spelling.with("axes", self.axes.clone()).with("keepdims", i64::from(self.keep_dims))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        quantized_fact(inputs, 0)?;
        let dtype = target_dtype(inputs, 3, 0)?;
        let axes: Fact = crate::TensorFact::of_tensor(&self.axes()?).into();
        let y = self.reduce().infer(Facts(&[inputs.get(0), Some(&axes)]), context)?;
        Ok(fact(dtype, Facts(&[y.first()]).tensor(0)?.shape.clone()))
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let x = Quantized::read(inputs, 0)?;
        let target = Target::read(inputs, 3, x.tensor.dtype())?;
        let (floats, axes) = (x.dequantize()?.into(), self.axes()?.into());
        let y = self.reduce().eval(Inputs(&[Some(&floats), Some(&axes)]), context)?;
        let y = [y.first()];
        let y = Inputs(&y).tensor(0)?;
        let steps = y.to_vec::<f32>()?.into_iter().map(|y| target.quantize(y)).collect();
        Ok(vec![target.tensor(steps, y.shape().clone())?.into()])
    }
}

impl QLinearReduceMean {
    fn reduce(&self) -> Reduce {
        Reduce { function: ReduceFunction::Mean, keep_dims: self.keep_dims, noop_with_empty_axes: false }
    }

    fn axes(&self) -> Result<Tensor, OpError> {
        Ok(Tensor::from_vec([self.axes.len()], self.axes.clone())?)
    }
}
