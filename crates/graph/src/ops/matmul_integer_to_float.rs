//! Product of 8-bit matrices, as floats.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    matmul::{Product, infer_shape},
    matmul_integer::{Side, per_side, shifted},
    qlinear::{DOMAIN, scale},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `Y = a_scale · b_scale · (A − a_zero_point) · (B − b_zero_point) + bias`. Inputs `A`, `B`, `a_scale` (one), `b_scale` (one, or one for each
/// column), and, each optional, `a_zero_point`, `b_zero_point` (as their scales) and `bias`, one for each column. `Y` has the
/// scales' type. Sums of products are exact; ONNX Runtime's own saturate at 16 bits for signed `B` on x86 without VNNI.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulIntegerToFloat;

impl Operator for MatMulIntegerToFloat {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(4..=7)?;
        Ok(MatMulIntegerToFloat.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("MatMulIntegerToFloat").in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        inputs.same_dtype(0, 4)?;
        inputs.same_dtype(1, 5)?;
        inputs.same_dtype(2, 3)?;
        inputs.same_dtype(2, 6)?;
        let shape = infer_shape(inputs.tensor(0)?, inputs.tensor(1)?)?;
        Ok(vec![TensorFact { dtype: inputs.tensor(2)?.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let product = Product::new(a.shape(), b.shape())?;
        context.bounded_len(&product.output)?;
        let a = shifted(a, inputs.optional_tensor(4)?, Side::Rows)?;
        let b = shifted(b, inputs.optional_tensor(5)?, Side::Columns)?;
        let sums = product.apply(&a, &b);
        let dtype = inputs.tensor(2)?.dtype();
        let y = scaled(&product, sums, scale(inputs, 2)?, inputs.tensor(3)?, inputs.optional_tensor(6)?, dtype)?;
        Ok(vec![y.into()])
    }
}

/// `sums · a_scale · b_scale + bias`; `b_scale` and `bias` are one, or one for each column.
pub(super) fn scaled(
    product: &Product,
    sums: Vec<i64>,
    a_scale: f64,
    b_scale: &Tensor,
    bias: Option<&Tensor>,
    dtype: DType,
) -> Result<Tensor, OpError> {
    let b_scales = Wide::floats(b_scale)?;
    let sources = per_side(b_scale.shape(), &product.output, Side::Columns)?;
    let mut y: Vec<f64> = sums.iter().zip(sources).map(|(&sum, at)| sum as f64 * (a_scale * b_scales[at])).collect();
    if let Some(bias) = bias {
        if super::broadcast_shape(&[bias.shape(), &product.output])? != product.output {
            return Err(OpError::input(format!("a bias of {} for a product of {}", bias.shape(), product.output)));
        }
        let values = Wide::floats(bias)?;
        y.iter_mut().zip(broadcast_index(bias.shape(), &product.output)).for_each(|(y, at)| *y += values[at]);
    }
    Wide::Float(y).narrow(dtype, product.output.clone())
}
