//! General matrix product of quantized matrices.

use super::{
    EvalContext, Facts, Gemm, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, broadcast_index,
    broadcast_shape,
    matmul::Product,
    matmul_integer::{Side, per_side, shifted},
    qlinear::{DOMAIN, Target, scale},
    quantize_linear::integers,
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// `alpha · a_scale · b_scale · ((A − a_zero_point)' · (B − b_zero_point)' + C)`, where `'` is a transposition if its flag says so: in f32 where no
/// `y_scale` is given, otherwise `saturate(round(· / y_scale) + y_zero_point)`, to nearest even. Inputs `A`, its scale and zero point (one
/// each), `B`, its scale and zero point (one, or one for each column of `B'`), optional `C` (i32, broadcasts to `[m, n]`), and the
/// optional scale and zero point of `Y`.
#[derive(Clone, Debug, PartialEq)]
pub struct QGemm {
    pub alpha: f32,
    pub transpose_a: bool,
    pub transpose_b: bool,
}

impl Operator for QGemm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(6..=9)?;
        let alpha = node.float("alpha", 1.0)?;
        Ok(QGemm { alpha, transpose_a: node.flag("transA", false)?, transpose_b: node.flag("transB", false)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("QGemm")
            .in_domain(DOMAIN)
            .with("alpha", self.alpha)
            .with("transA", i64::from(self.transpose_a))
            .with("transB", i64::from(self.transpose_b))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(3)?);
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(3, 5)?;
        inputs.tensor(1)?;
        inputs.tensor(4)?;
        let dtype = match (inputs.optional_tensor(7)?, inputs.optional_tensor(8)?) {
            (None, _) => DType::F32,
            (Some(_), Some(zero_point)) => zero_point.dtype,
            (Some(_), None) => a.dtype,
        };
        // Extents as Gemm has them.
        let as_ints = |fact: &TensorFact| Fact::from(TensorFact { dtype: DType::I32, value: None, ..fact.clone() });
        let (a, b) = (as_ints(a), as_ints(b));
        let product = self.gemm().infer(Facts(&[Some(&a), Some(&b), inputs.get(6)]), context)?;
        let shape = Facts(&[product.first()]).tensor(0)?.shape.clone();
        Ok(vec![TensorFact { dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(3)?);
        for tensor in [a, b] {
            if tensor.shape().rank() != 2 {
                return Err(OpError::input(format!("expected a matrix, got {}", tensor.shape())));
            }
        }
        let transposed = |s: &Shape, flag: bool| if flag { Shape::new(&[s[1], s[0]]) } else { s.clone() };
        let shapes = (transposed(a.shape(), self.transpose_a), transposed(b.shape(), self.transpose_b));
        let product = Product::new(&shapes.0, &shapes.1)?;
        context.bounded_len(&product.output)?;
        let matrix = |tensor: &Tensor, flag: bool| match flag {
            false => Ok(tensor.clone()),
            true => {
                let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
                super::select(tensor, [columns, rows], (0..rows * columns).map(|i| i % rows * columns + i / rows))
            }
        };
        let (a_points, b_points) = (inputs.optional_tensor(2)?, inputs.optional_tensor(5)?);
        let a_values = shifted(&matrix(a, self.transpose_a)?, a_points, Side::Rows)?;
        let b_values = shifted(&matrix(b, self.transpose_b)?, b_points, Side::Columns)?;
        let mut sums = product.apply(&a_values, &b_values);
        if let Some(c) = inputs.optional_tensor(6)? {
            if broadcast_shape(&[c.shape(), &product.output])? != product.output {
                return Err(OpError::input(format!("{} does not broadcast to {}", c.shape(), product.output)));
            }
            let values = integers(c)?;
            let sources = broadcast_index(c.shape(), &product.output);
            sums.iter_mut().zip(sources).for_each(|(sum, at)| *sum += values[at] as i64);
        }
        let (b_scale, a_scale) = (inputs.tensor(4)?, scale(inputs, 1)?);
        let b_scales = Wide::floats(b_scale)?;
        let sources = per_side(b_scale.shape(), &product.output, Side::Columns)?;
        let scaled = sums.iter().zip(sources).map(|(&sum, at)| (sum, b_scales[at]));
        if inputs.get(7).is_none() {
            let scale = f64::from(self.alpha) * a_scale;
            let y = scaled.map(|(sum, b_scale)| sum as f64 * scale * b_scale).collect();
            return Ok(vec![Wide::Float(y).narrow(DType::F32, product.output.clone())?.into()]);
        }
        let dtype = inputs.optional_tensor(8)?.map_or(a.dtype(), Tensor::dtype);
        let target = Target::read(inputs, 7, dtype)?;
        let factor = |b_scale: f64| self.alpha * a_scale as f32 * b_scale as f32 / target.scale as f32;
        let y = scaled.map(|(sum, b_scale)| target.requantize(sum, factor(b_scale))).collect();
        Ok(vec![target.tensor(y, product.output.clone())?.into()])
    }
}

impl QGemm {
    fn gemm(&self) -> Gemm {
        let (transpose_a, transpose_b) = (self.transpose_a, self.transpose_b);
        Gemm { alpha: 1.0, beta: 1.0, transpose_a, transpose_b, activation: None }
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.QGemm", 1)
            .with("alpha", 0.5f32)
            .input(tensor::<u8>(&[2, 3], &[210, 202, 106, 220, 212, 29]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[3, 2], &[2, 26, 93, 28, 20, 66]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[7]))
            .input(tensor::<i32>(&[2], &[300, -400]))
            .input(f32s(&[], &[0.9]))
            .input(tensor::<u8>(&[], &[100]))
            .gives([tensor::<u8>(&[2, 2], &[104, 101, 104, 99])]);
        case("com.microsoft.QGemm", 1)
            .with("transA", 1)
            .with("transB", 1)
            .input(tensor::<i8>(&[3, 2], &[39, 6, -58, 115, 51, 34]))
            .input(f32s(&[], &[0.5]))
            .input(tensor::<i8>(&[], &[1]))
            .input(tensor::<i8>(&[2, 3], &[56, 36, -48, -60, 46, -12]))
            .input(f32s(&[2], &[0.25, 0.5]))
            .input(tensor::<i8>(&[2], &[0, 0]))
            .omitted()
            .input(f32s(&[], &[32.0]))
            .input(tensor::<i8>(&[], &[-3]))
            .gives([tensor::<i8>(&[2, 2], &[-12, -47, 8, 33])]);
        case("com.microsoft.QGemm", 1)
            .with("transB", 1)
            .input(tensor::<u8>(&[2, 3], &[15, 122, 97, 110, 110, 80]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[2, 3], &[125, 125, 249, 177, 198, 2]))
            .input(f32s(&[2], &[0.05, 0.02]))
            .input(tensor::<u8>(&[2], &[7, 200]))
            .input(tensor::<i32>(&[2, 1], &[300, -400]))
            .gives([f32s(&[2, 2], &[-17.42, 2.906, -12.44, 3.108])]);
        case("com.microsoft.QGemm", 1)
            .input(tensor::<u8>(&[2, 2], &[79, 251, 69, 130]))
            .input(f32s(&[], &[0.02]))
            .input(tensor::<u8>(&[], &[120]))
            .input(tensor::<u8>(&[2, 2], &[220, 163, 225, 42]))
            .input(f32s(&[], &[0.05]))
            .input(tensor::<u8>(&[], &[0]))
            .gives([f32s(&[2, 2], &[20.455, -1.181, -8.97, -7.893])]);
    }
}
