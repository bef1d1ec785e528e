//! What attention operators share: vectors by head, scores of keys, and sums of values weighted by them.

use super::{EvalContext, Wide};
use crate::{Dim, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// Queries, keys or values `[batch, heads, length, size]`.
#[derive(Clone, Debug)]
pub(super) struct Heads {
    pub batch: usize,
    pub heads: usize,
    pub length: usize,
    pub size: usize,
    pub values: Vec<f64>,
}

impl Heads {
    /// `[b, n, s, h]` as it is; `[b, s, n·h]` with the number of heads given.
    pub fn of(tensor: &Tensor, heads: Option<usize>) -> Result<Heads, OpError> {
        match (tensor.shape().dims(), heads) {
            (&[batch, n, length, size], given) if given.is_none_or(|given| given == n) => {
                Ok(Heads { batch, heads: n, length, size, values: Wide::floats(tensor)? })
            }
            (&[batch, length, hidden], Some(n)) if n > 0 && hidden % n == 0 => {
                Heads::packed(Wide::floats(tensor)?, batch, length, n, hidden / n)
            }
            (_, Some(n)) => Err(OpError::input(format!(
                "expected [b, {n}, s, h], or [b, s, d] that divides into {n} heads, got {}",
                tensor.shape()
            ))),
            (_, None) => Err(OpError::input(format!("expected [b, n, s, h], got {}", tensor.shape()))),
        }
    }

    /// From `[b, s, n, h]`.
    pub fn packed(values: Vec<f64>, batch: usize, length: usize, heads: usize, size: usize) -> Result<Heads, OpError> {
        let values = swap_middle(&values, batch, length, heads, size)?;
        Ok(Heads { batch, heads, length, size, values })
    }

    /// Part `at` of `parts` of `[b, s, n, parts, h]`.
    pub fn part(tensor: &Tensor, heads: usize, parts: usize, at: usize) -> Result<Heads, OpError> {
        match *tensor.shape().dims() {
            [batch, length, n, p, size] if n == heads && p == parts => {
                let all = Wide::floats(tensor)?;
                let rows = if all.is_empty() { 0 } else { batch * length * n };
                let starts = (0..rows).map(|row| (row * parts + at) * size);
                let values = starts.flat_map(|start| all[start..start + size].iter().copied()).collect();
                Heads::packed(values, batch, length, heads, size)
            }
            _ => Err(OpError::input(format!("expected [b, s, {heads}, {parts}, h], got {}", tensor.shape()))),
        }
    }

    /// `count` heads from head `first` on.
    pub fn slice(&self, first: usize, count: usize) -> Heads {
        let block = self.length.saturating_mul(self.size);
        let samples = self.values.chunks_exact(self.heads.saturating_mul(block).max(1));
        let values = samples.flat_map(|sample| &sample[first * block..(first + count) * block]).copied().collect();
        Heads { heads: count, values, ..*self }
    }

    pub fn vector(&self, batch: usize, head: usize, at: usize) -> &[f64] {
        let start = ((batch * self.heads + head) * self.length + at) * self.size;
        &self.values[start..start + self.size]
    }

    /// Adds to each vector what its head has in `bias`, `[n·h]`.
    pub fn add_bias(&mut self, bias: &[f64]) -> Result<(), OpError> {
        if bias.len() != self.heads.saturating_mul(self.size) {
            let (heads, size) = (self.heads, self.size);
            return Err(OpError::input(format!("a bias of {} for {heads} heads of {size}", bias.len())));
        }
        let block = self.length.saturating_mul(self.size).max(1);
        for (i, x) in self.values.iter_mut().enumerate() {
            *x += bias[i / block % self.heads * self.size + i % self.size];
        }
        Ok(())
    }

    /// These, then `after`, along the length.
    pub fn followed_by(&self, after: &Heads) -> Result<Heads, OpError> {
        let of = |heads: &Heads| (heads.batch, heads.heads, heads.size);
        if of(self) != of(after) {
            return Err(OpError::input(format!("past state {} before {}", self.shape(), after.shape())));
        }
        let (past, new) = (self.length.saturating_mul(self.size), after.length.saturating_mul(after.size));
        let mut values = Vec::with_capacity(self.values.len() + after.values.len());
        let rows = if self.values.len() + after.values.len() == 0 { 0 } else { self.batch * self.heads };
        for row in 0..rows {
            values.extend_from_slice(&self.values[row * past..(row + 1) * past]);
            values.extend_from_slice(&after.values[row * new..(row + 1) * new]);
        }
        Ok(Heads { length: self.length + after.length, values, ..*self })
    }

    /// As a tensor `[b, n, s, h]`.
    pub fn by_head(self, dtype: DType) -> Result<Value, OpError> {
        Ok(Wide::Float(self.values).narrow(dtype, [self.batch, self.heads, self.length, self.size])?.into())
    }

    /// As a tensor `[b, s, n·h]`.
    pub fn by_position(self, dtype: DType) -> Result<Value, OpError> {
        let values = swap_middle(&self.values, self.batch, self.heads, self.length, self.size)?;
        Ok(Wide::Float(values).narrow(dtype, [self.batch, self.length, self.heads.saturating_mul(self.size)])?.into())
    }

    fn shape(&self) -> String {
        format!("[{}, {}, {}, {}]", self.batch, self.heads, self.length, self.size)
    }
}

/// `[a, b, c, d]` as `[a, c, b, d]`.
fn swap_middle(values: &[f64], a: usize, b: usize, c: usize, d: usize) -> Result<Vec<f64>, OpError> {
    let mut out = Vec::with_capacity(values.len());
    if values.is_empty() {
        return Ok(out);
    }
    for (i, j, k) in (0..a).flat_map(|i| (0..c).flat_map(move |j| (0..b).map(move |k| (i, j, k)))) {
        let start = ((i * b + k) * c + j) * d;
        out.extend_from_slice(values.get(start..start + d).ok_or_else(|| OpError::input("too few elements"))?);
    }
    Ok(out)
}

/// Which row of scores: those of one query.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub batch: usize,
    pub head: usize,
    pub query: usize,
}

/// `Σ weight(key) · v(key)` for every query. `weigh` makes weights, in place, of the products of a query with all keys. Query heads
/// share the heads of keys and values in groups, in their order. A key of weight 0 takes no part, whatever its value.
pub(super) fn attend(
    (q, k, v): (&Heads, &Heads, &Heads),
    context: &EvalContext,
    mut weigh: impl FnMut(Row, &mut [f64]) -> Result<(), OpError>,
) -> Result<Heads, OpError> {
    let fit =
        q.batch == k.batch && q.batch == v.batch && q.size == k.size && k.length == v.length && k.heads == v.heads;
    if !fit || k.heads == 0 || !q.heads.is_multiple_of(k.heads) {
        let (q, k, v) = (q.shape(), k.shape(), v.shape());
        return Err(OpError::input(format!("queries {q}, keys {k} and values {v} don't fit together")));
    }
    let group = q.heads / k.heads;
    for bound in [&[q.batch, q.heads, q.length, k.length][..], &[q.batch, q.heads, q.length], &[k.length]] {
        context.bounded_len(bound)?;
    }
    let mut values = vec![0.0; context.bounded_len(&[q.batch, q.heads, q.length, v.size])?];
    let mut scores = vec![0.0; k.length];
    let rows = (0..q.batch).flat_map(|b| (0..q.heads).flat_map(move |n| (0..q.length).map(move |s| (b, n, s))));
    for (at, (batch, head, query)) in rows.enumerate() {
        let vector = q.vector(batch, head, query);
        for (key, score) in scores.iter_mut().enumerate() {
            *score = vector.iter().zip(k.vector(batch, head / group, key)).map(|(q, k)| q * k).sum();
        }
        weigh(Row { batch, head, query }, &mut scores)?;
        let sums = &mut values[at * v.size..(at + 1) * v.size];
        for (key, &weight) in scores.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
            sums.iter_mut().zip(v.vector(batch, head / group, key)).for_each(|(sum, v)| *sum += weight * v);
        }
    }
    Ok(Heads { batch: q.batch, heads: q.heads, length: q.length, size: v.size, values })
}

/// `exp(x) / (Σ exp(x) + exp(sink))`, without the last term where there is no sink; zeros where every score is −∞.
pub(super) fn softmax(row: &mut [f64], sink: Option<f64>) {
    let start = sink.unwrap_or(f64::NEG_INFINITY);
    let largest = row.iter().fold(start, |a, &b| if b > a || b.is_nan() { b } else { a });
    if largest == f64::NEG_INFINITY {
        return row.fill(0.0);
    }
    row.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum = row.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - largest).exp());
    row.iter_mut().for_each(|x| *x /= sum);
}

/// `cap · tanh(x / cap)`; `x` where there is no cap.
pub(super) fn soft_cap(x: f64, cap: f32) -> f64 {
    if cap > 0.0 { f64::from(cap) * (x / f64::from(cap)).tanh() } else { x }
}

/// What is added to scores, of a shape that broadcasts to `[b, n, s, t]`.
pub(super) struct Bias {
    values: Vec<f64>,
    strides: [usize; 4],
    /// Number of keys it has, of the `t` there are.
    pub keys: usize,
}

impl Bias {
    /// A bool is 0 where it holds, −∞ elsewhere. Fewer keys than `to` has are admitted where `shorter` says so.
    pub fn of(tensor: &Tensor, to: [usize; 4], shorter: bool) -> Result<Bias, OpError> {
        let mut shape = tensor.shape().dims();
        while shape.len() > 4 && shape[0] == 1 {
            shape = &shape[1..];
        }
        let wrong = || OpError::input(format!("scores of {to:?} and a bias of {}", tensor.shape()));
        let lead = 4usize.checked_sub(shape.len()).filter(|_| !shape.is_empty()).ok_or_else(wrong)?;
        let keys = shape[shape.len() - 1];
        if keys > to[3] || (!shorter && keys != to[3]) {
            return Err(wrong());
        }
        let (mut strides, mut stride) = ([0; 4], 1usize);
        for (axis, &extent) in shape.iter().enumerate().rev() {
            match lead + axis {
                3 => strides[3] = 1,
                at if extent == to[at] => strides[at] = stride,
                _ if extent == 1 => {}
                _ => return Err(wrong()),
            }
            stride = stride.wrapping_mul(extent);
        }
        let values = match Wide::of(tensor)? {
            Wide::Float(values) => values,
            Wide::Bool(values) => values.iter().map(|&v| if v { 0.0 } else { f64::NEG_INFINITY }).collect(),
            Wide::Int(values) => values.iter().map(|&v| v as f64).collect(),
        };
        Ok(Bias { values, strides, keys })
    }

    /// −∞ for keys that it does not have.
    pub fn at(&self, row: Row, key: usize) -> f64 {
        if key >= self.keys {
            return f64::NEG_INFINITY;
        }
        let [batch, head, query, _] = self.strides;
        self.values[row.batch * batch + row.head * head + row.query * query + key]
    }
}

/// The extents of [`Heads`], as far as they are known.
#[derive(Clone, Debug)]
pub(super) struct HeadDims {
    pub batch: Dim,
    pub heads: Dim,
    pub length: Dim,
    pub size: Dim,
}

impl HeadDims {
    /// As [`Heads::of`]; `None` where the rank is unknown.
    pub fn of(fact: &TensorFact, heads: Option<usize>) -> Result<Option<HeadDims>, OpError> {
        Ok(match (fact.shape.as_deref(), heads) {
            (None, _) => None,
            (Some([batch, n, length, size]), given) => {
                if let (Some(given), Some(n)) = (given, n.as_const())
                    && n != given as i64
                {
                    return Err(OpError::input(format!("expected {given} heads, got {fact}")));
                }
                Some(HeadDims { batch: batch.clone(), heads: n.clone(), length: length.clone(), size: size.clone() })
            }
            (Some([batch, length, hidden]), Some(n)) => {
                if hidden.as_const().is_some_and(|hidden| n == 0 || hidden % n as i64 != 0) {
                    return Err(OpError::input(format!("{fact} does not divide into {n} heads")));
                }
                let (heads, batch, length) = (Dim::from(n), batch.clone(), length.clone());
                Some(HeadDims { batch, size: hidden.floor_div(&heads), heads, length })
            }
            (Some(_), _) => {
                let packed = if heads.is_some() { " or [b, s, n·h]" } else { "" };
                return Err(OpError::input(format!("expected [b, n, s, h]{packed}, got {fact}")));
            }
        })
    }

    pub fn by_head(&self, dtype: DType) -> TensorFact {
        let HeadDims { batch, heads, length, size } = self.clone();
        TensorFact::new(dtype, vec![batch, heads, length, size])
    }

    pub fn by_position(&self, dtype: DType) -> TensorFact {
        let HeadDims { batch, heads, length, size } = self.clone();
        TensorFact::new(dtype, vec![batch, length, heads * size])
    }
}
