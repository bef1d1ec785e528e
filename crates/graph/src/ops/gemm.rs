//! General matrix product.

use super::{
    Activation, EvalContext, Facts, FusedGemm, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    activation::read_function, broadcast_index, broadcast_shape, conv::differ, matmul::Product,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Shape, Value};

/// `Y = f(alpha · A' · B' + beta · C)`, where `'` is a transposition if its flag says so; `C` broadcasts to `[m, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    pub alpha: f32,
    pub beta: f32,
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub activation: Option<Activation>,
}

impl Operator for Gemm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let fused = node.op_type == "FusedGemm";
        if node.opset < 7 {
            // Without it C has the result's shape, which broadcasts too.
            node.flag("broadcast", false)?;
        }
        let gemm = Gemm {
            alpha: node.float("alpha", 1.0)?,
            beta: node.float("beta", 1.0)?,
            transpose_a: node.flag("transA", false)?,
            transpose_b: node.flag("transB", false)?,
            activation: None,
        };
        if node.opset < 7 {
            // Where it is 0, the shapes are the same, or nothing is right.
            node.flag("broadcast", false)?;
        }
        match if fused { read_function(node)? } else { None } {
            None => Ok(gemm.into()),
            Some(function) => Ok(match function.activation() {
                Some(activation) => Gemm { activation: Some(activation), ..gemm }.into(),
                None => FusedGemm { gemm, function }.into(),
            }),
        }
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("Gemm")
            .with("alpha", self.alpha)
            .with("beta", self.beta)
            .with("transA", i64::from(self.transpose_a))
            .with("transB", i64::from(self.transpose_b));
        spelling.then.extend(self.activation.map(Activation::spelling));
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 2)?;
        let matrix = |fact: &TensorFact, transposed: bool, names: [&str; 2]| match fact.shape.as_deref() {
            None => Ok([context.fresh(names[0]), context.fresh(names[1])]),
            Some([rows, columns]) if !transposed => Ok([rows.clone(), columns.clone()]),
            Some([rows, columns]) => Ok([columns.clone(), rows.clone()]),
            Some(_) => Err(OpError::input(format!("expected a matrix, got {fact}"))),
        };
        let [m, k] = matrix(a, self.transpose_a, ["m", "k"])?;
        let [k_of_b, n] = matrix(b, self.transpose_b, ["k", "n"])?;
        if differ(&k, &k_of_b) {
            return Err(OpError::input(format!("cannot multiply {a} by {b}: {k} columns against {k_of_b} rows")));
        }
        let shape = vec![m, n];
        if let Some(c) = inputs.optional_tensor(2)?
            && let Some(dims) = &c.shape
        {
            let fits = |(c, d): (&Dim, &Dim)| c.as_const() == Some(1) || !differ(c, d);
            if dims.len() > 2 || !dims.iter().rev().zip(shape.iter().rev()).all(fits) {
                return Err(OpError::input(format!("{c} does not broadcast to [{}, {}]", shape[0], shape[1])));
            }
        }
        Ok(vec![TensorFact::new(a.dtype, shape).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (a, b, c) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.optional_tensor(2)?);
        for tensor in [a, b] {
            if tensor.shape().rank() != 2 {
                return Err(OpError::input(format!("expected a matrix, got {}", tensor.shape())));
            }
        }
        let shape = |s: &Shape, transposed: bool| if transposed { Shape::new(&[s[1], s[0]]) } else { s.clone() };
        let product = Product::new(&shape(a.shape(), self.transpose_a), &shape(b.shape(), self.transpose_b))?;
        context.bounded_len(&product.output)?;
        if let Some(c) = c
            && broadcast_shape(&[c.shape(), &product.output])? != product.output
        {
            return Err(OpError::input(format!("{} does not broadcast to {}", c.shape(), product.output)));
        }
        let added = c.map(|c| Ok::<_, OpError>((Wide::of(c)?, broadcast_index(c.shape(), &product.output))));
        let y = match (Wide::of(a)?, Wide::of(b)?, added.transpose()?) {
            (Wide::Float(a), Wide::Float(b), added) => {
                let (a, b) = self.plain(&product, a, b);
                let mut y = product.apply(&a, &b);
                y.iter_mut().for_each(|y| *y *= f64::from(self.alpha));
                if let Some((Wide::Float(c), sources)) = added {
                    y.iter_mut().zip(sources).for_each(|(y, source)| *y += f64::from(self.beta) * c[source]);
                }
                if let Some(f) = self.activation {
                    y.iter_mut().for_each(|y| *y = f.apply(*y));
                }
                Wide::Float(y)
            }
            (Wide::Int(a), Wide::Int(b), added) => {
                let whole = |factor: f32| if factor.fract() == 0.0 { Some(factor as i128) } else { None };
                let (Some(alpha), Some(beta), None) = (whole(self.alpha), whole(self.beta), self.activation) else {
                    return Err(OpError::unsupported("a product of integers that is scaled by a fraction"));
                };
                let (a, b) = self.plain(&product, a, b);
                let mut y = product.apply_integers(&a, &b);
                y.iter_mut().for_each(|y| *y = y.wrapping_mul(alpha));
                if let Some((Wide::Int(c), sources)) = added {
                    y.iter_mut().zip(sources).for_each(|(y, source)| *y = y.wrapping_add(c[source].wrapping_mul(beta)));
                }
                Wide::Int(y)
            }
            _ => return Err(OpError::input(format!("cannot multiply {} by {}", a.dtype(), b.dtype()))),
        };
        Ok(vec![y.narrow(a.dtype(), product.output)?.into()])
    }
}

impl Gemm {
    /// Both factors as `[m, k]` and `[k, n]`.
    fn plain<T: Copy>(&self, product: &Product, a: Vec<T>, b: Vec<T>) -> (Vec<T>, Vec<T>) {
        let transposed = |from: Vec<T>, rows: usize, columns: usize| -> Vec<T> {
            (0..rows)
                .flat_map(|row| (0..columns).map(move |column| (row, column)))
                .map(|(r, c)| from[c * rows + r])
                .collect()
        };
        (
            if self.transpose_a { transposed(a, product.m, product.k) } else { a },
            if self.transpose_b { transposed(b, product.k, product.n) } else { b },
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("Gemm", 13)
            .with("transA", 1)
            .with("transB", 1)
            .with("alpha", 0.5f32)
            .with("beta", 2.0f32)
            .wave(&[3, 2])
            .wave(&[2, 3])
            .wave(&[2])
            .gives([f32s(&[2, 2], &[0.53125, -1.28125, 1.0625, -1.0625])]);
        case("Gemm", 13).wave(&[2, 3]).wave(&[3, 2]).gives([f32s(&[2, 2], &[0.25, -1.9375, -1.3125, 1.375])]);
        case("Gemm", 7)
            .with("transB", 1)
            .wave(&[1, 3])
            .wave(&[2, 3])
            .wave(&[1, 1])
            .gives([f32s(&[1, 2], &[1.375, 1.6875])]);
        case("Gemm", 13).wave(&[0, 3]).wave(&[3, 2]).wave(&[2]).gives([f32s(&[0, 2], &[])]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("Gemm", 13).wave(&[2, 3]).wave(&[2, 2]).fails("3 columns against 2 rows");
        case("Gemm", 13).wave(&[2, 3]).wave(&[3, 2]).wave(&[3]).fails("does not broadcast to [2, 2]");
        case("Gemm", 13).wave(&[2, 3, 1]).wave(&[3, 2]).fails("expected a matrix");
    }

    #[test]
    fn integers_are_scaled_by_whole_numbers() {
        use crate::ops::cases::tensor;
        let of = |alpha: f32| {
            let row = |values: [i32; 2]| tensor::<i32>(&[1, 2], &values);
            let gemm = case("Gemm", 11).with("transB", 1).with("alpha", alpha).with("beta", 3.0f32);
            gemm.input(row([1, 2])).input(row([3, 4])).input(tensor::<i32>(&[], &[5]))
        };
        of(2.0).gives([tensor::<i32>(&[1, 1], &[37])]);
        of(0.5).fails("scaled by a fraction");
    }
}
