//! Product with a matrix whose elements take a few bits each, in blocks of one scale.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ, qlinear::DOMAIN,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `Y = A · Wᵀ + bias` with `W[n, k] = (B[n, k] − zero_point) · scale`. Inputs `A [.., k]`, `B` (u8, `[n, blocks, block_size · bits / 8]`,
/// elements from the low bits up), `scales [n, blocks]`, and, each optional, `zero_points` (u8 and packed as `B`, every row from a
/// byte of its own; or of the type of `A`, `[n, blocks]`; midway of the range where there are none), `g_idx` (i32: the block whose
/// scale and zero point an index of `k` has, where they don't follow each other) and `bias [n]`. A `B` without elements stands for zeros.
/// ONNX Runtime leaves packed zero points out where there is a `g_idx`, and quantizes `A` at accuracy level 4.
#[derive(Clone, Debug, PartialEq)]
pub struct MatMulNBits {
    pub n: usize,
    pub k: usize,
    pub bits: usize,
    pub block_size: usize,
    /// To which precision `A` may be brought down. Evaluation never does.
    pub accuracy_level: i64,
}

impl Operator for MatMulNBits {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=6)?;
        let mut extent = |name: &str| match node.count(name, 0)? {
            0 => Err(node.corrupt(format!("attribute '{name}' is missing"))),
            extent => Ok(extent),
        };
        let (n, k, block_size) = (extent("N")?, extent("K")?, extent("block_size")?);
        if !block_size.is_power_of_two() || block_size < 16 {
            return Err(node.corrupt(format!("block_size must be a power of two from 16 on, got {block_size}")));
        }
        let bits = node.count("bits", 4)?;
        if !matches!(bits, 2 | 4 | 8) {
            return Err(node.unsupported(format!("elements of {bits} bits (only 2, 4 and 8)")));
        }
        let accuracy_level = node.int("accuracy_level", 0)?;
        match node.int("weight_prepacked", 0)? {
            0 => Ok(MatMulNBits { n, k, bits, block_size, accuracy_level }.into()),
            layout => Err(node.unsupported(format!("weight_prepacked {layout}, a layout of one device"))),
        }
    }

    fn export(&self) -> Spelling {
        let extents = [("N", self.n), ("K", self.k), ("bits", self.bits), ("block_size", self.block_size)].into_iter();
        extents
            .fold(Spelling::new("MatMulNBits").in_domain(DOMAIN), |spelling, (name, v)| spelling.with(name, v as i64))
            .with("accuracy_level", self.accuracy_level)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (a, b) = (inputs.tensor(0)?, inputs.tensor(1)?);
        if b.dtype != DType::U8 {
            return Err(OpError::input(format!("expected packed elements in u8, got {b}")));
        }
        inputs.same_dtype(0, 2)?;
        inputs.same_dtype(0, 5)?;
        let shape = match a.shape.as_deref() {
            None => None,
            Some([batch @ .., k]) if !differ(k, &Dim::from(self.k)) => {
                Some(batch.iter().cloned().chain([Dim::from(self.n)]).collect())
            }
            Some(_) => return Err(OpError::input(format!("expected [.., {}], got {a}", self.k))),
        };
        Ok(vec![TensorFact { dtype: a.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let a = inputs.tensor(0)?;
        let [batch @ .., k] = a.shape().dims() else { return Err(OpError::input("a scalar is no matrix")) };
        if *k != self.k {
            return Err(OpError::input(format!("expected [.., {}], got {}", self.k, a.shape())));
        }
        let shape: Vec<usize> = batch.iter().copied().chain([self.n]).collect();
        let mut y = vec![0.0; context.bounded_len(&shape)?];
        if let Some(bias) = inputs.optional_tensor(5)? {
            let bias = Wide::floats(self.sized("bias", bias, self.n)?)?;
            y.chunks_exact_mut(self.n).for_each(|row| row.copy_from_slice(&bias));
        }
        if inputs.tensor(1)?.element_count() > 0 {
            let (a, weight) = (Wide::floats(a)?, Weight::new(self, inputs)?);
            let mut row = vec![0.0; self.k];
            for n in 0..self.n {
                weight.row(n, &mut row);
                for (y, a) in y.chunks_exact_mut(self.n).zip(a.chunks_exact(self.k)) {
                    y[n] += a.iter().zip(&row).map(|(a, w)| a * w).sum::<f64>();
                }
            }
        }
        Ok(vec![Wide::Float(y).narrow(a.dtype(), shape)?.into()])
    }
}

impl MatMulNBits {
    fn blocks(&self) -> usize {
        self.k.div_ceil(self.block_size)
    }

    fn sized<'t>(&self, what: &str, tensor: &'t Tensor, expected: usize) -> Result<&'t Tensor, OpError> {
        match tensor.element_count() == expected {
            true => Ok(tensor),
            false => Err(OpError::input(format!(
                "{what} of {} elements for {} rows of {} blocks, {expected} expected",
                tensor.element_count(),
                self.n,
                self.blocks()
            ))),
        }
    }
}

/// The quantized matrix, read row by row.
struct Weight<'a> {
    op: &'a MatMulNBits,
    bytes: &'a [u8],
    scales: Vec<f64>,
    zero_points: ZeroPoints<'a>,
    /// For each index of `k`, its block.
    groups: Vec<usize>,
}

enum ZeroPoints<'a> {
    Midway,
    Packed(&'a [u8]),
    Floats(Vec<f64>),
}

impl<'a> Weight<'a> {
    fn new(op: &'a MatMulNBits, inputs: Inputs<'a>) -> Result<Weight<'a>, OpError> {
        let (b, blocks) = (inputs.tensor(1)?, op.blocks());
        if b.dtype() != DType::U8 {
            return Err(OpError::input(format!("expected packed elements in u8, got {}", b.dtype())));
        }
        let blocks_in_all = op.n.checked_mul(blocks).ok_or_else(|| OpError::Resource(format!("{} rows", op.n)))?;
        let bytes = blocks_in_all.checked_mul(op.block_size * op.bits / 8);
        op.sized("B", b, bytes.ok_or_else(|| OpError::Resource(format!("{} rows", op.n)))?)?;
        let zero_points = match inputs.optional_tensor(3)? {
            None => ZeroPoints::Midway,
            Some(points) if points.dtype() == DType::U8 => {
                op.sized("packed zero points", points, op.n * (blocks * op.bits).div_ceil(8))?;
                ZeroPoints::Packed(points.bytes())
            }
            Some(points) => ZeroPoints::Floats(Wide::floats(op.sized("zero points", points, blocks_in_all)?)?),
        };
        let groups = match inputs.get(4) {
            None => (0..op.k).map(|k| k / op.block_size).collect(),
            Some(_) => {
                let groups = inputs.integers(4)?;
                let group = |&group: &i64| usize::try_from(group).ok().filter(|&group| group < blocks);
                let groups: Option<Vec<usize>> = groups.iter().take(op.k).map(group).collect();
                groups
                    .filter(|groups| groups.len() == op.k)
                    .ok_or_else(|| OpError::input(format!("g_idx must hold {} numbers below {blocks}", op.k)))?
            }
        };
        let scales = Wide::floats(op.sized("scales", inputs.tensor(2)?, blocks_in_all)?)?;
        Ok(Weight { op, bytes: b.bytes(), scales, zero_points, groups })
    }

    /// Row `n` of the matrix.
    fn row(&self, n: usize, row: &mut [f64]) {
        let (bits, blocks) = (self.op.bits, self.op.blocks());
        let packed = &self.bytes[n * blocks * self.op.block_size * bits / 8..];
        for (k, (w, &group)) in row.iter_mut().zip(&self.groups).enumerate() {
            let zero_point = match &self.zero_points {
                ZeroPoints::Midway => f64::from(1 << (bits - 1)),
                ZeroPoints::Packed(points) => element(&points[n * (blocks * bits).div_ceil(8)..], group, bits),
                ZeroPoints::Floats(points) => points[n * blocks + group],
            };
            *w = (element(packed, k, bits) - zero_point) * self.scales[n * blocks + group];
        }
    }
}

/// Element `at` of unsigned ones of `bits` bits, the first in a byte's low bits.
fn element(packed: &[u8], at: usize, bits: usize) -> f64 {
    let per_byte = 8 / bits;
    f64::from(packed[at / per_byte] >> (at % per_byte * bits) & (u8::MAX >> (8 - bits)))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 18)
            .with("N", 2)
            .with("bits", 4)
            .with("block_size", 16)
            .input(f32s(
                &[2, 18],
                &[
                    0.0, 0.0, 1.494, 0.0, -0.4196, 0.0, 0.0, -0.1108, 0.0, -0.4477, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0, 0.0, 0.0, 0.0, 0.9035, 0.0, 0.0, 1.064, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.65, -1.291, 0.9764,
                    0.0, 0.0,
                ],
            ))
            .input(tensor::<u8>(
                &[2, 2, 8],
                &[
                    168, 149, 191, 21, 66, 78, 76, 138, 159, 254, 171, 253, 147, 18, 10, 219, 162, 230, 158, 184, 185,
                    195, 200, 72, 129, 15, 121, 128, 188, 143, 249, 197,
                ],
            ))
            .input(f32s(&[2, 2], &[0.7053, 0.2756, 0.6199, 0.642]))
            .omitted()
            .omitted()
            .omitted()
            .gives([f32s(&[2, 2], &[-3.42268, -4.45156, -8.09014, 5.03074])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 16)
            .with("N", 2)
            .with("bits", 4)
            .with("block_size", 16)
            .input(f32s(
                &[2, 16],
                &[
                    0.0, 0.0, 1.655, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4727, -0.3095, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0, 1.51, 0.0, 0.0, -0.05786, 0.0, 0.0, 1.125, -1.739, 0.0, 0.0, 0.0, 1.976, 0.6205,
                ],
            ))
            .input(tensor::<u8>(&[2, 1, 8], &[250, 7, 66, 90, 21, 11, 183, 168, 60, 1, 73, 179, 252, 135, 143, 66]))
            .input(f32s(&[2, 1], &[0.8208, 0.5331]))
            .input(tensor::<u8>(&[2, 1], &[15, 13]))
            .omitted()
            .input(f32s(&[2], &[1.0, -2.0]))
            .gives([f32s(&[2, 2], &[-3.41935, -12.1014, -38.4716, -19.959])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 17)
            .with("N", 1)
            .with("bits", 4)
            .with("block_size", 16)
            .input(f32s(
                &[2, 17],
                &[
                    0.0, 0.0, 0.0, 0.0, 0.2827, 0.0, 0.0, 0.0, 0.0, -1.625, -1.705, -0.2858, 0.0, 0.0, 1.455, 0.0, 0.0,
                    0.0, 0.0, -0.8243, 0.0, 0.0, -0.09541, -0.09533, 0.0, 1.655, 0.0, 0.0, 0.0, 0.0, 0.0, -0.4345, 0.0,
                    1.071,
                ],
            ))
            .input(tensor::<u8>(&[1, 2, 8], &[188, 99, 181, 102, 152, 225, 38, 96, 75, 61, 98, 75, 13, 15, 13, 70]))
            .input(f32s(&[1, 2], &[0.9766, 0.5533]))
            .input(f32s(&[1, 2], &[15.25, 8.25]))
            .omitted()
            .omitted()
            .gives([f32s(&[2, 1], &[9.4958, 7.50126])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 16)
            .with("N", 1)
            .with("bits", 8)
            .with("block_size", 16)
            .input(f32s(
                &[1, 2, 16],
                &[
                    0.0, 0.0, 0.3535, 0.0, 0.0, 0.2577, -0.8797, 0.0, 0.0, 0.0, -1.238, 0.0, 0.0, 0.0, 0.0, -1.316,
                    0.0, 0.0, 1.452, -0.4333, 0.0, 0.0, 0.9045, 0.0, 0.0, 0.0, 0.0, 0.0, 1.012, -0.2431, 0.0, 0.0,
                ],
            ))
            .input(tensor::<u8>(
                &[1, 1, 16],
                &[210, 149, 229, 163, 149, 125, 10, 30, 182, 163, 145, 29, 211, 203, 136, 65],
            ))
            .input(f32s(&[1, 1], &[0.9973]))
            .input(tensor::<u8>(&[1, 1], &[208]))
            .omitted()
            .omitted()
            .gives([f32s(&[1, 2, 1], &[425.246, -124.512])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 33)
            .with("N", 2)
            .with("bits", 2)
            .with("block_size", 16)
            .input(f32s(
                &[2, 33],
                &[
                    0.0, 0.0, 0.0, 0.0, 0.0, -0.1329, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.652, 0.0, 0.0, 0.0, 0.0,
                    0.0, 0.0, 0.0, 0.0, 1.291, 0.0, 0.0, 0.0, 1.03, 0.0, 0.7227, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    1.408, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.289, 0.0, 0.0, 0.0, 0.0, 0.0,
                    0.0, 1.296, 0.0, 0.0, 0.0, 0.7651, -1.284, 1.348, 0.0, 0.0, 0.0,
                ],
            ))
            .input(tensor::<u8>(
                &[2, 3, 4],
                &[
                    75, 230, 145, 34, 206, 40, 27, 152, 171, 33, 104, 254, 144, 58, 132, 93, 241, 121, 7, 130, 225,
                    115, 53, 154,
                ],
            ))
            .input(f32s(&[2, 3], &[0.7532, 0.1745, 0.4175, 0.5678, 0.484, 0.1366]))
            .input(tensor::<u8>(&[2, 1], &[17, 3]))
            .omitted()
            .omitted()
            .gives([f32s(&[2, 2], &[-0.613992, 2.64957, 0.920313, -0.791234])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 8)
            .with("N", 2)
            .with("bits", 8)
            .with("block_size", 16)
            .input(f32s(
                &[2, 8],
                &[
                    0.0, 0.0, 0.0, 0.7759, -0.3442, -1.094, 0.0, 0.4568, 0.6876, 0.4998, 0.0, 0.3088, 0.1436, 0.0, 0.0,
                    0.0,
                ],
            ))
            .input(tensor::<u8>(
                &[2, 1, 16],
                &[
                    252, 24, 37, 1, 239, 82, 135, 253, 214, 67, 95, 212, 126, 44, 240, 150, 198, 245, 156, 183, 219,
                    251, 137, 147, 171, 251, 115, 214, 71, 199, 28, 227,
                ],
            ))
            .input(f32s(&[2, 1], &[0.6683, 0.4207]))
            .omitted()
            .omitted()
            .omitted()
            .gives([f32s(&[2, 2], &[-19.5956, -48.183, 6.68647, 57.4929])]);
        case("com.microsoft.MatMulNBits", 1)
            .with("K", 20)
            .with("N", 1)
            .with("bits", 4)
            .with("block_size", 16)
            .input(f32s(
                &[2, 20],
                &[
                    0.0, 0.0, -1.529, -1.807, 0.0, 0.0, 0.0, 0.4268, 1.508, 0.0, 0.0, 0.0, 0.0, 1.579, 0.0, 0.0, 0.0,
                    0.0, -1.234, 0.0, 0.0, 0.0, 0.5451, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02389, 1.262, 0.0, 0.0, 0.0,
                    0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                ],
            ))
            .input(tensor::<u8>(
                &[1, 2, 8],
                &[184, 188, 50, 245, 160, 132, 209, 125, 124, 75, 37, 183, 220, 163, 84, 149],
            ))
            .input(f32s(&[1, 2], &[0.6071, 0.9429]))
            .omitted()
            .input(tensor::<i32>(
                &[32],
                &[1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ))
            .omitted()
            .gives([f32s(&[2, 1], &[-17.3168, -2.67485])]);
    }

    #[test]
    fn packed_zero_points_are_found_by_their_group() {
        // Which ONNX Runtime does not do.
        let one_hot: Vec<f32> = (0..64).map(|i| f32::from(u8::from(i % 33 == 0))).collect();
        let node =
            case("com.microsoft.MatMulNBits", 1).with("K", 32).with("N", 1).with("bits", 4).with("block_size", 16);
        let node = node.input(f32s(&[2, 32], &one_hot)).input(tensor::<u8>(&[1, 2, 8], &[0x55; 16]));
        let node = node.input(f32s(&[1, 2], &[1.0, 10.0])).input(tensor::<u8>(&[1, 1], &[0x21]));
        let groups: Vec<i32> = (0..32).map(|i| (i + 1) % 2).collect();
        node.input(tensor::<i32>(&[32], &groups)).gives([f32s(&[2, 1], &[30.0, 4.0])]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let node = |k: i64, bits: i64| {
            case("com.microsoft.MatMulNBits", 1)
                .with("K", k)
                .with("N", 1)
                .with("bits", bits)
                .with("block_size", 16)
                .wave(&[1, 16])
        };
        let b = || tensor::<u8>(&[1, 1, 8], &[0; 8]);
        node(16, 3).input(b()).input(f32s(&[1, 1], &[1.0])).fails("elements of 3 bits");
        node(17, 4).input(b()).input(f32s(&[1, 1], &[1.0])).fails("expected [.., 17]");
        node(16, 4).input(b()).input(f32s(&[2], &[1.0, 1.0])).fails("scales of 2 elements");
        node(16, 4).with("weight_prepacked", 1).input(b()).input(f32s(&[1], &[1.0])).fails("weight_prepacked 1");
        let hostile =
            case("com.microsoft.MatMulNBits", 1).with("K", 16).with("N", 0x7fff_ffff).with("block_size", 0x4000_0000);
        hostile.wave(&[1, 16]).input(b()).input(f32s(&[1], &[1.0])).fails("B of 8 elements");
    }

    #[test]
    fn without_a_matrix_the_bias_is_left() {
        let node =
            case("com.microsoft.MatMulNBits", 1).with("K", 16).with("N", 2).with("bits", 4).with("block_size", 16);
        let node =
            node.wave(&[1, 16]).input(tensor::<u8>(&[0, 1, 8], &[])).input(f32s(&[0, 1], &[])).omitted().omitted();
        node.input(f32s(&[2], &[1.0, 2.0])).gives([f32s(&[1, 2], &[1.0, 2.0])]);
    }
}
