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
