//! LSTM whose products are of 8-bit integers.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Recurrent, Spelling, Wide,
    conv::differ,
    dynamic_quantize_linear::quantize,
    matmul::Product,
    qlinear::DOMAIN,
    quantize_linear::factors,
    recurrent::{Cell, CellRun, Direction, Weights},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// An LSTM over `X [t, n, input]`, with `W [d, input, 4·h]` and `R [d, h, 4·h]` of 8-bit integers. What they are multiplied with is quantized as
/// `DynamicQuantizeLinear` does: `X` as a whole, and the states of a batch at every step. Inputs `X`, `W`, `R`, `B`, `sequence_lens`,
/// `initial_h`, `initial_c` and `P` as [`Recurrent`] has them, then scale and zero point of `W`, scale and zero point of `R`: each `[d]`, or
/// `[d, 4·h]`. ONNX Runtime splits a batch over its threads, and then quantizes part by part.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicQuantizeLstm {
    pub lstm: Recurrent,
}

impl Operator for DynamicQuantizeLstm {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(12..=12)?;
        let coupled = node.flag("input_forget", false)?;
        Ok(DynamicQuantizeLstm { lstm: Recurrent::read(node, Cell::Lstm { coupled })? }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = self.lstm.export();
        spelling.attributes.retain(|(name, _)| *name != "layout");
        Spelling { op_type: "DynamicQuantizeLSTM", ..spelling }.in_domain(DOMAIN)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        if x.dtype != DType::F32 {
            return Err(OpError::input(format!("expected f32, got {x}")));
        }
        for (weight, zero_point) in [(1, 9), (2, 11)] {
            inputs.same_dtype(weight, zero_point)?;
        }
        for (what, index) in [("W", 1), ("R", 2)] {
            let fact = inputs.tensor(index)?;
            if fact.shape.as_ref().is_some_and(|dims| dims.len() != 3) {
                return Err(OpError::input(format!("expected three axes of {what}, got {fact}")));
            }
        }
        let extent = |fact: &TensorFact, axis: usize, what: &str| match &fact.shape {
            Some(dims) if dims.len() != 3 => Err(OpError::input(format!("expected three axes, got {fact}"))),
            Some(dims) => Ok(dims[axis].clone()),
            None => Ok(context.fresh(what)),
        };
        let hidden = extent(inputs.tensor(2)?, 1, "hidden")?;
        if differ(&extent(x, 2, "input")?, &extent(inputs.tensor(1)?, 1, "input")?) {
            return Err(OpError::input(format!("X {x} does not fit W {}", inputs.tensor(1)?)));
        }
        let (d, t, n) = (Dim::from(self.lstm.direction.count()), extent(x, 0, "t")?, extent(x, 1, "n")?);
        let state = Fact::from(TensorFact::new(DType::F32, vec![d.clone(), n.clone(), hidden.clone()]));
        let y = TensorFact::new(DType::F32, vec![t, d, n, hidden]);
        Ok(vec![y.into(), state.clone(), state])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, directions) = (inputs.tensor(0)?, self.lstm.direction.count());
        let (&[t, n, features], &[_, hidden, _]) = (x.shape().dims(), inputs.tensor(2)?.shape().dims()) else {
            return Err(OpError::input(format!("expected three axes of X and R, got {}", x.shape())));
        };
        let shaped = |index: usize, shape: &[usize]| -> Result<Option<&Tensor>, OpError> {
            match inputs.optional_tensor(index)? {
                Some(tensor) if **tensor.shape() != *shape => {
                    let expected = Shape::new(shape);
                    Err(OpError::input(format!("input {index} is {}, expected {expected}", tensor.shape())))
                }
                other => Ok(other),
            }
        };
        let columns = hidden.checked_mul(4).ok_or_else(|| OpError::Resource(format!("a hidden size of {hidden}")))?;
        context.bounded_len(&[t, directions, n, hidden])?;
        context.bounded_len(&[t, n, columns])?;
        if inputs.get(4).is_some() && inputs.integers(4)?.iter().any(|&len| len != t as i64) {
            return Err(OpError::unsupported("sequences of different lengths"));
        }
        let floats = |index: usize, shape: &[usize]| match shaped(index, shape)? {
            Some(tensor) => Wide::floats(tensor),
            None => Ok(vec![0.0; shape.iter().product()]),
        };
        let bias = floats(3, &[directions, 2 * columns])?;
        let peepholes = floats(7, &[directions, 3 * hidden])?;
        let (mut h, mut c) = (floats(5, &[directions, n, hidden])?, floats(6, &[directions, n, hidden])?);
        let w = shaped(1, &[directions, features, columns])?.ok_or_else(|| OpError::input("W is required"))?;
        let r = shaped(2, &[directions, hidden, columns])?.ok_or_else(|| OpError::input("R is required"))?;
        let (x, x_scale, x_point) = quantize(&x.to_vec::<f32>()?);
        let x: Vec<i64> = x.into_iter().map(|x| (x - x_point) as i64).collect();
        let mut y = vec![0.0; t * directions * n * hidden];
        for d in 0..directions {
            let w = Matrix::new(w, d, inputs.tensor(8)?, inputs.tensor(9)?)?;
            let r = Matrix::new(r, d, inputs.tensor(10)?, inputs.tensor(11)?)?;
            let (mut w_bias, part) = (bias[d * 2 * columns..][..2 * columns].to_vec(), d * 3 * hidden);
            let r_bias = w_bias.split_off(columns);
            let peepholes = peepholes[part..part + 3 * hidden].to_vec();
            let weights = Weights { features, hidden, w: Vec::new(), r: Vec::new(), w_bias, r_bias, peepholes };
            let mut cell = CellRun::new(&self.lstm, &weights, d);
            let of_input = w.times(&x, t * n, x_scale.into())?;
            let reverse = self.lstm.direction == Direction::Reverse || d == 1;
            let states = d * n * hidden..(d + 1) * n * hidden;
            for step in 0..t {
                let at = if reverse { t - 1 - step } else { step };
                let (h, c) = (&mut h[states.clone()], &mut c[states.clone()]);
                let (q, scale, point) = quantize(&h.iter().map(|&h| h as f32).collect::<Vec<_>>());
                let q: Vec<i64> = q.into_iter().map(|q| (q - point) as i64).collect();
                let of_state = r.times(&q, n, scale.into())?;
                for row in 0..n {
                    let sums = of_input[(at * n + row) * columns..].iter().zip(&of_state[row * columns..]);
                    let biases = weights.w_bias.iter().zip(&weights.r_bias);
                    let sums = sums.zip(biases).map(|((x, h), (wb, rb))| (x + wb) + (h + rb));
                    cell.gates.iter_mut().zip(sums).for_each(|(gate, sum)| *gate = sum);
                    let (h, c) = (&mut h[row * hidden..][..hidden], &mut c[row * hidden..][..hidden]);
                    cell.finish_lstm(h, c);
                    y[((at * directions + d) * n + row) * hidden..][..hidden].copy_from_slice(h);
                }
            }
        }
        let narrow = |values: Vec<f64>, shape: &[usize]| Wide::Float(values).narrow(DType::F32, shape);
        Ok(vec![
            narrow(y, &[t, directions, n, hidden])?.into(),
            narrow(h, &[directions, n, hidden])?.into(),
            narrow(c, &[directions, n, hidden])?.into(),
        ])
    }
}

/// One direction's integers, less their zero points, and the scale of every column.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<i64>,
    scales: Vec<f64>,
}

impl Matrix {
    fn new(weight: &Tensor, d: usize, scale: &Tensor, zero_point: &Tensor) -> Result<Matrix, OpError> {
        let &[directions, rows, columns] = weight.shape().dims() else {
            return Err(OpError::input(format!("expected three axes, got {}", weight.shape())));
        };
        let columns_of = |count: usize| match count {
            _ if count == directions => Ok(false),
            _ if count == directions * columns => Ok(true),
            _ => Err(OpError::input(format!("{count} scales or zero points for {}", weight.shape()))),
        };
        fn expand<T: Copy>(values: &[T], per_column: bool, d: usize, columns: usize) -> Vec<T> {
            if per_column { values[d * columns..][..columns].to_vec() } else { vec![values[d]; columns] }
        }
        let (scales, points) = (Wide::floats(scale)?, factors(zero_point)?);
        let scales = expand(&scales, columns_of(scales.len())?, d, columns);
        let points = expand(&points, columns_of(points.len())?, d, columns);
        let values = factors(weight)?[d * rows * columns..][..rows * columns].to_vec();
        let values = values.iter().zip(points.iter().cycle()).map(|(x, point)| x - point).collect();
        Ok(Matrix { rows, columns, values, scales })
    }

    /// `[count, rows]` times this, in units of `scale` and of the columns' scales.
    fn times(&self, x: &[i64], count: usize, scale: f64) -> Result<Vec<f64>, OpError> {
        let product = Product::new(&[count, self.rows].into(), &[self.rows, self.columns].into())?;
        let sums = product.apply(x, &self.values);
        Ok(sums.iter().zip(self.scales.iter().cycle()).map(|(&sum, of)| sum as f64 * (scale * of)).collect())
    }
}
