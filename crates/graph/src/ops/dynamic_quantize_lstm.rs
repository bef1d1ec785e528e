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

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.DynamicQuantizeLSTM", 1)
            .with("hidden_size", 2)
            .with("direction", "forward")
            .input(f32s(
                &[3, 2, 2],
                &[0.541, 0.8283, 0.5485, 0.9177, 0.4407, 0.3425, 0.4739, -0.2673, 1.188, -0.3486, -1.462, 0.8498],
            ))
            .input(tensor::<u8>(&[1, 2, 8], &[100, 31, 99, 217, 162, 66, 196, 63, 64, 197, 78, 193, 255, 216, 206, 34]))
            .input(tensor::<u8>(
                &[1, 2, 8],
                &[136, 191, 226, 120, 55, 83, 110, 187, 39, 216, 250, 82, 230, 39, 47, 253],
            ))
            .input(f32s(
                &[1, 16],
                &[
                    -0.5968, -0.6704, -0.6909, -1.447, 0.7544, -0.3959, 0.4681, 0.5268, 1.375, -1.815, 1.739, 1.269,
                    0.5731, 2.384, 0.205, 0.8215,
                ],
            ))
            .omitted()
            .input(f32s(&[1, 2, 2], &[-0.7384, 1.134, 0.1678, -0.4512]))
            .input(f32s(&[1, 2, 2], &[2.117, -0.3048, 0.008861, -0.1973]))
            .input(f32s(&[1, 6], &[-0.7557, 0.5313, 0.7384, 0.3544, -2.361, 1.008]))
            .input(f32s(&[1], &[0.00829]))
            .input(tensor::<u8>(&[1], &[128]))
            .input(f32s(&[1], &[0.008583]))
            .input(tensor::<u8>(&[1], &[128]))
            .gives([
                f32s(
                    &[3, 1, 2, 2],
                    &[
                        0.416768, -0.0867693, 0.355111, -0.127007, 0.524968, -0.0468363, 0.467935, -0.0530728, 0.49443,
                        -0.0194049, 0.400208, 0.0686264,
                    ],
                ),
                f32s(&[1, 2, 2], &[0.49443, -0.0194049, 0.400208, 0.0686264]),
                f32s(&[1, 2, 2], &[0.658143, -0.0314561, 0.508776, 0.215028]),
            ]);
        case("com.microsoft.DynamicQuantizeLSTM", 1)
            .with("hidden_size", 2)
            .with("direction", "reverse")
            .input(f32s(
                &[3, 2, 2],
                &[0.6033, 0.5628, -1.043, 2.472, -1.21, -1.733, -1.154, 1.421, -0.1759, -0.3721, -0.06216, -0.5966],
            ))
            .input(tensor::<u8>(&[1, 2, 8], &[58, 146, 112, 167, 5, 46, 93, 120, 208, 253, 9, 4, 212, 94, 232, 85]))
            .input(tensor::<u8>(&[1, 2, 8], &[207, 103, 17, 222, 43, 112, 62, 226, 92, 147, 12, 108, 43, 64, 35, 210]))
            .omitted()
            .omitted()
            .omitted()
            .omitted()
            .omitted()
            .input(f32s(&[1, 8], &[0.008221, 0.006061, 0.00565, 0.005627, 0.009545, 0.007017, 0.009102, 0.009477]))
            .input(tensor::<u8>(&[1, 8], &[128, 128, 128, 128, 128, 128, 128, 128]))
            .input(f32s(&[1, 8], &[0.006132, 0.005163, 0.005902, 0.008865, 0.005077, 0.007821, 0.005956, 0.008833]))
            .input(tensor::<u8>(&[1, 8], &[128, 128, 128, 128, 128, 128, 128, 128]))
            .gives([
                f32s(
                    &[3, 1, 2, 2],
                    &[
                        -0.00319573,
                        -0.0714444,
                        0.146737,
                        -0.0883953,
                        -0.292153,
                        0.12341,
                        0.161622,
                        -0.061864,
                        -0.0764964,
                        0.0392233,
                        -0.120591,
                        0.0560065,
                    ],
                ),
                f32s(&[1, 2, 2], &[-0.00319573, -0.0714444, 0.146737, -0.0883953]),
                f32s(&[1, 2, 2], &[-0.00761883, -0.194298, 1.45982, -0.737112]),
            ]);
        case("com.microsoft.DynamicQuantizeLSTM", 1)
            .with("hidden_size", 2)
            .with("direction", "bidirectional")
            .input(f32s(
                &[3, 2, 2],
                &[
                    1.192, -1.266, -0.4935, -0.8926, -0.5319, -0.6926, -0.1205, -0.01725, -0.04098, -0.5555, 0.1874,
                    0.8756,
                ],
            ))
            .input(tensor::<u8>(
                &[2, 2, 8],
                &[
                    72, 219, 176, 0, 69, 161, 159, 77, 230, 160, 85, 64, 97, 53, 97, 160, 202, 127, 117, 47, 130, 226,
                    169, 225, 132, 140, 27, 180, 231, 115, 145, 205,
                ],
            ))
            .input(tensor::<u8>(
                &[2, 2, 8],
                &[
                    87, 213, 88, 195, 198, 62, 174, 6, 192, 168, 8, 105, 219, 228, 92, 220, 225, 136, 33, 96, 170, 182,
                    255, 181, 165, 174, 193, 215, 255, 147, 58, 132,
                ],
            ))
            .input(f32s(
                &[2, 16],
                &[
                    0.175, 0.09222, 1.183, 0.976, -0.04927, -0.4695, -0.346, -0.3563, -0.2256, -1.573, -0.461, -0.4249,
                    -0.1889, -0.2543, 0.672, -0.5319, -0.4386, 0.5419, -0.2353, 0.2165, 0.6693, 0.422, 0.2502, -0.1964,
                    0.6819, 0.1755, -0.5049, -0.1508, -1.218, -0.9616, -1.883, -0.6799,
                ],
            ))
            .omitted()
            .omitted()
            .omitted()
            .omitted()
            .input(f32s(&[2], &[0.007997, 0.005141]))
            .input(tensor::<u8>(&[2], &[128, 128]))
            .input(f32s(&[2], &[0.006699, 0.005001]))
            .input(tensor::<u8>(&[2], &[128, 128]))
            .gives([
                f32s(
                    &[3, 2, 2, 2],
                    &[
                        0.100869, -0.127255, 0.101368, -0.0665052, -0.271998, -0.198727, -0.235794, -0.314242,
                        0.151976, -0.149555, 0.150245, -0.105448, -0.217, -0.320843, -0.191643, -0.275656, 0.198303,
                        -0.148529, 0.137853, -0.107828, -0.185524, -0.23663, -0.111591, -0.152439,
                    ],
                ),
                f32s(
                    &[2, 2, 2],
                    &[0.198303, -0.148529, 0.137853, -0.107828, -0.271998, -0.198727, -0.235794, -0.314242],
                ),
                f32s(
                    &[2, 2, 2],
                    &[0.279942, -0.207883, 0.222171, -0.219288, -0.676374, -0.820312, -0.60027, -0.770848],
                ),
            ]);
    }
}
